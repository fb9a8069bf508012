"""The ``openai`` package for Python, with nothing changed but its base URL (contract, section 5)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any, Protocol

import openai
import pytest
from openai import AsyncOpenAI, AsyncStream, OpenAI
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from tests.clients.openai_upstream import (
    ACCOUNT,
    FAILURES,
    GONE_S,
    GREETING,
    MODEL,
    OUR_KEY,
    QUESTION,
    REFUSAL,
    REQUEST_ID,
    SCHEMA,
    STRUCTURED,
    TOOL,
    TOOL_CALL,
    UNSUPPORTED,
    USAGE,
    WRONG_KEY,
    greeting,
    never_ends,
    refuses,
    replies,
    says_nothing,
)
from tests.conftest import InProcess, Serve
from tests.sluice_process import free_port
from tests.upstream_sim import ScriptedUpstream

PATIENCE_S = 20.0  # for the next byte: a test that waits for ever tells less than one that fails


class ClientOf(Protocol):
    def __call__(self, server: InProcess, *, max_retries: int = 0) -> AsyncOpenAI: ...


@pytest.fixture
async def client_of(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ClientOf]:
    """``client_of(server)`` is OpenAI's client for it; it does not try again by itself unless it is told to."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with contextlib.AsyncExitStack() as stack:

        def client(server: InProcess, *, max_retries: int = 0) -> AsyncOpenAI:
            opened = AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key="anything", max_retries=max_retries, timeout=PATIENCE_S
            )
            stack.push_async_callback(opened.close)
            return opened

        yield client


async def _ask(client: AsyncOpenAI, **options: Any) -> AsyncStream[ChatCompletionChunk]:
    stream: AsyncStream[ChatCompletionChunk] = await client.chat.completions.create(
        **{"model": MODEL, "messages": QUESTION, "stream": True} | options
    )
    return stream


async def _refused(client: AsyncOpenAI, **options: Any) -> openai.APIStatusError:
    """Ask, and return the error that came instead of an answer."""
    with pytest.raises(openai.APIStatusError) as caught:
        await _ask(client, **options)
    return caught.value


async def _read(stream: AsyncStream[ChatCompletionChunk], chunks: list[ChatCompletionChunk]) -> None:
    """Read into ``chunks``, which has them even if the reading ends in an error."""
    async for one in stream:
        chunks.append(one)  # noqa: PERF401


def _text(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# ---- answers


async def test_a_stream_brings_every_chunk_as_the_upstream_sent_it(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    """Each field of each, those that Sluice does not know too, in order."""
    upstream.script = replies(GREETING)
    chunks = [chunk async for chunk in await _ask(client_of(await serve()))]
    assert [chunk.to_dict() for chunk in chunks] == GREETING.chunks(usage=False)
    assert _text(chunks) == GREETING.message["content"]


async def test_the_blocking_client_streams_too(serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf) -> None:
    upstream.script = replies(GREETING)
    server = await serve()

    def read() -> list[ChatCompletionChunk]:
        with (
            OpenAI(base_url=f"{server.url}/v1", api_key="anything", max_retries=0, timeout=PATIENCE_S) as client,
            client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True) as stream,
        ):
            return list(stream)

    chunks = await asyncio.to_thread(read)
    assert [chunk.to_dict() for chunk in chunks] == GREETING.chunks(usage=False)


async def test_an_answer_in_one_piece_is_what_the_upstream_sent(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    upstream.script = replies(GREETING)
    client = client_of(await serve())
    completion = await client.chat.completions.create(model=MODEL, messages=QUESTION)
    assert completion.to_dict() == GREETING.completion


@pytest.mark.parametrize("stream", [True, False])
async def test_the_request_passes_with_our_key_instead_of_theirs(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf, stream: bool
) -> None:
    """Images, sampling, what the SDK does not know: all as it was given, and Sluice's own key before it."""
    upstream.script = replies(GREETING)
    client = client_of(await serve(LLM_API_KEY=OUR_KEY))
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}
    given: dict[str, Any] = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is this? 😀"}, image]},
        ],
        "temperature": 1.5,
        "top_p": 0.25,
        "seed": 7,
        "stop": ["\n\n", "END"],
        "logprobs": True,
        "logit_bias": {"50256": -100},
        "metadata": {"ticket": "42"},
        "max_tokens": 17,
    }
    given["stream"] = stream
    answered: Any = await client.chat.completions.create(model=MODEL, extra_body={"top_k": 5}, **given)
    if stream:
        await _read(answered, [])
    call = await upstream.called()
    assert {name: call.json.get(name, False) for name in given} == given  # not streamed is what is not asked for
    assert call.json["top_k"] == 5
    assert call.json["model"] == MODEL
    assert call.headers["Authorization"] == f"Bearer {OUR_KEY}"


