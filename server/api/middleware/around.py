"""What begins with a request's head and ends with its answer."""

from __future__ import annotations

import time

from aiohttp import web
from aiohttp.typedefs import Handler

from server.api.keys import CONNECTIONS, EXCHANGE, LIMITS, Exchange
from server.api.middleware.request_id import request_id_of
from server.api.middleware.request_log import log_request

__all__ = ["attend"]


@web.middleware
async def attend(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Name the request, count it among those that are owed an answer, and log what became of it.

    One middleware, as in server/api/middleware/checks.py: each is a coroutine that waits while a stream is open.
    """
    began_at = time.monotonic()
    app = request.app
    request[EXCHANGE] = exchange = Exchange(request_id_of(request), app[LIMITS])
    connections = app[CONNECTIONS]
    connections.request_begun(request.protocol)
    status = None
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        log_request(request, exchange, status, began_at)
        connections.request_answered()
