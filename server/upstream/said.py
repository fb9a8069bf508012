"""What an endpoint says of a failure, read within bounds and made fit to be passed on."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import aiohttp
from yarl import URL

from server.errors import Said
from server.upstream.body import BREAKS
from server.upstream.endpoint import Endpoint
from server.wire.chunks import MalformedChunk, decode_json

__all__ = ["hear", "is_json", "media_type_of", "overhear", "read_json", "read_request_id", "said_in_stream"]

_MAX_BODY: Final = 64 << 10  # bytes of a body that are read to see whether it is an error object
_BODY_TIMEOUT: Final = 2.0  # s, for the same
_MAX_DEPTH: Final = 8  # of an error object; deeper, it is no such thing

# Headers that tell a client what to do next.
_PASSED_ON: Final = ("Retry-After", "Retry-After-Ms", "X-Should-Retry")

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
_HEADER_VALUE: Final = re.compile(r"[ -~]{1,128}", re.ASCII)

# What looks like a key (in full, or masked as OpenAI does) or an account. Words that only begin like one, such as the
# parameter "user_location" or "key-value pairs", hold neither a capital nor a digit nor a star.
_OURS: Final = (
    r"\b(?:sk|pk|rk|gsk|xai)[-_][\w*.\-]{3,}|\bkey-(?=[a-z]{0,64}[A-Z\d*])[\w*.\-]{3,}"
    r"|\b(?:org|proj)[-_][A-Za-z\d]{6,}|\b(?:acct|team|user)[-_](?=[a-z]{0,64}[A-Z\d])[A-Za-z\d]{6,}"
    r"|\bBearer\s+\S+"
)
_REDACTED: Final = "…"

_CONTEXT_EXCEEDED: Final = "context_length_exceeded"


class Headed(Protocol):
    """A response's head, by whichever way it came."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...


async def hear(response: aiohttp.ClientResponse, endpoint: Endpoint) -> Said:
    """What a response that is no answer says, its body included."""
    return _make_fit(await read_json(response), response.status, response.headers, endpoint)


def overhear(response: aiohttp.ClientResponse, endpoint: Endpoint) -> Said:
    """The same of its head alone."""
    return _make_fit(None, response.status, response.headers, endpoint)


def said_in_stream(error: Any, response: Headed, endpoint: Endpoint) -> Said:
    """What an error object inside a stream says."""
    return _make_fit({"error": error}, response.status, response.headers, endpoint)


def read_request_id(headers: Mapping[str, str]) -> str | None:
    """What the endpoint calls the request, if that may stand in a header of ours."""
    request_id = headers.get("X-Request-ID", "")
    return request_id if _REQUEST_ID.fullmatch(request_id) else None


def is_json(media_type: str) -> bool:
    return media_type == "application/json" or media_type.endswith("+json")


def media_type_of(response: aiohttp.ClientResponse) -> str:
    # Not aiohttp's content_type: that asks Python's e-mail parser, which takes seconds over some headers.
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


async def read_json(response: aiohttp.ClientResponse) -> Any:
    """The JSON value of a short body that comes soon; None of any other."""
    if not is_json(media_type_of(response)):
        return None
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            while data := await response.content.readany():
                body += data
                if len(body) > _MAX_BODY:
                    return None
        return decode_json(bytes(body))
    except (TimeoutError, MalformedChunk, *BREAKS):
        return None


def _make_fit(value: Any, status: int, headers: Mapping[str, str], endpoint: Endpoint) -> Said:
    error = _error_object(value)
    passed_on = {
        name: headers[name] for name in _PASSED_ON if name in headers and _HEADER_VALUE.fullmatch(headers[name])
    }
    return Said(
        status=status,
        error=None if error is None else _without_ours(error, _hider(endpoint)),
        headers=passed_on,
        request_id=read_request_id(headers),
        context_exceeded=error is not None and _CONTEXT_EXCEEDED in (error.get("code"), error.get("type")),
    )


def _error_object(value: Any) -> dict[str, Any] | None:
    """The error in any of the shapes that endpoints give it, in OpenAI's."""
    if not isinstance(value, dict):
        return None
    error = value.get("error")
    if isinstance(error, str) and error:  # Ollama
        error = {"message": error}
    elif not isinstance(error, dict) and isinstance(value.get("message"), str):  # vLLM, once
        error = {name: value.get(name) for name in ("message", "type", "param", "code")}
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None
    return {"type": None, "param": None, "code": None} | error


def _without_ours(value: Any, hide: Callable[[str], str], depth: int = 0) -> Any:
    """``value`` with nothing in its texts that tells of our key, our account, or where the endpoint is."""
    if isinstance(value, str):
        return hide(value)
    if depth >= _MAX_DEPTH:
        return None
    if isinstance(value, list):
        return [_without_ours(item, hide, depth + 1) for item in value]
    if isinstance(value, dict):
        return {
            hide(name): _without_ours(item, hide, depth + 1) for name, item in value.items() if isinstance(name, str)
        }
    return value


def _hider(endpoint: Endpoint) -> Callable[[str], str]:
    """Takes what is ours out of a text."""
    key = endpoint.api_key
    telling = re.compile(f"{_where(URL(endpoint.base_url))}|{_OURS}", re.ASCII)

    def hide(text: str) -> str:
        return telling.sub(_REDACTED, text.replace(key, _REDACTED) if key else text)

    return hide


def _where(url: URL) -> str:
    """A pattern for what tells where an endpoint is: a URL of its host's, or the host without a scheme; one that is a
    mere word (a container's name) only with its port."""
    host = re.escape(url.host_subcomponent or "")
    ends = r"(?!\.?[\w-])"  # a full stop may follow, but not the rest of a longer name
    port = r"(?::\d+)?" if "." in host or ":" in host else rf":{url.port}"
    rest = r"[^\s\"'<>]*"
    return rf"(?i:https?://(?:[^\s/\"'<>]*@)?{host}{ends}{rest}|(?<![\w.-]){host}{port}{ends}(?:/{rest})?)"
