"""Which endpoints are asked, in what order, how often, and what ends the asking; the client is a fake that fails as it
is told to."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import pytest
from msgspec.structs import replace

from server.errors import (
    Said,
    UpstreamError,
    UpstreamFailed,
    UpstreamIncomplete,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from server.upstream.attempt import AttemptFailed, failed_status
from server.upstream.circuit import Circuit
from server.upstream.client import UpstreamClient, UpstreamRequest
from server.upstream.endpoint import Endpoint
from server.upstream.retry import RetryBudget
from server.upstream.route import RoutedRequest, UpstreamRoute
from server.wire.chunks import Answerer, Chunk, ChunkSink, Delta, DeltaKind, Usage
from server.wire.completion import decode_completion_request
from tests.relay.virtual_time import VirtualTimeLoop, run
from tests.upstream.recording import ASKED, Recording

TOKEN = Chunk((Delta(DeltaKind.CONTENT, "x"),))
STOP = Chunk(finish_reason="stop")

Attempt = Callable[[ChunkSink], Awaitable[None]]


class FakeClient:
    """Each request is the next attempt, and the last one for ever."""

    def __init__(self, *attempts: Attempt) -> None:
        self._attempts = list(attempts)
        self.asked = 0
        self.cancelled = 0
        self.bodies: list[bytes] = []

    async def ask(self, endpoint: Endpoint, asked: UpstreamRequest, sink: ChunkSink) -> None:
        self.asked += 1
        self.bodies.append(asked.encode(endpoint.model))
        sink.begin(Answerer(endpoint.model, f"request-{self.asked}"))
        attempt = self._attempts.pop(0) if len(self._attempts) > 1 else self._attempts[0]
        try:
            await attempt(sink)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def failing(failure: AttemptFailed, *chunks: Chunk) -> Attempt:
    async def attempt(sink: ChunkSink) -> None:
        if chunks:
            sink.take(chunks)
        raise failure

    return attempt


def saying(*chunks: Chunk, then: float = 0.0) -> Attempt:
    """A whole answer; the request takes ``then`` (s) longer than its ``[DONE]``."""

    async def attempt(sink: ChunkSink) -> None:
        sink.end(chunks)
        await asyncio.sleep(then)

    return attempt


def silent(*chunks: Chunk) -> Attempt:
    async def attempt(sink: ChunkSink) -> None:
        if chunks:
            sink.take(chunks)
        await asyncio.sleep(30)

    return attempt


def passing() -> AttemptFailed:
    """A failure that a further try may mend."""
    return AttemptFailed(UpstreamUnreachable(), "no connection", again=True)


def stale() -> AttemptFailed:
    return AttemptFailed(UpstreamUnreachable(), "closed without an answer", again=True, stale=True)


class Relayed:
    """One relay through a route, and what it handed on."""

    def __init__(
        self, *attempts: Attempt, first_token_timeout: float = 5.0, idle_timeout: float = 5.0, retries: int = 2
    ) -> None:
        self.client = FakeClient(*attempts)
        self.heard = Recording()
        self._route = UpstreamRoute(
            cast("UpstreamClient", self.client),
            [Endpoint("http://upstream/v1", "asked")],
            first_token_timeout=first_token_timeout,
            idle_timeout=idle_timeout,
            retries=retries,
        )

    async def run(self) -> None:
        await self._route.relay(ASKED, self.heard)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.upstream.route.backoff", lambda tries: 0.0)


# ---- Pauses


async def test_a_retry_after_longer_than_the_back_off_is_what_is_waited(no_pauses: None) -> None:
    """SLUICE_RETRIES: Retry-After is honoured."""
    failed = AttemptFailed(UpstreamError(), "status 503", again=True, retry_after=0.2)
    relayed = Relayed(failing(failed), saying(TOKEN))
    began_at = time.monotonic()
    await relayed.run()
    assert time.monotonic() - began_at >= 0.198


async def test_a_retry_after_shorter_than_the_back_off_does_not_shorten_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.upstream.route.backoff", lambda tries: 0.2)
    failed = AttemptFailed(UpstreamError(), "status 503", again=True, retry_after=0.0)
    relayed = Relayed(failing(failed), saying(TOKEN))
    began_at = time.monotonic()
    await relayed.run()
    assert time.monotonic() - began_at >= 0.198  # uvloop counts a timer in whole milliseconds


async def test_a_pause_that_does_not_fit_the_first_token_time_is_not_begun() -> None:
    """SLUICE_RETRIES: while it fits the first-token time."""
    failed = AttemptFailed(UpstreamError(), "status 503", again=True, retry_after=5.1)
    relayed = Relayed(failing(failed))
    began_at = time.monotonic()
    with pytest.raises(UpstreamError):
        await relayed.run()
    assert time.monotonic() - began_at < 2
    assert relayed.client.asked == 1


# ---- Tries


@pytest.mark.parametrize("retries", [0, 1, 2, 5])
async def test_an_endpoint_is_asked_once_and_as_often_again_as_is_set(no_pauses: None, retries: int) -> None:
    """SLUICE_RETRIES."""
    relayed = Relayed(failing(passing()), retries=retries)
    with pytest.raises(UpstreamUnreachable):
        await relayed.run()
    assert relayed.client.asked == retries + 1
    assert relayed.heard.done == 0


async def test_what_no_further_try_mends_is_not_tried_again() -> None:
    relayed = Relayed(failing(AttemptFailed(UpstreamRejected(), "status 400")))
    with pytest.raises(UpstreamRejected):
        await relayed.run()
    assert relayed.client.asked == 1


async def test_the_last_failure_is_the_one_that_is_told(no_pauses: None) -> None:
    failed = AttemptFailed(UpstreamRejected(), "status 401")
    relayed = Relayed(failing(passing()), failing(failed))
    with pytest.raises(UpstreamRejected):
        await relayed.run()


@pytest.mark.parametrize("kind", list(DeltaKind))
async def test_nothing_is_tried_again_once_a_token_was_handed_on(kind: DeltaKind) -> None:
    """SLUICE_RETRIES: before the first token; later a second try would say things twice."""
    failed = AttemptFailed(UpstreamIncomplete(), "broke before its end", again=True)
    relayed = Relayed(failing(failed, Chunk((Delta(kind, "x"),))))
    with pytest.raises(UpstreamIncomplete):
        await relayed.run()
    assert relayed.client.asked == 1


@pytest.mark.parametrize("chunk", [Chunk(), Chunk(model="m"), Chunk(usage=None)])
async def test_a_chunk_without_content_is_no_token(no_pauses: None, chunk: Chunk) -> None:
    relayed = Relayed(failing(passing(), chunk), saying(TOKEN))
    await relayed.run()
    assert relayed.client.asked == 2
    assert relayed.heard.done == 1


async def test_every_try_sends_the_same_request(no_pauses: None) -> None:
    relayed = Relayed(failing(passing()), failing(stale()), saying(TOKEN))
    await relayed.run()
    assert len(set(relayed.client.bodies)) == 1
    assert json.loads(relayed.client.bodies[0])["model"] == "asked"


async def test_a_stale_connection_costs_no_try_and_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint has not seen the request, and nothing is wrong with it."""
    monkeypatch.setattr("server.upstream.route.backoff", lambda tries: 30.0)
    relayed = Relayed(failing(stale()), saying(TOKEN), retries=0)
    await relayed.run()
    assert relayed.client.asked == 2


