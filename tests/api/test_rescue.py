"""``SLUICE_RESCUE=continue``: an answer that its upstream dropped half-way is finished by the next one (section 2)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.api.conftest import Connect, Settled
from tests.api.raw_client import LEAVING, post, request
from tests.conftest import InProcess, Serve
from tests.upstream_sim import Call, Script, ScriptedUpstream, chunk

WORDS = [f"word{number} " for number in range(12)]
TEXT = "".join(WORDS)
BROKEN_AT = 7  # words

FACES = ["browser", "chat", "completion"]
every_face = pytest.mark.parametrize("face", FACES)


def model_of(call: Call) -> str:
    return str(call.json["model"])


async def say(call: Call, words: list[str]) -> None:
    await call.head()
    await call.event(chunk({"role": "assistant", "content": ""}, model=model_of(call)))
    for word in words:
        await call.event(chunk({"content": word}, model=model_of(call)))


async def end(call: Call) -> None:
    await call.event(chunk({}, "stop", model=model_of(call)))
    await call.event(chunk(model=model_of(call), usage={"prompt_tokens": 3, "completion_tokens": 5}))
    await call.done()


def breaking(how: str = "close") -> Script:
    async def script(call: Call) -> None:
        await say(call, WORDS[:BROKEN_AT])
        await asyncio.sleep(0.02)
        match how:
            case "close":
                call.close()
            case "reset":
                call.reset()
            case "error":
                await call.event({"error": {"message": "boom", "code": 500}})
            case _:
                await call.gone()

    return script


async def going_on(call: Call) -> None:
    """A rescuer that takes the last message for the beginning of its own answer."""
    *_, last = call.json["messages"]
    said = last["content"] if last["role"] == "assistant" else ""
    await say(call, [f"{word} " for word in TEXT.removeprefix(said).split()])
    await end(call)


async def beginning_anew(call: Call) -> None:
    await say(call, WORDS)
    await end(call)


async def refusing_prefill(call: Call) -> None:
    if call.json["messages"][-1]["role"] == "assistant":
        await call.refuse(400, {"message": "no prefill", "type": "x", "param": None, "code": "invalid_prefill"})
    else:
        await beginning_anew(call)


async def saying_something_else(call: Call) -> None:
    if call.json["messages"][-1]["role"] == "assistant":
        await call.refuse(400)
    else:
        await say(call, ["quite ", "another ", "answer"])
        await end(call)


@pytest.fixture
async def second() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as scripted:
        yield scripted


async def open_server(serve: Serve, second: ScriptedUpstream, **environment: str) -> InProcess:
    settings = {
        "SLUICE_RESCUE": "continue",
        "SLUICE_RATE_LIMIT": "off",
        "SLUICE_IDLE_TIMEOUT": "0.3",
        "SLUICE_RETRIES": "0",
        "LLM_MODEL": "first",
        "SLUICE_FALLBACKS": json.dumps([{"base_url": second.base_url, "model": "second"}]),
    }
    return await serve(**settings | environment)


def ask(face: str) -> bytes:
    match face:
        case "browser":
            return request("/api/stream?q=hi")
        case "chat":
            message = {"id": "u", "role": "user", "parts": [{"type": "text", "text": "hi"}]}
            return post(json.dumps({"id": "c", "messages": [message]}).encode(), target="/api/chat")
        case _:
            body = {"model": "first", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
            return post(json.dumps(body).encode(), target="/v1/chat/completions")


def text_of(face: str, body: bytes) -> str:
    """What the client has read."""
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: {")]
    values: list[Any] = [json.loads(line) for line in lines]
    match face:
        case "browser":
            return "".join(value.get("token", "") for value in values)
        case "chat":
            return "".join(value.get("delta", "") for value in values)
        case _:
            deltas = [choice["delta"] for value in values for choice in value.get("choices", ())]
            return "".join(delta.get("content") or "" for delta in deltas)


@every_face
@pytest.mark.parametrize("how", ["close", "reset", "error", "silence"])
@pytest.mark.parametrize("rescuer", [going_on, beginning_anew, refusing_prefill], ids=lambda script: script.__name__)
async def test_an_answer_that_breaks_off_is_finished_by_the_next_upstream(
    serve: Serve,
    upstream: ScriptedUpstream,
    second: ScriptedUpstream,
    connect: Connect,
    settled: Settled,
    face: str,
    how: str,
    rescuer: Script,
) -> None:
    """Nothing is said twice, nothing is missing; FailoverBench's cut, stall, and fallback that takes no prefill."""
    upstream.script, second.script = breaking(how), rescuer
    server = await open_server(serve, second)
    response = await (await connect(server)).ask(ask(face))
    assert text_of(face, response.body) == TEXT
    assert response.body.rstrip().endswith(b"[DONE]")
    assert second.calls[0].json["messages"][-1] == {"role": "assistant", "content": "".join(WORDS[:BROKEN_AT])}
    assert second.calls[0].json["max_tokens"] == 800 - BROKEN_AT
    assert len(upstream.calls) == 1
    await settled(server)


async def test_the_model_that_finished_it_is_named(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream, connect: Connect
) -> None:
    """``usage``: MODEL is the one that really answered; K counts what the client read."""
    upstream.script, second.script = breaking(), going_on
    server = await open_server(serve, second)
    body = (await (await connect(server)).ask(ask("browser"))).body
    usage = json.loads(body.partition(b"event: usage")[2].partition(b"data: ")[2].partition(b"\n")[0])
    assert (usage["model"], usage["tokens"], usage["finish_reason"]) == ("second", 12, "stop")


@every_face
@pytest.mark.parametrize("rescuer", [saying_something_else, breaking()], ids=["another answer", "breaks too"])
async def test_what_cannot_be_finished_is_told_to_be_broken(
    serve: Serve,
    upstream: ScriptedUpstream,
    second: ScriptedUpstream,
    connect: Connect,
    settled: Settled,
    face: str,
    rescuer: Script,
) -> None:
    """The failure is the first one: what the client read is not rewritten, and never looks complete."""
    upstream.script, second.script = breaking(), rescuer
    server = await open_server(serve, second)
    response = await (await connect(server)).ask(ask(face))
    assert text_of(face, response.body) == "".join(WORDS[:BROKEN_AT])
    assert b"[DONE]" not in response.body
    assert b"cut before its end" in response.body
    await settled(server)


@every_face
async def test_without_it_a_broken_answer_is_an_error(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream, connect: Connect, face: str
) -> None:
    """It is off by default: what finishes an answer is another model."""
    upstream.script, second.script = breaking(), going_on
    server = await open_server(serve, second, SLUICE_RESCUE="off")
    response = await (await connect(server)).ask(ask(face))
    assert b"[DONE]" not in response.body
    assert second.calls == []


@pytest.mark.parametrize("how", LEAVING)
async def test_a_client_that_leaves_closes_the_rescuers_request_too(
    serve: Serve,
    upstream: ScriptedUpstream,
    second: ScriptedUpstream,
    connect: Connect,
    settled: Settled,
    how: str,
) -> None:
    async def silent(call: Call) -> None:
        await call.gone()

    upstream.script, second.script = breaking(), silent
    server = await open_server(serve, second)
    client = await connect(server)
    await client.send(ask("completion"))
    call = await second.called()
    LEAVING[how](client)
    async with asyncio.timeout(2):
        await call.gone()
    await settled(server)
