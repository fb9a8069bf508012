"""``/v1``, as OpenAI's clients see it (contract, section 5): what goes through, and what is told instead."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest

from tests.api.conftest import Connect, Settled
from tests.api.observing import until
from tests.api.raw_client import LEAVING, Response, post, request
from tests.conftest import InProcess, Serve
from tests.upstream_sim import Call, ScriptedUpstream, answer, chunk

KEY = "sk-canary-0451"
MESSAGES = [{"role": "user", "content": "hi"}]

both_paths = pytest.mark.parametrize("fast_path", ["auto", "off"])


def ask(*, stream: bool = True, **fields: Any) -> bytes:
    """A completion's request; a field that is None is left out."""
    body = {"model": "asked", "messages": MESSAGES, "stream": stream} | fields
    return raw(json.dumps({name: value for name, value in body.items() if value is not None}).encode())


def raw(body: bytes, *headers: str) -> bytes:
    return post(body, *headers, target="/v1/chat/completions")


@pytest.fixture
async def server(serve: Serve) -> InProcess:
    return await open_server(serve)


async def open_server(serve: Serve, **environment: str) -> InProcess:
    settings = {"SLUICE_RATE_LIMIT": "off", "LLM_MODEL": "asked", "LLM_API_KEY": KEY, "SLUICE_RETRIES": "0"}
    return await serve(**settings | environment)


def data_of(body: bytes) -> list[bytes]:
    """The ``data`` of every block; nothing else may stand in the body but the one comment line of a heartbeat."""
    lines = [line for line in body.split(b"\n") if line and line != b": ping"]
    assert all(line.startswith(b"data:") for line in lines), body
    return [line.removeprefix(b"data:").strip(b" ") for line in lines]


# ---- What goes through

WIRE = [
    b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n',
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"Hel"}}],"obfuscation":"x9"}\n\n',
    b'data:{"choices":[{"delta":{"content":"no space"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\ndata: {"choices":[{"delta":{"content":"\\ude00"}}]}\n\n',
    'data: {"choices": [ {"delta": {"content": "ä😀\u2028"}, "logprobs": 1.50e-7} ] }\n\n'.encode(),
    b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"t","function":{"name":"f","arguments":"{"}}]}}]}\n\n',
    b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n',
    *(b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%d"}}],"x":null}\n\n' % n for n in range(8)),
    b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n',
    b"data: [DONE]\n\n",
]


@both_paths
@pytest.mark.parametrize("gap", [0.0, 0.003])
async def test_the_data_lines_go_through_byte_for_byte(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled, fast_path: str, gap: float
) -> None:
    """And in order, however they are framed (§5)."""

    async def script(call: Call) -> None:
        await call.head()
        for block in WIRE:
            await call.write(block)
            await asyncio.sleep(gap)
        await call.end()

    upstream.script = script
    server = await open_server(serve, SLUICE_FAST_PATH=fast_path)
    response = await (await connect(server)).ask(ask())
    assert (response.status, response.complete) == (200, True)
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.body == b"".join(WIRE)
    await settled(server)


