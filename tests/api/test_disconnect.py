"""The client goes away: the upstream request is closed at once, whenever and however it leaves (contract, §3)."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import socket
import statistics
from pathlib import Path

import pytest

from tests.api.conftest import Connect, LogLines, Settled
from tests.api.observing import leaving_no_trace, until
from tests.api.raw_client import ASK, LEAVING, RawClient, request
from tests.conftest import Launch, Serve
from tests.sse_client import ask
from tests.upstream_sim import Call, Script, ScriptedUpstream, answer, chunk


async def _before_the_head(call: Call) -> None:
    await call.gone()


async def _before_the_first_token(call: Call) -> None:
    await call.head()
    await call.event(chunk({"role": "assistant", "content": ""}))
    await call.gone()


async def _mid_stream(call: Call) -> None:
    await call.head()
    await call.token("a")
    await call.gone()


async def _while_tokens_come(call: Call) -> None:
    await call.head()
    while call.open:
        await call.token("a")
        await asyncio.sleep(0.001)


async def _back_off(call: Call) -> None:
    await call.refuse(503, Retry_After="1")


WINDOWS: dict[str, Script] = {
    "before the upstream's head": _before_the_head,
    "before the first token": _before_the_first_token,
    "mid-stream, in silence": _mid_stream,
    "mid-stream, while tokens come": _while_tokens_come,
}


async def _enter(client: RawClient, upstream: ScriptedUpstream, window: str) -> Call:
    """Ask, and wait until the answer is in that window."""
    count = len(upstream.calls) + 1
    await client.send(ASK)
    await client.read_until(b"event: start")
    call = await upstream.called(count)
    if window.startswith("mid-stream"):
        await client.read_until(b'{"token":"a"}\n\n')
    else:
        await client.read_until(b"\n\n")
        await asyncio.sleep(0.005)
    return call


@pytest.mark.parametrize("way", LEAVING)
@pytest.mark.parametrize("window", WINDOWS)
async def test_a_client_that_leaves_closes_the_upstream_request(
    serve: Serve,
    upstream: ScriptedUpstream,
    connect: Connect,
    lines: LogLines,
    settled: Settled,
    window: str,
    way: str,
) -> None:
    """Rows B1 to B3: FIN, RST and half-close alike; one request line, one stream_end line, no failure."""
    upstream.script = WINDOWS[window]
    server = await serve()
    client = await connect(server)
    call = await _enter(client, upstream, window)
    LEAVING[way](client)
    async with asyncio.timeout(2):
        await call.gone()
    await settled(server)
    assert [line["outcome"] for line in lines("stream_end")] == ["client_gone"]
    assert [line["status"] for line in lines("request")] == [200]
    assert lines.failures == []


@pytest.mark.parametrize("way", LEAVING)
async def test_a_client_that_leaves_during_a_back_off_causes_no_further_try(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, settled: Settled, way: str
) -> None:
    """Row B2: the sleep before the next try is where relays forget that nobody waits any more."""
    upstream.script = _back_off
    server = await serve()
    client = await connect(server)
    await _enter(client, upstream, "back-off")
    LEAVING[way](client)
    await settled(server, within=0.5)
    assert [line["outcome"] for line in lines("stream_end")] == ["client_gone"]
    await asyncio.sleep(1.2)
    assert len(upstream.calls) == 1


async def test_a_client_that_leaves_while_we_connect_is_not_connected_for(
    serve: Serve, connect: Connect, settled: Settled, lines: LogLines
) -> None:
    """Row B2: an upstream whose backlog is full accepts nobody; the wait for it ends with the client."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
            waiting.append(sock)
        server = await serve(LLM_BASE_URL=f"http://127.0.0.1:{port}/v1")
        client = await connect(server)
        await client.send(ASK)
        await client.read_until(b"event: start")
        await asyncio.sleep(0.1)
        client.reset()
        await settled(server, within=1)
        for sock in waiting:
            sock.close()
    assert [line["outcome"] for line in lines("stream_end")] == ["client_gone"]


