"""The upstream as OpenAI itself answers: streamed or whole, as it was asked, with its request id and its usage."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.upstream_sim import Call, Script, chunk

__all__ = [
    "ACCOUNT",
    "FAILURES",
    "GONE_S",
    "GREETING",
    "MODEL",
    "OUR_KEY",
    "QUESTION",
    "REFUSAL",
    "REQUEST_ID",
    "SCHEMA",
    "STRUCTURED",
    "TOOL",
    "TOOL_CALL",
    "UNSUPPORTED",
    "USAGE",
    "WRONG_KEY",
    "Reply",
    "greeting",
    "never_ends",
    "refuses",
    "replies",
    "says_nothing",
]

MODEL = "gpt-4o-mini"  # the one that Sluice asks for unless told otherwise
REQUEST_ID = "req_8f14e45fceea167a5a36dedd4bea2543"
ACCOUNT = "org-a1B2c3D4e5F6g7H8"  # the organization that pays, which OpenAI names in headers and in some errors
OUR_KEY = "sk-proj-Sluice0123456789abcdefghij"
GONE_S = 5.0  # until an upstream call that nobody wants is closed, on a slow machine
QUESTION: Any = [{"role": "user", "content": "Why?"}]  # typed loosely: each client has a type of its own for it
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer, in the two forms that it can be asked for."""

    deltas: Sequence[dict[str, Any]]
    message: dict[str, Any]
    finish_reason: str = "stop"

    def chunks(self, *, usage: bool) -> list[dict[str, Any]]:
        """The chunks of the stream, with one for the usage at the end where ``stream_options`` asked for it."""
        role = {"role": "assistant", "content": "", "refusal": None}
        common: dict[str, Any] = {"system_fingerprint": "fp_44709d6fcb", "service_tier": "default"}
        if usage:
            common["usage"] = None
        chunks = [chunk(delta, **common, obfuscation="x7Yk" * n) for n, delta in enumerate([role, *self.deltas])]
        chunks.append(chunk({}, self.finish_reason, **common))
        if usage:
            chunks.append(chunk(**common | {"usage": USAGE}))
        return chunks

    @property
    def completion(self) -> dict[str, Any]:
        """The one object of an answer that is not streamed."""
        choice = {"index": 0, "message": self.message, "logprobs": None, "finish_reason": self.finish_reason}
        head = {"id": "c-1", "object": "chat.completion", "created": 1, "model": "sim", "choices": [choice]}
        return head | {"usage": USAGE, "system_fingerprint": "fp_44709d6fcb", "service_tier": "default"}


def greeting(*texts: str) -> Reply:
    message = {"role": "assistant", "content": "".join(texts), "refusal": None}
    return Reply(deltas=[{"content": text} for text in texts], message=message)


GREETING = greeting("Hel", "lo, ", "wörld 😀", "\n\n", "data: [DONE]\n\n", "\u2028", '"\\')

REFUSAL = Reply(
    deltas=[{"content": None, "refusal": text} for text in ("I can", "not do that.")],
    message={"role": "assistant", "content": None, "refusal": "I cannot do that."},
)

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is like.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
_ARGUMENTS = ['{"ci', 'ty": "Mün', 'chen"}']
_CALLED = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "".join(_ARGUMENTS)}}
TOOL_CALL = Reply(
    deltas=[
        {"tool_calls": [{"index": 0, **_CALLED, "function": {"name": "weather", "arguments": ""}}]},
        *[{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in _ARGUMENTS],
    ],
    message={"role": "assistant", "content": None, "refusal": None, "tool_calls": [_CALLED]},
    finish_reason="tool_calls",
)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "year": {"type": "integer"}},
    "required": ["name", "year"],
    "additionalProperties": False,
}
STRUCTURED = greeting('{"name": ', '"Ada", ', '"year": 1815}')


UNSUPPORTED = {
    "message": "Unsupported value: 'temperature' does not support 3 with this model.",
    "type": "invalid_request_error",
    "param": "temperature",
    "code": "unsupported_value",
}
WRONG_KEY = {
    "message": f"Incorrect API key provided: {OUR_KEY[:8]}****{OUR_KEY[-4:]}. Organization {ACCOUNT}.",
    "type": "invalid_request_error",
    "param": None,
    "code": "invalid_api_key",
}

_HEADERS = {"x_request_id": REQUEST_ID, "openai_organization": ACCOUNT}


def replies(reply: Reply, *, gap: float = 0.0) -> Script:
    """Answer so, the chunks ``gap`` seconds apart."""

    async def script(call: Call) -> None:
        if not call.json.get("stream"):
            body = json.dumps(reply.completion).encode()
            await call.head(200, "application/json", Content_Length=str(len(body)), **_HEADERS)
            call.ended = True
            await call.send(body)
            return
        await call.head(200, "text/event-stream", **_HEADERS)
        asked = call.json.get("stream_options") or {}
        for one in reply.chunks(usage=bool(asked.get("include_usage"))):
            await call.event(one)
            await asyncio.sleep(gap)
        await call.done()

    return script


def refuses(status: int, error: dict[str, Any] | None = None, **headers: str) -> Script:
    """Refuse so, each time."""

    async def script(call: Call) -> None:
        await call.refuse(status, error, **_HEADERS, **headers)

    return script


def _breaks_off(how: Callable[[Call], Awaitable[None]]) -> Script:
    async def script(call: Call) -> None:
        await call.head()
        await call.event(chunk({"role": "assistant", "content": ""}))
        await call.token("Hel")
        await how(call)

    return script


async def _says_an_error(call: Call) -> None:
    await call.event({"error": {"message": "overloaded", "type": "server_error", "param": None, "code": None}})


async def _resets(call: Call) -> None:
    await asyncio.sleep(0.1)  # an RST discards what the other side has not read yet
    call.reset()


# Each says "Hel", and then fails in its own way. The last is for a server that waits less than for ever.
FAILURES = {
    "an error object": _breaks_off(_says_an_error),
    "a reset": _breaks_off(_resets),
    "an early end": _breaks_off(Call.end),
    "silence": _breaks_off(Call.gone),
}


async def never_ends(call: Call) -> None:
    await call.head()
    for number in itertools.count():
        await call.token(f"{number} ")
        await asyncio.sleep(0.05)


async def says_nothing(call: Call) -> None:
    await call.gone()
