"""The demo model's HTTP side: OpenAI's chat completions, streamed and whole, over a loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from server.demo.library import Library
from server.demo.tokens import split_tokens

__all__ = ["DEMO_MODEL_NAME", "DOCUMENTS", "create_demo_app", "demo_model", "read_documents"]

DEMO_MODEL_NAME = "sluice-demo"
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")  # most important first
MAX_BODY_BYTES = 1 << 20

_LIBRARY = web.AppKey("library", Library)
_TOKENS_PER_SECOND = web.AppKey("tokens_per_second", float)
_STARTED_AT = web.AppKey("started_at", int)  # s since the epoch

_ROLES = frozenset({"developer", "system", "user", "assistant", "tool", "function"})


class _RequestError(Exception):
    """A request that OpenAI would refuse, in its words: a message, and the parameter that is wrong."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclass(frozen=True, slots=True)
class _Completion:
    """One answer on its way: its tokens (cut at the bound that was asked for), and what frames each part of it."""

    id: str
    created: int  # s since the epoch
    tokens: Sequence[str]
    finish_reason: str
    prompt_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, len(self.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(self.tokens), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        return self._frame("chat.completion", [choice]) | {"usage": self.usage}

    def chunks(self, *, include_usage: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        """The chunks in order, each with how many tokens have been said with it.

        Where usage is asked for, every chunk names it: null, until a last one without choices that holds it.
        """
        usage: dict[str, Any] = {"usage": None} if include_usage else {}

        def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return self._frame("chat.completion.chunk", [choice]) | usage

        yield 0, chunk({"role": "assistant", "content": ""})
        for said, token in enumerate(self.tokens, 1):
            yield said, chunk({"content": token})
        yield len(self.tokens), chunk({}, self.finish_reason)
        if include_usage:
            yield len(self.tokens), self._frame("chat.completion.chunk", []) | {"usage": self.usage}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": DEMO_MODEL_NAME, "choices": choices}


def create_demo_app(library: Library, *, tokens_per_second: float = 40.0) -> web.Application:
    """Build the application: ``POST /v1/chat/completions`` and ``GET /v1/models``.

    A reader that leaves ends its answer at once only where the runner has ``handler_cancellation=True``.
    """
    if not tokens_per_second > 0:
        raise ValueError(f"tokens_per_second is {tokens_per_second!r}, but must be above 0")
    app = web.Application(middlewares=[_errors_as_openai], client_max_size=MAX_BODY_BYTES)
    app[_LIBRARY] = library
    app[_TOKENS_PER_SECOND] = tokens_per_second
    app[_STARTED_AT] = int(time.time())
    app.router.add_post("/v1/chat/completions", _complete)
    app.router.add_get("/v1/models", _models, allow_head=False)
    return app


@contextlib.asynccontextmanager
async def demo_model(documents_root: Path, *, tokens_per_second: float = 40.0) -> AsyncIterator[str]:
    """Serve the documents in that folder on a free loopback port while the context is open; gives the base URL.

    At its end streams still open are cut after at most 2 s. Raises OSError if no port can be had.
    """
    app = create_demo_app(Library(read_documents(documents_root)), tokens_per_second=tokens_per_second)
    # handler_cancellation: an answer ends the moment its reader has left, and not at its next token.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, keepalive_timeout=75, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port: int = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        await runner.cleanup()


def read_documents(root: Path) -> dict[str, str]:
    """Return the texts of the documents that exist there and can be read; the demo tells what it can."""
    documents: dict[str, str] = {}
    for name in DOCUMENTS:
        with contextlib.suppress(OSError):
            documents[name] = (root / name).read_text(encoding="utf-8", errors="replace")
    return documents


async def _complete(request: web.Request) -> web.StreamResponse:
    body = await _read_body(request)  # 400, 413, 415
    streamed = _flag(body, "stream", "stream")
    options = _typed(body, "stream_options", dict, "an object", "stream_options") or {}
    include_usage = _flag(options, "include_usage", "stream_options.include_usage")
    completion = _answer(body, request.app[_LIBRARY])  # 400
    if not streamed:
        return web.json_response(completion.whole(), headers={"x-request-id": _new_id("req_")})
    return await _stream(request, completion, include_usage=include_usage)


async def _models(request: web.Request) -> web.Response:
    model = {"id": DEMO_MODEL_NAME, "object": "model", "created": request.app[_STARTED_AT], "owned_by": "sluice"}
    return web.json_response({"object": "list", "data": [model]}, headers={"x-request-id": _new_id("req_")})


async def _stream(request: web.Request, completion: _Completion, *, include_usage: bool) -> web.StreamResponse:
    """Say the answer at its pace: each token has its deadline from the start, so that late wake-ups do not add up."""
    headers = {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "x-request-id": _new_id("req_"),
    }
    response = web.StreamResponse(headers=headers)
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    # A reader may be gone before the loop has told us so; nobody is left to whom the error would matter.
    with contextlib.suppress(ConnectionError):
        await response.prepare(request)
        for said, chunk in completion.chunks(include_usage=include_usage):
            due_in = started_at + said / request.app[_TOKENS_PER_SECOND] - loop.time()
            await asyncio.sleep(max(0.0, due_in))
            await response.write(
                b"data: %b\n\n" % json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()
            )
        await response.write(b"data: [DONE]\n\n")
    return response


async def _read_body(request: web.Request) -> dict[str, Any]:
    if request.content_type != "application/json":
        raise _RequestError(
            f"Unsupported content type: {request.content_type!r}. Send 'application/json'.",
            status=415,
            code="unsupported_content_type",
        )
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError):  # not UTF-8 or a number of 4301 digits, too; or nested a thousand deep
        raise _RequestError("We could not parse the JSON body of your request.") from None
    except web.RequestPayloadError:
        raise _RequestError("The body of your request is not what its headers say.") from None
    if not isinstance(body, dict):
        raise _RequestError("The JSON body of your request must be an object.")
    return body


def _answer(body: dict[str, Any], library: Library) -> _Completion:
    """Read the request as OpenAI does, whatever model it asks for, and answer its last user message."""
    if not _typed(body, "model", str, "a string", "model"):
        raise _RequestError("you must provide a model parameter", "model")
    if _typed(body, "n", int, "an integer", "n") not in (None, 1):
        raise _RequestError("The demo model gives one choice: 'n' must be 1.", "n")
    bounds = [bound for name in ("max_tokens", "max_completion_tokens") if (bound := _bound(body, name)) is not None]
    messages = _messages(body)
    question = next((text for role, text in reversed(messages) if role == "user"), "")
    tokens = split_tokens(library.answer(question))
    max_tokens = min(bounds, default=len(tokens))
    return _Completion(
        id=_new_id("chatcmpl-"),
        created=int(time.time()),
        tokens=tokens[:max_tokens],
        finish_reason="length" if max_tokens < len(tokens) else "stop",
        prompt_tokens=sum(len(split_tokens(text)) for _, text in messages),
    )


def _messages(body: dict[str, Any]) -> list[tuple[str, str]]:
    """The messages as role and text, in order."""
    messages = _typed(body, "messages", list, "an array", "messages")
    if not messages:
        raise _RequestError("'messages' must hold at least one message.", "messages")
    found: list[tuple[str, str]] = []
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        if not isinstance(message, dict):
            raise _RequestError(f"Invalid type for '{where}': expected an object.", where)
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise _RequestError(f"Invalid value for '{where}.role': expected one of {sorted(_ROLES)}.", f"{where}.role")
        found.append((role, _text(message.get("content"), f"{where}.content", required=role == "user")))
    return found


def _text(content: object, where: str, *, required: bool) -> str:
    """A message's text: a string, or the text parts of a list (images and sounds tell the demo nothing)."""
    if content is None and not required:  # an assistant's message that only calls tools
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _RequestError(f"Invalid type for '{where}': expected a string or an array of parts.", where)
    texts: list[str] = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind == "text" else ""
        if not isinstance(kind, str) or not isinstance(text, str):
            raise _RequestError(f"Invalid value for '{where}[{at}]': expected a typed part.", f"{where}[{at}]")
        texts.append(text)
    return "\n".join(filter(None, texts))


def _bound(body: dict[str, Any], name: str) -> int | None:
    bound: int | None = _typed(body, name, int, "an integer", name)
    if bound is not None and bound < 1:
        raise _RequestError(f"Invalid '{name}': integer below minimum value. Expected a value >= 1.", name)
    return bound


def _flag(holder: dict[str, Any], name: str, param: str) -> bool:
    return bool(_typed(holder, name, bool, "a boolean", param))


def _typed(holder: dict[str, Any], name: str, kind: type, expected: str, param: str) -> Any:
    """The value of that name if it is of that type, None if it is null or absent; JSON's true is no integer."""
    value = holder.get(name)
    if value is not None and type(value) is not kind:
        raise _RequestError(f"Invalid type for '{param}': expected {expected}.", param)
    return value


@web.middleware
async def _errors_as_openai(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Give every refusal OpenAI's error object, aiohttp's own (no such path or method, body too large) too."""
    try:
        return await handler(request)
    except _RequestError as err:
        return _refusal(err.status, err.message, err.param, err.code)
    except web.HTTPException as err:
        response = _refusal(err.status, f"{err.reason}: {request.method} {request.path}")
        if "Allow" in err.headers:
            response.headers["Allow"] = err.headers["Allow"]
        return response


def _refusal(status: int, message: str, param: str | None = None, code: str | None = None) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return web.json_response({"error": error}, status=status, headers={"x-request-id": _new_id("req_")})


def _new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)
