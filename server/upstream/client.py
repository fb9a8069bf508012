"""One request to an OpenAI-compatible endpoint: its bytes become chunks, its failures ours, and it is always closed."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from types import SimpleNamespace, TracebackType
from typing import Any, Final

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError
from multidict import CIMultiDict
from yarl import URL

from server.errors import (
    UpstreamError,
    UpstreamFailed,
    UpstreamIncomplete,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamUnreachable,
)
from server.upstream.resolver import DaemonResolver
from server.wire.chunks import DONE, Chunk, MalformedChunk, decode_chunk, decode_json
from server.wire.sse import EventStreamParser, EventTooLarge, ServerSentEvent

__all__ = ["AttemptFailed", "ChunkSink", "Endpoint", "UpstreamClient", "parse_retry_after"]

# Before the first token only; later a second try would repeat text.
TRY_AGAIN_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})

MAX_MALFORMED_EVENTS: Final = 10  # in one answer; an endpoint with more does not speak the format
_MAX_ERROR_BODY: Final = 64 << 10  # bytes of a JSON body that are read to see whether it is an error object
_ERROR_BODY_TIMEOUT: Final = 2.0  # s, for the same
_AFTER_DONE_TIMEOUT: Final = 0.1  # s for the body's end to follow [DONE]; with it the connection can be used again
_SENT_AT_ONCE: Final = 512 << 10  # bytes of a request's body
_FED_AT_ONCE: Final = 32 << 10  # bytes parsed before other streams get their turn: about 2 ms of work

# What error objects in a stream are called, with the status that the same failure has before a stream.
_STATUS_OF_ERROR_TYPE: Final = {
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "server_error": 500,
    "internal_server_error": 500,
    "overloaded_error": 503,
}

ChunkSink = Callable[[list[Chunk]], None]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a question can be sent."""

    base_url: str
    model: str
    api_key: str = field(default="", repr=False)


class AttemptFailed(Exception):
    """One request came to nothing, or broke off.

    ``error`` is what the client is told if it was the last one; ``again`` says whether the same endpoint may do better
    on a further try; ``retry_after`` (s) is what it asked for; ``reason`` is for the log and holds nothing of the
    endpoint's own words; ``stale`` marks a pooled connection that the endpoint had closed before it saw the request.
    """

    def __init__(
        self,
        error: UpstreamFailed,
        reason: str,
        *,
        again: bool = False,
        retry_after: float | None = None,
        stale: bool = False,
    ) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason
        self.again = again
        self.retry_after = retry_after
        self.stale = stale


class UpstreamClient:
    """Holds the one ClientSession of the process; an async context manager.

    ``connect_timeout`` (s) covers DNS, TCP and TLS. All other time limits are the caller's.
    """

    def __init__(self, *, connect_timeout: float) -> None:
        self._connect_timeout = connect_timeout

    async def __aenter__(self) -> UpstreamClient:
        reuse = aiohttp.TraceConfig()
        reuse.on_connection_reuseconn.append(_note_reuse)
        self._session = aiohttp.ClientSession(
            # No bound of its own: admission bounds the streams, and a queue here would be a silent wait.
            connector=aiohttp.TCPConnector(limit=0, resolver=DaemonResolver()),
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[reuse],
        )
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, endpoint: Endpoint, body: bytes, sink: ChunkSink, done: Callable[[], None]) -> None:
        """Send one request and hand each batch of chunks to ``sink`` as it comes; ``done`` is called at ``[DONE]``.

        Returns when the answer is complete: at ``[DONE]``, or where the endpoint closes after a finish_reason.
        Raises AttemptFailed for everything else. However it ends, the response is closed.
        """
        trace = SimpleNamespace(reused=False)
        try:
            async with self._session.post(
                URL(endpoint.base_url.rstrip("/") + "/chat/completions"),
                # aiohttp would hand more than that over to the socket in one go, and warns of it.
                data=body if len(body) <= _SENT_AT_ONCE else io.BytesIO(body),
                headers=_request_headers(endpoint),
                allow_redirects=False,  # a 307 would send the prompt elsewhere
                trace_request_ctx=trace,
            ) as response:
                _end_body_with_connection(response)
                await _check_head(response)
                await _AnswerBody(response, sink, done).read()
        except AttemptFailed:
            raise
        except (aiohttp.ClientError, OSError) as exc:
            raise _translate(exc, reused=trace.reused) from exc


def _request_headers(endpoint: Endpoint) -> CIMultiDict[str]:
    headers: CIMultiDict[str] = CIMultiDict(
        {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",  # a compressor holds tokens back
            "User-Agent": "sluice",
        }
    )
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    return headers


