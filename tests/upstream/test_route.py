"""How often an endpoint is asked, and what ends the asking; the client is a fake that fails as it is told to."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from server.errors import UpstreamError, UpstreamIncomplete, UpstreamRejected, UpstreamTimeout, UpstreamUnreachable
from server.upstream.attempt import AttemptFailed
from server.upstream.client import UpstreamClient, UpstreamRequest
from server.upstream.endpoint import Endpoint
from server.upstream.route import UpstreamRoute
from server.wire.chunks import Chunk, ChunkSink, Delta, DeltaKind
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
