"""What the tests of the HTTP faces share: raw connections, the log's lines, and what must hold once all is over."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import pytest

from tests.api.observing import until
from tests.api.raw_client import RawClient
from tests.conftest import InProcess
from tests.upstream_sim import ScriptedUpstream

Connect = Callable[..., Awaitable[RawClient]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """``await connect(server)`` opens a raw connection to it, to a port or to a Unix socket; closed in the end."""
    with contextlib.ExitStack() as stack:

        async def open_connection(to: InProcess | int | str, **options: Any) -> RawClient:
            client = await RawClient.connect(to.port if isinstance(to, InProcess) else to, **options)
            stack.callback(client.close)
            return client

        yield open_connection


class Settled(Protocol):
    async def __call__(self, server: InProcess, *, within: float = 2.0) -> None: ...


@pytest.fixture
def settled(upstream: ScriptedUpstream) -> Settled:
    """``await settled(server)``: the invariants that hold when everybody has left, at most ``within`` s later."""

    async def check(server: InProcess, *, within: float = 2.0) -> None:
        with contextlib.suppress(TimeoutError):
            await until(lambda: not (server.desk.streams or server.desk.viewers or upstream.open_calls), within=within)
        assert server.desk.streams == 0, "an answer still holds its place"
        assert server.desk.viewers == 0, "a viewer that left is still counted"
        assert upstream.open_calls == [], "the upstream still works for nobody"

    return check


class LogLines:
    """The structured lines that the server logged, as their fields."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __call__(self, event: str) -> list[dict[str, Any]]:
        """The fields of each line of that event, in order."""
        return [getattr(record, "sluice_fields", {}) for record in self._caplog.records if record.msg == event]

    @property
    def failures(self) -> list[str]:
        """What was logged as an error, or with a traceback."""
        return [
            f"{record.name}: {record.getMessage()} {record.exc_info}"
            for record in self._caplog.records
            if record.levelno >= logging.ERROR or record.exc_info
        ]

    def clear(self) -> None:
        self._caplog.clear()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> LogLines:
    """``lines("stream_end")`` gives the lines of that event; everything is captured, debug too."""
    caplog.set_level(logging.DEBUG, logger="sluice")
    caplog.set_level(logging.DEBUG, logger="aiohttp")
    return LogLines(caplog)