async def _note_reuse(session: aiohttp.ClientSession, context: Any, params: Any) -> None:
    context.trace_request_ctx.reused = True


# ---- The head


async def _check_head(response: aiohttp.ClientResponse) -> None:
    """Return if an event stream follows; else raise AttemptFailed for what the status or the headers say."""
    status = response.status
    if status != 200:
        raise _failed_status(status, response.headers.get("Retry-After"))
    # Not aiohttp's content_type: that asks Python's e-mail parser, which takes seconds over some headers.
    content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type == "application/json" or content_type.endswith("+json"):
        raise await _failed_json(response)
    if content_type != "text/event-stream":
        raise AttemptFailed(UpstreamInvalid(), "not an event stream")
    if response.headers.get("Content-Encoding", "identity").lower() not in {"identity", "gzip", "deflate"}:
        raise AttemptFailed(UpstreamInvalid(), "an unknown content encoding")


def _failed_status(status: int, retry_after: str | None = None) -> AttemptFailed:
    reason = f"status {status}"
    again = status in TRY_AGAIN_STATUSES
    seconds = parse_retry_after(retry_after) if again else None
    if status == 429:
        return AttemptFailed(UpstreamRateLimited(), reason, again=again, retry_after=seconds)
    if 400 <= status <= 499:
        return AttemptFailed(UpstreamRejected(), reason, again=again, retry_after=seconds)
    if 500 <= status <= 599:
        return AttemptFailed(UpstreamError(), reason, again=again, retry_after=seconds)
    return AttemptFailed(UpstreamInvalid(), reason)


async def _failed_json(response: aiohttp.ClientResponse) -> AttemptFailed:
    """A JSON body where a stream should be: an error object, or an endpoint that does not know how to stream."""
    body = bytearray()
    try:
        async with asyncio.timeout(_ERROR_BODY_TIMEOUT):
            while len(body) <= _MAX_ERROR_BODY and (data := await response.content.readany()):
                body += data
        value = decode_json(bytes(body))
    except (TimeoutError, MalformedChunk, *_BREAKS):
        value = None
    if isinstance(value, dict) and value.get("error") is not None:
        return _failed_in_stream(value["error"])
    return AttemptFailed(UpstreamInvalid(), "a JSON body instead of an event stream")


def _failed_in_stream(error: Any) -> AttemptFailed:
    """An error object inside a 200: told as upstream_error, tried again as its code or type would be as a status."""
    status = None
    if isinstance(error, dict):
        code = error.get("code")
        if isinstance(code, str) and code.isascii() and code.isdigit():
            code = int(code[:4])
        status = code if type(code) is int else None
        for name in (error.get("type"), error.get("code")):
            if status is None and isinstance(name, str):
                status = _STATUS_OF_ERROR_TYPE.get(name)
    return AttemptFailed(UpstreamError(), "an error object", again=status in TRY_AGAIN_STATUSES)


def parse_retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110 §10.2.3); None where it is absent or garbage."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:10])
    try:
        date = parsedate_to_datetime(value)
        if date.tzinfo is None:  # asctime's form names no zone; all of HTTP's dates are in UTC (§5.6.7)
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


# ---- The body

# What reading a body can raise. RuntimeError is aiohttp's for reading on after the connection has closed.
_BREAKS: Final = (aiohttp.ClientError, OSError, RuntimeError)


