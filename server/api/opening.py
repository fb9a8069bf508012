"""How every face opens an answer: admission, what it costs, and what is asked in our own words."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from server.api.keys import DESK, EXCHANGE
from server.api.middleware.rate_limit import spend
from server.relay.answer import AnswerEncoder, AnswerRequest
from server.relay.desk import Stream
from server.settings import Settings
from server.wire.chat import ChatRequest, Content
from server.wire.events import EventEncoder

__all__ = ["open_answer", "to_request"]


def open_answer(
    request: web.Request,
    asked: AnswerRequest,
    max_tokens: int,
    *,
    encoder: Callable[[str], AnswerEncoder] = EventEncoder,
    kept: bool = True,
) -> Stream:
    """Admit the request and start its answer, which may cost ``max_tokens`` LLM tokens. Nothing in here waits: who was
    admitted has the place."""
    desk = request.app[DESK]
    client = request[EXCHANGE].client
    desk.admit(client)  # 429 too_many_streams, 503
    reservation = spend(request, max_tokens)  # 429 rate_limit_exceeded, token_limit_exceeded
    return desk.open(client, asked, reservation, encoder=encoder, kept=kept)


def to_request(
    messages: tuple[tuple[str, Content], ...],
    settings: Settings,
    max_tokens: int | None = None,
    temperature: float | None = None,
    model: str | None = None,
) -> ChatRequest:
    """What is asked of the upstream: the server's own instructions first, and never more tokens than it allows."""
    system = (("system", settings.system_prompt),) if settings.system_prompt else ()
    return ChatRequest(
        messages=(*system, *messages),
        max_tokens=min(max_tokens or settings.max_tokens, settings.max_tokens),
        temperature=settings.temperature if temperature is None else temperature,
        model=model,
    )
