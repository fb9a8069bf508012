"""The connections of a listener: how many there may be, and how long one may say nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final

from aiohttp import web

__all__ = ["Connections"]

HEAD_TIMEOUT: Final = 15.0  # s for the first request's head; nginx gives 60 s, and it is what a slow-loris lives on
_SWEEP: Final = 1.0  # s between two looks for those who are over it


class Connections:
    """Makes the protocol of each accepted connection; an async context manager.

    aiohttp's keep-alive timeout is long, so that a proxy's idle connections live, and it is also its only limit on a
    request head that comes a byte at a time. So a new connection gets its own, shorter one here: one sweep a second
    over those that have not spoken. (A later head on a kept connection has the keep-alive timeout.) Beyond ``most``
    connections a new one is closed at once, since a process out of file descriptors serves nobody.
    """

    def __init__(self, *, most: int, head_timeout: float = HEAD_TIMEOUT) -> None:
        self._most = most
        self._head_timeout = head_timeout
        self._silent: dict[web.RequestHandler, float] = {}  # those that have not spoken yet, with their deadline
        self._open = 0  # at most so many: those that have left are noticed when it matters
        self._arriving = 0  # of them, made but not among the server's connections yet
        self._requests = 0  # whose head has come, and whose answer is not out
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> Connections:
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(_SWEEP, self._sweep)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()

    def factory(self, server: web.Server) -> Callable[[], asyncio.Protocol]:
        """The protocol factory for ``loop.create_server``."""

        def make() -> asyncio.Protocol:
            if self._open >= self._most:
                self._open = len(server.connections) + self._arriving
                if self._open >= self._most:
                    return _Refusal()
            self._open += 1
            # asyncio makes the protocols of a whole burst before it connects the first of them.
            self._arriving += 1
            self._loop.call_soon(self._arrived)
            handler = server()
            self._silent[handler] = self._loop.time() + self._head_timeout
            return handler

        return make

    def request_begun(self, handler: web.RequestHandler) -> None:
        """A whole request head has come. aiohttp's keep-alive timeout takes over from our own."""
        self._silent.pop(handler, None)
        self._requests += 1
        self._idle.clear()

    def request_answered(self) -> None:
        """Its answer is out, or will never be."""
        self._requests -= 1
        if not self._requests:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until every request that has begun is answered."""
        await self._idle.wait()

    def _arrived(self) -> None:
        self._arriving -= 1

    def _sweep(self) -> None:
        now = self._loop.time()
        # Those who left without a word go, too: at a thousand a second they would be a lot of memory.
        for handler, deadline in list(self._silent.items()):
            arriving = deadline - now > self._head_timeout - _SWEEP
            if deadline <= now or (handler.transport is None and not arriving):
                del self._silent[handler]
                handler.force_close()
        self._timer = self._loop.call_later(_SWEEP, self._sweep)


class _Refusal(asyncio.Protocol):
    """Closes the connection at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
