"""What is looked at before a request is handled, and leaves nothing to do behind it."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

__all__ = ["checking"]


def checking(*checks: Callable[[web.Request], None]) -> Middleware:
    """One middleware for all ``checks``, made in their order; each may raise a refusal.

    Not one for each: a middleware is a coroutine that waits for as long as its request's stream is open.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        for look in checks:
            look(request)
        return await handler(request)

    return check
