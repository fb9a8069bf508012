"""What OpenAI's clients ask for (contract, section 5): completions that pass through, and the list of models."""

from __future__ import annotations

import asyncio

from aiohttp import web

from server.api.body import drop_body, read_json_body
from server.api.event_stream import ResponseConnection, show
from server.api.keys import DESK, EXCHANGE, SETTINGS
from server.api.middleware.rate_limit import show_allowance
from server.api.opening import open_answer
from server.errors import ModelNotFound
from server.relay.desk import Stream
from server.wire.completion import CompletionEncoder, decode_completion_request, describe_model, encode_models

__all__ = ["complete", "list_models", "show_model"]


async def complete(request: web.Request) -> web.StreamResponse:
    """``POST /v1/chat/completions``, streamed or not.

    Nothing is sent before somebody answers, so that a failure has the status that it had upstream.
    """
    settings = request.app[SETTINGS]
    body = await read_json_body(request)  # 408, 413, 415
    asked = decode_completion_request(body, max_tokens=settings.max_tokens)  # 400
    if asked.model not in (None, *settings.models):
        raise ModelNotFound(settings.models)
    encoder = CompletionEncoder(streamed=asked.streamed)
    stream = open_answer(request, asked, asked.max_tokens, encoder=lambda _: encoder, kept=False)

    async def ready() -> None:
        await _first_word(stream, whole=not asked.streamed)
        if encoder.error is not None:
            raise encoder.error
        if encoder.answerer is not None:
            request[EXCHANGE].upstream_request_id = encoder.answerer.request_id

    if asked.streamed:
        return await show(request, request.app[DESK], stream, may_return=False, ready=ready)
    response = web.Response(content_type="application/json")
    with request.app[DESK].viewing(stream, ResponseConnection(request, response)):
        await ready()
        response.body = stream.log.read(0, stream.log.size)
    return response


async def _first_word(stream: Stream, *, whole: bool) -> None:
    """Wait until something has been said, or the ``whole`` of it, or it has come to nothing."""
    turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def listen(_batch: bytes, _size: int) -> None:
        if not turn.done() and (stream.log.ended or not whole):
            turn.set_result(None)

    if stream.log.ended or (stream.log.size and not whole):
        return
    stream.log.subscribe(listen)
    try:
        await turn
    finally:
        stream.log.unsubscribe(listen)


async def list_models(request: web.Request) -> web.StreamResponse:
    """``GET /v1/models``: those that can be asked for."""
    await drop_body(request)
    show_allowance(request)
    return web.Response(body=encode_models(request.app[SETTINGS].models), content_type="application/json")


async def show_model(request: web.Request) -> web.StreamResponse:
    """``GET /v1/models/MODEL``."""
    await drop_body(request)
    show_allowance(request)
    models = request.app[SETTINGS].models
    if request.match_info["model"] not in models:
        raise ModelNotFound(models)
    return web.json_response(describe_model(request.match_info["model"]))
