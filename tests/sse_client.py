"""A client of the server's own event stream: asks over a real socket and reads what a browser would.

It shares nothing with server/wire: what it reads is judged by the contract's section 3, not by our own parser.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

__all__ = ["Answer", "Event", "Stream", "ask", "open_stream", "open_view", "view"]


class Event(NamedTuple):
    """One event block; ``id`` is empty where the block has none (a heartbeat)."""

    id: str
    type: str
    data: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def number(self) -> int:
        """N of ``SID.N``."""
        return int(self.id.rpartition(".")[2])


@dataclass(slots=True, kw_only=True)
class Answer:
    """What the server answered: a stream's events, or a refusal's body in ``raw``."""

    status: int
    headers: CIMultiDictProxy[str]
    raw: bytearray = field(default_factory=bytearray)
    events: list[Event] = field(default_factory=list)
    arrived_at: list[float] = field(default_factory=list)  # s, loop clock; one for each event

    @property
    def json(self) -> Any:
        """A refusal's body."""
        return json.loads(self.raw)

    @property
    def messages(self) -> list[Any]:
        """What ``onmessage`` sees, as JSON, but for ``[DONE]``."""
        return [event.json for event in self.events if event.type == "message" and event.data != "[DONE]"]

    @property
    def tokens(self) -> list[str]:
        return [message["token"] for message in self.messages if "token" in message]

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def reasoning(self) -> str:
        return "".join(event.json["reasoning"] for event in self.events if event.type == "reasoning")

    @property
    def usage(self) -> Any:
        """The usage event's fields, or None."""
        return next((event.json for event in self.events if event.type == "usage"), None)

    @property
    def error(self) -> Any:
        """The in-band error's fields, or None."""
        return next((message for message in self.messages if "error" in message), None)

    @property
    def complete(self) -> bool:
        """Whether ``[DONE]`` was seen."""
        return any(event.data == "[DONE]" for event in self.events)


class AnswerReader:
    """What a client that keeps to the standard makes of an answer's bytes, come over one connection or over many.

    A block counts, and its id with it, when its blank line is here; what a connection that ended left of one is dropped
    (WHATWG HTML §9.2.6). Asserts that the ids rise by one from wherever they begin.
    """

    def __init__(self, last_event_id: str | None = None) -> None:
        self.last_event_id = last_event_id
        self.taken = bytearray()  # the blocks that have an id, byte for byte
        self.events: list[Event] = []  # likewise
        self.pings: list[bytes] = []  # the other blocks
        self._partial = b""

    @property
    def seen(self) -> int:
        """The number of the last event seen; -1 for none."""
        return -1 if self.last_event_id is None else int(self.last_event_id.rpartition(".")[2])

    @property
    def ended(self) -> bool:
        """Whether ``[DONE]`` or an error has been seen."""
        return bool(self.events) and (self.events[-1].data == "[DONE]" or self.events[-1].data.startswith('{"error"'))

    @property
    def tokens(self) -> list[str]:
        return [event.json["token"] for event in self.events if event.data.startswith('{"token"')]

    def feed(self, data: bytes) -> None:
        *blocks, self._partial = (self._partial + data).split(b"\n\n")
        for block in blocks:
            event = _read_block(block)
            if not event.id:
                assert event.type == "ping", f"a block without an id: {block!r}"
                self.pings.append(block + b"\n\n")
                continue
            assert not self.ended, f"an event behind the last one: {block!r}"
            assert event.number == self.seen + 1, f"{event.id} follows {self.last_event_id}"
            self.last_event_id = event.id
            self.events.append(event)
            self.taken += block + b"\n\n"

    def disconnected(self) -> None:
        """The connection is over."""
        self._partial = b""


class Stream:
    """An open stream: ``async for event in stream``; what has been read so far stands in ``answer``."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._events = self._read()
        self.answer = Answer(status=response.status, headers=response.headers)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events

    async def _read(self) -> AsyncGenerator[Event, None]:
        partial = b""
        while data := await self._response.content.readany():
            self.answer.raw += data
            *blocks, partial = (partial + data).split(b"\n\n")
            for block in blocks:
                event = _read_block(block)
                self.answer.events.append(event)
                self.answer.arrived_at.append(asyncio.get_running_loop().time())
                yield event
        assert not partial, f"the body ended inside an event: {partial!r}"

    async def token(self) -> str:
        """Read on to the next token and return its text."""
        async for event in self._events:
            if event.type == "message" and "token" in (message := event.json):
                return str(message["token"])
        raise AssertionError("the stream ended without a further token")

    async def read_all(self) -> None:
        """Read on to the end of the response."""
        if self.answer.headers.get("Content-Type", "").startswith("text/event-stream"):
            async for _ in self._events:
                pass
        else:
            self.answer.raw += await self._response.read()

    async def close(self) -> None:
        await self._events.aclose()


@contextlib.asynccontextmanager
async def open_view(url: str | URL, **headers: str) -> AsyncIterator[Stream]:
    """``GET url``, headers as ``Last_Event_ID="…"``. Leaving the context early drops the connection.

    Raises aiohttp.ClientPayloadError where the body is cut: the server ends every response in order.
    """
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
        session.get(
            url,
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            timeout=aiohttp.ClientTimeout(total=50),
        ) as response,
    ):
        stream = Stream(response)
        try:
            yield stream
        finally:
            await stream.close()


async def view(url: str, **headers: str) -> Answer:
    """View the stream at ``url`` to its end."""
    async with open_view(url, **headers) as stream:
        await stream.read_all()
        return stream.answer


def open_stream(url: str, q: str = "hi", **headers: str) -> contextlib.AbstractAsyncContextManager[Stream]:
    """``GET {url}/api/stream?q=…``; otherwise as :func:`open_view`."""
    return open_view(URL(f"{url}/api/stream").with_query(q=q), **headers)


async def ask(url: str, q: str = "hi", **headers: str) -> Answer:
    """Ask, and read the answer to its end."""
    async with open_stream(url, q, **headers) as stream:
        await stream.read_all()
        return stream.answer


def _read_block(block: bytes) -> Event:
    """The contract's blocks use ``name: value`` with LF; anything else is a mistake of the server's."""
    fields = {"id": "", "event": "message", "data": "", "retry": ""}
    for line in block.decode("utf-8").split("\n"):
        name, separator, value = line.partition(": ")
        assert separator, f"a line without a field: {line!r}"
        assert name in fields, f"an unknown field: {line!r}"
        assert name not in {"id", "event", "data"} or fields[name] in {"", "message"}, f"a field twice: {block!r}"
        fields[name] = value
    return Event(fields["id"], fields["event"], fields["data"])
