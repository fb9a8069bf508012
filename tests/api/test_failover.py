"""Endpoints that fail, and a fallback that does not: what a client sees, and what the failing endpoint sees of us.

The verdict on each scenario is the same, and ``Scene.ask`` gives it: the answer of exactly one endpoint, whole and
named truthfully, or an error that cannot be taken for an answer; within a bound of time. The fixture ``scene``
then asks once more: whatever happened, the server serves.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import pytest

from tests.api.failover_scene import (
    ECHO,
    FACES,
    FIRST,
    SECOND,
    THIRD,
    Outcome,
    Scene,
    healthy,
    in_turn,
    mumbling,
    opening,
    plain_body,
    posted,
    refusing,
    resetting,
    silent,
    speak,
    voice_of,
    wants_stream,
)
from tests.api.raw_client import request as raw_request
from tests.conftest import Serve
from tests.sluice_process import free_port
from tests.upstream_sim import Call, Script, ScriptedUpstream, chunk

BOUND: Final = 6.0  # s for what takes two at most; the rest is for a loaded machine
IMPATIENT: Final = {"SLUICE_FIRST_TOKEN_TIMEOUT": "0.4"}
ONCE: Final = {"SLUICE_RETRIES": "0"}

every_face = pytest.mark.parametrize("face", FACES)
every_stream = pytest.mark.parametrize("face", ["browser", "stream"])
every_openai_face = pytest.mark.parametrize("face", ["stream", "plain"])


by_both_paths = pytest.mark.parametrize("scene", ["auto", "off"], indirect=True)


@pytest.fixture
async def scene(
    request: pytest.FixtureRequest, serve: Serve, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Scene]:
    """The server before its endpoints, on the fast path unless a test wants both; its state afterwards is checked."""
    caplog.set_level(logging.DEBUG, logger="sluice")
    fast_path = getattr(request, "param", "auto")
    async with ScriptedUpstream() as second, ScriptedUpstream() as third:
        scene = Scene(serve, (upstream, second, third), caplog, fast_path)
        yield scene
        if scene.server is not None:
            await scene.check_aftermath()


def gaps(upstream: ScriptedUpstream) -> list[float]:
    """Seconds between the requests that an endpoint got."""
    return [later.began_at - earlier.began_at for earlier, later in itertools.pairwise(upstream.calls)]


# ---- Too many requests


@every_face
async def test_a_retry_after_that_fits_is_waited_for_and_the_same_endpoint_asked_again(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_RETRIES: ``Retry-After`` is honoured while it fits the first-token time."""
    await scene.open(in_turn(refusing(429, "rate_limit_exceeded", Retry_After="1"), healthy))
    outcome = await scene.ask(face)
    assert outcome.is_from(FIRST)
    (gap,) = gaps(scene.first)
    assert gap > 0.95
    assert scene.second.calls == []
    assert outcome.seconds < BOUND


