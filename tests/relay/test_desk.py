"""The desk: places taken and freed, answers left, kept, found again and forgotten, and the drain."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from server.errors import Overloaded, ShuttingDown, StreamNotFound, TooManyStreams
from server.relay import desk as desk_module
from server.relay.admission import TokenBuckets
from server.relay.answer import AnswerRequest
from server.relay.desk import Desk, Stream
from server.relay.life import Outcome
from server.settings import Rate
from server.wire.chat import ChatRequest
from server.wire.chunks import Chunk, ChunkSink, Delta, DeltaKind
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

    def __init__(self) -> None:
        self.running = 0

    can_ask = True

    def model_for(self, request: AnswerRequest, /) -> str:
        return "m"

    async def relay(self, request: AnswerRequest, sink: ChunkSink, /) -> None:
        self.running += 1
        try:
            sink.take([Chunk((Delta(DeltaKind.CONTENT, "a"),))])
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


# ---- Left, and come back to (tests/relay/test_survival.py does it ten thousand times at random)


def ended_stream(desk: Desk, client: str = "a") -> Stream:
    """An answer that has ended and is kept."""
    stream = desk.open(client, REQUEST)
    stream.stop(Outcome.INTERRUPTED)
    return stream


async def test_a_viewer_that_may_return_leaves_it_running_for_the_grace(source: Endless) -> None:
    desk = Desk(source, Limits(resume_grace=0.1))
    stream = desk.open("a", REQUEST)
    with desk.viewing(stream, FakeConnection(), may_return=True):
        await asyncio.sleep(0.01)
    assert (source.running, desk.streams, desk.kept) == (1, 1, 0)
    await asyncio.wait_for(desk.empty(), 2)
    assert (stream.life.outcome, desk.kept) == (Outcome.CLIENT_GONE, 1)
    await desk.close()


async def test_a_viewer_begins_behind_the_event_that_it_has_seen(desk: Desk) -> None:
    stream = ended_stream(desk)
    connection = FakeConnection()
    with desk.viewing(stream, connection, after=0) as viewer:
        await viewer.follow()
    assert b"".join(connection.written) == stream.log.read(stream.log.end_of(0), 1 << 20)
    with pytest.raises(IndexError), desk.viewing(stream, FakeConnection(), after=2):
        pass
    assert desk.viewers == 0
    await desk.close()


async def test_an_answer_is_found_until_its_window_is_over(source: Endless) -> None:
    desk = Desk(source, Limits(resume_window=0.1))
    stream = ended_stream(desk)
    assert desk.find(stream.id) is stream
    await asyncio.sleep(0.2)
    assert desk.find(stream.id) is None
    assert desk.kept == 0
    await desk.close()


async def test_a_place_is_freed_once_and_none_is_taken_to_read_it_again(desk: Desk) -> None:
    """Three viewers at its end and one later: else a client could end up with more places than it has, or fewer."""
    stream = desk.open("a", REQUEST)
    with desk.viewing(stream, FakeConnection()), desk.viewing(stream, FakeConnection()):
        stream.stop(Outcome.STOPPED)
        assert desk.streams == 1
    assert (desk.streams, desk.kept) == (0, 1)
    for _ in range(3):
        with desk.viewing(stream, FakeConnection(), may_return=True):
            assert (desk.streams, desk.viewers, desk.kept) == (0, 1, 1)
    assert (desk.streams, desk.viewers, desk.kept) == (0, 0, 1)
    desk.open("a", REQUEST)
    desk.open("a", REQUEST)
    with pytest.raises(TooManyStreams):
        desk.admit("a")
    await desk.close()


async def test_whoever_reads_it_again_keeps_the_desk_from_being_empty(desk: Desk) -> None:
    """A drain lets them finish, too."""
    stream = ended_stream(desk)
    await asyncio.wait_for(desk.empty(), 1)
    with desk.viewing(stream, FakeConnection()):
        waiting = asyncio.create_task(desk.empty())
        await asyncio.sleep(0.01)
        assert not waiting.done()
    await asyncio.wait_for(waiting, 1)
    await desk.close()


async def test_a_stop_ends_it_for_its_owner_and_nobody_else(desk: Desk) -> None:
    stream = desk.open("a", REQUEST)
    for stream_id, client in ((stream.id, "b"), ("unknown", "a")):
        with pytest.raises(StreamNotFound):
            desk.stop(stream_id, client)
    assert stream.life.running
    for _ in range(2):
        desk.stop(stream.id, "a")
    assert stream.life.outcome is Outcome.STOPPED
    with pytest.raises(StreamNotFound):
        desk.stop(stream.id, "b")
    await desk.close()


async def test_the_reserved_tokens_are_settled_once_and_at_once(desk: Desk) -> None:
    """Not when the upstream's connection is tidied up: the client's next request may be here before."""
    buckets = TokenBuckets(Rate(10, 1e6))
    stream = desk.open("a", REQUEST, buckets.reserve("a", 8))
    await asyncio.sleep(0.01)
    assert buckets.look("a").remaining == 2
    desk.stop(stream.id, "a")
    assert buckets.look("a").remaining == 9
    await desk.close()
    assert buckets.look("a").remaining == 9


@pytest.mark.parametrize("again", [False, True], ids=["read once", "read again"])
async def test_what_is_kept_is_bounded_and_the_first_to_end_goes_first(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Sixty seconds of answers, at a thousand a second, would be any amount of memory."""
    first = ended_stream(desk)
    size = first.log.size + desk_module._KEPT_OVERHEAD
    monkeypatch.setattr(desk_module, "_KEPT_BYTES", 3 * size)
    second, third = ended_stream(desk), ended_stream(desk)
    assert desk.kept == 3
    if again:
        with desk.viewing(first, FakeConnection()):
            pass
    fourth = ended_stream(desk)
    assert desk.find(first.id) is None
    assert [desk.find(stream.id) for stream in (second, third, fourth)] == [second, third, fourth]
    assert (desk.kept, desk._kept_bytes) == (3, 3 * size)
    assert first.timer is None
    await desk.close()


