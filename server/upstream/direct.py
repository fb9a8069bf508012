"""The short way to an answer: its head and its body straight from the connection (``SLUICE_FAST_PATH=auto``).

On the usual way a request passes aiohttp's session, and each read of the network its parser, its stream, and the task
that waits for it: a third of what a token costs, and of what a short answer costs. Here the head of a chunked event
stream, as nearly all endpoints send it, is read by the connection itself, which takes the chunks off and calls the
receiver; the task that asks is not woken before the answer is over. Every other kind of response, and whatever is not
as it should be, is aiohttp's from its first byte on; so are pooling, TLS, DNS and time-outs.

It leans on names of aiohttp that are not documented: the connector's ``_factory``, the class that it makes, and what
that class does with bytes. :func:`works` tries at start whether they behave as they do in the version that is pinned;
where they do not, the usual way is taken.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, Final, Protocol

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from multidict import CIMultiDict
from yarl import URL

from server.upstream.attempt import failed_body
from server.upstream.body import AFTER_DONE_TIMEOUT, MAX_AFTER_DONE, read_on
from server.upstream.reader import AnswerReader
from server.wire.chunked import ChunkedBody

__all__ = [
    "DirectConnection",
    "DirectRequest",
    "Question",
    "Receiver",
    "connect_directly",
    "works",
]

# Bytes that are handed on before other streams get their turn: half a millisecond of work, or two where every event has
# to be decoded. libuv reads up to eight megabytes in one go from a socket that is always full.
_AT_ONCE: Final = 32 << 10

# Heads in which nothing is to be settled (RFC 9112 §2.2, §5): no line is folded, ends with LF alone, or holds controls.
_LINES: Final = re.compile(
    rb"HTTP/1\.1 [0-9]{3}(?: [\t -~\x80-\xff]*)?\r\n(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t -~\x80-\xff]*\r\n)*"
)
_BEGUN_LINE: Final = re.compile(rb"[\t -~\x80-\xff]*\r?")
_FIELD: Final = re.compile(r"([^:\r\n]+):[\t ]*([^\r\n]*?)[\t ]*\r\n")
_VERSION: Final = b"HTTP/1.1 "
_MAX_HEAD: Final = 8000  # bytes; aiohttp has bounds for larger ones
_MAX_FIELDS: Final = 100  # likewise

_LAST_CHUNK: Final = b"0\r\n\r\n"


class AnswerReceiver(Protocol):
    """Who takes an answer. Nothing of it may raise."""

    def begin(self, head: bytes, fields: CIMultiDict[str]) -> None:
        """The head of an event stream has come; its body follows."""

    def receive(self, payload: bytes) -> None:
        """The next bytes of the body."""

    def wake(self) -> None:
        """The body has ended, aiohttp has the response or the rest of it, or the connection is gone."""


class DirectConnection(ResponseHandler):
    """aiohttp's protocol of one connection to an endpoint, with the short way for answers.

    What comes faster than it is to be taken waits, and the network is read no further.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.requests = 0  # that this connection has been used for
        self.usual = False  # the response, or the rest of it, is aiohttp's
        self._head = b""  # of the response, as far as it has come
        self._body: ChunkedBody | None = None  # while the short way is open
        self._answering = False  # a response is on its way
        self._receiver: AnswerReceiver | None = None
        self._backlog = b""  # what is not handed on yet, as it came
        self._held = False  # reading is paused, as there is enough of that

    @property
    def receiving(self) -> bool:
        """Whether there is more to come of a body on the short way."""
        return self._body is not None

    @property
    def should_close(self) -> bool:
        """Whether it cannot be used again."""
        return self._answering or bool(self._backlog) or super().should_close

    def begin(self, receiver: AnswerReceiver) -> None:
        """A request is about to be sent, whose answer ``receiver`` takes."""
        self.requests += 1
        self._forget()
        self._receiver = receiver
        self._answering = True

    def detach(self, receiver: AnswerReceiver) -> None:
        """Hand it nothing more. The connection may serve somebody else by now."""
        if self._receiver is receiver:
            self._receiver = None

    # ---- What the loop and aiohttp call

    def data_received(self, data: bytes) -> None:
        """Bytes from the network, or none where aiohttp resumes reading."""
        if self._backlog:
            self._put_off(data)
        elif self._body is not None:
            if len(data) > _AT_ONCE:
                self._put_off(data[_AT_ONCE:])
                self._loop.call_soon(self._go_on)
                self._take_body(self._body, data[:_AT_ONCE])
            else:
                self._take_body(self._body, data)
        elif self.usual:
            super().data_received(data)
        elif self._answering:
            self._take_head(self._head + data)
        elif data:  # nobody has asked for anything
            self.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is gone; what came before that counts."""
        super().connection_lost(exc)
        data, self._backlog = self._backlog, b""
        if self._body is not None and data:
            self._take_body(self._body, data)
        self._body = None
        self._tell()

    def close(self) -> None:
        """aiohttp wants no more of it."""
        self._forget()
        super().close()

    def abort(self) -> None:
        """Likewise, at once."""
        self._forget()
        super().abort()

    # ---- The way of the bytes

    def _take_head(self, data: bytes) -> None:
        self._head = data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(data) > _MAX_HEAD or not _begins_head(data):
                self._leave_to_aiohttp(data)
        elif end > _MAX_HEAD or _LINES.fullmatch(data, 0, end - 2) is None:
            self._leave_to_aiohttp(data)
        elif data.startswith(b"HTTP/1.1 1") and not data.startswith(b"HTTP/1.1 101"):
            self._head = b""  # only an interim response (RFC 9110 §15.2)
            if len(data) > end:
                self._take_head(data[end:])
        elif (fields := _fields_of_stream(data[:end])) is None:
            self._leave_to_aiohttp(data)
        else:
            self._head = data[:end]
            self._body = ChunkedBody()
            if self._receiver is not None:
                self._receiver.begin(self._head, fields)
            if len(data) > end:
                self.data_received(data[end:])

    def _take_body(self, body: ChunkedBody, data: bytes) -> None:
        payload = body.feed(data)
        if payload and self._receiver is not None:
            self._receiver.receive(payload)
        if body.rest is not None and self._body is body:
            self._body = None
            if body.rest == _LAST_CHUNK:
                self._answering = False
                self._tell()
            else:
                self._leave_to_aiohttp(self._head)
                super().data_received(body.rest)

    def _leave_to_aiohttp(self, data: bytes) -> None:
        """Let aiohttp have the response from its head on; what has been taken of a body before is not part of it."""
        self.usual = True
        self._answering = False  # aiohttp knows how far it is
        self._head = b""
        self.set_response_params(read_until_eof=True)
        super().data_received(data)
        self._tell()

    def _tell(self) -> None:
        if self._receiver is not None:
            self._receiver.wake()

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

    def _forget(self) -> None:
        self.usual = False
        self._head = b""
        self._body = None
        self._receiver = None
        self._backlog = b""


def _begins_head(data: bytes) -> bool:
    """Whether ``data`` may become a head in which nothing is to be settled."""
    whole = data.rfind(b"\r\n") + 2
    if whole < 2:
        return data.startswith(_VERSION[: len(data)]) and _BEGUN_LINE.fullmatch(data) is not None
    return _LINES.fullmatch(data, 0, whole) is not None and _BEGUN_LINE.fullmatch(data, whole) is not None


def _read_fields(head: bytes) -> CIMultiDict[str]:
    text = head.decode("utf-8", "surrogateescape")  # as aiohttp does
    return CIMultiDict(_FIELD.findall(text, text.index("\n") + 1))


def _fields_of_stream(head: bytes) -> CIMultiDict[str] | None:
    """The fields, if a chunked event stream follows, and nothing else is said of the connection or the body's coding;
    else None."""
    if not head.startswith(b"HTTP/1.1 200") or head.count(b"\n") > _MAX_FIELDS:
        return None
    fields = _read_fields(head)
    opens = (
        [coding.lower() for coding in fields.getall("Transfer-Encoding", ())] == ["chunked"]
        and [type_.partition(";")[0].strip().lower() for type_ in fields.getall("Content-Type", ())]
        == ["text/event-stream"]
        and fields.get("Connection", "keep-alive").lower() == "keep-alive"
        and not ("Content-Length" in fields or "Content-Encoding" in fields or "Upgrade" in fields)
    )
    return fields if opens else None


def connect_directly(connector: aiohttp.TCPConnector) -> None:
    """Let the connections that ``connector`` makes be direct ones."""
    connector._factory = partial(DirectConnection, asyncio.get_running_loop())  # type: ignore[assignment]


# ---- The answer


class Receiver:
    """Takes an answer for ``reader``. ``begin`` is called with the fields of its head, and may raise.

    ``turn`` is done when there is something for the task that waits: the end of the body or of the connection,
    ``[DONE]``, a ``failure``, or a response that is aiohttp's.
    """

    __slots__ = ("_begin", "_left", "failure", "head", "reader", "turn")

    status: Final = 200  # of a response that takes the short way

    def __init__(self, reader: AnswerReader, begin: Callable[[CIMultiDict[str]], object]) -> None:
        self.reader = reader
        self._begin: Callable[[CIMultiDict[str]], object] | None = begin
        self._left = MAX_AFTER_DONE
        self.head = b""  # once it has come
        self.failure: Exception | None = None
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def headers(self) -> CIMultiDict[str]:
        """The response's, made anew of its head: an open stream does not hold a kilobyte of them."""
        return _read_fields(self.head)

    def begin(self, head: bytes, fields: CIMultiDict[str]) -> None:
        begin, self._begin = self._begin, None  # an open stream has no more use for it
        self.head = head
        if begin is not None:
            try:
                begin(fields)
            except Exception as exc:
                self._fail(exc)

    def receive(self, payload: bytes) -> None:
        """The next bytes of it. The hot path."""
        if self.reader.over or self.failure is not None:
            self._left -= len(payload)
            if self._left < 0:
                self.wake()
            return
        try:
            over = self.reader.feed(payload)
        except Exception as exc:
            self._fail(exc)
        else:
            if over:
                self.wake()

    def wake(self) -> None:
        if not self.turn.done():
            self.turn.set_result(None)

    async def wait_past_done(self) -> None:
        """Wait a moment for the little that may follow, so that the connection can be used again."""
        self.turn = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(AFTER_DONE_TIMEOUT):
                await self.turn
        except TimeoutError:
            pass

    def _fail(self, exc: Exception) -> None:
        """Let the task that reads the answer raise ``exc``, where it belongs."""
        self.failure = exc
        self.wake()