@every_face
async def test_a_retry_after_that_does_not_fit_sends_the_question_on_at_once(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_RETRIES: what would be waited for in vain is not waited for."""
    await scene.open(refusing(429, "rate_limit_exceeded", Retry_After="120"))
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert len(scene.first.calls) == 1
    assert outcome.seconds < BOUND


@every_face
async def test_429_for_ever_is_asked_a_few_times_with_growing_pauses_and_then_left(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_RETRIES: two further tries, jittered exponential back-off, then the next upstream."""
    await scene.open(refusing(429, "rate_limit_exceeded"))
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert len(scene.first.calls) == 3
    assert len(scene.second.calls) == 1
    assert all(gap > 0.05 for gap in gaps(scene.first)), "no hammering"
    assert outcome.seconds < BOUND


@every_face
async def test_429_everywhere_is_told_as_429(scene: Scene, face: str) -> None:
    """Sections 3 and 5: ``upstream_rate_limited`` in-band; before the first byte the status, its Retry-After and the
    error object of the upstream."""
    everywhere = refusing(429, "rate_limit_exceeded", Retry_After="120")
    await scene.open(everywhere, everywhere)
    outcome = await scene.ask(face)
    if face == "browser":
        assert outcome.code == "upstream_rate_limited"
    else:
        assert outcome.response is not None
        assert outcome.status == 429
        assert outcome.response.headers["Retry-After"] == "120"
        assert outcome.code == "rate_limit_exceeded"
    assert [len(scene.first.calls), len(scene.second.calls)] == [1, 1]
    assert outcome.seconds < BOUND


# ---- Errors of the endpoint


@every_face
async def test_one_500_is_made_good_by_the_same_endpoint(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_RETRIES."""
    await scene.open(in_turn(refusing(500), healthy))
    assert (await scene.ask(face)).is_from(FIRST)
    assert [len(scene.first.calls), len(scene.second.calls)] == [2, 0]


@every_face
@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
async def test_an_endpoint_that_keeps_failing_is_left_for_the_next(scene: Scene, face: str, status: int) -> None:
    """Section 2, SLUICE_RETRIES and SLUICE_FALLBACKS: bounded tries, then the next in order."""
    await scene.open(refusing(status, "overloaded"), SLUICE_RETRIES="1")
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert [len(scene.first.calls), len(scene.second.calls)] == [2, 1]
    assert outcome.seconds < BOUND


@every_face
async def test_503_everywhere_is_told_as_503(scene: Scene, face: str) -> None:
    """Sections 3 and 5: ``upstream_error`` in-band; before the first byte the status and the upstream's object."""
    await scene.open(refusing(503, "overloaded"), refusing(503, "overloaded"), **ONCE)
    outcome = await scene.ask(face)
    if face == "browser":
        assert outcome.code == "upstream_error"
    else:
        assert outcome.status == 503
        assert outcome.code == "overloaded"
    assert outcome.seconds < BOUND


@every_face
async def test_the_third_endpoint_is_asked_where_two_have_failed(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_FALLBACKS: tried in order."""
    await scene.open(refusing(503), refusing(404, "model_not_found"), healthy, **ONCE)
    assert (await scene.ask(face)).is_from(THIRD)
    assert [len(upstream.calls) for upstream in scene.upstreams] == [1, 1, 1]


@every_face
async def test_an_error_object_in_a_stream_before_its_first_token_is_a_failure_like_any_other(
    scene: Scene, face: str
) -> None:
    """Section 2, SLUICE_RETRIES: the first token decides, not the status line."""

    async def failing(call: Call) -> None:
        error = {"error": {"message": ECHO, "type": "server_error", "param": None, "code": 503}}
        if wants_stream(call):
            await opening(call, 0)
            await call.event(error)
            await call.end()
        else:
            await call.refuse(200, error["error"])

    await scene.open(failing, **ONCE)
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)


# ---- No connection, no answer


@by_both_paths
@every_face
async def test_a_reset_before_the_answer_is_made_good(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_RETRIES: connect failure and reset are tried again."""
    await scene.open(in_turn(resetting, healthy))
    outcome = await scene.ask(face)
    assert outcome.is_from(FIRST)
    assert [len(scene.first.calls), len(scene.second.calls)] == [2, 0]
    assert outcome.seconds < BOUND


@every_face
async def test_resets_for_ever_are_left_for_the_next_endpoint(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_RETRIES."""
    await scene.open(resetting)
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert 1 <= len(scene.first.calls) <= 4, "three tries, and one more for a connection that had gone stale"
    assert outcome.seconds < BOUND


@every_face
async def test_an_endpoint_where_nobody_listens_is_left_for_the_next(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_FALLBACKS."""
    await scene.open(healthy, LLM_BASE_URL=f"http://127.0.0.1:{free_port()}/v1", SLUICE_RETRIES="1")
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert outcome.seconds < BOUND


@every_face
async def test_where_nobody_listens_anywhere_the_answer_says_so(scene: Scene, face: str) -> None:
    """Sections 3 and 5: ``upstream_unreachable``, in-band or as a status of ours."""
    scene.serves_afterwards = False
    await scene.open(healthy, None, LLM_BASE_URL=f"http://127.0.0.1:{free_port()}/v1", SLUICE_RETRIES="1")
    outcome = await scene.ask(face)
    assert outcome.code == "upstream_unreachable"
    if face != "browser":
        assert 500 <= outcome.status < 600
    assert outcome.seconds < BOUND


@by_both_paths
@every_face
async def test_a_silent_endpoint_is_asked_once_and_closed_and_the_next_one_has_its_own_time(
    scene: Scene, face: str
) -> None:
    """Section 2: SLUICE_FIRST_TOKEN_TIMEOUT is for each upstream asked; a silent one is not asked twice."""

    async def slow(call: Call) -> None:
        await asyncio.sleep(0.5)
        await healthy(call)

    await scene.open(silent, slow, SLUICE_FIRST_TOKEN_TIMEOUT="0.8")
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert len(scene.first.calls) == 1
    assert scene.first.calls[0].gone_at is not None, "and it was closed"
    assert 1.2 < outcome.seconds < BOUND


@every_face
async def test_silence_everywhere_ends_when_each_has_had_its_time(scene: Scene, face: str) -> None:
    """Sections 2, 3 and 5: ``upstream_timeout``, in-band or as a status of ours, and nothing left open."""
    await scene.open(silent, silent, silent, **IMPATIENT)
    outcome = await scene.ask(face)
    assert outcome.code == "upstream_timeout"
    if face != "browser":
        assert 500 <= outcome.status < 600
    assert [len(upstream.calls) for upstream in scene.upstreams] == [1, 1, 1]
    assert outcome.seconds < BOUND


@every_face
async def test_the_time_of_the_whole_answer_bounds_all_endpoints_together(scene: Scene, face: str) -> None:
    """Sections 2 and 5: SLUICE_STREAM_TIMEOUT holds on every face."""
    await scene.open(silent, silent, silent, SLUICE_FIRST_TOKEN_TIMEOUT="0.7", SLUICE_STREAM_TIMEOUT="1")
    outcome = await scene.ask(face)
    assert outcome.code in {"stream_timeout", "upstream_timeout"}
    assert scene.third.calls == []
    assert outcome.seconds < BOUND


@by_both_paths
@every_face
@pytest.mark.parametrize("sign", ["nothing", "role", "empty", "comment"])
async def test_a_head_without_a_token_does_not_stop_the_first_token_clock(scene: Scene, face: str, sign: str) -> None:
    """Section 2, SLUICE_FIRST_TOKEN_TIMEOUT: headers, comments, role-only and empty deltas do not count; and of such an
    endpoint nothing reaches the client."""
    await scene.open(mumbling(sign, words=0), **IMPATIENT)
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert len(scene.first.calls) == 1
    if face != "browser":
        assert FIRST.model.encode() not in outcome.raw
    assert outcome.seconds < BOUND


@every_face
async def test_a_slow_first_token_within_its_time_is_waited_for(scene: Scene, face: str) -> None:
    """Section 2: no second endpoint is paid while the first one has time left."""

    async def slow(call: Call) -> None:
        await asyncio.sleep(0.5)
        await healthy(call)

    await scene.open(slow)
    assert (await scene.ask(face)).is_from(FIRST)
    assert scene.second.calls == []


# ---- A stream that breaks off


def breaking(how: str, words: int = 4) -> Script:
    """So many words, and then ``close`` (FIN), ``reset``, ``end`` (of the body, in order) or ``hang``."""

    async def script(call: Call) -> None:
        if wants_stream(call):
            await opening(call, words)
        else:
            body = plain_body(voice_of(call))
            framing = {} if how == "end" else {"Content_Length": str(len(body))}
            await call.head(200, "application/json", **framing)
            await call.write(body[: len(body) * 6 // 10])
        await asyncio.sleep(0.05)
        match how:
            case "hang":
                await call.gone()
            case "end":
                await call.end()
            case "close":
                call.close()
            case "reset":
                await resetting(call)

    return script


@by_both_paths
@every_stream
@pytest.mark.parametrize("how", ["close", "reset", "end"])
async def test_an_answer_cut_mid_stream_ends_with_an_error_and_no_second_endpoint_is_asked(
    scene: Scene, face: str, how: str
) -> None:
    """Sections 3 and 5: a cut answer never looks complete; what was said is not said again in other words."""
    await scene.open(breaking(how))
    outcome = await scene.ask(face)
    assert outcome.in_band
    assert outcome.code == "upstream_incomplete"
    assert outcome.text == "".join(FIRST.words[:4]), "every token that came is passed on"
    assert [len(scene.first.calls), len(scene.second.calls)] == [1, 0]
    assert outcome.seconds < BOUND


@by_both_paths
@pytest.mark.parametrize("how", ["close", "reset", "end", "hang"])
async def test_a_plain_answer_that_breaks_off_is_whole_or_an_error(scene: Scene, how: str) -> None:
    """Section 5: a 200 is a whole answer, however it was got; in bounded time."""
    await scene.open(breaking(how), **IMPATIENT, SLUICE_IDLE_TIMEOUT="0.4", SLUICE_RETRIES="1")
    outcome = await scene.ask("plain")
    if outcome.refused:
        assert outcome.code in {"upstream_incomplete", "upstream_timeout", "upstream_invalid"}
        assert 500 <= outcome.status < 600
    assert outcome.seconds < BOUND


@by_both_paths
@every_stream
async def test_an_answer_that_stalls_ends_with_an_error_after_the_idle_time(scene: Scene, face: str) -> None:
    """Sections 2, 3 and 5, SLUICE_IDLE_TIMEOUT: the endpoint is closed, the client told."""
    await scene.open(breaking("hang"), SLUICE_IDLE_TIMEOUT="0.5")
    outcome = await scene.ask(face)
    assert outcome.in_band
    assert outcome.code == "upstream_timeout"
    assert outcome.text == "".join(FIRST.words[:4])
    assert scene.second.calls == []
    assert outcome.seconds < BOUND


@by_both_paths
@every_stream
@pytest.mark.parametrize("sign", ["role", "empty", "comment"])
async def test_signs_of_life_without_content_do_not_stop_the_idle_clock(scene: Scene, face: str, sign: str) -> None:
    """Section 2, SLUICE_IDLE_TIMEOUT: between two deltas with content."""
    await scene.open(mumbling(sign, words=4), SLUICE_IDLE_TIMEOUT="0.5")
    outcome = await scene.ask(face)
    assert outcome.in_band
    assert outcome.code == "upstream_timeout"
    assert outcome.seconds < BOUND


@by_both_paths
@every_stream
async def test_an_answer_that_never_ends_is_ended_by_the_time_of_the_whole_answer(scene: Scene, face: str) -> None:
    """Sections 2, 3 and 5, SLUICE_STREAM_TIMEOUT."""

    async def for_ever(call: Call) -> None:
        await opening(call, 0)
        for word in voice_of(call).words:
            await call.event(chunk({"content": word}, model=voice_of(call).model))
            await asyncio.sleep(0.2)
        await call.gone()

    await scene.open(for_ever, SLUICE_STREAM_TIMEOUT="1")
    outcome = await scene.ask(face)
    assert outcome.in_band
    assert outcome.code == "stream_timeout"
    assert outcome.text
    assert outcome.seconds < BOUND


@by_both_paths
@every_stream
async def test_an_error_object_mid_stream_ends_the_answer_in_our_words(scene: Scene, face: str) -> None:
    """Sections 3 and 5: ``upstream_error``; TEXT is ours."""

    async def failing(call: Call) -> None:
        await opening(call, 4)
        await call.event({"error": {"message": ECHO, "type": "server_error", "param": None, "code": None}})
        await call.end()

    await scene.open(failing)
    outcome = await scene.ask(face)
    assert outcome.in_band
    assert outcome.code == "upstream_error"
    assert ECHO.encode() not in outcome.raw
    assert scene.second.calls == []


@by_both_paths
@every_stream
async def test_a_connection_that_was_used_before_may_be_cut_like_any_other(scene: Scene, face: str) -> None:
    """Sections 3 and 5: that a pooled connection is broken is invisible before the first token only."""
    await scene.open(in_turn(healthy, breaking("reset"), resetting, healthy))
    assert (await scene.ask(face)).is_from(FIRST)
    assert (await scene.ask(face)).code == "upstream_incomplete"
    assert (await scene.ask(face)).is_from(FIRST)
    assert scene.second.calls == []


@every_openai_face
async def test_the_connection_of_a_failed_answer_serves_the_next_one(scene: Scene, face: str) -> None:
    """Section 5: the response ends in order; an SDK's pool goes on with the connection."""
    await scene.open(in_turn(breaking("close"), healthy), None, **ONCE)
    async with await scene.connect() as client:
        failed = await client.ask(posted(face))
        assert b"upstream_incomplete" in failed.body
        served = await client.ask(posted(face))
    assert served.status == 200
    assert FIRST.words[-1].encode() in served.body


@every_face
async def test_a_client_that_leaves_during_the_pause_before_a_further_try_prevents_it(scene: Scene, face: str) -> None:
    """Sections 3 and 5: nobody is left who would want it, here or of the next endpoint."""
    await scene.open(refusing(503, Retry_After="1"))
    async with await scene.connect() as client:
        await client.send(raw_request() if face == "browser" else posted(face))
        async with asyncio.timeout(5):
            await scene.first.called()
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.3)
    assert [len(scene.first.calls), len(scene.second.calls)] == [1, 0]


# ---- A stream that is not as it should be


def with_garbage(count: int, after: int = 3) -> Script:
    """A whole answer in which so many events hold no JSON; a plain one is no JSON at all."""

    async def script(call: Call) -> None:
        if not wants_stream(call):
            body = plain_body(voice_of(call))[:-9] + b'"oops'
            await call.head(200, "application/json", Content_Length=str(len(body)))
            await call.write(body)
            await call.end()
            return
        await opening(call, after)
        for _ in range(count):
            await call.write(b'data: {"id": "c-1", "choices": [{"delta": {"content": \n\n')
        await speak(call, words_sent=after)

    return script


@by_both_paths
@every_stream
async def test_a_malformed_event_is_left_out_and_the_answer_goes_on(scene: Scene, face: str) -> None:
    """Section 3: one malformed upstream event is skipped; no client should have to read it."""
    await scene.open(with_garbage(1))
    assert (await scene.ask(face)).is_from(FIRST)
    assert scene.second.calls == []


@by_both_paths
@every_stream
async def test_an_answer_of_malformed_events_ends_with_an_error(scene: Scene, face: str) -> None:
    """Section 3: more than 10 in one answer: ``upstream_invalid``."""
    await scene.open(with_garbage(11))
    outcome = await scene.ask(face)
    assert outcome.in_band
    assert outcome.code == "upstream_invalid"
    assert outcome.text == "".join(FIRST.words[:3])


async def test_a_plain_answer_that_is_no_json_never_reaches_the_client(scene: Scene) -> None:
    """Section 5: an SDK that gets a 200 reads an answer out of it."""
    await scene.open(with_garbage(11), **ONCE)
    outcome = await scene.ask("plain")
    assert outcome.refused or outcome.is_from(SECOND)
    if outcome.refused:
        assert 500 <= outcome.status < 600
        assert outcome.code == "upstream_invalid"


@by_both_paths
@every_stream
@pytest.mark.parametrize("ends", ["the body ends", "the connection is closed", "nothing more comes"])
async def test_an_answer_without_done_is_complete_if_it_said_why_it_ended(scene: Scene, face: str, ends: str) -> None:
    """Sections 3 and 5: a finish_reason without ``[DONE]`` is a complete answer, with its usage, and ours has its
    ``[DONE]``."""

    async def script(call: Call) -> None:
        await opening(call, 0)
        await speak(call, done=False)
        match ends:
            case "the body ends":
                await call.end()
            case "the connection is closed":
                call.close()
            case _:
                await call.gone()

    await scene.open(script, SLUICE_IDLE_TIMEOUT="1")
    outcome = await scene.ask(face)
    assert outcome.is_from(FIRST)
    assert outcome.finish_reason == "stop"
    assert len(scene.first.calls) == 1
    assert outcome.seconds < BOUND


# ---- What another endpoint may mend, and what none can


@every_face
async def test_a_context_too_long_is_not_asked_again_but_sent_to_the_next_model(scene: Scene, face: str) -> None:
    """Section 2: ``context_length_exceeded`` goes to the next upstream."""
    await scene.open(refusing(400, "context_length_exceeded"))
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert len(scene.first.calls) == 1
    assert outcome.seconds < BOUND


@every_face
async def test_a_context_too_long_for_all_is_told_as_it_is(scene: Scene, face: str) -> None:
    """Sections 3 and 5: ``upstream_rejected``, or the upstream's own error object."""
    await scene.open(refusing(400, "context_length_exceeded"), refusing(400, "context_length_exceeded"))
    outcome = await scene.ask(face)
    if face == "browser":
        assert outcome.code == "upstream_rejected"
    else:
        assert outcome.status == 400
        assert outcome.code == "context_length_exceeded"
    assert [len(scene.first.calls), len(scene.second.calls)] == [1, 1]


@every_face
@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "content_policy_violation"), (400, "content_filter"), (400, None), (413, None), (422, "invalid_value")],
)
async def test_what_is_wrong_with_the_question_ends_the_answer(
    scene: Scene, face: str, status: int, code: str | None
) -> None:
    """Section 2: other 4xx are neither retried nor sent on; the client gets the upstream's reason (section 5)."""
    await scene.open(refusing(status, code))
    outcome = await scene.ask(face)
    if face == "browser":
        assert outcome.code == "upstream_rejected"
    else:
        assert outcome.status == status
        assert outcome.code == code
        assert outcome.error is not None
        assert outcome.error["type"] == "invalid_request_error"
        assert outcome.error["message"].startswith("Refused: ")
    assert [len(scene.first.calls), len(scene.second.calls)] == [1, 0]


@every_stream
async def test_an_answer_that_its_filter_ended_is_passed_on_as_that(scene: Scene, face: str) -> None:
    """Section 3: the finish_reason is the upstream's; a filter's word is no failure that a second endpoint mends."""

    async def filtered(call: Call) -> None:
        await opening(call, 0)
        await speak(call, finish="content_filter")

    await scene.open(filtered)
    outcome = await scene.ask(face)
    assert outcome.is_from(FIRST)
    assert outcome.finish_reason == "content_filter"
    assert scene.second.calls == []


@every_face
@pytest.mark.parametrize("status", [401, 403, 404])
async def test_an_endpoint_that_refuses_our_key_or_knows_no_such_model_is_left_for_the_next(
    scene: Scene, face: str, status: int
) -> None:
    """Section 2: 401, 403 and 404 go to the next upstream, untried again."""
    await scene.open(refusing(status, "invalid_api_key"))
    assert (await scene.ask(face)).is_from(SECOND)
    assert len(scene.first.calls) == 1


@every_openai_face
@pytest.mark.parametrize("status", [401, 403])
async def test_what_is_about_our_key_is_told_in_our_words(scene: Scene, face: str, status: int) -> None:
    """Section 5: 401 and 403 become a 502; the client's own key is not at fault, and ours does not show."""
    await scene.open(refusing(status, "invalid_api_key"), refusing(status, "invalid_api_key"))
    outcome = await scene.ask(face)
    assert outcome.status == 502
    assert outcome.code == "upstream_rejected"
    assert ECHO.encode() not in outcome.raw
    assert b"invalid_api_key" not in outcome.raw


@every_openai_face
async def test_a_reason_that_quotes_our_key_is_passed_on_without_it(scene: Scene, face: str) -> None:
    """Section 5: the upstream's error object passes through, and no key of ours shows."""
    error = {"message": f"bad: Bearer {FIRST.key}", "type": FIRST.key, "param": FIRST.key, "code": FIRST.key}

    async def quoting(call: Call) -> None:
        await call.refuse(400, error)

    await scene.open(quoting)
    outcome = await scene.ask(face)
    assert outcome.status == 400
    assert FIRST.key.encode() not in outcome.raw


# ---- An endpoint that takes no half answer


PREFILL: Final = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "first1 "}]