async def test_the_last_to_end_is_kept_however_large(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its own viewers would be dropped before its end."""
    monkeypatch.setattr(desk_module, "_KEPT_BYTES", 1)
    stream = desk.open("a", REQUEST)
    connection = FakeConnection()
    with desk.viewing(stream, connection) as viewer:
        stream.stop(Outcome.STOPPED)
        await viewer.follow()
    assert b"[DONE]" in b"".join(connection.written)
    assert (desk.find(stream.id), desk.kept) == (stream, 1)
    await desk.close()


async def test_who_reads_what_has_to_be_forgotten_is_dropped(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that takes a byte a minute would hold the whole answer for as long as it likes."""
    first = ended_stream(desk)
    monkeypatch.setattr(desk_module, "_KEPT_BYTES", first.log.size + desk_module._KEPT_OVERHEAD)
    slow, other = FakeConnection(), FakeConnection()
    with desk.viewing(first, slow, may_return=True):
        second = ended_stream(desk)
        assert slow.aborted
        with desk.viewing(second, other):
            assert desk.find(first.id) is first, "as long as it is read"
    assert not other.aborted
    assert (desk.find(first.id), desk.find(second.id), desk.kept) == (None, second, 1)
    await desk.close()


async def test_a_drain_tells_each_viewer_once_when_to_come_back(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who come during the drain, too."""
    told: list[int] = []
    monkeypatch.setattr("server.relay.viewer.Viewer.tell_retry", lambda viewer, retry_ms: told.append(retry_ms))
    stream = desk.open("a", REQUEST)
    with desk.viewing(stream, FakeConnection()), desk.viewing(stream, FakeConnection()):
        desk.drain()
        assert len(told) == 2
        with desk.viewing(stream, FakeConnection()):
            assert len(told) == 3
    assert all(1000 <= retry_ms <= 5000 for retry_ms in told)
    await desk.close()


async def test_a_closed_desk_leaves_no_timer_and_no_task(source: Endless) -> None:
    desk = Desk(source, Limits(max_streams=9, max_streams_per_client=9))
    running, left, kept = desk.open("a", REQUEST), desk.open("a", REQUEST), ended_stream(desk)
    with desk.viewing(left, FakeConnection(), may_return=True):
        await asyncio.sleep(0.01)
    timers = [running.timer, left.timer, desk._windows._timer, desk._lifetimes._timer]
    assert kept.timer is None
    assert all(timers)
    await desk.close()
    assert source.running == 0
    assert (desk.streams, desk.kept) == (0, 0)
    for stream in (running, left):
        assert stream.timer is None or stream.timer.cancelled()
    assert all(timer is not None and timer.cancelled() for timer in timers)
