"""The demo's HTTP side over real sockets: OpenAI's streaming format to the letter, its pace, and its end."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import logging
import re
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientConnectionError, ClientResponse, ClientSession, web
from aiohttp.test_utils import TestClient
from pytest_aiohttp import AiohttpClient

from server.demo.library import Library
from server.demo.model import DEMO_MODEL_NAME, DOCUMENTS, create_demo_app, demo_model, read_documents
from server.demo.tokens import split_tokens
from tests.demo.manual import MANUAL

PATH = "/v1/chat/completions"
QUESTION = "How do I start it?"
LIBRARY = Library(MANUAL)
ANSWER = LIBRARY.answer(QUESTION)

Client = TestClient[web.Request, web.Application]


@pytest.fixture
async def client(aiohttp_client: AiohttpClient) -> Client:
    """A client of a demo model that does not wait between tokens."""
    return await aiohttp_client(create_demo_app(LIBRARY, tokens_per_second=1e6))


def asking(question: Any = QUESTION, **fields: Any) -> dict[str, Any]:
    """The body of a request, as the server sends it for a page."""
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": question}], "stream": True, **fields}


def events(text: str) -> list[Any]:
    """What the ``data:`` lines of a stream hold, which must be all that it holds; JSON but for ``[DONE]``."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(re.fullmatch(r"data: [^\n]+", block) for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


async def ask(client: Client, question: Any = QUESTION, **fields: Any) -> list[Any]:
    async with client.post(PATH, json=asking(question, **fields)) as response:
        assert response.status == 200
        return events(await response.text())


def spoken(chunks: list[Any]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks[:-1] for choice in chunk["choices"])


# The format


