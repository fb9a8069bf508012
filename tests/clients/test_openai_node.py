"""The ``openai`` package for Node, with nothing changed but its base URL (contract, section 5).

``js/openai.mjs`` asks and tells what came of it; what the upstream says, and what it is asked, is looked at here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any, Protocol

import pytest

from tests.clients.conftest import RunJs, StartJs
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


def _body(**options: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": QUESTION, "stream": True} | options


class Ask(Protocol):
    def __call__(
        self, server: InProcess, *, how: str = "create", retries: int = 0, person: bool = False, **options: Any
    ) -> Awaitable[dict[str, Any]]: ...


@pytest.fixture
def ask(run_js: RunJs) -> Ask:
    """``await ask(server, …)`` asks once, with those fields in the request, and returns what the client saw."""

    async def run(
        server: InProcess, *, how: str = "create", retries: int = 0, person: bool = False, **options: Any
    ) -> dict[str, Any]:
        body = _body(**options)
        return await run_js("openai.mjs", url=server.url, body=body, how=how, retries=retries, person=person)

    return run


def _text(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


# ---- answers


async def test_a_stream_brings_every_chunk_as_the_upstream_sent_it(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask
) -> None:
    """Each field of each, those that Sluice does not know too, in order."""
    upstream.script = replies(GREETING)
    seen = await ask(await serve())
    assert "error" not in seen
    assert seen["chunks"] == GREETING.chunks(usage=False)
    assert _text(seen["chunks"]) == GREETING.message["content"]


async def test_an_answer_in_one_piece_is_what_the_upstream_sent(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask
) -> None:
    upstream.script = replies(GREETING)
    assert (await ask(await serve(), stream=False))["completion"] == GREETING.completion


@pytest.mark.parametrize("stream", [True, False])
async def test_the_request_passes_with_our_key_instead_of_theirs(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask, stream: bool
) -> None:
    upstream.script = replies(GREETING)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}
    given = _body(
        messages=[{"role": "user", "content": [{"type": "text", "text": "What is this? 😀"}, image]}],
        stream=stream,
        seed=7,
        stop=["\n\n", "END"],
        max_completion_tokens=17,
        top_k=5,
    )
    assert "error" not in await ask(await serve(LLM_API_KEY=OUR_KEY), **given)
    call = await upstream.called()
    assert {name: call.json.get(name, False) for name in given} == given  # not streamed is what is not asked for
    assert call.headers["Authorization"] == f"Bearer {OUR_KEY}"


async def test_tool_calls_come_in_their_pieces(serve: Serve, upstream: ScriptedUpstream, ask: Ask) -> None:
    """An answer without a word of content is one all the same."""
    upstream.script = replies(TOOL_CALL)
    seen = await ask(await serve(), how="helper", tools=[TOOL], tool_choice="required")
    assert "error" not in seen
    assert seen["chunks"] == TOOL_CALL.chunks(usage=False)
    (choice,) = seen["completion"]["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (called,) = choice["message"]["tool_calls"]
    assert called["function"]["arguments"] == '{"city": "München"}'
    call = await upstream.called()
    assert call.json["tools"] == [TOOL]
    assert call.json["tool_choice"] == "required"


@pytest.mark.parametrize("stream", [True, False])
async def test_structured_output_is_parsed_into_its_schema(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask, stream: bool
) -> None:
    upstream.script = replies(STRUCTURED)
    seen = await ask(await serve(), how="helper", person=True, stream=stream)
    assert "error" not in seen
    assert seen["completion"]["choices"][0]["message"]["parsed"] == {"name": "Ada", "year": 1815}
    asked = (await upstream.called()).json["response_format"]
    assert asked["type"] == "json_schema"
    assert asked["json_schema"]["strict"] is True


@pytest.mark.parametrize("stream", [True, False])
async def test_a_model_that_refuses_is_heard(serve: Serve, upstream: ScriptedUpstream, ask: Ask, stream: bool) -> None:
    """What it says instead of the structured output stands in a field of its own."""
    upstream.script = replies(REFUSAL)
    seen = await ask(await serve(), how="helper", person=True, stream=stream)
    assert "error" not in seen
    assert seen["completion"]["choices"][0]["message"]["refusal"] == "I cannot do that."


async def test_a_response_format_reaches_the_upstream_untouched(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask
) -> None:
    upstream.script = replies(STRUCTURED)
    given = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    seen = await ask(await serve(), response_format=given)
    assert json.loads(_text(seen["chunks"])) == {"name": "Ada", "year": 1815}
    assert (await upstream.called()).json["response_format"] == given


async def test_usage_comes_to_those_who_ask_for_it(serve: Serve, upstream: ScriptedUpstream, ask: Ask) -> None:
    """As one more chunk, without choices, before the end."""
    upstream.script = replies(GREETING)
    seen = await ask(await serve(), stream_options={"include_usage": True})
    assert seen["chunks"] == GREETING.chunks(usage=True)
    assert seen["chunks"][-1]["choices"] == []
    assert seen["chunks"][-1]["usage"] == USAGE


async def test_nobody_else_sees_a_chunk_without_choices(serve: Serve, upstream: ScriptedUpstream, ask: Ask) -> None:
    """``chunk.choices[0]`` is what many programs write, and it holds, even where tokens are counted for a limit."""
    upstream.script = replies(GREETING)
    seen = await ask(await serve(SLUICE_TOKEN_LIMIT="1000/60"))
    assert all(chunk["choices"] for chunk in seen["chunks"])
    assert not any(chunk.get("usage") for chunk in seen["chunks"])


async def test_the_models_are_those_that_may_be_asked_for(serve: Serve, upstream: ScriptedUpstream, ask: Ask) -> None:
    seen = await ask(await serve(LLM_MODEL="llama3.2"), how="models")
    assert [(model["id"], model["object"]) for model in seen["models"]] == [("llama3.2", "model")]
    assert upstream.calls == []


@pytest.mark.parametrize("stream", [True, False])
async def test_the_request_id_is_the_upstreams(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask, stream: bool
) -> None:
    """The one that its support asks for; and nothing says who pays."""
    upstream.script = replies(GREETING)
    seen = await ask(await serve(), stream=stream)
    assert seen["requestId"] == REQUEST_ID
    assert ACCOUNT not in str(seen["headers"])


# ---- silence


async def test_heartbeats_in_silence_are_no_events(serve: Serve, upstream: ScriptedUpstream, ask: Ask) -> None:
    upstream.script = replies(greeting("Hel", "lo"), gap=0.5)
    seen = await ask(await serve(SLUICE_HEARTBEAT="0.2"))
    assert "error" not in seen
    assert seen["chunks"] == greeting("Hel", "lo").chunks(usage=False)


# ---- refusals


async def test_the_upstreams_refusal_is_the_sdks_own_exception(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask
) -> None:
    """With its error object, and its request id."""
    upstream.script = refuses(400, UNSUPPORTED)
    error = (await ask(await serve(), temperature=3))["error"]
    assert error["name"] == "BadRequestError"
    assert error["body"] == UNSUPPORTED
    assert error["requestID"] == REQUEST_ID


@pytest.mark.parametrize("stream", [True, False])
async def test_a_model_outside_the_list_is_not_found(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask, stream: bool
) -> None:
    error = (await ask(await serve(), model="o1-pro", stream=stream))["error"]
    assert (error["name"], error["code"]) == ("NotFoundError", "model_not_found")
    assert upstream.calls == []


async def test_more_than_one_choice_is_a_bad_request(serve: Serve, upstream: ScriptedUpstream, ask: Ask) -> None:
    error = (await ask(await serve(), n=2))["error"]
    assert (error["name"], error["type"], error["param"]) == ("BadRequestError", "invalid_request_error", "n")
    assert upstream.calls == []


async def test_our_own_rate_limit_is_a_rate_limit_to_the_sdk(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask
) -> None:
    server = await serve(SLUICE_RATE_LIMIT="1/600")
    assert "error" not in await ask(server)
    error = (await ask(server))["error"]
    assert (error["name"], error["code"]) == ("RateLimitError", "rate_limit_exceeded")
    assert 1 <= int(error["headers"]["retry-after"]) <= 600
    assert len(upstream.calls) == 1


async def test_the_upstreams_rate_limit_passes_with_its_retry_after(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask
) -> None:
    said = {"message": "Slow down.", "type": "requests", "param": None, "code": "rate_limit_exceeded"}
    upstream.script = refuses(429, said, Retry_After="7")
    error = (await ask(await serve(SLUICE_RETRIES="0")))["error"]
    assert (error["name"], error["body"]) == ("RateLimitError", said)
    assert error["headers"]["retry-after"] == "7"


@pytest.mark.parametrize("status", [401, 403])
async def test_what_is_wrong_with_our_key_is_our_own_affair(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask, status: int
) -> None:
    """A client whose own key is as good as any is not told that it is wrong, nor what ours is like."""
    upstream.script = refuses(status, WRONG_KEY)
    error = (await ask(await serve(LLM_API_KEY=OUR_KEY)))["error"]
    assert (error["name"], error["status"]) == ("InternalServerError", 502)
    assert error["code"] != "invalid_api_key"
    for secret in (OUR_KEY[:8], OUR_KEY[-4:], ACCOUNT, upstream.base_url, str(upstream.port)):
        assert secret not in json.dumps(error)


async def test_an_upstream_that_is_not_there_is_an_error_of_the_server(serve: Serve, ask: Ask) -> None:
    port = free_port()
    error = (await ask(await serve(LLM_BASE_URL=f"http://127.0.0.1:{port}/v1", SLUICE_RETRIES="0")))["error"]
    assert error["name"] == "InternalServerError"
    assert error["code"] == "upstream_unreachable"
    assert str(port) not in json.dumps(error)


# ---- failures half-way


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_failure_after_the_first_token_is_raised_where_it_is_read(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask, failure: str
) -> None:
    """What came before it stands, and a cut answer never looks complete."""
    upstream.script = FAILURES[failure]
    seen = await ask(await serve(SLUICE_IDLE_TIMEOUT="0.5"), retries=2)
    assert _text(seen["chunks"]) == "Hel"
    error = seen["error"]
    assert error["name"] == "APIError"  # no broken connection: it was told
    assert set(error["body"]) == {"message", "type", "param", "code"}
    assert error["body"]["message"]
    assert len(upstream.calls) == 1


# ---- trying again


async def test_a_rate_limit_is_waited_out_by_the_sdk(serve: Serve, upstream: ScriptedUpstream, ask: Ask) -> None:
    """It reads the Retry-After that we pass on; Sluice itself tries once."""
    scripts = iter([refuses(429, Retry_After="1"), replies(GREETING)])
    upstream.script = lambda call: next(scripts)(call)
    seen = await ask(await serve(SLUICE_RETRIES="0"), retries=2)
    assert _text(seen["chunks"]) == GREETING.message["content"]
    first, second = upstream.calls
    assert second.began_at - first.began_at >= 0.9


async def test_an_upstream_that_forbids_to_try_again_is_obeyed(
    serve: Serve, upstream: ScriptedUpstream, ask: Ask
) -> None:
    """``x-should-retry: false``, which OpenAI sends where another try would be in vain."""
    upstream.script = refuses(429, Retry_After="1", x_should_retry="false")
    seen = await ask(await serve(SLUICE_RETRIES="0"), retries=2)
    assert seen["error"]["name"] == "RateLimitError"
    assert len(upstream.calls) == 1


# ---- leaving


@pytest.mark.parametrize(
    ("leaves", "script"), [("after a chunk", never_ends), ("before one", says_nothing)], ids=["reading", "waiting"]
)
async def test_who_leaves_closes_the_upstream_request(
    serve: Serve, upstream: ScriptedUpstream, start_js: StartJs, leaves: str, script: Any
) -> None:
    upstream.script = script
    server = await serve(SLUICE_RESUME_GRACE="60")
    async with start_js("openai.mjs", url=server.url, body=_body(), leaves=leaves) as client:
        seen = await client.says()
        assert seen.get("error", {}).get("name") == {"after a chunk": None, "before one": "APIUserAbortError"}[leaves]
        call = await upstream.called()
        await asyncio.wait_for(call.gone(), GONE_S)
    assert len(upstream.calls) == 1
