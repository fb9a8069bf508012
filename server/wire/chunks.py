"""OpenAI's ``chat.completion.chunk`` to deltas, trusting no field's type."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum, auto
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from server.wire.sse import encode_event

__all__ = [
    "DONE",
    "Answerer",
    "Chunk",
    "ChunkSink",
    "Delta",
    "DeltaKind",
    "MalformedChunk",
    "Usage",
    "decode_chunk",
    "decode_completion",
    "decode_json",
    "encode_json",
    "one_by_one",
    "split_texts",
    "with_text",
]

DONE: Final = b"[DONE]"

_MAX_SAFE_INTEGER = (1 << 53) - 1  # beyond it JavaScript, which reads our usage event, no longer counts exactly
_MAX_NAME_CHARS = 200  # of a model's name or a finish_reason; both travel to the page

# What else of a delta is a part of the answer to those who can read it, where it is of that type and not empty.
_OTHER: Final[tuple[tuple[str, type], ...]] = (
    ("tool_calls", list),
    ("refusal", str),
    ("function_call", dict),
    ("audio", dict),
    ("content", list),
    ("reasoning_details", list),
)

_decoder = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()


class MalformedChunk(ValueError):
    """The event's data is not a JSON object."""


class DeltaKind(Enum):
    """What of a delta the first-token and idle clocks count."""

    CONTENT = auto()
    REASONING = auto()
    OTHER = auto()  # a tool call; for those who speak OpenAI's own language also a refusal, or sound


_CONTENT: Final = DeltaKind.CONTENT  # at hand: each look into an Enum is a call


class Delta(NamedTuple):
    """A piece of the answer; ``text`` is empty for what is neither content nor reasoning."""

    kind: DeltaKind
    text: str


class Usage(NamedTuple):
    """What the upstream says that the answer cost, in LLM tokens; None where it says nothing sensible."""

    prompt_tokens: int | None
    completion_tokens: int | None


