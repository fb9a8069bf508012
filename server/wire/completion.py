"""OpenAI's own language towards clients that speak it: the body of a completion's request, its answer, its errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from server.errors import Interrupted, InvalidRequest, RelayError
from server.wire.chat import invalid_body, invalid_request, mend_surrogates
from server.wire.chunks import DONE, Answerer, Chunk
from server.wire.events import Summary
from server.wire.sse import PING_COMMENT, encode_event

__all__ = [
    "CompletionEncoder",
    "CompletionRequest",
    "decode_completion_request",
    "describe_model",
    "encode_models",
    "encode_openai_error",
]

_DONE: Final = encode_event(DONE)

_BOUNDS: Final = ("max_tokens", "max_completion_tokens")  # the same thing, before and after OpenAI renamed it

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

_encoder = msgspec.json.Encoder()
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


# ---- What is asked


class CompletionRequest:
    """The body of ``POST /v1/chat/completions``, which goes on as it came but for the model and the bound of tokens.

    ``max_tokens`` is how many LLM tokens it may cost.
    """

    verbatim: Final = True

    def __init__(self, fields: dict[str, msgspec.Raw], model: str | None, max_tokens: int, *, streamed: bool) -> None:
        self._fields = fields
        self.model = model
        self.max_tokens = max_tokens
        self.streamed = streamed

    @property
    def prompt(self) -> str:
        """The last message, as JSON."""
        try:
            messages = msgspec.json.decode(self._fields.get("messages", b"[]"), type=list[msgspec.Raw])
        except msgspec.DecodeError:
            return ""
        return bytes(messages[-1]).decode("utf-8", "replace") if messages else ""

    def continued(self, said: str, spent: int) -> CompletionRequest:
        """The same, with the answer ``said`` so far, at the cost of ``spent`` LLM tokens, for its last message."""
        messages = msgspec.json.decode(self._fields["messages"], type=list[msgspec.Raw])
        messages.append(msgspec.Raw(_encoder.encode({"role": "assistant", "content": said})))
        fields = self._fields | {"messages": msgspec.Raw(_encoder.encode(messages))}
        for name in _BOUNDS:
            if (bound := bytes(fields.get(name, b"null"))) != b"null":
                fields[name] = msgspec.Raw(b"%d" % max(1, int(bound) - spent))
        return CompletionRequest(fields, self.model, max(1, self.max_tokens - spent), streamed=self.streamed)

    def encode(self, model: str) -> bytes:
        """The body for an endpoint that has ``model``: the values are the very bytes that came."""
        return _encoder.encode(self._fields | {"model": msgspec.Raw(_encoder.encode(model))})


def decode_completion_request(body: bytes, *, max_tokens: int) -> CompletionRequest:
    """What a client asks, with the bound of tokens set where it asks for more, or for none. Raises InvalidRequest.

    Only what decides over cost and form is read; everything else is between the client and the model.
    """
    try:
        body.decode("utf-8")
        fields = _fields.decode(mend_surrogates(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise invalid_body(exc, body) from None
    if _read(fields, "n", int | None) not in (None, 1):
        raise invalid_request("n is not 1; one completion is made for a request", param="n")
    if not _read(fields, "messages", list[msgspec.Raw]):
        raise invalid_request("messages is missing or empty", param="messages")
    asked = {name: _read(fields, name, int | None) for name in _BOUNDS}
    bounds = {name: bound for name, bound in asked.items() if bound is not None} or {"max_tokens": max_tokens}
    for name, bound in bounds.items():
        if bound < 1:
            raise invalid_request(f"{name} is less than 1", param=name)
        fields[name] = msgspec.Raw(b"%d" % min(bound, max_tokens))
    return CompletionRequest(
        fields,
        _read(fields, "model", str | None),
        min(max_tokens, max(bounds.values())),
        streamed=bool(_read(fields, "stream", bool | None)),
    )


def _read(fields: dict[str, msgspec.Raw], name: str, type_: Any) -> Any:
    """The value of a field; None where it is absent. Raises InvalidRequest where it has another type."""
    if name not in fields:
        return None
    try:
        return msgspec.json.decode(fields[name], type=type_)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise invalid_request(f"{name} is not what it should be: {exc}", param=name) from None


# ---- What is answered


class CompletionEncoder:
    """Passes an answer on as it came: the ``data`` lines of its events, or the JSON of one that was not streamed.

    Its first bytes are sent only when somebody answers, for until then a failure still has a status: ``error`` is what
    became of an answer of which nothing was handed on, ``answerer`` who it was that began one.
    """

    def __init__(self, *, streamed: bool) -> None:
        self._streamed = streamed
        self.answerer: Answerer | None = None
        self.error: RelayError | None = None

    def start(self, number: int, model: str) -> Sequence[bytes]:
        return ()

    def begin(self, answerer: Answerer) -> None:
        self.answerer = answerer

    def tokens(self, number: int, texts: Sequence[bytes], wire: bytes) -> Sequence[bytes]:
        return (wire,)

    def chunk(self, number: int, chunk: Chunk) -> Sequence[bytes]:
        return (chunk.wire,) if chunk.wire else ()

    def complete(self, number: int, summary: Summary) -> Sequence[bytes]:
        return (_DONE,) if self._streamed else ()

    def stopped(self, number: int, summary: Summary) -> Sequence[bytes]:
        return self.failed(number, Interrupted())

    def failed(self, number: int, error: RelayError) -> Sequence[bytes]:
        if self.answerer is None or not self._streamed:
            self.error = error
            return ()
        return (encode_event(encode_openai_error(error)),)

    def ping(self, retry_ms: int | None = None) -> bytes:
        return PING_COMMENT


def encode_openai_error(error: RelayError, *, status: int | None = None) -> bytes:
    """An error of ours in OpenAI's shape; ``status`` where it is told by another than its own."""
    status = status or error.status
    return _encoder.encode(
        {
            "error": {
                "message": str(error),
                "type": _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error"),
                "param": error.param if isinstance(error, InvalidRequest) else None,
                "code": error.code,
            }
        }
    )


def encode_models(models: Sequence[str]) -> bytes:
    """The answer of ``GET /v1/models``."""
    return _encoder.encode({"object": "list", "data": [describe_model(model) for model in models]})


def describe_model(model: str) -> dict[str, Any]:
    """A model as OpenAI describes one; when it was made nobody here knows."""
    return {"id": model, "object": "model", "created": 0, "owned_by": "sluice"}
