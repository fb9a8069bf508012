"""The two event streams that an answer can be: events to tokens, errors and ends. No I/O."""

from __future__ import annotations

import json
import re
from enum import Enum, auto
from typing import Any, Protocol, TypeVar

import msgspec

from server.wire.sse import ServerSentEvent

__all__ = ["AnswerReader", "OpenAIReader", "Said", "SluiceReader", "refusal_code"]

_DONE = b"[DONE]"
_CODE = re.compile(r"[A-Za-z0-9_.\-]{1,64}", re.ASCII)
_UNREADABLE = "unreadable"

_Shape = TypeVar("_Shape")


class Said(Enum):
    """What one event says."""

    TOKEN = auto()
    REASONING = auto()
    DONE = auto()
    ERROR = auto()
    MALFORMED = auto()
    NOTHING = auto()  # a heartbeat, a role, a finish reason, a usage


class AnswerReader(Protocol):
    """Reads one answer, over all connections that it takes."""

    error_code: str
    prompt_tokens: int | None
    completion_tokens: int | None
    lost: int  # what ids or the endpoint's own count say is missing
    doubled: int
    last_event_id: bytes  # of the last event that was taken: where the answer goes on from

    def take(self, event: ServerSentEvent) -> Said:
        """What the next event says; after DONE or ERROR there is none."""


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Message(msgspec.Struct):
    """All that a Sluice event's data may hold."""

    token: str | None = None
    reasoning: str | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tokens: int | None = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)
_message_decoder = msgspec.json.Decoder(_Message)


class _Reader:
    """What is known of an answer so far."""

    def __init__(self) -> None:
        self.error_code = ""
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.lost = self.doubled = 0
        self.last_event_id = b""


class OpenAIReader(_Reader):
    """``chat.completion.chunk`` objects (contract, section 5). It has no ids: nothing can be resumed."""

    def take(self, event: ServerSentEvent) -> Said:
        data = event.data
        if data == _DONE:
            return Said.DONE
        chunk = _decode(_chunk_decoder, data, _Chunk)
        if chunk is None:
            return Said.MALFORMED
        if chunk.error:
            self.error_code = _code_of(chunk.error)
            return Said.ERROR
        if chunk.usage is not None:
            self.prompt_tokens = chunk.usage.prompt_tokens
            self.completion_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices or ():
            if (delta := choice.delta) is not None:
                if delta.content:
                    return Said.TOKEN
                if delta.reasoning_content or delta.reasoning:
                    return Said.REASONING
        return Said.NOTHING


class SluiceReader(_Reader):
    """The browser's stream (contract, section 3), whose ids are checked: each one more than the one before."""

    def __init__(self) -> None:
        super().__init__()
        self._stream_id = b""
        self._next = 0  # N of the event that is due
        self._tokens = 0  # content tokens taken

    def take(self, event: ServerSentEvent) -> Said:
        if event.type == b"ping":
            return Said.NOTHING
        if not self._is_new(event.last_event_id):
            return Said.NOTHING
        if event.data == _DONE:
            return Said.DONE
        message = _decode(_message_decoder, event.data, _Message)
        if message is None:
            return Said.MALFORMED
        if message.error is not None:
            self.error_code = _code_of(message.error)
            return Said.ERROR
        if event.type == b"message" and message.token:
            self._tokens += 1
            return Said.TOKEN
        if event.type == b"reasoning" and message.reasoning:
            return Said.REASONING
        if event.type == b"usage":
            self.prompt_tokens = message.prompt_tokens
            self.completion_tokens = message.completion_tokens
            if message.tokens is not None and not self.lost:  # a gap in the ids has told of them already
                self.lost += max(0, message.tokens - self._tokens)
        return Said.NOTHING

    def _is_new(self, event_id: bytes) -> bool:
        """Hold the event's id against the one that is due; one that was here before is not taken again."""
        if event_id == b"%b.%d" % (self._stream_id, self._next):
            self._next += 1
            self.last_event_id = event_id
            return True
        stream_id, dot, number = event_id.rpartition(b".")
        if not dot or not number.isdigit() or len(number) > 15:
            return True  # a deployment without ids: nothing to check
        place = int(number)
        if stream_id == self._stream_id and place < self._next:
            self.doubled += 1
            return False
        if stream_id == self._stream_id:
            self.lost += place - self._next
        elif self._stream_id:
            self.doubled += 1  # another answer took this one's place
        else:
            self.lost += place
        self._stream_id, self._next, self.last_event_id = stream_id, place + 1, event_id
        return True


def refusal_code(body: bytes) -> str:
    """The code in a refusal's body: Sluice's ``{"error": CODE}`` or OpenAI's error object; empty where none is."""
    try:
        value = json.loads(body)
    except ValueError:
        return ""
    error = value.get("error") if isinstance(value, dict) else None
    return _code_of(error) if error else ""


def _code_of(error: Any) -> str:
    """A word that can stand in a table: never the endpoint's prose, which may say anything (a key, for one)."""
    if isinstance(error, dict):
        error = next((error[name] for name in ("code", "type") if isinstance(error.get(name), str | int)), "")
    text = str(error)
    return text if _CODE.fullmatch(text) else _UNREADABLE


def _decode(decoder: msgspec.json.Decoder[_Shape], data: bytes, shape: type[_Shape]) -> _Shape | None:
    """The quick decoder first; what it refuses and the wild contains (half a surrogate pair, NaN) by the other."""
    try:
        return decoder.decode(data)
    except msgspec.DecodeError:
        try:
            return msgspec.convert(json.loads(data), shape)
        except (ValueError, msgspec.ValidationError):
            return None
