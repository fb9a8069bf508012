"""The browsers of the benchmark: many streams at once over raw sockets, every token checked for its stream and place.

A viewer reads just enough: the status, the chunk framing, and the simulator's tokens wherever they stand, so the same
viewer reads a relay's events and the endpoint's own chunks.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import struct
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import quote_plus

from ops.bench.tokens import TEXT_BYTES, TokenCheck, late_us, stamps_in

__all__ = [
    "Ask",
    "ChunkedBody",
    "Client",
    "Record",
    "Viewer",
    "ViewerFailed",
    "ask_endpoint",
    "ask_relay",
    "open_clients",
    "open_viewers",
]

_LINGER_ZERO = struct.pack("ii", 1, 0)
_OPENING_TIMEOUT_S = 60.0  # for all of a run
_OPENING_AT_ONCE = 32  # connections on their way; well under any listener's backlog

Ask = Callable[[str], bytes]  # a prompt to the bytes of the request


class ViewerFailed(Exception):
    """A stream was refused, broke off, or told of an error: the figures of this run would mean nothing."""


def ask_relay(prompt: str, *, resumable: bool = True) -> bytes:
    """The browser's request; without ``resumable`` it asks as curl does, and its answer stops when it leaves."""
    accept = "text/event-stream" if resumable else "*/*"
    return f"GET /api/stream?q={quote_plus(prompt)} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\n\r\n".encode()


def ask_endpoint(prompt: str) -> bytes:
    """The same question to the endpoint itself, or to a proxy that passes it on as it is."""
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
        """Take the next bytes and return the payload among them. Raises ValueError where a size is no number."""
        if self._rest:
            data = self._rest + data
        payload = [data[: max(0, self._left - 2)]]
        at, total = self._left, len(data)
        line, size = b"", 0
        while at < total:
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            if data[at:end] != line:  # chunks of one size follow each other
                line = data[at:end]
                size = int(line.partition(b";")[0], 16)
            if not size:
                self.ended = True
                break
            payload.append(data[end + 2 : end + 2 + size])
            at = end + 2 + size + 2
        self._rest, self._left = data[at:], max(0, at - total)
        return b"".join(payload)


@dataclass(slots=True)
class Record:
    """What all viewers of a run write down while ``recording`` is on."""

    recording: bool = False
    timed: bool = True  # whether lateness and gaps are wanted, which cost Python code for each token
    tokens: int = 0
    reads: int = 0  # that brought tokens
    answers: int = 0  # that have ended
    bytes: int = 0  # of the events, HTTP's framing taken off
    wrong: int = 0  # tokens of answers that have ended: lost, doubled or misplaced
    late_us: array[int] = field(default_factory=lambda: array("q"))  # from the endpoint's write to the viewer's read
    gap_us: array[int] = field(default_factory=lambda: array("q"))  # between two reads of one stream, none in one read


class _Reader(asyncio.Protocol):
    """One connection, and the answer that is running on it."""

    _transport: asyncio.Transport

    def __init__(self, record: Record) -> None:
        self._record = record
        self._head: bytes | None = b""  # until it is complete
        self._body = ChunkedBody()
        self._tail = b""
        self._read_ns = 0
        self.check = TokenCheck(0)
        self.failure = ""

    def _ask(self, request: bytes, stream: int) -> None:
        self._head, self._body, self._tail = b"", ChunkedBody(), b""
        self._read_ns = 0
        self.check = TokenCheck(stream)
        self._transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

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
        self._take(self._body.feed(data), now_ns)
        if self._body.ended:
            self._ended()

    def _take(self, payload: bytes, now_ns: int) -> None:
        text = self._tail + payload
        record = self._record
        count = self.check.read(text)
        # What the network cut apart meets again; a token that was whole must not.
        at = self.check.read_to
        self._tail = text[max(at, len(text) - TEXT_BYTES) :]
        if record.recording:
            record.bytes += len(payload)
            record.tokens += count
            record.reads += count > 0
            if record.timed and count:
                record.late_us.extend([late_us(stamp, now_ns) for stamp in stamps_in(text)])
                if self._read_ns:
                    record.gap_us.append((now_ns - self._read_ns) // 1000)
        if count:
            self._read_ns = now_ns
        if b'"error"' in self._tail:
            self._fail(repr(text[at:]))

    def _ended(self) -> None:
        """The answer has its end."""

    def _fail(self, failure: str) -> None:
        self.failure = self.failure or failure


class Viewer(_Reader):
    """One stream. ``asked_ns`` and ``first_token_ns`` are CLOCK_MONOTONIC nanoseconds."""

    def __init__(self, request: bytes, stream: int, record: Record) -> None:
        super().__init__(record)
        self._request = request
        self._waiting: asyncio.Future[None] | None = None
        self._waiting_for = 0  # tokens
        self.check = TokenCheck(stream)
        self._leaving = False
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
        self._leaving = True
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.asked_ns = time.monotonic_ns()
        self._ask(self._request, self.check.stream)

    def connection_lost(self, exc: Exception | None) -> None:
        self.left_ns = time.monotonic_ns()  # the socket is closed as soon as this returns
        if not self._leaving and not self._body.ended:
            self._fail(f"the connection was lost: {exc}")

    def _take(self, payload: bytes, now_ns: int) -> None:
        super()._take(payload, now_ns)
        if self.check.next and not self.first_token_ns:
            self.first_token_ns = now_ns
        if self._waiting and self.check.next >= self._waiting_for and not self._waiting.done():
            self._waiting.set_result(None)

    def _fail(self, failure: str) -> None:
        super()._fail(failure)
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(None)


class Client(_Reader):
    """Asks again as soon as it has its answer, on the same connection (a closed loop)."""

    def __init__(self, ask: Ask, streams: Iterator[int], tokens: int, record: Record) -> None:
        super().__init__(record)
        self._question = ask
        self._streams = streams
        self._tokens = tokens
        self._leaving = False

    def leave(self) -> None:
        self._leaving = True
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._leaving:
            self._fail(f"the connection was lost: {exc}")

    def ask(self) -> None:
        """Ask the next question."""
        stream = next(self._streams)
        self._ask(self._question(f"id={stream} tokens={self._tokens} rate=0"), stream)

    def _ended(self) -> None:
        self.check.end(self._tokens)
        self._record.wrong += self.check.wrong
        if b"[DONE]" not in self._tail:
            self._fail("an answer ended without [DONE]")
        if self._record.recording:
            self._record.answers += 1
        if not self.failure and not self._leaving:
            self.ask()

    def _fail(self, failure: str) -> None:
        super()._fail(failure)
        self._transport.abort()


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


async def open_clients(port: int, ask: Ask, count: int, tokens: int, record: Record) -> list[Client]:
    """So many clients, each of which asks for answers of so many tokens, one after the other, until it leaves."""
    loop, streams = asyncio.get_running_loop(), itertools.count(1)
    clients = [Client(ask, streams, tokens, record) for _ in range(count)]
    async with asyncio.timeout(_OPENING_TIMEOUT_S):
        for client in clients:
            await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
    for client in clients:  # all of them are there: none has to connect to a server that the others keep busy
        client.ask()
    return clients
