"""What a client may spend: the token bucket, the caps on open streams, and what a refusal costs (contract, §3)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from urllib.parse import quote

import pytest

from tests.api.conftest import Connect, LogLines, Settled
from tests.api.observing import until
from tests.api.raw_client import ASK, LEAVING, RawClient, Response, request
from tests.conftest import InProcess, Serve
from tests.sse_client import ask, open_stream
from tests.upstream_sim import Call, ScriptedUpstream, answer


async def _hold(call: Call) -> None:
    await call.head()
    await call.token("a")
    await call.gone()


async def _admitted(client: RawClient, data: bytes = ASK) -> Response:
    """Ask, and read until the first token has come."""
    await client.send(data)
    response = await client.read_head()
    assert response.status == 200
    await client.read_until(b'{"token":"a"}')
    return response


# ---- The bucket


async def test_an_empty_bucket_is_429(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Ten in sixty seconds: the eleventh is refused, with the whole seconds until a token is back, rounded up."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="3/60"))
    for left in (2, 1, 0):
        response = await client.ask()
        assert response.status == 200
        assert response.headers["RateLimit-Policy"] == '"requests";q=3;w=60'
        assert re.fullmatch(rf'"requests";r={left};t=(19|20)', response.headers["RateLimit"])
    response = await client.ask()
    assert (response.status, response.error) == (429, "rate_limit_exceeded")
    assert response.headers["RateLimit-Policy"] == '"requests";q=3;w=60'
    assert re.fullmatch(r'"requests";r=0;t=(19|20)', response.headers["RateLimit"])
    assert response.headers["Retry-After"] in ("19", "20")
    assert len(upstream.calls) == 3


async def test_who_waits_as_long_as_told_is_admitted(serve: Serve, connect: Connect) -> None:
    """``Retry-After`` is a promise: rounded up, never down to a 0 that would be refused again."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="1/0.6"))
    assert (await client.ask()).status == 200
    response = await client.ask()
    assert response.status == 429
    assert response.headers["Retry-After"] == "1"
    await asyncio.sleep(1)
    assert (await client.ask()).status == 200


async def test_without_limits_nothing_is_told_of_them(serve: Serve, connect: Connect) -> None:
    """The contract: "unless limits are off"."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="off"))
    for _ in range(30):
        response = await client.ask()
        assert response.status == 200
    assert not any(name.lower().startswith("ratelimit") for name in response.headers)


async def test_each_client_has_a_bucket_of_its_own(serve: Serve) -> None:
    server = await serve(SLUICE_RATE_LIMIT="1/3600")
    for address in ("203.0.113.1", "203.0.113.2"):
        assert (await ask(server.url, X_Forwarded_For=address)).status == 200
        assert (await ask(server.url, X_Forwarded_For=address)).status == 429


async def test_a_bucket_is_no_way_round_another_connection(serve: Serve, connect: Connect) -> None:
    server = await serve(SLUICE_RATE_LIMIT="2/3600")
    statuses = [(await (await connect(server)).ask()).status for _ in range(3)]
    assert statuses == [200, 200, 429]


REFUSED = {
    "missing_query": request("/api/stream"),
    "query_too_long": request("/api/stream?q=" + quote("é" * 1001)),
    "invalid_query": request("/api/stream?q=%ff"),
    "origin_not_allowed": request("/api/stream?q=hi", "Origin: https://evil.example"),
    "method_not_allowed": request(method="POST"),
    "not_found": request("/api/nothing?q=hi"),
    "preflight": request("/api/stream?q=hi", "Origin: x", "Access-Control-Request-Method: GET", method="OPTIONS"),
    "page": request("/"),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
async def test_a_refusal_spends_nothing(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, data: bytes
) -> None:
    """Only what is admitted costs a token; a 400 tells nothing of the bucket either."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="1/3600"))
    for _ in range(3):
        response = await client.ask(data)
        assert response.status != 429
        assert "RateLimit" not in response.headers
    assert upstream.calls == []
    assert (await client.ask()).status == 200


