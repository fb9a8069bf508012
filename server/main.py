"""The process: listeners, signals, drain."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final

import uvloop
from aiohttp import web, web_response

from server.api.keys import DESK
from server.app import create_admin_app, create_app, fast_path_works
from server.connections import Connections
from server.demo.model import DEMO_MODEL_NAME, demo_model
from server.logs import log_event, logging_to
from server.relay.desk import Desk
from server.settings import Settings
from server.sockets import BACKLOG, CannotListen, bind_admin, public_listener, url_of
from server.systemd import Notifier

__all__ = ["Serving", "open_server", "run", "takes_fast_path"]

_ROOT: Final = Path(__file__).resolve().parent.parent
_FAREWELL: Final = 2.0  # s for viewers to take the last event once the drain is over
_SPARE_DESCRIPTORS: Final = 64  # listeners, logs, the interpreter's own

# From request line to keep-alive; each is bounded, and one that is misspelt would silently switch all of them off.
_MIN_LINE: Final = 16_384  # bytes: 1000 emoji of q are 12 kB
_KEEPALIVE: Final = 75.0  # s: longer than a load balancer's usual 60, so that it is never us who close under its hands
_LINGER: Final = 2.0  # s that the rest of a refused body is read and dropped

# aiohttp names itself, Python and both versions in every answer, and in those to what is no HTTP asks nobody.
web_response.SERVER_SOFTWARE = "sluice"  # type: ignore[attr-defined]

_log = logging.getLogger("sluice.process")


def run(settings: Settings, environment: Mapping[str, str]) -> int:
    """Serve until a signal; returns the exit status: 0, or 1 where an address could not be had."""
    _fill_standard_streams()
    _tame_collector()
    with logging_to(sys.stderr, form=settings.log_format, level=settings.log_level):
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(_serve(settings, environment))
        except CannotListen as exc:
            log_event(_log, logging.ERROR, "cannot_listen", reason=str(exc))
            return 1


def _fill_standard_streams() -> None:
    """Open nothing in place of a stdin, stdout or stderr that is closed: the loop aborts over a socket of such a
    number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _tame_collector() -> None:
    """Spare Python's collector what lives as long as the process, and let it look for cycles less often: hardly
    anything here is in one, and most of what it would look at is gone a moment later. Not too seldom, either: the more
    there is to look at, the longer everything stands still."""
    gc.freeze()
    gc.set_threshold(4_000, 8, 10)


async def takes_fast_path(settings: Settings) -> bool:
    """Whether bytes take the short way through aiohttp: as the settings allow, and where it works."""
    return settings.fast_path == "auto" and await fast_path_works()


async def _serve(settings: Settings, environment: Mapping[str, str]) -> int:
    async with contextlib.AsyncExitStack() as stack:
        signals = _Signals()
        stack.callback(signals.ignore)
        listener = stack.enter_context(public_listener(settings, environment))
        admin_listener = bind_admin(settings)
        demo = not settings.llm_base_url
        if demo:
            url = await stack.enter_async_context(demo_model(_ROOT))
            settings = dataclasses.replace(settings, llm_base_url=url, llm_model=DEMO_MODEL_NAME, llm_api_key="")
            log_event(_log, logging.WARNING, "demo_model", url=url, note="LLM_BASE_URL is not set; this is no LLM")
        # The browser's side and the endpoint's; the demo model holds the other end of the latter.
        most = _raise_descriptor_limit() // (3 if demo else 2)
        if most < settings.max_streams:
            log_event(_log, logging.WARNING, "few_descriptors", connections=most, max_streams=settings.max_streams)

        serving = await stack.enter_async_context(
            open_server(settings, listener, admin_listener, demo=demo, max_connections=most)
        )
        notifier = stack.enter_context(Notifier(environment))
        async with notifier.watchdog():
            admin_url = None if admin_listener is None else url_of(admin_listener)
            log_event(
                _log,
                logging.INFO,
                "listening",
                url=url_of(listener),
                admin_url=admin_url,
                model=settings.llm_model,
                fast_path=serving.fast_path,
            )
            notifier.ready()
            await signals.first.wait()
            notifier.stopping()
            await serving.drain(settings.drain_timeout, cut_short=signals.second)
    log_event(_log, logging.INFO, "stopped")
    return 0


