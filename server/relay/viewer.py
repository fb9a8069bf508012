"""A viewer: follows a log into one connection, with heartbeats, and gives up on a reader that takes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from server.relay.log import EventLog

__all__ = ["Connection", "Heartbeats", "Viewer"]

Heartbeats = Callable[[int | None], bytes]  # the next one; in ms, how long the client waits before it comes back

# At most this much is handed to a connection at once, so that a reader that takes nothing holds little of our memory.
# It is aiohttp's own high-water mark: beyond it a write waits.
_WRITE_BYTES: Final = 64 << 10

_CHECKS_PER_WRITE_TIMEOUT: Final = 8  # how often a viewer looks whether its reader still takes something


class Connection(Protocol):
    """The way to one client."""

    async def write(self, data: bytes) -> None:
        """Send ``data``; waits while the client lags too far. Raises ConnectionError once the client is gone."""

    def write_now(self, data: bytes) -> bool:
        """Send ``data`` without a wait; false, and nothing is sent, where only :meth:`write` can."""

    async def finish(self, data: bytes) -> None:
        """Send the last ``data``, end the response, and wait as :meth:`write` does."""

    def untaken_bytes(self) -> int:
        """Bytes sent that the client's side has not acknowledged, in our buffers and the kernel's."""

    def abort(self) -> None:
        """Drop the connection at once; a waiting write ends. The kernel goes on with what it holds already."""

    def reset(self) -> None:
        """Drop the connection at once, with whatever the kernel holds for it."""


class Viewer:
    """Reads ``log`` from ``offset`` on and writes it to ``connection``, with ``ping`` for heartbeats.

    A viewer that is level with the log is written to in the moment in which a batch comes, with no switch to its task;
    one that lags reads the log at its own pace. ``heartbeat`` (s): a ping goes out after so long without an event.
    ``write_timeout`` (s): how long the client may take nothing at all while bytes wait for it. One coarse timer serves
    both; a token costs no timer.
    """

    __slots__ = (
        "_check_every",
        "_connection",
        "_heartbeat",
        "_log",
        "_loop",
        "_offset",
        "_ping",
        "_retry_ms",
        "_sent_at",
        "_sent_bytes",
        "_taken_at",
        "_taken_bytes",
        "_timer",
        "_turn",
        "_waits",
        "_write_timeout",
        "finished",
        "stalled",
    )

    def __init__(
        self,
        log: EventLog,
        connection: Connection,
        ping: Heartbeats,
        *,
        heartbeat: float,
        write_timeout: float,
        offset: int = 0,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._connection = connection
        self._ping = ping
        self._heartbeat = heartbeat
        self._write_timeout = write_timeout
        self._check_every = min(heartbeat, write_timeout / _CHECKS_PER_WRITE_TIMEOUT)
        self._offset = offset
        self._waits = False  # it has been sent all that the log has, and its task waits
        self._turn: asyncio.Future[None] | None = None  # what the task waits for, or last waited for
        self._sent_bytes = 0
        self._sent_at = self._loop.time()  # when the last event or ping was sent
        self._taken_bytes = 0  # of those sent, as of the last check
        self._taken_at = self._loop.time()  # when the client last was seen to take something, or to lack nothing
        self._retry_ms: int | None = None  # what the client is still to be told
        self.stalled = False  # the client took nothing for the whole write timeout, and its connection was aborted
        self.finished = False  # the client has been sent everything, and the response its end

    @property
    def level(self) -> bool:
        """Whether it has been sent all that the log has."""
        return self._offset == self._log.size and not self._log.ended

    def tell_retry(self, milliseconds: int) -> None:
        """Let the client wait so long before it comes back, should its connection end before the answer does."""
        self._retry_ms = milliseconds
        self._wake()

    async def follow(self) -> None:
        """Write until the answer's last event is out and the response has its end.

        Raises ConnectionError when the client has gone, or was found to be (``stalled``).
        """
        log, connection = self._log, self._connection
        log.subscribe(self._take)
        self._timer = self._loop.call_later(self._check_every, self._check)
        try:
            while True:
                data = log.read(self._offset, _WRITE_BYTES)
                self._offset += len(data)
                if log.ended and self._offset == log.size:
                    self._note_sent(data)
                    await connection.finish(data)
                    self.finished = True
                    return
                data = data or self._heartbeat_due()
                if data:
                    self._note_sent(data)
                    await connection.write(data)
                else:
                    self._turn = self._loop.create_future()
                    self._waits = True
                    await self._turn
        finally:
            self._waits = False
            self._timer.cancel()
            log.unsubscribe(self._take)

    def _heartbeat_due(self) -> bytes:
        if self._retry_ms is not None:
            retry_ms, self._retry_ms = self._retry_ms, None
            return self._ping(retry_ms)
        if self._loop.time() >= self._sent_at + self._heartbeat:  # as the timer reckons, to the last bit
            return self._ping(None)
        return b""

    def _take(self, batch: bytes, size: int) -> bool:
        """The log has more. The hot path."""
        if not self._waits:
            return False  # its task is at work, and finds it in the log
        if self._offset + len(batch) == size and not self._log.ended and self._connection.write_now(batch):
            self._offset = size
            self._sent_bytes += len(batch)
            self._sent_at = self._loop.time()
            return True
        self._wake()
        return False

    def _wake(self) -> None:
        self._waits = False
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    def _note_sent(self, data: bytes) -> None:
        self._sent_bytes += len(data)
        self._sent_at = self._loop.time()

    def _check(self) -> None:
        """The coarse timer: wakes the writer for a ping, and aborts a connection whose reader takes nothing."""
        now = self._loop.time()
        if self._taken_bytes < self._sent_bytes:  # else there is nothing to be asked of the kernel
            taken = self._sent_bytes - self._connection.untaken_bytes()
            if taken > self._taken_bytes:
                self._taken_at = now
            self._taken_bytes = taken
        if self._taken_bytes >= self._sent_bytes:
            self._taken_at = now
        if now - self._taken_at >= self._write_timeout:
            self.stalled = True
            self._connection.reset()  # it had its time to take what the kernel holds
            return
        next_check = min(now + self._check_every, self._taken_at + self._write_timeout)
        ping_due_at = self._sent_at + self._heartbeat
        if now >= ping_due_at:
            self._wake()
        else:
            next_check = min(next_check, ping_due_at)
        self._timer = self._loop.call_at(next_check, self._check)
