"""The token bucket round every request that may cost something."""

from __future__ import annotations

import math

from aiohttp import web
from aiohttp.typedefs import Handler

from server.api.keys import ALLOWANCE, BUCKETS, CLIENT
from server.errors import RateLimited

__all__ = ["limit_rate", "rate_limit_headers", "spend_token"]


@web.middleware
async def limit_rate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse with 429 what :func:`spend_token` finds no token for.

    The bucket stands round the handler, but the handler says when to take from it: a request that is refused for
    another reason, or that goes on with an answer already paid for, costs no token.
    """
    try:
        return await handler(request)
    except RateLimited as refusal:
        refusal.retry_after = math.ceil(request[ALLOWANCE].next_in)
        raise


def spend_token(request: web.Request) -> None:
    """Take one token from the bucket of the request's client. Raises RateLimited where there is none."""
    buckets = request.app.get(BUCKETS)
    if buckets is None:
        return
    request[ALLOWANCE] = allowance = buckets.take(request[CLIENT])
    if not allowance.admitted:
        raise RateLimited


def rate_limit_headers(request: web.Request) -> dict[str, str]:
    """``RateLimit-Policy`` and ``RateLimit`` (draft-ietf-httpapi-ratelimit-headers) of an answer that was counted.

    ``r`` is what is left, ``t`` the seconds until the next token comes back.
    """
    buckets, allowance = request.app.get(BUCKETS), request.get(ALLOWANCE)
    if buckets is None or allowance is None:
        return {}
    rate = buckets.rate
    return {
        "RateLimit-Policy": f'"requests";q={rate.amount};w={math.ceil(rate.seconds)}',
        "RateLimit": f'"requests";r={allowance.remaining};t={math.ceil(allowance.next_in)}',
    }