@contextlib.asynccontextmanager
async def open_server(
    settings: Settings,
    listener: socket.socket,
    admin_listener: socket.socket | None = None,
    *,
    demo: bool = False,
    max_connections: int = 10_000,
) -> AsyncIterator[Serving]:
    """Serve on the given sockets while the context lasts; on leaving, what still runs is interrupted."""
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        connections = await stack.enter_async_context(Connections(most=max_connections))
        fast_path = await takes_fast_path(settings)
        app = create_app(settings, connections, fast_path=fast_path, demo=demo)
        public = await stack.enter_async_context(_running(app, settings))
        desk = public.app[DESK]
        if admin_listener is not None:
            # Entered later and so left earlier, but kept open while the drain goes on: /readyz must tell of it.
            admin = await stack.enter_async_context(_running(create_admin_app(desk), settings))
            admin_server = await loop.create_server(_server_of(admin), sock=admin_listener)
            stack.callback(admin_server.close)
        # The loop listens once more, and so has to say how long the queue is.
        server = await loop.create_server(connections.factory(_server_of(public)), sock=listener, backlog=BACKLOG)
        stack.callback(server.close)
        yield Serving(desk, server, connections, fast_path=fast_path)


class Serving:
    """A server that is open."""

    def __init__(self, desk: Desk, server: asyncio.Server, connections: Connections, *, fast_path: bool) -> None:
        self.desk = desk
        self.fast_path = fast_path  # whether bytes take the short way
        self._server = server
        self._connections = connections

    async def drain(self, timeout: float, *, cut_short: asyncio.Event) -> None:
        """Accept no more and let open streams finish; interrupt those that do not within ``timeout`` (s), or as soon
        as ``cut_short`` is set."""
        desk = self.desk
        desk.drain()
        self._server.close()
        log_event(_log, logging.INFO, "draining", streams=desk.streams, timeout_s=timeout)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await _first_of(self._finished(), cut_short.wait())
        desk.interrupt()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                await desk.empty()
        desk.abort_viewers()

    async def _finished(self) -> None:
        """Wait until nobody is owed anything: no stream runs, and each request has its answer. (One whose body is still
        on its way is refused when that has come, with a 503 that says why.)"""
        await self.desk.empty()
        await self._connections.idle()


async def _first_of(*waits: Coroutine[Any, Any, object]) -> None:
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


@contextlib.asynccontextmanager
async def _running(app: web.Application, settings: Settings) -> AsyncIterator[web.AppRunner]:
    runner = web.AppRunner(
        app,
        handle_signals=False,
        handler_cancellation=True,  # a viewer that leaves cancels its handler, within milliseconds
        access_log=None,  # it would print the query string; server/api/middleware/request_log.py has ours
        shutdown_timeout=1.0,  # the drain is over by then
        keepalive_timeout=_KEEPALIVE,
        max_line_size=max(_MIN_LINE, 12 * settings.max_query_chars + 512),  # an emoji is 12 bytes, percent-encoded
        lingering_time=_LINGER,
        auto_decompress=False,  # of request bodies: nobody needs it, and a bomb would
    )
    await runner.setup()
    try:
        yield runner
    finally:
        await runner.cleanup()


def _server_of(runner: web.AppRunner) -> web.Server:
    if runner.server is None:
        raise RuntimeError("the runner is not set up")
    return runner.server


def _raise_descriptor_limit() -> int:
    """Take as many descriptors as the system gives, and return how many there are for connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it; then what there is must do
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return max(24, soft - _SPARE_DESCRIPTORS)


class _Signals:
    """SIGTERM and SIGINT: the first asks to drain, the second to stop at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrived)

    def ignore(self) -> None:
        """Let no further signal change the exit status of a process that is about to end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def _arrived(self) -> None:
        if self.first.is_set():
            self.second.set()
        self.first.set()
