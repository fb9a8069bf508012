"""Resuming behind the real nginx with the shipped site: what holds directly holds through it (contract, section 4)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from tests.api.observing import until
from tests.api.returning import CHAT, FACES, RESUMABLE, Paced
from tests.conftest import Launch
from tests.ops.conftest import NAME, Exchange, Need, Nginx, StartNginx, asked, connected, curl_http2, lines_of_curl
from tests.sluice_process import SluiceProcess
from tests.sse_client import AnswerReader
from tests.upstream_sim import ScriptedUpstream

JSON = "Content-Type: application/json"
WAYS = ["fin", "rst", "half_close", "silence"]


@pytest.fixture
def paced(upstream: ScriptedUpstream) -> Paced:
    paced = Paced()
    upstream.script = paced
    return paced


async def _post(exchange: Exchange, body: bytes | None = None) -> None:
    body = json.dumps(CHAT).encode() if body is None else body
    await exchange.send("/api/streams", JSON, f"Content-Length: {len(body)}", method="POST", body=body)


async def _open_stream(nginx: Nginx) -> str:
    """``POST /api/streams`` through nginx: the new stream's URL."""
    async with connected(nginx) as exchange:
        await _post(exchange)
        assert exchange.status == 201
        told = json.loads(await exchange.body())
        assert exchange.headers["Location"] == told["url"] == f"/api/streams/{told['id']}"
        return exchange.headers["Location"]


@contextlib.asynccontextmanager
async def _viewing(nginx: Nginx, target: str, reader: AnswerReader) -> AsyncIterator[Exchange]:
    """As an EventSource comes, or comes back."""
    seen = [] if reader.last_event_id is None else [f"Last-Event-ID: {reader.last_event_id}"]
    async with asked(nginx, target, RESUMABLE, *seen) as exchange:
        yield exchange


async def _hear(exchange: Exchange, reader: AnswerReader, number: int) -> None:
    """Look at what comes up to event ``number``, and no further, whatever else is here already."""
    async with asyncio.timeout(10):
        async for piece in exchange.pieces():
            for block in piece.split(b"\n\n")[:-1]:
                if reader.seen < number:
                    reader.feed(block + b"\n\n")
            if reader.seen >= number:
                return


async def _prove(nginx: Nginx, sluice: SluiceProcess, upstream: ScriptedUpstream, reader: AnswerReader) -> None:
    """The client has the whole answer, each byte once; it was paid for once, and it need not come back."""
    assert reader.tokens == list(Paced.tokens)
    assert reader.last_event_id is not None
    url = f"/api/streams/{reader.last_event_id.partition('.')[0]}"
    async with asked(nginx, url) as exchange:
        assert await exchange.body() == bytes(reader.taken)
    async with _viewing(nginx, url, reader) as exchange:
        assert exchange.status == 204
    assert len(upstream.calls) == 1
    await until(lambda: sluice.events("stream_end"), within=5)
    assert [event["outcome"] for event in sluice.events("stream_end")] == ["completed"]


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("way", WAYS)
async def test_a_drop_at_every_event_loses_nothing_and_repeats_nothing(
    upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx, paced: Paced, way: str, face: str
) -> None:
    """Row B6, through nginx: one event a connection; ``Last-Event-ID`` passes, and while the client is away the answer
    goes on, whether nginx and Sluice have noticed that it is or not."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)
    target = "/api/stream?q=hi" if face == "/api/stream" else await _open_stream(nginx)
    reader = AnswerReader()
    async with contextlib.AsyncExitStack() as forgotten:
        for number in range(paced.last):
            exchange = await forgotten.enter_async_context(_viewing(nginx, target, reader))
            assert exchange.status == 200
            paced.release(number)
            await _hear(exchange, reader, number)
            if way != "silence":
                getattr(exchange, way)()
            paced.release(number + 1)
        async with _viewing(nginx, target, reader) as exchange:
            await _hear(exchange, reader, paced.last)
            assert [piece async for piece in exchange.pieces()] == [], "something follows the last event"
    await _prove(nginx, sluice, upstream, reader)


async def test_who_does_not_come_back_ends_it_after_the_grace(
    upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx, paced: Paced
) -> None:
    """Row B4, through nginx, which passes ``Accept`` on: without it the end would come at once."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_RESUME_GRACE="0.6")
    nginx = await start_nginx(sluice.url)
    reader, loop = AnswerReader(), asyncio.get_running_loop()
    async with _viewing(nginx, "/api/stream?q=hi", reader) as exchange:
        await _hear(exchange, reader, 0)
        call = await upstream.called()
        left_at = loop.time()
        exchange.fin()
        async with asyncio.timeout(5):
            await call.gone()
    assert call.gone_at is not None
    assert 0.5 < call.gone_at - left_at < 2.5
    async with _viewing(nginx, "/api/stream", reader) as exchange:
        await _hear(exchange, reader, 1)
    assert reader.events[-1].json["error"] == "interrupted"
    assert len(upstream.calls) == 1


