"""A request's body: read whole or refused, within its bounds and its time."""

from __future__ import annotations

import asyncio
import re
from typing import Final

from aiohttp import web

from server.errors import BodyTooLarge, InvalidRequest, RequestTimeout, UnsupportedMediaType

__all__ = ["drop_body", "read_json_body"]

# By hand: aiohttp asks Python's e-mail parser, which takes a second over 8 kB of semicolons, and dies of parentheses.
_JSON: Final = re.compile(r'application/json(?:[ \t]*;[ \t]*charset="?utf-?8"?)?', re.IGNORECASE | re.ASCII)

_TIMEOUT: Final = 10.0  # s for a whole body; aiohttp has no limit of its own


async def read_json_body(request: web.Request) -> bytes:
    """The bytes of a body that says it is JSON. Raises UnsupportedMediaType, BodyTooLarge or RequestTimeout.

    The type is more than a formality: a page of another origin can post ``text/plain`` without asking, JSON it cannot.
    """
    if not _JSON.fullmatch(request.headers.get("Content-Type", "").strip()):
        raise UnsupportedMediaType
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType  # a bomb of 10 kB would be 10 MB
    return await _read(request)


async def drop_body(request: web.Request) -> None:
    """Read the body that a GET should not have: while it is unread, a client that leaves is not noticed."""
    if request.body_exists:
        await _read(request)


async def _read(request: web.Request) -> bytes:
    if (request.content_length or 0) > request.client_max_size:
        raise BodyTooLarge  # before a byte of it has come
    try:
        async with asyncio.timeout(_TIMEOUT):
            return await request.read()
    except TimeoutError:
        raise RequestTimeout from None
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLarge from None
    except web.RequestPayloadError:
        raise InvalidRequest("invalid_request", "The request's body is not what its headers announce.") from None
