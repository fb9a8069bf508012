"""An answer's events as bytes: what the browser's stream of the contract's section 3 carries."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from server.errors import RelayError
from server.wire.chunks import Usage
from server.wire.sse import encode_event

__all__ = ["PING", "EventEncoder", "EventId", "ping", "read_event_id"]

_RETRY_MS: Final = 1000  # how long an EventSource waits before it comes back

# 64 characters and 100 digits are more than any id of ours has; a bound, for the rest is reckoned with and echoed.
_EVENT_ID: Final = re.compile(r"([A-Za-z0-9_-]{22,64})\.([0-9]{1,100})", re.ASCII)

_encoder = msgspec.json.Encoder()


def ping(retry_ms: int | None = None) -> bytes:
    """A heartbeat; with ``retry_ms``, how long the client waits before it comes back.

    It has no id: it is no part of the answer. Nor does a ``retry`` ever stand alone, since some clients take a block
    without data for an event that they cannot read.
    """
    return encode_event(b"{}", type=b"ping", retry=retry_ms)


PING: Final = ping()


class EventId(NamedTuple):
    """Where a client is in an answer: the last event that it has seen."""

    stream_id: str
    number: int


def read_event_id(text: str) -> EventId | None:
    """What a ``Last-Event-ID`` says; None where it is none of ours (``SID.N``, N a plain decimal)."""
    match = _EVENT_ID.fullmatch(text)
    return None if match is None else EventId(match[1], int(match[2]))


class EventEncoder:
    """Encodes one answer's events. Each method returns the bytes of one whole event, blank line included.

    ``number`` is the event's place in the answer, from 0; its id on the wire is ``SID.number``.
    """

    __slots__ = ("_id", "_stream_id", "_token")

    def __init__(self, stream_id: str) -> None:
        self._stream_id = stream_id
        self._id = stream_id.encode("ascii")
        self._token = b'id: %b.%%d\ndata: {"token":"%%b"}\n\n' % self._id

    def start(self, number: int, model: str) -> bytes:
        return self._event(number, {"id": self._stream_id, "model": model}, type=b"start", retry=_RETRY_MS)

    def token(self, number: int, text: str) -> bytes:
        """One upstream delta's content, exactly."""
        return self._token % (number, _encode_text(text)[1:-1])

    def tokens(self, number: int, texts: Sequence[bytes]) -> list[bytes]:
        """As :meth:`token`, from ``number`` on, for texts that are the inside of JSON strings already. The hot path."""
        template = self._token
        if len(texts) == 1:
            return [template % (number, texts[0])]
        return [template % numbered for numbered in enumerate(texts, number)]

    def reasoning(self, number: int, text: str) -> bytes:
        return b'event: reasoning\nid: %b.%d\ndata: {"reasoning":%b}\n\n' % (self._id, number, _encode_text(text))

    def usage(
        self,
        number: int,
        *,
        finish_reason: str | None,
        usage: Usage,
        tokens: int,
        model: str,
        ttft_ms: int | None,
        duration_ms: int,
    ) -> bytes:
        fields = {
            "finish_reason": finish_reason,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "tokens": tokens,
            "model": model,
            "ttft_ms": ttft_ms,
            "duration_ms": duration_ms,
        }
        return self._event(number, fields, type=b"usage")

    def done(self, number: int) -> bytes:
        return encode_event(b"[DONE]", id=b"%b.%d" % (self._id, number))

    def error(self, number: int, error: RelayError) -> bytes:
        """The one event that ends an answer which failed after admission; no ``[DONE]`` follows it."""
        return self._event(number, {"error": error.code, "message": str(error), "retryable": error.retryable})

    def _event(self, number: int, fields: dict[str, Any], *, type: bytes = b"", retry: int | None = None) -> bytes:  # noqa: A002
        return encode_event(_encode_json(fields), type=type, id=b"%b.%d" % (self._id, number), retry=retry)


def _encode_text(text: str) -> bytes:
    try:
        return _encoder.encode(text)
    except UnicodeEncodeError:
        # Half a surrogate pair: an upstream cut a character over two deltas. UTF-8 cannot hold it, a JSON escape can.
        return json.dumps(text).encode("ascii")


def _encode_json(value: dict[str, Any]) -> bytes:
    try:
        return _encoder.encode(value)
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode("ascii")
