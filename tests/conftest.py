"""What every test may ask for: a scripted upstream, and the real server as a process in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import NoReturn

import pytest
import uvloop

from server.main import Serving, open_server
from server.relay.desk import Desk
from server.settings import read_settings
from server.sockets import public_listener, url_of
from tests.sluice_process import SluiceProcess
from tests.upstream_sim import ScriptedUpstream


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that Sluice runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """An OpenAI-compatible endpoint whose every byte the test decides."""
    async with ScriptedUpstream() as scripted:
        yield scripted


class InProcess:
    """A server in the test's own process: ``url`` to talk to it, ``desk`` to see what it does."""

    def __init__(self, serving: Serving, url: str) -> None:
        self.serving = serving
        self.url = url

    @property
    def desk(self) -> Desk:
        return self.serving.desk

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


Serve = Callable[..., Awaitable[InProcess]]


@pytest.fixture
async def serve(upstream: ScriptedUpstream) -> AsyncIterator[Serve]:
    """``await serve(SLUICE_…=…)`` opens the server before ``upstream``, on a real socket, as ``server.main`` does."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**environment: str) -> InProcess:
            settings = read_settings({"LLM_BASE_URL": upstream.base_url, "SLUICE_PORT": "0"} | environment)
            listener = stack.enter_context(public_listener(settings, {}))
            return InProcess(await stack.enter_async_context(open_server(settings, listener)), url_of(listener))

        yield start


Launch = Callable[..., Awaitable[SluiceProcess]]


@pytest.fixture
async def launch() -> AsyncIterator[Launch]:
    """``await launch(LLM_BASE_URL=…, SLUICE_…=…)`` starts ``run.py`` on a free port; killed when the test ends."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*arguments: str, **environment: str) -> SluiceProcess:
            return await stack.enter_async_context(SluiceProcess(environment, *arguments))

        yield start


@pytest.fixture(scope="session")
def need() -> Callable[[str], str]:
    """``need("nginx")`` gives the path of a real program, or skips the test by its name (fails with REQUIRE_ALL=1)."""

    def find(program: str) -> str:
        path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        return path or miss(f"{program} is not installed")

    return find


def miss(reason: str) -> NoReturn:
    """Skip the test that cannot run for that reason; with REQUIRE_ALL=1 it fails."""
    if os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(f"{reason}, and REQUIRE_ALL=1 allows no skip")
    pytest.skip(reason)


def node_from(need: Callable[[str], str], *least: int) -> str:
    """The path of a Node of that version or a later one."""
    path = need("node")
    version = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    if tuple(map(int, version.removeprefix("v").split(".")[: len(least)])) < least:
        miss(f"node {version} is older than {'.'.join(map(str, least))}")
    return path
