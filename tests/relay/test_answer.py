"""One answer: what it writes into its log, and the one way in which it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from server.errors import RelayError, UpstreamIncomplete, UpstreamRejected, UpstreamTimeout
from server.relay.admission import TokenBuckets
from server.relay.answer import Answer, AnswerRequest
from server.relay.deadlines import Deadlines
from server.relay.life import Life, Outcome
from server.relay.log import ReplayLog
from server.settings import Rate
from server.wire.chat import ChatRequest
from server.wire.chunks import Chunk, ChunkSink, Delta, DeltaKind, Usage
from server.wire.events import EventEncoder
from server.wire.sse import EventStreamParser

REQUEST = ChatRequest(messages=(("user", "hi"),), max_tokens=8, temperature=0.0)

Sink = Callable[[list[Chunk]], None]
Play = Callable[[Sink, Callable[[], None]], Awaitable[None]]


@dataclass
class Limits:
    stream_timeout: float = 5.0
    max_answer_bytes: int = 10_000
    log_prompts: bool = False


class FakeSource:
    """A source whose script is in the test's hand."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self.cancelled = False

    can_ask = True

    def model_for(self, request: AnswerRequest, /) -> str:
        return "asked"

    async def relay(self, request: AnswerRequest, sink: ChunkSink, /) -> None:
        try:
            await self._play(sink.take, lambda: sink.end(()))
        except asyncio.CancelledError:
            self.cancelled = True
            raise


def text(value: str) -> Chunk:
    return Chunk((Delta(DeltaKind.CONTENT, value),))


def new_answer(source: FakeSource, limits: Limits | None = None, **options: Any) -> Answer:
    limits = limits or Limits()
    life, log = Life(grace=5.0, window=60.0), ReplayLog(max_bytes=limits.max_answer_bytes)
    lifetimes = Deadlines(limits.stream_timeout, Answer.run_out_of_time)
    return Answer("SID", REQUEST, source, limits, life, log, EventEncoder("SID"), lifetimes=lifetimes, **options)


def answer_of(play: Play, **limits: Any) -> tuple[Answer, FakeSource]:
    source = FakeSource(play)
    return new_answer(source, Limits(**limits)), source


def events_of(answer: Answer) -> list[tuple[str, str, Any]]:
    """(id, type, data) of every event in the log, data out of its JSON but for [DONE]."""
    events = EventStreamParser().feed(answer.log.read(0, 1 << 20))
    return [
        (
            event.last_event_id.decode(),
            event.type.decode(),
            event.data.decode() if event.data == b"[DONE]" else json.loads(event.data),
        )
        for event in events
    ]


async def ended(answer: Answer) -> None:
    await asyncio.wait([answer.start()])


async def test_a_whole_answer_is_start_tokens_usage_and_done() -> None:
    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("Hel"), text("lo")])
        sink([Chunk((Delta(DeltaKind.REASONING, "hm"),)), Chunk(finish_reason="stop", model="spoke")])
        sink([Chunk(usage=Usage(3, 2))])
        done()

    answer, _ = answer_of(play)
    await ended(answer)

    events = events_of(answer)
    assert [event[0] for event in events] == [f"SID.{n}" for n in range(6)]
    assert [event[2] for event in events[:4]] == [
        {"id": "SID", "model": "asked"},
        {"token": "Hel"},
        {"token": "lo"},
        {"reasoning": "hm"},
    ]
    usage = events[4][2]
    assert usage.pop("duration_ms") >= usage.pop("ttft_ms") >= 0
    assert usage == {"finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2, "tokens": 2, "model": "spoke"}
    assert events[5] == ("SID.5", "message", "[DONE]")
    assert (answer.life.running, answer.life.outcome, answer.tokens) == (False, Outcome.COMPLETED, 2)


async def test_the_start_is_in_the_log_before_anything_was_asked() -> None:
    """A viewer is shown an open stream at once."""
    answer, _ = answer_of(lambda sink, done: asyncio.sleep(1))
    assert events_of(answer) == [("SID.0", "start", {"id": "SID", "model": "asked"})]


async def test_a_batch_wakes_the_viewers_once() -> None:
    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("a"), text("b"), text("c")])
        done()

    answer, _ = answer_of(play)
    woken: list[int] = []
    answer.log.subscribe(lambda _batch, _size: woken.append(answer.log.next_number))
    await ended(answer)
    assert woken == [4, 6]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (UpstreamIncomplete(), Outcome.UPSTREAM_ERROR),
        (UpstreamRejected(), Outcome.UPSTREAM_ERROR),
        (UpstreamTimeout(), Outcome.TIMEOUT),
    ],
)
async def test_a_failure_is_the_last_event_and_no_done_follows(error: RelayError, outcome: Outcome) -> None:
    """A cut answer never looks complete."""

    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("a")])
        raise error

    answer, _ = answer_of(play)
    await ended(answer)
    assert events_of(answer)[2:] == [
        ("SID.2", "message", {"error": error.code, "message": str(error), "retryable": error.retryable})
    ]
    assert answer.life.outcome is outcome


