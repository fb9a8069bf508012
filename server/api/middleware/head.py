"""How much a request may say before its body."""

from __future__ import annotations

from itertools import chain
from typing import Final

from aiohttp import web

from server.errors import InvalidRequest

__all__ = ["bound_head"]

_MAX_HEADERS: Final = 64 << 10  # bytes of all headers together, as nginx's four buffers of 16 KiB


def bound_head(request: web.Request) -> None:
    """Refuse headers that are within aiohttp's bounds one by one (8 KiB, 128 of them) and a megabyte together."""
    if sum(map(len, chain.from_iterable(request.raw_headers))) > _MAX_HEADERS:
        raise InvalidRequest("headers_too_large", f"The request's headers have more than {_MAX_HEADERS >> 10} KiB.")
