"""The short way of an answer's body: from aiohttp's connection straight to its reader (``SLUICE_FAST_PATH=auto``).

On the usual way each read of the network passes aiohttp's parser and its stream, and wakes the task that waits for it:
a third of what a token costs. Here the body of a chunked event stream leaves that way behind its head: the connection
takes the chunks off by itself and calls the reader. The head, every other kind of response, the last chunk and whatever
is not as it should be stay aiohttp's, and so do pooling, TLS, DNS and time-outs.

It leans on names of aiohttp that are not documented: the connector's ``_factory``, the class that it makes, and what
that class calls when a response has come. :func:`works` tries at start whether they behave as they do in the version
that is pinned; where they do not, the usual way is taken.
"""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, Protocol

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from multidict import CIMultiDict
from yarl import URL

from server.upstream.body import finish_body, read_body
from server.upstream.reader import AnswerReader
from server.wire.chunked import ChunkedBody

__all__ = ["DirectConnection", "DirectRequest", "Question", "connect_directly", "read_body_directly", "works"]

# Bytes that are handed on before other streams get their turn: half a millisecond of work, or two where every event has
# to be decoded. libuv reads up to eight megabytes in one go from a socket that is always full.
_AT_ONCE: Final = 32 << 10


class BodyReceiver(Protocol):
    """Who takes a body."""

    def receive(self, payload: bytes) -> None:
        """The next bytes of it. Must not raise."""

    def wake(self) -> None:
        """The body has ended, or its connection is gone."""


