"""One request to an endpoint: its bytes, its failures, and that it is always closed. Real sockets, no server before."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from email.utils import formatdate
from unittest.mock import Mock

import aiohttp
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.errors import UpstreamFailed
from server.upstream.attempt import AttemptFailed, parse_retry_after
from server.upstream.client import UpstreamClient
from server.upstream.endpoint import Endpoint
from server.wire.chunks import Chunk
from tests.upstream.conftest import KEY, until
from tests.upstream.recording import ASKED, Recording
from tests.upstream_sim import Call, Script, ScriptedUpstream, answer, chunk


@pytest.fixture(params=[True, False], ids=["fast", "usual"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[UpstreamClient]:
    """Both ways of a body: SLUICE_FAST_PATH=auto and off."""
    async with UpstreamClient(connect_timeout=2, direct=request.param) as opened:
        yield opened


class Asked(Recording):
    """One request, and what it handed on."""

    def __init__(self, client: UpstreamClient, upstream: ScriptedUpstream, path: str = "") -> None:
        super().__init__()
        self._client = client
        self._endpoint = Endpoint(upstream.base_url + path, "asked", KEY)

    async def run(self) -> Asked:
        await self._client.ask(self._endpoint, ASKED, self)
        return self

    async def failure(self) -> AttemptFailed:
        with pytest.raises(AttemptFailed) as caught:
            await self.run()
        return caught.value


class Heard(Recording):
    """Tells when something was handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.something = asyncio.Event()

    def take(self, chunks: Sequence[Chunk]) -> None:
        super().take(chunks)
        self.something.set()


# ---- Retry-After


@given(st.one_of(st.none(), st.text(), st.from_regex(r"[A-Z][a-z]{2},? [0-9A-Za-z :+-]{0,30}"), st.dates().map(str)))
@example("Sun, 99 Nov 9999 99:99:99 GMT")
@example("Sun, 06 Nov 0001 00:00:00 +2400")
@example("\u0661")
@example("1" * 5000)
def test_a_retry_after_is_seconds_or_nothing(value: str | None) -> None:
    """Whatever stands in a header, it never raises."""
    seconds = parse_retry_after(value)
    assert seconds is None or seconds >= 0


@pytest.mark.parametrize("value", [None, "", " ", "soon", "-5", "+5", "1e9", "1.5", "٣", "0x10", "1, 2", "Mon"])
def test_what_is_neither_a_number_nor_a_date_is_no_retry_after(value: str | None) -> None:
    """RFC 9110 §10.2.3."""
    assert parse_retry_after(value) is None


@pytest.mark.parametrize(("value", "seconds"), [("0", 0.0), ("7", 7.0), (" 7 ", 7.0), ("007", 7.0)])
def test_a_retry_after_in_seconds(value: str, seconds: float) -> None:
    """RFC 9110 §10.2.3."""
    assert parse_retry_after(value) == seconds


FORMATS = ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"]


@pytest.fixture
def far_from_greenwich() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_from_greenwich")
@pytest.mark.parametrize("form", FORMATS)
def test_all_three_forms_of_a_date_are_read_and_in_utc(form: str) -> None:
    """RFC 9110 §5.6.7; the third names no zone."""
    seconds = parse_retry_after(time.strftime(form, time.gmtime(time.time() + 100)))
    assert seconds is not None
    assert 90 < seconds <= 100


def test_a_date_that_has_passed_asks_for_no_wait() -> None:
    assert parse_retry_after(formatdate(0, usegmt=True)) == 0.0


# ---- The request


@pytest.mark.parametrize("path", ["", "/"])
async def test_what_is_sent(client: UpstreamClient, upstream: ScriptedUpstream, path: str) -> None:
    """Contract, head: POST {LLM_BASE_URL}/chat/completions, with a slash behind the base or without."""
    await Asked(client, upstream, path).run()
    (call,) = upstream.calls
    assert (call.method, call.path) == ("POST", "/v1/chat/completions")
    assert call.body == ASKED.encode("asked")
    assert call.headers["Content-Type"] == "application/json"
    assert call.headers["Accept"] == "text/event-stream"
    assert call.headers["Accept-Encoding"] == "identity", "a compressor holds tokens back"
    assert call.headers["Authorization"] == f"Bearer {KEY}"
    assert "Cookie" not in call.headers


