"""A viewer's connection over HTTP: the response written and drained by hand."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict

from server.api.direct_write import DirectWriter, HeadWithFirstEvent
from server.api.keys import FAST_PATH
from server.relay.desk import Desk, Stream

__all__ = ["ResponseConnection", "show", "show_events"]

_HEADERS: Final = CIMultiDict(
    {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache, no-transform",  # no-transform: a proxy that compresses would hold tokens back
        "X-Accel-Buffering": "no",  # nginx then buffers nothing, whatever its configuration says
    }
)


_RST_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # struct linger: on, for 0 s (socket(7))


async def show(
    request: web.Request,
    desk: Desk,
    stream: Stream,
    *,
    after: int | None = None,
    may_return: bool | None = None,
    headers: Mapping[str, str] | None = None,
    ready: Callable[[], Awaitable[None]] | None = None,
) -> web.StreamResponse:
    """Stream the answer to the client until its end, or until the client leaves; from behind event ``after`` on.

    ``may_return``: whether the client can come back, where that is not for its request to say; ``headers`` go out
    beside the usual ones. ``ready`` is waited for before anything is sent, and what it raises is raised.
    """
    direct = request.app[FAST_PATH] and request.version >= (1, 1)
    response = _event_stream(request, HeadWithFirstEvent if direct else web.StreamResponse)
    response.headers.update(headers or {})
    connection = ResponseConnection(request, response)
    returns = _can_resume(request) if may_return is None else may_return
    with desk.viewing(stream, connection, after=after, may_return=returns) as viewer:
        if ready is not None:
            await ready()
        try:
            # 200 goes out before the upstream has answered: a slow first token is no failure.
            writer = await response.prepare(request)
            response.headers.clear()  # they are on their way, and an open stream has no more use for a kilobyte of them
            if direct and writer is not None:
                connection.write_directly(writer)
                if viewer.level:  # nothing that the head could go out with
                    writer.send_headers()
            await viewer.follow()
        except ConnectionError:
            # The client has gone, perhaps with bytes untaken: without abort the transport would hold them for as long
            # as the peer likes. Nothing is written from here on, not even the last chunk.
            connection.abort()
    return response


async def show_events(request: web.Request, events: bytes) -> web.StreamResponse:
    """A stream of which all is known: ``events``, and its end."""
    response = _event_stream(request, web.StreamResponse)
    with contextlib.suppress(ConnectionError):  # the client has gone
        await response.prepare(request)
        await response.write(events)
        await response.write_eof()
    return response


def _event_stream(request: web.Request, kind: type[web.StreamResponse]) -> web.StreamResponse:
    response = kind(headers=_HEADERS)
    if request.version >= (1, 1):
        response.headers["Connection"] = "keep-alive"
    else:
        response.force_close()  # HTTP/1.0 has no chunks: only the close tells where the answer ends
    return response


def _can_resume(request: web.Request) -> bool:
    """Whether the client asked for an event stream by its name, as EventSource does and curl does not: it then knows
    how to go on behind the last event (contract, section 3)."""
    ranges = ",".join(request.headers.getall("Accept", [])).split(",")
    return any(media.partition(";")[0].strip().lower() == "text/event-stream" for media in ranges)


class ResponseConnection:
    """The ``Connection`` of server/relay/viewer.py over an aiohttp response."""

    __slots__ = ("_direct", "_request", "_response")

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self._response = response
        self._direct: DirectWriter | None = None

    def write_directly(self, writer: AbstractStreamWriter) -> None:
        """Take the short way where there is no need to wait; the response has begun, with that ``writer``."""
        if self._request.transport is not None:
            self._direct = DirectWriter(self._request.protocol, self._request.transport, writer)

    async def write(self, data: bytes) -> None:
        if self._direct is not None:
            await self._direct.drain()
        await self._response.write(data)

    def write_now(self, data: bytes) -> bool:
        return self._direct is not None and self._direct.write(data)

    async def finish(self, data: bytes) -> None:
        await self._response.write_eof(data)

    def untaken_bytes(self) -> int:
        transport = self._request.transport
        if transport is None or (sock := transport.get_extra_info("socket")) is None:
            return 0
        return transport.get_write_buffer_size() + _send_queue_bytes(sock.fileno())

    def abort(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()

    def reset(self) -> None:
        transport = self._request.transport
        if transport is not None and (sock := transport.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
        self.abort()


def _send_queue_bytes(descriptor: int) -> int:
    """Bytes in the kernel's send queue that the peer has not acknowledged (SIOCOUTQ, tcp(7) and unix(7)).

    Without it a slow reader looks like a dead one: our own buffer moves only when a third of the kernel's is free.
    """
    try:
        answer = fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0\0\0\0")
    except (OSError, ValueError):  # closed meanwhile
        return 0
    return int(struct.unpack("i", answer)[0])