async def test_other_fields_and_comments_of_the_upstream_are_dropped(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Nothing but ``data:`` blocks is sent: no ``id``, ``event`` or ``retry`` (§5)."""
    token = b'data: {"choices":[{"delta":{"content":"a"}}]}\n'

    async def script(call: Call) -> None:
        await call.head()
        await call.write(b": hello\n\nid: 7\nevent: message\nretry: 5\n" + token + b": more\n\n")
        await call.write(token.replace(b"\n", b"\r\n") + b"\r\n")
        await call.finish()
        await call.done()

    upstream.script = script
    body = (await (await connect(server)).ask(ask())).body
    assert body.startswith(token + b"\n" + token + b"\n")
    assert len(data_of(body)) == 4


async def test_a_refusal_is_not_held_back(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """It is what the SDKs' ``message.refusal`` is made of, and as much an answer as content is."""

    async def script(call: Call) -> None:
        await call.head()
        await call.event(chunk({"role": "assistant", "content": None, "refusal": None}))
        for _ in range(3):
            await call.event(chunk({"refusal": "I can"}))
            await asyncio.sleep(0.2)
        await call.finish()
        await call.done()

    upstream.script = script
    server = await open_server(serve, SLUICE_FIRST_TOKEN_TIMEOUT="0.4", SLUICE_IDLE_TIMEOUT="0.4")
    response = await (await connect(server)).ask(ask())
    assert response.status == 200
    assert data_of(response.body)[-1] == b"[DONE]"


async def test_a_malformed_event_is_skipped(server: InProcess, upstream: ScriptedUpstream, connect: Connect) -> None:
    """The SDKs would die of it (§3: one malformed upstream event is skipped; FailoverBench's malformed chunk)."""

    async def script(call: Call) -> None:
        await call.head()
        await call.token("a")
        await call.event('{"id": 1, "choices": [{"delta": {"content": ')
        await call.token("b")
        await call.finish()
        await call.done()

    upstream.script = script
    *chunks, done = data_of((await (await connect(server)).ask(ask())).body)
    assert [json.loads(data)["choices"][0]["delta"].get("content") for data in chunks] == ["a", "b", None]
    assert done == b"[DONE]"


async def test_a_completion_that_is_not_streamed_goes_through_byte_for_byte(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    body = b'{"id":"c" , "choices":[{"index":0,"message":{"content":"\\u00e4"},"finish_reason":"stop"}],"x":1.0e5}\n'

    async def script(call: Call) -> None:
        await call.head(200, "application/json", Content_Length=str(len(body)), X_Request_ID="req_1")
        call.ended = True
        await call.send(body)

    upstream.script = script
    response = await (await connect(server)).ask(ask(stream=False))
    assert (response.status, response.body) == (200, body)
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Request-ID"] == "req_1"
    assert upstream.calls[0].json["stream"] is False
    await settled(server)


async def test_the_body_goes_through_but_for_model_and_bound(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """§5: the body passes through, with the server's key; ``max_tokens`` is set where it is absent."""
    server = await open_server(serve, SLUICE_MAX_TOKENS="77", SLUICE_SYSTEM_PROMPT="not here")
    fields = (
        b'"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:x"}}]}],"seed":12345678901'
        b'234567890,"temperature":1.50,"tools":[{"type":"function","function":{"name":"f"}}],"stream":true,"x":{"y":[]}'
    )
    await (await connect(server)).ask(raw(b'{"model":"asked",' + fields + b"}", "Authorization: Bearer sk-theirs"))
    (call,) = upstream.calls
    assert fields in call.body
    assert call.json["model"] == "asked"
    assert call.json["max_tokens"] == 77
    assert call.headers["Authorization"] == f"Bearer {KEY}"
    assert b"not here" not in call.body


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({}, {"max_tokens": 100}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": 101}, {"max_tokens": 100}),
        ({"max_completion_tokens": 101}, {"max_completion_tokens": 100}),
        ({"max_completion_tokens": 7, "max_tokens": 500}, {"max_completion_tokens": 7, "max_tokens": 100}),
    ],
)
async def test_no_more_tokens_are_asked_than_the_server_allows(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, asked: dict[str, Any], sent: dict[str, int]
) -> None:
    server = await open_server(serve, SLUICE_MAX_TOKENS="100")
    await (await connect(server)).ask(ask(**asked))
    assert {name: value for name, value in upstream.calls[0].json.items() if "tokens" in name} == sent


# ---- Refusals, in OpenAI's shape


def error_of(response: Response) -> dict[str, Any]:
    """A refusal's error object; it has exactly OpenAI's keys."""
    assert response.headers["Content-Type"].startswith("application/json")
    assert set(response.json) == {"error"}
    error: dict[str, Any] = response.json["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b'{"model":"other","messages":[{}]}', 404, "model_not_found", None),
        (b'{"model":"asked","messages":[{}],"n":2}', 400, "invalid_request", "n"),
        (b'{"model":"asked","messages":[{}],"n":"1"}', 400, "invalid_request", "n"),
        (b'{"model":"asked","messages":[{}],"max_tokens":"5"}', 400, "invalid_request", "max_tokens"),
        (b'{"model":"asked","messages":[{}],"max_tokens":true}', 400, "invalid_request", "max_tokens"),
        (
            b'{"model":"asked","messages":[{}],"max_completion_tokens":0}',
            400,
            "invalid_request",
            "max_completion_tokens",
        ),
        (b'{"model":"asked","messages":[]}', 400, "invalid_request", "messages"),
        (b'{"model":"asked"}', 400, "invalid_request", "messages"),
        (b'{"model":7,"messages":[{}]}', 400, "invalid_request", "model"),
        (b'{"model":"asked","messages":[{}],"stream":"yes"}', 400, "invalid_request", "stream"),
        (b"{", 400, "invalid_request", None),
        (b"[]", 400, "invalid_request", None),
        (b'{"messages":[{}],"x":NaN}', 400, "invalid_request", None),
        (b'{"messages":' + b"[" * 100_000, 400, "invalid_request", None),
    ],
    ids=lambda value: value.decode()[:60] if isinstance(value, bytes) else None,
)
async def test_a_bad_request_is_refused_in_openais_shape(
    server: InProcess,
    upstream: ScriptedUpstream,
    connect: Connect,
    body: bytes,
    status: int,
    code: str,
    param: str | None,
) -> None:
    """§5: refusals of ours have OpenAI's error shape; nothing is spent."""
    response = await (await connect(server)).ask(raw(body))
    error = error_of(response)
    assert (response.status, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert upstream.calls == []


async def test_limits_count_for_all_faces_together(serve: Serve, connect: Connect) -> None:
    """§5: the same limits; S20: one bucket."""
    server = await serve(SLUICE_RATE_LIMIT="2/1000", LLM_MODEL="asked")
    client = await connect(server)
    assert (await client.ask()).status == 200
    assert (await client.ask(ask())).status == 200
    response = await client.ask(ask())
    assert (response.status, error_of(response)["code"]) == (429, "rate_limit_exceeded")
    assert error_of(response)["type"] == "rate_limit_error"
    assert int(response.headers["Retry-After"]) > 0
    assert response.headers["RateLimit"].startswith('"requests";r=0')


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (request("/v1/chat/completions"), 405, "method_not_allowed"),
        (request("/v1/embeddings"), 404, "not_found"),
        (request("/v1/models/other"), 404, "model_not_found"),
        (post(b"{}", "Content-Type: text/plain", target="/v1/chat/completions"), 415, "unsupported_media_type"),
        (ask() + b"", 403, "origin_not_allowed"),
    ],
)
async def test_every_refusal_has_that_shape(
    server: InProcess, connect: Connect, data: bytes, status: int, code: str
) -> None:
    if status == 403:
        data = data.replace(b"Host: sluice.test", b"Host: sluice.test\r\nOrigin: https://evil.example")
    response = await (await connect(server)).ask(data)
    assert (response.status, error_of(response)["code"]) == (status, code)


