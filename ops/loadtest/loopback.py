"""The endpoint of the self-test, a process of its own: as little as a stream of tokens can cost, in both formats.

``python -m ops.loadtest.loopback`` prints its port. The question holds ``tokens=N`` and ``rate=R`` (a second; 0 = all
in one write); a GET is answered as a Sluice would, a POST as OpenAI's.
"""

from __future__ import annotations

import asyncio
import re
from typing import cast

import uvloop

__all__ = ["Loopback"]

_TOKENS, _RATE = re.compile(rb"tokens(?:=|%3D)(\d+)"), re.compile(rb"rate(?:=|%3D)(\d+)")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_STREAM_ID = b"loopbackloopbackloopback"
_CHUNK = (
    b'data: {"id":"chatcmpl-loopback","object":"chat.completion.chunk","created":1700000000,"model":"loopback",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
)


class Loopback(asyncio.Protocol):
    """One connection: requests one after the other, each answered at its pace."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._received = b""
        self._sluice = False
        self._tokens = self._sent = 0
        self._rate = 0
        self._began_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not separator or len(body) < (int(length[1]) if length else 0):
            return
        tokens, rate = _TOKENS.search(self._received), _RATE.search(self._received)
        self._received = b""
        self._sluice = head.startswith(b"GET ")
        self._tokens, self._rate = int(tokens[1]) if tokens else 1, int(rate[1]) if rate else 0
        self._sent = 0
        self._began_s = asyncio.get_running_loop().time()
        self._transport.write(_HEAD + (_framed(self._event(0, b'{"id":"x"}', b"start")) if self._sluice else b""))
        self._go_on()

    def _go_on(self) -> None:
        """Write the tokens that are due, each in a chunk of its own; then wait for the next, or end."""
        if self._transport.is_closing():
            return
        loop = asyncio.get_running_loop()
        passed_s = loop.time() - self._began_s
        due = min(self._tokens, int(passed_s * self._rate) + 1) if self._rate else self._tokens
        self._transport.write(b"".join(_framed(self._token(number)) for number in range(self._sent, due)))
        self._sent = due
        if due < self._tokens:
            loop.call_at(self._began_s + due / self._rate, self._go_on)
        else:
            done = self._event(due + 1, b"[DONE]") if self._sluice else b"data: [DONE]\n\n"
            self._transport.write(_framed(done) + b"0\r\n\r\n")

    def _token(self, number: int) -> bytes:
        return self._event(number + 1, b'{"token":" token"}') if self._sluice else _CHUNK

    @staticmethod
    def _event(number: int, data: bytes, event_type: bytes = b"message") -> bytes:
        return b"event: %b\nid: %b.%d\ndata: %b\n\n" % (event_type, _STREAM_ID, number, data)


def _framed(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(Loopback, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