@pytest.mark.parametrize(
    "play", [lambda sink, done: asyncio.sleep(0), lambda sink, done: 1 / 0], ids=["silent return", "bug"]
)
async def test_a_bug_is_an_internal_error_and_nothing_else(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    answer, _ = answer_of(play)
    await ended(answer)
    assert events_of(answer)[-1][2]["error"] == "internal_error"
    assert answer.life.outcome is Outcome.INTERNAL_ERROR


async def test_an_answer_over_its_time_is_told_so_and_its_source_closed() -> None:
    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("a")])
        await asyncio.sleep(60)

    answer, source = answer_of(play, stream_timeout=0.05)
    await ended(answer)
    assert events_of(answer)[-1][2]["error"] == "stream_timeout"
    assert (answer.life.outcome, source.cancelled) == (Outcome.TIMEOUT, True)


async def test_an_answer_whose_finish_reason_came_is_complete_even_if_its_done_never_comes() -> None:
    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("a"), Chunk(finish_reason="stop")])
        await asyncio.sleep(60)

    answer, _ = answer_of(play, stream_timeout=0.05)
    await ended(answer)
    assert answer.life.outcome is Outcome.COMPLETED


async def test_an_answer_over_its_bound_keeps_what_fitted_with_ids_in_a_row() -> None:
    async def play(sink: Sink, done: Callable[[], None]) -> None:
        while True:
            sink([text("x" * 100)] * 7)
            await asyncio.sleep(0)

    answer, _ = answer_of(play, max_answer_bytes=4096)
    await ended(answer)
    events = events_of(answer)
    assert [event[0] for event in events] == [f"SID.{n}" for n in range(len(events))]
    assert events[-1][2] == {"error": "answer_too_large", "message": str(answer.error), "retryable": False}
    assert answer.log.size <= 4096 + 200
    assert answer.tokens == len(events) - 2


@pytest.mark.parametrize("when", ["before it began", "while it speaks", "after its end"])
async def test_a_stop_ends_it_once_whenever_it_comes(when: str) -> None:
    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("a")])
        if when == "after its end":
            done()
        await asyncio.sleep(60 if when == "while it speaks" else 0.01)

    answer, source = answer_of(play)
    task = answer.start()
    if when != "before it began":
        await asyncio.sleep(0.005)
    answer.stop(Outcome.CLIENT_GONE)
    answer.stop(Outcome.INTERRUPTED)
    await asyncio.wait([task])

    last = events_of(answer)[-1][2]
    if when == "after its end":
        assert (answer.life.outcome, last) == (Outcome.COMPLETED, "[DONE]")
    else:
        assert answer.life.outcome is Outcome.CLIENT_GONE
        assert (last["error"], last["retryable"]) == ("interrupted", True)
    assert source.cancelled == (when == "while it speaks")
    assert answer.log.ended


async def test_what_comes_after_the_end_changes_nothing() -> None:
    async def play(sink: Sink, done: Callable[[], None]) -> None:
        done()
        sink([text("late")])
        done()
        raise UpstreamIncomplete

    answer, _ = answer_of(play)
    await ended(answer)
    assert (answer.life.outcome, answer.tokens) == (Outcome.COMPLETED, 0)
    assert events_of(answer)[-1][2] == "[DONE]"


async def test_time_to_first_token_is_measured_to_the_first_delta_with_content() -> None:
    now = 100.0

    async def play(sink: Sink, done: Callable[[], None]) -> None:
        nonlocal now
        now += 1
        sink([Chunk()])
        now += 1
        sink([text("a")])
        now += 5
        done()

    answer = new_answer(FakeSource(play), clock=lambda: now)
    await ended(answer)
    assert (answer.ttft, answer.duration) == (2.0, 7.0)