async def test_a_late_viewer_gets_the_past_and_a_stop_reaches_all(
    upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx, paced: Paced
) -> None:
    """Section 4: any number of viewers at once; ``DELETE`` passes, 204 and 404 as they are."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)
    target = await _open_stream(nginx)
    paced.release(2)
    readers = [AnswerReader(), AnswerReader()]
    async with _viewing(nginx, target, readers[0]) as early:
        await _hear(early, readers[0], 2)
        async with _viewing(nginx, target, readers[1]) as late:
            await _hear(late, readers[1], 2)
            async with connected(nginx) as stopper:
                for _ in range(2):
                    await stopper.send(target, method="DELETE")
                    assert stopper.status == 204
                await stopper.send("/api/streams/" + "A" * 32, method="DELETE")
                assert stopper.status == 404
                assert json.loads(await stopper.body())["error"] == "stream_not_found"
            await _hear(early, readers[0], 4)
            await _hear(late, readers[1], 4)
    assert readers[0].taken == readers[1].taken
    assert readers[0].events[-2].json["finish_reason"] == "cancelled"
    async with asyncio.timeout(5):
        await upstream.calls[0].gone()
    await until(lambda: sluice.events("stream_end"), within=5)
    assert [event["outcome"] for event in sluice.events("stream_end")] == ["stopped"]


async def test_over_http2_it_is_the_same(
    upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx, need: Need, paced: Paced
) -> None:
    """As browsers come: POST, a view that is torn, its return with ``Last-Event-ID``, DELETE, 204."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)

    async def curl(target: str, *options: str) -> list[str]:
        async with asyncio.timeout(15), curl_http2(need, nginx, target, *options) as process:
            return [line async for line in lines_of_curl(process)]

    body, status = await curl("/api/streams", "-H", JSON, "--data", json.dumps(CHAT))
    assert status == "2 201"
    url = json.loads(body)["url"]
    paced.release(2)
    heard = b""
    async with asyncio.timeout(15), curl_http2(need, nginx, url, "-H", RESUMABLE) as process:
        async for line in lines_of_curl(process):
            heard += line.encode() + b"\n"
            if heard.count(b"\n\n") == 3:
                break
        process.kill()
    reader = AnswerReader()
    reader.feed(heard)
    paced.release(paced.last)
    *rest, status = await curl(url, "-H", RESUMABLE, "-H", f"Last-Event-ID: {reader.last_event_id}")
    assert status == "2 200"
    reader.feed("\n".join(rest).encode() + b"\n")
    assert reader.ended
    assert (await curl(url, "-X", "DELETE"))[-1] == "2 204"
    assert (await curl(url, "-H", f"Last-Event-ID: {reader.last_event_id}"))[-1] == "2 204"
    await _prove(nginx, sluice, upstream, reader)


async def test_the_longest_body_passes_and_a_longer_one_is_refused_in_json(
    upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx
) -> None:
    """Section 4, 413: one mebibyte is Sluice's to judge; of a byte more nginx reads none, and says it in JSON."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)
    async with connected(nginx) as exchange:
        await _post(exchange, b" " * ((1 << 20) - 2) + b"{}")
        assert exchange.status == 400
        assert json.loads(await exchange.body())["error"] == "invalid_request"
    for path in ("/api/streams", "/v1/chat/completions"):
        async with connected(nginx) as exchange:
            await exchange.send(path, JSON, f"Content-Length: {(1 << 20) + 1}", method="POST")
            assert exchange.status == 413
            assert exchange.headers["Content-Type"] == "application/json"
            error = json.loads(await exchange.body())["error"]
            assert (error["code"] if path.startswith("/v1/") else error) == "body_too_large"
    assert upstream.calls == []


async def test_a_page_may_post_and_come_back_from_its_own_origin(
    upstream: ScriptedUpstream, launch: Launch, start_nginx: StartNginx, paced: Paced
) -> None:
    """Sections 3 and 4: its ``Origin`` is this server's, as nginx tells of scheme and host; another one is not."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    nginx = await start_nginx(sluice.url)
    body = json.dumps(CHAT).encode()
    for origin, status in ((f"https://{NAME}", 201), ("https://evil.example", 403)):
        async with connected(nginx) as exchange:
            headers = [JSON, f"Content-Length: {len(body)}", f"Origin: {origin}"]
            await exchange.send("/api/streams", *headers, method="POST", body=body)
            assert exchange.status == status
            await exchange.body()
    await upstream.called()
    assert len(upstream.calls) == 1