async def test_the_models_are_the_configured_ones(serve: Serve, connect: Connect) -> None:
    """``GET /v1/models`` (§5)."""
    fallbacks = [{"base_url": "http://127.0.0.1:9/v1", "model": "meta/llama"}, {"base_url": "http://127.0.0.1:9/v1"}]
    server = await open_server(serve, SLUICE_FALLBACKS=json.dumps(fallbacks))
    client = await connect(server)
    listed = (await client.ask(request("/v1/models"))).json
    assert listed["object"] == "list"
    assert [(model["id"], model["object"]) for model in listed["data"]] == [("asked", "model"), ("meta/llama", "model")]
    assert (await client.ask(request("/v1/models/meta%2Fllama"))).json == listed["data"][1]


# ---- The upstream's failures before the first byte


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 429, 500, 503, 529])
async def test_a_failure_before_the_first_byte_goes_through(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, settled: Settled, status: int, stream: bool
) -> None:
    """§5: status, ``Retry-After``, ``x-request-id`` and error object."""
    error = {"message": "too much of it", "type": "x", "param": "messages", "code": "y", "inner": {"deep": [1, None]}}

    async def script(call: Call) -> None:
        await call.refuse(status, error, Retry_After="7", X_Request_ID="req_9", X_Should_Retry="false")

    upstream.script = script
    response = await (await connect(server)).ask(ask(stream=stream))
    assert (response.status, response.json) == (status, {"error": error})
    assert (response.headers["Retry-After"], response.headers["X-Request-ID"]) == ("7", "req_9")
    assert response.headers["X-Should-Retry"] == "false"
    await settled(server)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [401, 403])
