"""One log line a request, whatever became of it. aiohttp's own would show the query string, and so the question."""

from __future__ import annotations

import logging
import time

from aiohttp import web

from server.api.keys import Exchange
from server.logs import log_event

__all__ = ["log_request"]

_CLIENT_CLOSED_REQUEST = 499  # nginx's name for a client that left before the status line

_log = logging.getLogger("sluice.request")


def log_request(request: web.Request, exchange: Exchange, status: int | None, began_at: float) -> None:
    """Log method, path, status, client and duration of a request that is over, also of one that was cancelled; it had
    begun at ``began_at`` (s, time.monotonic)."""
    log_event(
        _log,
        logging.INFO,
        "request",
        method=request.method,
        path=request.path[:200],
        status=exchange.sent_status or status or _CLIENT_CLOSED_REQUEST,
        client=exchange.client or None,
        request_id=exchange.request_id,
        upstream_request_id=exchange.upstream_request_id,
        duration_ms=round((time.monotonic() - began_at) * 1000),
    )