async def test_nobody_is_billed_for_200_clients_that_left(
    serve: Serve, upstream: ScriptedUpstream, settled: Settled, lines: LogLines
) -> None:
    """Sluice "stops paying for an answer as soon as nobody wants it": 200 tries over all windows and ways of leaving.

    The bound is for a loaded machine that runs client, server and upstream on one loop; ``make bench`` measures.
    """
    server = await serve(SLUICE_RATE_LIMIT="off")
    loop = asyncio.get_running_loop()
    seconds = []
    combinations = itertools.cycle(itertools.product(WINDOWS, LEAVING))
    for window, way in itertools.islice(combinations, 200):
        upstream.script = WINDOWS[window]
        async with await RawClient.connect(server.port) as client:
            call = await _enter(client, upstream, window)
            left_at = loop.time()
            LEAVING[way](client)
            async with asyncio.timeout(5):
                await call.gone()
            assert call.gone_at is not None
            seconds.append(call.gone_at - left_at)
    await settled(server)
    assert len(upstream.calls) == 200
    assert [line["outcome"] for line in lines("stream_end")] == ["client_gone"] * 200
    assert lines.failures == []
    seconds.sort()
    p50, p99 = statistics.median(seconds), seconds[197]
    print(f"disconnect to cancel over {len(seconds)}: p50 {p50 * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms")
    assert p99 < 0.5


def _is_over(call: Call, lines: LogLines, number: int) -> bool:
    return not call.open or len(lines("stream_end")) >= number


async def test_leaving_in_the_instant_of_the_end_has_one_outcome(
    serve: Serve, upstream: ScriptedUpstream, settled: Settled, lines: LogLines
) -> None:
    """Row B5: 200 times the client leaves as the last token and ``[DONE]`` come; whichever wins, it wins alone."""
    chance = random.Random(5)
    asking: list[RawClient] = []

    async def script(call: Call) -> None:
        leaver = asking[-1]
        leave = LEAVING[chance.choice(list(LEAVING))]
        leave_before = chance.choice([True, False])
        await call.head()
        await call.token("a")
        for _ in range(chance.randrange(8)):
            await asyncio.sleep(0)
        if leave_before:
            leave(leaver)
        for _ in range(chance.choice([0, 0, 0, 1, 2, 3])):
            await asyncio.sleep(0)
        await call.token("b")
        await call.finish()
        await call.done()
        if not leave_before:
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            leave(leaver)

    upstream.script = script
    server = await serve(SLUICE_RATE_LIMIT="off")
    for number in range(1, 201):
        async with await RawClient.connect(server.port) as client:
            asking.append(client)
            await client.send(ASK)
            call = await upstream.called(number)
            await until(functools.partial(_is_over, call, lines, number), within=5, every=0)
            assert call.error is None
    await settled(server)
    ended = lines("stream_end")
    assert len(ended) == 200
    assert len({line["id"] for line in ended}) == 200
    assert len(lines("request")) == 200
    outcomes = {line["outcome"] for line in ended}
    print({outcome: sum(line["outcome"] == outcome for line in ended) for outcome in outcomes})
    assert outcomes <= {"completed", "client_gone"}
    assert lines.failures == []


