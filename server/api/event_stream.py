"""A viewer's connection over HTTP: the response written and drained by hand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from server.api.client_socket import ClientSocket
from server.api.direct_write import DirectResponse, DirectWriter
from server.api.heads import StreamHead
from server.api.keys import FAST_PATH
from server.relay.desk import Desk, Stream

__all__ = ["EVENT_STREAM", "ResponseConnection", "show", "show_events"]

EVENT_STREAM: Final = StreamHead(
    {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache, no-transform",  # no-transform: a proxy that compresses would hold tokens back
        "X-Accel-Buffering": "no",  # nginx then buffers nothing, whatever its configuration says
    }
)

# Turns of the loop that the head of a running answer's stream waits for. In the first one the answer's task asks the
# upstream, which is to begin as early as can be. What has come back when the loop has looked at its sockets once more,
# from an upstream that is fast, or because we are busy, goes out in the same write, at half of what two would cost.
_GIVES_WAY: Final = 3


async def show(
    request: web.Request,
    desk: Desk,
    stream: Stream,
    *,
    after: int | None = None,
    may_return: bool | None = None,
    head: StreamHead = EVENT_STREAM,
    ready: Callable[[], Awaitable[None]] | None = None,
) -> web.StreamResponse:
    """Stream the answer to the client until its end, or until the client leaves; from behind event ``after`` on.

    ``may_return``: whether the client can come back, where that is not for its request to say. ``ready`` is waited for
    before anything is sent, and what it raises is raised.
    """
    response: web.StreamResponse
    connection: DirectWriter | ResponseConnection
    if request.app[FAST_PATH] and request.version >= (1, 1):
        connection = DirectWriter(request.protocol, request.writer)
    else:
        response = _event_stream(request, head)
        connection = ResponseConnection(request, response)
    returns = _can_resume(request) if may_return is None else may_return
    with desk.viewing(stream, connection, after=after, may_return=returns) as viewer:
        if ready is not None:
            await ready()
        elif not (viewer.level or stream.log.ended):
            await _turns_of_loop(_GIVES_WAY)
        try:
            # 200 goes out before the upstream has answered: a slow first token is no failure.
            if isinstance(connection, DirectWriter):
                connection.begin(await head.of(request))
                if viewer.level:  # nothing that the head could go out with
                    connection.send_head()
            else:
                await response.prepare(request)
                response.headers.clear()  # they are on their way; an open stream has no more use for a kilobyte of them
            await viewer.follow()
        except ConnectionError:
            # The client has gone, perhaps with bytes untaken: without abort the transport would hold them for as long
            # as the peer likes. Nothing is written from here on, not even the last chunk.
            connection.abort()
    return DirectResponse(request, connection) if isinstance(connection, DirectWriter) else response


def _turns_of_loop(turns: int) -> asyncio.Future[None]:
    """To be awaited: so many turns of the loop, at least two, with no step of the task's in between."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.call_soon(_count_down, loop, future, turns - 2)  # in the last one the task itself is woken
    return future


def _count_down(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None], turns: int) -> None:
    if turns:
        loop.call_soon(_count_down, loop, future, turns - 1)
    elif not future.done():
        future.set_result(None)


async def show_events(request: web.Request, events: bytes) -> web.StreamResponse:
    """A stream of which all is known: ``events``, and its end."""
    response = _event_stream(request, EVENT_STREAM)
    with contextlib.suppress(ConnectionError):  # the client has gone
        await response.prepare(request)
        await response.write(events)
        await response.write_eof()
    return response


def _event_stream(request: web.Request, head: StreamHead) -> web.StreamResponse:
    response = web.StreamResponse(headers=head.headers)
    if request.version >= (1, 1):
        response.headers["Connection"] = "keep-alive"
    else:
        response.force_close()  # HTTP/1.0 has no chunks: only the close tells where the answer ends
    return response


def _can_resume(request: web.Request) -> bool:
    """Whether the client asked for an event stream by its name, as EventSource does and curl does not: it then knows
    how to go on behind the last event (contract, section 3)."""
    accepts = request.headers.getall("Accept", [])
    if accepts == ["text/event-stream"]:
        return True
    ranges = ",".join(accepts).split(",")
    return any(media.partition(";")[0].strip().lower() == "text/event-stream" for media in ranges)


class ResponseConnection(ClientSocket):
    """The ``Connection`` of server/relay/viewer.py over an aiohttp response, by public calls alone."""

    __slots__ = ("_response",)

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        super().__init__(request.protocol)
        self._response = response

    async def write(self, data: bytes) -> None:
        await self._response.write(data)

    def write_now(self, data: bytes) -> bool:
        return False

    async def finish(self, data: bytes) -> None:
        await self._response.write_eof(data)
