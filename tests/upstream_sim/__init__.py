"""The scripted upstream: an OpenAI-compatible endpoint over raw sockets that misbehaves on a test's command.

A test sets ``upstream.script``; each request that arrives becomes a :class:`Call` and is handed to the script, which
decides every byte of the answer and when it is sent. What the relay does in return (how often it asks, when it closes
and how) stands in the call afterwards.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

from multidict import CIMultiDict

__all__ = ["Call", "Script", "ScriptedUpstream", "answer", "chunk"]

_LINGER_ZERO = struct.pack("ii", 1, 0)


def chunk(delta: dict[str, Any] | None = None, finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """One ``chat.completion.chunk`` as OpenAI sends it."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "sim", "choices": choices, **fields}


class Call:
    """One request that the upstream got, and the pen that writes its answer."""

    def __init__(self, connection: _Connection, method: str, path: str, headers: CIMultiDict[str], body: bytes) -> None:
        self._connection = connection
        self._chunked = False
        self._until_close = False
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.began_at = asyncio.get_running_loop().time()  # s, loop clock
        self.gone_at: float | None = None  # s, loop clock: when the asker's FIN or RST arrived
        self.gone_how: str | None = None  # "fin" or "rst"
        self.ended = False  # the answer has its end; the connection may live on, in the asker's pool
        self.error: BaseException | None = None  # what the script died of
        self._gone = asyncio.Event()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def open(self) -> bool:
        """Whether the answer is still under way and both sides hold the connection."""
        return not self.ended and self.gone_at is None and not self._connection.transport.is_closing()

    async def send(self, data: bytes) -> None:
        """Put raw bytes on the wire."""
        if not self._connection.transport.is_closing():
            self._connection.transport.write(data)
        await self._connection.drained.wait()

    async def head(self, status: int = 200, content_type: str | None = "text/event-stream", **headers: str) -> None:
        """Send the head, headers as ``Retry_After="1"``; chunked unless Content_Length or Connection is given."""
        lines = [f"HTTP/1.1 {status} Scripted"]
        if content_type is not None:
            lines.append(f"Content-Type: {content_type}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self._until_close = headers.get("Connection") == "close"
        self._chunked = "Content_Length" not in headers and not self._until_close and status != 204
        if self._chunked:
            lines.append("Transfer-Encoding: chunked")
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data

    async def write(self, data: bytes) -> None:
        """Send body bytes, chunk-framed where the head said so, in one segment."""
        await self.send(self.framed(data))

    async def event(self, value: Any) -> None:
        """Send one event; anything but text is sent as JSON."""
        await self.write(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode())

    async def token(self, text: str) -> None:
        await self.event(chunk({"content": text}))

    async def finish(self, reason: str = "stop") -> None:
        await self.event(chunk({}, reason))

    async def done(self) -> None:
        """Send ``[DONE]`` and end the body."""
        await self.event("[DONE]")
        await self.end()

    async def end(self) -> None:
        """End the body as its framing asks, keeping the connection where it may be kept."""
        self.ended = True
        if self._chunked:
            await self.send(b"0\r\n\r\n")
        elif self._until_close:
            self.close()

    async def refuse(self, status: int, error: Any = None, **headers: str) -> None:
        """Answer with an error object, as OpenAI does."""
        body = json.dumps(
            {"error": error or {"message": "scripted", "type": "x", "param": None, "code": None}}
        ).encode()
        await self.head(status, "application/json", Content_Length=str(len(body)), **headers)
        self.ended = True
        await self.send(body)

    def close(self) -> None:
        """FIN, after what was written."""
        self._connection.transport.close()

    def reset(self) -> None:
        """RST, at once."""
        sock = self._connection.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self._connection.transport.abort()

    async def gone(self) -> None:
        """Wait until the asker has closed the connection."""
        await self._gone.wait()

    def _leave(self, how: str) -> None:
        if self.gone_at is None:
            self.gone_at = asyncio.get_running_loop().time()
            self.gone_how = how
            self._gone.set()


Script = Callable[[Call], Awaitable[None]]


def answer(
    tokens: Iterable[str] = ("Hel", "lo"),
    *,
    gap: float = 0.0,
    finish: str = "stop",
    usage: tuple[int, int] | None = (3, 2),
) -> Script:
    """A well-behaved answer: a role-only delta, the tokens ``gap`` seconds apart, finish_reason, usage, ``[DONE]``."""
    texts = list(tokens)

    async def script(call: Call) -> None:
        await call.head()
        await call.event(chunk({"role": "assistant", "content": ""}))
        for text in texts:
            await call.token(text)
            if gap:
                await asyncio.sleep(gap)
        await call.finish(finish)
        if usage is not None:
            prompt, completion = usage
            await call.event(chunk(usage={"prompt_tokens": prompt, "completion_tokens": completion}))
        await call.done()

    return script


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self._upstream = upstream
        self._received = bytearray()
        self._call: Call | None = None
        self.drained = asyncio.Event()
        self.drained.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop registers no base class
        self._upstream.connections += 1
        self._upstream.open_connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, rest = bytes(self._received).partition(b"\r\n\r\n")
        if not separator:
            return
        request_line, *lines = head.decode("latin-1").split("\r\n")
        headers: CIMultiDict[str] = CIMultiDict()
        for line in lines:
            name, _, value = line.partition(": ")
            headers.add(name, value)
        length = int(headers.get("Content-Length", "0"))
        if len(rest) < length:
            return
        del self._received[: len(head) + 4 + length]
        method, path, _ = request_line.split(" ")
        self._call = Call(self, method, path, headers, rest[:length])
        self._upstream.answer(self._call)

    def eof_received(self) -> None:
        if self._call:
            self._call._leave("fin")

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.open_connections.discard(self)
        self.drained.set()
        if self._call:
            self._call._leave("rst" if exc else "fin")

    def pause_writing(self) -> None:
        self.drained.clear()

    def resume_writing(self) -> None:
        self.drained.set()


class ScriptedUpstream:
    """Listens on a loopback port; an async context manager."""

    def __init__(self) -> None:
        self.script: Script = answer()
        self.calls: list[Call] = []
        self.connections = 0  # accepted so far
        self.open_connections: set[_Connection] = set()
        self._arrival = asyncio.Event()  # set at the next call, then replaced
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def open_calls(self) -> list[Call]:
        return [call for call in self.calls if call.open]

    async def __aenter__(self) -> ScriptedUpstream:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        for connection in list(self.open_connections):
            connection.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def answer(self, call: Call) -> None:
        """Hand an arrived request to the script, in a task of its own."""
        self.calls.append(call)
        self._arrival.set()
        self._arrival = asyncio.Event()
        task = asyncio.create_task(self._run(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, call: Call) -> None:
        try:
            await self.script(call)
        except Exception as exc:  # kept for the test to see: a script must not die unseen
            call.error = exc
            call.close()

    async def called(self, count: int = 1) -> Call:
        """Wait until ``count`` requests have arrived and return the last of them."""
        while len(self.calls) < count:
            await self._arrival.wait()
        return self.calls[count - 1]
