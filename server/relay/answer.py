"""One answer: a task that turns the upstream's chunks into the events of a log, and what became of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

from server.errors import (
    AnswerTooLarge,
    InternalError,
    Interrupted,
    RelayError,
    StreamTimeout,
    UpstreamFailed,
    UpstreamTimeout,
)
from server.relay.log import LogFull, ReplayLog
from server.wire.chat import ChatRequest
from server.wire.chunks import Chunk, DeltaKind, Usage
from server.wire.events import EventEncoder

__all__ = ["MOVES", "Answer", "AnswerLimits", "Outcome", "Source", "State"]

_log = logging.getLogger("sluice.stream")


class State(Enum):
    """Where an answer is in its life."""

    ASKED = "asked"  # the upstream has been asked, or is about to be
    SPEAKING = "speaking"  # the first token has come
    ENDED = "ended"  # the log has its last event, and the outcome stands


# Every move that an answer may make. ENDED has none: an answer ends once, whatever else happens to it.
MOVES: Final = {
    State.ASKED: frozenset({State.SPEAKING, State.ENDED}),
    State.SPEAKING: frozenset({State.ENDED}),
    State.ENDED: frozenset[State](),
}


class Outcome(Enum):
    """How an answer ended; each answer has exactly one."""

    COMPLETED = "completed"
    CLIENT_GONE = "client_gone"  # nobody was left to read it
    UPSTREAM_ERROR = "upstream_error"
    TIMEOUT = "timeout"  # first token, idle, or the whole answer
    TOO_LARGE = "too_large"
    INTERRUPTED = "interrupted"  # the server went down
    INTERNAL_ERROR = "internal_error"


class Source(Protocol):
    """Where an answer comes from: server/upstream/route.py."""

    @property
    def model(self) -> str:
        """The model that is asked."""

    async def relay(
        self, request: ChatRequest, sink: Callable[[list[Chunk]], None], done: Callable[[], None], /
    ) -> None:
        """Hand the chunks to ``sink`` and call ``done`` at the end. Raises UpstreamFailed."""


class AnswerLimits(Protocol):
    """The bounds of one answer, as the settings name them."""

    @property
    def stream_timeout(self) -> float: ...
    @property
    def max_answer_bytes(self) -> int: ...
    @property
    def log_prompts(self) -> bool: ...


class Answer:
    """Asks ``source`` and writes what comes into ``log``; viewers read the log and know nothing of the source.

    ``run`` is the whole of it: cancelling the task that runs it closes the upstream request, and however it ends the
    log gets a last event and ``outcome`` is set, once. ``clock`` gives seconds that only go forward.
    """

    def __init__(
        self,
        stream_id: str,
        client: str,
        request: ChatRequest,
        source: Source,
        limits: AnswerLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = stream_id
        self.client = client
        self.request = request
        self.log = ReplayLog(max_bytes=limits.max_answer_bytes)
        self.state = State.ASKED
        self.outcome: Outcome | None = None
        self.error: RelayError | None = None
        self.tokens = 0
        self.model = source.model
        self.ttft: float | None = None  # s, from the start of the answer to its first delta with content
        self.duration: float | None = None  # s
        self.said: list[str] | None = [] if limits.log_prompts else None  # kept only for the log
        self._source = source
        self._limits = limits
        self._clock = clock
        self._began_at = clock()
        self._encoder = EventEncoder(stream_id)
        self._finish_reason: str | None = None
        self._usage = Usage(None, None)
        self._task: asyncio.Task[None] | None = None
        self.log.append(self._encoder.start(0, self.model))

    def start(self) -> asyncio.Task[None]:
        """Begin, in a task of its own: an answer does not hang on any viewer's connection."""
        self._task = asyncio.create_task(self.run(), name=f"answer {self.id}")
        return self._task

    def stop(self, outcome: Outcome) -> None:
        """End it now with ``outcome``: the upstream request is closed. Does nothing to an answer that has ended."""
        if self.state is State.ENDED:
            return
        # Said here and not where the cancelled task wakes: a task that has not begun yet would never wake at all.
        self._fail(Interrupted(), outcome)
        if self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """Relay the answer to its end. Raises nothing but CancelledError."""
        try:
            async with asyncio.timeout(self._limits.stream_timeout) as whole:
                await self._source.relay(self.request, self._take, self._complete)
        except asyncio.CancelledError:
            self._fail(Interrupted())
            raise
        except TimeoutError:
            if whole.expired():
                self._run_out_of_time()
            else:
                self._fail_by_bug()
        except RelayError as error:
            self._fail(error)
        except Exception:
            self._fail_by_bug()
        finally:
            if self.state is not State.ENDED:  # the source returned, and said neither how it ended nor why not
                self._fail(InternalError())

    # ---- What comes from the source

    def _take(self, chunks: list[Chunk]) -> None:
        """Append a batch's events and tell the viewers once. The hot path."""
        if self.state is State.ENDED:
            return
        log = self.log
        try:
            for chunk in chunks:
                for kind, text in chunk.deltas:
                    if kind is DeltaKind.CONTENT:
                        log.append(self._encoder.token(log.next_number, text))
                        self.tokens += 1
                        if self.said is not None:
                            self.said.append(text)
                    elif kind is DeltaKind.REASONING:
                        log.append(self._encoder.reasoning(log.next_number, text))
                    if self.ttft is None:
                        self.ttft = self._clock() - self._began_at
                        self._move(State.SPEAKING)
                if chunk.finish_reason is not None:
                    self._finish_reason = chunk.finish_reason
                if chunk.usage is not None:
                    self._usage = chunk.usage
                if chunk.model is not None:
                    self.model = chunk.model
        except LogFull:
            raise AnswerTooLarge from None
        finally:
            log.publish()

    # ---- The ways it ends

    def _complete(self) -> None:
        if self.state is State.ENDED:
            return
        usage = self._encoder.usage(
            self.log.next_number,
            finish_reason=self._finish_reason,
            usage=self._usage,
            tokens=self.tokens,
            model=self.model,
            ttft_ms=None if self.ttft is None else round(self.ttft * 1000),
            duration_ms=round((self._clock() - self._began_at) * 1000),
        )
        self._end(Outcome.COMPLETED, usage, self._encoder.done(self.log.next_number + 1))

    def _fail(self, error: RelayError, outcome: Outcome | None = None) -> None:
        if self.state is not State.ENDED:
            self.error = error
            self._end(outcome or _outcome_of(error), self._encoder.error(self.log.next_number, error))

    def _run_out_of_time(self) -> None:
        if self._finish_reason is not None:  # all was said, but for the [DONE] that never came
            self._complete()
        else:
            self._fail(StreamTimeout())

    def _fail_by_bug(self) -> None:
        _log.exception("answer_failed")
        self._fail(InternalError())

    def _end(self, outcome: Outcome, *last: bytes) -> None:
        self._move(State.ENDED)
        self.outcome = outcome
        self.duration = self._clock() - self._began_at
        self.log.end(last)

    def _move(self, state: State) -> None:
        if state not in MOVES[self.state]:
            raise AssertionError(f"an answer cannot go from {self.state} to {state}")
        self.state = state


def _outcome_of(error: RelayError) -> Outcome:
    match error:
        case UpstreamTimeout() | StreamTimeout():
            return Outcome.TIMEOUT
        case UpstreamFailed():
            return Outcome.UPSTREAM_ERROR
        case AnswerTooLarge():
            return Outcome.TOO_LARGE
        case Interrupted():
            return Outcome.INTERRUPTED
        case _:
            return Outcome.INTERNAL_ERROR
