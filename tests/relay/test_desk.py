"""The desk: places taken and freed, the last viewer's leaving, and the drain."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from server.errors import Overloaded, ShuttingDown, TooManyStreams, UpstreamIncomplete
from server.relay.desk import Desk
from server.relay.life import Outcome
from server.wire.chat import ChatRequest
from server.wire.chunks import Chunk, Delta, DeltaKind
from tests.relay.test_viewer import FakeConnection

REQUEST = ChatRequest(messages=(("user", "hi"),), max_tokens=8, temperature=0.0)


@dataclass
class Limits:
    stream_timeout: float = 30.0
    max_answer_bytes: int = 100_000
    log_prompts: bool = False
    max_streams: int = 3
    max_streams_per_client: int = 2
    heartbeat: float = 30.0
    write_timeout: float = 30.0
    resume_grace: float = 30.0
    resume_window: float = 30.0


class Endless:
    """A source that speaks once and then waits for ever; ``running`` counts the requests that are open."""

    model = "m"

    def __init__(self) -> None:
        self.running = 0

    async def relay(self, request: ChatRequest, sink: Callable[[list[Chunk]], None], done: Any, /) -> None:
        self.running += 1
        try:
            sink([Chunk((Delta(DeltaKind.CONTENT, "a"),))])
            await asyncio.Event().wait()
        finally:
            self.running -= 1


@pytest.fixture
def source() -> Endless:
    return Endless()


@pytest.fixture
def desk(source: Endless) -> Desk:
    return Desk(source, Limits())


async def view(desk: Desk, client: str = "a") -> None:
    """What a face of the API does."""
    desk.admit(client)
    with desk.viewing(desk.open(client, REQUEST), FakeConnection()) as viewer:
        await viewer.follow()


async def leave(*viewers: asyncio.Task[None]) -> None:
    for viewer in viewers:
        viewer.cancel()
    await asyncio.wait(viewers)
    await asyncio.sleep(0.01)


async def open_viewers(desk: Desk, *clients: str) -> list[asyncio.Task[None]]:
    viewers = [asyncio.create_task(view(desk, client)) for client in clients]
    await asyncio.sleep(0.01)
    return viewers


async def test_the_last_viewer_to_leave_stops_the_answer_at_once(desk: Desk, source: Endless) -> None:
    viewers = await open_viewers(desk, "a")
    assert (source.running, desk.streams, desk.viewers) == (1, 1, 1)
    await leave(*viewers)
    assert (source.running, desk.streams, desk.viewers) == (0, 0, 0)


async def test_an_answer_with_another_viewer_goes_on(desk: Desk, source: Endless) -> None:
    answer = desk.open("a", REQUEST)
    with desk.viewing(answer, FakeConnection()):
        with desk.viewing(answer, FakeConnection()):
            await asyncio.sleep(0.01)
        assert source.running == 1
    await asyncio.sleep(0.01)
    assert source.running == 0


async def test_a_client_may_have_so_many_streams_open(desk: Desk) -> None:
    viewers = await open_viewers(desk, "a", "a")
    with pytest.raises(TooManyStreams) as refusal:
        desk.admit("a")
    assert refusal.value.retry_after
    desk.admit("b")
    await leave(viewers[0])
    desk.admit("a")
    await leave(viewers[1])


async def test_all_clients_together_may_have_so_many(desk: Desk) -> None:
    viewers = await open_viewers(desk, "a", "b", "c")
    with pytest.raises(Overloaded):
        desk.admit("d")
    await leave(*viewers)
    desk.admit("d")


async def test_an_answer_that_has_ended_holds_its_place_while_someone_reads_it(desk: Desk) -> None:
    answer = desk.open("a", REQUEST)
    with desk.viewing(answer, FakeConnection()):
        answer.stop(Outcome.INTERRUPTED)
        await asyncio.sleep(0.01)
        assert desk.streams == 1
    assert desk.streams == 0


async def test_a_draining_desk_admits_nobody_and_is_empty_when_the_last_has_gone(desk: Desk) -> None:
    viewers = await open_viewers(desk, "a")
    desk.drain()
    with pytest.raises(ShuttingDown):
        desk.admit("b")
    waiting = asyncio.create_task(desk.empty())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await leave(*viewers)
    await asyncio.wait_for(waiting, 1)


async def test_an_interrupted_viewer_reads_to_the_end(desk: Desk, source: Endless) -> None:
    viewers = await open_viewers(desk, "a", "b")
    desk.interrupt()
    await asyncio.wait_for(asyncio.gather(*viewers), 1)
    assert (source.running, desk.streams) == (0, 0)


async def test_every_admitted_stream_ends_with_one_line_and_frees_its_place(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever happens to it: 500 answers, each ended at random by its source, its viewer, or the server."""
    chance = random.Random(7)

    class Fickle:
        model = "m"

        async def relay(
            self, request: ChatRequest, sink: Callable[[list[Chunk]], None], done: Callable[[], None], /
        ) -> None:
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(chance.random() / 200)
                sink([Chunk((Delta(DeltaKind.CONTENT, "a"),))])
            match chance.randrange(4):
                case 0:
                    done()
                case 1:
                    raise UpstreamIncomplete
                case 2:
                    raise ZeroDivisionError
                case 3:
                    done()
                    await asyncio.sleep(chance.random() / 200)

    desk = Desk(Fickle(), Limits(max_streams=1000, max_streams_per_client=1000))
    caplog.set_level(logging.INFO, "sluice.stream")
    viewers = []
    opened = 0

    async def open_and_view() -> None:
        nonlocal opened
        opened += 1
        await view(desk)

    for _ in range(500):
        viewer = asyncio.create_task(open_and_view())
        viewers.append(viewer)
        if chance.random() < 0.5:
            asyncio.get_running_loop().call_later(chance.random() / 100, viewer.cancel)
        if chance.random() < 0.01:
            desk.interrupt()
        await asyncio.sleep(chance.random() / 1000)
    await asyncio.wait(viewers)
    await desk.close()

    lines = [record for record in caplog.records if record.getMessage() == "stream_end"]
    ids = {getattr(line, "sluice_fields")["id"] for line in lines}  # noqa: B009 - set by log_event, unknown to mypy
    assert (desk.streams, desk.viewers) == (0, 0)
    assert len(ids) == len(lines) == opened
    outcomes = {getattr(line, "sluice_fields")["outcome"] for line in lines}  # noqa: B009
    assert outcomes >= {"completed", "client_gone", "upstream_error", "internal_error"}
