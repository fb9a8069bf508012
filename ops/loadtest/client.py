"""One request over a socket becomes a record. Whatever goes wrong is an outcome; nothing but cancellation is raised."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import cast

from ops.loadtest.answers import AnswerReader, Said, refusal_code
from ops.loadtest.arrivals import read_retry_after_s
from ops.loadtest.http1 import BadResponse, ResponseParser
from ops.loadtest.prompts import Prompt
from ops.loadtest.record import Outcome, Record
from ops.loadtest.tally import Tally
from ops.loadtest.target import Kind, Target
from server.wire.sse import EventStreamParser, EventTooLarge

__all__ = ["OUT_OF_SOCKETS", "Client", "Departure"]

OUT_OF_SOCKETS = "tester_out_of_sockets"  # descriptors, or ports: the tester's machine is at its limit

_CONNECT_TIMEOUT_S = 10.0  # DNS, TCP and TLS
_END_TIMEOUT_S = 2.0  # for the body to end behind [DONE]
_MAX_REFUSAL_BYTES = 16 << 10  # of a refusal's body, read for its code
_DEFAULT_RETRY_S = 1.0  # before a reconnect, where the stream names no time; a browser waits a few seconds
_LONGEST_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class Departure:
    """A cut on purpose, behind so many tokens; an answer that has fewer is left alone."""

    after_tokens: int
    come_back: bool  # for the rest, as a browser whose connection broke


class Client:
    """Holds the idle connections; an async context manager.

    ``keep_alive``: a connection serves the next request too, if the endpoint allows it. The newest is taken first, so
    that those which a falling load leaves over are closed by the endpoint's own timeout.
    """

    def __init__(self, target: Target, *, timeout_s: float, keep_alive: bool = True, verify: bool = True) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._keep_alive = keep_alive
        self._tls = _tls_context(verify=verify) if target.tls else None
        self._idle: dict[_Connection, None] = {}

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for connection in list(self._idle):
            connection.abort()

    async def ask(self, prompt: Prompt, record: Record, tally: Tally, departure: Departure | None = None) -> None:
        """Send one request, read its answer and write both into ``record``; cancelled, it leaves the connection.

        Tokens are told to ``tally`` as they come.
        """
        answer = _Answer(self._target, record, tally, departure)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(self._target.request(prompt), answer)
                while answer.coming_back:
                    await asyncio.sleep(answer.retry_s)
                    await self._exchange(self._target.request(prompt, answer.come_back()), answer)
        except TimeoutError:
            if not record.ended_ns:
                code = "timeout" if record.token_ns else "timeout_first_token"
                record.end(Outcome.ERROR, time.monotonic_ns(), code)
        record.lost, record.doubled = answer.reader.lost, answer.reader.doubled
        record.prompt_tokens, record.completion_tokens = answer.reader.prompt_tokens, answer.reader.completion_tokens

    async def _exchange(self, request: bytes, answer: _Answer) -> None:
        """One request and its response."""
        while True:
            try:
                connection, reused = await self._connect()
            except OSError as exc:
                answer.ended(_connect_code(exc))
                return
            answer.connected(reused=reused)
            try:
                code = await connection.exchange(request, answer)
            finally:
                self._take_back(connection)
            if not (reused and connection.stale):
                answer.ended(code)
                return

    async def _connect(self) -> tuple[_Connection, bool]:
        if self._idle:
            connection, _ = self._idle.popitem()
            return connection, True
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self._forget),
                self._target.host,
                self._target.port,
                ssl=self._tls,
                server_hostname=self._target.host if self._tls else None,
            )
        return connection, False

    def _take_back(self, connection: _Connection) -> None:
        if connection.reusable and self._keep_alive:
            self._idle[connection] = None
        else:
            connection.abort()

    def _forget(self, connection: _Connection) -> None:
        self._idle.pop(connection, None)


class _Answer:
    """One request's answer, over as many connections as it takes: what it says goes into the record at once."""

    def __init__(self, target: Target, record: Record, tally: Tally, departure: Departure | None) -> None:
        self.reader: AnswerReader = target.reader()
        self.over = False  # only the body's end is still to come
        self.coming_back = False
        self._target = target
        self._record = record
        self._tally = tally
        self._departure = departure
        self._events = EventStreamParser()
        self._refusal = b""
        self._is_stream = False
        self._asked_again_ns = 0

    @property
    def retry_s(self) -> float:
        """How long to wait before coming back: what the stream said, as a browser does."""
        told_ms = self._events.retry
        return min(_DEFAULT_RETRY_S if told_ms is None else told_ms / 1e3, _LONGEST_RETRY_S)

    def come_back(self) -> bytes:
        """The answer goes on over another connection, behind the event whose id is returned."""
        self.coming_back = self.over = False
        self._events = EventStreamParser(last_event_id=self.reader.last_event_id)
        self._record.reconnects += 1
        self._record.resumed_at.append(self._record.tokens)
        self._asked_again_ns = time.monotonic_ns()
        return self.reader.last_event_id

    def connected(self, *, reused: bool) -> None:
        record = self._record
        if not record.reconnects:
            record.reused, record.connected_ns = reused, time.monotonic_ns()

    def head(self, response: ResponseParser, now_ns: int) -> None:
        """The response's head is here."""
        record = self._record
        record.status = response.status
        record.first_byte_ns = record.first_byte_ns or now_ns
        content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        self._is_stream = response.status == 200 and content_type == "text/event-stream"
        if retry_after := response.headers.get("retry-after"):
            record.retry_after_s = read_retry_after_s(retry_after, time.time())

    def payload(self, data: bytes, now_ns: int) -> bool:
        """Read the next bytes of the body; False where the connection is to be left now."""
        self._record.bytes += len(data)
        if not self._is_stream:
            self._refusal += data[: _MAX_REFUSAL_BYTES - len(self._refusal)]
            return True
        if self.over:
            return True
        try:
            events = self._events.feed(data)
        except EventTooLarge:
            self._finish(Outcome.ERROR, now_ns, "event_too_large")
            return False
        tokens, stay = 0, True
        take = self.reader.take
        for event in events:
            said = take(event)
            if said is Said.TOKEN or said is Said.REASONING:
                tokens += 1
                self._record.reasoning_tokens += said is Said.REASONING
                if self._departure and self._record.tokens + tokens >= self._departure.after_tokens:
                    stay = False
                    break
            elif said is not Said.NOTHING and self._hear(said, now_ns):
                break
        if tokens:
            self._count(tokens, now_ns)
        if self._asked_again_ns and events:
            self._record.resume_ns.append(now_ns - self._asked_again_ns)
            self._asked_again_ns = 0
        if not stay:
            self._leave(now_ns)
        return stay

    def ended(self, code: str) -> None:
        """The response is over, properly (no code) or not; the outcome is decided here, where it is not yet."""
        record, now_ns = self._record, time.monotonic_ns()
        if record.ended_ns or self.coming_back:
            return
        if record.status and record.status != 200:
            self._finish(Outcome.REFUSED, now_ns, self._mask(refusal_code(self._refusal)))
        elif record.done_ns:
            self._judge_done(code, now_ns)
        elif not record.status:
            self._finish(Outcome.ERROR, now_ns, code if not record.connected_ns else f"{code}_before_response")
        elif not self._is_stream:
            self._finish(Outcome.ERROR, now_ns, code or "not_event_stream")
        else:
            self._finish(Outcome.INCOMPLETE, now_ns, code or "ended_early")

    def _hear(self, said: Said, now_ns: int) -> bool:
        """An event that is no token; True where the answer is over with it."""
        if said is Said.MALFORMED:
            self._record.malformed += 1
            return False
        if said is Said.DONE:
            self._record.done_ns = now_ns
            self.over = True
        else:
            self._finish(Outcome.ERROR, now_ns, self._mask(self.reader.error_code))
        return True

    def _count(self, tokens: int, now_ns: int) -> None:
        self._tally.tokens_came(self._record, tokens, now_ns)
        self._record.token_ns.extend([now_ns] * tokens)

    def _judge_done(self, code: str, now_ns: int) -> None:
        """``[DONE]`` was there. Sluice's answers have an end of their body too; an OpenAI client leaves at once."""
        if not self._record.token_ns:
            self._finish(Outcome.ERROR, now_ns, "no_tokens")
        elif code and self._target.kind is Kind.SLUICE:
            self._finish(Outcome.INCOMPLETE, now_ns, code)
        else:
            self._finish(Outcome.COMPLETED, now_ns)

    def _leave(self, now_ns: int) -> None:
        if self._departure and self._departure.come_back:
            self._departure = None
            self.coming_back = bool(self.reader.last_event_id)
            if not self.coming_back:
                self._finish(Outcome.ERROR, now_ns, "no_event_id")  # asking again would be another answer
        else:
            self._finish(Outcome.CANCELLED, now_ns)

    def _finish(self, outcome: Outcome, now_ns: int, code: str = "") -> None:
        self.over = True
        if not self._record.ended_ns:
            self._record.end(outcome, now_ns, code)

    def _mask(self, code: str) -> str:
        """A code is the endpoint's word, and some repeat the key that they refuse."""
        key = self._target.api_key
        return "masked" if key and (key in code or code in key) and code else code


