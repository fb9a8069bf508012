"""What an upstream can do wrong, and what a browser sees of it: end to end, over real sockets.

The fixture ``relay`` checks the invariants after each test: nothing left running, one end of every answer, no secret in
the log, no traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.sluice_process import free_port
from tests.sse_client import Answer, open_stream
from tests.upstream.conftest import ECHO, KEY, QUESTION, Relay, check_answer, until
from tests.upstream_sim import Call, Script, ScriptedUpstream, answer, chunk

ERROR = {"message": f"Incorrect API key provided: {ECHO}", "type": "invalid_request_error", "param": None, "code": None}


# ---- Scripts


def sse(*events: Any) -> bytes:
    """Events of an upstream; anything but text is sent as JSON."""
    return b"".join(
        b"data: %b\n\n" % (event if isinstance(event, str) else json.dumps(event)).encode() for event in events
    )


def content(text: str) -> dict[str, Any]:
    return chunk({"content": text})


HEL, LO, STOP, DONE = content("Hel"), content("lo"), chunk({}, "stop"), "[DONE]"


def status(code: int, error: Any = ERROR, **headers: str) -> Script:
    async def script(call: Call) -> None:
        await call.refuse(code, error, **headers)

    return script


def body(data: bytes, content_type: str | None = "text/event-stream", **headers: str) -> Script:
    """A 200 whose whole body is ``data``, ended in order."""

    async def script(call: Call) -> None:
        await call.head(200, content_type, **headers)
        await call.write(data)
        await call.end()

    return script


def raw(data: bytes) -> Script:
    """These bytes, head included, and then silence until the relay closes."""

    async def script(call: Call) -> None:
        await call.send(data)
        await call.gone()

    return script


def then(how: str, *events: Any, gap: bool = True, framing: dict[str, str] | None = None) -> Script:
    """A stream of ``events`` and then ``close``, ``reset`` or ``hang``; without ``gap`` in one segment with it."""

    async def script(call: Call) -> None:
        await call.head(200, **framing or {})
        await call.write(sse(*events))
        if gap:
            await asyncio.sleep(0.05)
        if how == "hang":
            await call.gone()
        else:
            getattr(call, how)()

    return script


def repeating(data: bytes, every: float, *events: Any) -> Script:
    """A stream of ``events``, and then ``data`` every so many seconds until the relay has had enough of it."""

    async def script(call: Call) -> None:
        await call.head()
        await call.write(sse(*events))
        while call.open:
            await call.write(data)
            await asyncio.sleep(every)

    return script


def in_turn(*scripts: Script) -> Script:
    """Each call gets the next script, and the last one for ever."""
    left = list(scripts)

    async def script(call: Call) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(call)

    return script


def code_of(answer: Answer) -> Any:
    return answer.error and answer.error["error"]


@contextlib.contextmanager
def took(at_least: float = 0.0, at_most: float = 4.0) -> Iterator[None]:
    """Seconds that the block may take; the upper bound leaves room for a loaded machine."""
    began_at = time.monotonic()
    yield
    assert at_least <= time.monotonic() - began_at <= at_most


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of whether a further try follows, not of when."""
    monkeypatch.setattr("server.upstream.retry._FIRST_DELAY", 0.02)


# ---- U1 to U6: the connection


async def test_a_refused_connection_is_tried_again_twice_with_growing_jittered_pauses(relay: Relay) -> None:
    """U1; SLUICE_RETRIES."""
    result = await relay.ask(LLM_BASE_URL=f"http://127.0.0.1:{free_port()}/v1")
    assert code_of(result) == "upstream_unreachable"
    assert relay.tries == 3
    first, second = relay.pauses
    assert 0.125 <= first <= 0.25 <= second <= 0.5


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The base URL of a port whose backlog is full: a SYN to it is dropped."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


async def test_a_connection_that_does_not_come_about_is_given_up_after_the_connect_timeout(
    relay: Relay, black_hole: str
) -> None:
    """U2; SLUICE_CONNECT_TIMEOUT, for each try."""
    with took(at_least=0.6):
        result = await relay.ask(LLM_BASE_URL=black_hole, SLUICE_CONNECT_TIMEOUT="0.2")
    assert code_of(result) == "upstream_unreachable"
    assert relay.tries == 3


async def test_all_tries_together_take_no_longer_than_the_first_token_may(relay: Relay, black_hole: str) -> None:
    """U2."""
    with took(at_most=2.5):
        result = await relay.ask(
            LLM_BASE_URL=black_hole, SLUICE_CONNECT_TIMEOUT="0.3", SLUICE_FIRST_TOKEN_TIMEOUT="0.5", SLUICE_RETRIES="10"
        )
    assert code_of(result) in {"upstream_unreachable", "upstream_timeout"}


async def test_a_name_without_an_address_is_unreachable(relay: Relay) -> None:
    """U3; .invalid never resolves (RFC 6761 §6.4)."""
    result = await relay.ask(LLM_BASE_URL="http://nothing.invalid/v1", SLUICE_CONNECT_TIMEOUT="2")
    assert code_of(result) == "upstream_unreachable"
    assert relay.tries == 3


