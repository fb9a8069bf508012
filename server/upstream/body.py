"""An answer's body from its first byte to its end, through aiohttp's public stream: the way that always works."""

from __future__ import annotations

import asyncio
from typing import Final

import aiohttp
from aiohttp.client_proto import ResponseHandler

from server.upstream.attempt import failed_body
from server.upstream.reader import AnswerReader

__all__ = ["AFTER_DONE_TIMEOUT", "BREAKS", "MAX_AFTER_DONE", "read_body", "read_on"]

# What reading a body can raise. RuntimeError is aiohttp's for reading on after the connection has closed.
BREAKS: Final = (aiohttp.ClientError, OSError, RuntimeError)

_FED_AT_ONCE: Final = 32 << 10  # bytes parsed before other streams get their turn: about 2 ms of work
AFTER_DONE_TIMEOUT: Final = 0.1  # s for the body's end to follow [DONE]; with it the connection can be used again
MAX_AFTER_DONE: Final = 64 << 10  # bytes that may follow [DONE], likewise


async def read_body(response: aiohttp.ClientResponse, reader: AnswerReader) -> None:
    """Read the answer to its end. Raises AttemptFailed where it is not complete, and what its sink raises."""
    protocol = None if response.connection is None else response.connection.protocol
    await read_on(protocol, response.content, reader)


async def read_on(protocol: ResponseHandler | None, content: aiohttp.StreamReader, reader: AnswerReader) -> None:
    """As :func:`read_body`, for a ``reader`` that may have been given the beginning; ``protocol`` brings the rest."""
    _end_body_with_connection(protocol, content)
    ended = False
    while not (ended or reader.over):
        try:
            data = await content.readany()
        except BREAKS:
            ended = True
            await _feed_arrived(content, reader)
        else:
            ended = not data
            await _feed(reader, data)
    await _finish_body(content, reader)


async def _feed_arrived(content: aiohttp.StreamReader, reader: AnswerReader) -> None:
    """Give the reader what has arrived and was not read, also before the connection broke.

    Tokens that came in one segment with the reset, or with a close that cuts the body, are in the stream's buffer, but
    each of its public read calls raises the exception first. The private call below gives them out; it is pinned by
    the aiohttp version and by tests/upstream/test_client.py.
    """
    while data := content._read_nowait(-1):
        await _feed(reader, data)


async def _finish_body(content: aiohttp.StreamReader, reader: AnswerReader) -> None:
    """Say how the answer ended, once its body has or ``[DONE]`` has come. Raises AttemptFailed if it is incomplete."""
    if reader.over:
        if not content.is_eof():
            await _read_past_done(content)
    elif reader.finished:
        reader.end()
    else:
        broken = content.exception()
        raise failed_body(broken) from broken


async def _feed(reader: AnswerReader, data: bytes) -> None:
    for start in range(0, len(data), _FED_AT_ONCE):
        if start:
            await asyncio.sleep(0)
        if not reader.over:
            reader.feed(data[start : start + _FED_AT_ONCE])


async def _read_past_done(content: aiohttp.StreamReader) -> None:
    """Read the little that may follow, so that the connection can be used again; else it is closed."""
    try:
        async with asyncio.timeout(AFTER_DONE_TIMEOUT):
            left = MAX_AFTER_DONE
            while left > 0 and (data := await content.readany()):
                left -= len(data)
    except (TimeoutError, *BREAKS):
        pass


def _end_body_with_connection(protocol: ResponseHandler | None, content: aiohttp.StreamReader) -> None:
    """Make the body end no later than its connection.

    Where the body's framing is wrong (a chunk size that is no number), aiohttp closes the connection and tells nobody
    who reads the body: the reader would wait until a time limit ends the answer.
    """
    if protocol is None:  # the whole response has come already; an idle protocol is false, too, but not None
        return

    def end(_: object = None) -> None:
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection closed inside the body"))

    closed = protocol.closed
    if closed is None:
        end()
        return

    def forget() -> None:
        closed.remove_done_callback(end)

    closed.add_done_callback(end)
    content.on_eof(forget)  # the connection may live on, for other requests
    closed.remove_done_callback(_take_note)  # once a connection, however often it is used
    closed.add_done_callback(_take_note)


def _take_note(closed: asyncio.Future[None]) -> None:
    """Look at how a connection ended: asyncio logs an error for each exception that nobody looked at."""
    if not closed.cancelled():
        closed.exception()
