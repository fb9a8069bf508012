"""An answer's events as bytes: what the browser's stream of the contract's section 3 carries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from server.errors import RelayError
from server.wire.chunks import DONE, Answerer, Chunk, DeltaKind, Usage, encode_json
from server.wire.sse import encode_event

__all__ = ["EventEncoder", "EventId", "Summary", "read_event_id"]

_RETRY_MS: Final = 1000  # how long an EventSource waits before it comes back

# 64 characters and 100 digits are more than any id of ours has; a bound, for the rest is reckoned with and echoed.
_EVENT_ID: Final = re.compile(r"([A-Za-z0-9_-]{22,64})\.([0-9]{1,100})", re.ASCII)

_PING: Final = encode_event(b"{}", type=b"ping")


class Summary(NamedTuple):
    """What is told of an answer when it has ended."""

    finish_reason: str | None
    usage: Usage
    tokens: int  # deltas of content
    model: str  # the one that really answered
    ttft_ms: int | None
    duration_ms: int


class EventId(NamedTuple):
    """Where a client is in an answer: the last event that it has seen."""

    stream_id: str
    number: int


def read_event_id(text: str) -> EventId | None:
    """What a ``Last-Event-ID`` says; None where it is none of ours (``SID.N``, N a plain decimal)."""
    match = _EVENT_ID.fullmatch(text)
    return None if match is None else EventId(match[1], int(match[2]))


class EventEncoder:
    """Encodes one answer's events for an EventSource. Each method returns whole events, blank lines included.

    ``number`` is the first one's place in the answer, from 0; an event's id on the wire is ``SID.number``.
    """

    __slots__ = ("_id", "_stream_id", "_token")

    def __init__(self, stream_id: str) -> None:
        self._stream_id = stream_id
        self._id = stream_id.encode("ascii")
        self._token = b'id: %b.%%d\ndata: {"token":"%%b"}\n\n' % self._id

    def start(self, number: int, model: str) -> Sequence[bytes]:
        """The answer begins, with nothing known of it but the model that is asked first."""
        return [self._event(number, {"id": self._stream_id, "model": model}, type=b"start", retry=_RETRY_MS)]

    def begin(self, answerer: Answerer) -> None:
        """Told at the end, when it is sure."""

    def tokens(self, number: int, texts: Sequence[bytes], wire: bytes) -> Sequence[bytes]:
        """Deltas of content, each text the inside of a JSON string already. The hot path."""
        template = self._token
        if len(texts) == 1:
            return [template % (number, texts[0])]
        return [template % numbered for numbered in enumerate(texts, number)]

    def chunk(self, number: int, chunk: Chunk) -> Sequence[bytes]:
        """What a chunk says: one event a delta, with its text, exactly."""
        events: list[bytes] = []
        for kind, text in chunk.deltas:
            place = number + len(events)
            if kind is DeltaKind.CONTENT:
                events.append(self._token % (place, encode_json(text)[1:-1]))
            elif kind is DeltaKind.REASONING:
                events.append(
                    b'event: reasoning\nid: %b.%d\ndata: {"reasoning":%b}\n\n' % (self._id, place, encode_json(text))
                )
        return events

    def complete(self, number: int, summary: Summary) -> Sequence[bytes]:
        """The end of an answer that has one."""
        fields = {
            "finish_reason": summary.finish_reason,
            "prompt_tokens": summary.usage.prompt_tokens,
            "completion_tokens": summary.usage.completion_tokens,
            "tokens": summary.tokens,
            "model": summary.model,
            "ttft_ms": summary.ttft_ms,
            "duration_ms": summary.duration_ms,
        }
        done = encode_event(DONE, id=b"%b.%d" % (self._id, number + 1))
        return [self._event(number, fields, type=b"usage"), done]

    def stopped(self, number: int, summary: Summary) -> Sequence[bytes]:
        """The end of an answer that its client stopped."""
        return self.complete(number, summary._replace(finish_reason="cancelled"))

    def failed(self, number: int, error: RelayError) -> Sequence[bytes]:
        """The one event that ends an answer which failed after admission; no ``[DONE]`` follows it."""
        return [self._event(number, {"error": error.code, "message": str(error), "retryable": error.retryable})]

    def ping(self, retry_ms: int | None = None) -> bytes:
        """A heartbeat; with ``retry_ms``, how long the client waits before it comes back.

        It has no id: it is no part of the answer. Nor does a ``retry`` ever stand alone, since some clients take a
        block without data for an event that they cannot read.
        """
        return _PING if retry_ms is None else encode_event(b"{}", type=b"ping", retry=retry_ms)

    def _event(self, number: int, fields: dict[str, Any], *, type: bytes = b"", retry: int | None = None) -> bytes:  # noqa: A002
        return encode_event(encode_json(fields), type=type, id=b"%b.%d" % (self._id, number), retry=retry)
