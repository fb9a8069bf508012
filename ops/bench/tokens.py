"""A token's text, which says where it belongs, and whether a stream's tokens all came to that place. No I/O.

``[STAMP.ID.NUMBER]``: when the endpoint wrote it, the stream, and the place in it. Each part has a fixed width, so that
sorting the texts sorts the numbers, and a whole read is checked by C code: no Python per token.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["MAX_ID", "MAX_NUMBER", "TEXT_BYTES", "TokenCheck", "late_us", "stamp_us", "stamps_in"]

MAX_ID: Final = 999_999
MAX_NUMBER: Final = 9_999_999
TEXT_BYTES: Final = len(b"[SSSSSSSS.IIIIII.NNNNNNN]")

_STAMPS_US: Final = 10**8  # a stamp is CLOCK_MONOTONIC in microseconds, of which the last eight digits: 100 s
_PLACE = re.compile(rb"\[[0-9]{8}\.([0-9]{6}\.[0-9]{7})\]")
_STAMP = re.compile(rb"\[([0-9]{8})\.[0-9]{6}\.[0-9]{7}\]")


def stamp_us(now_ns: int) -> int:
    return now_ns // 1000 % _STAMPS_US


def late_us(stamp: int, now_ns: int) -> int:
    """Microseconds since the stamp was made, if those are fewer than 100 seconds."""
    return (now_ns // 1000 - stamp) % _STAMPS_US


def stamps_in(text: bytes) -> list[int]:
    """The stamps of all whole tokens in the text, in order."""
    return [int(stamp) for stamp in _STAMP.findall(text)]


class TokenCheck:
    """Whether one stream's tokens arrived once, in order, and in the right stream.

    ``next`` is the number awaited, ``read_to`` the end of the last whole token in the text last read, 0 without one."""

    __slots__ = ("_prefix", "doubled", "lost", "misplaced", "next", "read_to", "stream")

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.next = self.read_to = 0
        self.lost = self.doubled = self.misplaced = 0
        self._prefix = b"%06d." % stream

    def read(self, text: bytes) -> int:
        """Check all whole tokens in the text and return how many there are, right or wrong."""
        places: list[bytes] = _PLACE.findall(text)
        if not places:
            self.read_to = 0
            return 0
        self.read_to = text.rfind(places[-1]) + len(places[-1]) + len(b"]")
        count = len(places)
        # As many as there are numbers from the first to the last, all different and in order: then each of them is
        # there once, and between two texts with this stream's id stands no other id.
        if (
            places[0] == b"%b%07d" % (self._prefix, self.next)
            and places[-1] == b"%b%07d" % (self._prefix, self.next + count - 1)
            and len(set(places)) == count
            and sorted(places) == places
        ):
            self.next += count
        else:
            for place in places:
                stream, _, number = place.partition(b".")
                self._take(int(stream), int(number))
        return count

    def _take(self, stream: int, number: int) -> None:
        if stream != self.stream:
            self.misplaced += 1
        elif number < self.next:
            self.doubled += 1
        else:
            self.lost += number - self.next
            self.next = number + 1

    def end(self, total: int) -> None:
        """The answer is complete and should have held ``total`` tokens."""
        self.lost += max(0, total - self.next)
        self.next = max(self.next, total)

    @property
    def wrong(self) -> int:
        return self.lost + self.doubled + self.misplaced
