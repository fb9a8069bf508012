"""The browsers of the benchmark: many streams at once over raw sockets, every token checked for its stream and place.

A viewer reads just enough: the status, the chunk framing, and the simulator's tokens wherever they stand, so the same
viewer reads a relay's events and the endpoint's own chunks.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import quote

__all__ = ["ChunkedBody", "Record", "TokenCheck", "Viewer", "ViewerFailed", "ask_endpoint", "ask_relay", "open_viewers"]

_TOKEN = re.compile(rb"\[(\d+)\.(\d+)\.(\d+)\]")
_TAIL_BYTES = 64  # a token is shorter, so what the network cut apart meets again
_LINGER_ZERO = struct.pack("ii", 1, 0)
_OPENING_TIMEOUT_S = 60.0  # for all of a run
_OPENING_AT_ONCE = 32  # connections on their way; well under any listener's backlog

Ask = Callable[[str], bytes]  # a prompt to the bytes of the request


class ViewerFailed(Exception):
    """A stream was refused, broke off, or told of an error: the figures of this run would mean nothing."""


def ask_relay(prompt: str, *, resumable: bool = True) -> bytes:
    """The browser's request; without ``resumable`` it asks as curl does, and its answer stops when it leaves."""
    accept = "text/event-stream" if resumable else "*/*"
    return f"GET /api/stream?q={quote(prompt)} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\n\r\n".encode()


def ask_endpoint(prompt: str) -> bytes:
    """The same question to the endpoint itself."""
    body = json.dumps({"model": "bench", "stream": True, "messages": [{"role": "user", "content": prompt}]})
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


class ChunkedBody:
    """Chunked transfer coding back to its payload (RFC 9112, 7.1), fed in any cuts."""

    __slots__ = ("_left", "_rest", "ended")

    def __init__(self) -> None:
        self._rest = b""
        self._left = 0  # bytes of the running chunk that are still to come, its CRLF included
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes and return the payload among them."""
        data, at = self._rest + data, 0
        payload = []
        while not self.ended:
            if not self._left:
                end = data.find(b"\r\n", at)
                if end < 0:
                    break
                size = int(data[at:end].partition(b";")[0], 16)
                at = end + 2
                self._left, self.ended = size + 2, not size
                continue
            piece = data[at : at + self._left]
            payload.append(piece[: max(0, self._left - 2)])
            at += len(piece)
            self._left -= len(piece)
            if self._left:
                break
        self._rest = data[at:]
        return b"".join(payload)


class TokenCheck:
    """Whether one stream's tokens arrived once, in order, and in the right stream."""

    __slots__ = ("doubled", "lost", "misplaced", "next", "stream")

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.next = 0
        self.lost = self.doubled = self.misplaced = 0

    def take(self, stream: int, number: int) -> None:
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


@dataclass(slots=True)
class Record:
    """What all viewers of a run write down while ``recording`` is on."""

    recording: bool = False
    tokens: int = 0
    bytes: int = 0  # of the events, HTTP's framing taken off
    late_ns: array[int] = field(default_factory=lambda: array("q"))  # from the endpoint's write to the viewer's read


class Viewer(asyncio.Protocol):
    """One stream. ``asked_ns`` and ``first_token_ns`` are CLOCK_MONOTONIC nanoseconds."""

    _transport: asyncio.Transport

    def __init__(self, request: bytes, stream: int, record: Record) -> None:
        self._request = request
        self._record = record
        self._head: bytes | None = b""  # until it is complete
        self._body = ChunkedBody()
        self._tail = b""
        self._waiting: asyncio.Future[None] | None = None
        self._waiting_for = 0  # tokens
        self.check = TokenCheck(stream)
        self.failure = ""
        self.asked_ns = self.first_token_ns = self.left_ns = 0

    async def tokens(self, count: int) -> None:
        """Wait until so many have arrived."""
        if self.check.next < count and not self.failure:
            self._waiting_for = count
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        if self.failure:
            raise ViewerFailed(f"stream {self.check.stream}: {self.failure}")

    async def end(self) -> None:
        """Wait until the response has its end."""
        async with asyncio.timeout(_OPENING_TIMEOUT_S):
            while not (self._body.ended or self.failure):  # noqa: ASYNC110  no token tells of it
                await asyncio.sleep(0.005)

    def leave(self, *, reset: bool = False) -> None:
        """Close the connection, with FIN or with RST."""
        if reset:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self.left_ns = time.monotonic_ns()
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.asked_ns = time.monotonic_ns()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        if self._head is not None:
            self._head += data
            head, separator, data = self._head.partition(b"\r\n\r\n")
            if not separator:
                return
            if not head.startswith(b"HTTP/1.1 200") or b"\r\ntransfer-encoding: chunked" not in head.lower():
                self._fail(f"no stream but {self._head!r}")
                return
            self._head = None
        self._read(self._body.feed(data), now_ns)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.left_ns and not self._body.ended:
            self._fail(f"the connection was lost: {exc}")

    def _read(self, payload: bytes, now_ns: int) -> None:
        text, at = self._tail + payload, 0
        record, check = self._record, self.check
        if record.recording:
            record.bytes += len(payload)
        for match in _TOKEN.finditer(text):
            at = match.end()
            stream, number, written_ns = map(int, match.groups())
            check.take(stream, number)
            if record.recording:
                record.tokens += 1
                record.late_ns.append(now_ns - written_ns)
        if at and not self.first_token_ns:
            self.first_token_ns = now_ns
        if text.find(b'"error"', at) >= 0:
            self._fail(repr(text[at:]))
        self._tail = text[max(at, len(text) - _TAIL_BYTES) :]
        if self._waiting and check.next >= self._waiting_for and not self._waiting.done():
            self._waiting.set_result(None)

    def _fail(self, failure: str) -> None:
        self.failure = failure
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(None)


async def open_viewers(port: int, ask: Ask, prompts: Iterable[tuple[int, str]], record: Record) -> list[Viewer]:
    """Open a viewer for each stream id and prompt, some at a time, and wait for the first token of each."""
    gate = asyncio.Semaphore(_OPENING_AT_ONCE)
    loop = asyncio.get_running_loop()

    async def open_one(stream: int, prompt: str) -> Viewer:
        viewer = Viewer(ask(prompt), stream, record)
        async with gate:
            await loop.create_connection(lambda: viewer, "127.0.0.1", port)
            await viewer.tokens(1)
        return viewer

    async with asyncio.timeout(_OPENING_TIMEOUT_S):
        return await asyncio.gather(*(open_one(stream, prompt) for stream, prompt in prompts))
