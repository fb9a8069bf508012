"""One request to an OpenAI-compatible endpoint: its bytes become chunks, its failures ours, and it is always closed."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable
from dataclasses import dataclass, field
from types import SimpleNamespace, TracebackType
from typing import Any, Final, Protocol

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from server.errors import UpstreamInvalid
from server.upstream.attempt import AttemptFailed, failed_connection, failed_in_stream, failed_status
from server.upstream.body import BREAKS, read_body
from server.upstream.direct import DirectRequest, Question, connect_directly, read_body_directly
from server.upstream.resolver import DaemonResolver
from server.wire.chunks import ChunkSink, MalformedChunk, decode_json

__all__ = ["Endpoint", "UpstreamClient"]

_MAX_ERROR_BODY: Final = 64 << 10  # bytes of a JSON body that are read to see whether it is an error object
_ERROR_BODY_TIMEOUT: Final = 2.0  # s, for the same
_SENT_AT_ONCE: Final = 512 << 10  # bytes of a request's body


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a question can be sent."""

    base_url: str
    model: str
    api_key: str = field(default="", repr=False)

    @property
    def url(self) -> URL:
        return URL(self.base_url.rstrip("/") + "/chat/completions")


class UpstreamClient:
    """Holds the one ClientSession of the process; an async context manager.

    ``connect_timeout`` (s) covers DNS, TCP and TLS. All other time limits are the caller's. ``direct`` takes the short
    way of server/upstream/direct.py, which has to be known to work.
    """

    def __init__(self, *, connect_timeout: float, direct: bool = False) -> None:
        self._connect_timeout = connect_timeout
        self._direct = direct
        self._heads: dict[Endpoint, tuple[URL, bytes]] = {}  # of direct requests, made once

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
            request_class=DirectRequest if self._direct else aiohttp.ClientRequest,
            trace_configs=traces,
        )
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, endpoint: Endpoint, body: bytes, sink: ChunkSink) -> None:
        """Send one request and hand each batch of chunks to ``sink`` as it comes.

        Returns when the answer is complete: at ``[DONE]``, or where the endpoint closes after a finish_reason.
        Raises AttemptFailed for everything else. However it ends, the response is closed.
        """
        request, sent = self._post_directly(endpoint, body) if self._direct else self._post(endpoint, body)
        try:
            response = await request
            # What is not needed while the body flows: an open stream would hold a kilobyte and more of it.
            del request, body
            async with response:
                await _check_head(response)
                await (read_body_directly if self._direct else read_body)(response, sink)
        except AttemptFailed:
            raise
        except (aiohttp.ClientError, OSError) as exc:
            raise failed_connection(exc, reused=sent.reused) from exc

    def _post(self, endpoint: Endpoint, body: bytes) -> tuple[_Request, _Sent]:
        sent = SimpleNamespace(reused=False)
        request = self._session.post(
            endpoint.url,
            # aiohttp would hand more than that over to the socket in one go, and warns of it.
            data=body if len(body) <= _SENT_AT_ONCE else io.BytesIO(body),
            headers=_headers_to(endpoint),
            allow_redirects=False,  # a 307 would send the prompt elsewhere
            trace_request_ctx=sent,
        )
        return request, sent

    def _post_directly(self, endpoint: Endpoint, body: bytes) -> tuple[_Request, _Sent]:
        if endpoint not in self._heads:
            self._heads[endpoint] = endpoint.url, _head_to(endpoint)
        url, head = self._heads[endpoint]
        question = Question(head, body)
        return self._session.post(url, data=question, allow_redirects=False), question


class _Sent(Protocol):
    """What became of a request while it was sent."""

    reused: bool  # it went out on a connection that had brought an answer before


_Request = Awaitable[aiohttp.ClientResponse]


def _headers_to(endpoint: Endpoint) -> CIMultiDict[str]:
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


def _head_to(endpoint: Endpoint) -> bytes:
    """The request's head up to the number of bytes that its body has."""
    url = endpoint.url
    lines = [f"POST {url.raw_path_qs} HTTP/1.1", f"Host: {url.host_port_subcomponent}"]
    lines += [f"{name}: {value}" for name, value in _headers_to(endpoint).items()]
    return "\r\n".join([*lines, "Content-Length: "]).encode("ascii")


async def _note_reuse(session: aiohttp.ClientSession, context: Any, params: Any) -> None:
    context.trace_request_ctx.reused = True


async def _check_head(response: aiohttp.ClientResponse) -> None:
    """Return if an event stream follows; else raise AttemptFailed for what the status or the headers say."""
    status = response.status
    if status != 200:
        raise failed_status(status, response.headers.get("Retry-After"))
    # Not aiohttp's content_type: that asks Python's e-mail parser, which takes seconds over some headers.
    content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type == "application/json" or content_type.endswith("+json"):
        raise await _failed_json(response)
    if content_type != "text/event-stream":
        raise AttemptFailed(UpstreamInvalid(), "not an event stream")
    if response.headers.get("Content-Encoding", "identity").lower() not in {"identity", "gzip", "deflate"}:
        raise AttemptFailed(UpstreamInvalid(), "an unknown content encoding")


async def _failed_json(response: aiohttp.ClientResponse) -> AttemptFailed:
    """A JSON body where a stream should be: an error object, or an endpoint that does not know how to stream."""
    body = bytearray()
    try:
        async with asyncio.timeout(_ERROR_BODY_TIMEOUT):
            while len(body) <= _MAX_ERROR_BODY and (data := await response.content.readany()):
                body += data
        value = decode_json(bytes(body))
    except (TimeoutError, MalformedChunk, *BREAKS):
        value = None
    if isinstance(value, dict) and value.get("error") is not None:
        return failed_in_stream(value["error"])
    return AttemptFailed(UpstreamInvalid(), "a JSON body instead of an event stream")
