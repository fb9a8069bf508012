"""Who is measured: Sluice, the peers, and nobody (the viewers straight at the endpoint, which proves the rig)."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from ops.bench.peers.fastapi_stack import build_venv, open_fastapi
from ops.bench.peers.nginx import find_nginx, open_nginx
from ops.bench.procs import Child
from ops.bench.viewers import Ask, ask_endpoint, ask_relay

__all__ = ["DIRECT", "FASTAPI", "NGINX", "PLAIN", "RELAYS", "SLUICE", "Relay", "sluice"]

Open = Callable[[int, int], AbstractAsyncContextManager[Child | None]]  # the endpoint's port and a core to the server


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """A server under test, and how its viewers ask. ``key`` is what it is called on the command line."""

    key: str
    name: str
    open: Open
    ask: Ask
    ask_once: Ask  # as a client that cannot resume: its answer stops when it leaves
    missing: Callable[[], str] = lambda: ""  # get it ready; returns why it cannot be measured here, empty where it can
    most_streams: int = 1_000_000  # that it can hold open


def _python(arguments: tuple[str, ...], settings: dict[str, str]) -> Open:
    """A program of ours, which learns from ``LLM_BASE_URL`` where the endpoint is."""

    @asynccontextmanager
    async def open_server(endpoint_port: int, core: int) -> AsyncIterator[Child]:
        environment = settings | {"LLM_BASE_URL": f"http://127.0.0.1:{endpoint_port}/v1"}
        async with Child([sys.executable, *arguments], core, environment) as child:
            yield child

    return open_server


@asynccontextmanager
async def _open_nothing(endpoint_port: int, core: int) -> AsyncIterator[None]:
    yield None


# All of it is on: ids, replay log, heartbeats, deadlines, rate limit, one log line a stream. Only what would refuse one
# machine a thousand streams at once, or end one that stands still for a measurement, is set higher.
_SLUICE_SETTINGS = {
    "SLUICE_PORT": "0",
    "SLUICE_ADMIN_PORT": "0",
    "SLUICE_LOG_FORMAT": "json",
    "SLUICE_RATE_LIMIT": "1000000/1",
    "SLUICE_MAX_STREAMS_PER_CLIENT": "100000",
    "SLUICE_MAX_STREAMS": "100000",
    "SLUICE_FIRST_TOKEN_TIMEOUT": "600",
    "SLUICE_IDLE_TIMEOUT": "600",
    "SLUICE_STREAM_TIMEOUT": "600",
    "SLUICE_MAX_ANSWER_BYTES": str(1 << 28),
}


def sluice(**settings: str) -> Relay:
    """Sluice with these settings beside those that every run needs."""
    return Relay(
        key="sluice",
        name="Sluice",
        open=_python(("run.py",), _SLUICE_SETTINGS | settings),
        ask=ask_relay,
        ask_once=partial(ask_relay, resumable=False),
    )


SLUICE = sluice()
PLAIN_PATH = replace(sluice(SLUICE_FAST_PATH="off"), key="sluice-plain-path", name="Sluice, plain path")
PLAIN = Relay(
    key="plain",
    name="plain aiohttp",
    open=_python(("-m", "ops.bench.plain_relay"), {}),
    ask=ask_relay,
    ask_once=ask_relay,
)
NGINX = Relay(
    key="nginx",
    name="nginx",
    open=open_nginx,
    ask=ask_endpoint,
    ask_once=ask_endpoint,
    missing=lambda: "" if find_nginx() else "not installed",
)
# The openai client keeps at most 1000 connections: with more streams some would wait for others to end.
FASTAPI = Relay(
    key="fastapi",
    name="FastAPI stack",
    open=open_fastapi,
    ask=ask_relay,
    ask_once=ask_relay,
    missing=build_venv,
    most_streams=900,
)
DIRECT = Relay(key="direct", name="direct", open=_open_nothing, ask=ask_endpoint, ask_once=ask_endpoint)

RELAYS = {relay.key: relay for relay in (SLUICE, PLAIN_PATH, PLAIN, NGINX, FASTAPI, DIRECT)}