async def test_a_name_server_that_hangs_costs_the_connect_timeout_and_stops_no_one_else(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U3: look-ups run in threads that other work needs too."""
    server = await relay.open(
        LLM_BASE_URL="http://slow.example/v1",
        SLUICE_CONNECT_TIMEOUT="0.5",
        SLUICE_RETRIES="0",
        SLUICE_MAX_STREAMS_PER_CLIENT="50",
    )
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(20) and [])
    try:
        asking = [asyncio.create_task(relay.ask()) for _ in range(20)]
        await asyncio.sleep(0.1)
        with took():
            async with aiohttp.ClientSession() as session, session.get(f"{server.url}/") as page:
                assert page.status == 200
            results = await asyncio.gather(*asking)
        assert {code_of(result) for result in results} == {"upstream_unreachable"}
    finally:
        released.set()


@contextlib.asynccontextmanager
async def listening(
    greet: Callable[[asyncio.StreamWriter], None], tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[int, list[int]]]:
    """A server that treats each connection with ``greet`` and closes it: its port, and a list with an item for each."""
    connections: list[int] = []

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        greet(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1], connections
    finally:
        server.close()


async def test_a_certificate_that_nobody_vouches_for_is_not_tried_again(
    relay: Relay, tmp_path: Path, need: Callable[[str], str]
) -> None:
    """U4: a further try mends no certificate; and nothing is sent to whoever shows it."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    command = [need("openssl"), *make.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)  # noqa: ASYNC221 (some milliseconds)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    async with listening(lambda _: None, context) as (port, connections):
        result = await relay.ask(LLM_BASE_URL=f"https://127.0.0.1:{port}/v1")
    assert code_of(result) == "upstream_unreachable"
    assert relay.tries == 1
    assert connections == [], "no connection got past its handshake"


async def test_an_endpoint_that_speaks_no_tls_is_not_tried_again(relay: Relay) -> None:
    """U4."""
    refusal = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
    async with listening(lambda writer: writer.write(refusal)) as (port, connections):
        result = await relay.ask(LLM_BASE_URL=f"https://127.0.0.1:{port}/v1")
    assert code_of(result) == "upstream_unreachable"
    assert len(connections) == relay.tries == 1


async def test_a_connection_closed_at_once_is_tried_again(relay: Relay) -> None:
    """U5."""
    async with listening(lambda _: None) as (port, connections):
        result = await relay.ask(LLM_BASE_URL=f"http://127.0.0.1:{port}/v1")
    assert code_of(result) == "upstream_unreachable"
    assert len(connections) == relay.tries == 3


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_request_that_gets_no_answer_at_all_is_sent_again(relay: Relay, how: str) -> None:
    """U5."""

    async def script(call: Call) -> None:
        getattr(call, how)()

    result = await relay.ask(script)
    assert code_of(result) == "upstream_unreachable"
    assert len(relay.upstream.calls) == relay.tries == 3


async def test_a_further_try_that_succeeds_is_all_that_the_client_sees(relay: Relay) -> None:
    """U5."""
    result = await relay.ask(in_turn(status(503), then("reset"), answer()))
    assert result.text == "Hello"
    assert result.complete
    assert len(relay.upstream.calls) == 3


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_stale_pooled_connection_is_replaced_unseen(relay: Relay, how: str) -> None:
    """U6: one fresh connection, at once, and not counted: SLUICE_RETRIES=0 does not forbid it."""

    async def stale(call: Call) -> None:
        getattr(call, how)()

    await relay.ask(in_turn(answer(), stale, answer()), SLUICE_RETRIES="0")
    result = await relay.ask()
    assert result.text == "Hello"
    assert len(relay.upstream.calls) == 3
    assert relay.upstream.connections == 2, "the second request went out on the first connection"
    assert relay.pauses == []


async def test_a_fresh_connection_that_is_dropped_has_no_free_try(relay: Relay) -> None:
    """U6: only what was pooled can be stale."""

    async def drop(call: Call) -> None:
        call.close()

    assert code_of(await relay.ask(drop, SLUICE_RETRIES="0")) == "upstream_unreachable"
    assert len(relay.upstream.calls) == 1


# ---- U7 to U12: the status


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("code", "calls", "error"),
    [
        (400, 1, "upstream_rejected"),
        (401, 1, "upstream_rejected"),
        (403, 1, "upstream_rejected"),
        (404, 1, "upstream_rejected"),
        (409, 1, "upstream_rejected"),
        (418, 1, "upstream_rejected"),
        (422, 1, "upstream_rejected"),
        (408, 3, "upstream_rejected"),
        (429, 3, "upstream_rate_limited"),
        (500, 3, "upstream_error"),
        (502, 3, "upstream_error"),
        (503, 3, "upstream_error"),
        (504, 3, "upstream_error"),
        (529, 1, "upstream_error"),
        (599, 1, "upstream_error"),
        (206, 1, "upstream_invalid"),
    ],
)
async def test_a_status_decides_on_further_tries_and_on_the_error(
    relay: Relay, code: int, calls: int, error: str
) -> None:
    """U7, U8, U10, U11, U13; SLUICE_RETRIES lists what is tried again."""
    result = await relay.ask(status(code))
    assert code_of(result) == error
    assert result.events[-1].number == 1, "after the start event nothing but the error"
    assert len(relay.upstream.calls) == calls


async def test_retry_after_is_waited_for(relay: Relay) -> None:
    """U9."""
    with took(at_least=1.0):
        result = await relay.ask(in_turn(status(429, Retry_After="1"), answer()))
    assert result.text == "Hello"


async def test_retry_after_may_be_a_date(relay: Relay) -> None:
    """U9; RFC 9110 §10.2.3."""
    when = formatdate(time.time() + 2, usegmt=True)  # whole seconds: between one and two from now
    with took(at_least=0.8, at_most=6):
        result = await relay.ask(in_turn(status(503, Retry_After=when), answer()))
    assert result.text == "Hello"


@pytest.mark.parametrize("value", ["120", "Fri, 31 Dec 2999 23:59:59 GMT", "99999999999999999999"])
async def test_a_retry_after_beyond_the_first_token_time_ends_the_answer_at_once(relay: Relay, value: str) -> None:
    """U9."""
    with took(at_most=2):
        result = await relay.ask(status(429, Retry_After=value))
    assert code_of(result) == "upstream_rate_limited"
    assert len(relay.upstream.calls) == 1


@pytest.mark.parametrize("value", ["soon", "-5", "1e9", "", "1.5.2", formatdate(0, usegmt=True)])
async def test_a_retry_after_that_is_garbage_or_past_counts_as_absent(relay: Relay, value: str) -> None:
    """U9."""
    result = await relay.ask(in_turn(status(429, Retry_After=value), answer()))
    assert result.text == "Hello"
    assert relay.pauses[0] <= 0.25


async def test_two_retry_after_headers_break_nothing(relay: Relay) -> None:
    """U9."""
    head = b"HTTP/1.1 429 X\r\nContent-Length: 0\r\nRetry-After: 0\r\nRetry-After: 0\r\n\r\n"

    async def script(call: Call) -> None:
        await call.send(head)

    assert (await relay.ask(in_turn(script, answer()))).text == "Hello"


def _long_error() -> bytes:
    return json.dumps({"error": ERROR | {"message": ECHO * 300_000}}).encode()


