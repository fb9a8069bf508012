"""An answer at the test's pace, and a client that comes back for it as an EventSource does."""

from __future__ import annotations

import asyncio
import json

from tests.api.raw_client import LEAVING, RawClient, Response, request
from tests.conftest import InProcess
from tests.sse_client import AnswerReader
from tests.upstream_sim import Call, chunk

__all__ = ["CHAT", "FACES", "RESUMABLE", "WAYS", "Paced", "Returning", "post"]

RESUMABLE = "Accept: text/event-stream"  # who says so can go on where it was (contract, section 3)
FACES = ["/api/stream", "/api/streams/SID"]
WAYS = [*LEAVING, "silence"]  # the last: no FIN at all, the old connection stays open and is never looked at again

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class Paced:
    """An answer of seven events, of which the test releases one step after the other."""

    tokens = ("Hel", "lo ", "wörld 😀\n\ndata: [DONE]\n\n")
    last = 6  # the number of [DONE]; 0 is the start, 1 to 4 are these steps, 5 the usage

    def __init__(self) -> None:
        self._gate = asyncio.Semaphore(0)
        self._released = 0

    async def __call__(self, call: Call) -> None:
        first, second, third = self.tokens
        await call.head()
        for delta in ({"content": first}, {"reasoning_content": "hm"}, {"content": second}, {"content": third}):
            await self._gate.acquire()
            await call.event(chunk(delta))
        await self._gate.acquire()
        await call.finish()
        await call.done()

    def release(self, up_to: int) -> None:
        """Let the answer come as far as event ``up_to``."""
        while self._released < min(up_to, 5):
            self._released += 1
            self._gate.release()


async def post(port: int, *headers: str) -> str:
    """``POST /api/streams``: returns the new stream's URL."""
    async with await RawClient.connect(port) as client:
        body = json.dumps(CHAT).encode()
        framing = ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        response = await client.ask(request("/api/streams", *headers, *framing, method="POST", body=body))
        assert response.status == 201, response.body
        assert response.headers["Location"] == response.json["url"] == f"/api/streams/{response.json['id']}"
        return response.headers["Location"]


class Returning:
    """Views ``target`` of the server at ``port``; what it has been given stands in ``reader``.

    ``resumable`` is whether it says that it can come back. Each connection it ever had is closed by :meth:`close`.
    """

    def __init__(
        self, port: int, target: str, *, resumable: bool = True, receive_buffer: int | None = None, headers: str = ""
    ) -> None:
        self.port = port
        self.target = target
        self.reader = AnswerReader()
        self.connections: list[RawClient] = []
        self._headers = ([RESUMABLE] if resumable else []) + ([headers] if headers else [])
        self._receive_buffer = receive_buffer
        self._pending = b""  # here, but not looked at yet
        self._over = False  # the response has its end

    @classmethod
    async def of(cls, server: InProcess, face: str) -> Returning:
        """A client that asks by that face; nothing is asked for yet where that is one request."""
        return cls(server.port, "/api/stream?q=hi" if face == "/api/stream" else await post(server.port))

    @property
    def client(self) -> RawClient:
        return self.connections[-1]

    @property
    def stream_id(self) -> str:
        if self.reader.last_event_id is not None:
            return self.reader.last_event_id.rpartition(".")[0]
        return self.target.rpartition("/")[2]

    async def come(self, over: RawClient | None = None) -> Response:
        """Ask, on a new connection if not ``over`` one there is, from behind the last event seen; returns the head."""
        seen = self.reader.last_event_id
        headers = [*self._headers, *([] if seen is None else [f"Last-Event-ID: {seen}"])]
        client = over or await RawClient.connect(self.port, receive_buffer=self._receive_buffer)
        self.connections.append(client)
        self._pending, self._over = b"", False
        await client.send(request(self.target, *headers))
        response = await client.read_head()
        if response.status != 200:
            self._over = True
        return response

    async def hear(self, number: int, *, torn: bool = False) -> None:
        """Look at what comes up to event ``number``, and if ``torn``, at half of the next one's bytes."""
        while self.reader.seen < number:
            await self._look_at(1.0)
        if torn:
            await self._look_at(0.5)

    async def hear_all(self) -> None:
        """Look at everything up to the end of the response."""
        while not self._over:
            self.reader.feed(self._pending)
            self._pending = await self.client.read_chunk()
            self._over = not self._pending

    def leave(self, way: str) -> None:
        if way != "silence":
            LEAVING[way](self.client)
        self._pending = b""
        self.reader.disconnected()

    def close(self) -> None:
        for client in self.connections:
            client.close()

    async def _look_at(self, part: float) -> None:
        """At that part of the next block."""
        while b"\n\n" not in self._pending:
            data = await self.client.read_chunk()
            assert data, "the response ended before the event that was waited for"
            self._pending += data
        size = self._pending.index(b"\n\n") + 2
        self.reader.feed(self._pending[: int(size * part)])
        self._pending = self._pending[size:]
