"""The desk: where answers are opened, found, viewed, left and stopped, and which knows what is running now."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import secrets
import time
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from server.errors import Overloaded, ShuttingDown, StreamNotFound, TooManyStreams
from server.logs import log_event
from server.relay.admission import Reservation
from server.relay.answer import Answer, AnswerEncoder, AnswerLimits, AnswerRequest, Source
from server.relay.deadlines import Deadlines
from server.relay.life import Life, Outcome, State
from server.relay.log import EventLog, PassingLog, ReplayLog
from server.relay.viewer import Connection, Heartbeats, Viewer
from server.wire.events import EventEncoder

__all__ = ["Desk", "DeskLimits", "Stream", "Viewing"]

_ID_BYTES: Final = 16  # 128 random bits: nobody guesses a stream; every event carries its 22 characters
_IDS_AT_ONCE: Final = 64
_RETRY_SOON: Final = 5  # s, told to those refused for want of a place; when one gets free nobody knows
_RETRY_SPREAD_MS: Final = (1000, 5000)  # over which viewers come back to a server that was restarted

# Of answers that have ended and can still be read, all together; beyond it those that ended first are forgotten before
# their window is over, and who reads them is dropped. It is an eighth of what the shipped unit allows the process.
_KEPT_BYTES: Final = 256 << 20
_KEPT_OVERHEAD: Final = 2048  # bytes that a kept answer takes beside its events

_log = logging.getLogger("sluice.stream")


class DeskLimits(AnswerLimits, Protocol):
    """The bounds of all answers together, as the settings name them."""

    @property
    def stream_timeout(self) -> float: ...
    @property
    def max_streams(self) -> int: ...
    @property
    def max_streams_per_client(self) -> int: ...
    @property
    def heartbeat(self) -> float: ...
    @property
    def write_timeout(self) -> float: ...
    @property
    def resume_grace(self) -> float: ...
    @property
    def resume_window(self) -> float: ...


class Stream:
    """An answer as the desk keeps it, from its opening until it is forgotten."""

    __slots__ = (
        "__weakref__",
        "_desk",
        "answer",
        "client",
        "delivered",
        "holds_place",
        "id",
        "life",
        "log",
        "ping",
        "timer",
    )

    def __init__(self, desk: Desk, client: str, answer: Answer) -> None:
        self._desk = desk
        self.id = answer.id
        self.client = client  # whom it was opened for
        self.life = answer.life
        self.log: EventLog = answer.log
        self.ping: Heartbeats = answer.encoder.ping
        self.answer: Answer | None = answer  # gone once its task is over: what is kept is the log
        self.delivered = False  # somebody has been sent the whole of it
        self.holds_place = True
        self.timer: asyncio.TimerHandle | None = None  # while it runs and nobody views it

    def stop(self, outcome: Outcome) -> None:
        """End its answer with ``outcome``, unless it has ended."""
        if self.answer is not None:
            self.answer.stop(outcome)

    # Methods of its own, to be handed on as callbacks: each as a partial object would take three times the memory.

    def attend(self) -> None:
        """Its life has moved, or something is due."""
        self._desk._attend(self)

    def task_over(self, task: asyncio.Task[None]) -> None:
        """Its answer's task is."""
        self._desk._task_over(self, task)