async def test_too_many_open_streams_spend_no_token(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """The cap is asked before the bucket."""
    upstream.script = _hold
    server = await serve(SLUICE_RATE_LIMIT="2/3600", SLUICE_MAX_STREAMS_PER_CLIENT="1")
    first, second = await connect(server), await connect(server)
    await _admitted(first)
    for _ in range(5):
        assert (await second.ask()).error == "too_many_streams"
    first.close()
    await settled(server)
    upstream.script = answer()
    assert (await second.ask()).status == 200
    assert (await second.ask()).error == "rate_limit_exceeded"


async def test_a_refused_stream_is_cheap(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Row B19: a storm from one client gets 429s of less than 300 bytes, and the upstream none of it."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="1/3600"))
    assert (await client.ask()).status == 200
    began_at = time.perf_counter()
    for _ in range(50):
        await client.send(ASK * 20)
        for _ in range(20):
            response = await client.read_response()
            assert response.status == 429
            assert len(response.body) < 300
    seconds = time.perf_counter() - began_at
    print(f"{1000 / seconds:.0f} refusals/s, client and server on one core")
    assert len(upstream.calls) == 1
    assert seconds < 10


# ---- The caps


async def test_the_ninth_stream_of_a_client_is_429(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """Row B20: 8 open at once; another client is not concerned."""
    upstream.script = _hold
    server = await serve(SLUICE_RATE_LIMIT="off")
    clients = [await connect(server) for _ in range(8)]
    for client in clients:
        await _admitted(client)
    ninth = await connect(server)
    response = await ninth.ask()
    assert (response.status, response.error) == (429, "too_many_streams")
    assert int(response.headers["Retry-After"]) > 0
    assert len(upstream.calls) == 8
    await _admitted(ninth, request("/api/stream?q=hi", "X-Forwarded-For: 203.0.113.1"))
    for client in (*clients, ninth):
        client.close()
    await settled(server)


async def test_one_stream_more_than_all_may_have_is_503(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """Row B20, for SLUICE_MAX_STREAMS."""
    upstream.script = _hold
    server = await serve(SLUICE_MAX_STREAMS="3")
    clients = [await connect(server) for _ in range(3)]
    for number, client in enumerate(clients):
        await _admitted(client, request("/api/stream?q=hi", f"X-Forwarded-For: 203.0.113.{number}"))
    late = await connect(server)
    response = await late.ask(request("/api/stream?q=hi", "X-Forwarded-For: 203.0.113.9"))
    assert (response.status, response.error) == (503, "overloaded")
    assert int(response.headers["Retry-After"]) > 0
    assert len(upstream.calls) == 3
    clients[0].close()
    await until(lambda: server.desk.streams < 3, within=5)
    await _admitted(late)
    for client in (*clients, late):
        client.close()
    await settled(server)


async def test_a_draining_server_is_503(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """While the server drains: 503 shutting_down, on a connection that was there before; who streams goes on."""
    upstream.script = _hold
    server = await serve(SLUICE_RATE_LIMIT="2/3600", SLUICE_CORS_ORIGINS="https://a.example")
    streaming, idle = await connect(server), await connect(server)
    await _admitted(streaming)
    assert (await idle.ask(request("/"))).status == 200
    drain = asyncio.create_task(server.serving.drain(20, cut_short=asyncio.Event()))
    await asyncio.sleep(0)
    for _ in range(2):
        response = await idle.ask(request("/api/stream?q=hi", "Origin: https://a.example"))
        assert (response.status, response.error) == (503, "shutting_down")
        assert int(response.headers["Retry-After"]) > 0
        assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert len(upstream.open_calls) == 1
    streaming.close()
    await settled(server)
    await drain


# ---- Places get free again

WINDOWS = ["before the head", "before the first token", "mid-stream", "at the end", "failing"]
ENDINGS = [*LEAVING, "stay"]


async def test_a_stream_that_ended_in_any_way_frees_its_place(
    serve: Serve, upstream: ScriptedUpstream, lines: LogLines, settled: Settled
) -> None:
    """Row B20: 300 streams of one client, killed at random; afterwards all of its places are free."""
    chance = random.Random(20)

    async def script(call: Call) -> None:
        window = call.json["messages"][-1]["content"]
        if window == "failing":
            await call.refuse(chance.choice([400, 500]))
            return
        if window == "before the head":
            await call.gone()
        await call.head()
        if window == "before the first token":
            await call.gone()
        await call.token("a")
        if window == "mid-stream":
            await call.gone()
        await call.finish()
        await call.done()

    upstream.script = script
    server = await serve(SLUICE_RATE_LIMIT="off", SLUICE_RETRIES="0", SLUICE_SYSTEM_PROMPT="")

    async def one_after_another(count: int) -> None:
        for _ in range(count):
            await _kill_at_random(server, chance)

    async with asyncio.timeout(50), asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(one_after_another(50))
    await settled(server)
    assert len(lines("stream_end")) + sum(line["status"] != 200 for line in lines("request")) == 300
    assert {line["outcome"] for line in lines("stream_end")} == {"completed", "client_gone", "upstream_error"}
    assert lines.failures == []
    upstream.script = _hold
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(8):
            stream = await stack.enter_async_context(open_stream(server.url))
            assert stream.answer.status == 200
    await settled(server)


async def _kill_at_random(server: InProcess, chance: random.Random) -> None:
    window, ending = chance.choice(WINDOWS), chance.choice(ENDINGS)
    if ending == "stay" and window not in ("at the end", "failing"):
        ending = "rst"
    async with await RawClient.connect(server.port) as client:
        await client.send(request(f"/api/stream?q={quote(window)}"))
        if ending == "stay":
            assert (await client.read_response()).status in (200, 429)
            return
        if window != "at the end":
            await client.read_head()
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.01]))
        LEAVING[ending](client)
        if ending == "half-close":
            await client.read_to_end()
