"""``GET /api/stream``: what an admitted question gets, byte by byte, and what the upstream is asked (contract, §3)."""

from __future__ import annotations

import asyncio
import logging
import re

import aiohttp
import pytest

from server.relay.viewer import Viewer
from tests.api.conftest import Connect, LogLines, Settled
from tests.api.observing import command_line
from tests.api.raw_client import ASK, request
from tests.conftest import Launch, Serve
from tests.sse_client import ask, open_stream
from tests.upstream_sim import Call, Script, ScriptedUpstream, answer, chunk

KEY = "sk-canary-key-5f1d"
PROMPT = "canary prompt 7c0a"
ANSWER = "canary answer e21b"


async def _say_everything(call: Call) -> None:
    """Reasoning in both spellings, content, another model's name, a usage chunk."""
    await call.head()
    await call.event(chunk({"role": "assistant", "content": ""}))
    await call.event(chunk({"reasoning_content": "Hm…"}, model="sim-2"))
    await call.event(chunk({"reasoning": "so"}, model="sim-2"))
    await call.event(chunk({"content": 'Hel"\\\n'}, model="sim-2"))
    await call.event(chunk({"content": "😀 l\u2028o"}, model="sim-2"))
    await call.event(chunk({}, "stop", model="sim-2"))
    await call.event(chunk(usage={"prompt_tokens": 7, "completion_tokens": 5}, model="sim-2"))
    await call.done()


async def test_a_stream_is_exactly_these_bytes(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Section 3, "The events, in order": fields, their order, the JSON's members, the blank lines."""
    upstream.script = _say_everything
    client = await connect(await serve(LLM_MODEL="asked-for"))
    response = await client.ask()
    expected = [
        'retry: 1000\nevent: start\nid: SID.0\ndata: {"id":"SID","model":"asked-for"}\n\n',
        'event: reasoning\nid: SID.1\ndata: {"reasoning":"Hm…"}\n\n',
        'event: reasoning\nid: SID.2\ndata: {"reasoning":"so"}\n\n',
        'id: SID.3\ndata: {"token":"Hel\\"\\\\\\n"}\n\n',
        'id: SID.4\ndata: {"token":"😀 l\u2028o"}\n\n',
        'event: usage\nid: SID.5\ndata: {"finish_reason":"stop","prompt_tokens":7,"completion_tokens":5,"tokens":2,'
        '"model":"sim-2","ttft_ms":MS,"duration_ms":MS}\n\n',
        "id: SID.6\ndata: [DONE]\n\n",
    ]
    pattern = re.escape("".join(expected)).replace("SID", "(?P<sid>[A-Za-z0-9_-]{22,64})", 1)
    pattern = pattern.replace("SID", "(?P=sid)").replace("MS", "[0-9]+")
    assert re.fullmatch(pattern, response.body.decode("utf-8"))
    assert response.complete


async def test_a_streams_headers(serve: Serve, connect: Connect) -> None:
    """Section 3, "Response headers of a stream"."""
    client = await connect(await serve())
    response = await client.ask()
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Connection"] == "keep-alive"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", response.headers["X-Request-ID"])
    assert "Content-Encoding" not in response.headers
    for name in set(response.headers):
        assert len(response.headers.getall(name)) == 1, f"{name} is there twice"


@pytest.mark.parametrize("header", ["abc.DEF_1-2", "a" * 64])
async def test_a_harmless_request_id_is_taken_over(serve: Serve, connect: Connect, header: str) -> None:
    client = await connect(await serve())
    response = await client.ask(request("/api/stream", f"X-Request-ID: {header}"))
    assert response.headers["X-Request-ID"] == header


@pytest.mark.parametrize("header", ["", "a" * 65, "a b", "ä", "a;b", "<script>"])
async def test_a_request_id_that_could_do_harm_is_replaced(serve: Serve, connect: Connect, header: str) -> None:
    client = await connect(await serve())
    response = await client.ask(request("/api/stream", f"X-Request-ID: {header}"))
    assert response.status == 400
    assert re.fullmatch(r"[A-Za-z0-9._-]{8,64}", response.headers["X-Request-ID"])
    assert response.headers["X-Request-ID"] != header