class Desk:
    """Runs the answers of one process. Admission is two steps without an await between: :meth:`admit`, :meth:`open`.

    An answer holds its place until it has ended and nobody reads it any more; read again later, it takes none.
    """

    def __init__(self, source: Source, limits: DeskLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._limits = limits
        self._clock = clock
        self._ids = _unguessable_ids()
        self._streams: dict[str, Stream] = {}  # all that can be found, by id
        self._kept: dict[str, int] = {}  # the bytes of those that have ended, the first to end first
        self._kept_bytes = 0
        self._windows = Deadlines[Stream](limits.resume_window, Stream.attend, clock=clock)
        self._lifetimes = Deadlines[Answer](limits.stream_timeout, Answer.run_out_of_time, clock=clock)
        self._viewers: dict[Viewer, tuple[Stream, Connection]] = {}
        self._places: Counter[str] = Counter()  # taken, by client
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.streams = 0  # how many answers hold a place
        self.draining = False

    @property
    def viewers(self) -> int:
        """How many connections read an answer."""
        return len(self._viewers)

    @property
    def kept(self) -> int:
        """How many answers have ended and can still be read."""
        return len(self._kept)

    @property
    def can_ask(self) -> bool:
        """Whether there is anybody at the moment who could answer."""
        return self._source.can_ask

    # ---- Opening

    def admit(self, client: str) -> None:
        """Return if ``client`` may open a stream now. Raises ShuttingDown, TooManyStreams or Overloaded."""
        if self.draining:
            raise ShuttingDown(retry_after=_RETRY_SOON)
        if self._places[client] >= self._limits.max_streams_per_client:
            raise TooManyStreams(retry_after=_RETRY_SOON)
        if self.streams >= self._limits.max_streams:
            raise Overloaded(retry_after=_RETRY_SOON)

    def open(
        self,
        client: str,
        request: AnswerRequest,
        reservation: Reservation | None = None,
        *,
        encoder: Callable[[str], AnswerEncoder] = EventEncoder,
        kept: bool = True,
    ) -> Stream:
        """Start an answer for ``client``, who was admitted. It stops if nobody comes to view it within the grace.

        ``reservation`` is what it may spend of the client's LLM tokens; ``encoder`` makes, of the stream's id, what
        writes it down. One that is not ``kept`` is for one viewer, who cannot come back.
        """
        stream_id = next(self._ids)
        limits = self._limits
        answer = Answer(
            stream_id,
            request,
            self._source,
            limits,
            Life(
                grace=limits.resume_grace if kept else 0.0,
                window=limits.resume_window if kept else 0.0,
                clock=self._clock,
            ),
            (ReplayLog if kept else PassingLog)(max_bytes=limits.max_answer_bytes),
            encoder(stream_id),
            lifetimes=self._lifetimes,
            reservation=reservation,
            clock=self._clock,
        )
        stream = Stream(self, client, answer)
        answer.on_end = stream.attend
        self._streams[stream.id] = stream
        self._places[client] += 1
        self.streams += 1
        self._empty.clear()
        task = answer.start()
        self._tasks.add(task)
        task.add_done_callback(stream.task_over)
        self._set_timer(stream)
        return stream

    # ---- Finding, viewing, stopping

    def find(self, stream_id: str) -> Stream | None:
        """The stream of that id; None where there is none, or no longer."""
        return self._streams.get(stream_id)

    def viewing(
        self, stream: Stream, connection: Connection, *, after: int | None = None, may_return: bool = False
    ) -> Viewing:
        """A viewer of ``stream`` on ``connection`` while the context lasts, from behind event ``after``, or the start.

        ``may_return`` says that its client can go on where it was. The answer goes on for the grace after the last
        such viewer; without one it stops at once when nobody views it any more. Raises IndexError if there is no event
        ``after``.
        """
        viewer = Viewer(
            stream.log,
            connection,
            stream.ping,
            heartbeat=self._limits.heartbeat,
            write_timeout=self._limits.write_timeout,
            offset=0 if after is None else stream.log.end_of(after),
        )
        return Viewing(self, stream, connection, viewer, may_return)

    def _come(self, stream: Stream, connection: Connection, viewer: Viewer) -> None:
        stream.life.join()
        self._viewers[viewer] = (stream, connection)
        self._empty.clear()
        if self.draining:
            _spread_return(viewer)
        self._set_timer(stream)  # nothing else is due where somebody views it

    def _leave(self, stream: Stream, viewer: Viewer, *, may_return: bool) -> None:
        if viewer.stalled:
            log_event(_log, logging.INFO, "viewer_stalled", id=stream.id, client=stream.client)
        del self._viewers[viewer]
        stream.delivered = stream.delivered or viewer.finished
        stream.life.leave(may_return=may_return and not viewer.finished)
        self._attend(stream)
        self._look_if_empty()

    def stop(self, stream_id: str, client: str) -> None:
        """Stop the answer that was opened for ``client``; one that has ended stays as it is.

        Raises StreamNotFound, for somebody else's too: who guesses learns nothing.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.client != client:
            raise StreamNotFound
        stream.stop(Outcome.STOPPED)

    # ---- The end of the process

    def drain(self) -> None:
        """Admit nobody any more. Those who view are told, each with another one, when to come back if they are cut off:
        all at once they would meet the next process in its first second."""
        self.draining = True
        for viewer in self._viewers:
            _spread_return(viewer)

    async def empty(self) -> None:
        """Wait until no answer holds a place and nobody reads one."""
        await self._empty.wait()

    def interrupt(self) -> None:
        """End every answer now; its viewers are told ``interrupted``."""
        for stream in list(self._streams.values()):
            stream.stop(Outcome.INTERRUPTED)

    def abort_viewers(self) -> None:
        """Drop the connections of those who have not taken the end of their answer."""
        for _, connection in list(self._viewers.values()):
            connection.abort()

    async def close(self) -> None:
        """Interrupt what still runs, wait until the upstream requests are closed, and forget what was kept."""
        self.interrupt()
        while self._tasks:
            await asyncio.wait(self._tasks)
        for stream in self._streams.values():
            if stream.timer is not None:
                stream.timer.cancel()
        self._windows.close()
        self._lifetimes.close()
        self._streams.clear()
        self._kept.clear()
        self._kept_bytes = 0

    # ---- Bookkeeping

    def _task_over(self, stream: Stream, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if stream.answer is not None:
            stream.answer.let_go()
            _report(stream, stream.answer)
        stream.answer = None

    def _attend(self, stream: Stream) -> None:
        """Do what is due, and see to what is due next. Called after everything that may have moved its life."""
        life = stream.life
        if life.overdue:
            if life.running:
                stream.stop(Outcome.CLIENT_GONE)  # which leads back here
                return
            life.forget()
        if stream.holds_place and life.state in (State.KEPT, State.FORGOTTEN):
            self._free_place(stream)
        if life.state is State.FORGOTTEN:
            self._streams.pop(stream.id, None)
            self._windows.discard(stream)
            self._kept_bytes -= self._kept.pop(stream.id, 0)
        elif not life.running and stream.id not in self._kept:
            self._kept[stream.id] = stream.log.size + _KEPT_OVERHEAD
            self._kept_bytes += self._kept[stream.id]
            self._windows.add(stream)
            self._make_room()
        self._set_timer(stream)

    def _free_place(self, stream: Stream) -> None:
        stream.holds_place = False
        self.streams -= 1
        self._places[stream.client] -= 1
        if not self._places[stream.client]:
            del self._places[stream.client]
        self._look_if_empty()

    def _look_if_empty(self) -> None:
        if not (self.streams or self._viewers):
            self._empty.set()

    def _make_room(self) -> None:
        """Forget those that ended first, as long as all together are over the bound; never the last one, however large.
        One that is read is forgotten as soon as its readers have been dropped: each of them can hold the whole of it
        for as long as it likes."""
        over = self._kept_bytes - _KEPT_BYTES
        if over <= 0:
            return  # at once: what was forgotten has left gaps at the dictionary's beginning, and each is stepped over
        last = next(reversed(self._kept))
        surplus = []
        for stream_id, size in self._kept.items():  # no further than it takes: there may be many thousands
            if over <= 0 or stream_id == last:
                break
            surplus.append(self._streams[stream_id])
            over -= size
        for stream in surplus:
            if stream.life.given_up:
                continue  # its readers are on their way
            stream.life.give_up()
            if stream.life.viewers:
                for read, connection in list(self._viewers.values()):
                    if read is stream:
                        connection.abort()
            self._attend(stream)

    def _set_timer(self, stream: Stream) -> None:
        """For one that runs and waits for a viewer."""
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None
        due_at = stream.life.due_at
        if due_at is not None and due_at < math.inf and stream.life.running:
            stream.timer = asyncio.get_running_loop().call_at(due_at, stream.attend)


class Viewing:
    """The context of one viewer: it has come, and leaves in the end."""

    __slots__ = ("_connection", "_desk", "_may_return", "_stream", "_viewer")

    def __init__(self, desk: Desk, stream: Stream, connection: Connection, viewer: Viewer, may_return: bool) -> None:
        self._desk = desk
        self._stream = stream
        self._connection = connection
        self._viewer = viewer
        self._may_return = may_return

    def __enter__(self) -> Viewer:
        self._desk._come(self._stream, self._connection, self._viewer)
        return self._viewer

    def __exit__(self, *_: object) -> None:
        self._desk._leave(self._stream, self._viewer, may_return=self._may_return)


def _unguessable_ids() -> Iterator[str]:
    """Random ids as :func:`secrets.token_urlsafe` makes them; the kernel is asked once for many of them."""
    while True:
        bits = secrets.token_bytes(_ID_BYTES * _IDS_AT_ONCE)
        for start in range(0, len(bits), _ID_BYTES):
            yield urlsafe_b64encode(bits[start : start + _ID_BYTES]).rstrip(b"=").decode("ascii")


def _spread_return(viewer: Viewer) -> None:
    viewer.tell_retry(random.randint(*_RETRY_SPREAD_MS))  # noqa: S311 - spreads load, guards nothing


def _report(stream: Stream, answer: Answer) -> None:
    log_event(
        _log,
        logging.INFO,
        "stream_end",
        id=stream.id,
        client=stream.client,
        outcome=stream.life.outcome.value if stream.life.outcome else None,
        code=answer.error.code if answer.error else None,
        model=answer.model,
        tokens=answer.tokens,
        ttft_ms=_milliseconds(answer.ttft),
        duration_ms=_milliseconds(answer.duration),
        prompt=None if answer.said is None else answer.request.prompt,
        answer=None if answer.said is None else "".join(answer.said),
    )


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