class _Connection(asyncio.Protocol):
    """One connection; requests go over it one after the other."""

    _transport: asyncio.Transport

    def __init__(self, lost: Callable[[_Connection], None]) -> None:
        self._lost = lost
        self._closed = False
        self._answer: _Answer | None = None
        self._response = ResponseParser()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._end_timer: asyncio.TimerHandle | None = None
        self.reusable = False
        self.stale = False  # it broke before a byte of the response came: an idle connection may, at any moment

    async def exchange(self, request: bytes, answer: _Answer) -> str:
        """Send a request and wait until its response is over: properly (an empty text), or a code that says how."""
        self._response = ResponseParser()
        self._answer = answer
        self._ended = asyncio.get_running_loop().create_future()
        self.reusable, self.stale = False, False
        if self._closed:
            self.stale = True
            return "closed"
        self._transport.write(request)
        try:
            return await self._ended
        finally:
            self._answer = None
            if self._end_timer:
                self._end_timer.cancel()

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in everything but its class

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        answer, response = self._answer, self._response
        if answer is None or self._ended.done():
            self._transport.abort()  # bytes that nobody asked for
            return
        had_head = response.status
        try:
            payload = response.feed(data)
        except BadResponse:
            self._end("no_http")
            return
        if not had_head and response.status:
            answer.head(response, now_ns)
        if payload and not answer.payload(payload, now_ns):
            self._end("left")
        elif response.ended:
            self.reusable = response.reusable
            self._end("")
        elif self._end_timer is None and answer.over:
            self._end_timer = asyncio.get_running_loop().call_later(_END_TIMEOUT_S, self._end, "body_not_ended")

    def eof_received(self) -> None:
        self._response.feed_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self.stale = not self._response.status
        self._lost(self)
        self._end("" if self._response.ended else "reset" if exc else "closed")

    def _end(self, code: str) -> None:
        if not self._ended.done():
            self._ended.set_result(code)


def _tls_context(*, verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _connect_code(exc: OSError) -> str:
    """Why there was no connection, in a word."""
    match exc:
        case TimeoutError():
            return "connect_timeout"
        case ConnectionRefusedError():
            return "connect_refused"
        case socket.gaierror():
            return "dns"
        case ssl.SSLCertVerificationError():
            return "tls_certificate"
        case ssl.SSLError():
            return "tls"
        case OSError(errno=number) if number in (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL):
            return OUT_OF_SOCKETS
        case _:
            return "connect_" + errno.errorcode.get(exc.errno or 0, "failed").lower()
