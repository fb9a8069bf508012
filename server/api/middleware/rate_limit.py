"""The token buckets round every request that may cost something: one of requests, one of generated LLM tokens."""

from __future__ import annotations

import functools
import math

from aiohttp import web
from aiohttp.typedefs import Handler

from server.api.keys import ALLOWANCE, BUCKETS, CLIENT, LLM_TOKENS
from server.errors import RateLimited, TokenLimitExceeded
from server.relay.admission import Reservation
from server.settings import Rate

__all__ = ["limit_rate", "rate_limit_headers", "show_allowance", "spend"]


@web.middleware
async def limit_rate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse with 429 what :func:`spend` finds nothing for.

    The buckets stand round the handler, but the handler says when to take from them: a request that is refused for
    another reason, or that goes on with an answer already paid for, costs nothing.
    """
    try:
        return await handler(request)
    except RateLimited as refusal:
        refusal.retry_after = math.ceil(request[ALLOWANCE].next_in)
        raise
    except TokenLimitExceeded as refusal:
        refusal.retry_after = math.ceil(request.app[LLM_TOKENS].look(request[CLIENT]).next_in)
        raise


def spend(request: web.Request, max_tokens: int) -> Reservation | None:
    """Take a request from the client's bucket, and reserve up to ``max_tokens`` of its LLM tokens where they are
    limited. Raises RateLimited or TokenLimitExceeded, and then nothing was taken."""
    client = request[CLIENT]
    buckets, llm_tokens = request.app.get(BUCKETS), request.app.get(LLM_TOKENS)
    if llm_tokens is None:
        if buckets is not None:
            request[ALLOWANCE] = allowance = buckets.take(client)
            if not allowance.admitted:
                raise RateLimited
        return None
    show_allowance(request)
    if buckets is not None and not request[ALLOWANCE].admitted:
        raise RateLimited
    reservation = llm_tokens.reserve(client, max_tokens)
    if reservation is None:
        raise TokenLimitExceeded
    if buckets is not None:
        request[ALLOWANCE] = buckets.take(client)
    return reservation


def show_allowance(request: web.Request) -> None:
    """Let the answer's headers say how the client stands, with nothing taken."""
    buckets = request.app.get(BUCKETS)
    if buckets is not None:
        request[ALLOWANCE] = buckets.look(request[CLIENT])


def rate_limit_headers(request: web.Request) -> dict[str, str]:
    """``RateLimit-Policy`` and ``RateLimit`` (draft-ietf-httpapi-ratelimit-headers) of an answer that was admitted.

    ``r`` is what is left, ``t`` the seconds until the next token comes back.
    """
    buckets, allowance = request.app.get(BUCKETS), request.get(ALLOWANCE)
    if buckets is None or allowance is None:
        return {}
    return {
        "RateLimit-Policy": _policy(buckets.rate),
        "RateLimit": f'"requests";r={allowance.remaining};t={math.ceil(allowance.next_in)}',
    }


@functools.lru_cache(maxsize=4)
def _policy(rate: Rate) -> str:
    return f'"requests";q={rate.amount};w={math.ceil(rate.seconds)}'
