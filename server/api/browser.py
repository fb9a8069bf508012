"""What a browser asks for: an answer to one question, or to a conversation, as a stream that it can go on with.

``GET /api/stream?q=…`` is made for ``new EventSource(url)`` (contract, section 3); ``/api/streams`` for pages that chat
(section 4). Both give the same events, and both go on behind a ``Last-Event-ID``.
"""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from aiohttp import web

from server.api.body import drop_body, read_json_body
from server.api.event_stream import show, show_events
from server.api.keys import DESK, EXCHANGE, SETTINGS
from server.api.middleware.rate_limit import show_allowance
from server.api.opening import open_answer, to_request
from server.errors import Interrupted, InvalidRequest, StreamNotFound
from server.wire.chat import decode_posted_chat
from server.wire.events import EventEncoder, EventId, read_event_id

__all__ = ["ask", "create_stream", "read_last_event_id", "read_question", "stop_stream", "view_stream"]


async def ask(request: web.Request) -> web.StreamResponse:
    """``GET /api/stream?q=…``: open an answer and show it, or go on with one."""
    settings = request.app[SETTINGS]
    seen = read_last_event_id(request)  # 400
    if seen is not None:
        await drop_body(request)
        return await _go_on(request, seen)
    question = read_question(request.rel_url.raw_query_string, settings.max_query_chars)  # 400
    await drop_body(request)  # 408, 413
    asked = to_request((("user", question),), settings)
    return await show(request, request.app[DESK], open_answer(request, asked, asked.max_tokens))


async def create_stream(request: web.Request) -> web.StreamResponse:
    """``POST /api/streams``: open an answer, which runs from now on, and say where it can be viewed."""
    settings = request.app[SETTINGS]
    body = await read_json_body(request)  # 408, 413, 415
    chat = decode_posted_chat(body, max_chars=settings.max_message_chars)  # 400
    if chat.model not in (None, *settings.models):
        offered = ", ".join(settings.models)
        raise InvalidRequest("invalid_request", f"The field model names none that is offered: {offered}.")
    messages = tuple((message.role, message.content) for message in chat.messages)
    asked = to_request(messages, settings, chat.max_tokens, chat.temperature, chat.model)
    stream = open_answer(request, asked, asked.max_tokens)
    url = f"/api/streams/{stream.id}"
    return web.json_response({"id": stream.id, "url": url}, status=201, headers={"Location": url})


async def view_stream(request: web.Request) -> web.StreamResponse:
    """``GET /api/streams/SID``: its events from the start, or behind the ``Last-Event-ID``."""
    stream_id = request.match_info["id"]
    seen = read_last_event_id(request)  # 400
    await drop_body(request)
    if seen is not None:
        if seen.stream_id != stream_id:
            raise _invalid_last_event_id("It is of another stream.")
        return await _go_on(request, seen)
    stream = request.app[DESK].find(stream_id)
    if stream is None:
        raise StreamNotFound
    show_allowance(request)
    return await show(request, request.app[DESK], stream)


async def stop_stream(request: web.Request) -> web.StreamResponse:
    """``DELETE /api/streams/SID``: nobody wants more of it."""
    await drop_body(request)
    request.app[DESK].stop(request.match_info["id"], request[EXCHANGE].client)  # 404
    return web.Response(status=204)


async def _go_on(request: web.Request, seen: EventId) -> web.StreamResponse:
    """The rest of an answer. Whatever has become of it, none is generated anew and nothing is spent."""
    desk = request.app[DESK]
    show_allowance(request)
    stream = desk.find(seen.stream_id)
    if stream is None:
        # In-band, for a script cannot read the status of an EventSource.
        lost = b"".join(EventEncoder(seen.stream_id).failed(seen.number + 1, Interrupted()))
        return await show_events(request, lost)
    if seen.number >= stream.log.next_number - 1 and stream.log.ended:
        return web.Response(status=204)  # which tells an EventSource not to come back
    if seen.number >= stream.log.next_number:
        raise _invalid_last_event_id("The stream has not come so far.")
    return await show(request, desk, stream, after=seen.number)


def read_last_event_id(request: web.Request) -> EventId | None:
    """The last event that the client has seen: from the header, which an EventSource sends by itself, else from
    ``?last_event_id=``, which a page can put into the URL; None where there is neither. Raises InvalidRequest."""
    given = request.headers.getall("Last-Event-ID", None)
    # Looked for before the query is parsed, for the sake of the many requests that have none.
    if not given and "last_event_id" in request.rel_url.raw_query_string:
        given = request.query.getall("last_event_id", None)
    if given is None:
        return None
    seen = read_event_id(given[0])
    if seen is None or len(given) > 1:
        raise _invalid_last_event_id("It is SID.N, as the events' ids are.")
    return seen


def _invalid_last_event_id(reason: str) -> InvalidRequest:
    return InvalidRequest("invalid_last_event_id", f"The Last-Event-ID is not one to go on from. {reason}")


def read_question(raw_query: str, max_chars: int) -> str:
    """The one ``q`` of a raw query string, trimmed. Raises InvalidRequest.

    Pairs are read as browsers write them (WHATWG URL §5.1), except that what is no UTF-8 is refused, not replaced: an
    answer to a garbled question costs as much as one to the right question.
    """
    values = []
    for pair in raw_query.split("&"):
        name, _, value = pair.partition("=")
        if name == "q" or _percent_decode(name) == b"q":
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
