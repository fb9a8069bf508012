"""The one place where an error becomes a status."""

from __future__ import annotations

import logging
from typing import Final

from aiohttp import web

from server.api.keys import EXCHANGE
from server.errors import InternalError, MethodNotAllowed, NotFound, RelayError, UpstreamFailed
from server.wire.chunks import encode_json
from server.wire.completion import encode_openai_error

__all__ = ["answer_to"]

_OURS: Final = frozenset({401, 403})  # statuses that are about the server's key, and none of the client's business

_ASKED_AGAIN: Final = frozenset({408, 409, 429})  # by OpenAI's SDKs, beside all of 5xx

_log = logging.getLogger("sluice.request")


def answer_to(request: web.Request, exc: Exception) -> web.StreamResponse:
    """The answer to a request whose handler raised ``exc``, as long as no head has been sent. To be called while that
    is handled."""
    if isinstance(exc, RelayError):
        return _as_response(request, exc)
    if isinstance(exc, web.HTTPException):
        return _translate(request, exc)
    _log.exception("request_failed")
    if request[EXCHANGE].sent_status is not None and request.transport is not None:
        # A cut response must not look like a whole one. What is returned below finds the connection closed.
        request.transport.abort()
    return _as_response(request, InternalError())


def _as_response(request: web.Request, error: RelayError) -> web.Response:
    """The error in the language of the face that was asked, with the headers that belong to it."""
    if request.path.startswith("/v1/"):
        response = _as_openai(request, error)
    elif request.path == "/api/chat" or request.path.startswith("/api/chat/"):
        # The AI SDK shows the body to people, as it is.
        response = web.Response(status=error.status, text=str(error))
    else:
        response = _as_json(error.status, encode_json({"error": error.code, "message": str(error)}))
    response.headers["Cache-Control"] = "no-store"
    if isinstance(error, MethodNotAllowed):
        response.headers["Allow"] = error.allowed
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _as_json(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json", charset="utf-8")


def _as_openai(request: web.Request, error: RelayError) -> web.Response:
    """As OpenAI's clients know it: what the upstream itself said, but for what it said of our key; else our words."""
    said = error.said if isinstance(error, UpstreamFailed) else None
    if said is not None and said.request_id is not None:
        request[EXCHANGE].upstream_request_id = said.request_id
    if said is not None and 400 <= said.status <= 599 and said.status not in _OURS:
        body = (
            encode_openai_error(error, status=said.status) if said.error is None else encode_json({"error": said.error})
        )
        response = _as_json(said.status, body)
        response.headers.update(said.headers)
        return response
    response = _as_json(error.status, encode_openai_error(error))
    if not error.retryable and (error.status >= 500 or error.status in _ASKED_AGAIN):
        response.headers["X-Should-Retry"] = "false"
    return response


def _translate(request: web.Request, exc: web.HTTPException) -> web.Response:
    """aiohttp's own refusals (no such path, no such method …) in our words. A failed expectation is not among them: it
    is refused before any middleware."""
    if isinstance(exc, web.HTTPMethodNotAllowed):
        return _as_response(request, MethodNotAllowed(request.method, frozenset(exc.allowed_methods)))
    if isinstance(exc, web.HTTPNotFound):
        return _as_response(request, NotFound())
    error = RelayError(exc.reason)
    error.status = exc.status
    error.code = exc.reason.lower().replace(" ", "_").replace("-", "_")
    return _as_response(request, error)
