"""The short cut for events that differ only in their text: what was decoded once need not be decoded again.

An endpoint's token events are the same bytes again and again but for the text between two quotation marks. Once one of
them has been decoded, the bytes before and behind its text are known to mean "one delta of content, and nothing else";
any event with the same bytes round another text says exactly that text, and the text, being JSON already, can be passed
on as it stands. Whatever is not plain (an escape, another field, another order) does not fit, and is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, takewhile
from typing import Final

from server.wire.chunks import Chunk, Delta, DeltaKind, MalformedChunk, decode_chunk
from server.wire.sse import ServerSentEvent

__all__ = ["TokenTemplate"]

# What ends a JSON string, begins an escape in it, or may not stand in it at all (RFC 8259 §7).
_NOT_PLAIN: Final = bytes([*range(0x20), ord('"'), ord("\\")])

_FIELD: Final = b"data: "

_PROBE: Final = "\u2060probe\u2060"  # a text that no endpoint has in its frame
_PROBE_BYTES: Final = _PROBE.encode()
_PROBED: Final = (Delta(DeltaKind.CONTENT, _PROBE),)


class TokenTemplate:
    """What stands round the text of one answer's token events. Immutable, no I/O.

    ``before`` and ``after`` are the rest of an event's data; ``model`` is the one that it names; ``blank`` is how an
    event ends on the wire, in this stream's line ends.
    """

    __slots__ = ("_begin", "_end", "_shortest", "after", "before", "blank", "line_end", "model")

    def __init__(self, before: bytes, after: bytes, line_end: bytes, model: str | None) -> None:
        self.model = model
        self.before = before
        self.after = after
        self.line_end = line_end
        self.blank = 2 * line_end
        self._begin = _FIELD + before
        self._end = after + self.blank
        self._shortest = len(self._begin) + len(self._end)  # bytes of an event without text

    @classmethod
    def learn(cls, data: bytes, chunk: Chunk, wire: bytes) -> TokenTemplate | None:
        """The template of an event whose ``data`` was decoded to ``chunk`` and which stands whole in ``wire``; None
        where it is no plain token event, or is framed in some other way than nearly all are.

        That the place of the text is the right one is proved by decoding the event with another text there.
        """
        if len(chunk.deltas) != 1 or chunk.deltas[0].kind is not DeltaKind.CONTENT:
            return None
        if chunk.finish_reason is not None or chunk.usage is not None:
            return None
        line_end = _line_end_behind(_FIELD + data, wire)
        text = b'"' + chunk.deltas[0].text.encode("utf-8", "replace") + b'"'
        place = data.rfind(text)
        if line_end is None or place < 0:
            return None
        before, after = data[: place + 1], data[place + len(text) - 1 :]
        try:
            probed = decode_chunk(before + _PROBE_BYTES + after)
        except MalformedChunk:
            return None
        if probed != Chunk(_PROBED, model=chunk.model):
            return None
        return cls(before, after, line_end, chunk.model)

    def text_of(self, data: bytes) -> bytes | None:
        """The text that an event's ``data`` holds, as the inside of a JSON string; None if it does not fit."""
        if not (data.startswith(self.before) and data.endswith(self.after)):
            return None
        begins, ends = len(self.before), len(data) - len(self.after)
        if begins < ends and _is_plain(text := data[begins:ends]):
            return text
        return None

    def run_of(self, events: Sequence[ServerSentEvent], first: int) -> list[bytes]:
        """The texts of the events from ``first`` on, as many of them as fit, as :meth:`text_of` each."""
        before, after = self.before, self.after
        if not events[first].data.startswith(before):
            return []
        begins, ends = len(before), -len(after)
        texts: list[bytes] = []
        for event in islice(events, first, None):
            data = event.data
            if not (data.startswith(before) and data.endswith(after) and event.type == b"message"):
                break
            text = data[begins:ends]
            if len(data) <= begins - ends or not text:
                break
            texts.append(text)
        if not _is_plain(b" ".join(texts)):
            texts = list(takewhile(_is_plain, texts))
        return texts

    def texts_of(self, events: bytes) -> list[bytes] | None:
        """The texts that whole events hold, in their order; None unless each of them fits, and nothing stands between
        them."""
        begin, end = self._begin, self._end
        if len(events) < 2 * self._shortest:
            if not (events.startswith(begin) and events.endswith(end)):
                return None
            text = events[len(begin) : -len(end)]
            return [text] if text and _is_plain(text) else None
        pieces = events.split(self.blank)
        if pieces.pop():
            return None
        after = self.after
        first, last = len(begin), -len(after)
        texts = [piece[first:last] for piece in pieces if piece.startswith(begin) and piece.endswith(after)]
        # Joined by a space: halves of one character, cut over two events, are not to be taken for a whole one.
        return texts if len(texts) == len(pieces) and all(texts) and _is_plain(b" ".join(texts)) else None


def _line_end_behind(line: bytes, wire: bytes) -> bytes | None:
    """How ``line`` and the blank line behind it end in ``wire``, where it stands there alone in its event."""
    for line_end in (b"\n", b"\r\n"):
        if line + 2 * line_end in wire:
            return line_end
    return None


def _is_plain(text: bytes) -> bool:
    """Whether the bytes are what a JSON string may hold between its quotation marks, with no escape among it."""
    if len(text.translate(None, _NOT_PLAIN)) != len(text):
        return False
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
