"""HTTP's chunked transfer coding, taken off a body (RFC 9112 §7.1)."""

from __future__ import annotations

import functools
import re
from typing import Final

__all__ = ["ChunkedBody"]

# A chunk's size, with extensions that mean nothing to us. Eight digits are 4 GiB, more than any body of ours has.
_HEADER: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
_SIZE: Final = re.compile(rb"[0-9A-Fa-f]{1,8}")
_MAX_SIZE: Final = 10  # bytes, with the line end
_MAX_HEADER: Final = 256  # bytes of one that has begun
_NO_HEADER: Final = b"?"  # what no chunk begins with


class ChunkedBody:
    """Takes the coding off, however the network cut the bytes; no I/O.

    It only knows what is usual. ``rest`` is None while the body goes on. At its last chunk, and at whatever is not as
    it should be, ``rest`` has the bytes from there on, for a full HTTP parser that stands at a chunk's beginning.
    """

    __slots__ = ("_begun", "_left", "rest")

    def __init__(self) -> None:
        self._begun = b""  # of a header, or of the line end behind a chunk
        self._left = 0  # bytes of the chunk under way that are still to come
        self.rest: bytes | None = None

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes and return the payload among them. Of no use any more once ``rest`` is there."""
        if self._left == 0 and not self._begun:  # the usual read is one chunk, whole
            header = _HEADER.match(data)
            if header is not None:
                start, size = header.end(), int(header[1], 16)
                if size and len(data) == start + size + 2 and data.endswith(b"\r\n"):
                    return data[start:-2]
        return self._feed(data)

    def _feed(self, data: bytes) -> bytes:
        if self._begun:
            data, self._begun = self._begun + data, b""
        payload: list[bytes] = []
        at, length = 0, len(data)
        while at < length:
            if not self._left:
                at = _take_whole_chunks(data, at, payload)
                if at == length:
                    break
            if self._left > 2:  # of payload; the chunk's own line end counts as part of it
                piece = data[at : at + self._left - 2]
                payload.append(piece)
                at += len(piece)
                self._left -= len(piece)
            elif self._left:
                if length - at < 2:
                    self._begun = data[at:]
                    break
                if data[at : at + 2] != b"\r\n":
                    self.rest = _NO_HEADER + data[at:]
                    break
                at += 2
                self._left = 0
            else:
                header = _HEADER.match(data, at)
                if header is None:
                    if length - at > _MAX_HEADER or b"\n" in data[at:]:
                        self.rest = data[at:]
                    else:
                        self._begun = data[at:]
                    break
                size = int(header[1], 16)
                if size == 0:
                    self.rest = data[at:]
                    break
                at = header.end()
                self._left = size + 2
        return b"".join(payload)


def _take_whole_chunks(data: bytes, at: int, payload: list[bytes]) -> int:
    """Put the payload of the chunks that begin at ``at`` into ``payload``, as far as they are plain and whole; returns
    where they end."""
    while (end := data.find(b"\r\n", at, at + _MAX_SIZE)) > 0:
        begin = end + 2
        behind = begin + _size_of(data[at:end])
        if behind <= begin or data[behind : behind + 2] != b"\r\n":
            break
        payload.append(data[begin:behind])
        at = behind + 2
    return at


@functools.lru_cache(maxsize=1024)  # an endpoint's chunks are of few sizes
def _size_of(digits: bytes) -> int:
    """The size that a chunk's header gives; 0 where it has more to say, or is none."""
    return int(digits, 16) if _SIZE.fullmatch(digits) else 0
