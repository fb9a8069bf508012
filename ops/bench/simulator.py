"""The endpoint of the benchmark: an OpenAI-compatible stream over raw sockets, at the pace that the prompt asks for.

``python -m ops.bench.simulator --port P``. The last user message says how to answer, as words ``name=value``:

    id=17          the number that the stream's tokens carry
    tokens=500     how many tokens
    rate=50        tokens per second; 0 = as fast as they are read
    head_after=1   seconds before the status line
    first_after=1  seconds between the head (and the role-only delta) and the first token
    start=12.5     (with a rate) when the second token leaves, in seconds of CLOCK_MONOTONIC; so many streams are opened
                   in peace, each with its first token, and flow from one moment on
    phase=0.25     (with a rate) tokens leave when the clock shows that part of a token's interval; so streams keep
                   their places among each other, however slowly or together they were opened
    hold=1         stay silent after the last token instead of ending the answer

Each token is a chunk of its own, as most endpoints send it; its text is that of ``ops.bench.tokens``, so a viewer on
the same machine can compare its stamp with its own clock. ``GET /departures`` tells when each stream's asker arrived
and left (CLOCK_MONOTONIC, ns).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import http.client
import json
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import msgspec

from ops.bench.procs import fast_loop
from ops.bench.ticker import Ticker
from ops.bench.tokens import MAX_ID, MAX_NUMBER, TEXT_BYTES, stamp_us

__all__ = ["TICK_NS", "Behaviour", "Departures", "Endpoint", "Pace", "Wheel", "ask_departures", "read_behaviour"]

# One timer for all streams: a token leaves up to a tick (and the loop's own lag) too late. Real streams know nothing of
# each other; with ticks of a millisecond a server would wake up once for ten of them, and look cheaper than it is.
TICK_NS = 200_000

_PREFIX = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"bench",'
    b'"system_fingerprint":"fp_bench","choices":[{"index":0,"delta":{'
)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_ROLE = _PREFIX + b'"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
_FINISH = _PREFIX + b'},"logprobs":null,"finish_reason":"stop"}]}\n\n'
_USAGE = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"bench",'
    b'"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d,"total_tokens":%d}}\n\n'
)
_DONE = b"data: [DONE]\n\n"

_UP_TO_TEXT = _PREFIX + b'"content":"'
_FROM_TEXT = b'"},"logprobs":null,"finish_reason":null}]}\n\n'
_OPENS = b"%x\r\n%b" % (len(_UP_TO_TEXT) + TEXT_BYTES + len(_FROM_TEXT), _UP_TO_TEXT)  # a token's chunk, to its text
_CLOSES = _FROM_TEXT + b"\r\n"

# From one token's number to the next token's stamp; what stands there is all that tells two of them apart.
_BETWEEN = [b"%07d]%b%b" % (number, _CLOSES, _OPENS) for number in range(16_384)]

_POURED_AT_ONCE = 512  # tokens of an answer without a rate, before other streams get their turn


def token_chunks(stream: int, numbers: range, now_ns: int) -> bytes:
    """The tokens of that stream, one chunk each: a tenth of a microsecond a token where there are many."""
    if not numbers:
        return b""
    last = numbers[-1]
    if last <= len(_BETWEEN):
        between = _BETWEEN[numbers.start : last]
    else:
        between = [b"%07d]%b%b" % (number, _CLOSES, _OPENS) for number in numbers[:-1]]
    place = b"[%08d.%06d." % (stamp_us(now_ns), stream)
    return place.join((_OPENS, *between, b"%07d]%b" % (last, _CLOSES)))


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How one request is answered; the module's docstring says what each word means."""

    tokens: int = 1
    rate: float = 0.0
    id: int = 0
    head_after: float = 0.0
    first_after: float = 0.0
    start: float = 0.0
    phase: float | None = None
    hold: bool = False


class _Message(msgspec.Struct):
    role: str
    content: str


class _ChatRequest(msgspec.Struct):
    messages: list[_Message]


_decode_request = msgspec.json.Decoder(_ChatRequest).decode


def read_behaviour(body: bytes) -> Behaviour:
    """The behaviour that the last user message of a chat request asks for; what it does not name has its default.

    Raises ValueError where an id or a number of tokens is larger than a token's text can tell.
    """
    messages = _decode_request(body).messages
    return _behaviour(next(message.content for message in reversed(messages) if message.role == "user"))


