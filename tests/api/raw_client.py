"""A client that keeps no manners: every byte it sends, every byte it takes and the way it leaves are the test's.

It reads from the socket only when asked to, so what it has not asked for waits in the kernel, as with a reader that has
stopped reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from dataclasses import dataclass, field
from typing import Any, Final

from multidict import CIMultiDict

__all__ = ["ASK", "CHAT", "LEAVING", "RawClient", "Response", "post", "request"]

_LINGER_ZERO: Final = struct.pack("ii", 1, 0)
_PATIENCE: Final = 20.0  # s for one read; a test that waits longer has failed


def request(
    target: str = "/api/stream?q=hi", *headers: str, method: str = "GET", version: str = "1.1", body: bytes = b""
) -> bytes:
    """A request's bytes; headers as ``"Name: value"``. A ``Host`` is added where none is given."""
    lines = [f"{method} {target} HTTP/{version}", *headers]
    if not any(header.lower().startswith("host:") for header in headers):
        lines.insert(1, "Host: sluice.test")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


ASK: Final = request()

CHAT: Final = b'{"messages":[{"role":"user","content":"hi"}]}'


def post(body: bytes = CHAT, *headers: str, target: str = "/api/streams") -> bytes:
    """A POST's bytes, its length announced; ``application/json`` unless the headers give a ``Content-Type``."""
    if not any(header.lower().startswith("content-type:") for header in headers):
        headers = (*headers, "Content-Type: application/json")
    return request(target, *headers, f"Content-Length: {len(body)}", method="POST", body=body)


@dataclass(slots=True)
class Response:
    """One response, its framing undone. ``complete`` says that the end which the framing promised has come."""

    status: int
    version: str
    headers: CIMultiDict[str]
    body: bytes = b""
    complete: bool = False
    chunks: list[bytes] = field(default_factory=list)  # of a chunked body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The code of a refusal."""
        return str(self.json["error"])


class RawClient:
    """One connection; an async context manager. ``received`` holds what was read and not yet handed out."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self.received = bytearray()
        self.at_end = False  # FIN or RST has been read
        self.was_reset = False

    @classmethod
    async def connect(cls, to: int | str, *, receive_buffer: int | None = None, host: str = "127.0.0.1") -> RawClient:
        """Connect to a port, or to a Unix socket's path.

        ``receive_buffer`` (bytes) bounds what the kernel takes for a client that does not read.
        """
        address: str | tuple[str, int]
        if isinstance(to, str):
            family, address = socket.AF_UNIX, to
        else:
            family, address = (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, to)
        sock = socket.socket(family)
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client = cls(sock)
        try:
            await client._loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return client

    async def __aenter__(self) -> RawClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    # ---- Sending and reading

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)

    async def trickle(self, head: bytes) -> None:
        """Send a request's head, and of its body a byte now and then, for ever."""
        await self.send(head)
        while True:
            await self.send(b"1" if b"Content-Length" in head else b"1\r\nx\r\n")
            await asyncio.sleep(0.1)

    async def read(self, most: int = 65_536) -> bytes:
        """What is there, at least one byte; empty at the end."""
        if self.received:
            data = bytes(self.received[:most])
            del self.received[:most]
            return data
        return await self._receive(most)

    async def read_until(self, mark: bytes) -> bytes:
        """Everything up to and with ``mark``. Raises EOFError if the connection ends before."""
        while mark not in self.received:
            data = await self._receive(65_536)
            if not data:
                raise EOFError(bytes(self.received))
            self.received += data
        return self._take(self.received.index(mark) + len(mark))

    async def read_to_end(self) -> bytes:
        """All there is until the server closes."""
        while data := await self._receive(65_536):
            self.received += data
        return self._take(len(self.received))

    async def read_head(self) -> Response:
        head = (await self.read_until(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head[:-4].split("\r\n")
        version, status, _ = status_line.split(" ", 2)
        headers: CIMultiDict[str] = CIMultiDict()
        for line in lines:
            name, _, value = line.partition(": ")
            headers.add(name, value)
        return Response(int(status), version, headers)

    async def read_response(self, *, to: str = "GET") -> Response:
        """One whole response to a request with the method ``to``."""
        response = await self.read_head()
        headers = response.headers
        if to == "HEAD" or response.status in (204, 304) or response.status < 200:
            response.complete = True
        elif headers.get("Transfer-Encoding") == "chunked":
            with contextlib.suppress(EOFError):
                await self._read_chunks(response)
            response.body = b"".join(response.chunks)
        elif "Content-Length" in headers:
            length = int(headers["Content-Length"])
            while len(self.received) < length and (data := await self._receive(65_536)):
                self.received += data
            response.body = self._take(length)
            response.complete = len(response.body) == length
        else:
            response.body = await self.read_to_end()
            response.complete = not self.was_reset
        return response

    async def read_chunk(self) -> bytes:
        """The next chunk of a chunked body, which is one write of the server's; empty at the body's end.

        Raises EOFError if the connection ends before.
        """
        size = int(await self.read_until(b"\r\n"), 16)
        while len(self.received) < size + 2:
            data = await self._receive(65_536)
            if not data:
                raise EOFError(bytes(self.received[:200]))
            self.received += data
        return self._take(size + 2)[:-2]

    async def ask(self, data: bytes = ASK) -> Response:
        """Send a request's bytes and read the one response."""
        await self.send(data)
        return await self.read_response(to=data.partition(b" ")[0].decode("latin-1"))

    # ---- Leaving

    def close(self) -> None:
        """FIN (a RST where the kernel still holds bytes that nobody read)."""
        self._sock.close()

    def reset(self) -> None:
        """RST, at once."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self._sock.close()

    def half_close(self) -> None:
        """FIN, but the receiving side stays open."""
        self._sock.shutdown(socket.SHUT_WR)

    # ----

    async def _read_chunks(self, response: Response) -> None:
        while True:
            size = int(await self.read_until(b"\r\n"), 16)
            while len(self.received) < size + 2:
                data = await self._receive(65_536)
                if not data:
                    raise EOFError
                self.received += data
            chunk = self._take(size + 2)
            assert chunk.endswith(b"\r\n"), f"a chunk is longer than it says: {chunk!r}"
            if size == 0:
                response.complete = True
                return
            response.chunks.append(chunk[:-2])

    async def _receive(self, most: int) -> bytes:
        try:
            async with asyncio.timeout(_PATIENCE):
                data = await self._loop.sock_recv(self._sock, most)
        except ConnectionResetError:
            self.was_reset = True
            data = b""
        self.at_end = not data
        return data

    def _take(self, count: int) -> bytes:
        data = bytes(self.received[:count])
        del self.received[:count]
        return data


LEAVING: Final = {"fin": RawClient.close, "rst": RawClient.reset, "half-close": RawClient.half_close}
