"""``SLUICE_FAST_PATH``: the short ways through aiohttp change what an event costs, and nothing that a client sees."""

from __future__ import annotations

import asyncio
import gc
import re

import pytest

from tests.api.conftest import Connect, Settled
from tests.api.observing import until
from tests.conftest import Launch, Serve
from tests.upstream_sim import Call, ScriptedUpstream, answer

both_paths = pytest.mark.parametrize("fast_path", ["auto", "off"])

ASK = b"GET /api/stream?q=hi HTTP/1.1\r\nHost: sluice\r\nAccept: text/event-stream\r\n\r\n"
TEXTS = ["Hel", "lo", " ", '"quoted"', "two\nlines", "中文", "😀", "a\\b", "\u2028", "x" * 20_000, "end"]


def _comparable(received: bytes) -> bytes:
    """What is received but for what differs from one answer to the next, chunk sizes among it."""
    body = received.partition(b"\r\n\r\n")[2]
    payload = re.sub(rb"(?:^|\r\n)[0-9a-f]+\r\n", b"", body)
    payload = re.sub(rb"[A-Za-z0-9_-]{22}(?=[.\"])", b"SID", payload)
    return re.sub(rb'"(ttft|duration)_ms":[0-9]+', b'"ms":0', payload)


async def test_both_ways_send_the_same_bytes(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Every kind of text, token by token, and the whole answer in one segment."""
    received: dict[tuple[str, float], bytes] = {}
    for fast_path in ("auto", "off"):
        server = await serve(SLUICE_RATE_LIMIT="off", SLUICE_FAST_PATH=fast_path)
        for gap in (0.0, 0.003):
            upstream.script = answer(TEXTS, gap=gap)
            client = await connect(server)
            await client.send(ASK)
            received[fast_path, gap] = _comparable(await client.read_until(b"\r\n0\r\n\r\n"))
    assert len(set(received.values())) == 1
    assert b"data: [DONE]\n\n" in received["auto", 0.0]


@both_paths
async def test_a_client_that_leaves_closes_the_request(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled, fast_path: str
) -> None:
    async def script(call: Call) -> None:
        await call.head()
        while call.open:
            await call.token("x")
            await asyncio.sleep(0.005)

    upstream.script = script
    server = await serve(SLUICE_FAST_PATH=fast_path)
    client = await connect(server)
    await client.send(ASK.replace(b"text/event-stream", b"*/*"))
    await client.read_until(b'"token"')
    client.close()
    await settled(server)


@both_paths
async def test_a_burst_of_connections_is_taken_at_once(
    upstream: ScriptedUpstream, launch: Launch, connect: Connect, fast_path: str
) -> None:
    """The listening queue is as long as it is said to be: one of four places let a burst wait for seconds."""
    upstream.script = answer()
    sluice = await launch(
        LLM_BASE_URL=upstream.base_url,
        SLUICE_FAST_PATH=fast_path,
        SLUICE_RATE_LIMIT="off",
        SLUICE_MAX_STREAMS_PER_CLIENT="1000",
    )
    assert [line["fast_path"] for line in sluice.events("listening")] == [fast_path == "auto"]
    port = int(sluice.url.rpartition(":")[2])
    clients = await asyncio.gather(*(connect(port) for _ in range(200)))
    async with asyncio.timeout(20):
        for client in clients:
            await client.send(ASK)
        for client in clients:
            await client.read_until(b"\r\n0\r\n\r\n")
    await until(lambda: len(sluice.events("stream_end")) == 200, within=5)


@both_paths
async def test_an_answer_that_is_cancelled_leaves_the_collector_nothing(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled, fast_path: str
) -> None:
    """What only a collection frees piles up until one stands everything still."""

    async def script(call: Call) -> None:
        await call.head()
        await call.token("x")
        await call.gone()

    upstream.script = script
    server = await serve(SLUICE_RATE_LIMIT="off", SLUICE_FAST_PATH=fast_path, SLUICE_RESUME_WINDOW="0")

    async def come_and_go() -> None:
        client = await connect(server)
        await client.send(ASK.replace(b"text/event-stream", b"*/*"))
        await client.read_until(b'"token"')
        client.close()
        await settled(server)

    await come_and_go()
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        for _ in range(3):
            await come_and_go()
        gc.collect()
        ours = {type(thing).__name__ for thing in gc.garbage if type(thing).__module__.startswith("server.")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not ours
