"""The browser's stream: ``GET /api/stream?q=…``, one question, one answer (contract, section 3)."""

from __future__ import annotations

import asyncio
from typing import Final
from urllib.parse import unquote_to_bytes

from aiohttp import web

from server.api.event_stream import show
from server.api.keys import CLIENT, DESK, SETTINGS
from server.api.middleware.rate_limit import spend_token
from server.errors import BodyTooLarge, InvalidRequest, RequestTimeout
from server.settings import Settings
from server.wire.chat import ChatRequest

__all__ = ["ask", "read_question"]

_BODY_TIMEOUT: Final = 10.0  # s for a request's body; aiohttp has no limit of its own


async def ask(request: web.Request) -> web.StreamResponse:
    """Admit or refuse, open the answer, and show it."""
    settings = request.app[SETTINGS]
    desk = request.app[DESK]
    question = read_question(request.rel_url.raw_query_string, settings.max_query_chars)  # 400
    await _drop_body(request)  # 408, 413
    client = request[CLIENT]
    desk.admit(client)  # 429 too_many_streams, 503
    spend_token(request)  # 429 rate_limit_exceeded
    return await show(request, desk, desk.open(client, _chat_request(question, settings)))


def read_question(raw_query: str, max_chars: int) -> str:
    """The one ``q`` of a raw query string, trimmed. Raises InvalidRequest.

    Pairs are read as browsers write them (WHATWG URL §5.1), except that what is no UTF-8 is refused, not replaced: an
    answer to a garbled question costs as much as one to the right question.
    """
    values = []
    for pair in raw_query.split("&"):
        name, _, value = pair.partition("=")
        if _percent_decode(name) == b"q":
            values.append(_percent_decode(value))
    if not values:
        raise InvalidRequest("missing_query", "The question is missing: ask with ?q=TEXT.")
    if len(values) > 1:
        raise InvalidRequest("invalid_query", "The parameter q is given more than once; give it once.")
    try:
        question = values[0].decode("utf-8").strip()
    except UnicodeDecodeError:
        raise InvalidRequest("invalid_query", "The parameter q is not UTF-8, percent-encoded.") from None
    if "\0" in question:
        raise InvalidRequest("invalid_query", "The parameter q holds a NUL character.")
    if not question:
        raise InvalidRequest("missing_query", "The question is empty: ask with ?q=TEXT.")
    if len(question) > max_chars:
        raise InvalidRequest(
            "query_too_long", f"The question has {len(question)} characters; it may have at most {max_chars}."
        )
    return question


def _percent_decode(text: str) -> bytes:
    try:
        return unquote_to_bytes(text.replace("+", " "))
    except UnicodeEncodeError:  # half a surrogate pair, as the parser shows a raw byte that is no UTF-8
        return b"\xff"


async def _drop_body(request: web.Request) -> None:
    """Read the body that a GET should not have: while it is unread, a client that leaves is not noticed."""
    if not request.body_exists:
        return
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            await request.read()
    except TimeoutError:
        raise RequestTimeout from None
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLarge from None
    except web.RequestPayloadError:
        raise InvalidRequest("invalid_request", "The request's body is not what its headers announce.") from None


def _chat_request(question: str, settings: Settings) -> ChatRequest:
    system = (("system", settings.system_prompt),) if settings.system_prompt else ()
    return ChatRequest(
        messages=(*system, ("user", question)),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
    )