async def test_a_second_stale_connection_is_a_failure_like_others(no_pauses: None) -> None:
    """An endpoint that closes every kept connection must not be asked for ever."""
    relayed = Relayed(failing(stale()), retries=1)
    with pytest.raises(UpstreamUnreachable):
        await relayed.run()
    assert relayed.client.asked == 3


# ---- Time


@pytest.mark.parametrize("chunks", [(), (Chunk(),), (Chunk(model="m"),)])
async def test_a_silent_endpoint_is_given_up_and_not_asked_twice(chunks: tuple[Chunk, ...]) -> None:
    """SLUICE_FIRST_TOKEN_TIMEOUT; SLUICE_RETRIES."""
    relayed = Relayed(silent(*chunks), first_token_timeout=0.1)
    with pytest.raises(UpstreamTimeout):
        await relayed.run()
    assert relayed.client.asked == relayed.client.cancelled == 1


async def test_an_endpoint_that_falls_silent_is_given_up() -> None:
    """SLUICE_IDLE_TIMEOUT."""
    relayed = Relayed(silent(TOKEN), idle_timeout=0.1)
    with pytest.raises(UpstreamTimeout):
        await relayed.run()
    assert relayed.client.cancelled == 1


async def test_silence_after_a_finish_reason_is_the_end() -> None:
    """upstream_incomplete: a finish_reason without [DONE] is a complete answer."""
    relayed = Relayed(silent(TOKEN, STOP), idle_timeout=0.1)
    await relayed.run()
    assert relayed.heard.done == 1