class _AnswerBody:
    """Reads one response's body to its end: bytes to events to chunks, one batch a read."""

    def __init__(self, response: aiohttp.ClientResponse, sink: ChunkSink, done: Callable[[], None]) -> None:
        self._content = response.content
        self._sink = sink
        self._done = done
        self._parser = EventStreamParser()
        self._malformed = 0
        self._finished = False  # a finish_reason has come: from here on a close is a clean end
        self._over = False  # [DONE] has come

    async def read(self) -> None:
        broken = None
        while not self._over:
            try:
                data = await self._content.readany()
            except _BREAKS as exc:
                broken = exc
                data = _left_behind(self._content)
            await self._take(data)
            if broken or not data:
                break
        if self._over:
            await self._read_past_done()
        elif self._finished:
            self._done()
        elif broken:
            raise _translate_break(broken) from broken
        else:
            raise AttemptFailed(UpstreamIncomplete(), "closed before its end", again=True)

    async def _take(self, data: bytes) -> None:
        for start in range(0, len(data), _FED_AT_ONCE):
            if start:
                await asyncio.sleep(0)
            if not self._over:
                self._feed(data[start : start + _FED_AT_ONCE])

    def _feed(self, data: bytes) -> None:
        """Parse, then hand on what is good before complaining about what is not."""
        failure = None
        try:
            events = self._parser.feed(data)
        except EventTooLarge as exc:
            events = exc.events
            failure = AttemptFailed(UpstreamInvalid(), str(exc))
        chunks: list[Chunk] = []
        for event in events:
            if event.data == DONE:
                self._over = True
                break
            try:
                chunks.append(self._read_chunk(event))
            except AttemptFailed as exc:
                failure = exc
                break
        if chunks:
            self._sink(chunks)
        if self._over:
            self._done()
        elif failure:
            raise failure

    def _read_chunk(self, event: ServerSentEvent) -> Chunk:
        try:
            chunk = decode_chunk(event.data)
        except MalformedChunk:
            if event.type == b"error":
                raise _failed_in_stream(None) from None
            self._malformed += 1
            if self._malformed > MAX_MALFORMED_EVENTS:
                raise AttemptFailed(UpstreamInvalid(), f"more than {MAX_MALFORMED_EVENTS} malformed events") from None
            return Chunk()
        if chunk.error is not None or event.type == b"error":
            raise _failed_in_stream(chunk.error)
        if chunk.finish_reason:
            self._finished = True
        return chunk

    async def _read_past_done(self) -> None:
        """Read the little that may follow, so that the connection can be used again; else it is closed."""
        try:
            async with asyncio.timeout(_AFTER_DONE_TIMEOUT):
                left = _MAX_ERROR_BODY
                while left > 0 and (data := await self._content.readany()):
                    left -= len(data)
        except (TimeoutError, *_BREAKS):
            pass


def _end_body_with_connection(response: aiohttp.ClientResponse) -> None:
    """Make the body end no later than its connection.

    Where the body's framing is wrong (a chunk size that is no number), aiohttp closes the connection and tells nobody
    who reads the body: the reader would wait until a time limit ends the answer.
    """
    content = response.content
    # None where the whole response has come already; compared with None, since an idle protocol is false.
    protocol = None if response.connection is None else response.connection.protocol
    if protocol is None or (closed := protocol.closed) is None:
        return

    def end(_: asyncio.Future[None]) -> None:
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection closed inside the body"))

    def forget() -> None:
        closed.remove_done_callback(end)

    closed.add_done_callback(end)
    content.on_eof(forget)  # the connection may live on, for other requests
    closed.remove_done_callback(_take_note)  # once a connection, however often it is used
    closed.add_done_callback(_take_note)


def _take_note(closed: asyncio.Future[None]) -> None:
    """Look at how a connection ended: asyncio logs an error for each exception that nobody looked at."""
    if not closed.cancelled():
        closed.exception()


def _left_behind(content: aiohttp.StreamReader) -> bytes:
    """What had arrived when the connection broke.

    Tokens that came in one segment with the reset, or with a close that cuts the body, are in the reader's buffer, but
    each of its public read calls raises the exception first. The private call below gives them out; it is pinned by
    the aiohttp version and by tests/upstream/test_client.py.
    """
    return content._read_nowait(-1)


# ---- Failures of the connection


def _translate(exc: aiohttp.ClientError | OSError, *, reused: bool) -> AttemptFailed:
    """What ended the request before its response began."""
    if isinstance(exc, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return AttemptFailed(UpstreamUnreachable(), "TLS failed")  # no further try mends a certificate
    if isinstance(exc, aiohttp.ClientConnectorDNSError):
        return AttemptFailed(UpstreamUnreachable(), "the name has no address", again=True)
    if isinstance(exc, aiohttp.ServerTimeoutError):
        return AttemptFailed(UpstreamUnreachable(), "no connection in time", again=True)
    if isinstance(exc, aiohttp.ClientConnectorError):
        return AttemptFailed(UpstreamUnreachable(), "no connection", again=True)
    if isinstance(exc, aiohttp.ClientConnectionError | OSError):
        return AttemptFailed(UpstreamUnreachable(), "closed without an answer", again=True, stale=reused)
    # ClientResponseError and the like: no HTTP, or headers over every bound. Its repr holds our key; never log it.
    return AttemptFailed(UpstreamInvalid(), "not HTTP")


def _translate_break(exc: Exception) -> AttemptFailed:
    """What ended the body before its end."""
    if isinstance(exc.__cause__, ContentEncodingError):
        return AttemptFailed(UpstreamInvalid(), "a content encoding that does not decode")
    return AttemptFailed(UpstreamIncomplete(), "broke before its end", again=True)
