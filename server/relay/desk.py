"""The desk: where answers are opened, viewed and left, and which knows what is running now."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from server.errors import Overloaded, ShuttingDown, TooManyStreams
from server.logs import log_event
from server.relay.answer import Answer, AnswerLimits, Outcome, Source
from server.relay.viewer import Connection, Viewer
from server.wire.chat import ChatRequest

__all__ = ["Desk", "DeskLimits"]

_ID_BYTES: Final = 24  # 192 random bits, 32 characters: nobody guesses a stream
_RETRY_SOON: Final = 5  # s, told to those refused for want of a place; when one gets free nobody knows

_log = logging.getLogger("sluice.stream")


class DeskLimits(AnswerLimits, Protocol):
    """The bounds of all answers together, as the settings name them."""

    @property
    def max_streams(self) -> int: ...
    @property
    def max_streams_per_client(self) -> int: ...
    @property
    def heartbeat(self) -> float: ...
    @property
    def write_timeout(self) -> float: ...


class Desk:
    """Runs the answers of one process. Admission is two steps without an await between: :meth:`admit`, :meth:`open`.

    An answer holds its place until it has ended and nobody reads it any more.
    """

    def __init__(self, source: Source, limits: DeskLimits) -> None:
        self._source = source
        self._limits = limits
        self._viewers: dict[Answer, set[Viewer]] = {}  # every answer that holds a place, with who reads it
        self._connections: set[Connection] = set()
        self._streams_of: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.draining = False

    @property
    def streams(self) -> int:
        """How many answers hold a place."""
        return len(self._viewers)

    @property
    def viewers(self) -> int:
        """How many connections read an answer."""
        return len(self._connections)

    def admit(self, client: str) -> None:
        """Return if ``client`` may open a stream now. Raises ShuttingDown, TooManyStreams or Overloaded."""
        if self.draining:
            raise ShuttingDown(retry_after=_RETRY_SOON)
        if self._streams_of[client] >= self._limits.max_streams_per_client:
            raise TooManyStreams(retry_after=_RETRY_SOON)
        if self.streams >= self._limits.max_streams:
            raise Overloaded(retry_after=_RETRY_SOON)

    def open(self, client: str, request: ChatRequest) -> Answer:
        """Start an answer for ``client``, who was admitted. Whoever opens it views it at once, or it never stops."""
        answer = Answer(secrets.token_urlsafe(_ID_BYTES), client, request, self._source, self._limits)
        self._viewers[answer] = set()
        self._streams_of[client] += 1
        self._empty.clear()
        task = answer.start()
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._answer_over(done, answer))
        return answer

    @contextmanager
    def viewing(self, answer: Answer, connection: Connection) -> Iterator[Viewer]:
        """A viewer of ``answer`` on ``connection`` while the context lasts. The last one to leave stops the answer."""
        viewer = Viewer(
            answer.log, connection, heartbeat=self._limits.heartbeat, write_timeout=self._limits.write_timeout
        )
        self._viewers[answer].add(viewer)
        self._connections.add(connection)
        try:
            yield viewer
        finally:
            if viewer.stalled:
                log_event(_log, logging.INFO, "viewer_stalled", id=answer.id, client=answer.client)
            self._connections.discard(connection)
            self._viewers[answer].discard(viewer)
            if not self._viewers[answer]:
                answer.stop(Outcome.CLIENT_GONE)
            self._release_if_over(answer)

    # ---- The end of the process

    async def empty(self) -> None:
        """Wait until no answer holds a place."""
        await self._empty.wait()

    def interrupt(self) -> None:
        """End every answer now; its viewers are told ``interrupted``."""
        for answer in list(self._viewers):
            answer.stop(Outcome.INTERRUPTED)

    def abort_viewers(self) -> None:
        """Drop the connections of those who have not taken the end of their answer."""
        for connection in list(self._connections):
            connection.abort()

    async def close(self) -> None:
        """Interrupt what still runs and wait until the upstream requests are closed."""
        self.interrupt()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # ---- Bookkeeping

    def _answer_over(self, task: asyncio.Task[None], answer: Answer) -> None:
        self._tasks.discard(task)
        self._report(answer)
        self._release_if_over(answer)

    def _release_if_over(self, answer: Answer) -> None:
        if answer.outcome is None or answer not in self._viewers or self._viewers[answer]:
            return
        del self._viewers[answer]
        self._streams_of[answer.client] -= 1
        if not self._streams_of[answer.client]:
            del self._streams_of[answer.client]
        if not self._viewers:
            self._empty.set()

    @staticmethod
    def _report(answer: Answer) -> None:
        prompt = None if answer.said is None else answer.request.messages[-1][1]
        log_event(
            _log,
            logging.INFO,
            "stream_end",
            id=answer.id,
            client=answer.client,
            outcome=answer.outcome.value if answer.outcome else None,
            code=answer.error.code if answer.error else None,
            model=answer.model,
            tokens=answer.tokens,
            ttft_ms=_milliseconds(answer.ttft),
            duration_ms=_milliseconds(answer.duration),
            prompt=prompt,
            answer=None if answer.said is None else "".join(answer.said),
        )


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