async def without_prefill(call: Call) -> None:
    """An endpoint that refuses a conversation whose last word is the assistant's."""
    if call.json["messages"][-1]["role"] == "assistant":
        await call.refuse(
            400,
            {"message": "no prefill", "type": "invalid_request_error", "param": "messages", "code": "invalid_prefill"},
        )
    else:
        await healthy(call)


@every_stream
async def test_a_cut_answer_is_not_hidden_behind_the_refusal_of_a_fallback_that_takes_no_prefill(
    scene: Scene, face: str
) -> None:
    """Section 3: the error is that of the answer that was cut."""
    await scene.open(breaking("close"), without_prefill)
    outcome = await scene.ask(face)
    assert outcome.in_band
    assert outcome.code == "upstream_incomplete"
    assert scene.second.calls == []


@every_face
async def test_a_fallback_that_takes_no_prefill_is_asked_the_question_alone(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_FALLBACKS: before the first token nothing has been said that it would have to go on from."""
    await scene.open(breaking("close", words=0), without_prefill, **ONCE)
    assert (await scene.ask(face)).is_from(SECOND)


@every_openai_face
async def test_a_prefill_of_the_clients_own_reaches_the_fallback_and_its_refusal_the_client(
    scene: Scene, face: str
) -> None:
    """Section 5: the body passes through, and before the first byte the upstream's error object does."""
    await scene.open(refusing(503), without_prefill, **ONCE)
    outcome = await scene.ask(face, messages=PREFILL)
    assert scene.second.calls[0].json["messages"] == PREFILL
    assert outcome.status == 400
    assert outcome.code == "invalid_prefill"


# ---- An endpoint that comes and goes


@every_face
async def test_an_endpoint_that_fails_every_other_time_answers_all_the_same(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_RETRIES: a success between two failures keeps the circuit closed."""
    turns = itertools.cycle([refusing(503), healthy])

    async def flapping(call: Call) -> None:
        await next(turns)(call)

    await scene.open(flapping)
    for _ in range(4):
        assert (await scene.ask(face)).is_from(FIRST)
    assert len(scene.first.calls) == 8
    assert scene.second.calls == []


@every_face
async def test_an_endpoint_that_is_well_again_is_asked_again(scene: Scene, face: str) -> None:
    """Section 2: no request is lost while it is down; short of five failures in a row the circuit stays closed."""
    await scene.open(refusing(503), SLUICE_RETRIES="1")
    for _ in range(2):
        assert (await scene.ask(face)).is_from(SECOND)
    scene.first.script = healthy
    assert (await scene.ask(face)).is_from(FIRST)


# ---- Who answered, and what it cost


@by_both_paths
@every_face
async def test_what_a_failed_try_said_before_its_first_token_leaves_no_trace(scene: Scene, face: str) -> None:
    """Sections 3 and 5: MODEL and the usage are those of the endpoint that really answered."""

    async def bragging(call: Call) -> None:
        if not wants_stream(call):
            await resetting(call)
            return
        await opening(call, 0)
        usage = {"prompt_tokens": 999, "completion_tokens": 999, "total_tokens": 1998}
        await call.event(chunk(model=FIRST.model, usage=usage))
        await asyncio.sleep(0.05)
        call.reset()

    await scene.open(bragging, **ONCE)
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert outcome.models == {SECOND.model}
    assert outcome.usages == [SECOND.usage]
    assert outcome.finish_reason == "stop"
    assert b"999" not in outcome.raw
    if face != "browser":
        assert FIRST.model.encode() not in outcome.raw


@by_both_paths
@every_face
async def test_each_endpoint_is_asked_for_its_own_model_with_its_own_key(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_FALLBACKS; and nobody gets the client's credentials (section 5)."""
    await scene.open(refusing(503), refusing(503), healthy, **ONCE)
    assert (await scene.ask(face)).is_from(THIRD)
    bodies = []
    for upstream, voice in zip(scene.upstreams, (FIRST, SECOND, THIRD), strict=True):
        (call,) = upstream.calls
        assert call.path == "/v1/chat/completions"
        assert call.headers.getall("Authorization") == [f"Bearer {voice.key}"]
        assert call.json["model"] == voice.model
        bodies.append(call.json | {"model": None})
    assert bodies[0] == bodies[1] == bodies[2], "and otherwise the same question"


@every_openai_face
async def test_a_client_that_names_the_fallbacks_model_is_answered_by_it(scene: Scene, face: str) -> None:
    """Section 5: the answer is that of the model asked for, and no other endpoint is paid for it."""
    await scene.open(healthy, healthy)
    assert (await scene.ask(face, model=SECOND.model)).is_from(SECOND)
    assert scene.first.calls == []


@every_openai_face
async def test_the_fallbacks_model_has_the_others_behind_it(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_FALLBACKS: a model that fails is left for the next, whichever it was that was asked first."""
    await scene.open(healthy, refusing(503), **ONCE)
    outcome = await scene.ask(face, model=SECOND.model)
    assert outcome.is_from(FIRST)
    assert len(scene.second.calls) == 1


@every_openai_face
async def test_a_model_that_nobody_has_costs_no_call(scene: Scene, face: str) -> None:
    """Section 5: the model allow-list, else 404 ``model_not_found``."""
    await scene.open(healthy)
    outcome = await scene.ask(face, model="third-model")
    assert outcome.status == 404
    assert outcome.code == "model_not_found"
    assert [len(scene.first.calls), len(scene.second.calls)] == [0, 0]


# ---- Hedging

HEDGE: Final = {"SLUICE_HEDGE_AFTER": "0.3"}


def speaking_until(loser: Callable[[], Awaitable[Call]]) -> Script:
    """A whole answer that ends only when the other's request has been closed."""

    async def script(call: Call) -> None:
        if wants_stream(call):
            await opening(call, 2)
        other = await loser()
        async with asyncio.timeout(5):
            if wants_stream(call):
                await other.gone()
                await speak(call, words_sent=2)
            else:
                await healthy(call)
                await other.gone()

    return script


@by_both_paths
@every_stream
async def test_a_slow_first_token_has_the_next_endpoint_asked_too_and_the_first_to_speak_wins(
    scene: Scene, face: str
) -> None:
    """Section 2, SLUICE_HEDGE_AFTER: the other is closed at once, while the winner still speaks."""
    await scene.open(silent, speaking_until(scene.first.called), **HEDGE)
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert [len(scene.first.calls), len(scene.second.calls)] == [1, 1]
    hedged_after = scene.second.calls[0].began_at - scene.first.calls[0].began_at
    assert 0.25 < hedged_after < 2
    assert outcome.seconds < BOUND


@by_both_paths
@every_stream
async def test_the_endpoint_asked_first_may_still_win(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_HEDGE_AFTER: whichever speaks first is relayed."""

    async def at_last(call: Call) -> None:
        await scene.second.called()
        await speaking_until(scene.second.called)(call)

    await scene.open(at_last, silent, **HEDGE)
    outcome = await scene.ask(face)
    assert outcome.is_from(FIRST)
    assert [len(scene.first.calls), len(scene.second.calls)] == [1, 1]


@every_stream
async def test_an_endpoint_that_speaks_in_time_is_not_hedged(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_HEDGE_AFTER: it is the first token that counts, not the end of the answer."""

    async def slow_speech(call: Call) -> None:
        if wants_stream(call):
            await opening(call, 2)
            await asyncio.sleep(0.6)
            await speak(call, words_sent=2)
        else:
            await healthy(call)

    await scene.open(slow_speech, **HEDGE)
    assert (await scene.ask(face)).is_from(FIRST)
    assert scene.second.calls == []


@every_stream
@pytest.mark.parametrize("sign", ["a head", "a role"])
async def test_a_head_or_a_role_is_not_yet_speech(scene: Scene, face: str, sign: str) -> None:
    """Section 2, SLUICE_HEDGE_AFTER: without a first token the next one is asked."""

    async def clearing_its_throat(call: Call) -> None:
        if wants_stream(call):
            await call.head()
            if sign == "a role":
                await call.event(chunk({"role": "assistant", "content": ""}, model=voice_of(call).model))
        else:
            await call.head(200, "application/json")
        await call.gone()

    await scene.open(clearing_its_throat, **HEDGE)
    assert (await scene.ask(face)).is_from(SECOND)


@every_stream
@pytest.mark.parametrize(
    "failure",
    [
        "503",
        "reset",
        "400",
    ],
)
async def test_a_hedge_that_fails_leaves_the_first_endpoint_its_time(scene: Scene, face: str, failure: str) -> None:
    """Section 2, SLUICE_HEDGE_AFTER: who was asked too may not end what it was to help."""

    async def at_last(call: Call) -> None:
        await scene.second.called()
        await asyncio.sleep(0.4)
        await healthy(call)

    fault = {"503": refusing(503), "400": refusing(400, "invalid_prefill"), "reset": resetting}[failure]
    await scene.open(at_last, fault, **HEDGE, **ONCE)
    outcome = await scene.ask(face)
    assert outcome.is_from(FIRST)
    assert outcome.seconds < BOUND


@every_stream
@pytest.mark.parametrize("failure", ["503", "reset"])
async def test_a_first_endpoint_that_fails_leaves_the_answer_to_the_hedge(
    scene: Scene, face: str, failure: str
) -> None:
    """Section 2, SLUICE_HEDGE_AFTER: and the hedge, under way, is not asked a second time."""
    failed = asyncio.Event()

    async def failing(call: Call) -> None:
        await scene.second.called()
        await (refusing(503) if failure == "503" else resetting)(call)
        failed.set()

    async def later(call: Call) -> None:
        await failed.wait()
        await asyncio.sleep(0.3)
        await healthy(call)

    await scene.open(failing, later, **HEDGE, **ONCE)
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert [len(scene.first.calls), len(scene.second.calls)] == [1, 1]


@every_stream
async def test_where_the_hedge_and_the_first_both_fail_there_is_one_error(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_HEDGE_AFTER."""
    await scene.open(silent, refusing(503), **HEDGE, **ONCE, SLUICE_FIRST_TOKEN_TIMEOUT="0.8")
    outcome = await scene.ask(face)
    assert outcome.error is not None
    assert outcome.refused is (face != "browser")
    assert outcome.seconds < BOUND


@every_stream
async def test_a_quick_failure_is_not_waited_out(scene: Scene, face: str) -> None:
    """Section 2: a failed endpoint is left at once; the hedge is for silence only."""
    await scene.open(refusing(404), SLUICE_HEDGE_AFTER="5")
    outcome = await scene.ask(face)
    assert outcome.is_from(SECOND)
    assert outcome.seconds < 4


@every_stream
async def test_a_client_that_leaves_closes_both_the_endpoint_and_its_hedge(scene: Scene, face: str) -> None:
    """Sections 3 and 5: a client that goes away closes the upstream request, however many there are."""
    await scene.open(silent, silent, **HEDGE)
    async with await scene.connect() as client:
        await client.send(raw_request() if face == "browser" else posted(face))
        async with asyncio.timeout(5):
            calls = [await scene.first.called(), await scene.second.called()]
    async with asyncio.timeout(5):
        for call in calls:
            await call.gone()


@by_both_paths
@every_stream
async def test_two_endpoints_that_speak_at_once_are_never_mixed(scene: Scene, face: str) -> None:
    """Section 2, SLUICE_HEDGE_AFTER: one is relayed, from its first word on."""
    together = asyncio.Event()

    async def wait_and_speak(call: Call) -> None:
        if call.json["model"] == SECOND.model:
            together.set()
        await together.wait()
        await healthy(call)

    await scene.open(wait_and_speak, wait_and_speak, **HEDGE)
    for _ in range(5):
        together.clear()
        assert (await scene.ask(face)).complete, "and whose words they are, the scene has checked"


async def test_a_completion_that_is_not_streamed_is_not_hedged(scene: Scene) -> None:
    """It shows no first token: whenever it takes its time it would be paid twice."""

    async def slow(call: Call) -> None:
        await asyncio.sleep(0.7)
        await healthy(call)

    await scene.open(slow, **HEDGE)
    outcome = await scene.ask("plain")
    assert outcome.is_from(FIRST)
    assert scene.second.calls == []


# ---- The circuit


async def asked_in_vain(scene: Scene, face: str, times: int) -> list[Outcome]:
    return [await scene.ask(face) for _ in range(times)]


FAILURES: Final[dict[str, Script]] = {
    **{str(status): refusing(status) for status in (401, 403, 408, 429, 500, 503, 529)},
    "reset": resetting,
    "silence": silent,
}


@pytest.mark.parametrize(
    ("failure", "face"), [*itertools.product(FAILURES, ["stream"]), ("503", "browser"), ("503", "plain")]
)
async def test_five_failures_in_a_row_open_the_circuit(scene: Scene, failure: str, face: str) -> None:
    """Section 2: an endpoint that keeps failing is left out, and those who ask do not notice."""
    await scene.open(FAILURES[failure], **ONCE, SLUICE_FIRST_TOKEN_TIMEOUT="0.2" if failure == "silence" else "5")
    for outcome in await asked_in_vain(scene, face, 8):
        assert outcome.is_from(SECOND)
    assert len(scene.first.calls) == 5


@every_face
async def test_tries_count_and_not_questions(scene: Scene, face: str) -> None:
    """Section 2: three tries of one question and two of the next are five failures."""
    await scene.open(refusing(503))
    for outcome in await asked_in_vain(scene, face, 4):
        assert outcome.is_from(SECOND)
    assert len(scene.first.calls) == 5


@every_face
@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_question_that_is_at_fault_never_opens_the_circuit(scene: Scene, face: str, status: int) -> None:
    """Section 2: 400, 404, 413 and 422 do not count; one client's mistakes may not cost the others their model."""
    await scene.open(refusing(status), **ONCE)
    for outcome in await asked_in_vain(scene, face, 8):
        assert outcome.error is not None
    assert len(scene.first.calls) == 8
    scene.first.script = healthy
    assert (await scene.ask(face)).is_from(FIRST)


@every_face
async def test_a_question_too_long_never_opens_the_circuit(scene: Scene, face: str) -> None:
    """Section 2: a long question goes to the next model every time, a short one to the first as ever."""
    await scene.open(refusing(400, "context_length_exceeded"), **ONCE)
    for outcome in await asked_in_vain(scene, face, 8):
        assert outcome.is_from(SECOND)
    assert len(scene.first.calls) == 8
    scene.first.script = healthy
    assert (await scene.ask(face)).is_from(FIRST)


@every_face
async def test_clients_that_leave_do_not_open_the_circuit(scene: Scene, face: str) -> None:
    """Section 2: it is the endpoint's failures that count; who leaves says nothing of it."""
    await scene.open(silent, **ONCE)
    for count in range(1, 8):
        async with await scene.connect() as client:
            await client.send(raw_request() if face == "browser" else posted(face))
            async with asyncio.timeout(5):
                call = await scene.first.called(count)
        async with asyncio.timeout(5):
            await call.gone()
    scene.first.script = healthy
    assert (await scene.ask(face)).is_from(FIRST)


@every_face
async def test_a_success_in_between_starts_the_count_anew(scene: Scene, face: str) -> None:
    """Section 2: five in a row."""
    four_and_one = [*[refusing(503)] * 4, healthy]
    await scene.open(in_turn(*four_and_one * 2, *[refusing(503)] * 4, healthy), **ONCE)
    outcomes = await asked_in_vain(scene, face, 15)
    assert [outcome.is_from(FIRST) for outcome in outcomes] == [False, False, False, False, True] * 3
    assert len(scene.first.calls) == 15


@every_face
async def test_half_of_twenty_failures_open_the_circuit_without_five_in_a_row(scene: Scene, face: str) -> None:
    """Section 2: or half of at least 20 in 30 s."""
    turns = itertools.cycle([healthy, refusing(503)])

    async def every_other(call: Call) -> None:
        await next(turns)(call)

    await scene.open(every_other, **ONCE)
    for number, outcome in enumerate(await asked_in_vain(scene, face, 26)):
        assert outcome.is_from(FIRST if number % 2 == 0 and number < 20 else SECOND)
    assert 20 <= len(scene.first.calls) <= 21


@every_face
async def test_where_every_circuit_is_open_the_answer_comes_at_once(scene: Scene, face: str) -> None:
    """Section 2: all open: ``upstream_unreachable`` at once, and no endpoint is asked."""
    scene.serves_afterwards = False
    await scene.open(refusing(503), refusing(503), **ONCE)
    await asked_in_vain(scene, face, 5)
    for outcome in await asked_in_vain(scene, face, 3):
        assert outcome.code == "upstream_unreachable"
        assert outcome.refused is (face != "browser")
        if outcome.refused:
            assert 500 <= outcome.status < 600
        assert outcome.seconds < 1
    assert [len(scene.first.calls), len(scene.second.calls)] == [5, 5]


@every_face
@pytest.mark.parametrize("failure", ["503", "reset"])
async def test_many_clients_of_a_dead_endpoint_become_a_trickle(scene: Scene, face: str, failure: str) -> None:
    """Section 2 and fault U49: those who came together ask once each, their further tries and all others are spared."""
    await scene.open(FAILURES[failure])
    crowd = 40
    together = await asyncio.gather(*(scene.ask(face) for _ in range(crowd)))
    assert all(outcome.is_from(SECOND) for outcome in together)
    amplified = len(scene.first.calls)
    assert amplified <= crowd + 10, "not three tries each"
    for outcome in await asyncio.gather(*(scene.ask(face) for _ in range(crowd))):
        assert outcome.is_from(SECOND)
        assert outcome.seconds < BOUND
    assert len(scene.first.calls) == amplified


@every_face
async def test_the_open_circuit_of_one_endpoint_is_not_that_of_the_others(scene: Scene, face: str) -> None:
    """Section 2: each upstream has its own."""
    await scene.open(refusing(503), refusing(503), healthy, **ONCE)
    for outcome in await asked_in_vain(scene, face, 7):
        assert outcome.is_from(THIRD)
    assert [len(upstream.calls) for upstream in scene.upstreams] == [5, 5, 7]


async def test_every_face_goes_by_the_same_circuit(scene: Scene) -> None:
    """Section 2: it is the endpoint's, not the face's."""
    await scene.open(refusing(503), **ONCE)
    for face in itertools.islice(itertools.cycle(FACES), 9):
        assert (await scene.ask(face)).is_from(SECOND)
    assert len(scene.first.calls) == 5


async def test_two_models_of_one_endpoint_have_each_a_circuit_of_their_own(scene: Scene) -> None:
    """Section 2: an endpoint that has lost one model still serves its others."""

    async def without_its_first_model(call: Call) -> None:
        await (refusing(503) if call.json["model"] == FIRST.model else healthy)(call)

    scene.second.port = scene.first.port  # the fallback is another model of the same endpoint
    await scene.open(without_its_first_model, **ONCE)
    for face in itertools.islice(itertools.cycle(FACES), 9):
        assert (await scene.ask(face)).is_from(SECOND)
    asked = [call.json["model"] for call in scene.first.calls]
    assert [asked.count(FIRST.model), asked.count(SECOND.model)] == [5, 9]


# ---- All at once


@by_both_paths
@pytest.mark.parametrize("seed", range(3))
async def test_any_mix_of_faults_ends_each_answer_once_and_in_time(scene: Scene, seed: int) -> None:
    """Fault U47: whatever fails, hedges, is left out or leaves at the same time, the verdict of the scene holds."""
    chance = random.Random(seed)
    faults = [
        *[healthy] * 30,
        *[breaking(how, words) for how in ("close", "reset", "end", "hang") for words in (0, 3)],
        *[refusing(status) for status in (401, 404, 429, 500, 503)],
        refusing(400, "context_length_exceeded"),
        refusing(429, Retry_After="1"),
        resetting,
        silent,
        mumbling("comment", words=0),
        with_garbage(1),
        with_garbage(11),
    ]

    async def any_of_them(call: Call) -> None:
        await asyncio.sleep(chance.choice([0, 0, 0.02, 0.1]))
        await chance.choice(faults)(call)

    await scene.open(
        *[any_of_them] * 3,
        SLUICE_HEDGE_AFTER="0.05",
        SLUICE_FIRST_TOKEN_TIMEOUT="0.3",
        SLUICE_IDLE_TIMEOUT="0.3",
        SLUICE_RETRIES="1",
    )
    scene.serves_afterwards = False  # the circuits may be in any state

    async def ask_and_leave(face: str) -> None:
        async with await scene.connect() as client:
            await client.send(raw_request() if face == "browser" else posted(face))
            await asyncio.sleep(chance.uniform(0, 0.3))

    async def one(face: str) -> None:
        await asyncio.sleep(chance.uniform(0, 3))
        if chance.random() < 0.1:
            await ask_and_leave(face)
        else:
            assert (await scene.ask(face)).seconds < BOUND

    await asyncio.gather(*(one(face) for face in FACES * 40))
