"""One tree of errors. Each has one code, one status, one retryable, and words of ours that show nothing of a peer's.

RelayError
├── Refused                  before admission: an HTTP status (server/api/middleware/errors.py)
│   ├── InvalidRequest       400  missing_query, query_too_long, invalid_query, invalid_request, invalid_last_event_id …
│   ├── OriginNotAllowed     403
│   ├── NotFound             404
│   ├── StreamNotFound       404
│   ├── ModelNotFound        404
│   ├── MethodNotAllowed     405
│   ├── RequestTimeout       408
│   ├── BodyTooLarge         413
│   ├── UnsupportedMediaType 415
│   ├── RateLimited          429  rate_limit_exceeded
│   ├── TokenLimitExceeded   429, and in a stream that reaches the limit
│   ├── TooManyStreams       429
│   ├── Overloaded           503
│   └── ShuttingDown         503
├── UpstreamFailed           after admission: an event in the stream (server/wire/), or a status where none is sent yet
│   ├── UpstreamUnreachable  DNS, connect, TLS
│   ├── UpstreamTimeout      first token or idle
│   ├── UpstreamRateLimited  429
│   ├── UpstreamRejected     other 4xx
│   ├── UpstreamError        5xx, or an error object
│   ├── UpstreamInvalid      not the OpenAI stream format
│   └── UpstreamIncomplete   cut before its end
├── StreamTimeout            the whole answer took too long
├── AnswerTooLarge           the replay log is full
├── Interrupted              the server went down, or nobody was there
└── InternalError            a bug of ours
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

__all__ = [
    "AnswerTooLarge",
    "BodyTooLarge",
    "InternalError",
    "Interrupted",
    "InvalidRequest",
    "MethodNotAllowed",
    "ModelNotFound",
    "NotFound",
    "OriginNotAllowed",
    "Overloaded",
    "RateLimited",
    "Refused",
    "RelayError",
    "RequestTimeout",
    "Said",
    "ShuttingDown",
    "StreamNotFound",
    "StreamTimeout",
    "TokenLimitExceeded",
    "TooManyStreams",
    "UnsupportedMediaType",
    "UpstreamError",
    "UpstreamFailed",
    "UpstreamIncomplete",
    "UpstreamInvalid",
    "UpstreamRateLimited",
    "UpstreamRejected",
    "UpstreamTimeout",
    "UpstreamUnreachable",
]


class RelayError(Exception):
    """What can go wrong with a request for an answer. ``str()`` is the text that the client reads.

    ``retry_after`` is in whole seconds, or None where nobody knows how long to wait, or waiting does not help.
    """

    code: str = "internal_error"
    status: int = 500  # where it can still be told by a status
    retryable: bool = True
    message: ClassVar[str] = "Something went wrong on our side."

    def __init__(self, message: str | None = None, *, retry_after: int | None = None) -> None:
        super().__init__(message or self.message)
        self.retry_after = retry_after


# ---- Before admission: a status


class Refused(RelayError):
    """The request is not admitted: nothing was spent, no upstream was called."""

    status = 400


class InvalidRequest(Refused):
    """``param`` is the field at fault, where one is."""

    retryable = False

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class OriginNotAllowed(Refused):
    code, status, retryable = "origin_not_allowed", 403, False
    message = "Pages of this origin may not use this server. Its operator can list the origin in SLUICE_CORS_ORIGINS."


class NotFound(Refused):
    code, status, retryable = "not_found", 404, False
    message = "There is nothing at this address."


class StreamNotFound(Refused):
    code, status, retryable = "stream_not_found", 404, False
    message = "There is no such stream, or no longer: an answer is kept for a short while after its end."


class ModelNotFound(Refused):
    code, status, retryable = "model_not_found", 404, False

    def __init__(self, models: Sequence[str]) -> None:
        super().__init__(f"There is no such model here; what there is: {', '.join(models)}.")


class MethodNotAllowed(Refused):
    code, status, retryable = "method_not_allowed", 405, False

    def __init__(self, method: str, allowed: frozenset[str]) -> None:
        self.allowed = ", ".join(sorted(allowed))
        super().__init__(f"{method} is not possible here; what is: {self.allowed}.")


class RequestTimeout(Refused):
    code, status = "request_timeout", 408
    message = "The request's body did not arrive in time."


class BodyTooLarge(Refused):
    code, status, retryable = "body_too_large", 413, False
    message = "The request's body is larger than this server takes."


class UnsupportedMediaType(Refused):
    code, status, retryable = "unsupported_media_type", 415, False
    message = "The request's body must be application/json in UTF-8, without a Content-Encoding."


class RateLimited(Refused):
    code, status = "rate_limit_exceeded", 429
    message = "Too many requests. Please try again in a moment."


class TokenLimitExceeded(Refused):
    code, status, retryable = "token_limit_exceeded", 429, False
    message = "The tokens that this server generates for one client are used up for the moment."


class TooManyStreams(Refused):
    code, status = "too_many_streams", 429
    message = "Too many of your streams are open at once. Close one, or wait until one ends."


class Overloaded(Refused):
    code, status = "overloaded", 503
    message = "The server has as many streams open as it takes. Try again in a moment."


class ShuttingDown(Refused):
    code, status = "shutting_down", 503
    message = "The server is restarting. Try again in a moment."


# ---- After admission: an event in the stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What an upstream itself said of a failure. Nothing in it tells of our key, our account, or where the upstream is:
    it is for clients that know the upstream's own language (contract, section 5)."""

    status: int
    error: Mapping[str, Any] | None = None  # OpenAI's error object
    headers: Mapping[str, str] = field(default_factory=dict)
    request_id: str | None = None
    context_exceeded: bool = False  # the conversation is too long for that model


class UpstreamFailed(RelayError):
    """The upstream gave no answer, or only a part of one."""

    status = 502

    def __init__(self, message: str | None = None, *, retry_after: int | None = None, said: Said | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.said = said


class UpstreamUnreachable(UpstreamFailed):
    code, message = "upstream_unreachable", "The model could not be reached."


class UpstreamTimeout(UpstreamFailed):
    code, status, message = "upstream_timeout", 504, "The model took too long to answer."


class UpstreamRateLimited(UpstreamFailed):
    code, status = "upstream_rate_limited", 429
    message = "The model is answering too many requests at the moment."


class UpstreamRejected(UpstreamFailed):
    code, retryable, message = "upstream_rejected", False, "The model's endpoint rejected the request."


class UpstreamError(UpstreamFailed):
    code, message = "upstream_error", "The model's endpoint reported an error."


class UpstreamInvalid(UpstreamFailed):
    code, retryable = "upstream_invalid", False
    message = "The model's endpoint did not answer in OpenAI's format."


class UpstreamIncomplete(UpstreamFailed):
    code, message = "upstream_incomplete", "The model's answer was cut before its end."


class StreamTimeout(RelayError):
    code, status, message = "stream_timeout", 504, "The answer took longer than this server allows."


class AnswerTooLarge(RelayError):
    code, status, retryable = "answer_too_large", 502, False
    message = "The answer grew larger than this server allows."


class Interrupted(RelayError):
    code, status, message = "interrupted", 503, "The answer was interrupted before its end."


class InternalError(RelayError):
    """A bug of ours: the log says where, the client only that."""
