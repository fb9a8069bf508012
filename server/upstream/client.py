"""One request to an OpenAI-compatible endpoint: its bytes become chunks, its failures ours, and it is always closed."""

from __future__ import annotations

import asyncio
import io
from collections import defaultdict
from collections.abc import Awaitable, Mapping
from types import SimpleNamespace, TracebackType
from typing import Any, Final, Protocol

import aiohttp
from multidict import CIMultiDict

from server.errors import UpstreamInvalid
from server.upstream.attempt import AttemptFailed, failed_body, failed_connection, failed_in_stream, failed_status
from server.upstream.body import BREAKS, read_body
from server.upstream.direct import DirectRequest, Question, Receiver, connect_directly
from server.upstream.endpoint import Endpoint
from server.upstream.reader import AnswerReader
from server.upstream.resolver import DaemonResolver
from server.upstream.said import (
    hear,
    is_json,
    media_type_of,
    overhear,
    read_json,
    read_request_id,
    said_in_stream,
)
from server.wire.chunks import Answerer, Chunk, ChunkSink, MalformedChunk, decode_completion
from server.wire.shapes import KnownShapes

__all__ = ["UpstreamClient", "UpstreamRequest"]

_MAX_COMPLETION: Final = 8 << 20  # bytes of one that is not streamed; what an answer may hold is for the asker to say
_MAY_BE_TOO_LONG: Final = frozenset({400, 413, 422})  # statuses of a conversation over the model's context
_SENT_AT_ONCE: Final = 512 << 10  # bytes of a request's body


class UpstreamRequest(Protocol):
    """What is asked: server/wire/chat.py."""

    @property
    def streamed(self) -> bool:
        """Whether the answer is to come as an event stream, and not as one JSON value."""

    @property
    def verbatim(self) -> bool:
        """Whether the asker passes the answer on as it comes: its chunks then carry their bytes."""

    def encode(self, model: str, /) -> bytes:
        """The request's body, for an endpoint that has ``model``."""


class UpstreamClient:
    """Holds the one ClientSession of the process; an async context manager.

    ``connect_timeout`` (s) covers DNS, TCP and TLS. All other time limits are the caller's. ``direct`` takes the short
    way of server/upstream/direct.py, which has to be known to work.
    """

    def __init__(self, *, connect_timeout: float, direct: bool = False) -> None:
        self._connect_timeout = connect_timeout
        self._direct = direct
        self._requests: dict[tuple[Endpoint, bool], DirectRequest] = {}  # made once
        self._shapes: defaultdict[Endpoint, KnownShapes] = defaultdict(KnownShapes)

    async def __aenter__(self) -> UpstreamClient:
        # No bound of its own: admission bounds the streams, and a queue here would be a silent wait.
        connector = aiohttp.TCPConnector(limit=0, resolver=DaemonResolver())
        traces = []
        if self._direct:
            connect_directly(connector)
        else:
            reuse = aiohttp.TraceConfig()
            reuse.on_connection_reuseconn.append(_note_reuse)
            traces.append(reuse)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=traces,
        )
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, endpoint: Endpoint, asked: UpstreamRequest, sink: ChunkSink) -> None:
        """Send one request and hand each batch of chunks to ``sink`` as it comes; a completion that is not streamed is
        a single chunk, and the end.

        Returns when the answer is complete: at ``[DONE]``, or where the endpoint closes after a finish_reason.
        Raises AttemptFailed for everything else. However it ends, the response is closed.
        """

        def begin(headers: Mapping[str, str]) -> None:
            sink.begin(Answerer(endpoint.model, read_request_id(headers), endpoint.name))

        reader = AnswerReader(sink, verbatim=asked.verbatim, shapes=self._shapes[endpoint])
        response: aiohttp.ClientResponse | None = None
        receiver: Receiver | None = None
        if self._direct:
            receiver = Receiver(reader, begin if asked.streamed else _refuse_stream)
            request, sent = self._post_directly(endpoint, asked, receiver)
        else:
            request, sent = self._post(endpoint, asked)
        try:
            response = await request
            del request  # not needed while the body flows: an open stream would hold a kilobyte and more of it
            if response is not None:  # else all of it has come by the short way
                async with response:
                    await _check_head(response, endpoint, verbatim=asked.verbatim)
                    begin(response.headers)
                    if asked.streamed:
                        await _check_stream(response)
                        await read_body(response, reader)
                    else:
                        sink.end([await _read_completion(response)])
        except AttemptFailed as failed:
            headed = response or receiver
            if failed.error_object is not None and headed is not None:
                failed.error.said = said_in_stream(failed.error_object, headed, endpoint)
            raise
        except (aiohttp.ClientError, OSError) as exc:
            raise failed_connection(exc, reused=sent.reused) from exc

    def _post(self, endpoint: Endpoint, asked: UpstreamRequest) -> tuple[_Request, _Sent]:
        body = asked.encode(endpoint.model)
        sent = SimpleNamespace(reused=False)
        request = self._session.post(
            endpoint.url,
            # aiohttp would hand more than that over to the socket in one go, and warns of it.
            data=body if len(body) <= _SENT_AT_ONCE else io.BytesIO(body),
            headers=_headers_to(endpoint, streamed=asked.streamed),
            allow_redirects=False,  # a 307 would send the prompt elsewhere
            trace_request_ctx=sent,
        )
        return request, sent

    def _post_directly(self, endpoint: Endpoint, asked: UpstreamRequest, receiver: Receiver) -> tuple[_Request, _Sent]:
        kind = (endpoint, asked.streamed)
        if kind not in self._requests:
            head = _head_to(endpoint, streamed=asked.streamed)
            self._requests[kind] = DirectRequest(endpoint.url, head, asyncio.get_running_loop())
        question = Question(asked.encode(endpoint.model))
        return self._requests[kind].ask(self._session, question, receiver), question