class Chunk(NamedTuple):
    """What one chunk says. A chunk that says nothing (role only, empty delta, unknown fields) is all defaults.

    ``texts`` makes it a run of chunks, each of which says one delta of content (the inside of a JSON string, never
    empty) and nothing else: what ``ChunkSink.take_texts`` takes, among others.
    """

    deltas: tuple[Delta, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    model: str | None = None
    error: Any = None  # the error object (or text) of a chunk that is an error
    wire: bytes = b""  # its event as it came, for those who pass it on as it is; else empty
    texts: Sequence[bytes] = ()


class Answerer(NamedTuple):
    """Who answers: the model that was asked, what its endpoint calls the request, and what we call the endpoint."""

    model: str
    request_id: str | None = None
    endpoint: str = ""


class ChunkSink(Protocol):
    """Where an answer's chunks go, a batch at a time: all that one read of the network brought."""

    def begin(self, answerer: Answerer, /) -> None:
        """Who it is that answers, before anything of the answer."""

    def take(self, chunks: Sequence[Chunk], /) -> None:
        """Chunks, in their order."""

    def take_texts(self, texts: Sequence[bytes], wire: bytes, /) -> None:
        """Deltas of content and nothing else, in their order: each text as the inside of a JSON string, never empty.

        ``wire`` is their events as they came, each with the same bytes round its text.
        """

    def end(self, chunks: Sequence[Chunk], /) -> None:
        """The last chunks of an answer that is complete."""


def decode_chunk(data: bytes, *, verbatim: bool = False) -> Chunk:
    """The chunk that an event's data holds; ``verbatim``: for one who passes it on to clients that read all of it.
    Raises MalformedChunk where it is not a JSON object.

    Whatever has another type than OpenAI documents counts as absent: an endpoint's quirk may cost a field, never the
    answer. Only choice 0 is read, as we never ask for more.
    """
    return _read_chunk(_decode_object(data), "delta", verbatim=verbatim)


def decode_completion(body: bytes) -> Chunk:
    """A completion that was not streamed, as the one chunk that says all of it. Raises MalformedChunk where it is not a
    JSON object with choices."""
    value = _decode_object(body)
    chunk = _read_chunk(value, "message", verbatim=True)
    if chunk.error is None and not isinstance(value.get("choices"), list):
        raise MalformedChunk("no choices")
    return chunk._replace(wire=body)


def _decode_object(data: bytes) -> dict[str, Any]:
    value = decode_json(data)
    if not isinstance(value, dict):
        raise MalformedChunk("not a JSON object")
    return value


def _read_chunk(value: dict[str, Any], part: str, *, verbatim: bool) -> Chunk:
    error = value.get("error")
    if error is not None and (isinstance(error, dict) or (isinstance(error, str) and error)):
        return Chunk(error=error)
    deltas: tuple[Delta, ...] = ()
    finish_reason = None
    choices = value.get("choices")
    if isinstance(choices, list):
        for choice in choices:
            if isinstance(choice, dict) and not _is_another(choice.get("index")):
                if delta := choice.get(part):
                    deltas += _read_delta(delta, verbatim=verbatim)
                if reason := choice.get("finish_reason"):
                    finish_reason = _name(reason) or finish_reason
    usage = value.get("usage")
    return Chunk(deltas, finish_reason, None if usage is None else _read_usage(usage), _name(value.get("model")))


def split_texts(texts: Sequence[bytes], wire: bytes) -> Iterator[Chunk]:
    """The chunks of ``ChunkSink.take_texts``, one by one: all have the same bytes round their text."""
    frame = (len(wire) - sum(map(len, texts))) // len(texts)
    start = 0
    for text in texts:
        end = start + frame + len(text)
        yield Chunk((Delta(DeltaKind.CONTENT, text.decode()),), wire=wire[start:end])
        start = end


def one_by_one(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """``chunks``, and of each run among them what it is a run of."""
    for chunk in chunks:
        if chunk.texts:
            yield from split_texts(chunk.texts, chunk.wire)
        else:
            yield chunk


def with_text(chunk: Chunk, text: str) -> Chunk:
    """``chunk``, which says one content, with another ``text`` for it in the event as it came, if it has one."""
    if not chunk.wire:
        return chunk
    data = b"\n".join(line.removeprefix(b"data:") for line in chunk.wire.splitlines() if line)
    value = _decode_object(data)
    for choice in value["choices"]:
        if isinstance(choice, dict) and not _is_another(choice.get("index")) and _read_delta(choice.get("delta")):
            choice["delta"]["content"] = text
    return chunk._replace(wire=encode_event(encode_json(value)))


def encode_json(value: Any) -> bytes:
    """``value`` as JSON. Where a text holds half a surrogate pair (an upstream cut a character over two deltas), all
    that is not ASCII is escaped: UTF-8 cannot hold a half, an escape can."""
    try:
        return _encoder.encode(value)
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode("ascii")


def decode_json(data: bytes) -> Any:
    """A JSON value out of bytes that may be slightly wrong. Raises MalformedChunk where they are no JSON.

    The quick and strict decoder first; what it refuses and the wild contains is taken by the standard library's:
    invalid UTF-8 (becomes U+FFFD, as in the standard's decoding), half a surrogate pair, NaN.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        raise MalformedChunk("not JSON") from None


def _is_another(index: Any) -> bool:
    return type(index) is int and index != 0


def _read_delta(delta: Any, *, verbatim: bool = False) -> tuple[Delta, ...]:
    if not isinstance(delta, dict):
        return ()
    content = delta.get("content")
    spoken = (Delta(_CONTENT, content),) if isinstance(content, str) and content else ()
    if len(delta) == 1 and spoken:
        return spoken
    found: list[Delta] = []
    # Two spellings of one thing (DeepSeek and vLLM; OpenRouter and Ollama); an endpoint that sends both repeats itself.
    for name in ("reasoning_content", "reasoning"):
        reasoning = delta.get(name)
        if isinstance(reasoning, str) and reasoning:
            found.append(Delta(DeltaKind.REASONING, reasoning))
            break
    found += spoken
    others = _OTHER if verbatim else _OTHER[:1]
    if any(isinstance(delta.get(name), type_) and delta[name] for name, type_ in others):
        found.append(Delta(DeltaKind.OTHER, ""))
    return tuple(found)


def _read_usage(usage: Any) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    return Usage(_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _count(value: Any) -> int | None:
    # bool is an int in Python, and True tokens are no count
    return value if type(value) is int and 0 <= value <= _MAX_SAFE_INTEGER else None


def _name(value: Any) -> str | None:
    return value[:_MAX_NAME_CHARS] if isinstance(value, str) and value else None