@pytest.mark.parametrize(
    "answered",
    [
        pytest.param(b"Content-Type: text/html\r\nContent-Length: 20\r\n\r\n" + ECHO.encode(), id="html"),
        pytest.param(b"Content-Type: application/json\r\nContent-Length: 6000000\r\n\r\n" + _long_error(), id="5 MB"),
        pytest.param(b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n", id="a body that never comes"),
        pytest.param(b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\nno gzip!!", id="no gzip"),
        pytest.param(b"\r\n", id="nothing more"),
    ],
)
async def test_an_error_body_is_not_waited_for(relay: Relay, answered: bytes) -> None:
    """U10: the status has said all, and the body is not for the client."""
    with took(at_most=2):
        result = await relay.ask(raw(b"HTTP/1.1 500 X\r\n" + answered), SLUICE_RETRIES="0")
    assert code_of(result) == "upstream_error"


async def test_no_content_is_no_event_stream(relay: Relay) -> None:
    """U13."""

    async def script(call: Call) -> None:
        await call.send(b"HTTP/1.1 204 No Content\r\n\r\n")

    assert code_of(await relay.ask(script)) == "upstream_invalid"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_a_redirect_is_never_followed(relay: Relay, code: int) -> None:
    """U12: it would carry the prompt, and perhaps the key, to whoever is named there."""
    async with ScriptedUpstream() as other:
        result = await relay.ask(status(code, Location=f"{other.base_url}/chat/completions"))
        assert other.calls == []
    assert code_of(result) == "upstream_invalid"
    assert len(relay.upstream.calls) == 1


@pytest.mark.parametrize("location", ["/v1/chat/completions", "file:///etc/passwd", "", "//", "http://[", "\x7f"])
async def test_where_a_redirect_points_does_not_matter(relay: Relay, location: str) -> None:
    """U12."""
    assert code_of(await relay.ask(status(307, Location=location))) == "upstream_invalid"
    assert len(relay.upstream.calls) == 1


# ---- U13, U14, U22, U23, U46: the head

COMPLETION = {"object": "chat.completion", "choices": [{"index": 0, "message": {"content": ECHO}}]}


@pytest.mark.parametrize(
    ("script", "error"),
    [
        pytest.param(body(json.dumps(COMPLETION).encode(), "application/json"), "upstream_invalid", id="completion"),
        pytest.param(body(b"<html>", "text/html"), "upstream_invalid", id="html"),
        pytest.param(body(sse(HEL, LO, DONE), "text/plain"), "upstream_invalid", id="wrong type, right bytes"),
        pytest.param(body(sse(HEL, LO, DONE), None), "upstream_invalid", id="no type"),
        pytest.param(body(b"", None), "upstream_invalid", id="nothing"),
        pytest.param(body(b"{", "application/json"), "upstream_invalid", id="no JSON"),
        pytest.param(body(b"[" * 70_000, "application/json"), "upstream_invalid", id="deep JSON"),
        pytest.param(body(b'{"error":null}', "application/json"), "upstream_invalid", id="null error"),
        pytest.param(status(200), "upstream_error", id="error object"),
        pytest.param(status(200, ECHO), "upstream_error", id="error text"),
    ],
)
async def test_what_is_no_event_stream_is_never_guessed_at(relay: Relay, script: Script, error: str) -> None:
    """U13, U14: a type that is not text/event-stream ends the answer, whatever its bytes look like."""
    assert code_of(await relay.ask(script)) == error
    assert len(relay.upstream.calls) == 1


@pytest.mark.parametrize("gap", [0.0, 0.05])
async def test_an_error_object_may_end_with_its_connection(relay: Relay, gap: float) -> None:
    """U13: a body without a length is whole when the connection closes."""

    async def script(call: Call) -> None:
        await call.head(200, "application/json", Connection="close")
        await asyncio.sleep(gap)
        await call.write(json.dumps({"error": ERROR}).encode())
        await asyncio.sleep(gap)
        await call.end()

    assert code_of(await relay.ask(script)) == "upstream_error"


@pytest.mark.parametrize("how", ["hang", "close", "reset"])
async def test_a_json_body_that_is_not_whole_is_no_stream_either(relay: Relay, how: str) -> None:
    """U13: it is waited for no longer than 2 s."""

    async def script(call: Call) -> None:
        await call.head(200, "application/json")
        await call.write(b'{"error":')
        await asyncio.sleep(0.05)
        if how == "hang":
            await call.gone()
        else:
            getattr(call, how)()

    assert code_of(await relay.ask(script)) == "upstream_invalid"


async def test_an_endpoint_that_does_not_stream_is_invalid_when_its_answer_comes(relay: Relay) -> None:
    """U46."""

    async def script(call: Call) -> None:
        await asyncio.sleep(0.3)
        await body(json.dumps(COMPLETION).encode(), "application/json")(call)

    with took(at_least=0.3):
        assert code_of(await relay.ask(script)) == "upstream_invalid"


@pytest.mark.parametrize(
    "content_type",
    [
        "text/event-stream;charset=utf-8",
        "TEXT/Event-Stream",
        "text/event-stream; charset=latin-1",
        'text/event-stream; charset="no such thing"',
        " text/event-stream ;",
    ],
)
async def test_an_event_stream_is_utf_8_whatever_its_type_says(relay: Relay, content_type: str) -> None:
    """U14; WHATWG HTML §9.2.5."""
    data = json.dumps(content("中é😀"), ensure_ascii=False)
    assert (await relay.ask(body(sse(data, DONE), content_type))).text == "中é😀"


@pytest.mark.parametrize(
    "before", [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 100]
)
async def test_informational_responses_are_passed_over(relay: Relay, before: bytes) -> None:
    """U22."""

    async def script(call: Call) -> None:
        await call.send(before)
        await answer()(call)

    assert (await relay.ask(script)).text == "Hello"


@pytest.mark.parametrize("count", [1, 10_000])
async def test_trailers_are_dropped(relay: Relay, count: int) -> None:
    """U22."""

    async def script(call: Call) -> None:
        await call.head()
        await call.write(sse(HEL, LO))
        await asyncio.sleep(0.05)
        await call.write(sse(STOP, DONE))
        await call.send(b"0\r\n" + b"X-Trailer: 1\r\n" * count + b"\r\n")

    result = await relay.ask(script)
    assert result.text == "Hello"
    assert result.complete


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(OK + b"X: " + b"a" * 20_000 + b"\r\n\r\n", id="20 kB header"),
        pytest.param(OK + b"X: y\r\n" * 500 + b"\r\n", id="500 headers"),
        pytest.param(OK + b"X: a\0b\r\n\r\n", id="NUL"),
        pytest.param(OK + b"Content-Length: much\r\n\r\n", id="Content-Length"),
        pytest.param(OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", id="both framings"),
        pytest.param(OK + b"no colon\r\n\r\n", id="no header"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="SSH"),
        pytest.param(b"HTTP/1.1 0 X\r\n\r\n", id="status 0"),
        pytest.param(b"HTTP/1.1 999 X\r\n\r\n", id="status 999"),
        pytest.param(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", id="101"),
    ],
)
async def test_what_is_no_http_is_invalid(relay: Relay, head: bytes) -> None:
    """U23; aiohttp's error for it quotes our request, key and all: the fixture looks for it in the log."""
    assert code_of(await relay.ask(raw(head))) == "upstream_invalid"
    assert len(relay.upstream.calls) == 1


# ---- U15 to U18: silence


SILENT = [
    pytest.param(raw(b""), id="no head"),
    pytest.param(raw(b"HTTP/1.1 200 OK\r\nContent-"), id="half a head"),
    pytest.param(raw(b"HTTP/1.1 100 Continue\r\n\r\n"), id="informational only"),
    pytest.param(then("hang"), id="head only"),
    pytest.param(then("hang", chunk({"role": "assistant"}), gap=False), id="role and silence"),
    pytest.param(repeating(b": comment\n\n", 0.02), id="comments"),
    pytest.param(repeating(sse(chunk({"role": "assistant", "content": ""})), 0.02), id="role-only deltas"),
    pytest.param(repeating(sse(chunk({"content": ""})), 0.02), id="empty deltas"),
    pytest.param(repeating(sse(chunk()), 0.02), id="no choices"),
    pytest.param(repeating(sse(chunk({"content": None, "refusal": "x"})), 0.02), id="unknown deltas"),
    pytest.param(repeating(b"d", 0.02), id="one endless line"),
]


@pytest.mark.parametrize("script", SILENT)
async def test_only_content_stops_the_first_token_clock(relay: Relay, script: Script) -> None:
    """U15, U16; SLUICE_FIRST_TOKEN_TIMEOUT. A silent upstream is not asked twice."""
    with took(at_least=0.2):
        result = await relay.ask(script, SLUICE_FIRST_TOKEN_TIMEOUT="0.25")
    assert code_of(result) == "upstream_timeout"
    assert result.text == ""
    assert len(relay.upstream.calls) == 1


async def test_tries_end_where_the_next_one_could_not_be_in_time(relay: Relay) -> None:
    """SLUICE_RETRIES: what failed last is told, and not a time-out that was waited for in vain."""
    with took(at_most=2):
        result = await relay.ask(status(503), SLUICE_FIRST_TOKEN_TIMEOUT="0.6", SLUICE_RETRIES="10")
    assert code_of(result) == "upstream_error"
    assert 1 < len(relay.upstream.calls) <= 4


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(then("hang", HEL), id="nothing"),
        pytest.param(repeating(b": comment\n\n", 0.02, HEL), id="comments"),
        pytest.param(repeating(sse(chunk({"content": ""})), 0.02, HEL), id="empty deltas"),
        pytest.param(repeating(sse(chunk(usage={"prompt_tokens": 1, "completion_tokens": 1})), 0.02, HEL), id="usage"),
        pytest.param(repeating(b"d", 0.02, HEL), id="a byte at a time"),
    ],
)
async def test_only_content_pushes_the_idle_clock(relay: Relay, script: Script) -> None:
    """U17; SLUICE_IDLE_TIMEOUT."""
    with took(at_least=0.2):
        result = await relay.ask(script, SLUICE_IDLE_TIMEOUT="0.25")
    assert code_of(result) == "upstream_timeout"
    assert result.text == "Hel"
    assert len(relay.upstream.calls) == 1