async def test_a_stream_is_a_role_then_tokens_then_a_reason_then_done(client: Client) -> None:
    """CreateChatCompletionStreamResponse: the parts in order, one choice each, ``[DONE]`` last."""
    role, *tokens, finish, done = await ask(client)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"] for chunk in tokens] == [{"content": token} for token in split_tokens(ANSWER)]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in [role, *tokens])
    assert finish["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert done == "[DONE]"


async def test_the_deltas_joined_are_the_answer(client: Client) -> None:
    assert spoken(await ask(client)) == ANSWER


async def test_every_chunk_names_one_completion_and_the_model_that_answers(client: Client) -> None:
    """``id`` and ``created`` are the same in all chunks; the model is the demo, whatever was asked for."""
    *chunks, _ = await ask(client)
    frames = {(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks}
    ((completion_id, kind, created, model),) = frames
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{24}", completion_id)
    assert (kind, type(created), model) == ("chat.completion.chunk", int, DEMO_MODEL_NAME)
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_stream_says_what_it_is_and_is_not_cached(client: Client) -> None:
    async with client.post(PATH, json=asking()) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["x-request-id"].startswith("req_")
        assert "Content-Length" not in response.headers


async def test_usage_comes_in_a_chunk_of_its_own_where_it_is_asked_for(client: Client) -> None:
    """``include_usage``: a chunk with ``choices: []`` before ``[DONE]``; every other chunk has ``usage: null``."""
    *chunks, usage, done = await ask(client, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    prompt, completion = len(split_tokens(QUESTION)), len(split_tokens(ANSWER))
    assert usage["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


@pytest.mark.parametrize(
    "bounds", [{"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 9}]
)
async def test_an_answer_past_max_tokens_is_cut_and_says_so(client: Client, bounds: dict[str, int]) -> None:
    *chunks, finish, usage, _ = await ask(client, stream_options={"include_usage": True}, **bounds)
    assert spoken([*chunks, None]) == "".join(split_tokens(ANSWER)[:5])
    assert finish["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 5


async def test_an_answer_of_exactly_max_tokens_is_whole(client: Client) -> None:
    chunks = await ask(client, max_tokens=len(split_tokens(ANSWER)))
    assert spoken(chunks) == ANSWER
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [{}, {"stream": False}, {"stream": None}], ids=["absent", "false", "null"])
async def test_without_stream_the_answer_is_one_json_object(client: Client, stream: dict[str, Any]) -> None:
    body = {name: value for name, value in asking().items() if name != "stream"} | stream
    async with client.post(PATH, json=body) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        whole = await response.json()
    assert (whole["object"], whole["model"]) == ("chat.completion", DEMO_MODEL_NAME)
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == len(split_tokens(ANSWER))


async def test_it_lists_itself_as_the_only_model(client: Client) -> None:
    async with client.get("/v1/models") as response:
        listing = await response.json()
    assert listing["object"] == "list"
    assert [(model["id"], model["object"], model["owned_by"]) for model in listing["data"]] == [
        (DEMO_MODEL_NAME, "model", "sluice")
    ]


async def test_the_last_user_message_is_the_question(client: Client) -> None:
    """Whatever stands before it, and what an assistant or a tool said after it."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What about Redis?"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Well,"},
    ]
    assert spoken(await ask(client, messages=messages)) == ANSWER


async def test_a_question_in_parts_is_its_text(client: Client) -> None:
    parts = [
        {"type": "text", "text": "How do I"},
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "text", "text": "start it?"},
    ]
    assert spoken(await ask(client, parts)) == ANSWER


async def test_a_conversation_without_a_question_is_greeted(client: Client) -> None:
    assert "Hello!" in spoken(await ask(client, messages=[{"role": "system", "content": "Redis"}]))


@pytest.mark.parametrize("question", ["什么是流式传输", "👩‍👩‍👧", "\ud83d", "\x00", ""])
async def test_any_script_is_answered(client: Client, question: str) -> None:
    assert spoken(await ask(client, question)) == LIBRARY.answer(question)


# Refusals


async def refused(response: ClientResponse) -> dict[str, Any]:
    """The error object, of OpenAI's shape."""
    assert response.content_type == "application/json"
    body = await response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert response.headers["x-request-id"].startswith("req_")
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 4}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "hello"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 4}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["hello"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"n": 2}, "n"),
    ],
)
async def test_a_wrong_parameter_is_named(client: Client, fields: dict[str, Any], param: str) -> None:
    """400 with OpenAI's error object, before any byte of a stream."""
    async with client.post(PATH, json=asking(**fields)) as response:
        assert response.status == 400
        assert (await refused(response))["param"] == param


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe\xfd", b"[" * 100_000, b'{"max_tokens":' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "array", "string", "null", "not utf-8", "nested", "huge number"],
)
async def test_a_body_that_is_no_json_object_is_refused(client: Client, body: bytes) -> None:
    async with client.post(PATH, data=body, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 400
        await refused(response)


async def test_a_body_that_is_not_what_its_encoding_says_is_refused(client: Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with client.post(PATH, data=b"not gzip", headers=headers) as response:
        assert response.status == 400
        await refused(response)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_that_does_not_say_it_is_json_is_refused(client: Client, content_type: str) -> None:
    """Which also keeps a web page's plain form from asking the loopback port."""
    data = json.dumps(asking()).encode()
    async with client.post(PATH, data=data, headers={"Content-Type": content_type}) as response:
        assert response.status == 415
        assert (await refused(response))["code"] == "unsupported_content_type"


async def test_a_body_over_a_mebibyte_is_refused(client: Client) -> None:
    """And one just under it is read."""
    room = (1 << 20) - len(json.dumps(asking("")).encode()) - 1
    assert spoken(await ask(client, "x" * room))
    too_large = io.BytesIO(json.dumps(asking("x" * (room + 2))).encode())
    async with client.post(PATH, data=too_large, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 413
        await refused(response)


async def test_an_unknown_path_or_method_gets_openai_s_error_too(client: Client) -> None:
    async with client.get("/v1/nothing") as response:
        assert response.status == 404
        await refused(response)
    async with client.get(PATH) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
        await refused(response)


# The pace and the end


async def arrivals(client: Client, **fields: Any) -> list[float]:
    """When each token came, in seconds since the request."""
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    async with client.post(PATH, json=asking(**fields)) as response:
        return [loop.time() - started_at async for line in response.content if b'"delta":{"content":' in line]


async def test_tokens_come_one_by_one_at_the_pace(aiohttp_client: AiohttpClient) -> None:
    """Each token as an event of its own when it is due, the first after one gap: a model thinks before it speaks."""
    client = await aiohttp_client(create_demo_app(LIBRARY, tokens_per_second=100))
    came = await arrivals(client, max_tokens=20)
    assert len(came) == 20
    assert all(arrived >= (at + 1) / 100 - 0.002 for at, arrived in enumerate(came))
    assert sum(later - earlier > 0.005 for earlier, later in itertools.pairwise(came)) > 10


async def test_a_busy_moment_does_not_slow_the_rest(aiohttp_client: AiohttpClient) -> None:
    """Deadlines count from the start: held up for 0.15 s, the loop still has the last of 40 tokens out in time."""
    client = await aiohttp_client(create_demo_app(LIBRARY, tokens_per_second=100))
    asyncio.get_running_loop().call_later(0.1, time.sleep, 0.15)
    came = await arrivals(client, max_tokens=40)
    assert 0.39 < came[-1] < 0.5


@pytest.mark.parametrize("pace", [0.0, -1.0, float("nan")])
def test_a_pace_must_be_above_zero(pace: float) -> None:
    with pytest.raises(ValueError, match="tokens_per_second"):
        create_demo_app(LIBRARY, tokens_per_second=pace)


class Watch:
    """Records how a handler ended: a middleware outside the application's own."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.how = ""

    async def __call__(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            self.how = "cancelled"
            raise
        else:
            self.how = "returned"
            return response
        finally:
            self.ended.set()


def watched(watch: Watch, *, tokens_per_second: float) -> web.Application:
    app = create_demo_app(LIBRARY, tokens_per_second=tokens_per_second)
    app.middlewares.insert(0, web.middleware(watch))
    return app


async def test_a_reader_that_leaves_ends_the_answer_at_once(
    aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Not at its next token, which is a quarter of an hour away; and nobody's leaving is worth a line in the log."""
    watch = Watch()
    client = await aiohttp_client(watched(watch, tokens_per_second=0.001))
    async with client.post(PATH, json=asking()) as response:
        assert b'"role":"assistant"' in await response.content.readline()
    async with asyncio.timeout(1):
        await watch.ended.wait()
    assert watch.how == "cancelled"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_write_that_meets_a_reset_leaves_no_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """A write may fail before the cancellation arrives: ConnectionError is how a reader says goodbye.

    Made certain by a runner that does not cancel: there a write is all that notices.
    """
    watch = Watch()
    runner = web.AppRunner(watched(watch, tokens_per_second=100), handler_cancellation=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        _, writer = await asyncio.open_connection(*runner.addresses[0])
        linger_zero = struct.pack("ii", 1, 0)  # close with RST
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_zero)
        body = json.dumps(asking()).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await asyncio.sleep(0.05)
        writer.transport.abort()
        async with asyncio.timeout(1):
            await watch.ended.wait()
        await asyncio.sleep(0)  # what escapes a handler is logged once it has ended
    finally:
        await runner.cleanup()
    assert watch.how == "returned"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# The context manager


async def test_the_demo_model_serves_the_project_s_documents_while_it_is_open(tmp_path: Path) -> None:
    """On a loopback port of its own, under the base URL that it gives; afterwards nobody listens there."""
    for name, text in MANUAL.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    async with ClientSession() as session:
        async with demo_model(tmp_path, tokens_per_second=1e6) as base_url:
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", base_url)
            async with session.post(f"{base_url}/chat/completions", json=asking()) as response:
                assert spoken(events(await response.text())) == ANSWER
        with pytest.raises(ClientConnectionError):
            await session.get(f"{base_url}/models")


async def test_a_reader_that_leaves_the_demo_model_is_not_waited_for(tmp_path: Path) -> None:
    """Its answer was cancelled with it, so nothing is left that a shutdown would have to cut."""
    loop = asyncio.get_running_loop()
    async with ClientSession() as session:
        async with demo_model(tmp_path, tokens_per_second=0.001) as base_url:
            async with session.post(f"{base_url}/chat/completions", json=asking()) as response:
                await response.content.readline()
            await asyncio.sleep(0.1)
            closing_at = loop.time()
        assert loop.time() - closing_at < 0.5


async def test_the_demo_model_ends_within_seconds_though_a_stream_is_open(tmp_path: Path) -> None:
    async with ClientSession() as session:
        loop = asyncio.get_running_loop()
        async with demo_model(tmp_path, tokens_per_second=0.001) as base_url:
            response = await session.post(f"{base_url}/chat/completions", json=asking())
            await response.content.readline()
            closing_at = loop.time()
        assert loop.time() - closing_at < 3
        response.close()


def test_missing_documents_are_no_error(tmp_path: Path) -> None:
    """Nor one that cannot be read or is not UTF-8: the demo tells what it can, the most important first."""
    (tmp_path / "CONTRIBUTING.md").write_bytes(b"# A\n\ncaf\xe9")
    (tmp_path / "CHANGELOG.md").mkdir()
    (tmp_path / "README.md").write_text("# B", encoding="utf-8")
    assert list(read_documents(tmp_path).items()) == [("README.md", "# B"), ("CONTRIBUTING.md", "# A\n\ncaf\ufffd")]
    assert read_documents(tmp_path / "nowhere") == {}
    assert DOCUMENTS == ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
