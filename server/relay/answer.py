"""One answer: a task that turns the upstream's chunks into the events of a log, and what became of it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from server.errors import (
    AnswerTooLarge,
    InternalError,
    Interrupted,
    RelayError,
    StreamTimeout,
    TokenLimitExceeded,
    UpstreamFailed,
    UpstreamTimeout,
)
from server.relay.admission import Reservation
from server.relay.deadlines import Deadlines
from server.relay.life import Life, Outcome
from server.relay.log import LogFull, ReplayLog
from server.wire.chunks import Answerer, Chunk, ChunkSink, Delta, DeltaKind, Usage, split_texts
from server.wire.events import Summary

__all__ = ["Answer", "AnswerEncoder", "AnswerLimits", "AnswerRequest", "Source"]

_RESERVED_MORE: Final = 64  # LLM tokens at a time, for an answer that outgrows what was reserved for it

_NO_USAGE: Final = Usage(None, None)

_log = logging.getLogger("sluice.stream")


class AnswerRequest(Protocol):
    """What is asked, by one of the faces: server/wire/chat.py."""

    @property
    def model(self) -> str | None: ...
    @property
    def streamed(self) -> bool: ...
    @property
    def verbatim(self) -> bool: ...
    @property
    def prompt(self) -> str:
        """The question, for a log that is to have it."""

    def encode(self, model: str, /) -> bytes: ...
    def continued(self, said: str, spent: int, /) -> AnswerRequest: ...


class Source(Protocol):
    """Where an answer comes from: server/upstream/route.py."""

    @property
    def can_ask(self) -> bool:
        """Whether there is anybody at the moment who could answer."""

    def model_for(self, request: AnswerRequest, /) -> str:
        """The model that is asked first."""

    async def relay(self, request: AnswerRequest, sink: ChunkSink, /) -> None:
        """Hand the chunks to ``sink``, the last ones as its end. Raises UpstreamFailed."""


class AnswerLimits(Protocol):
    """The bounds of one answer, as the settings name them."""

    @property
    def max_answer_bytes(self) -> int: ...
    @property
    def log_prompts(self) -> bool: ...


class AnswerEncoder(Protocol):
    """An answer as bytes, in the language of the face that it was asked by: server/wire/events.py and its like.

    Each method returns whole events for the log; ``number`` is the place of the first one in it.
    """

    def start(self, number: int, model: str, /) -> Sequence[bytes]:
        """The answer begins; ``model`` is asked first."""

    def begin(self, answerer: Answerer, /) -> None:
        """Who really answers."""

    def tokens(self, number: int, texts: Sequence[bytes], wire: bytes, /) -> Sequence[bytes]:
        """As ``ChunkSink.take_texts``. The hot path."""

    def chunk(self, number: int, chunk: Chunk, /) -> Sequence[bytes]: ...
    def complete(self, number: int, summary: Summary, /) -> Sequence[bytes]: ...
    def stopped(self, number: int, summary: Summary, /) -> Sequence[bytes]: ...
    def failed(self, number: int, error: RelayError, /) -> Sequence[bytes]: ...
    def ping(self, retry_ms: int | None = None, /) -> bytes:
        """A heartbeat; ``retry_ms`` is how long a client that comes back by itself waits before."""


class Answer:
    """Asks ``source`` and writes what comes into ``log``; viewers read the log and know nothing of the source.

    :meth:`start` is the whole of it: cancelling its task closes the upstream request, and however it ends the log gets
    a last event and ``life`` its outcome, once; then :attr:`on_end` is called. ``reservation`` bounds the LLM tokens
    that it may generate, and is settled at its end. ``clock`` gives seconds that only go forward.
    """

    __slots__ = (
        "_began_at",
        "_budget",
        "_clock",
        "_deltas",
        "_finish_reason",
        "_lifetimes",
        "_reservation",
        "_source",
        "_task",
        "_usage",
        "duration",
        "encoder",
        "error",
        "id",
        "life",
        "log",
        "model",
        "on_end",
        "request",
        "said",
        "tokens",
        "ttft",
    )

    def __init__(
        self,
        stream_id: str,
        request: AnswerRequest,
        source: Source,
        limits: AnswerLimits,
        life: Life,
        log: ReplayLog,
        encoder: AnswerEncoder,
        *,
        lifetimes: Deadlines[Answer],
        reservation: Reservation | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = stream_id
        self.request = request
        self.log = log
        self.life = life
        self.error: RelayError | None = None
        self.tokens = 0  # token events
        self.model = source.model_for(request)
        self.ttft: float | None = None  # s, from the start of the answer to its first delta with content
        self.duration: float | None = None  # s
        self.said: list[str] | None = [] if limits.log_prompts else None  # kept only for the log
        self._source = source
        self._lifetimes = lifetimes
        self._reservation = reservation
        self._budget = math.inf if reservation is None else reservation.amount  # deltas
        self.on_end: Callable[[], object] = _nothing
        self._clock = clock
        self._began_at = clock()
        self.encoder = encoder
        self._deltas = 0  # of content, reasoning and tool calls
        self._finish_reason: str | None = None
        self._usage = _NO_USAGE
        self._task: asyncio.Task[None] | None = None
        self.log.extend(self.encoder.start(0, self.model))

    @property
    def generated(self) -> int:
        """LLM tokens that it cost: as the upstream reports, else as many as there were deltas."""
        return self._usage.completion_tokens or self._deltas

    def start(self) -> asyncio.Task[None]:
        """Begin, in a task of its own: an answer does not hang on any viewer's connection."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._lifetimes.add(self)
        return self._task

    def let_go(self) -> None:
        """Its task is over, and is forgotten: a cancelled one holds the frames that it was in, and these the answer."""
        self._task = None

    def stop(self, outcome: Outcome) -> None:
        """End it now with ``outcome``: the upstream request is closed. Does nothing to an answer that has ended."""
        if not self.life.running:
            return
        # Said here and not where the cancelled task wakes: a task that has not begun yet would never wake at all.
        if outcome is Outcome.STOPPED:
            self._end(outcome, self.encoder.stopped(self.log.next_number, self._summary()))
        else:
            self._fail(Interrupted(), outcome)
        self._cancel()

    async def _run(self) -> None:
        """Relay the answer to its end. Raises nothing but CancelledError."""
        try:
            await self._source.relay(self.request, self)
        except asyncio.CancelledError:
            self._fail(Interrupted())
            raise
        except RelayError as error:
            self._fail(error)
        except Exception:
            _log.exception("answer_failed")
            self._fail(InternalError())
        finally:
            self._fail(InternalError())  # where the source returned, and said neither how it ended nor why not

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    # ---- What comes from the source: the answer is the ChunkSink

    def begin(self, answerer: Answerer) -> None:
        """Know who answers, before anything of the answer."""
        self.model = answerer.model
        self.encoder.begin(answerer)

    def take_texts(self, texts: Sequence[bytes], wire: bytes) -> None:
        """Append a batch of tokens and tell the viewers once. The hot path."""
        if self.life.running and not self._add_run(texts, wire, self.log.extend):
            self.take(list(split_texts(texts, wire)))

    def take(self, chunks: Sequence[Chunk]) -> None:
        """Append a batch's events and tell the viewers once."""
        if self.life.running:
            try:
                self._append(chunks)
            finally:
                self.log.publish()

    def end(self, chunks: Sequence[Chunk]) -> None:
        """Append the last events; the answer is complete."""
        if self.life.running:
            self._append(chunks)
            self._complete()

    def _append(self, chunks: Sequence[Chunk]) -> None:
        log = self.log
        try:
            for chunk in chunks:
                if chunk.texts:
                    if not self._add_run(chunk.texts, chunk.wire, log.append_all):
                        self._append(list(split_texts(chunk.texts, chunk.wire)))
                    continue
                while self._deltas + len(chunk.deltas) > self._budget:
                    self._extend_budget()
                if chunk.deltas or chunk.wire:
                    for event in self.encoder.chunk(log.next_number, chunk):
                        log.append(event)
                    self._note(chunk.deltas)
                if chunk.finish_reason is not None:
                    self._finish_reason = chunk.finish_reason
                if chunk.usage is not None:
                    self._usage = chunk.usage
                if chunk.model is not None:
                    self.model = chunk.model
        except LogFull:
            raise AnswerTooLarge from None

    def _add_run(self, texts: Sequence[bytes], wire: bytes, add: Callable[[Sequence[bytes]], object]) -> bool:
        """Let ``add`` put a run of tokens into the log; false, and nothing is put there, where there is more to be done
        for each of them, or not all of them fit. The hot path."""
        count = len(texts)
        if self.said is not None or self._deltas + count > self._budget:
            return False
        try:
            add(self.encoder.tokens(self.log.next_number, texts, wire))
        except LogFull:
            return False
        if self.ttft is None:
            self.ttft = self._clock() - self._began_at
        self._deltas += count
        self.tokens += count
        return True

    def _note(self, deltas: Sequence[Delta]) -> None:
        self._deltas += len(deltas)
        if self.ttft is None and deltas:
            self.ttft = self._clock() - self._began_at
        for kind, text in deltas:
            if kind is DeltaKind.CONTENT:
                self.tokens += 1
                if self.said is not None:
                    self.said.append(text)

    def _extend_budget(self) -> None:
        """Some endpoints say more than they were asked for, or one token in several deltas: no reason to cut the answer
        of a client who has tokens left."""
        if self._reservation is None or not self._reservation.extend(_RESERVED_MORE):
            raise TokenLimitExceeded
        self._budget = self._reservation.amount

    # ---- The ways it ends

    def _complete(self) -> None:
        if self.life.running:
            self._end(Outcome.COMPLETED, self.encoder.complete(self.log.next_number, self._summary()))

    def _fail(self, error: RelayError, outcome: Outcome | None = None) -> None:
        if self.life.running:
            self.error = error
            self._end(outcome or _outcome_of(error), self.encoder.failed(self.log.next_number, error))

    def _summary(self) -> Summary:
        return Summary(
            finish_reason=self._finish_reason,
            usage=self._usage,
            tokens=self.tokens,
            model=self.model,
            ttft_ms=None if self.ttft is None else round(self.ttft * 1000),
            duration_ms=round((self._clock() - self._began_at) * 1000),
        )

    def run_out_of_time(self) -> None:
        """The whole of its time is over."""
        if self._finish_reason is not None:  # all was said, but for the [DONE] that never came
            self._complete()
        else:
            self._fail(StreamTimeout())
        self._cancel()

    def _end(self, outcome: Outcome, last: Sequence[bytes]) -> None:
        self.life.end(outcome)
        self._lifetimes.discard(self)
        self.duration = self._clock() - self._began_at
        # At once, and not when the task is over: the client's next request may be here before the upstream's connection
        # is tidied up.
        if self._reservation is not None:
            self._reservation.settle(self.generated)
        self.log.end(last)
        self.on_end()


def _nothing() -> None:
    """Where nobody wants to hear of the end."""


def _outcome_of(error: RelayError) -> Outcome:
    match error:
        case UpstreamTimeout() | StreamTimeout():
            return Outcome.TIMEOUT
        case UpstreamFailed():
            return Outcome.UPSTREAM_ERROR
        case AnswerTooLarge():
            return Outcome.TOO_LARGE
        case TokenLimitExceeded():
            return Outcome.TOKEN_LIMIT
        case Interrupted():
            return Outcome.INTERRUPTED
        case _:
            return Outcome.INTERNAL_ERROR