async def test_without_a_key_no_authorization_is_sent(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    await client.ask(Endpoint(upstream.base_url, "asked"), ASKED, Recording())
    assert "Authorization" not in upstream.calls[0].headers


async def test_an_endpoints_cookies_are_not_sent_back(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    """One client's session at the endpoint must not become another's."""

    async def script(call: Call) -> None:
        await call.head(Set_Cookie="session=1; Path=/")
        await call.done()

    upstream.script = script
    endpoint = Endpoint(upstream.base_url.replace("127.0.0.1", "localhost"), "asked")  # an address has no cookies
    for _ in range(2):
        await client.ask(endpoint, ASKED, Recording())
    assert "Cookie" not in upstream.calls[1].headers


def test_the_key_is_not_in_the_endpoints_repr() -> None:
    assert KEY not in repr(Endpoint("http://upstream/v1", "asked", KEY))


async def test_the_key_is_not_in_a_failures_words(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    """The repr of aiohttp's ClientResponseError holds the request's headers."""

    async def script(call: Call) -> None:
        await call.send(b"SSH-2.0-OpenSSH_9.2\r\n")
        await call.gone()

    upstream.script = script
    failed = await Asked(client, upstream).failure()
    assert isinstance(failed.error, UpstreamFailed)
    assert KEY not in repr(failed) + str(failed) + repr(failed.error) + repr(failed.args)


# ---- The body

EVENTS = [chunk({"content": "lo é"}), chunk({"reasoning": "中"}), chunk({"content": "😀"}, "stop"), "[DONE]"]
RECORDED = b"\xef\xbb\xbf: warm-up\r\n\r\n" + b"".join(
    b"id: 1\r\ndata: %b\r\n\r\n" % (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)).encode()
    for event in EVENTS
)
RECORDED_TEXTS = ["lo é", "中", "😀"]


async def test_every_cut_of_a_stream_gives_the_same_tokens(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    """U25: a recorded stream cut at every byte boundary."""
    cuts = iter(range(1, len(RECORDED)))

    async def script(call: Call) -> None:
        cut = next(cuts)
        await call.head(Content_Length=str(len(RECORDED)))
        await call.send(RECORDED[:cut])
        for _ in range(3):  # turns of the loop in which the first piece is read on its own
            await asyncio.sleep(0)
        await call.send(RECORDED[cut:])

    upstream.script = script
    for cut in range(1, len(RECORDED)):
        asked = await Asked(client, upstream).run()
        assert asked.texts == RECORDED_TEXTS, f"cut at {cut}"
        assert asked.done == 1
    assert upstream.connections == 1


async def test_every_place_of_a_break_loses_nothing_that_was_whole(upstream: ScriptedUpstream) -> None:
    """U20: reset, in one segment with the bytes before; a whole event is handed on, half of one is not."""
    step = 7
    cuts = iter(range(1, len(RECORDED), step))

    async def script(call: Call) -> None:
        await call.head()
        await call.write(RECORDED[: next(cuts)])
        call.reset()

    upstream.script = script
    ends = [at for at in range(len(RECORDED)) if RECORDED.startswith(b"\r\n\r\n", at)][1:]
    async with UpstreamClient(connect_timeout=2) as client:
        for cut in range(1, len(RECORDED), step):
            asked = Asked(client, upstream)
            # An event is whole with the CR of its blank line.
            whole = sum(end + 3 <= cut for end in ends)
            if whole >= 3:
                await asked.run()
                assert asked.done == 1, "a finish_reason has come"
            else:
                failed = await asked.failure()
                assert failed.error.code == "upstream_incomplete"
            assert asked.texts == RECORDED_TEXTS[:whole], f"cut at {cut}"


async def test_each_token_is_handed_on_before_the_next_one_comes(
    client: UpstreamClient, upstream: ScriptedUpstream
) -> None:
    """Every token reaches the page the moment it exists."""
    asked = Asked(client, upstream)

    async def script(call: Call) -> None:
        await call.head()
        for count in range(1, 4):
            await call.token("x")
            assert await until(lambda count=count: len(asked.texts) == count)  # type: ignore[misc]
        await call.done()

    upstream.script = script
    await asked.run()
    assert upstream.calls[0].error is None


async def test_a_fast_endpoint_leaves_other_streams_their_turn(
    client: UpstreamClient, upstream: ScriptedUpstream
) -> None:
    """U39: however much comes in one read, it is taken in pieces, and the loop turns between them."""
    turn = 0
    handed_on: list[tuple[int, int]] = []

    class Noting(Recording):
        def take(self, chunks: Sequence[Chunk]) -> None:
            handed_on.append((turn, len(chunks)))

        def take_texts(self, texts: Sequence[bytes], wire: bytes) -> None:
            handed_on.append((turn, len(texts)))

    async def turning() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def script(call: Call) -> None:
        await call.head()
        for _ in range(4):
            await call.write(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n' * 5000)
        await call.done()

    upstream.script = script
    others = asyncio.create_task(turning())
    endpoint = Endpoint(upstream.base_url, "asked")
    await client.ask(endpoint, ASKED, Noting())
    others.cancel()
    # Two, where the last piece of one read meets the first of the next.
    assert max(Counter(turn for turn, _ in handed_on).values()) <= 2
    assert max(count for _, count in handed_on) < 1000


async def test_done_is_told_before_the_connection_is_tidied_up(
    client: UpstreamClient, upstream: ScriptedUpstream
) -> None:
    """U42: nobody waits for the body's end."""

    async def script(call: Call) -> None:
        await call.head()
        await call.event("[DONE]")
        await call.gone()

    upstream.script = script
    asked = Asked(client, upstream)
    task = asyncio.create_task(asked.run())
    assert await until(lambda: asked.done == 1)
    await task
    assert asked.done == 1


async def test_what_a_broken_connection_left_behind_is_given_out() -> None:
    """Pins the private call that server/upstream/body.py makes: each public one raises before it looks."""
    content = aiohttp.StreamReader(Mock(_reading_paused=False), 2**16, loop=asyncio.get_running_loop())
    content.feed_data(b"data: to")
    content.feed_data(b"ken\n\n")
    content.set_exception(aiohttp.ClientPayloadError())
    with pytest.raises(aiohttp.ClientPayloadError):
        await content.readany()
    with pytest.raises(aiohttp.ClientPayloadError):
        content.read_nowait()
    assert content._read_nowait(-1) == b"data: token\n\n"
    assert content._read_nowait(-1) == b""


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_tokens_that_arrive_with_a_break_while_others_are_parsed_are_not_lost(
    client: UpstreamClient, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """U20: the reader holds the break's exception by the time that it is asked again, and the tokens behind it."""
    monkeypatch.setattr("server.upstream.body._FED_AT_ONCE", 64)
    heard = Heard()

    async def script(call: Call) -> None:
        await call.head()
        token, filler = (b"data: %b\n\n" % json.dumps(chunk({"content": text})).encode() for text in ("Hel", ""))
        await call.write(token + filler * 200)
        await heard.something.wait()
        await call.token("lo")
        getattr(call, how)()

    upstream.script = script
    with pytest.raises(AttemptFailed):
        await client.ask(Endpoint(upstream.base_url, "asked"), ASKED, heard)
    assert heard.texts == ["Hel", "lo"]


@pytest.mark.parametrize("turns", range(12))
async def test_a_broken_framing_is_noticed_in_whatever_turn_of_the_parser_it_comes(
    client: UpstreamClient, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """aiohttp closes the connection and says nothing, or raises RuntimeError when it is asked to read on."""
    monkeypatch.setattr("server.upstream.body._FED_AT_ONCE", 64)
    heard = Heard()

    async def script(call: Call) -> None:
        await call.head()
        await call.write(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'.ljust(64, b"\n") + b"\n" * 64 * turns)
        await heard.something.wait()
        await call.send(b"no number\r\n")
        await call.gone()

    upstream.script = script
    with pytest.raises(AttemptFailed) as caught:
        async with asyncio.timeout(5):
            await client.ask(Endpoint(upstream.base_url, "asked"), ASKED, heard)
    assert caught.value.error.code == "upstream_incomplete"


# ---- The connection


async def test_connections_are_used_again(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    for _ in range(20):
        await Asked(client, upstream).run()
    assert upstream.connections == 1


async def test_no_stream_waits_for_another_to_end(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    """Admission bounds the streams; aiohttp's own bound of 100 connections would be a silent wait."""

    async def script(call: Call) -> None:
        if len(upstream.calls) < 120:
            await upstream.called(120)
        await answer()(call)

    upstream.script = script
    async with asyncio.timeout(20):
        done = await asyncio.gather(*[Asked(client, upstream).run() for _ in range(120)])
    assert [asked.texts for asked in done] == [["Hel", "lo"]] * 120


async def test_a_connection_that_lives_long_holds_nothing_of_the_answers_that_it_brought(
    client: UpstreamClient, upstream: ScriptedUpstream
) -> None:
    upstream.script = answer(gap=0.001)  # in pieces, so that there is a body to read
    for _ in range(50):
        await Asked(client, upstream).run()
    gc.collect()
    assert sum(type(thing) is aiohttp.StreamReader for thing in gc.get_objects()) < 10
    assert upstream.connections == 1


async def test_an_idle_connection_that_is_reset_is_nobodys_error(
    client: UpstreamClient, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """It is an everyday event; asyncio would log a traceback for an exception that nobody looked at."""
    await Asked(client, upstream).run()
    upstream.calls[0].reset()
    await asyncio.sleep(0.05)
    await Asked(client, upstream).run()
    gc.collect()
    await asyncio.sleep(0)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_pooled_connection_that_turns_out_dead_is_stale(
    client: UpstreamClient, upstream: ScriptedUpstream, how: str
) -> None:
    """U6; what stays of it is for the route: server/upstream/route.py."""
    await Asked(client, upstream).run()

    async def script(call: Call) -> None:
        getattr(call, how)()

    upstream.script = script
    failed = await Asked(client, upstream).failure()
    assert failed.stale
    assert upstream.connections == 1
    failed = await Asked(client, upstream).failure()
    assert not failed.stale, "a fresh connection cannot be"
    assert upstream.connections == 2


async def test_a_response_that_breaks_on_a_pooled_connection_is_not_stale(
    client: UpstreamClient, upstream: ScriptedUpstream
) -> None:
    """U6: the endpoint has seen the request."""
    await Asked(client, upstream).run()

    async def script(call: Call) -> None:
        await call.head()
        call.close()

    upstream.script = script
    failed = await Asked(client, upstream).failure()
    assert failed.error.code == "upstream_incomplete"
    assert not failed.stale


# ---- Cancellation


async def before_the_head(call: Call) -> None:
    await call.gone()


async def in_the_head(call: Call) -> None:
    await call.send(b"HTTP/1.1 200 OK\r\nContent-")
    await call.gone()


async def before_the_first_token(call: Call) -> None:
    await call.head()
    await call.event(chunk({"role": "assistant"}))
    await call.gone()


async def between_tokens(call: Call) -> None:
    await call.head()
    while call.open:
        await call.token("x")
        await asyncio.sleep(0.01)


async def in_a_flood(call: Call) -> None:
    await call.head()
    flood = call.framed(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n' * 1000)
    while call.open:
        await call.send(flood)
        await asyncio.sleep(0)


async def after_done(call: Call) -> None:
    await call.head()
    await call.event("[DONE]")
    await call.gone()


async def in_a_json_body(call: Call) -> None:
    await call.head(200, "application/json")
    await call.gone()


WINDOWS: list[Script] = [
    before_the_head,
    in_the_head,
    before_the_first_token,
    between_tokens,
    in_a_flood,
    after_done,
    in_a_json_body,
]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.__name__)
async def test_cancelling_closes_the_request_at_once(
    client: UpstreamClient, upstream: ScriptedUpstream, window: Script
) -> None:
    """An answer that nobody wants is not paid for, whenever it is cancelled (section 3; fault B2)."""
    upstream.script = window
    task = asyncio.create_task(Asked(client, upstream).run())
    call = await upstream.called()
    await asyncio.sleep(0.03)
    task.cancel()
    cancelled_at = asyncio.get_running_loop().time()
    await asyncio.wait([task], timeout=2)
    assert task.cancelled()
    async with asyncio.timeout(2):
        await call.gone()
    assert call.gone_at is not None
    assert call.gone_at - cancelled_at < 1


@pytest.mark.parametrize("turns", range(12))
async def test_cancelling_in_any_turn_of_the_loop_leaves_nothing_open(
    client: UpstreamClient, upstream: ScriptedUpstream, turns: int
) -> None:
    """From connecting to the first token: no window in which a request is lost sight of."""
    upstream.script = before_the_first_token
    task = asyncio.create_task(Asked(client, upstream).run())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=2)
    assert task.cancelled()
    assert await until(lambda: upstream.open_calls == [] and not upstream.open_connections)


async def test_an_error_of_the_sinks_closes_the_request_too(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    """An answer that grew too large is read no further."""

    class Full(Exception):
        pass

    class Refusing(Recording):
        def take(self, chunks: Sequence[Chunk]) -> None:
            raise Full

    upstream.script = before_the_first_token
    with pytest.raises(Full):
        await client.ask(Endpoint(upstream.base_url, "asked"), ASKED, Refusing())
    async with asyncio.timeout(2):
        await upstream.calls[0].gone()


async def test_closing_the_client_closes_what_is_pooled(upstream: ScriptedUpstream) -> None:
    async with UpstreamClient(connect_timeout=2) as client:
        await Asked(client, upstream).run()
        assert len(upstream.open_connections) == 1
    assert await until(lambda: not upstream.open_connections)
