"""The admin listener: health and readiness (contract, §7)."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.api.conftest import Connect
from tests.api.observing import until
from tests.api.raw_client import Response, request
from tests.conftest import Launch
from tests.sluice_process import SluiceProcess
from tests.sse_client import open_stream
from tests.upstream_sim import Call, ScriptedUpstream


async def _admin(connect: Connect, sluice: SluiceProcess, target: str, method: str = "GET") -> Response:
    client = await connect(int(sluice.admin_url.rpartition(":")[2]))
    return await client.ask(request(target, method=method))


async def test_a_process_that_serves_is_alive_and_ready(
    launch: Launch, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """``/healthz`` 200 while the process serves; ``/readyz`` is JSON with a status and its reasons."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    assert (await _admin(connect, sluice, "/healthz")).status == 200
    ready = await _admin(connect, sluice, "/readyz")
    assert ready.status == 200
    assert ready.headers["Content-Type"].startswith("application/json")
    assert ready.json == {"status": "ready", "reasons": []}


async def test_the_admin_listener_serves_nothing_of_the_public_one(
    launch: Launch, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """And the other way round: see test_page.py."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    for target in ("/api/stream?q=hi", "/app.js"):
        assert (await _admin(connect, sluice, target)).status == 404
    assert upstream.calls == []


async def test_a_draining_process_is_alive_but_not_ready(
    launch: Launch, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """SIGTERM: ``/readyz`` 503 while the open stream goes on, new connections refused, then exit 0."""
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        await call.token("a")
        await go_on.wait()
        await call.token("b")
        await call.finish()
        await call.done()

    upstream.script = script
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    async with asyncio.timeout(20), open_stream(sluice.url) as stream:
        assert await stream.token() == "a"
        sluice.signal(signal.SIGTERM)
        await until(lambda: sluice.events("draining"), within=5)
        ready = await _admin(connect, sluice, "/readyz")
        assert ready.status == 503
        assert ready.json == {"status": "unready", "reasons": ["draining"]}
        assert (await _admin(connect, sluice, "/healthz")).status == 200
        with pytest.raises(ConnectionError):
            await connect(int(sluice.url.rpartition(":")[2]))
        go_on.set()
        await stream.read_all()
        assert stream.answer.text == "ab"
        assert stream.answer.complete
        assert await sluice.exited() == 0


async def test_port_0_switches_it_off(launch: Launch, upstream: ScriptedUpstream) -> None:
    sluice = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_ADMIN_PORT="0")
    assert sluice.admin_url == ""
    assert "admin_url" not in sluice.events("listening")[0]


async def test_a_process_whose_upstreams_all_fail_is_not_ready(
    launch: Launch, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """``/readyz`` is 503 while every upstream's circuit is open (§7)."""

    async def script(call: Call) -> None:
        await call.refuse(503)

    upstream.script = script
    sluice = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_RETRIES="0", SLUICE_RATE_LIMIT="off")
    for _ in range(5):
        async with open_stream(sluice.url) as stream:
            await stream.read_all()
    ready = await _admin(connect, sluice, "/readyz")
    assert ready.status == 503
    assert ready.json == {"status": "unready", "reasons": ["every_upstream_fails"]}
    await until(lambda: sluice.events("circuit_open"), within=5)
