"""What every answer's head carries, and the head of a stream as bytes."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from email.utils import formatdate

from aiohttp import web, web_response

from server.api.keys import EXCHANGE, Exchange
from server.api.middleware.origin import is_api
from server.api.middleware.rate_limit import rate_limit_headers

__all__ = ["StreamHead", "stamp"]


async def stamp(request: web.Request, response: web.StreamResponse) -> None:
    """Add the headers that every answer carries; called as its head is about to go out."""
    exchange = request.get(EXCHANGE)  # none where an expectation failed: aiohttp refuses that before any middleware
    if exchange is not None:
        exchange.sent_status = response.status
    response.headers.update(_stamps(request, exchange))
    if is_api(request):
        # Even of a 204 a cache may make its own: and then a question would be answered with somebody's end.
        response.headers.setdefault("Cache-Control", "no-store")


def _stamps(request: web.Request, exchange: Exchange | None) -> dict[str, str]:
    stamps = {"X-Content-Type-Options": "nosniff"}
    if exchange is not None:
        stamps["X-Request-ID"] = exchange.upstream_request_id or exchange.request_id
    if is_api(request):
        stamps["Vary"] = "Origin"
        if exchange is not None:
            stamps |= rate_limit_headers(exchange)
    return stamps


class StreamHead:
    """The head of a chunked response of HTTP/1.1 with ``headers``, on a connection that is kept, as bytes: those that
    aiohttp would make of it, with no object for each header."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.headers = headers
        self._own = {**headers, "Connection": "keep-alive"}
        self._lines = _lines(self._own)

    def plus(self, headers: Mapping[str, str]) -> StreamHead:
        """One with further headers."""
        return StreamHead({**self.headers, **headers})

    async def of(self, request: web.Request) -> bytes:
        """The head of the answer to ``request``, which is about to go out. Nothing of it waits."""
        second = int(time.time())
        if "Origin" in request.headers:
            # Whoever has something to say of origins says it of aiohttp's response.
            response = web.StreamResponse(headers={**self._own, **_usual_headers(second)})
            await request.app.on_response_prepare.send(request, response)
            lines = _lines(response.headers)
        else:
            exchange = request[EXCHANGE]
            exchange.sent_status = 200
            lines = f"{self._lines}{_usual_lines(second)}{_lines(_stamps(request, exchange))}"
        return f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode("utf-8", "ignore")  # as aiohttp, where an origin is no ASCII


def _lines(headers: Mapping[str, str]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


@functools.lru_cache(maxsize=2)
def _usual_lines(second: int) -> str:
    return _lines(_usual_headers(second))


def _usual_headers(second: int) -> dict[str, str]:
    """Those that aiohttp adds by itself."""
    return {
        "Transfer-Encoding": "chunked",
        "Date": formatdate(second, usegmt=True),
        "Server": web_response.SERVER_SOFTWARE,  # type: ignore[attr-defined]
    }
