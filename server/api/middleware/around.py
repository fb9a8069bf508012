"""What begins with a request's head and ends with its answer."""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from server.api.keys import CONNECTIONS, EXCHANGE, LIMITS, Exchange
from server.api.middleware.errors import answer_to
from server.api.middleware.request_id import request_id_of
from server.api.middleware.request_log import log_request

__all__ = ["attending"]


def attending(*checks: Callable[[web.Request], None]) -> Middleware:
    """A middleware that names the request, counts it among those that are owed an answer, makes ``checks``, which may
    raise a refusal, turns what is raised into an answer, and logs what became of it all.

    One for all of that: each is a coroutine that waits for as long as the request's stream is open.
    """

    @web.middleware
    async def attend(request: web.Request, handler: Handler) -> web.StreamResponse:
        began_at = time.monotonic()
        app = request.app
        request[EXCHANGE] = exchange = Exchange(request_id_of(request), app[LIMITS])
        connections = app[CONNECTIONS]
        connections.request_begun(request.protocol)
        status = None
        try:
            try:
                for check in checks:
                    check(request)
                response = await handler(request)
            except Exception as exc:
                response = answer_to(request, exc)
            status = response.status
            return response
        finally:
            log_request(request, exchange, status, began_at)
            connections.request_answered()

    return attend
