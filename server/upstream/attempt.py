"""How one request to an endpoint fails: statuses, error objects and broken connections, each as one of our errors."""

from __future__ import annotations

import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Final

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError

from server.errors import (
    Said,
    UpstreamError,
    UpstreamFailed,
    UpstreamIncomplete,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamUnreachable,
)

__all__ = [
    "AttemptFailed",
    "failed_body",
    "failed_connection",
    "failed_in_stream",
    "failed_status",
    "parse_retry_after",
]

# Before the first token only; later a second try would repeat text.
_AGAIN_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})

# Of the 4xx: what another endpoint may take, beside a conversation that is too long for this one; and what says that
# the endpoint, or what we have there, is out of order, and not the request.
_ELSEWHERE_STATUSES: Final = frozenset({401, 403, 404, 408, 429})
_COUNTING_STATUSES: Final = frozenset({401, 403, 408, 429})

# What error objects in a stream are called, with the status that the same failure has before a stream.
_STATUS_OF_ERROR_TYPE: Final = {
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "server_error": 500,
    "internal_server_error": 500,
    "overloaded_error": 503,
}


class AttemptFailed(Exception):
    """One request came to nothing, or broke off.

    ``error`` is what the client is told if it was the last one; ``reason`` is for the log and holds nothing of the
    endpoint's own words. ``again`` says whether the same endpoint may do better on a further try, ``elsewhere`` whether
    another one may; ``retry_after`` (s) is what the endpoint asked for; ``counts``, that the endpoint is at fault
    (circuit); ``stale`` marks a pooled connection that it had closed before it saw the request; ``error_object`` is
    what it said inside a 200.
    """

    def __init__(
        self,
        error: UpstreamFailed,
        reason: str,
        *,
        again: bool = False,
        elsewhere: bool = True,
        counts: bool = False,
        retry_after: float | None = None,
        stale: bool = False,
        error_object: Any = None,
    ) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason
        self.again = again
        self.elsewhere = elsewhere
        self.counts = counts
        self.retry_after = retry_after
        self.stale = stale
        self.error_object = error_object


def failed_status(status: int, said: Said, retry_after: str | None = None) -> AttemptFailed:
    """What a status other than 200 says."""
    reason = f"status {status}"
    if 500 <= status <= 599:
        error: UpstreamFailed = UpstreamError(said=said)
        elsewhere = counts = True
    elif 400 <= status <= 499:
        error = UpstreamRateLimited(said=said) if status == 429 else UpstreamRejected(said=said)
        elsewhere = status in _ELSEWHERE_STATUSES or said.context_exceeded
        counts = status in _COUNTING_STATUSES
    else:  # a redirect, which is not followed, or a success without an answer
        return AttemptFailed(UpstreamInvalid(), reason)
    again = status in _AGAIN_STATUSES
    seconds = parse_retry_after(retry_after) if again else None
    return AttemptFailed(error, reason, again=again, elsewhere=elsewhere, counts=counts, retry_after=seconds)


def failed_in_stream(error: Any) -> AttemptFailed:
    """An error object inside a 200: told as upstream_error, tried again as its code or type would be as a status."""
    status = None
    if isinstance(error, dict):
        code = error.get("code")
        if isinstance(code, str) and code.isascii() and code.isdigit():
            code = int(code[:4])
        status = code if type(code) is int else None
        for name in (error.get("type"), error.get("code")):
            if status is None and isinstance(name, str):
                status = _STATUS_OF_ERROR_TYPE.get(name)
    again = status in _AGAIN_STATUSES
    return AttemptFailed(UpstreamError(), "an error object", again=again, counts=again, error_object=error)


def failed_connection(exc: aiohttp.ClientError | OSError, *, reused: bool) -> AttemptFailed:
    """What ended the request before its response began; ``reused``: its connection had brought an answer before."""
    if isinstance(exc, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        # No further try mends a certificate.
        return AttemptFailed(UpstreamUnreachable(), "TLS failed", counts=True)
    if isinstance(exc, aiohttp.ClientConnectorDNSError):
        return AttemptFailed(UpstreamUnreachable(), "the name has no address", again=True, counts=True)
    if isinstance(exc, aiohttp.ServerTimeoutError):
        return AttemptFailed(UpstreamUnreachable(), "no connection in time", again=True, counts=True)
    if isinstance(exc, aiohttp.ClientConnectorError):
        return AttemptFailed(UpstreamUnreachable(), "no connection", again=True, counts=True)
    if isinstance(exc, aiohttp.ClientConnectionError | OSError):
        # A connection that was kept says nothing of the endpoint's health: it may just have had its time.
        return AttemptFailed(
            UpstreamUnreachable(), "closed without an answer", again=True, counts=not reused, stale=reused
        )
    # ClientResponseError and the like: no HTTP, or headers over every bound. Its repr holds our key; never log it.
    return AttemptFailed(UpstreamInvalid(), "not HTTP")


def failed_body(exc: BaseException | None) -> AttemptFailed:
    """What ended the body before its end; None where that looked clean."""
    if exc is None:
        return AttemptFailed(UpstreamIncomplete(), "closed before its end", again=True, counts=True)
    if isinstance(exc.__cause__, ContentEncodingError):
        return AttemptFailed(UpstreamInvalid(), "a content encoding that does not decode")
    return AttemptFailed(UpstreamIncomplete(), "broke before its end", again=True, counts=True)


def parse_retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110 §10.2.3); None where it is absent or garbage."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:10])
    try:
        date = parsedate_to_datetime(value)
        if date.tzinfo is None:  # asctime's form names no zone; all of HTTP's dates are in UTC (§5.6.7)
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