async def test_every_stream_has_an_id_of_its_own(serve: Serve) -> None:
    """SID: at least 128 random bits in ``[A-Za-z0-9_-]{22,64}``, so never a UUID4."""
    server = await serve(SLUICE_RATE_LIMIT="off")
    ids = [(await ask(server.url)).events[0].json["id"] for _ in range(20)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{22,64}", sid) for sid in ids)
    assert not any(re.fullmatch(r"[0-9a-f-]{36}", sid) for sid in ids)


# ---- When things are sent


async def test_200_and_start_are_sent_before_the_upstream_has_answered(
    serve: Serve, upstream: ScriptedUpstream, settled: Settled
) -> None:
    """The contract: "else: 200, sent at once": a slow first token is no failure."""

    async def hold(call: Call) -> None:
        await call.gone()

    upstream.script = hold
    server = await serve()
    async with asyncio.timeout(5), open_stream(server.url) as stream:
        assert stream.answer.status == 200
        assert (await anext(aiter(stream))).type == "start"
        assert len(upstream.open_calls) <= 1
        await upstream.called()
    await settled(server)


async def test_each_token_is_sent_when_it_comes(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Every token reaches the page the moment it exists: the next one is not waited for."""
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        for text in ("one", "two", "three"):
            await call.token(text)
            await go_on.wait()
            go_on.clear()
        await call.finish()
        await call.done()

    upstream.script = script
    server = await serve()
    async with asyncio.timeout(5), open_stream(server.url) as stream:
        for text in ("one", "two", "three"):
            assert await stream.token() == text
            go_on.set()
        await stream.read_all()
        assert stream.answer.complete


async def test_deltas_are_neither_merged_nor_split(serve: Serve, upstream: ScriptedUpstream) -> None:
    """One upstream delta with content is one token event, whatever the upstream's framing."""
    events = "".join(
        f'data: {{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]}}\n\n' for text in ("a", "b", "", "c d")
    ).encode()

    async def script(call: Call) -> None:
        await call.head()
        await call.write(events)  # all in one segment
        for start in range(0, len(events), 7):  # and in crumbs
            await call.write(events[start : start + 7])
            await asyncio.sleep(0)
        await call.finish()
        await call.done()

    upstream.script = script
    given = await ask((await serve()).url)
    assert given.tokens == ["a", "b", "c d"] * 2
    assert given.usage["tokens"] == 6
    assert [event.number for event in given.events] == list(range(len(given.events)))


@pytest.mark.parametrize("window", ["before the upstream's head", "before the first token", "between tokens"])
async def test_a_heartbeat_follows_each_silence(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, window: str
) -> None:
    """After each SLUICE_HEARTBEAT seconds without an event, from the first second on; without an id."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def script(call: Call) -> None:
        if window != "before the upstream's head":
            await call.head()
        if window == "between tokens":
            await call.token("a")
        begun.set()
        await go_on.wait()
        if window == "before the upstream's head":
            await call.head()
        await call.token("b")
        await call.finish()
        await call.done()

    upstream.script = script
    client = await connect(await serve(SLUICE_HEARTBEAT="0.1"))
    await client.send(ASK)
    await begun.wait()
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    for _ in range(3):
        await client.read_until(b"event: ping\ndata: {}\n\n")
    assert loop.time() - began_at >= 0.25
    go_on.set()
    await client.read_until(b"[DONE]\n\n")


async def test_a_heartbeat_waits_for_silence(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Tokens are signs of life enough."""
    upstream.script = answer(map(str, range(15)), gap=0.05)
    given = await ask((await serve(SLUICE_HEARTBEAT="0.6")).url)
    assert given.complete
    assert [event for event in given.events if event.type == "ping"] == []


# ---- What the upstream is asked


async def test_the_upstream_is_asked_as_configured(serve: Serve, upstream: ScriptedUpstream) -> None:
    server = await serve(
        LLM_MODEL="some/model",
        SLUICE_MAX_TOKENS="123",
        SLUICE_TEMPERATURE="1.25",
        SLUICE_SYSTEM_PROMPT="Be brief.",
    )
    await ask(server.url, "why?")
    [call] = upstream.calls
    assert (call.method, call.path) == ("POST", "/v1/chat/completions")
    assert call.json == {
        "model": "some/model",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 123,
        "temperature": 1.25,
    }


async def test_an_empty_system_prompt_is_not_sent(serve: Serve, upstream: ScriptedUpstream) -> None:
    await ask((await serve(SLUICE_SYSTEM_PROMPT="")).url, "why?")
    assert upstream.calls[0].json["messages"] == [{"role": "user", "content": "why?"}]


async def test_the_defaults_are_those_of_the_contract(serve: Serve, upstream: ScriptedUpstream) -> None:
    await ask((await serve()).url)
    asked = upstream.calls[0].json
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("gpt-4o-mini", 800, 0.3)
    assert asked["messages"][0]["role"] == "system"


async def test_what_the_client_sends_along_stays_here(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Its credentials and its addresses are no business of the upstream's."""
    server = await serve(LLM_API_KEY=KEY)
    await ask(
        server.url,
        Authorization="Bearer theirs",
        Cookie="a=theirs",
        Referer="http://theirs/",
        X_Forwarded_For="9.9.9.9",
    )
    [call] = upstream.calls
    assert call.headers.getall("Authorization") == [f"Bearer {KEY}"]
    assert not any("theirs" in value or "9.9.9.9" in value for value in call.headers.values())
    assert call.headers["Accept-Encoding"] == "identity"


async def test_without_a_key_none_is_sent(serve: Serve, upstream: ScriptedUpstream) -> None:
    await ask((await serve()).url, Authorization="Bearer theirs")
    assert "Authorization" not in upstream.calls[0].headers


@pytest.mark.parametrize("header", ["application/json", "text/event-stream", "*/*", None], ids=str)
async def test_the_accept_header_changes_no_byte(serve: Serve, connect: Connect, header: str | None) -> None:
    """Row A24: it decides who can resume, and nothing else."""
    client = await connect(await serve())
    response = await client.ask(request("/api/stream?q=hi", *([f"Accept: {header}"] if header else [])))
    assert response.status == 200
    assert re.findall(rb'data: (?:\{"token":"(\w+)"\}|(\[DONE\]))', response.body) == [
        (b"Hel", b""),
        (b"lo", b""),
        (b"", b"[DONE]"),
    ]


# ---- How it ends


async def test_a_failure_after_admission_is_one_event_and_the_end(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """A plain message event, then the response's proper end, and no ``[DONE]``."""

    async def script(call: Call) -> None:
        await call.refuse(401, {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"})

    upstream.script = script
    client = await connect(await serve(LLM_API_KEY=KEY))
    response = await client.ask()
    assert response.status == 200
    assert response.complete
    start, error = response.body.decode().removesuffix("\n\n").split("\n\n")
    assert start.startswith("retry: 1000\nevent: start\n")
    assert re.fullmatch(
        r'id: [A-Za-z0-9_-]{22,64}\.1\ndata: \{"error":"upstream_rejected","message":"[^"]+","retryable":false\}', error
    )
    assert KEY not in response.body.decode()


async def test_the_connection_serves_the_next_question(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """``Connection: keep-alive`` is meant: also behind an answer that failed."""
    client = await connect(await serve())
    for script in (answer(["a"]), _refuse, answer(["b"])):
        upstream.script = script
        response = await client.ask()
        assert response.status == 200
        assert response.complete
    assert b'{"token":"b"}' in response.body


async def _refuse(call: Call) -> None:
    await call.refuse(400)


# ---- What is logged


async def test_a_stream_is_one_request_line_and_one_stream_end_line(
    serve: Serve, connect: Connect, lines: LogLines
) -> None:
    """Section 7, "Logs": id, client, outcome, tokens, ttft_ms, duration_ms."""
    client = await connect(await serve())
    response = await client.ask(request("/api/stream?q=hi", "X-Request-ID: rq-1", "User-Agent: x"))
    [requested], [ended] = lines("request"), lines("stream_end")
    assert requested.pop("duration_ms") >= 0
    assert requested == {
        "method": "GET",
        "path": "/api/stream",
        "status": 200,
        "client": "127.0.0.1",
        "request_id": "rq-1",
    }
    assert ended.pop("duration_ms") >= ended.pop("ttft_ms") >= 0
    assert ended.pop("id").encode() in response.body
    assert ended == {"client": "127.0.0.1", "outcome": "completed", "model": "sim", "tokens": 2}
    assert lines.failures == []


async def test_prompts_and_answers_are_logged_only_on_request(
    serve: Serve, upstream: ScriptedUpstream, lines: LogLines
) -> None:
    """``SLUICE_LOG_PROMPTS``: then both stand in the stream_end line, whole."""
    upstream.script = answer(ANSWER.partition("answer"))
    await ask((await serve(SLUICE_LOG_PROMPTS="true")).url, PROMPT)
    [ended] = lines("stream_end")
    assert (ended["prompt"], ended["answer"]) == (PROMPT, ANSWER)


async def _answer_then_break(call: Call) -> None:
    await call.head()
    await call.token(ANSWER)
    call.reset()


async def _quote_everything(call: Call) -> None:
    await call.refuse(500, {"message": f"{call.headers['Authorization']} asked {call.body.decode()}: {ANSWER}"})


async def _talk_nonsense(call: Call) -> None:
    await call.send(f"HTTP/1.1 {KEY} {ANSWER}\r\n\r\n".encode())


@pytest.mark.parametrize(
    "script",
    [answer([ANSWER]), _answer_then_break, _quote_everything, _talk_nonsense],
    ids=["complete", "broken", "upstream quotes the key", "upstream talks nonsense"],
)
async def test_no_secret_leaves_the_process(
    launch: Launch, upstream: ScriptedUpstream, script: Script, connect: Connect
) -> None:
    """Rows S10, S11: neither key, prompt nor answer in the log, not at debug level either; nor the key on the page,
    in the admin listener's words or on the command line."""
    upstream.script = script
    sluice = await launch(LLM_BASE_URL=upstream.base_url, LLM_API_KEY=KEY, SLUICE_LOG_LEVEL="debug", SLUICE_RETRIES="0")
    port = int(sluice.url.rpartition(":")[2])
    said = []
    client = await connect(port)
    said.append((await client.ask(request(f"/api/stream?q={PROMPT.replace(' ', '+')}", f"Referer: /?q={KEY}"))).body)
    said.append((await client.ask(request(f"/api/stream?q={PROMPT.replace(' ', '+')}%ff"))).body)
    said.append((await client.ask(request("/"))).body)
    said.append((await client.ask(request(f"/api/stream?q={PROMPT}"))).body)  # spaces: the parser's own complaint
    admin = await connect(int(sluice.admin_url.rpartition(":")[2]))
    said.append((await admin.ask(request("/readyz"))).body)
    said.append(command_line(sluice.pid))
    sluice.process.terminate()
    await sluice.exited()
    assert upstream.calls[0].headers["Authorization"] == f"Bearer {KEY}"
    assert KEY.encode() not in b"".join(said)
    log = "\n".join(sluice.lines)
    assert len(sluice.events("request")) == 3
    assert len(sluice.events("stream_end")) == 1
    for canary in (KEY, "canary prompt", ANSWER, "Traceback"):
        assert canary not in log


async def test_a_bug_after_the_head_cuts_the_answer_and_is_logged_once(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cut answer never looks complete; one traceback is enough to find the bug by."""

    async def fail(viewer: Viewer) -> None:
        await viewer._connection.write(b"data: {}\n\n")
        raise ZeroDivisionError

    monkeypatch.setattr(Viewer, "follow", fail)
    server = await serve()
    async with aiohttp.ClientSession() as session, session.get(server.url + "/api/stream?q=hi") as response:
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == ["request_failed"]