def _behaviour(prompt: str) -> Behaviour:
    words: dict[str, str] = dict(re.findall(r"(\w+)=([0-9.]+)", prompt))
    asked = Behaviour(
        tokens=int(words.get("tokens", 1)),
        rate=float(words.get("rate", 0)),
        id=int(words.get("id", 0)),
        head_after=float(words.get("head_after", 0)),
        first_after=float(words.get("first_after", 0)),
        start=float(words.get("start", 0)),
        phase=float(words["phase"]) if "phase" in words else None,
        hold="hold" in words,
    )
    if asked.id > MAX_ID or asked.tokens > MAX_NUMBER:
        raise ValueError(f"larger than a token's text can tell: {prompt}")
    return asked


class Pace:
    """When the tokens of one stream are due: the first at ``first_ns``, then ``rate`` a second. No drift: a late
    look finds more tokens due."""

    __slots__ = ("first_ns", "rate", "sent", "total")

    def __init__(self, first_ns: int, rate: float, total: int) -> None:
        self.first_ns, self.rate, self.total, self.sent = first_ns, rate, total, 0

    def take(self, now_ns: int, most: int = MAX_NUMBER) -> range:
        """The numbers of the tokens that became due since the last call, and no more than ``most`` of them."""
        start = self.sent
        if now_ns >= self.first_ns:
            due = int((now_ns - self.first_ns) * self.rate // 1_000_000_000) + 1 if self.rate else self.total
            self.sent = max(start, min(due, self.total, start + most))
        return range(start, self.sent)

    def wait(self, start_ns: int) -> None:
        """The first token has been sent: the second is due at ``start_ns``."""
        self.sent = 1
        self.first_ns = start_ns - int(1_000_000_000 / self.rate)

    def align(self, phase: float) -> None:
        """Put the first token off, by less than an interval, to where the clock shows ``phase`` of one."""
        interval_ns = int(1_000_000_000 / self.rate)
        self.first_ns += (int(phase * interval_ns) - self.first_ns) % interval_ns

    @property
    def next_ns(self) -> int:
        """When the next token is due; rounded up, so that a look at that moment finds it."""
        return self.first_ns + (math.ceil(self.sent * 1_000_000_000 / self.rate) if self.rate else 0)


class Wheel:
    """What is to be done when, in slots of one tick: a step costs what is due, not what is waiting."""

    def __init__(self, now_ns: int) -> None:
        self._slots: defaultdict[int, list[Callable[[int], None]]] = defaultdict(list)
        self._turned = now_ns // TICK_NS

    def __bool__(self) -> bool:
        return bool(self._slots)

    def add(self, due_ns: int, action: Callable[[int], None]) -> None:
        """Have ``action(now_ns)`` called by the first turn that is not before ``due_ns``."""
        self._slots[max(-(-due_ns // TICK_NS), self._turned + 1)].append(action)

    def turn(self, now_ns: int) -> None:
        """Do what has become due."""
        last = now_ns // TICK_NS
        if not self._slots:
            self._turned = last
        for slot in range(self._turned + 1, last + 1):
            self._turned = slot
            for action in self._slots.pop(slot, ()):
                action(now_ns)


@dataclass(frozen=True, slots=True)
class Departures:
    """By stream: when its request was there, and when its asker left before the end (CLOCK_MONOTONIC, ns)."""

    arrived: dict[int, int]
    left: dict[int, int]


class Endpoint:
    """What all connections share: the one timer, and the book of arrivals and departures."""

    def __init__(self) -> None:
        self.departures = Departures({}, {})
        self._wheel = Wheel(time.monotonic_ns())
        self._ticker = Ticker(TICK_NS, self._tick)

    def at(self, due_ns: int, action: Callable[[int], None]) -> None:
        """Have ``action(now_ns)`` called at ``due_ns`` or up to a tick later."""
        if not self._ticker.running:
            self._wheel.turn(time.monotonic_ns())  # it is empty, and only catches up with the clock
            self._ticker.start()
        self._wheel.add(due_ns, action)

    def _tick(self) -> None:
        self._wheel.turn(time.monotonic_ns())
        if not self._wheel:
            self._ticker.stop()

    def connection(self) -> asyncio.Protocol:
        return _Connection(self)


class _Connection(asyncio.Protocol):
    _transport: asyncio.Transport

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._received = b""
        self._behaviour: Behaviour | None = None  # of the answer that is running
        self._pace = Pace(0, 0.0, 0)
        self._paused = False
        self._going_on = False  # whether somebody will call _go_on anyway

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, rest = self._received.partition(b"\r\n\r\n")
        size = _content_length(head)
        if not separator or len(rest) < size:
            return
        self._received = rest[size:]
        if head.startswith(b"POST "):
            self._answer(rest[:size])
        else:
            self._tell_departures()

    def eof_received(self) -> None:
        self._left()

    def connection_lost(self, exc: Exception | None) -> None:
        self._left()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if not self._going_on:
            self._go_on(time.monotonic_ns())

    def _left(self) -> None:
        if self._behaviour is not None:
            self._endpoint.departures.left[self._behaviour.id] = time.monotonic_ns()
            self._behaviour = None

    def _tell_departures(self) -> None:
        book = self._endpoint.departures
        body = json.dumps({"arrived": book.arrived, "left": book.left}).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)

    def _answer(self, body: bytes) -> None:
        now_ns = time.monotonic_ns()
        self._behaviour = behaviour = read_behaviour(body)
        self._endpoint.departures.arrived[behaviour.id] = now_ns
        if behaviour.head_after:
            self._endpoint.at(now_ns + int(behaviour.head_after * 1e9), self._begin)
        else:
            self._begin(now_ns)

    def _begin(self, now_ns: int) -> None:
        if self._behaviour is None:
            return
        behaviour = self._behaviour
        self._transport.write(_HEAD + _chunk(_ROLE))
        self._pace = Pace(now_ns + int(behaviour.first_after * 1e9), behaviour.rate, behaviour.tokens)
        if behaviour.start:
            self._transport.write(token_chunks(behaviour.id, range(1), now_ns))
            self._pace.wait(int(behaviour.start * 1e9))
        if behaviour.phase is not None:
            self._pace.align(behaviour.phase)
        self._go_on(now_ns)  # the first token waits for no tick: time to first token is measured against it

    def _go_on(self, now_ns: int) -> None:
        """Write the tokens that are due; then wait for the next, or for the reader, or end."""
        behaviour, pace = self._behaviour, self._pace
        self._going_on = False
        if behaviour is None or self._paused:
            return
        if due := pace.take(now_ns, _POURED_AT_ONCE):
            self._transport.write(token_chunks(behaviour.id, due, time.monotonic_ns()))
        if pace.sent == pace.total:
            self._end(behaviour)
            return
        self._going_on = True
        if pace.next_ns <= now_ns:
            asyncio.get_running_loop().call_soon(self._pour)
        else:
            self._endpoint.at(pace.next_ns, self._go_on)

    def _pour(self) -> None:
        self._go_on(time.monotonic_ns())

    def _end(self, behaviour: Behaviour) -> None:
        if not behaviour.hold:
            usage = _USAGE % (self._pace.total, self._pace.total + 1)
            self._transport.write(_chunk(_FINISH) + _chunk(usage) + _chunk(_DONE) + b"0\r\n\r\n")
            self._behaviour = None


@lru_cache
def _content_length(head: bytes) -> int:
    """Askers repeat their heads, and a closed loop of short answers sends thousands a second."""
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(length[1]) if length else 0


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def ask_departures(port: int) -> Departures:
    """Ask a running simulator who came and who left."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/departures")
    told = json.loads(connection.getresponse().read())
    connection.close()
    return Departures(*({int(stream): ns for stream, ns in told[name].items()} for name in ("arrived", "left")))


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Endpoint().connection, "127.0.0.1", port, backlog=4096)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    print(json.dumps({"event": "listening", "url": url}), file=sys.stderr, flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="The simulated endpoint of the benchmark.")
    parser.add_argument("--port", type=int, default=0)
    port = parser.parse_args().port
    gc.disable()  # a collection would look like lateness of the server under test
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        runner.run(_serve(port))


if __name__ == "__main__":
    main()
