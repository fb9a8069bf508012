"""The short way of an event to its viewer: framed here, straight to the transport (``SLUICE_FAST_PATH=auto``).

``StreamResponse.write()`` is a coroutine through two objects for each write; here it is one call. The head and the end
of the response stay aiohttp's, and so does every write to a client that lags, since only aiohttp knows how to wait.

Beside documented names it leans on the protocol's ``writing_paused`` and on a response's ``_send_headers_immediately``.
:func:`works` tries at start whether they behave as in the version that is pinned.
"""

from __future__ import annotations

import asyncio
from typing import Final, cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import StreamWriter

__all__ = ["DirectWriter", "HeadWithFirstEvent", "works"]

_AT_ONCE: Final = 16 << 10  # bytes; more goes out as the client takes it, lest a stuck one holds much of our memory


class HeadWithFirstEvent(web.StreamResponse):
    """A response whose head waits for the first write, and goes out with it."""

    _send_headers_immediately = False


class DirectWriter:
    """Writes chunks to a connection on which a chunked response has begun; ``writer`` is aiohttp's own for it."""

    __slots__ = ("_protocol", "_transport", "_writer")

    def __init__(self, protocol: BaseProtocol, transport: asyncio.Transport, writer: AbstractStreamWriter) -> None:
        self._protocol = protocol
        self._transport = transport
        self._writer = writer

    def write(self, data: bytes) -> bool:
        """Send ``data`` as a chunk (RFC 9112 §7.1); false, and nothing is sent, where that is aiohttp's to do: the
        client lags or has gone, or it is too much at once, or nothing, which would be the last chunk. The hot path."""
        size = len(data)
        if not 0 < size <= _AT_ONCE or self._protocol.writing_paused or self._transport.is_closing():
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (size, data))
        return True

    async def drain(self) -> None:
        """Wait while the client lags: aiohttp counts only what it wrote itself."""
        if self._protocol.writing_paused:
            await self._writer.drain()


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
            return web.StreamResponse._send_headers_immediately is True and await _try()
    except Exception:
        return False


async def _try() -> bool:
    loop = asyncio.get_running_loop()
    wires = []
    for direct in (False, True):
        wire, protocol = _Wire(), BaseProtocol(loop)
        protocol.transport = cast("asyncio.Transport", wire)
        usual = StreamWriter(protocol, loop)
        usual.enable_chunking()
        if direct:
            DirectWriter(protocol, wire, usual).write(b"event")
            protocol.pause_writing()
            if DirectWriter(protocol, wire, usual).write(b"too much"):
                return False
            protocol.resume_writing()
        else:
            await usual.write(b"event")
        await usual.write_eof()
        wires.append(wire.written)
    return wires[0] == wires[1]