@pytest.mark.parametrize(
    "delta",
    [{"content": "x"}, {"reasoning_content": "x"}, {"reasoning": "x"}, {"tool_calls": [{"index": 0}]}],
    ids=lambda delta: next(iter(delta)),
)
async def test_content_reasoning_and_tool_calls_keep_an_answer_alive(relay: Relay, delta: dict[str, Any]) -> None:
    """U17, U34: what counts for both clocks (SLUICE_FIRST_TOKEN_TIMEOUT)."""

    async def script(call: Call) -> None:
        await call.head()
        for _ in range(5):
            await asyncio.sleep(0.15)
            await call.event(chunk(delta))
        await call.finish()
        await call.done()

    limits = {"SLUICE_FIRST_TOKEN_TIMEOUT": "0.6", "SLUICE_IDLE_TIMEOUT": "0.6"}
    assert (await relay.ask(script, **limits)).complete


async def test_an_answer_that_never_ends_is_ended(relay: Relay) -> None:
    """U18; SLUICE_STREAM_TIMEOUT."""
    with took(at_least=0.45):
        result = await relay.ask(repeating(sse(HEL), 0.05), SLUICE_STREAM_TIMEOUT="0.5")
    assert code_of(result) == "stream_timeout"
    assert result.text.startswith("HelHel")


# ---- U19, U20: the end that is none

# A body cut in the chunked framing, one delimited by close, and one shorter than it said.
FRAMINGS: list[dict[str, str]] = [{}, {"Connection": "close"}, {"Content_Length": "1000000"}]
framings = pytest.mark.parametrize("framing", FRAMINGS, ids=["chunked", "until close", "Content-Length"])
breaks = pytest.mark.parametrize("how", ["close", "reset"])
segments = pytest.mark.parametrize(
    ("gap", "filler"),
    [(True, 0), (False, 0), (False, 350)],  # 40 kB: parsed in two turns, and more might not leave before a reset
    ids=["later", "in one segment", "in one segment that is parsed in turns"],
)


@pytest.mark.usefixtures("short_pauses")
@breaks
@framings
async def test_a_stream_that_breaks_before_a_token_is_asked_for_again(
    relay: Relay, how: str, framing: dict[str, str]
) -> None:
    """U19, U20."""
    broken = then(how, chunk({"role": "assistant"}), framing=framing)
    assert (await relay.ask(in_turn(broken, answer()))).text == "Hello"
    assert len(relay.upstream.calls) == 2


@pytest.mark.usefixtures("short_pauses")
@breaks
async def test_a_stream_that_always_breaks_before_a_token_is_incomplete(relay: Relay, how: str) -> None:
    """U19, U20."""
    assert code_of(await relay.ask(then(how))) == "upstream_incomplete"
    assert len(relay.upstream.calls) == 3


@segments
@breaks
@framings
async def test_a_stream_that_breaks_after_tokens_is_incomplete_and_loses_none_of_them(
    relay: Relay, how: str, framing: dict[str, str], gap: bool, filler: int
) -> None:
    """U19, U20: not asked again, as that would say things twice."""
    result = await relay.ask(then(how, HEL, *[chunk({})] * filler, LO, gap=gap, framing=framing))
    assert code_of(result) == "upstream_incomplete"
    assert result.text == "Hello"
    assert len(relay.upstream.calls) == 1


