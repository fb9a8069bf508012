"""A name for each request, so that a line in one log finds its line in another."""

from __future__ import annotations

import re
import secrets
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

from server.api.keys import CONNECTIONS, REQUEST_ID

__all__ = ["name_request"]

# What may go into a log and a header as it is.
_ACCEPTED: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


@web.middleware
async def name_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Take over the ``X-Request-ID`` that came, if it is harmless, else make one."""
    given = request.headers.get("X-Request-ID", "")
    request[REQUEST_ID] = given if _ACCEPTED.fullmatch(given) else secrets.token_hex(8)
    with request.app[CONNECTIONS].answering(request.protocol):
        return await handler(request)