async def test_a_stop_is_told_as_a_cancelled_answer_and_closes_the_upstream() -> None:
    """Contract, section 4: a usage event whose finish_reason is ``cancelled``, then ``[DONE]``."""
    speaking = asyncio.Event()

    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("Hel"), Chunk(usage=Usage(3, 7), finish_reason="stop")])
        speaking.set()
        await asyncio.Event().wait()

    answer, source = answer_of(play)
    task = answer.start()
    await speaking.wait()
    answer.stop(Outcome.STOPPED)
    *_, usage, done = events_of(answer)
    assert (usage[1], usage[2]["finish_reason"], usage[2]["tokens"], usage[2]["completion_tokens"]) == (
        "usage",
        "cancelled",
        1,
        7,
    )
    assert done[2] == "[DONE]"
    await asyncio.wait([task])
    assert (source.cancelled, answer.life.outcome) == (True, Outcome.STOPPED)


@pytest.mark.parametrize("kind", [DeltaKind.CONTENT, DeltaKind.REASONING, DeltaKind.OTHER])
async def test_it_generates_no_more_than_its_budget(kind: DeltaKind) -> None:
    """All that the upstream charges for counts, shown or not."""

    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([Chunk((Delta(kind, "a"),)) for _ in range(9)])

    reservation = TokenBuckets(Rate(4, 1e6)).reserve("client", 100)
    answer = new_answer(FakeSource(play), reservation=reservation)
    await ended(answer)
    _, *shown, error = events_of(answer)
    assert len(shown) == (0 if kind is DeltaKind.OTHER else 4)
    assert (error[2]["error"], error[2]["retryable"]) == ("token_limit_exceeded", False)
    assert (answer.life.outcome, answer.generated) == (Outcome.TOKEN_LIMIT, 4)


async def test_it_outgrows_its_reservation_while_its_client_has_tokens() -> None:
    """An endpoint that says more than it was asked for has not used up what another answer may use."""
    buckets = TokenBuckets(Rate(500, 1e6))

    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("a") for _ in range(300)])
        done()

    answer = new_answer(FakeSource(play), Limits(max_answer_bytes=100_000), reservation=buckets.reserve("c", 4))
    await ended(answer)
    assert (answer.life.outcome, answer.generated) == (Outcome.COMPLETED, 300)
    assert buckets.look("c").remaining == 200


@pytest.mark.parametrize(("reported", "generated"), [(None, 3), (0, 3), (2, 2), (50, 50)])
async def test_what_it_cost_is_what_the_upstream_reports_or_else_its_deltas(
    reported: int | None, generated: int
) -> None:
    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("a"), text("b"), text("c"), Chunk(usage=Usage(1, reported))])
        done()

    answer, _ = answer_of(play)
    await ended(answer)
    assert answer.generated == generated


@pytest.mark.parametrize(("log_prompts", "kept"), [(False, None), (True, ["a"])])
async def test_its_text_is_kept_for_the_log_only_if_asked(log_prompts: bool, kept: list[str] | None) -> None:
    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("a")])
        done()

    answer, _ = answer_of(play, log_prompts=log_prompts)
    await ended(answer)
    assert answer.said == kept


RUN = [text("a"), Chunk(texts=[b"b", "ç".encode(), b"d"]), text("e")]


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_a_run_of_texts_is_as_many_tokens(log_prompts: bool) -> None:
    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([*RUN])
        done()

    answer, _ = answer_of(play, log_prompts=log_prompts)
    await ended(answer)
    assert [data["token"] for _, _, data in events_of(answer)[1:6]] == ["a", "b", "ç", "d", "e"]
    assert answer.tokens == 5
    assert answer.said == (["a", "b", "ç", "d", "e"] if log_prompts else None)


async def test_a_run_over_the_bound_keeps_what_fitted() -> None:
    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("a"), Chunk(texts=[b"b"] * 100)])

    answer, _ = answer_of(play, max_answer_bytes=300)
    await ended(answer)
    events = events_of(answer)
    assert [event[0] for event in events] == [f"SID.{n}" for n in range(len(events))]
    assert 3 < answer.tokens == len(events) - 2 < 100
    assert events[-1][2]["error"] == "answer_too_large"


async def test_a_run_over_the_budget_is_cut() -> None:
    buckets = TokenBuckets(Rate(3, 3600.0))

    async def play(sink: Sink, done: Callable[[], None]) -> None:
        sink([text("a"), Chunk(texts=[b"b"] * 10)])

    answer = new_answer(FakeSource(play), reservation=buckets.reserve("client", 8))
    await ended(answer)
    assert answer.tokens == 3
    assert events_of(answer)[-1][2]["error"] == "token_limit_exceeded"
