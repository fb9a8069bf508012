"""The short way of an event to its viewer: head and chunks framed here, straight to the transport
(``SLUICE_FAST_PATH=auto``).

``StreamResponse.write()`` is a coroutine through two objects for each write; here it is one call. Every write to a
client that lags is aiohttp's, since only aiohttp knows how to wait.

Beside documented names it leans on the protocol's ``writing_paused``, and on what a writer makes of chunks.
:func:`works` tries at start whether they behave as in the version that is pinned.
"""

from __future__ import annotations

import asyncio
from typing import Final, cast

from aiohttp import ClientConnectionResetError, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import StreamWriter

from server.api.client_socket import ClientSocket

__all__ = ["DirectResponse", "DirectWriter", "works"]

_AT_ONCE: Final = 16 << 10  # bytes; more goes out as the client takes it, lest a stuck one holds much of our memory
_LAST_CHUNK: Final = b"0\r\n\r\n"


class DirectWriter(ClientSocket):
    """Writes a chunked response to a connection: the ``Connection`` of server/relay/viewer.py.

    ``writer`` is aiohttp's own for the response.
    """

    __slots__ = ("_head", "_writer", "ended")

    def __init__(self, protocol: BaseProtocol, writer: AbstractStreamWriter) -> None:
        super().__init__(protocol)
        self._writer = writer
        self._head = b""  # while it waits
        self.ended = False  # its last chunk is out

    def begin(self, head: bytes) -> None:
        """The response begins with ``head``, which goes out with the first chunk."""
        self._head = head

    def write_now(self, data: bytes) -> bool:
        """Send ``data`` as a chunk (RFC 9112 §7.1); false, and nothing is sent, where that is aiohttp's to do: the
        client lags or has gone, or it is too much at once, or nothing, which would be the last chunk. The hot path."""
        size, transport = len(data), self._protocol.transport
        if not 0 < size <= _AT_ONCE or self._protocol.writing_paused or transport is None or transport.is_closing():
            return False
        if self._head:
            transport.write(b"%b%x\r\n%b\r\n" % (self._take_head(), size, data))
        else:
            transport.write(b"%x\r\n%b\r\n" % (size, data))
        return True

    async def write(self, data: bytes) -> None:
        """Send ``data``, and wait while the client lags. Raises ConnectionError once it has gone."""
        if self._protocol.writing_paused:  # aiohttp counts only what it wrote itself
            await self._writer.drain()
        if not self.write_now(data):
            self.send_head()
            await self._writer.write(data)

    async def finish(self, data: bytes = b"") -> None:
        """Send ``data`` and the last chunk, likewise; does nothing to a response that has ended."""
        if self.ended:
            return
        if 0 < len(data) <= _AT_ONCE and not self._protocol.writing_paused:
            self._transport.write(b"%b%x\r\n%b\r\n%b" % (self._take_head(), len(data), data, _LAST_CHUNK))
        else:
            self.send_head()
            await self._writer.write_eof(data)
        self.ended = True

    def send_head(self) -> None:
        """Send the head, if it is not out yet. Raises ConnectionError."""
        if self._head:
            self._transport.write(self._take_head())

    @property
    def _transport(self) -> asyncio.Transport:
        transport = self._protocol.transport
        if transport is None or transport.is_closing():
            raise ClientConnectionResetError("the client has gone")
        return transport

    def _take_head(self) -> bytes:
        head, self._head = self._head, b""
        if head:
            self._writer.enable_chunking()  # not before: an error may still be answered in another way
        return head


class DirectResponse(web.StreamResponse):
    """What aiohttp is given for a response that goes out by ``writer``: there is nothing for it to prepare, and nothing
    to send but the end."""

    def __init__(self, request: web.Request, writer: DirectWriter) -> None:
        super().__init__()
        self._by = writer
        self._keeps_alive = request.keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._keeps_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        await self._by.write(bytes(data))

    async def write_eof(self, data: bytes = b"") -> None:
        await self._by.finish(data)


# ---- Whether it works


class _Wire(asyncio.Transport):
    """Keeps what is written, while :func:`works` tries."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data


async def works() -> bool:
    """Whether aiohttp still writes as the short way takes for granted. Tried with no network."""
    try:
        async with asyncio.timeout(1):
            return await _try()
    except Exception:
        return False


async def _try() -> bool:
    loop = asyncio.get_running_loop()
    wires = []
    for short in (False, True):
        wire, protocol = _Wire(), BaseProtocol(loop)
        protocol.transport = cast("asyncio.Transport", wire)
        usual = StreamWriter(protocol, loop)
        direct = DirectWriter(protocol, usual)
        direct.begin(b"head")
        if short:
            direct.write_now(b"event")
            protocol.pause_writing()
            if direct.write_now(b"too much"):
                return False
            protocol.resume_writing()
        else:
            direct.send_head()
            await usual.write(b"event")
        await usual.write(b"by aiohttp")
        await (direct.finish(b"end") if short else usual.write_eof(b"end"))
        wires.append(wire.written)
    return wires[0] == wires[1]
