"""Node with the published clients in it, and Sluice as those clients are told to find it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.clients.node import DEADLINE_S, Failed, NodeScript, install_packages, run_script
from tests.conftest import miss, node_from

LEAST_NODE = 20  # the oldest that these clients were seen to run on, whatever their package.json asks for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's own time does not begin before the packages are there, for which whoever comes first has to wait."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(60, func_only=True))


@pytest.fixture(scope="session")
def node(need: Callable[[str], str]) -> str:
    """The path of Node, beside which the packages of ``js/package-lock.json`` are installed."""
    path, npm = node_from(need, LEAST_NODE), need("npm")
    try:
        install_packages(npm)
    except Failed as exc:
        miss(str(exc))
    return path


class RunJs(Protocol):
    async def __call__(self, name: str, /, *, deadline_s: float = DEADLINE_S, **arguments: Any) -> dict[str, Any]: ...


@pytest.fixture
def run_js(node: str) -> RunJs:
    """``await run_js("openai.mjs", url=…, …)`` runs a script to its end and returns its result."""

    async def run(name: str, /, *, deadline_s: float = DEADLINE_S, **arguments: Any) -> dict[str, Any]:
        return await run_script(node, name, arguments, deadline_s=deadline_s)

    return run


class StartJs(Protocol):
    def __call__(self, name: str, /, **arguments: Any) -> NodeScript: ...


@pytest.fixture
def start_js(node: str) -> StartJs:
    """``async with start_js("eventsource.mjs", url=…) as script`` runs one that the test listens to meanwhile."""
    return lambda name, /, **arguments: NodeScript(node, name, arguments)