async def test_a_time_out_while_the_connection_is_tidied_up_is_no_failure() -> None:
    relayed = Relayed(saying(TOKEN, then=30.0), idle_timeout=0.1)
    await relayed.run()
    assert relayed.heard.done == 1


async def test_a_time_out_that_is_not_ours_is_not_taken_for_the_endpoints() -> None:
    """It is a bug, and must look like one."""

    async def attempt(sink: ChunkSink) -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await Relayed(attempt).run()


# ---- Cancellation


@pytest.mark.parametrize("attempt", [silent(), silent(Chunk()), silent(TOKEN), saying(TOKEN, then=30.0)])
async def test_cancelling_reaches_the_request(attempt: Attempt) -> None:
    """A client that goes away closes the upstream request (section 3)."""
    relayed = Relayed(attempt)
    task = asyncio.create_task(relayed.run())
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait([task], timeout=2)
    assert task.cancelled()
    assert relayed.client.cancelled == 1


async def test_cancelling_in_the_pause_before_a_further_try_lets_none_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that goes away during the back-off must not be paid for."""
    monkeypatch.setattr("server.upstream.route.backoff", lambda tries: 0.1)
    relayed = Relayed(failing(passing()))
    task = asyncio.create_task(relayed.run())
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.sleep(0.2)
    assert task.cancelled()
    assert relayed.client.asked == 1


# ---- Several endpoints

MODELS = ("first", "second", "third")
USAGE = Usage(7, 8)


def status(code: int, *, context_exceeded: bool = False) -> Attempt:
    """An answer with that status."""
    return failing(failed_status(code, Said(status=code, context_exceeded=context_exceeded)))


def late(seconds: float, text: str = "x") -> Attempt:
    """A first token after so long, and the end with it."""

    async def attempt(sink: ChunkSink) -> None:
        await asyncio.sleep(seconds)
        sink.end([Chunk((Delta(DeltaKind.CONTENT, text),))])

    return attempt


class Heard(Recording):
    """Who was said to answer, each time, and what had been handed on before that."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[Answerer, int]] = []

    def begin(self, answerer: Answerer) -> None:
        super().begin(answerer)
        self.begun.append((answerer, len(self.chunks)))


class Several:
    """A route over several endpoints, each with attempts of its own; time passes only while everybody waits."""

    def __init__(
        self,
        *attempts: Attempt | Sequence[Attempt],
        models: Sequence[str] = MODELS,
        retries: int = 0,
        first_token_timeout: float = 30.0,
        hedge_after: float | None = None,
    ) -> None:
        self.clients = [FakeClient(*(each if isinstance(each, Sequence) else [each])) for each in attempts]
        self.order: list[int] = []
        self.asked_at: list[float] = []  # s, from the beginning of the answer
        self.heard = Heard()
        self._endpoints = [
            Endpoint(f"http://{number}/v1", model)
            for number, (_, model) in enumerate(zip(self.clients, models, strict=False))
        ]
        self.route = UpstreamRoute(
            cast("UpstreamClient", self),
            self._endpoints,
            first_token_timeout=first_token_timeout,
            idle_timeout=20.0,
            retries=retries,
            hedge_after=hedge_after,
        )

    async def ask(self, endpoint: Endpoint, asked: UpstreamRequest, sink: ChunkSink) -> None:
        number = self._endpoints.index(endpoint)
        self.order.append(number)
        self.asked_at.append(round(asyncio.get_running_loop().time() - self._began_at, 3))
        await self.clients[number].ask(endpoint, asked, sink)

    def relay(self, model: str | None = None, request: RoutedRequest | None = None) -> UpstreamFailed | None:
        """One answer; returns what it failed with."""
        self.order.clear()
        self.asked_at.clear()
        self.heard = Heard()

        async def main(loop: VirtualTimeLoop) -> None:
            self._began_at = loop.time()
            await self.route.relay(request or replace(ASKED, model=model), self.heard)

        try:
            run(main)
        except UpstreamFailed as failed:
            return failed
        return None