async def test_tool_calls_come_in_their_pieces(serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf) -> None:
    """An answer without a word of content is one all the same."""
    upstream.script = replies(TOOL_CALL)
    client = client_of(await serve())
    async with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        events = [event async for event in stream]
        completion = await stream.get_final_completion()
    chunks = [event.chunk.to_dict() for event in events if event.type == "chunk"]
    assert chunks == TOOL_CALL.chunks(usage=False)
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert (done.name, done.arguments) == ("weather", '{"city": "München"}')
    assert completion.choices[0].finish_reason == "tool_calls"
    call = await upstream.called()
    assert call.json["tools"] == [TOOL]
    assert call.json["tool_choice"] == "required"
    assert call.json["parallel_tool_calls"] is False


class Person(BaseModel):
    name: str
    year: int


@pytest.mark.parametrize("stream", [True, False])
async def test_structured_output_is_parsed_into_its_model(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf, stream: bool
) -> None:
    upstream.script = replies(STRUCTURED)
    completions = client_of(await serve()).chat.completions
    if stream:
        async with completions.stream(model=MODEL, messages=QUESTION, response_format=Person) as events:
            completion = await events.get_final_completion()
    else:
        completion = await completions.parse(model=MODEL, messages=QUESTION, response_format=Person)
    assert completion.choices[0].message.parsed == Person(name="Ada", year=1815)
    asked = (await upstream.called()).json["response_format"]
    assert asked["type"] == "json_schema"
    assert asked["json_schema"]["strict"] is True


@pytest.mark.parametrize("stream", [True, False])
async def test_a_model_that_refuses_is_heard(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf, stream: bool
) -> None:
    """What it says instead of the structured output stands in a field of its own."""
    upstream.script = replies(REFUSAL)
    completions = client_of(await serve()).chat.completions
    if stream:
        async with completions.stream(model=MODEL, messages=QUESTION, response_format=Person) as events:
            completion = await events.get_final_completion()
    else:
        completion = await completions.parse(model=MODEL, messages=QUESTION, response_format=Person)
    assert completion.choices[0].message.refusal == "I cannot do that."
    assert completion.choices[0].message.parsed is None


