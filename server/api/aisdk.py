"""What the AI SDK's chat asks for (contract, section 6): ask, resume, stop. A chat has one answer at a time."""

from __future__ import annotations

import secrets
from typing import Final

from aiohttp import web

from server.api.body import drop_body, read_json_body
from server.api.event_stream import EVENT_STREAM, show
from server.api.keys import CHATS, DESK, EXCHANGE, SETTINGS
from server.api.middleware.rate_limit import show_allowance
from server.api.opening import open_answer, to_request
from server.relay.desk import Stream
from server.relay.life import Outcome
from server.wire.uimessage import UIMessageEncoder, decode_ui_chat

__all__ = ["chat", "resume_chat", "stop_chat"]

_HEAD: Final = EVENT_STREAM.plus({"x-vercel-ai-ui-message-stream": "v1"})


async def chat(request: web.Request) -> web.StreamResponse:
    """``POST /api/chat``: answer the chat's last message."""
    settings = request.app[SETTINGS]
    posted = decode_ui_chat(await read_json_body(request))  # 408, 413, 415, 400
    asked = to_request(posted.conversation(max_chars=settings.max_message_chars), settings)  # 400
    stream = open_answer(request, asked, asked.max_tokens, encoder=_new_encoder)
    _put(request, posted.id, stream)
    return await _show(request, stream)


async def resume_chat(request: web.Request) -> web.StreamResponse:
    """``GET /api/chat/ID/stream``: the chat's answer, from its start; 204 where none is to be had."""
    await drop_body(request)
    stream = request.app[CHATS].get(_name_of_chat(request))
    if stream is None or not _worth_reading(stream):
        return web.Response(status=204)
    show_allowance(request)
    return await _show(request, stream)


async def stop_chat(request: web.Request) -> web.StreamResponse:
    """``POST /api/chat/ID/stop``: nobody wants more of it."""
    await drop_body(request)
    stream = request.app[CHATS].get(_name_of_chat(request))
    if stream is not None:
        stream.stop(Outcome.STOPPED)
    return web.Response(status=204)


async def _show(request: web.Request, stream: Stream) -> web.StreamResponse:
    # A chat's client that aborts has only dropped its connection: it knows how to resume, whatever it accepts.
    return await show(request, request.app[DESK], stream, may_return=True, head=_HEAD)


def _put(request: web.Request, chat_id: str, stream: Stream) -> None:
    """Make ``stream`` the chat's answer. The one before has no reader left who could find it: it is stopped."""
    chats, name = request.app[CHATS], (request[EXCHANGE].client, chat_id)
    before = chats.get(name)
    chats[name] = stream
    if before is not None:
        before.stop(Outcome.STOPPED)


def _name_of_chat(request: web.Request) -> tuple[str, str]:
    """A chat is its client's: ids are the pages' own, and one that is always "chat" must not show a visitor the answers
    of another."""
    return request[EXCHANGE].client, request.match_info["id"]


def _worth_reading(stream: Stream) -> bool:
    """Whether the answer runs, or has ended while its reader's connection was gone: what that has missed is not to be
    lost."""
    if stream.life.running:
        return True
    return not stream.delivered and stream.life.outcome not in (Outcome.STOPPED, Outcome.CLIENT_GONE)


def _new_encoder(stream_id: str) -> UIMessageEncoder:
    # Not the stream's own id: with that it could be read, and stopped, in another face's language.
    return UIMessageEncoder(f"msg-{secrets.token_urlsafe(12)}")