PASSES = failing(AttemptFailed(UpstreamUnreachable(), "no connection", again=True, counts=True))
ANSWERS = saying(TOKEN)


def test_endpoints_are_asked_in_order_until_one_answers() -> None:
    """SLUICE_FALLBACKS: tried in order."""
    several = Several(PASSES, PASSES, ANSWERS)
    assert several.relay() is None
    assert several.order == [0, 1, 2]
    assert several.heard.texts == ["x"]
    assert several.heard.done == 1


def test_where_all_fail_the_last_failure_is_told() -> None:
    last = UpstreamError()
    several = Several(PASSES, PASSES, failing(AttemptFailed(last, "status 500")))
    assert several.relay() is last
    assert several.order == [0, 1, 2]
    assert several.heard.begun == []


def test_each_endpoint_has_all_its_tries() -> None:
    """SLUICE_RETRIES: further tries per upstream."""
    several = Several(PASSES, PASSES, retries=2)
    assert several.relay() is not None
    assert several.order == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("model", "order"),
    [(None, [0, 1, 2]), ("first", [0, 1, 2]), ("second", [1, 0, 2]), ("third", [2, 0, 1])],
)
def test_the_endpoint_that_has_the_asked_model_comes_first(model: str | None, order: list[int]) -> None:
    """Section 5: nothing changed but the base URL; the others still stand in, in their order."""
    several = Several(PASSES, PASSES, PASSES)
    several.relay(model)
    assert several.order == order
    assert several.route.model_for(replace(ASKED, model=model)) == MODELS[order[0]]


def test_of_two_endpoints_with_the_asked_model_the_first_comes_first() -> None:
    several = Several(PASSES, PASSES, PASSES, models=("other", "asked", "asked"))
    several.relay("asked")
    assert several.order == [1, 2, 0]


def test_each_endpoint_is_asked_for_its_own_model() -> None:
    """SLUICE_FALLBACKS: base_url, api_key and model belong together."""
    several = Several(PASSES, ANSWERS)
    several.relay("first")
    assert [json.loads(client.bodies[0])["model"] for client in several.clients] == ["first", "second"]


# What a status has done: how often the first endpoint is asked where two further tries are allowed, and who answers.
CLASSES = {
    **dict.fromkeys([408, 429, 500, 502, 503, 504], (3, "second")),  # may pass: tried again, then the next
    **dict.fromkeys([501, 505, 507, 520, 529], (1, "second")),
    **dict.fromkeys([401, 403, 404], (1, "second")),  # about what we have there, not about the question
    **dict.fromkeys([204, 302, 307], (1, "second")),  # no answer at all
    **dict.fromkeys([400, 402, 405, 409, 413, 418, 422, 451], (1, None)),  # another would say the same
}


@pytest.mark.parametrize(("code", "tries", "answerer"), [(code, *does) for code, does in CLASSES.items()])
def test_a_status_says_whether_to_try_again_to_go_on_or_to_end(code: int, tries: int, answerer: str | None) -> None:
    """SLUICE_RETRIES."""
    several = Several(status(code), ANSWERS, retries=2)
    failed = several.relay()
    assert several.order == [0] * tries + [1] * (answerer is not None)
    assert (failed is None) is (answerer is not None)
    assert several.heard.answerer == (Answerer(answerer, "request-1") if answerer else None)


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_conversation_too_long_for_one_goes_to_the_next(code: int) -> None:
    """SLUICE_RETRIES: context_length_exceeded; another model may have room for it."""
    several = Several(status(code, context_exceeded=True), ANSWERS, retries=2)
    assert several.relay() is None
    assert several.order == [0, 1]