@segments
@pytest.mark.parametrize("how", ["close", "reset", "hang"])
@framings
async def test_a_finish_reason_makes_an_answer_complete_without_done(
    relay: Relay, how: str, framing: dict[str, str], gap: bool, filler: int
) -> None:
    """U19, U20; upstream_incomplete in the contract's section 3."""
    result = await relay.ask(
        then(how, HEL, *[chunk({})] * filler, LO, chunk({}, "length"), gap=gap, framing=framing),
        SLUICE_IDLE_TIMEOUT="0.2",
    )
    assert result.complete
    assert result.text == "Hello"
    assert result.usage["finish_reason"] == "length"


async def test_the_whole_time_running_out_after_a_finish_reason_is_no_failure_either(relay: Relay) -> None:
    """U19."""
    assert (await relay.ask(then("hang", HEL, LO, STOP), SLUICE_STREAM_TIMEOUT="0.4")).complete


@breaks
@framings
async def test_whatever_comes_after_done_changes_nothing(relay: Relay, how: str, framing: dict[str, str]) -> None:
    """U20."""
    result = await relay.ask(then(how, HEL, LO, DONE, framing=framing))
    assert result.complete
    assert result.text == "Hello"


@breaks
@pytest.mark.parametrize(
    "cut", [b'data: {"choices":[{"delta":{"content":"lo', "data: {“".encode()[:-1], b"da", sse(LO)[:-1]]
)
async def test_half_an_event_is_no_event(relay: Relay, how: str, cut: bytes) -> None:
    """U20; WHATWG HTML §9.2.6: an event without its blank line is dropped."""

    async def script(call: Call) -> None:
        await call.head()
        await call.write(sse(HEL) + cut)
        await asyncio.sleep(0.05)
        getattr(call, how)()

    result = await relay.ask(script)
    assert code_of(result) == "upstream_incomplete"
    assert result.tokens == ["Hel"]


@pytest.mark.parametrize("filler", [0, 1000], ids=["short", "longer than one turn of the parser"])
async def test_a_broken_framing_ends_the_answer_at_once(relay: Relay, filler: int) -> None:
    """A chunk size that is no number: aiohttp closes the connection without a word to whoever reads the body."""

    async def script(call: Call) -> None:
        await call.head()
        await asyncio.sleep(0.05)
        await call.send(call.framed(sse(HEL, *[chunk({})] * filler, LO)) + b"no number\r\n")
        await call.gone()

    with took():
        result = await relay.ask(script)
    assert code_of(result) == "upstream_incomplete"
    assert result.text == "Hello"


# ---- U25 to U29, U31: the bytes

EVENTS = [chunk({"role": "assistant", "content": ""}), content("Hel"), content("lo é"), content("中😀"), STOP, DONE]
RECORDED = b": warm-up\n\n" + b"".join(
    b"data: %b\r\n\r\n" % (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)).encode()
    for event in EVENTS
)
RECORDED_TOKENS = ["Hel", "lo é", "中😀"]


def in_pieces(*pieces: bytes) -> Script:
    """The body in these packets, each of its own."""

    async def script(call: Call) -> None:
        await call.head(Connection="close")
        for piece in pieces:
            await call.send(piece)
            await asyncio.sleep(0.0005)
        await call.end()

    return script


async def test_tokens_do_not_depend_on_how_the_network_cuts_the_stream(relay: Relay) -> None:
    """U25, U26: one byte a packet, all in one, and a sample of cuts; every cut is tried in test_client.py."""
    scripts = [in_pieces(*(RECORDED[at : at + 1] for at in range(len(RECORDED)))), in_pieces(RECORDED)]
    scripts += [in_pieces(RECORDED[:cut], RECORDED[cut:]) for cut in range(1, len(RECORDED), 23)]
    for script in scripts:
        result = await relay.ask(script)
        assert result.tokens == RECORDED_TOKENS
        assert result.complete


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b"mixed"])
async def test_all_line_ends_are_line_ends(relay: Relay, bom: bytes, end: bytes) -> None:
    """U27; WHATWG HTML §9.2.5."""
    lines = RECORDED.replace(b"\r\n", b"\n").split(b"\n")[:-1]
    # Mixed in this order no LF follows a CR: it would be the CR's second half, and no line end of its own.
    ends = [b"\n", b"\r\n", b"\r", b"\r"] if end == b"mixed" else [end]
    data = b"".join(line + ends[number % len(ends)] for number, line in enumerate(lines))
    result = await relay.ask(body(bom + data))
    assert result.tokens == RECORDED_TOKENS
    assert result.complete


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(sse(HEL).replace(b"data: ", b"data:"), id="no space"),
        pytest.param(b":\n: c\n:data: x\n" + sse(HEL), id="comments"),
        pytest.param(b"event: message\nid: 7\nretry: 10\nunknown: x\n" + sse(HEL), id="other fields"),
        pytest.param(b"event: delta\n" + sse(HEL), id="another event type"),
        pytest.param(b"id: 1\n\nevent: x\n\nretry: 1\n\n" + sse(HEL), id="blocks without data"),
        pytest.param(b"data\n" + sse(HEL), id="data without a colon"),
        pytest.param(b"data: " + json.dumps(HEL, indent=1).encode().replace(b"\n", b"\ndata: ") + b"\n\n", id="lines"),
        pytest.param(b"\n" * 500 + sse(HEL), id="blank lines"),
    ],
)
async def test_every_form_of_an_event_is_read(relay: Relay, data: bytes) -> None:
    """U28."""
    result = await relay.ask(body(data + sse(LO, STOP, DONE)))
    assert result.tokens == ["Hel", "lo"]