class _Sent(Protocol):
    """What became of a request while it was sent."""

    reused: bool  # it went out on a connection that had brought an answer before


_Request = Awaitable[aiohttp.ClientResponse | None]


def _headers_to(endpoint: Endpoint, *, streamed: bool) -> CIMultiDict[str]:
    headers: CIMultiDict[str] = CIMultiDict(
        {
            "Content-Type": "application/json",
            "Accept": "text/event-stream" if streamed else "application/json",
            "Accept-Encoding": "identity",  # a compressor holds tokens back
            "User-Agent": "sluice",
        }
    )
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    return headers


def _head_to(endpoint: Endpoint, *, streamed: bool) -> bytes:
    """The request's head up to the number of bytes that its body has."""
    url = endpoint.url
    lines = [f"POST {url.raw_path_qs} HTTP/1.1", f"Host: {url.host_port_subcomponent}"]
    lines += [f"{name}: {value}" for name, value in _headers_to(endpoint, streamed=streamed).items()]
    return "\r\n".join([*lines, "Content-Length: "]).encode("ascii")


async def _note_reuse(session: aiohttp.ClientSession, context: Any, params: Any) -> None:
    context.trace_request_ctx.reused = True


async def _check_head(response: aiohttp.ClientResponse, endpoint: Endpoint, *, verbatim: bool) -> None:
    """Return if it is a 200 that can be read; raise AttemptFailed for what any other status says."""
    if response.status != 200:
        # Nobody else waits for the body: the status has said all, but where another endpoint may take what is too long
        # for this one.
        wanted = verbatim or response.status in _MAY_BE_TOO_LONG
        said = await hear(response, endpoint) if wanted else overhear(response, endpoint)
        raise failed_status(response.status, said, response.headers.get("Retry-After"))
    if response.headers.get("Content-Encoding", "identity").lower() not in {"identity", "gzip", "deflate"}:
        raise AttemptFailed(UpstreamInvalid(), "an unknown content encoding")


def _refuse_stream(headers: Mapping[str, str]) -> None:
    """What was not to be streamed is."""
    raise _not_json()


def _not_json() -> AttemptFailed:
    return AttemptFailed(UpstreamInvalid(), "not JSON")


async def _check_stream(response: aiohttp.ClientResponse) -> None:
    """Return if an event stream follows. Raises AttemptFailed."""
    media_type = media_type_of(response)
    if is_json(media_type):
        raise await _failed_json(response)
    if media_type != "text/event-stream":
        raise AttemptFailed(UpstreamInvalid(), "not an event stream")


async def _failed_json(response: aiohttp.ClientResponse) -> AttemptFailed:
    """A JSON body where a stream should be: an error object, or an endpoint that does not know how to stream."""
    value = await read_json(response)
    if isinstance(value, dict) and value.get("error") is not None:
        return failed_in_stream(value["error"])
    return AttemptFailed(UpstreamInvalid(), "a JSON body instead of an event stream")


async def _read_completion(response: aiohttp.ClientResponse) -> Chunk:
    """The whole of a completion that was not streamed. Raises AttemptFailed where it is none."""
    if not is_json(media_type_of(response)):
        raise _not_json()
    body = bytearray()
    try:
        while data := await response.content.readany():
            body += data
            if len(body) > _MAX_COMPLETION:
                raise AttemptFailed(UpstreamInvalid(), f"a completion of more than {_MAX_COMPLETION} bytes")
    except BREAKS as exc:
        raise failed_body(exc) from exc
    try:
        completion = decode_completion(bytes(body))
    except MalformedChunk as exc:
        raise AttemptFailed(UpstreamInvalid(), "not a completion") from exc
    if completion.error is not None:
        raise failed_in_stream(completion.error)
    return completion