def test_a_conversation_too_long_for_all_is_rejected() -> None:
    several = Several(*[status(400, context_exceeded=True)] * 3)
    assert isinstance(several.relay(), UpstreamRejected)
    assert several.order == [0, 1, 2]


def test_a_silent_endpoint_is_followed_by_the_next_which_has_a_time_of_its_own() -> None:
    """SLUICE_FIRST_TOKEN_TIMEOUT: for each upstream asked. SLUICE_RETRIES: a silent one is not asked twice."""
    several = Several(silent(), silent(), late(2.9), first_token_timeout=3.0, retries=5)
    assert several.relay() is None
    assert several.order == [0, 1, 2]
    assert several.asked_at == [0.0, 3.0, 6.0]
    assert [client.cancelled for client in several.clients] == [1, 1, 0]


def test_where_all_are_silent_the_model_took_too_long() -> None:
    several = Several(silent(), silent(), first_token_timeout=3.0)
    assert isinstance(several.relay(), UpstreamTimeout)
    assert several.order == [0, 1]


@pytest.mark.parametrize("end", [failing(passing(), TOKEN), silent(TOKEN)])
def test_nothing_is_asked_of_another_once_a_token_was_handed_on(end: Attempt) -> None:
    """SLUICE_RETRIES: before the first token; another answer would not go on where this one broke off."""
    several = Several(end, ANSWERS, retries=2)
    assert several.relay() is not None
    assert several.order == [0]
    assert several.heard.texts == ["x"]
    assert several.heard.done == 0


BEFORE = failing(passing(), Chunk(finish_reason="length", usage=Usage(1, 2), model="old", wire=b"data: {}\n\n"))
WHOLE_ANSWER = saying(TOKEN, Chunk(finish_reason="stop", usage=USAGE, model="second"))


@pytest.mark.parametrize("attempts", [[BEFORE, WHOLE_ANSWER], [[BEFORE, WHOLE_ANSWER]]], ids=["next", "again"])
def test_what_a_failed_try_said_is_no_part_of_the_answer(attempts: list[Attempt | Sequence[Attempt]]) -> None:
    """The answer names one model, one finish_reason, one usage: those of who answered."""
    several = Several(*attempts, retries=2 - len(attempts))
    assert several.relay() is None
    assert [chunk.finish_reason for chunk in several.heard.chunks if chunk.finish_reason] == ["stop"]
    assert [chunk.usage for chunk in several.heard.chunks if chunk.usage] == [USAGE]
    assert [chunk.model for chunk in several.heard.chunks if chunk.model] == ["second"]
    assert b"".join(chunk.wire for chunk in several.heard.chunks) == b""


@pytest.mark.parametrize("hedge_after", [None, 1.0])
def test_the_one_that_is_named_is_the_one_that_answers(hedge_after: float | None) -> None:
    """Section 5: the answer names the model that really answered; once, and before anything of the answer."""
    several = Several(PASSES, [status(503), ANSWERS], ANSWERS, retries=1, hedge_after=hedge_after)
    assert several.relay() is None
    assert several.heard.begun == [(Answerer("second", "request-2"), 0)]


# ---- Circuits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """That of the circuits and of the budget, in the test's hand."""
    clock = Clock()
    monkeypatch.setattr("server.upstream.route.Circuit", lambda: Circuit(clock=clock))
    monkeypatch.setattr("server.upstream.route.RetryBudget", lambda: RetryBudget(clock=clock))
    return clock


def asked_in(several: Several, times: int) -> list[list[int]]:
    """Whom each of so many answers asked."""
    orders = []
    for _ in range(times):
        several.relay()
        orders.append(list(several.order))
    return orders


@pytest.mark.parametrize("code", [401, 403, 408, 429, 500, 501, 502, 503, 504, 529])
def test_an_endpoint_that_keeps_failing_is_not_asked(code: int) -> None:
    """SLUICE_RETRIES: 5xx, 408, 429, 401 and 403 count."""
    assert asked_in(Several(status(code), ANSWERS), 7) == [[0, 1]] * 5 + [[1]] * 2