async def test_tokens_that_came_with_the_end_are_not_lost_to_those_who_stay(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """A viewer that leaves beside it changes nothing for another stream."""
    upstream.script = _while_tokens_come
    server = await serve()
    leaver = await connect(server)
    await _enter(leaver, upstream, "mid-stream, while tokens come")
    upstream.script = answer([str(n) for n in range(50)], gap=0.002)
    asking = asyncio.create_task(ask(server.url))
    await upstream.called(2)
    leaver.reset()
    given = await asking
    assert given.tokens == [str(n) for n in range(50)]
    assert given.complete
    await settled(server)


# ---- Leaving with something still under way


@pytest.mark.parametrize(("queued", "way"), [(5, "fin"), (5, "rst"), (5, "half-close"), (1000, "fin"), (1000, "rst")])
async def test_questions_queued_behind_a_stream_die_with_the_client(
    serve: Serve,
    upstream: ScriptedUpstream,
    connect: Connect,
    settled: Settled,
    lines: LogLines,
    queued: int,
    way: str,
) -> None:
    """Row B16: with many queued the server does not see the FIN, but its next heartbeat finds nobody; none is asked."""
    upstream.script = _mid_stream
    server = await serve(SLUICE_HEARTBEAT="0.4", SLUICE_RATE_LIMIT="off")
    client = await connect(server)
    await _enter(client, upstream, "mid-stream")
    await client.send(ASK * queued)
    await asyncio.sleep(0.05)
    LEAVING[way](client)
    await settled(server, within=0.4 + 1)
    await asyncio.sleep(0.1)
    assert len(upstream.calls) == 1
    assert lines.failures == []


@pytest.mark.parametrize("way", ["fin", "rst"])
async def test_what_is_sent_after_an_upgrade_hides_nobody(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled, way: str
) -> None:
    """Row A13: bytes that nobody reads stop the server from hearing the FIN; its next heartbeat finds nobody."""
    upstream.script = _before_the_first_token
    server = await serve(SLUICE_HEARTBEAT="0.4")
    client = await connect(server)
    await client.send(request("/api/stream?q=hi", "Upgrade: websocket", "Connection: Upgrade"))
    await client.read_until(b"event: start")
    sending = asyncio.create_task(client.send(b"\x81\x05hello" * 400_000))
    await asyncio.sleep(0.1)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    LEAVING[way](client)
    await settled(server, within=0.4 + 1)


@pytest.mark.parametrize("way", ["fin", "half-close"])
async def test_a_client_on_a_unix_socket_is_noticed_too(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled, tmp_path: Path, way: str
) -> None:
    """Where a proxy on the same machine comes from."""
    upstream.script = _mid_stream
    path = str(tmp_path / "sluice.sock")
    server = await serve(SLUICE_SOCKET=path)
    client = await connect(path)
    await _enter(client, upstream, "mid-stream")
    LEAVING[way](client)
    await settled(server, within=1)


@pytest.mark.parametrize("way", LEAVING)
async def test_who_leaves_while_its_body_is_read_is_forgotten(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, way: str
) -> None:
    """Row B17: nothing was opened for it, and nothing is."""
    server = await serve()
    client = await connect(server)
    await client.send(request("/api/stream?q=hi", "Content-Length: 5000000") + b"x" * 500_000)
    await asyncio.sleep(0.05)
    LEAVING[way](client)
    await until(lambda: lines("request"), within=3)
    assert upstream.calls == []
    assert server.desk.streams == 0
    assert lines("request")[0]["status"] in (400, 413, 499)
    assert lines.failures == []


async def test_who_leaves_before_the_answer_is_logged_as_499_without_one(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines
) -> None:
    """One line a request also where no status was ever sent."""
    server = await serve()
    client = await connect(server)
    await client.send(request("/api/stream?q=hi", "Content-Length: 10"))
    await asyncio.sleep(0.05)
    client.reset()
    await until(lambda: lines("request"), within=3)
    assert [line["status"] for line in lines("request")] == [499]
    assert lines("stream_end") == []


# ---- Churn


CHURN = {"silent": b"", "half a head": ASK[:20], "asking": ASK, "no HTTP": b"\x16\x03\x01\r\n\r\n"}


@pytest.mark.parametrize("data", CHURN.values(), ids=CHURN.keys())
async def test_connections_that_come_and_go_leave_nothing_behind(
    launch: Launch, upstream: ScriptedUpstream, data: bytes
) -> None:
    """Row B21, with 1500 connections; the questions among them are cancelled upstream as well."""
    upstream.script = _before_the_head
    sluice = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_RATE_LIMIT="off", SLUICE_MAX_STREAMS_PER_CLIENT="100")
    port = int(sluice.url.rpartition(":")[2])

    async def come_and_go(count: int) -> None:
        for _ in range(count):
            client = await RawClient.connect(port)
            await client.send(data)
            client.reset()

    async def churn(count: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(come_and_go(count // 10))

    await churn(300)  # fills the allocator's pools
    async with leaving_no_trace(sluice.pid):
        await churn(1500)
    assert not upstream.open_calls
    upstream.script = answer()
    assert (await ask(sluice.url)).complete
    assert not any("Traceback" in line or '"error"' in line for line in sluice.lines)


async def test_streams_that_are_left_leave_nothing_behind(launch: Launch, upstream: ScriptedUpstream) -> None:
    """I3: 200 streams left in all windows, and the process has the descriptors that it had."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_RATE_LIMIT="off")
    port = int(sluice.url.rpartition(":")[2])

    async def leave(count: int) -> None:
        for window, way in itertools.islice(itertools.cycle(itertools.product(WINDOWS, LEAVING)), count):
            upstream.script = WINDOWS[window]
            async with await RawClient.connect(port) as client:
                call = await _enter(client, upstream, window)
                LEAVING[way](client)
                async with asyncio.timeout(5):
                    await call.gone()

    await leave(20)
    async with leaving_no_trace(sluice.pid):
        await leave(200)
    sluice.process.terminate()
    assert await sluice.exited() == 0
    assert len(sluice.events("stream_end")) == len(sluice.events("request")) == 220
