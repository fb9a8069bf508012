"""A viewer: follows a log into one connection, with heartbeats, and gives up on a reader that takes nothing."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from server.relay.log import EventLog
from server.wire.events import PING, ping

__all__ = ["Connection", "Viewer"]

# At most this much is handed to a connection at once, so that a reader that takes nothing holds little of our memory.
# It is aiohttp's own high-water mark: beyond it a write waits.
_WRITE_BYTES: Final = 64 << 10

_CHECKS_PER_WRITE_TIMEOUT: Final = 8  # how often a viewer looks whether its reader still takes something


class Connection(Protocol):
    """The way to one client."""

    async def write(self, data: bytes) -> None:
        """Send ``data``; waits while the client lags too far. Raises ConnectionError once the client is gone."""

    async def finish(self) -> None:
        """End the response and wait as :meth:`write` does."""

    def untaken_bytes(self) -> int:
        """Bytes sent that the client's side has not acknowledged, in our buffers and the kernel's."""

    def abort(self) -> None:
        """Drop the connection at once; a waiting write ends. The kernel goes on with what it holds already."""

    def reset(self) -> None:
        """Drop the connection at once, with whatever the kernel holds for it."""


class Viewer:
    """Reads ``log`` from ``offset`` on and writes it to ``connection``.

    ``heartbeat`` (s): a ping goes out after so long without an event. ``write_timeout`` (s): how long the client may
    take nothing at all while bytes wait for it. One coarse timer serves both; a token costs no timer.
    """

    def __init__(
        self, log: EventLog, connection: Connection, *, heartbeat: float, write_timeout: float, offset: int = 0
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._connection = connection
        self._heartbeat = heartbeat
        self._write_timeout = write_timeout
        self._check_every = min(heartbeat, write_timeout / _CHECKS_PER_WRITE_TIMEOUT)
        self._offset = offset
        self._more = asyncio.Event()
        self._sent_bytes = 0
        self._sent_at = self._loop.time()  # when the last event or ping was sent
        self._taken_bytes = 0  # of those sent, as of the last check
        self._taken_at = self._loop.time()  # when the client last was seen to take something, or to lack nothing
        self._retry_ms: int | None = None  # what the client is still to be told
        self.stalled = False  # the client took nothing for the whole write timeout, and its connection was aborted
        self.finished = False  # the client has been sent everything, and the response its end

    def tell_retry(self, milliseconds: int) -> None:
        """Let the client wait so long before it comes back, should its connection end before the answer does."""
        self._retry_ms = milliseconds
        self._more.set()

    async def follow(self) -> None:
        """Write until the answer's last event is out and the response has its end.

        Raises ConnectionError when the client has gone, or was found to be (``stalled``).
        """
        self._log.subscribe(self._more.set)
        self._timer = self._loop.call_later(self._check_every, self._check)
        try:
            await self._follow()
        finally:
            self._timer.cancel()
            self._log.unsubscribe(self._more.set)

    async def _follow(self) -> None:
        while True:
            self._more.clear()
            if data := self._log.read(self._offset, _WRITE_BYTES):
                self._offset += len(data)
                await self._write(data)
            elif self._log.ended:
                await self._connection.finish()
                self.finished = True
                return
            elif self._retry_ms is not None:
                retry_ms, self._retry_ms = self._retry_ms, None
                await self._write(ping(retry_ms))
            elif self._loop.time() >= self._sent_at + self._heartbeat:  # as the timer reckons, to the last bit
                await self._write(PING)
            else:
                await self._more.wait()

    async def _write(self, data: bytes) -> None:
        self._sent_at = self._loop.time()
        self._sent_bytes += len(data)
        await self._connection.write(data)

    def _check(self) -> None:
        """The coarse timer: wakes the writer for a ping, and aborts a connection whose reader takes nothing."""
        now = self._loop.time()
        untaken = self._connection.untaken_bytes()
        taken = self._sent_bytes - untaken
        if untaken == 0 or taken > self._taken_bytes:
            self._taken_at = now
        self._taken_bytes = taken
        if now - self._taken_at >= self._write_timeout:
            self.stalled = True
            self._connection.reset()  # it had its time to take what the kernel holds
            return
        next_check = min(now + self._check_every, self._taken_at + self._write_timeout)
        ping_due_at = self._sent_at + self._heartbeat
        if now >= ping_due_at:
            self._more.set()
        else:
            next_check = min(next_check, ping_due_at)
        self._timer = self._loop.call_at(next_check, self._check)
