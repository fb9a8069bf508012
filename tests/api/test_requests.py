"""What a client may send: questions of every kind, and requests that no browser would make (rows A1 to A14, A25)."""

from __future__ import annotations

import asyncio
import re
from urllib.parse import quote

import pytest

from server.logs import TextFormatter
from tests.api.conftest import Connect, LogLines, Settled
from tests.api.raw_client import ASK, RawClient, request
from tests.conftest import Launch, Serve
from tests.sse_client import ask
from tests.upstream_sim import Call, ScriptedUpstream, answer

BLANK = ["", "+", "%20%0A%E3%80%80", "%09%C2%A0%E2%80%A8"]


# ---- Questions


@pytest.mark.parametrize("query", ["", "?", "?q", "?x=1", "?Q=hi", "?;q=hi", *(f"?q={blank}" for blank in BLANK)])
async def test_a_question_that_is_missing_or_blank_is_refused(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, query: str
) -> None:
    """Row A1: blank after trimming, the ideographic space too."""
    client = await connect(await serve())
    response = await client.ask(request(f"/api/stream{query}"))
    assert (response.status, response.error) == (400, "missing_query")
    assert upstream.calls == []


@pytest.mark.parametrize("character", ["a", "中", "😀", "é"], ids=["ascii", "cjk", "emoji", "combining"])
async def test_a_question_is_counted_in_code_points(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, character: str
) -> None:
    """Row A2: 1000 of any script fit (1000 emoji are 12 kB of request line); one more does not."""
    longest = (character * 1000)[:1000]
    server = await serve()
    client = await connect(server)
    response = await client.ask(request(f"/api/stream?q={quote(longest)}"))
    assert response.status == 200
    assert upstream.calls[0].json["messages"][-1]["content"] == longest
    response = await client.ask(request(f"/api/stream?q={quote(longest + character[0])}"))
    assert (response.status, response.error) == (400, "query_too_long")
    assert len(upstream.calls) == 1


async def test_a_question_is_counted_after_trimming(serve: Serve, upstream: ScriptedUpstream) -> None:
    given = await ask((await serve(SLUICE_MAX_QUERY_CHARS="3")).url, " \n\u3000a c\u2029\t ")
    assert given.complete
    assert upstream.calls[0].json["messages"][-1]["content"] == "a c"


