"""The connections of a listener: rows B13, B15 (those who say nothing), B21 (churn) and L8 (too many)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from server.connections import Connections
from server.main import open_server
from server.settings import read_settings
from server.sockets import public_listener
from tests.upstream_sim import ScriptedUpstream

HEAD: bytes = b"GET /favicon.ico HTTP/1.1\r\nHost: x\r\n\r\n"
PATIENCE = 15.0  # s

Listen = Callable[..., Awaitable[int]]


@pytest.fixture
async def listen() -> AsyncIterator[Listen]:
    """``await listen(most=…, head_timeout=…)`` opens a bare server and returns its port; it answers with its number of
    connections."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*, most: int = 100, head_timeout: float = 30.0) -> int:
            connections = await stack.enter_async_context(Connections(most=most, head_timeout=head_timeout))

            async def answer(request: web.BaseRequest) -> web.Response:
                connections.request_begun(request.protocol)
                try:
                    return web.Response(text=str(len(server.connections)))
                finally:
                    connections.request_answered()

            server = web.Server(answer, keepalive_timeout=60)
            stack.push_async_callback(server.shutdown, 1.0)
            listening = await asyncio.get_running_loop().create_server(
                connections.factory(server), "127.0.0.1", 0, backlog=100
            )
            stack.callback(listening.close)
            port: int = listening.sockets[0].getsockname()[1]
            return port

        yield start


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, request: bytes = HEAD) -> bytes:
        """The body of an answer, on a connection that stays open."""
        self.writer.write(request)
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return await self.reader.readexactly(length)

    async def closed(self) -> float:
        """Wait until the server has closed the connection without a word; returns after how many seconds."""
        began_at = asyncio.get_running_loop().time()
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionResetError):
                assert await self.reader.read() == b""
        return asyncio.get_running_loop().time() - began_at


Connect = Callable[[int], Awaitable[Client]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    async with contextlib.AsyncExitStack() as stack:

        async def open_connection(port: int) -> Client:
            client = Client(*await asyncio.open_connection("127.0.0.1", port))

            async def close() -> None:
                client.writer.close()
                with contextlib.suppress(OSError):
                    await client.writer.wait_closed()

            stack.push_async_callback(close)
            return client

        yield open_connection


# ---- Those who say nothing


async def test_a_connection_that_says_nothing_is_closed(listen: Listen, connect: Connect) -> None:
    """Row B15: after the head timeout, to within the sweep of a second."""
    client = await connect(await listen(head_timeout=1.0))
    assert 0.9 < await client.closed() < 5


async def test_a_head_that_comes_a_byte_at_a_time_is_cut_off(listen: Listen, connect: Connect) -> None:
    """Row B13, the slow loris: progress of a byte is no progress."""
    client = await connect(await listen(head_timeout=1.0))

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            for byte in HEAD * 10:
                client.writer.write(bytes([byte]).replace(b"\n", b"x"))
                await client.writer.drain()
                await asyncio.sleep(0.1)

    dripping = asyncio.create_task(drip())
    assert 0.9 < await client.closed() < 5
    dripping.cancel()
    await asyncio.wait({dripping})


async def test_whoever_has_spoken_lives(listen: Listen, connect: Connect) -> None:
    """A proxy's kept connection is silent for a minute between two requests: aiohttp's keep-alive is its limit."""
    client = await connect(await listen(head_timeout=0.5))
    assert await client.ask() == b"1"
    await asyncio.sleep(2.5)
    assert await client.ask() == b"1"


async def test_only_the_silent_are_closed(listen: Listen, connect: Connect) -> None:
    port = await listen(head_timeout=1.0)
    speaker = await connect(port)
    await speaker.ask()
    silent = [await connect(port) for _ in range(10)]
    for client in silent:
        await client.closed()
    assert await speaker.ask() == b"1"


async def test_those_who_left_without_a_word_are_forgotten() -> None:
    """Row B21: a flood of connects and resets must not be kept until its head timeout."""

    async def answer(request: web.BaseRequest) -> web.Response:
        raise AssertionError("nobody asks")

    async with Connections(most=1000) as connections:
        server = web.Server(answer)
        listening = await asyncio.get_running_loop().create_server(connections.factory(server), "127.0.0.1", 0)
        for _ in range(100):
            with socket.create_connection(listening.sockets[0].getsockname()):
                await asyncio.sleep(0)
        for _ in range(100):
            if not connections._silent:
                break
            await asyncio.sleep(0.1)
        assert len(connections._silent) == 0
        listening.close()
        await server.shutdown(1.0)


async def test_the_real_server_counts_a_request_as_speaking(upstream: ScriptedUpstream, connect: Connect) -> None:
    """The wiring: server/api/middleware/request_id.py says for every request that its connection spoke."""
    settings = read_settings({"LLM_BASE_URL": upstream.base_url, "SLUICE_PORT": "0"})
    with public_listener(settings, {}) as listener:
        port = listener.getsockname()[1]
        async with open_server(settings, listener):
            client = await connect(port)
            client.writer.write(b"GET /nothing-here HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await client.reader.readline()).startswith(b"HTTP/1.1 404")


# ---- Those who are too many


async def test_beyond_the_cap_a_connection_is_closed_at_once(listen: Listen, connect: Connect) -> None:
    """Row L8: a process out of descriptors serves nobody."""
    port = await listen(most=3)
    inside = [await connect(port) for _ in range(3)]
    await inside[0].ask()
    surplus = await connect(port)
    assert await surplus.closed() < 5
    assert [await client.ask() for client in inside] == [b"3"] * 3


async def test_a_place_is_free_again_when_its_connection_closes(listen: Listen, connect: Connect) -> None:
    port = await listen(most=1)
    first = await connect(port)
    await first.ask()
    await (await connect(port)).closed()
    first.writer.close()
    await first.writer.wait_closed()
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
                assert await (await connect(port)).ask() == b"1"
                break


async def test_the_cap_holds_in_a_burst(listen: Listen) -> None:
    """asyncio makes the protocols of all connections that wait before it connects one of them."""
    port = await listen(most=5)
    with contextlib.ExitStack() as stack:
        # Without an await between: all of them are in the queue when the server looks.
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(50)]
        loop = asyncio.get_running_loop()
        answers = await asyncio.gather(*(_ask(loop, client) for client in clients))
    assert answers.count(b"HTTP/1.1 200 OK") == 5
    assert answers.count(b"") == 45


async def _ask(loop: asyncio.AbstractEventLoop, client: socket.socket) -> bytes:
    client.setblocking(False)
    try:
        async with asyncio.timeout(PATIENCE):
            await loop.sock_sendall(client, HEAD)
            return (await loop.sock_recv(client, 1000)).partition(b"\r\n")[0]
    except ConnectionError:
        return b""