async def _finish(connection: DirectConnection, receiver: Receiver) -> None:
    """Say how the answer ended, as :func:`server.upstream.body.read_body` does, once there is no more to be had on the
    short way."""
    reader = receiver.reader
    if receiver.failure is not None:
        raise receiver.failure
    if reader.over and connection.receiving:
        await receiver.wait_past_done()
    if connection.usual:
        _, content = await connection.read()
        await read_on(connection, content, reader)
    elif reader.over:
        pass
    elif reader.finished:
        reader.end()
    else:
        broken = connection.exception()
        raise failed_body(broken) from broken


# ---- The request


class Question:
    """What is asked of an endpoint once: the request's ``body``, and whether it was ``reused``: whether it went out on
    a connection that had brought an answer before."""

    __slots__ = ("body", "reused")

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.reused = False


class DirectRequest(aiohttp.ClientRequest):
    """The request to one endpoint, for all questions: to aiohttp's connector, where to connect; to the endpoint, bytes
    that stand ready. Nothing is left to be made of headers, cookies or payloads, and head and body go out in one write.

    ``head`` is the request line and the headers up to the number of bytes that the body has.
    """

    def __init__(self, url: URL, head: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self.method = "POST"
        self.url = self.original_url = url
        self.headers = CIMultiDict()  # of what its errors tell: nothing of ours
        self.loop = loop
        self.proxy = self.proxy_auth = self.proxy_headers = None
        self.server_hostname = None
        self._head = head
        self._ssl = True

    @cached_property
    def connection_key(self) -> ConnectionKey:
        """Which connections serve it."""
        return super().connection_key

    async def ask(
        self, session: aiohttp.ClientSession, question: Question, receiver: Receiver
    ) -> aiohttp.ClientResponse | None:
        """Send ``question`` and let ``receiver`` take the answer to its end; where that does not come by the short way,
        return aiohttp's response instead. Raises aiohttp.ClientError, and as the reader does."""
        connector = session.connector
        if connector is None:
            raise RuntimeError("the session is closed")
        try:
            connection = await connector.connect(self, [], session.timeout)
        except TimeoutError as exc:
            raise aiohttp.ConnectionTimeoutError(f"no connection to {self.url.host} in time") from exc
        protocol = connection.protocol
        if not isinstance(protocol, DirectConnection) or protocol.transport is None:
            connection.close()
            raise aiohttp.ClientConnectionResetError("the connection is gone")
        try:
            protocol.begin(receiver)
            question.reused = protocol.requests > 1
            protocol.transport.write(b"%b%d\r\n\r\n%b" % (self._head, len(question.body), question.body))
            question.body = b""  # a question is asked once
            await receiver.turn
            if receiver.head:
                await _finish(protocol, receiver)
            elif not protocol.usual:
                raise protocol.exception() or aiohttp.ServerDisconnectedError
        except BaseException:
            if receiver.head:
                connection.release()  # which closes one that has more to come
            else:
                connection.close()  # aiohttp may hold the half of a head
            raise
        finally:
            protocol.detach(receiver)
        if receiver.head:
            connection.release()
            return None
        response = self._response(session)
        try:
            return await response.start(connection)
        except BaseException:
            response.close()
            connection.close()
            raise

    def _response(self, session: aiohttp.ClientSession) -> aiohttp.ClientResponse:
        return aiohttp.ClientResponse(
            self.method,
            self.url,
            writer=None,
            continue100=None,
            timer=_NO_TIMER,
            request_info=self.request_info,
            traces=[],
            loop=self.loop,
            session=session,
            stream_writer=_NOTHING_SENT,
        )


_NOTHING_SENT: Final[Any] = SimpleNamespace(output_size=0)
_NO_TIMER: Final[Any] = None


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


_TRIED_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def _try() -> bool:
    loop = asyncio.get_running_loop()
    connector = aiohttp.TCPConnector()
    usual = connector._factory()
    connect_directly(connector)
    connection = connector._factory()
    await connector.close()
    if type(usual) is not ResponseHandler or not isinstance(connection, DirectConnection):
        return False
    connection.connection_made(_NoTransport())
    url = URL("http://localhost:1/v1")
    with_payload = aiohttp.ClientRequest("POST", url, data=b"", loop=loop)
    ready = DirectRequest(url, b"", loop)
    return (
        await _takes_short_way(connection)
        and await _takes_usual_way(connection)
        and await _takes_short_way(connection)
        and ready.connection_key == with_payload.connection_key
    )


async def _takes_short_way(connection: DirectConnection) -> bool:
    tried = _Tried()
    connection.begin(tried)
    connection.data_received(_TRIED_HEAD + b"6\r\nbefore")
    begun = tried.head == _TRIED_HEAD and not tried.ended
    connection.data_received(b"\r\n6\r\nbehind\r\n0\r\n\r\n")
    connection.detach(tried)
    return begun and tried.received == b"beforebehind" and tried.ended and not connection.should_close


async def _takes_usual_way(connection: DirectConnection) -> bool:
    """From the head on, and for the end of a body that has more to say."""
    other, tried = _Tried(), _Tried()
    connection.begin(other)
    connection.data_received(b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\n")
    message, content = await connection.read()
    connection.data_received(b"no")
    said = await content.read()
    usable = not connection.should_close
    connection.begin(tried)
    connection.data_received(_TRIED_HEAD + b"6\r\nbefore\r\n0;x\r\n")
    _, rest = await connection.read()
    ended_early = rest.is_eof()
    connection.data_received(b"\r\n")
    connection.detach(tried)
    return (
        other.head == b""
        and other.ended
        and message.code == 500
        and said == b"no"
        and usable
        and not ended_early
        and rest.is_eof()
        and tried.received == b"before"
        and tried.ended
        and not connection.should_close
    )


class _Tried:
    def __init__(self) -> None:
        self.head = b""
        self.received = b""
        self.ended = False

    def begin(self, head: bytes, fields: CIMultiDict[str]) -> None:
        self.head = head

    def receive(self, payload: bytes) -> None:
        self.received += payload

    def wake(self) -> None:
        self.ended = True