async def test_a_larger_bound_takes_a_longer_request_line(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The longest legal ``q`` works in any script, whatever SLUICE_MAX_QUERY_CHARS makes of "longest"."""
    given = await ask((await serve(SLUICE_MAX_QUERY_CHARS="2000")).url, "😀" * 2000)
    assert given.complete


NOT_TEXT = {
    "a byte that is no UTF-8": "%ff",
    "a bad continuation": "%c3%28",
    "a lone surrogate": "%ed%a0%bd",
    "a surrogate pair as CESU-8": "%ed%a0%bd%ed%b8%80",
    "beyond U+10FFFF": "%f4%90%80%80",
    "a truncated character": "%e2%82",
    "an overlong slash": "%c0%af",
    "NUL": "%00",
    "NUL within": "a%00b",
}


@pytest.mark.parametrize("value", NOT_TEXT.values(), ids=NOT_TEXT.keys())
async def test_a_question_that_is_no_text_is_refused(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, value: str
) -> None:
    """Rows A4, A5: never replaced by U+FFFD, which would be another question."""
    client = await connect(await serve())
    response = await client.ask(request(f"/api/stream?q=a{value}"))
    assert (response.status, response.error) == (400, "invalid_query")
    assert upstream.calls == []


@pytest.mark.parametrize("query", ["q=a&q=b", "q=a&q=a", "q=&q=a", "q=a&%71=b", "q=a&x=1&q"])
async def test_a_question_given_twice_is_refused(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, query: str
) -> None:
    """Row A7: never silently the first."""
    client = await connect(await serve())
    response = await client.ask(request(f"/api/stream?{query}"))
    assert (response.status, response.error) == (400, "invalid_query")
    assert upstream.calls == []


AS_WRITTEN = {
    "%zz": "%zz",
    "%": "%",
    "100%": "100%",
    "a%2": "a%2",
    "%0d%0aX-Evil:1": "X-Evil:1",
    "a%0d%0aX-Evil:1": "a\r\nX-Evil:1",
    "a%0a%0adata:%20x": "a\n\ndata: x",
    "a%E2%80%A8b": "a\u2028b",
    "%E2%80%AEabc": "\u202eabc",
    "e" + "%CC%81" * 999: "e" + "\u0301" * 999,
    "a+b%2Bc": "a b+c",
    "a=b": "a=b",
    "a%26b": "a&b",
    "%EF%BF%BD": "\ufffd",
    "%F4%8F%BF%BF": "\U0010ffff",
    "</script>": "</script>",
    "%7B%22a%22:%22%5C%22%7D": '{"a":"\\"}',
    "a%1B[31m": "a\x1b[31m",
}


@pytest.mark.parametrize(("written", "meant"), AS_WRITTEN.items(), ids=[key[:16] for key in AS_WRITTEN])
async def test_a_question_reaches_the_upstream_exactly(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, written: str, meant: str
) -> None:
    """Rows A5, A8: read as browsers write it; no header, log line or event is split by it."""
    client = await connect(await serve())
    response = await client.ask(request(f"/api/stream?q={written}"))
    assert response.status == 200
    assert "X-Evil" not in response.headers
    assert upstream.calls[0].json["messages"][-1] == {"role": "user", "content": meant}


async def test_other_parameters_are_ignored(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Rows A9, S9: a client never changes whom or what we ask."""
    async with ScriptedUpstream() as evil:
        client = await connect(await serve(SLUICE_SYSTEM_PROMPT=""))
        response = await client.ask(
            request(f"/api/stream?debug=1&base_url={evil.base_url}&q=a&model=gpt-9&max_tokens=9&stream=false")
        )
        assert response.status == 200
        assert evil.connections == 0
    asked = upstream.calls[0].json
    assert (asked["model"], asked["max_tokens"], asked["stream"]) == ("gpt-4o-mini", 800, True)
    assert asked["messages"] == [{"role": "user", "content": "a"}]


# ---- Refusals


async def test_a_refusal_has_a_json_body(serve: Serve, connect: Connect) -> None:
    """``{"error": CODE, "message": TEXT}``, which no cache may keep and no browser may take for a page."""
    client = await connect(await serve())
    response = await client.ask(request("/api/stream"))
    assert response.json.keys() == {"error", "message"}
    assert isinstance(response.json["message"], str)
    assert response.headers["Content-Type"].startswith("application/json")
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "RateLimit" not in response.headers


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
async def test_another_method_is_405(serve: Serve, upstream: ScriptedUpstream, connect: Connect, method: str) -> None:
    """Row A10: with ``Allow``, never a call upstream, and the connection goes on cleanly: no body follows HEAD."""
    client = await connect(await serve())
    await client.send(request(method=method) + ASK)
    response = await client.read_response(to=method)
    assert response.status == 405
    assert "GET" in response.headers["Allow"].split(", ")
    assert "HEAD" not in response.headers["Allow"]
    assert upstream.calls == []
    following = await client.read_response()
    assert (following.status, following.complete) == (200, True)


@pytest.mark.parametrize("target", ["/api/stream?q=hi", "evil.example:443"])
async def test_connect_opens_no_tunnel(serve: Serve, upstream: ScriptedUpstream, connect: Connect, target: str) -> None:
    client = await connect(await serve())
    response = await client.ask(request(target, method="CONNECT"))
    assert response.status in (400, 404, 405)
    assert upstream.connections == 0


@pytest.mark.parametrize(
    "target", ["/api/", "/api/stream/", "/api/stream/x", "//api/stream?q=hi", "/api/../api/stream?q=hi"]
)
async def test_what_is_not_there_is_404(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, target: str
) -> None:
    client = await connect(await serve())
    response = await client.ask(request(target))
    assert (response.status, response.error) == (404, "not_found")
    assert upstream.calls == []


# ---- Requests that are no HTTP

NO_HTTP = {
    "an unknown method": request(method="FOO"),
    "a raw byte in the target": b"GET /api/stream?q=\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "raw UTF-8 in the target": "GET /api/stream?q=é HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
    "a space in the target": b"GET /api/stream?q=a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "a line beyond the limit": request("/api/stream?q=" + "a" * 20_000),
    "200 headers": request("/api/stream?q=hi", *(f"X-{i}: a" for i in range(200))),
    "a header of 9 kB": request("/api/stream?q=hi", "X-A: " + "a" * 9000),
    "Transfer-Encoding and Content-Length": request(
        "/api/stream?q=hi", "Transfer-Encoding: chunked", "Content-Length: 3", body=b"0\r\n\r\n"
    ),
    "two Content-Lengths": request("/api/stream?q=hi", "Content-Length: 3", "Content-Length: 4", body=b"abcd"),
    "Content-Length: +5": request("/api/stream?q=hi", "Content-Length: +5", body=b"abcde"),
    "Content-Length: -1": request("/api/stream?q=hi", "Content-Length: -1"),
    "a chunk size beyond 64 bits": request(
        "/api/stream?q=hi", "Transfer-Encoding: chunked", body=b"1FFFFFFFFFFFFFFFF\r\na"
    ),
    "a chunk size that is no number": request("/api/stream?q=hi", "Transfer-Encoding: chunked", body=b"xyz\r\na"),
    "a chunk that ends with a bare LF": request("/api/stream?q=hi", "Transfer-Encoding: chunked", body=b"0\n\n"),
    "a hexadecimal prefix": request("/api/stream?q=hi", "Transfer-Encoding: chunked", body=b"0x0\r\n\r\n"),
    "Transfer-Encoding in HTTP/1.0": request(
        "/api/stream?q=hi", "Transfer-Encoding: chunked", version="1.0", body=b"0\r\n\r\n"
    ),
    "Transfer-Encoding behind a control character": request(
        "/api/stream?q=hi", "Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"
    ),
    "chunked, but not last": request("/api/stream?q=hi", "Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n"),
    "a space before the colon": request("/api/stream?q=hi", "Content-Length : 5", body=b"hello"),
    "a line end within a header": request("/api/stream?q=hi", "X-A: a\nContent-Length: 5", body=b"hello"),
    "a header without a name": request("/api/stream?q=hi", ": a"),
    "an unknown Transfer-Encoding": request("/api/stream?q=hi", "Transfer-Encoding: gzip", body=b"a"),
    "bare LF": ASK.replace(b"\r\n", b"\n"),
    "a folded header": b"GET /api/stream?q=hi HTTP/1.1\r\nHost: a\r\nX-A: b\r\n c\r\n\r\n",
    "NUL in a header": request("/api/stream?q=hi", "X-A: b\0c"),
    "CR in a header": request("/api/stream?q=hi", "X-A: b\rc"),
    "no Host": b"GET /api/stream?q=hi HTTP/1.1\r\n\r\n",
    "two Hosts": request("/api/stream?q=hi", "Host: a", "Host: b"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + b"\0" * 200,
    "an HTTP version that there is not": request(version="3.0"),
}


@pytest.mark.parametrize("data", NO_HTTP.values(), ids=NO_HTTP.keys())
async def test_what_is_no_http_is_answered_400_and_closed(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, data: bytes
) -> None:
    """Rows A3, A6, A11, A12: nothing behind it is taken for a second request, and nothing is spent."""
    client = await connect(await serve())
    await client.send(data + ASK)
    response = await client.read_response()
    assert response.status in (400, 431)
    rest = await client.read_to_end()
    assert b"HTTP/" not in rest
    assert upstream.calls == []


async def test_headers_that_are_too_large_only_together_are_refused_too(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Row A11: aiohttp bounds each header and their number, which together is a megabyte."""
    client = await connect(await serve())
    await client.send(request("/api/stream?q=hi", *(f"X-{i}: {'a' * 8000}" for i in range(64))))
    response = await client.read_response()
    assert response.status == 400
    assert response.json["error"] == "headers_too_large"
    assert upstream.calls == []


async def test_what_is_no_http_is_no_flood_in_the_log(launch: Launch, upstream: ScriptedUpstream) -> None:
    """Rows A3, A12, I6: any port scanner sends it; at most one line each, no error, no traceback, none of its bytes."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_LOG_LEVEL="debug")
    began_with = len(sluice.lines)
    bad = [data.replace(b"/api/stream?q=", b"/api/stream?q=canary") for data in NO_HTTP.values() if len(data) < 9000]
    for data in bad:
        async with await RawClient.connect(int(sluice.url.rpartition(":")[2])) as client:
            await client.send(data)
            await client.read_to_end()
    sluice.process.terminate()
    await sluice.exited()
    said = sluice.lines[began_with:]
    assert len([line for line in said if "bad_request" in line]) <= len(bad)
    assert not [line for line in said if re.search(r"Traceback|canary|\"(error|warning)\"", line)]


async def test_our_software_is_not_told(serve: Serve, connect: Connect) -> None:
    """Row S23: neither Python's version nor the library's, whoever answers: handler, router or parser."""
    server = await serve()
    for data in (ASK, request("/"), request("/nothing"), request("/api/nothing"), request(method="POST"), b"x\r\n\r\n"):
        client = await connect(server)
        response = await client.ask(data)
        said = response.headers.get("Server", "")
        assert not re.search(r"[0-9]|python|aiohttp", said, re.IGNORECASE), f"{data[:40]!r}: {said}"


# ---- Requests that are odd


@pytest.mark.parametrize("protocol", ["websocket", "h2c", "TLS/1.0"])
async def test_an_upgrade_is_not_made(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled, protocol: str
) -> None:
    """Row A13: an ordinary answer, and what was sent behind the request is not executed before it."""
    spoken = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        await call.token("a")
        await spoken.wait()
        await call.finish()
        await call.done()

    upstream.script = script
    server = await serve()
    client = await connect(server)
    await client.send(request("/api/stream?q=first", f"Upgrade: {protocol}", "Connection: Upgrade") + ASK)
    response = await client.read_head()
    assert response.status == 200
    assert "Upgrade" not in response.headers
    await client.read_until(b'{"token":"a"}')
    assert [call.json["messages"][-1]["content"] for call in upstream.calls] == ["first"]
    spoken.set()
    await client.read_until(b"[DONE]\n\n")
    client.close()
    await settled(server)


async def test_expect_100_continue_is_answered_first(serve: Serve, connect: Connect) -> None:
    """Row A14: a client that asks before it sends its body is told to go on, then gets its answer."""
    client = await connect(await serve())
    await client.send(request("/api/stream?q=hi", "Expect: 100-continue", "Content-Length: 3"))
    assert (await client.read_response()).status == 100
    await client.send(b"abc")
    response = await client.read_response()
    assert (response.status, response.complete) == (200, True)


async def test_another_expectation_is_417(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines
) -> None:
    """Row A14; and it is the client's mistake, not ours: nothing is logged as a failure."""
    client = await connect(await serve())
    response = await client.ask(request("/api/stream?q=hi", "Expect: x"))
    assert response.status == 417
    assert upstream.calls == []
    assert lines.failures == []


@pytest.mark.parametrize("header", ["Connection: keep-alive", "Connection: close", None], ids=str)
async def test_http_1_0_gets_the_whole_answer_and_the_close(serve: Serve, connect: Connect, header: str | None) -> None:
    """Row A25: without chunks only the close tells where the answer ends, whatever the client would like."""
    client = await connect(await serve())
    await client.send(request("/api/stream?q=hi", *([header] if header else []), version="1.0"))
    async with asyncio.timeout(5):
        response = await client.read_response()
    assert response.status == 200
    assert "Transfer-Encoding" not in response.headers
    assert response.headers.get("Connection") != "keep-alive"
    assert response.body.startswith(b"retry: 1000\nevent: start\n")
    assert response.body.endswith(b"data: [DONE]\n\n")
    assert client.at_end


async def test_connection_close_is_obeyed(serve: Serve, connect: Connect) -> None:
    client = await connect(await serve())
    response = await client.ask(request("/api/stream?q=hi", "Connection: close"))
    assert response.complete
    assert await client.read_to_end() == b""


async def test_the_target_may_name_a_host(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """RFC 9112 §3.2.2: the absolute form is served like any other, and goes nowhere else."""
    client = await connect(await serve())
    response = await client.ask(request("http://elsewhere.example/api/stream?q=hi"))
    assert response.status == 200
    assert len(upstream.calls) == 1


# ---- Bodies, which a GET should not have


@pytest.mark.parametrize(
    "data",
    [
        request("/api/stream?q=hi", "Content-Length: 5", body=b"hello"),
        request("/api/stream?q=hi", "Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n"),
        request("/api/stream?q=hi", "Content-Length: 5", "Content-Encoding: gzip", body=b"hello"),
    ],
    ids=["length", "chunked", "an encoding that it has not"],
)
async def test_a_body_is_read_and_dropped(serve: Serve, connect: Connect, data: bytes) -> None:
    client = await connect(await serve())
    for _ in range(2):
        response = await client.ask(data)
        assert (response.status, response.complete) == (200, True)


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (request("/api/stream?q=hi", f"Content-Length: {5 << 20}"), b"x" * 4096),
        (request("/api/stream?q=hi", "Content-Length: 1000000000000"), b""),
        (request("/api/stream?q=hi", "Transfer-Encoding: chunked"), b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    ],
    ids=["5 MiB", "10^12 announced, none sent", "chunks without end"],
)
async def test_a_body_over_the_bound_is_413_or_408(
    serve: Serve,
    upstream: ScriptedUpstream,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    head: bytes,
    body: bytes,
) -> None:
    """Row B17: a body beyond 1 MiB is refused, not read to its end, and no answer is begun for it."""
    monkeypatch.setattr("server.api.body._TIMEOUT", 0.5)
    monkeypatch.setattr("server.main._LINGER", 0.2)
    server = await serve()
    client = await connect(server)
    sender = asyncio.create_task(_send_for_ever(client, head, body))
    response = await client.read_response()
    assert response.status in (408, 413)
    assert response.error in ("request_timeout", "body_too_large")
    assert upstream.calls == []
    await client.read_to_end()
    sender.cancel()
    await asyncio.gather(sender, return_exceptions=True)


async def _send_for_ever(client: RawClient, head: bytes, body: bytes) -> None:
    await client.send(head)
    while body:
        await client.send(body)


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
async def test_a_body_that_does_not_come_in_time_is_408(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, monkeypatch: pytest.MonkeyPatch, framing: str
) -> None:
    """Row B14: "request body not complete after 10 s" (here 0.4): a byte now and then does not buy more time."""
    monkeypatch.setattr("server.api.body._TIMEOUT", 0.4)
    server = await serve(SLUICE_RATE_LIMIT="1/3600")
    client = await connect(server)
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    trickle = asyncio.create_task(client.trickle(request("/api/stream?q=hi", framing)))
    response = await client.read_response()
    assert (response.status, response.error) == (408, "request_timeout")
    assert loop.time() - began_at < 3
    trickle.cancel()
    await asyncio.gather(trickle, return_exceptions=True)
    assert upstream.calls == []
    assert (await ask(server.url)).complete, "a request that was refused has spent the client's token"


async def test_a_chunk_size_of_64_bits_is_bounded_as_any_other(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row A12: it is a legal number, and no memory is set aside for it."""
    monkeypatch.setattr("server.api.body._TIMEOUT", 0.3)
    client = await connect(await serve())
    response = await client.ask(
        request("/api/stream?q=hi", "Transfer-Encoding: chunked", body=b"FFFFFFFFFFFFFFFF\r\nabc")
    )
    assert response.status in (400, 408, 413)
    assert upstream.calls == []


# ---- Pipelining


async def test_pipelined_questions_are_answered_in_order_one_at_a_time(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Row B16: six at once, at most one upstream call at a time."""
    most = 0

    async def script(call: Call) -> None:
        nonlocal most
        most = max(most, len(upstream.open_calls))
        await answer([call.json["messages"][-1]["content"]])(call)

    upstream.script = script
    client = await connect(await serve(SLUICE_SYSTEM_PROMPT=""))
    await client.send(b"".join(request(f"/api/stream?q=n{i}") for i in range(6)))
    for i in range(6):
        response = await client.read_response()
        assert response.complete
        assert f'{{"token":"n{i}"}}'.encode() in response.body
    assert most == 1


# ---- What a log line may hold


async def test_no_request_writes_a_log_line_of_its_own(
    launch: Launch, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Row S15: ESC, line ends, U+2028 and NEL in whatever is logged of a request come out escaped."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_LOG_LEVEL="debug")
    client = await connect(int(sluice.url.rpartition(":")[2]))
    evil = "%0a%0d%1b[31m%c2%85%e2%80%a8%00%n"
    headers = [f"User-Agent: \xa0{evil}", "X-Request-ID: a b", "X-Forwarded-For: \t1.2.3.4 x"]
    await client.ask(request(f"/{evil}", *headers))
    await client.ask(request(f"/api/stream{evil}?q=hi"))
    await client.ask(request("/" + "a" * 5000))
    sluice.process.terminate()
    await sluice.exited()
    assert all(line.startswith("{") and line.endswith("}") for line in sluice.lines)
    assert all(line.isascii() and line.isprintable() for line in sluice.lines)
    paths = [line["path"] for line in sluice.events("request")]
    assert len(paths) == 3
    assert "\n\r\x1b[31m\x85\u2028\0%n" in paths[0]
    assert max(map(len, paths)) <= 200


async def test_text_lines_are_escaped_too(serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """Row S15, where stderr is a terminal, which would obey an ESC."""
    caplog.set_level("INFO", logger="sluice")
    client = await connect(await serve())
    await client.ask(request("/%0a%1b%c2%9b[31m%e2%80%a8"))
    [line] = [TextFormatter().format(record) for record in caplog.records if record.msg == "request"]
    assert line.isascii()
    assert line.isprintable()