@pytest.mark.parametrize("attempt", [PASSES, silent()], ids=["no connection", "silence"])
def test_connect_failures_and_time_outs_count(attempt: Attempt) -> None:
    """SLUICE_RETRIES."""
    assert asked_in(Several(attempt, ANSWERS), 7) == [[0, 1]] * 5 + [[1]] * 2


@pytest.mark.parametrize("code", [400, 404, 413, 422, 307])
def test_a_clients_own_mistakes_never_leave_an_endpoint_out(code: int) -> None:
    """SLUICE_RETRIES: 400, 404, 413 and 422 do not count; else one client could take the model from all others."""
    several = Several([*[status(code)] * 50, ANSWERS])
    assert asked_in(several, 51) == [[0]] * 51
    assert several.heard.texts == ["x"]


def test_a_conversation_too_long_never_leaves_an_endpoint_out() -> None:
    assert asked_in(Several(status(400, context_exceeded=True), ANSWERS), 8) == [[0, 1]] * 8


def test_a_stale_connection_says_nothing_of_its_endpoint() -> None:
    assert asked_in(Several([failing(stale()), ANSWERS] * 8), 8) == [[0, 0]] * 8


def test_an_endpoint_that_answers_and_breaks_off_is_not_left_out() -> None:
    """What became of a request is said once, and its first token was a success."""
    broken = AttemptFailed(UpstreamIncomplete(), "broke before its end", again=True, counts=True)
    assert asked_in(Several(failing(broken, TOKEN)), 8) == [[0]] * 8


def test_an_endpoint_that_answers_now_and_then_is_not_left_out() -> None:
    """SLUICE_RETRIES: 5 in a row."""
    four_and_one = [*[PASSES] * 4, ANSWERS]
    assert asked_in(Several(four_and_one * 3), 15) == [[0]] * 15


def test_tries_count_and_not_answers() -> None:
    """SLUICE_RETRIES: three tries of one answer and two of the next are five in a row; the third is not begun."""
    assert asked_in(Several(PASSES, ANSWERS, retries=2), 3) == [[0, 0, 0, 1], [0, 0, 1], [1]]


def test_where_all_are_left_out_the_answer_fails_at_once() -> None:
    """SLUICE_RETRIES: all open: upstream_unreachable at once."""
    several = Several(status(503), status(503), status(503))
    asked_in(several, 5)
    failed = several.relay()
    assert isinstance(failed, UpstreamUnreachable)
    assert failed.said is None
    assert several.order == []


def waits_told(failures: Sequence[UpstreamFailed | None], several: Several) -> list[int | None]:
    """The seconds that each client is told to wait, if it got no answer."""
    assert several.route.can_ask is (failures[-1] is None)
    return [None if failed is None else failed.retry_after for failed in failures]


def test_while_all_are_left_out_it_is_told_when_the_first_is_asked_again(clock: Clock) -> None:
    """For /readyz, and for Retry-After, in whole seconds, rounded up."""
    several = Several([*[status(503)] * 5, ANSWERS], [*[ANSWERS] * 5, status(503)])
    assert waits_told([several.relay() for _ in range(5)], several) == [None] * 5
    clock.now += 4.5
    asked_in(several, 5)
    assert waits_told([several.relay()], several) == [6]
    clock.now += 5.4
    assert waits_told([several.relay()], several) == [1]
    clock.now += 0.1
    assert waits_told([several.relay()], several) == [None]


def test_the_asked_model_is_answered_by_another_while_its_endpoint_is_left_out() -> None:
    several = Several(ANSWERS, status(503))
    for _ in range(5):
        several.relay("second")
    several.relay("second")
    assert several.order == [0]


def test_after_ten_seconds_an_endpoint_is_tried_again(clock: Clock) -> None:
    """SLUICE_RETRIES: left out for 10 s, then probed until one succeeds."""
    several = Several([*[status(503)] * 6, ANSWERS], ANSWERS)
    asked_in(several, 5)
    clock.now += 10.0
    assert asked_in(several, 2) == [[0, 1], [1]], "the probe failed"
    clock.now += 10.0
    assert asked_in(several, 3) == [[0]] * 3