@pytest.mark.parametrize(
    "text",
    [
        "a\u2028b\u2029c\u0085d",
        "\v\f\0\x1b\x7f",
        "line\r\nline\n\nline\r",
        "data: x\n\ndata: [DONE]\n\n",
        '"\\/',
        "\ufeff",
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
async def test_the_text_is_exactly_the_upstreams(relay: Relay, text: str, ascii_only: bool) -> None:
    """U29: nothing that looks like a line end, inside a text, is one."""
    event = json.dumps(content(text), ensure_ascii=ascii_only)
    assert (await relay.ask(body(sse(event, DONE)))).tokens == [text]


async def test_a_character_split_over_two_deltas_stays_two_halves(relay: Relay) -> None:
    """Contract, section 3: exactly the same text, never merged."""
    result = await relay.ask(body(sse(content("\ud83d"), content("\ude00"), DONE)))
    assert result.tokens == ["\ud83d", "\ude00"]


async def test_invalid_utf_8_becomes_replacement_characters(relay: Relay) -> None:
    """U31."""
    event = sse(content("a?b")).replace(b"?", b"\xff")
    assert (await relay.ask(body(event + sse(LO, DONE)))).tokens == ["a\ufffdb", "lo"]


# ---- U32 to U35: the events


@pytest.mark.parametrize("malformed", ["{", ECHO, '"text"', "null", "[]", "1", "", "[done]", " [DONE] ", "{'a': 1}"])
async def test_a_malformed_event_is_skipped(relay: Relay, malformed: str) -> None:
    """U32, U42."""
    result = await relay.ask(body(sse(HEL, malformed, LO, DONE)))
    assert result.tokens == ["Hel", "lo"]
    assert result.complete


@pytest.mark.parametrize(("count", "error"), [(10, None), (11, "upstream_invalid")])
async def test_ten_malformed_events_are_skipped_and_the_eleventh_ends_the_answer(
    relay: Relay, count: int, error: str | None
) -> None:
    """U32."""
    result = await relay.ask(body(sse(HEL, *[ECHO] * count, LO, DONE)))
    assert code_of(result) == error
    assert result.text == ("Hel" if error else "Hello")


ODD: list[dict[str, Any]] = [
    {},
    {"choices": None},
    {"choices": []},
    {"choices": {}},
    {"choices": "x"},
    {"choices": [None, 1, "x", []]},
    {"choices": [{}]},
    {"choices": [{"index": 0, "delta": None}]},
    {"choices": [{"index": 0, "delta": "x"}]},
    {"choices": [{"index": 0, "delta": {"content": None}}]},
    {"choices": [{"index": 0, "delta": {"content": ""}}]},
    {"choices": [{"index": 0, "delta": {"content": 7}}]},
    {"choices": [{"index": 0, "delta": {"content": [{"type": "text", "text": "x"}]}}]},
    {"choices": [{"index": 1, "delta": {"content": "another choice"}, "finish_reason": "stop"}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": "x", "reasoning": 1, "refusal": "no", "audio": {"data": "x"}}}]},
    {"choices": [{"index": 0, "delta": {}, "logprobs": {"content": [{"token": "x"}]}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": 1}], "usage": "x", "model": 3, "error": None},
    {"usage": [], "model": None, **{f"key{number}": {} for number in range(100)}},
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: json.dumps(odd)[:60])
async def test_a_chunk_of_another_shape_is_no_event_and_no_mistake(relay: Relay, odd: dict[str, Any]) -> None:
    """U33, U34; twelve of them, as more than ten mistakes would end the answer."""
    result = await relay.ask(body(sse(HEL, *[odd] * 12, LO, STOP, DONE)))
    assert result.tokens == ["Hel", "lo"]
    assert [event.type for event in result.events] == ["start", "message", "message", "usage", "message"]
    assert result.usage["finish_reason"] == "stop"


async def test_the_first_choice_is_the_answer_though_there_are_two(relay: Relay) -> None:
    """U33: n is never asked for."""
    both = {"choices": [{"index": 1, "delta": {"content": "no"}}, {"index": 0, "delta": {"content": "yes"}}]}
    assert (await relay.ask(body(sse(both, DONE)))).tokens == ["yes"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_is_an_event_of_its_own(relay: Relay, name: str) -> None:
    """U34; contract, section 3."""
    result = await relay.ask(body(sse(chunk({name: "Hm."}), chunk({name: "So:", "content": "Hel"}), LO, DONE)))
    assert result.reasoning == "Hm.So:"
    assert result.tokens == ["Hel", "lo"]
    assert result.usage["tokens"] == 2, "token events only"


ERRORS = [
    pytest.param(sse({"error": ERROR}), id="error object"),
    pytest.param(sse({"error": ECHO}), id="error text"),
    pytest.param(sse({"error": {}}), id="empty object"),
    pytest.param(sse({"error": ERROR | {"code": "context_length_exceeded"}, "choices": []}), id="with choices"),
    pytest.param(b"event: error\n" + sse({"error": ERROR}), id="event: error"),
    pytest.param(b"event: error\n" + sse({"message": ECHO}), id="event: error without an error object"),
    pytest.param(b"event: error\n" + sse(ECHO), id="event: error with text"),
]


@pytest.mark.parametrize("error", ERRORS)
async def test_an_error_in_the_stream_ends_the_answer_in_our_words(relay: Relay, error: bytes) -> None:
    """U35; what stands behind the error is no part of the answer."""
    result = await relay.ask(body(sse(HEL) + error + sse(LO, DONE)))
    assert code_of(result) == "upstream_error"
    assert result.text == "Hel"
    assert len(relay.upstream.calls) == 1


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    "fields",
    [
        {"code": 429},
        {"code": "429"},
        {"code": 503},
        {"type": "server_error"},
        {"type": "tokens", "code": "rate_limit_exceeded"},
        {"type": "overloaded_error"},
    ],
    ids=str,
)
@pytest.mark.parametrize("streamed", [True, False])
async def test_an_error_before_the_first_token_is_tried_again_by_its_class(
    relay: Relay, fields: dict[str, Any], streamed: bool
) -> None:
    """U35: as the same failure would be as a status."""
    error = ERROR | fields
    failed = body(sse(chunk({"role": "assistant"}), {"error": error})) if streamed else status(200, error)
    assert (await relay.ask(in_turn(failed, answer()))).text == "Hello"


@pytest.mark.parametrize("fields", [{}, {"code": 400}, {"code": True}, {"code": [429]}, {"code": "no number"}], ids=str)
async def test_an_error_that_names_no_passing_trouble_is_not_tried_again(relay: Relay, fields: dict[str, Any]) -> None:
    """U35."""
    assert code_of(await relay.ask(body(sse({"error": ERROR | fields})))) == "upstream_error"
    assert len(relay.upstream.calls) == 1


# ---- U36 to U40: too much


@contextlib.contextmanager
def using_at_most(limit: int) -> Iterator[None]:
    """Bytes that the whole process, the upstream's side included, may hold more than before, at any time."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        assert tracemalloc.get_traced_memory()[1] - before <= limit
    finally:
        tracemalloc.stop()


def flooding(*pieces: bytes, first: bytes = b"", seconds: float = 10.0) -> Script:
    """``pieces`` over and over, as fast as they are taken, until the relay closes (or the time is up)."""

    async def script(call: Call) -> None:
        await call.head()
        await call.write(first)
        deadline = call.began_at + seconds
        while call.open and asyncio.get_running_loop().time() < deadline:
            for piece in pieces:
                await call.write(piece)
                await asyncio.sleep(0)
        assert not call.open, "the relay took all of the flood"

    return script


@pytest.mark.parametrize("start", [b"data: ", b": a comment ", b"nonsense", b'data: {"choices":[{"delta":{"content":"'])
async def test_an_endless_line_is_given_up_at_the_bound(relay: Relay, start: bytes) -> None:
    """U36: 1 MiB, and the rest is not waited for."""
    with took(), using_at_most(8 << 20):
        result = await relay.ask(flooding(b"x" * 60_000, first=sse(HEL) + start))
    assert code_of(result) == "upstream_invalid"
    assert result.text == "Hel"


async def test_an_event_of_endless_lines_is_given_up_at_the_bound(relay: Relay) -> None:
    """U36."""
    with took(), using_at_most(8 << 20):
        result = await relay.ask(flooding(b"data: %b\n" % (b"x" * 990) * 60))
    assert code_of(result) == "upstream_invalid"


async def test_tokens_behind_many_comments_are_found(relay: Relay) -> None:
    """U38."""

    async def script(call: Call) -> None:
        await call.head()
        for _ in range(100):
            await call.write(b": comment\n\n" * 1_000)
        await answer_body(call)

    async def answer_body(call: Call) -> None:
        await call.write(sse(HEL, LO, STOP, DONE))
        await call.end()

    with took(at_most=8):
        assert (await relay.ask(script)).text == "Hello"


async def test_comments_for_ever_at_full_speed_end_with_the_first_token_time(relay: Relay) -> None:
    """U38."""
    with took(at_most=6):
        result = await relay.ask(flooding(b": comment\n\n" * 5_000), SLUICE_FIRST_TOKEN_TIMEOUT="0.5")
    assert code_of(result) == "upstream_timeout"


async def test_a_flood_of_tokens_ends_at_the_bound_and_delays_nobody_else(relay: Relay) -> None:
    """U39, I8; SLUICE_MAX_ANSWER_BYTES."""
    flood = flooding(sse(content("x")) * 500)
    steady = answer(["t"] * 50, gap=0.02)

    async def script(call: Call) -> None:
        await (flood if len(relay.upstream.calls) > 1 else steady)(call)

    server = await relay.open(script)
    async with open_stream(server.url, QUESTION) as beside:
        await beside.token()
        with took(at_most=10):
            flooded = await relay_flood(relay, server.url)
        await beside.read_all()
    check_answer(beside.answer)
    assert code_of(flooded) == "answer_too_large"
    assert len(flooded.tokens) > 5_000
    assert len(flooded.raw) <= (1 << 20) + 500
    assert beside.answer.tokens == ["t"] * 50
    gaps = [
        later - earlier for earlier, later in zip(beside.answer.arrived_at, beside.answer.arrived_at[1:], strict=False)
    ]
    assert sorted(gaps)[-5] < 0.25, "inter-token latency beside a flood"


async def relay_flood(relay: Relay, url: str) -> Answer:
    async with open_stream(url, QUESTION) as stream:
        await stream.read_all()
    check_answer(stream.answer)
    return stream.answer


@pytest.mark.parametrize(
    ("size", "bound", "error"),
    [(900_000, 1 << 20, None), (100_000, 65_536, "answer_too_large"), (1 << 20, 1 << 20, "upstream_invalid")],
)
async def test_one_huge_delta_is_one_token_or_too_large(relay: Relay, size: int, bound: int, error: str | None) -> None:
    """U40; SLUICE_MAX_ANSWER_BYTES, and 1 MiB for one event of the upstream's."""
    result = await relay.ask(body(sse(content("x" * size), STOP, DONE)), SLUICE_MAX_ANSWER_BYTES=str(bound))
    assert code_of(result) == error
    assert [len(token) for token in result.tokens] == ([] if error else [size])


# ---- U41: content encodings that nobody asked for


@pytest.mark.parametrize(("encoding", "wbits"), [("gzip", 31), ("GZIP", 31), ("deflate", 15), ("deflate", -15)])
async def test_a_compressed_stream_is_relayed_as_it_is_flushed(relay: Relay, encoding: str, wbits: int) -> None:
    """U41."""
    compressor = zlib.compressobj(wbits=wbits)

    def flushed(data: bytes) -> bytes:
        return compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)

    seen = asyncio.Event()

    async def script(call: Call) -> None:
        assert call.headers["Accept-Encoding"] == "identity"
        await call.head(Content_Encoding=encoding)
        await call.write(flushed(sse(HEL)))
        await seen.wait()
        await call.write(flushed(sse(LO, STOP, DONE)) + compressor.flush())
        await call.end()

    server = await relay.open(script)
    async with asyncio.timeout(5), open_stream(server.url, QUESTION) as stream:
        assert await stream.token() == "Hel"
        seen.set()
        await stream.read_all()
    assert stream.answer.text == "Hello"
    assert stream.answer.complete


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "x-unknown", "gzip, gzip", "none"])
async def test_an_unknown_content_encoding_is_invalid(relay: Relay, encoding: str) -> None:
    """U41."""
    assert code_of(await relay.ask(body(sse(HEL, DONE), Content_Encoding=encoding))) == "upstream_invalid"
    assert len(relay.upstream.calls) == 1


async def test_corrupt_gzip_is_invalid_and_what_came_before_is_not_lost(relay: Relay) -> None:
    """U41."""
    compressor = zlib.compressobj(wbits=31)

    async def script(call: Call) -> None:
        await call.head(Content_Encoding="gzip")
        await call.write(compressor.compress(sse(HEL)) + compressor.flush(zlib.Z_SYNC_FLUSH))
        await asyncio.sleep(0.05)
        await call.write(b"\xff" * 100)
        await call.gone()

    result = await relay.ask(script)
    assert code_of(result) == "upstream_invalid"
    assert result.text == "Hel"


async def test_what_is_no_gzip_at_all_is_invalid(relay: Relay) -> None:
    """U41."""
    assert code_of(await relay.ask(body(sse(HEL, DONE), Content_Encoding="gzip"))) == "upstream_invalid"


async def test_gzip_members_are_one_stream(relay: Relay) -> None:
    """U41; RFC 1952 §2.2."""
    data = gzip.compress(sse(content("x"))) * 100 + gzip.compress(sse(STOP, DONE))
    assert (await relay.ask(body(data, Content_Encoding="gzip"))).text == "x" * 100


async def test_thousands_of_gzip_members_in_one_packet_are_too_much(relay: Relay) -> None:
    """U41: each costs a decompressor, and nobody writes such a stream."""
    data = gzip.compress(sse(content("x"))) * 2_000 + gzip.compress(sse(STOP, DONE))
    assert code_of(await relay.ask(body(data, Content_Encoding="gzip"))) == "upstream_invalid"


async def test_a_gzip_bomb_goes_off_at_the_event_bound(relay: Relay) -> None:
    """U41: 50 MB in 48 kB."""
    bomb = gzip.compress(sse(HEL) + b"data: " + bytes(50_000_000), 6)
    with took(at_most=8), using_at_most(16 << 20):
        result = await relay.ask(body(bomb, Content_Encoding="gzip"))
    assert code_of(result) == "upstream_invalid"


# ---- U42 to U44: the end


@pytest.mark.parametrize(
    "behind",
    [b"", sse(DONE), sse(LO), sse({"error": ERROR}), b"data: half", b": x\n" * 20_000],
    ids=["nothing", "[DONE]", "a token", "an error", "half an event", "60 kB"],
)
async def test_the_first_done_ends_the_answer_and_the_connection_is_used_again(relay: Relay, behind: bytes) -> None:
    """U42: what little follows is read and dropped."""
    for _ in range(3):
        result = await relay.ask(body(sse(HEL, STOP, DONE) + behind))
        assert result.tokens == ["Hel"]
        assert result.complete
    assert relay.upstream.connections == 1


async def test_done_may_be_all(relay: Relay) -> None:
    """U42."""
    result = await relay.ask(body(sse(DONE)))
    assert result.complete
    assert result.usage["tokens"] == 0
    assert result.usage["finish_reason"] is None
    assert result.usage["ttft_ms"] is None


@pytest.mark.parametrize("script", [then("hang", HEL, STOP, DONE), flooding(sse(LO) * 100, first=sse(HEL, STOP, DONE))])
async def test_a_body_that_goes_on_after_done_is_cut_soon_and_keeps_nobody_waiting(
    relay: Relay, script: Script
) -> None:
    """U42."""
    with took(at_most=2):
        result = await relay.ask(script)
    assert result.tokens == ["Hel"]
    assert result.complete
    await asyncio.sleep(0.2)
    assert relay.upstream.open_calls == []


@pytest.mark.parametrize("reason", ["length", "content_filter", "tool_calls", "another_reason"])
async def test_a_finish_reason_is_reported_as_it_is(relay: Relay, reason: str) -> None:
    """U43."""
    assert (await relay.ask(answer(finish=reason))).usage["finish_reason"] == reason


async def test_content_after_a_finish_reason_is_relayed_until_done(relay: Relay) -> None:
    """U43."""
    result = await relay.ask(body(sse(HEL, STOP, LO, chunk({}, "length"), content("!"), DONE)))
    assert result.text == "Hello!"
    assert result.usage["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 2}, (3, 2)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (0, 0)),
        ({"prompt_tokens": -1, "completion_tokens": 1.5}, (None, None)),
        ({"prompt_tokens": "3", "completion_tokens": True}, (None, None)),
        ({"prompt_tokens": 10**30, "completion_tokens": None}, (None, None)),
        ({}, (None, None)),
        (None, (None, None)),
        ("many", (None, None)),
    ],
    ids=str,
)
async def test_usage_is_a_count_or_null(relay: Relay, usage: Any, expected: tuple[int | None, int | None]) -> None:
    """U44; contract, section 3."""
    result = await relay.ask(body(sse(HEL, LO, STOP, chunk(usage=usage), DONE)))
    assert (result.usage["prompt_tokens"], result.usage["completion_tokens"]) == expected
    assert result.usage["tokens"] == 2
    assert result.usage["model"] == "sim", "the one that answered, not the one that was asked"


async def test_usage_in_every_chunk_counts_once(relay: Relay) -> None:
    """U44: the last one is the sum."""
    events = [
        content(text) | {"usage": {"prompt_tokens": 3, "completion_tokens": n}} for n, text in enumerate("abc", 1)
    ]
    result = await relay.ask(body(sse(*events, STOP, DONE)))
    assert (result.usage["prompt_tokens"], result.usage["completion_tokens"]) == (3, 3)


# ---- Secrets


async def test_the_key_goes_to_the_upstream_and_nowhere_else(relay: Relay) -> None:
    """U7, U23, S10; that it is nowhere else is checked after every test of this module."""
    await relay.ask(answer())
    (call,) = relay.upstream.calls
    assert call.headers["Authorization"] == f"Bearer {KEY}"
    assert call.path == "/v1/chat/completions"
    assert call.json["messages"][-1] == {"role": "user", "content": QUESTION}
    assert call.json["stream"] is True


async def test_nothing_is_left_open_after_many_faults(relay: Relay) -> None:
    """I3: file descriptors and tasks come back to where they were."""
    faults = [
        status(400),
        then("close", HEL),
        then("reset", HEL),
        body(b"", "text/html"),
        raw(b"HTTP/1.1 200\r\nx\r\n\r\n"),
    ]
    await relay.ask(answer(), SLUICE_RETRIES="0")
    before = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
    for fault in faults * 10:
        await relay.ask(fault)
    assert await until(lambda: len(os.listdir("/proc/self/fd")) <= before[0] + 2)
    assert await until(lambda: len(asyncio.all_tasks()) <= before[1] + 2)


@pytest.mark.parametrize("failed", ["usage", "finish_reason"])
async def test_what_a_failed_try_said_is_no_part_of_the_next_ones_answer(relay: Relay, failed: str) -> None:
    """A cut answer never looks complete, and null is what an upstream did not report (contract, section 3)."""

    async def script(call: Call) -> None:
        if len(relay.upstream.calls) > 1 and failed == "usage":
            await answer(["a"], usage=None)(call)
            return
        await call.head()
        if len(relay.upstream.calls) > 1:
            await call.gone()
        elif failed == "usage":
            await call.event(chunk(usage={"prompt_tokens": 111, "completion_tokens": 222}))
            call.reset()
        else:
            await call.finish()
            await call.event({"error": {"message": "x", "code": 500}})

    given = await relay.ask(script, SLUICE_FIRST_TOKEN_TIMEOUT="1.5")
    if failed == "usage":
        assert given.usage is not None
        assert (given.usage["prompt_tokens"], given.usage["completion_tokens"]) == (None, None)
    else:
        assert code_of(given) == "upstream_timeout"