async def test_a_response_format_reaches_the_upstream_untouched(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    upstream.script = replies(STRUCTURED)
    given = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    chunks = [chunk async for chunk in await _ask(client_of(await serve()), response_format=given)]
    assert json.loads(_text(chunks)) == {"name": "Ada", "year": 1815}
    assert (await upstream.called()).json["response_format"] == given


async def test_usage_comes_to_those_who_ask_for_it(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    """As one more chunk, without choices, before the end."""
    upstream.script = replies(GREETING)
    stream = await _ask(client_of(await serve()), stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert [chunk.to_dict() for chunk in chunks] == GREETING.chunks(usage=True)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.to_dict() == USAGE


async def test_nobody_else_sees_a_chunk_without_choices(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    """``chunk.choices[0]`` is what many programs write, and it holds, even where tokens are counted for a limit."""
    upstream.script = replies(GREETING)
    server = await serve(SLUICE_TOKEN_LIMIT="1000/60")
    chunks = [chunk async for chunk in await _ask(client_of(server))]
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_the_models_are_those_that_may_be_asked_for(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    models = [model async for model in client_of(await serve(LLM_MODEL="llama3.2")).models.list()]
    assert [(model.id, model.object) for model in models] == [("llama3.2", "model")]
    assert upstream.calls == []


@pytest.mark.parametrize("stream", [True, False])
async def test_the_request_id_is_the_upstreams(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf, stream: bool
) -> None:
    """The one that its support asks for; and nothing says who pays."""
    upstream.script = replies(GREETING)
    completions = client_of(await serve()).chat.completions
    if stream:
        answered = await completions.create(model=MODEL, messages=QUESTION, stream=True)
        await _read(answered, [])
        assert answered.response.headers["x-request-id"] == REQUEST_ID
        assert ACCOUNT not in str(answered.response.headers)
    else:
        completion = await completions.create(model=MODEL, messages=QUESTION)
        assert completion._request_id == REQUEST_ID


# ---- silence


async def test_heartbeats_in_silence_are_no_events(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    upstream.script = replies(greeting("Hel", "lo"), gap=0.5)
    client = client_of(await serve(SLUICE_HEARTBEAT="0.2"))
    chunks = [chunk async for chunk in await _ask(client)]
    assert [chunk.to_dict() for chunk in chunks] == greeting("Hel", "lo").chunks(usage=False)


async def test_a_heartbeat_is_a_comment_of_one_line_between_two_events(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    """A blank line behind it would make it a block of its own, on which this client chokes; all else is ``data:``."""
    upstream.script = replies(greeting("Hel", "lo"), gap=0.5)
    completions = client_of(await serve(SLUICE_HEARTBEAT="0.2")).chat.completions
    async with completions.with_streaming_response.create(model=MODEL, messages=QUESTION, stream=True) as response:
        sent = b"".join([piece async for piece in response.iter_bytes()])
    assert sent.endswith(b"\n\n")
    blocks = sent.removesuffix(b"\n\n").split(b"\n\n")
    assert [block for block in blocks if not re.fullmatch(rb"(?::[^\n]*\n)*data: ?[^\n]*", block)] == []
    assert len(re.findall(rb"^:", sent, re.MULTILINE)) >= 3
    assert blocks[-1].endswith(b"data: [DONE]")


# ---- refusals


async def test_the_upstreams_refusal_is_the_sdks_own_exception(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    """With its error object, and its request id."""
    upstream.script = refuses(400, UNSUPPORTED)
    refusal = await _refused(client_of(await serve()), temperature=3)
    assert isinstance(refusal, openai.BadRequestError)
    assert refusal.body == UNSUPPORTED
    assert (refusal.type, refusal.param, refusal.code) == ("invalid_request_error", "temperature", "unsupported_value")
    assert refusal.request_id == REQUEST_ID


@pytest.mark.parametrize("stream", [True, False])
async def test_a_model_outside_the_list_is_not_found(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf, stream: bool
) -> None:
    refusal = await _refused(client_of(await serve()), model="o1-pro", stream=stream)
    assert isinstance(refusal, openai.NotFoundError)
    assert refusal.code == "model_not_found"
    assert upstream.calls == []


async def test_more_than_one_choice_is_a_bad_request(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    refusal = await _refused(client_of(await serve()), n=2)
    assert isinstance(refusal, openai.BadRequestError)
    assert (refusal.type, refusal.param) == ("invalid_request_error", "n")
    assert upstream.calls == []


async def test_our_own_rate_limit_is_a_rate_limit_to_the_sdk(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    client = client_of(await serve(SLUICE_RATE_LIMIT="1/60"))
    await _read(await _ask(client), [])
    refusal = await _refused(client)
    assert isinstance(refusal, openai.RateLimitError)
    assert refusal.code == "rate_limit_exceeded"
    assert 1 <= int(refusal.response.headers["retry-after"]) <= 60
    assert len(upstream.calls) == 1


async def test_the_upstreams_rate_limit_passes_with_its_retry_after(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    """Without the name of the account that it was reached for."""
    error = {
        "message": f"Rate limit reached for {MODEL} in organization {ACCOUNT} on requests per min (RPM): Limit 3.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    upstream.script = refuses(429, error, Retry_After="7")
    refusal = await _refused(client_of(await serve(SLUICE_RETRIES="0")))
    assert isinstance(refusal, openai.RateLimitError)
    assert (refusal.type, refusal.code) == ("requests", "rate_limit_exceeded")
    assert refusal.response.headers["retry-after"] == "7"
    assert "Rate limit reached" in refusal.message
    assert ACCOUNT not in f"{refusal} {refusal.body} {refusal.response.headers}"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [401, 403])
async def test_what_is_wrong_with_our_key_is_our_own_affair(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf, status: int, stream: bool
) -> None:
    """A client whose own key is as good as any is not told that it is wrong, nor what ours is like."""
    upstream.script = refuses(status, WRONG_KEY)
    refusal = await _refused(client_of(await serve(LLM_API_KEY=OUR_KEY)), stream=stream)
    assert isinstance(refusal, openai.InternalServerError)
    assert refusal.status_code == 502
    said = f"{refusal} {refusal.body} {refusal.response.headers}"
    assert refusal.code != "invalid_api_key"
    for secret in (OUR_KEY[:8], OUR_KEY[-4:], ACCOUNT, upstream.base_url, str(upstream.port)):
        assert secret not in said


@pytest.mark.parametrize("stream", [True, False])
async def test_an_upstream_that_is_not_there_is_an_error_of_the_server(
    serve: Serve, client_of: ClientOf, stream: bool
) -> None:
    port = free_port()
    server = await serve(LLM_BASE_URL=f"http://127.0.0.1:{port}/v1", SLUICE_RETRIES="0")
    refusal = await _refused(client_of(server), stream=stream)
    assert isinstance(refusal, openai.InternalServerError)
    assert refusal.status_code in {502, 503, 504}
    assert refusal.code == "upstream_unreachable"
    assert str(port) not in f"{refusal} {refusal.body}"


# ---- failures half-way


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_failure_after_the_first_token_is_raised_where_it_is_read(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf, failure: str
) -> None:
    """What came before it stands, and a cut answer never looks complete."""
    upstream.script = FAILURES[failure]
    stream = await _ask(client_of(await serve(SLUICE_IDLE_TIMEOUT="0.5"), max_retries=2))
    chunks: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError) as caught:
        await _read(stream, chunks)
    assert _text(chunks) == "Hel"
    assert type(caught.value) is openai.APIError  # no broken connection: it was told
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.message
    assert len(upstream.calls) == 1


# ---- trying again


async def test_a_rate_limit_is_waited_out_by_the_sdk(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    """It reads the Retry-After that we pass on; Sluice itself tries once."""
    scripts = iter([refuses(429, Retry_After="1"), replies(GREETING)])
    upstream.script = lambda call: next(scripts)(call)
    client = client_of(await serve(SLUICE_RETRIES="0"), max_retries=2)
    chunks = [chunk async for chunk in await _ask(client)]
    assert _text(chunks) == GREETING.message["content"]
    first, second = upstream.calls
    assert second.began_at - first.began_at >= 0.9


async def test_our_own_rate_limit_is_waited_out_too(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    client = client_of(await serve(SLUICE_RATE_LIMIT="1/1"), max_retries=2)
    for _ in range(2):
        chunks = [chunk async for chunk in await _ask(client)]
        assert _text(chunks) == "Hello"
    assert len(upstream.calls) == 2


async def test_an_upstream_that_forbids_to_try_again_is_obeyed(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    """``x-should-retry: false``, which OpenAI sends where another try would be in vain."""
    upstream.script = refuses(429, Retry_After="1", x_should_retry="false")
    client = client_of(await serve(SLUICE_RETRIES="0"), max_retries=2)
    assert isinstance(await _refused(client), openai.RateLimitError)
    assert len(upstream.calls) == 1


# ---- leaving


async def test_closing_the_stream_closes_the_upstream_request(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    upstream.script = never_ends
    stream = await _ask(client_of(await serve(SLUICE_RESUME_GRACE="60")))
    await anext(stream)
    await stream.close()
    call = await upstream.called()
    await asyncio.wait_for(call.gone(), GONE_S)


async def test_leaving_the_blocking_client_closes_the_upstream_request(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf
) -> None:
    upstream.script = never_ends
    server = await serve(SLUICE_RESUME_GRACE="60")
    with OpenAI(base_url=f"{server.url}/v1", api_key="anything", max_retries=0, timeout=PATIENCE_S) as client:

        def read_one() -> None:
            with client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True) as stream:
                next(stream)

        await asyncio.to_thread(read_one)
        call = await upstream.called()
        await asyncio.wait_for(call.gone(), GONE_S)


@pytest.mark.parametrize("stream", [True, False])
async def test_giving_up_before_the_first_token_closes_the_upstream_request(
    serve: Serve, upstream: ScriptedUpstream, client_of: ClientOf, stream: bool
) -> None:
    upstream.script = says_nothing
    asking = asyncio.create_task(_ask(client_of(await serve(SLUICE_RESUME_GRACE="60")), stream=stream))
    call = await upstream.called()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(call.gone(), GONE_S)
    assert len(upstream.calls) == 1