def test_a_probe_whose_client_leaves_makes_room_for_the_next(clock: Clock) -> None:
    """It says nothing about the endpoint, and must not leave it out for good."""
    several = Several([*[status(503)] * 5, silent(), ANSWERS])
    asked_in(several, 5)
    clock.now += 10.0

    async def leave(loop: VirtualTimeLoop) -> None:
        several._began_at = loop.time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await several.route.relay(ASKED, several.heard)

    run(leave)
    assert asked_in(several, 2) == [[0]] * 2
    assert several.heard.texts == ["x"]


def test_clients_that_leave_do_not_leave_an_endpoint_out() -> None:
    """SLUICE_RETRIES: it is the endpoint's failures that count."""
    several = Several([*[silent()] * 8, ANSWERS])

    async def leave(loop: VirtualTimeLoop) -> None:
        several._began_at = loop.time()
        for _ in range(8):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await several.route.relay(ASKED, several.heard)

    run(leave)
    assert several.relay() is None


# ---- Hedging


def test_a_slow_endpoint_is_raced_by_the_next() -> None:
    """SLUICE_HEDGE_AFTER; the endpoint that lost is closed, and nothing is held against it."""
    several = Several(silent(), late(0.5, "second"), hedge_after=2.0)
    for _ in range(8):
        assert several.relay() is None
        assert several.heard.texts == ["second"]
        assert several.asked_at == [0.0, 2.0]
    assert several.clients[0].cancelled == 8


def test_each_runner_has_its_own_tries_and_its_own_time() -> None:
    """SLUICE_FIRST_TOKEN_TIMEOUT: for each upstream asked."""
    several = Several(silent(), [PASSES, late(2.0, "second")], first_token_timeout=3.0, retries=1, hedge_after=2.0)
    assert several.relay() is None
    assert several.order == [0, 1, 1]
    assert several.heard.texts == ["second"]
    assert several.clients[0].cancelled == 1, "at 3 s, when the other one had spoken not a word yet"


def test_one_endpoint_alone_is_not_raced() -> None:
    several = Several(late(5.0), hedge_after=1.0)
    assert several.relay() is None
    assert several.order == [0]


def test_an_endpoint_that_is_left_out_is_not_raced_either() -> None:
    several = Several(late(5.0), status(503), hedge_after=1.0)
    asked_in(several, 8)
    assert several.order == [0]
    assert several.clients[1].asked == 5


WHOLE = decode_completion_request(b'{"messages":["hi"]}', max_tokens=5)  # "stream" is false where it is absent


def test_an_answer_that_is_not_streamed_is_not_raced() -> None:
    """It shows no first token, so each one that takes its time would be paid for twice."""
    several = Several(late(5.0, "first"), late(0.5, "second"), hedge_after=1.0)
    assert several.relay(request=WHOLE) is None
    assert several.order == [0]
    assert several.heard.texts == ["first"]


def test_the_silence_of_an_answer_that_is_not_streamed_leaves_nobody_out() -> None:
    """It is as silent while it is made as where nobody makes it."""
    several = Several(silent(), first_token_timeout=3.0)
    assert all(isinstance(several.relay(request=WHOLE), UpstreamTimeout) for _ in range(8))
    assert several.clients[0].asked == 8


def test_further_requests_of_all_answers_have_one_bound(clock: Clock) -> None:
    """Fault U49: where nothing answers, the burst is soon over, and then one answer of five may ask again."""
    several = Several(failing(passing()), retries=2)  # of a kind that leaves nobody out
    orders = asked_in(several, 120)
    assert orders[0] == [0, 0, 0]
    assert sum(map(len, orders[-20:])) == 24


def test_hedges_are_paid_for_out_of_the_same_bound(clock: Clock) -> None:
    """An endpoint that is slow because it has much to do must not cause twice as much."""
    several = Several(late(5.0), late(5.0), hedge_after=1.0)
    orders = asked_in(several, 150)
    assert orders[0] == [0, 1]
    assert sum(map(len, orders[-20:])) == 24
