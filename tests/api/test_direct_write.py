"""The short way of an event to its viewer: framed as aiohttp does, and aiohttp's where only that can wait."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import StreamWriter
from hypothesis import example, given
from hypothesis import strategies as st

from server.api import direct_write
from server.api.direct_write import DirectWriter
from tests.api.conftest import Connect
from tests.api.raw_client import request
from tests.conftest import Serve


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data


class Open:
    """A connection on which a chunked response has begun, and both ways to write to it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.wire = Wire()
        self.protocol = BaseProtocol(loop)
        self.protocol.connection_made(self.wire)
        self.usual = StreamWriter(self.protocol, loop)
        self.usual.enable_chunking()
        self.direct = DirectWriter(self.protocol, self.usual)


@pytest.fixture
async def connection() -> Open:
    return Open(asyncio.get_running_loop())


# ---- What it takes


@given(st.one_of(st.binary(min_size=1, max_size=300), st.sampled_from([b"x" * size for size in (15, 16, 255, 4096)])))
@example(b"x" * (16 << 10))
def test_what_it_takes_is_framed_as_aiohttp_does(data: bytes) -> None:
    """RFC 9112 §7.1."""
    with asyncio.Runner() as runner:
        short, usual = Open(runner.get_loop()), Open(runner.get_loop())
        assert short.direct.write_now(data)
        runner.run(usual.usual.write(data))
    assert short.wire.written == usual.wire.written == b"%x\r\n%b\r\n" % (len(data), data)


async def test_both_ways_may_take_turns(connection: Open) -> None:
    """A client that lags for a while is aiohttp's, and ours again afterwards."""
    assert connection.direct.write_now(b"one")
    await connection.usual.write(b"two")
    assert connection.direct.write_now(b"three")
    await connection.usual.write_eof(b"last")
    assert connection.wire.written == b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n4\r\nlast\r\n0\r\n\r\n"


@pytest.mark.parametrize("size", [0, (16 << 10) + 1, 1 << 20])
async def test_nothing_and_too_much_are_refused(connection: Open, size: int) -> None:
    """A chunk of no bytes would be the last one."""
    assert not connection.direct.write_now(b"x" * size)
    assert connection.wire.written == b""


async def test_a_client_that_lags_is_sent_nothing(connection: Open) -> None:
    connection.protocol.pause_writing()
    assert not connection.direct.write_now(b"event")
    assert connection.wire.written == b""
    connection.protocol.resume_writing()
    assert connection.direct.write_now(b"event")


async def test_a_client_that_has_gone_is_sent_nothing(connection: Open) -> None:
    connection.wire.closing = True
    assert not connection.direct.write_now(b"event")
    assert connection.wire.written == b""


# ---- The head


async def test_the_head_goes_out_with_the_first_event(connection: Open) -> None:
    """Once, whoever writes first."""
    first, second = connection.direct, DirectWriter(connection.protocol, connection.usual)
    first.begin(b"H1:")
    second.begin(b"H2:")
    assert first.write_now(b"one")
    assert first.write_now(b"two")
    assert connection.wire.written == b"H1:3\r\none\r\n3\r\ntwo\r\n"
    second.send_head()
    second.send_head()
    await second.write(b"x" * 20_000)
    assert connection.wire.written.count(b"H2:4e20\r\n") == 1


@pytest.mark.parametrize("last", [b"", b"end", b"x" * 20_000])
async def test_head_and_end_may_be_all_there_is(connection: Open, last: bytes) -> None:
    direct = connection.direct
    direct.begin(b"HEAD")
    await direct.finish(last)
    await direct.finish(b"again")
    framed = b"%x\r\n%b\r\n" % (len(last), last) if last else b""
    assert connection.wire.written == b"HEAD" + framed + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("listed", "origin"),
    [
        ("https://listed.example", None),
        ("https://listed.example", "https://listed.example"),
        ("*", "https://\udcff\xe9.example"),
    ],
)
async def test_a_head_is_what_aiohttp_would_send(
    serve: Serve, connect: Connect, listed: str, origin: str | None
) -> None:
    """Every header, in its order and its spelling."""
    heads = []
    for fast_path in ("auto", "off"):
        server = await serve(SLUICE_FAST_PATH=fast_path, SLUICE_CORS_ORIGINS=listed)
        client = await connect(server)
        await client.send(request("/api/stream?q=hi", "X-Request-ID: same", *([f"Origin: {origin}"] if origin else [])))
        head = (await client.read_until(b"\r\n\r\n")).partition(b"\r\n\r\n")[0]
        heads.append(re.sub(rb"Date: [^\r]* GMT\r\n", b"Date: now GMT\r\n", head))
    assert heads[0] == heads[1]
    assert (b"Access-Control-Allow-Origin" in heads[0]) == (origin is not None)


# ---- The wait


async def test_a_write_waits_only_while_the_client_lags(connection: Open) -> None:
    await asyncio.wait_for(connection.direct.write(b"one"), 5)
    connection.protocol.pause_writing()
    writing = asyncio.create_task(connection.direct.write(b"two"))
    await asyncio.sleep(0.01)
    assert not writing.done()
    connection.protocol.resume_writing()
    await asyncio.wait_for(writing, 5)
    assert connection.wire.written == b"3\r\none\r\n3\r\ntwo\r\n"


async def test_a_wait_ends_with_the_connection(connection: Open) -> None:
    connection.protocol.pause_writing()
    writing = asyncio.create_task(connection.direct.write(b"one"))
    await asyncio.sleep(0.01)
    connection.protocol.connection_lost(ConnectionResetError())
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(writing, 5)


@pytest.mark.parametrize("data", [b"", b"end", b"x" * 20_000])
async def test_no_end_is_written_to_a_client_that_has_gone(connection: Open, data: bytes) -> None:
    connection.wire.closing = True
    with pytest.raises(ConnectionError):
        await connection.direct.finish(data)
    assert connection.wire.written == b""
    assert not connection.direct.ended


# ---- Whether it works


async def test_it_works_with_the_pinned_aiohttp() -> None:
    assert await direct_write.works()


class OtherFraming(StreamWriter):
    async def write(self, chunk: Any, **options: Any) -> None:
        await super().write(bytes(chunk).upper(), **options)


class NeverPaused(BaseProtocol):
    @property
    def writing_paused(self) -> bool:
        return False


class Unknowing(BaseProtocol):
    @property
    def writing_paused(self) -> bool:
        raise AttributeError


class NeverEnding(StreamWriter):
    async def write(self, chunk: Any, **options: Any) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("StreamWriter", OtherFraming),
        ("StreamWriter", NeverEnding),
        ("StreamWriter", None),
        ("BaseProtocol", NeverPaused),
        ("BaseProtocol", Unknowing),
    ],
    ids=str,
)
async def test_it_does_not_work_where_aiohttp_behaves_otherwise(
    monkeypatch: pytest.MonkeyPatch, name: str, changed: object
) -> None:
    """It says so, and raises nothing; it waits no longer than a second to find out."""
    monkeypatch.setattr(direct_write, name, changed)
    assert await asyncio.wait_for(direct_write.works(), 10) is False
