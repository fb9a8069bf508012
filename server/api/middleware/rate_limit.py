"""The token buckets round every request that may cost something: one of requests, one of generated LLM tokens."""

from __future__ import annotations

import math

from aiohttp import web
from aiohttp.typedefs import Handler

from server.api.keys import EXCHANGE, Exchange, Limits
from server.errors import RateLimited, TokenLimitExceeded
from server.relay.admission import Reservation, TokenBuckets
from server.settings import Rate, Settings

__all__ = ["limit_rate", "limits_of", "rate_limit_headers", "show_allowance", "spend"]


@web.middleware
async def limit_rate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse with 429 what :func:`spend` finds nothing for.

    The buckets stand round the handler, but the handler says when to take from them: a request that is refused for
    another reason, or that goes on with an answer already paid for, costs nothing.
    """
    try:
        return await handler(request)
    except RateLimited as refusal:
        if (allowance := request[EXCHANGE].allowance) is not None:
            refusal.retry_after = math.ceil(allowance.next_in)
        raise
    except TokenLimitExceeded as refusal:
        exchange = request[EXCHANGE]
        if (llm_tokens := exchange.limits.llm_tokens) is not None:
            refusal.retry_after = math.ceil(llm_tokens.look(exchange.client).next_in)
        raise


def spend(request: web.Request, max_tokens: int) -> Reservation | None:
    """Take a request from the client's bucket, and reserve up to ``max_tokens`` of its LLM tokens where they are
    limited. Raises RateLimited or TokenLimitExceeded, and then nothing was taken."""
    exchange = request[EXCHANGE]
    requests, llm_tokens, _ = exchange.limits
    reservation = None
    if llm_tokens is not None:
        show_allowance(request)
        if exchange.allowance is not None and not exchange.allowance.admitted:
            raise RateLimited
        reservation = llm_tokens.reserve(exchange.client, max_tokens)
        if reservation is None:
            raise TokenLimitExceeded
    if requests is not None:
        exchange.allowance = requests.take(exchange.client)
        if not exchange.allowance.admitted:  # never behind a reservation: it was looked at before that
            raise RateLimited
    return reservation


def show_allowance(request: web.Request) -> None:
    """Let the answer's headers say how the client stands, with nothing taken."""
    exchange = request[EXCHANGE]
    requests = exchange.limits.requests
    if requests is not None:
        exchange.allowance = requests.look(exchange.client)


def rate_limit_headers(exchange: Exchange) -> dict[str, str]:
    """``RateLimit-Policy`` and ``RateLimit`` (draft-ietf-httpapi-ratelimit-headers) of an answer that was admitted.

    ``r`` is what is left, ``t`` the seconds until the next token comes back.
    """
    allowance = exchange.allowance
    if allowance is None:
        return {}
    return {
        "RateLimit-Policy": exchange.limits.policy,
        "RateLimit": f'"requests";r={allowance.remaining};t={math.ceil(allowance.next_in)}',
    }


def limits_of(settings: Settings) -> Limits:
    """The buckets that the settings ask for, all of them full."""
    rate, tokens = settings.rate_limit, settings.token_limit
    return Limits(
        requests=None if rate is None else TokenBuckets(rate),
        llm_tokens=None if tokens is None else TokenBuckets(tokens),
        policy="" if rate is None else _policy(rate),
    )


def _policy(rate: Rate) -> str:
    return f'"requests";q={rate.amount};w={math.ceil(rate.seconds)}'
