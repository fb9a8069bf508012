"""How one request to an endpoint fails: statuses, error objects and broken connections, each as one of our errors."""

from __future__ import annotations

import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Final

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError

from server.errors import (
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
TRY_AGAIN_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})

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

    ``error`` is what the client is told if it was the last one; ``again`` says whether the same endpoint may do better
    on a further try; ``retry_after`` (s) is what it asked for; ``reason`` is for the log and holds nothing of the
    endpoint's own words; ``stale`` marks a pooled connection that the endpoint had closed before it saw the request.
    """

    def __init__(
        self,
        error: UpstreamFailed,
        reason: str,
        *,
        again: bool = False,
        retry_after: float | None = None,
        stale: bool = False,
    ) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason
        self.again = again
        self.retry_after = retry_after
        self.stale = stale


def failed_status(status: int, retry_after: str | None = None) -> AttemptFailed:
    """What a status other than 200 says."""
    reason = f"status {status}"
    again = status in TRY_AGAIN_STATUSES
    seconds = parse_retry_after(retry_after) if again else None
    if status == 429:
        return AttemptFailed(UpstreamRateLimited(), reason, again=again, retry_after=seconds)
    if 400 <= status <= 499:
        return AttemptFailed(UpstreamRejected(), reason, again=again, retry_after=seconds)
    if 500 <= status <= 599:
        return AttemptFailed(UpstreamError(), reason, again=again, retry_after=seconds)
    return AttemptFailed(UpstreamInvalid(), reason)


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
    return AttemptFailed(UpstreamError(), "an error object", again=status in TRY_AGAIN_STATUSES)


def failed_connection(exc: aiohttp.ClientError | OSError, *, reused: bool) -> AttemptFailed:
    """What ended the request before its response began; ``reused``: its connection had brought an answer before."""
    if isinstance(exc, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return AttemptFailed(UpstreamUnreachable(), "TLS failed")  # no further try mends a certificate
    if isinstance(exc, aiohttp.ClientConnectorDNSError):
        return AttemptFailed(UpstreamUnreachable(), "the name has no address", again=True)
    if isinstance(exc, aiohttp.ServerTimeoutError):
        return AttemptFailed(UpstreamUnreachable(), "no connection in time", again=True)
    if isinstance(exc, aiohttp.ClientConnectorError):
        return AttemptFailed(UpstreamUnreachable(), "no connection", again=True)
    if isinstance(exc, aiohttp.ClientConnectionError | OSError):
        return AttemptFailed(UpstreamUnreachable(), "closed without an answer", again=True, stale=reused)
    # ClientResponseError and the like: no HTTP, or headers over every bound. Its repr holds our key; never log it.
    return AttemptFailed(UpstreamInvalid(), "not HTTP")


def failed_body(exc: BaseException | None) -> AttemptFailed:
    """What ended the body before its end; None where that looked clean."""
    if exc is None:
        return AttemptFailed(UpstreamIncomplete(), "closed before its end", again=True)
    if isinstance(exc.__cause__, ContentEncodingError):
        return AttemptFailed(UpstreamInvalid(), "a content encoding that does not decode")
    return AttemptFailed(UpstreamIncomplete(), "broke before its end", again=True)


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