async def test_what_is_about_our_key_is_told_in_our_words(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, status: int, stream: bool
) -> None:
    """§5: it becomes a 502, and asking again does not help."""

    async def script(call: Call) -> None:
        await call.refuse(
            status, {"message": f"Incorrect API key provided: {KEY}", "type": "x", "code": "invalid_api_key"}
        )

    upstream.script = script
    response = await (await connect(server)).ask(ask(stream=stream))
    assert (response.status, error_of(response)["code"]) == (502, "upstream_rejected")
    assert response.headers["X-Should-Retry"] == "false"
    assert KEY.encode() not in response.body


async def test_nothing_of_ours_shows_in_what_goes_through(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """§5: no key, account or URL of ours shows."""
    secrets = [
        KEY,
        "sk-can***0451",
        "org-AbCdEf123456",
        "proj_AbCdEf123456",
        upstream.base_url,
        f"127.0.0.1:{upstream.port}",
    ]

    async def script(call: Call) -> None:
        await call.refuse(429, {"message": "Limit of " + " at ".join(secrets), "type": "t", "code": "c", "in": secrets})

    upstream.script = script
    response = await (await connect(server)).ask(ask())
    assert response.status == 429
    assert response.json["error"]["message"].startswith("Limit of ")
    for secret in secrets:
        assert secret.encode() not in response.body


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        ("500 X\r\nContent-Type: text/html\r\nContent-Length: 6", b"<html>", 500),
        ("404 X\r\nContent-Length: 0", b"", 404),
        ("503 X\r\nContent-Type: application/json\r\nContent-Length: 3", b"{}\n", 503),
        ("301 X\r\nLocation: http://evil.example/\r\nContent-Length: 0", b"", 502),
        ("204 X", b"", 502),
        ("200 X\r\nContent-Type: text/html\r\nContent-Length: 6", b"<html>", 502),
        ("200 X\r\nContent-Type: application/json\r\nContent-Length: 15", b'{"error":"boom"}'[:15], 502),
        ("200 X\r\nContent-Type: text/event-stream\r\nContent-Length: 0", b"", 502),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_says_nothing_in_openais_shape_is_told_in_ours(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, head: str, body: bytes, status: int, stream: bool
) -> None:
    async def script(call: Call) -> None:
        await call.send(f"HTTP/1.1 {head}\r\n\r\n".encode() + body)
        call.close()

    upstream.script = script
    response = await (await connect(server)).ask(ask(stream=stream))
    assert response.status == status
    assert error_of(response)["code"].startswith("upstream_")
    assert b"html" not in response.body


async def test_an_unreachable_upstream_is_a_502(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect
) -> None:
    await upstream.__aexit__()
    response = await (await connect(server)).ask(ask())
    assert (response.status, error_of(response)["code"]) == (502, "upstream_unreachable")
    assert error_of(response)["type"] == "server_error"


@pytest.mark.parametrize("stream", [True, False])
async def test_the_time_limits_hold_here_too(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled, stream: bool
) -> None:
    """§5: on every face; a silent upstream is a 504."""

    async def silent(call: Call) -> None:
        await call.gone()

    upstream.script = silent
    server = await open_server(serve, SLUICE_FIRST_TOKEN_TIMEOUT="0.2")
    response = await (await connect(server)).ask(ask(stream=stream))
    assert (response.status, error_of(response)["code"]) == (504, "upstream_timeout")
    await settled(server)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_whole_answer_has_its_time(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled, stream: bool
) -> None:
    async def silent(call: Call) -> None:
        await call.gone()

    upstream.script = silent
    server = await open_server(serve, SLUICE_STREAM_TIMEOUT="0.2")
    response = await (await connect(server)).ask(ask(stream=stream))
    assert (response.status, error_of(response)["code"]) == (504, "stream_timeout")
    await settled(server)


async def test_where_nobody_is_asked_it_is_told_when_to_come_back(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """All circuits open: ``upstream_unreachable`` at once; by itself an SDK would ask again after half a second."""

    async def script(call: Call) -> None:
        await call.refuse(503)

    upstream.script = script
    client = await connect(server)
    assert [(await client.ask(ask())).status for _ in range(5)] == [503] * 5
    response = await client.ask(ask())
    assert (response.status, error_of(response)["code"]) == (502, "upstream_unreachable")
    assert 1 <= int(response.headers["Retry-After"]) <= 10
    assert len(upstream.calls) == 5


# ---- After the first byte


@both_paths
@pytest.mark.parametrize("how", ["close", "reset", "error", "silence"])
async def test_a_failure_after_the_first_byte_is_one_error_block_and_no_done(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled, how: str, fast_path: str
) -> None:
    """§5: a cut answer never looks complete."""

    async def script(call: Call) -> None:
        await call.head()
        await call.token("a")
        await asyncio.sleep(0.02)
        match how:
            case "close":
                call.close()
            case "reset":
                call.reset()
            case "error":
                await call.event({"error": {"message": f"boom {KEY}", "code": 500}})
            case _:
                await call.gone()

    upstream.script = script
    server = await open_server(serve, SLUICE_IDLE_TIMEOUT="0.2", SLUICE_FAST_PATH=fast_path)
    response = await (await connect(server)).ask(ask())
    assert response.complete
    token, error = map(json.loads, data_of(response.body))
    assert token["choices"][0]["delta"]["content"] == "a"
    assert set(error) == {"error"}
    assert set(error["error"]) == {"message", "type", "param", "code"}
    codes = {"error": "upstream_error", "silence": "upstream_timeout"}
    assert error["error"]["code"] == codes.get(how, "upstream_incomplete")
    assert KEY.encode() not in response.body
    await settled(server)


async def test_a_finish_reason_without_done_is_a_whole_answer(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """§3: it is complete; FailoverBench's answer without ``[DONE]``."""

    async def script(call: Call) -> None:
        await call.head()
        await call.token("a")
        await call.finish()
        await call.end()

    upstream.script = script
    assert data_of((await (await connect(server)).ask(ask())).body)[-1] == b"[DONE]"


async def test_silence_is_filled_with_comments_of_one_line(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """§5: ONE newline, at an event boundary: a blank line behind it breaks openai-python."""

    async def script(call: Call) -> None:
        await call.head()
        await call.token("a")
        await asyncio.sleep(0.5)
        await call.finish()
        await call.done()

    upstream.script = script
    server = await open_server(serve, SLUICE_HEARTBEAT="0.1")
    body = (await (await connect(server)).ask(ask())).body
    assert body.count(b"\n\n: ping\n") >= 1
    assert b": ping\n\n" not in body
    assert len(data_of(body)) == 3


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize("spoken", [True, False], ids=["flowing", "silent"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_closes_the_upstream_request_at_once(
    serve: Serve,
    upstream: ScriptedUpstream,
    connect: Connect,
    settled: Settled,
    how: str,
    spoken: bool,
    stream: bool,
) -> None:
    """§5; no grace, whatever it accepts."""

    async def script(call: Call) -> None:
        if spoken and stream:
            await call.head()
            await call.token("a")
        await call.gone()

    upstream.script = script
    server = await open_server(serve, SLUICE_RESUME_GRACE="finish")
    client = await connect(server)
    await client.send(ask(stream=stream).replace(b"\r\n\r\n", b"\r\nAccept: text/event-stream\r\n\r\n", 1))
    call = await upstream.called()
    if spoken and stream:
        await client.read_until(b'"a"')
    LEAVING[how](client)
    await until(lambda: call.gone_at is not None, within=2)
    await settled(server)


async def test_an_answer_larger_than_the_bound_goes_through_to_one_who_reads(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """What was read is not kept: SLUICE_MAX_ANSWER_BYTES bounds what waits."""
    texts = ["x" * 500] * 40

    upstream.script = answer(texts, gap=0.002)
    server = await open_server(serve, SLUICE_MAX_ANSWER_BYTES="4096")
    *chunks, done = data_of((await (await connect(server)).ask(ask())).body)
    assert sum(json.loads(data)["choices"][0]["delta"].get("content") == "x" * 500 for data in chunks[:-1]) == 40
    assert done == b"[DONE]"


async def test_a_completion_larger_than_the_bound_is_refused(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    body = json.dumps({"choices": [{"message": {"content": "x" * 5000}}]}).encode()

    async def script(call: Call) -> None:
        await call.head(200, "application/json", Content_Length=str(len(body)))
        await call.send(body)

    upstream.script = script
    server = await open_server(serve, SLUICE_MAX_ANSWER_BYTES="4096")
    response = await (await connect(server)).ask(ask(stream=False))
    assert (response.status, error_of(response)["code"]) == (502, "answer_too_large")


async def test_a_drain_ends_it_with_an_error(server: InProcess, upstream: ScriptedUpstream, connect: Connect) -> None:
    """§7: ``interrupted``; before the first byte as a 503."""
    spoken = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        if len(upstream.calls) == 1:
            await call.token("a")
        await call.gone()

    upstream.script = script
    first, second = await connect(server), await connect(server)
    await first.send(ask())
    await first.read_until(b'"a"')
    await second.send(ask())
    await upstream.called(2)
    spoken.set()
    server.desk.drain()
    server.desk.interrupt()
    assert b'"code":"interrupted"' in await first.read_until(b"0\r\n\r\n")
    response = await second.read_response()
    assert (response.status, error_of(response)["code"]) == (503, "interrupted")


async def test_a_stream_of_this_face_cannot_be_read_by_another(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not kept: nobody resumes a completion."""
    caplog.set_level("INFO", logger="sluice")
    await (await connect(server)).ask(ask())
    await until(lambda: server.desk.streams == 0, within=2)
    assert server.desk.kept == 0


async def test_a_page_of_a_listed_origin_can_use_an_sdk(serve: Serve, connect: Connect) -> None:
    """§3: CORS headers stand on every answer under /v1; the SDK adds a dozen headers of its own."""
    origin = "https://app.example"
    server = await open_server(serve, SLUICE_CORS_ORIGINS=origin)
    client = await connect(server)
    preflight = await client.ask(
        request(
            "/v1/chat/completions",
            f"Origin: {origin}",
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization,content-type,x-stainless-lang,x-stainless-retry-count",
            method="OPTIONS",
        )
    )
    assert preflight.status == 200
    allowed = preflight.headers["Access-Control-Allow-Headers"].lower()
    assert {"x-stainless-lang", "authorization"} <= set(allowed.split(","))
    asked = ask().replace(b"Host: sluice.test", b"Host: sluice.test\r\nOrigin: " + origin.encode())
    assert (await client.ask(asked)).headers["Access-Control-Allow-Origin"] == origin
    with contextlib.suppress(KeyError):
        assert preflight.headers["Access-Control-Allow-Origin"] == origin


# ---- What it costs


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_generated_is_charged(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, stream: bool
) -> None:
    """SLUICE_TOKEN_LIMIT counts on every face, as the upstream reports."""
    if stream:
        upstream.script = answer(["a", "b"], usage=(3, 60))
    else:
        body = b'{"choices":[{"message":{"content":"a b"}}],"usage":{"prompt_tokens":3,"completion_tokens":60}}'

        async def script(call: Call) -> None:
            await call.head(200, "application/json", Content_Length=str(len(body)))
            call.ended = True
            await call.send(body)

        upstream.script = script
    server = await open_server(serve, SLUICE_TOKEN_LIMIT="100/10000")
    client = await connect(server)
    assert [(await client.ask(ask(stream=stream))).status for _ in range(2)] == [200, 200]
    response = await client.ask(ask(stream=stream))
    assert (response.status, error_of(response)["code"]) == (429, "token_limit_exceeded")
    assert response.headers["X-Should-Retry"] == "false"


async def test_an_upstreams_chunks_without_a_word_are_bounded(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """They are kept until somebody is known to answer, and an endpoint may repeat itself for as long as it is let."""

    async def script(call: Call) -> None:
        await call.head()
        while call.open:
            await call.write(b"".join([b"data: %b\n\n" % json.dumps(chunk({"role": "assistant"})).encode()] * 100))

    upstream.script = script
    server = await open_server(serve)
    response = await (await connect(server)).ask(ask())
    assert (response.status, error_of(response)["code"]) == (502, "upstream_invalid")
    await settled(server)