class DirectConnection(ResponseHandler):
    """aiohttp's protocol of one connection to an endpoint, with the short way for bodies.

    What comes of a body waits for the receiver to be attached; a lot of it, and the network is read no further.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.requests = 0  # that this connection has been used for
        self._in_head = False
        self._head_end = b""  # the last bytes of the head so far: its end may be cut
        self._body: ChunkedBody | None = None  # while the short way is open
        self._usual = True  # no head has come that opens it
        self._content: aiohttp.StreamReader | None = None
        self._receiver: BodyReceiver | None = None
        self._backlog = b""  # what is not handed on yet, as it came
        self._held = False  # reading is paused, as there is enough of that

    @property
    def open_to_receivers(self) -> bool:
        """Whether the body that is on its way can take the short way."""
        return self._body is not None

    def attach(self, receiver: BodyReceiver) -> None:
        """Hand the body to ``receiver``, what has come of it at once, and tell it of the connection's end."""
        self._receiver = receiver
        self._go_on()

    def detach(self, receiver: BodyReceiver) -> None:
        """Hand it nothing more. The connection may serve somebody else by now."""
        if self._receiver is receiver:
            self._receiver = None

    # ---- What aiohttp calls

    def set_response_params(self, **params: Any) -> None:
        """A request is about to be sent."""
        self.requests += 1
        self._in_head = True
        self._head_end = b""
        self._forget_body()
        super().set_response_params(**params)

    def feed_data(self, data: Any, size: int = 0) -> None:
        """A head has come, with the stream that its body would go into."""
        message, content = data
        if message.code >= 200 or message.code == 101:
            self._in_head = False
            type_ = message.headers.get("Content-Type", "").lower()
            streams = message.code == 200 and message.chunked and type_.startswith("text/event-stream")
            self._usual = not streams or bool(message.compression)
            self._content = content
        super().feed_data(data, size)

    def data_received(self, data: bytes) -> None:
        """Bytes from the network, or none where aiohttp resumes reading."""
        if self._body is None:
            if self._in_head:
                self._take_head(data)
            else:
                super().data_received(data)
        elif not data:
            super().data_received(data)
        elif self._receiver is None or self._backlog:
            self._put_off(data)
        elif len(data) > _AT_ONCE:
            self._put_off(data[_AT_ONCE:])
            self._loop.call_soon(self._go_on)
            self._take_body(self._body, data[:_AT_ONCE])
        else:
            self._take_body(self._body, data)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is gone; what came before that counts."""
        body, data, self._backlog = self._body, self._backlog, b""
        if body is not None and data:
            if self._receiver is None and self._content is not None:
                self._content.begin_http_chunk_receiving()
            self._take_body(body, data)
        receiver = self._receiver
        self._forget_body()
        super().connection_lost(exc)
        if receiver is not None:
            receiver.wake()

    def close(self) -> None:
        """aiohttp wants no more of it."""
        self._forget_body()
        super().close()

    def abort(self) -> None:
        """Likewise, at once."""
        self._forget_body()
        super().abort()

    # ---- The way of the bytes

    def _take_head(self, data: bytes) -> None:
        """Give aiohttp the head, exactly, so that its parser stands where the body begins."""
        while data and self._in_head:
            seen = self._head_end + data
            place = seen.find(b"\r\n\r\n")
            if place < 0:
                self._head_end = seen[-3:]
                super().data_received(data)
                return
            cut = place + 4 - len(self._head_end)
            self._head_end = b""
            self._usual = True
            super().data_received(data[:cut])
            data = data[cut:]
            if self.exception() is not None:
                return
        if not self._usual:
            self._body = ChunkedBody()
        if data:
            self.data_received(data)

    def _take_body(self, body: ChunkedBody, data: bytes) -> None:
        payload = body.feed(data)
        if payload:
            if self._receiver is not None:
                self._receiver.receive(payload)
            elif self._content is not None:
                self._content.feed_data(payload)
        if body.rest is not None and self._body is body:
            self._body = None
            super().data_received(body.rest)

    def _put_off(self, data: bytes) -> None:
        self._backlog += data
        if len(self._backlog) > _AT_ONCE and not self._held and self.transport is not None:
            self._held = True
            self.transport.pause_reading()

    def _go_on(self) -> None:
        data, self._backlog = self._backlog, b""
        if data and self._receiver is not None:
            self.data_received(data)
        if self._held and len(self._backlog) <= _AT_ONCE and self.transport is not None:
            self._held = False
            self.transport.resume_reading()

    def _forget_body(self) -> None:
        self._body = None
        self._usual = True
        self._content = None
        self._receiver = None
        self._backlog = b""


def connect_directly(connector: aiohttp.TCPConnector) -> None:
    """Let the connections that ``connector`` makes be direct ones."""
    connector._factory = partial(DirectConnection, asyncio.get_running_loop())  # type: ignore[assignment]


# ---- The body


class _Receiver:
    """Takes a body for ``reader``; ``turn`` is done when there is something for the task that waits: the end of the
    body or of the connection, ``[DONE]``, or a ``failure``."""

    __slots__ = ("_reader", "failure", "turn")

    def __init__(self, reader: AnswerReader) -> None:
        self._reader = reader
        self.failure: Exception | None = None
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def receive(self, payload: bytes) -> None:
        """The next bytes of it. The hot path."""
        if self._reader.over or self.failure is not None:
            return
        try:
            over = self._reader.feed(payload)
        except Exception as exc:  # raised where it belongs, in the task that reads the body
            self.failure = exc
            self.wake()
        else:
            if over:
                self.wake()

    def wake(self) -> None:
        if not self.turn.done():
            self.turn.set_result(None)


async def read_body_directly(response: aiohttp.ClientResponse, reader: AnswerReader) -> None:
    """As :func:`server.upstream.body.read_body`, by the short way where the response allows it."""
    # None where the whole response has come already.
    connection: object = None if response.connection is None else response.connection.protocol
    if isinstance(connection, DirectConnection) and connection.open_to_receivers:
        await _receive_body(connection, response.content, reader)
    else:
        await read_body(response, reader)


async def _receive_body(connection: DirectConnection, content: aiohttp.StreamReader, reader: AnswerReader) -> None:
    receiver = _Receiver(reader)
    content.on_eof(receiver.wake)
    try:
        connection.attach(receiver)
        await receiver.turn
        if receiver.failure is not None:
            raise receiver.failure
        await finish_body(content, reader)
    finally:
        connection.detach(receiver)


# ---- The request


class Question:
    """The body of a request, and what became of the request while it was sent.

    ``head`` is the request line and the headers but for the body's length, ready to be sent.
    """

    __slots__ = ("body", "head", "reused")

    def __init__(self, head: bytes, body: bytes) -> None:
        self.head = head
        self.body = body
        self.reused = False  # it went out on a connection that had brought an answer before


class DirectRequest(aiohttp.ClientRequest):
    """A request whose bytes stand ready: nothing is left to be made of headers, cookies or payloads, and head and body
    go out in one write. For ``ClientSession(request_class=…)``, with a :class:`Question` for data."""

    def __init__(
        self,
        method: str,
        url: URL,
        *,
        data: Question,
        loop: asyncio.AbstractEventLoop,
        ssl: Any,
        response_class: type[aiohttp.ClientResponse] = aiohttp.ClientResponse,
        timer: Any = None,
        session: Any = None,
        **_: Any,
    ) -> None:
        self.method = method
        self.url = self.original_url = url
        self.headers = CIMultiDict()  # of what its errors tell: nothing of ours
        self.loop = loop
        self.response_class = response_class
        self.proxy = self.proxy_auth = self.proxy_headers = None
        self.server_hostname = None
        self._question = data
        self._timer = timer
        self._session = session
        self._ssl = ssl

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        """Send it on ``conn``; the response is yet to come."""
        connection, question = conn.protocol, self._question
        if connection is None or connection.transport is None:
            raise aiohttp.ClientConnectionResetError("the connection is gone")
        if isinstance(connection, DirectConnection):
            question.reused = connection.requests > 1
        connection.transport.write(b"%b%d\r\n\r\n%b" % (question.head, len(question.body), question.body))
        question.body = b""  # a question is asked once
        return self.response_class(
            self.method,
            self.url,
            writer=None,
            continue100=None,
            timer=self._timer,
            request_info=self.request_info,
            traces=[],
            loop=self.loop,
            session=self._session,
            stream_writer=_NOTHING_SENT,
        )


_NOTHING_SENT: Final[Any] = SimpleNamespace(output_size=0)


# ---- Whether it works


class _NoTransport(asyncio.Transport):
    """Stands in for a socket while :func:`works` tries."""

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


async def works() -> bool:
    """Whether aiohttp still behaves as the short way takes for granted. Tried with no network, in a millisecond."""
    try:
        async with asyncio.timeout(1):
            return await _try()
    except Exception:
        return False


async def _try() -> bool:
    loop = asyncio.get_running_loop()
    connector = aiohttp.TCPConnector()
    usual = connector._factory()
    connect_directly(connector)
    connection = connector._factory()
    await connector.close()
    if type(usual) is not ResponseHandler or not isinstance(connection, DirectConnection):
        return False
    tried = _Tried()
    connection.connection_made(_NoTransport())
    connection.set_response_params(read_until_eof=True)
    connection.data_received(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nbefore"
    )
    message, content = await connection.read()
    connection.attach(tried)
    content.on_eof(tried.wake)
    connection.data_received(b"\r\n6\r\nbehind\r\n0\r")
    connection.data_received(b"\n\r\n")
    url = URL("http://localhost:1/v1")
    with_payload = aiohttp.ClientRequest("POST", url, data=b"", loop=loop)
    ready = DirectRequest("POST", url, data=Question(b"", b""), loop=loop, ssl=True)
    return (
        message.code == 200
        and tried.received == b"beforebehind"
        and tried.ended
        and not connection.should_close
        and ready.connection_key == with_payload.connection_key
    )


class _Tried:
    def __init__(self) -> None:
        self.received = b""
        self.ended = False

    def receive(self, payload: bytes) -> None:
        self.received += payload

    def wake(self) -> None:
        self.ended = True
