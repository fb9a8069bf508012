"""The one place where an error becomes a status."""

from __future__ import annotations

import logging

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from server.api.keys import SENT_STATUS
from server.errors import InternalError, MethodNotAllowed, NotFound, Refused, RelayError

__all__ = ["answer_errors", "as_response"]

_log = logging.getLogger("sluice.request")


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what the handler raises into a JSON answer, as long as no head has been sent."""
    try:
        return await handler(request)
    except Refused as refusal:
        return as_response(refusal, refusal.status)
    except web.HTTPException as exc:
        return _translate(request, exc)
    except Exception:
        _log.exception("request_failed")
        if SENT_STATUS in request and request.transport is not None:
            # A cut response must not look like a whole one. What is returned below finds the connection closed.
            request.transport.abort()
        return as_response(InternalError(), 500)


def as_response(error: RelayError, status: int) -> web.Response:
    """``{"error": CODE, "message": TEXT}`` with the headers that belong to the error."""
    body = msgspec.json.encode({"error": error.code, "message": str(error)})
    response = web.Response(status=status, body=body, content_type="application/json", charset="utf-8")
    response.headers["Cache-Control"] = "no-store"
    if isinstance(error, MethodNotAllowed):
        response.headers["Allow"] = error.allowed
    if isinstance(error, Refused) and error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _translate(request: web.Request, exc: web.HTTPException) -> web.Response:
    """aiohttp's own refusals (no such path, no such method …) in our words. A failed expectation is not among them: it
    is refused before any middleware."""
    if isinstance(exc, web.HTTPMethodNotAllowed):
        refusal: Refused = MethodNotAllowed(request.method, frozenset(exc.allowed_methods))
        return as_response(refusal, refusal.status)
    if isinstance(exc, web.HTTPNotFound):
        return as_response(NotFound(), 404)
    error = RelayError(exc.reason)
    error.code = exc.reason.lower().replace(" ", "_").replace("-", "_")
    return as_response(error, exc.status)
