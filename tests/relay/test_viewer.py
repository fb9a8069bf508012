"""A viewer: batches, heartbeats, and the reader that takes nothing."""

from __future__ import annotations

import asyncio

import pytest

from server.relay.log import ReplayLog
from server.relay.viewer import Viewer
from server.wire.events import EventEncoder


class FakeConnection:
    """A connection whose reader the test plays; ``open`` unset means that it takes nothing."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.finished = False
        self.aborted = False
        self.untaken = 0
        self.open = asyncio.Event()
        self.open.set()
        self.takes_end = True

    async def write(self, data: bytes) -> None:
        self.written.append(data)
        await self.open.wait()
        if self.aborted:
            raise ConnectionResetError

    def write_now(self, data: bytes) -> bool:
        return False

    async def finish(self, data: bytes) -> None:
        if data:
            self.written.append(data)
        if not self.takes_end:
            self.open.clear()
        await self.open.wait()
        if self.aborted:
            raise ConnectionResetError
        self.finished = True

    def untaken_bytes(self) -> int:
        return self.untaken

    def abort(self) -> None:
        self.aborted = True
        self.open.set()

    def reset(self) -> None:
        self.abort()


ping = EventEncoder("SID").ping
PING = ping()


@pytest.fixture
def log() -> ReplayLog:
    log = ReplayLog(max_bytes=1 << 20)
    log.append(b"start\n\n")
    return log


def viewer_of(
    log: ReplayLog, connection: FakeConnection, heartbeat: float = 60, write_timeout: float = 60, offset: int = 0
) -> Viewer:
    return Viewer(log, connection, ping, heartbeat=heartbeat, write_timeout=write_timeout, offset=offset)


def publish(log: ReplayLog, *events: bytes) -> None:
    for event in events:
        log.append(event)
    log.publish()


async def test_it_writes_the_past_at_once_then_a_batch_in_one_write_then_the_end(log: ReplayLog) -> None:
    connection = FakeConnection()
    following = asyncio.create_task(viewer_of(log, connection).follow())
    await asyncio.sleep(0.01)
    assert connection.written == [b"start\n\n"]
    publish(log, b"a\n\n", b"b\n\n")
    await asyncio.sleep(0.01)
    log.end([b"done\n\n"])
    await following
    assert connection.written == [b"start\n\n", b"a\n\nb\n\n", b"done\n\n"]
    assert connection.finished


async def test_it_begins_where_it_is_told(log: ReplayLog) -> None:
    connection = FakeConnection()
    log.end([b"done\n\n"])
    await viewer_of(log, connection, offset=log.end_of(0)).follow()
    assert connection.written == [b"done\n\n"]


async def test_a_long_past_goes_out_in_bounded_pieces(log: ReplayLog) -> None:
    """A reader that takes nothing must not hold a whole answer in our buffers."""
    connection = FakeConnection()
    log.end([b"x" * 300_000])
    await viewer_of(log, connection).follow()
    assert max(map(len, connection.written)) <= 64 << 10
    assert sum(map(len, connection.written)) == log.size


async def test_silence_is_filled_with_pings_from_the_first_second_on(log: ReplayLog) -> None:
    connection = FakeConnection()
    following = asyncio.create_task(viewer_of(log, connection, heartbeat=0.05).follow())
    await asyncio.sleep(0.4)
    log.end()
    await following
    pings = connection.written[1:]
    assert 3 <= len(pings) <= 8
    assert set(pings) == {PING}


async def test_events_take_the_place_of_pings(log: ReplayLog) -> None:
    connection = FakeConnection()
    following = asyncio.create_task(viewer_of(log, connection, heartbeat=0.3).follow())
    for _ in range(20):
        publish(log, b"a\n\n")
        await asyncio.sleep(0.03)
    log.end()
    await following
    assert PING not in connection.written


async def test_a_reader_that_takes_nothing_is_dropped_after_the_write_timeout(log: ReplayLog) -> None:
    connection = FakeConnection()
    connection.open.clear()
    connection.untaken = 7
    viewer = viewer_of(log, connection, write_timeout=0.2)
    began = asyncio.get_running_loop().time()
    with pytest.raises(ConnectionError):
        await viewer.follow()
    assert 0.15 <= asyncio.get_running_loop().time() - began <= 2
    assert viewer.stalled
    assert not connection.finished


async def test_a_reader_that_takes_nothing_is_dropped_after_the_answers_end_too(log: ReplayLog) -> None:
    connection = FakeConnection()
    connection.takes_end = False
    connection.untaken = 7
    log.end()
    viewer = viewer_of(log, connection, write_timeout=0.2)
    with pytest.raises(ConnectionError):
        await viewer.follow()
    assert viewer.stalled


async def test_a_slow_reader_that_makes_progress_lives(log: ReplayLog) -> None:
    connection = FakeConnection()
    log.append(b"x" * 1000)
    connection.open.clear()
    connection.untaken = 1000
    viewer = viewer_of(log, connection, write_timeout=0.2)
    following = asyncio.create_task(viewer.follow())
    for _ in range(20):
        await asyncio.sleep(0.05)
        connection.untaken -= 10
    connection.open.set()
    log.end()
    await following
    assert not viewer.stalled
    assert connection.finished


async def test_a_blocked_reader_is_sent_no_ping_on_top(log: ReplayLog) -> None:
    connection = FakeConnection()
    connection.open.clear()
    following = asyncio.create_task(viewer_of(log, connection, heartbeat=0.05).follow())
    await asyncio.sleep(0.3)
    assert connection.written == [b"start\n\n"]
    connection.open.set()
    log.end()
    await following


async def test_a_viewer_that_is_cancelled_leaves_the_log(log: ReplayLog) -> None:
    following = asyncio.create_task(viewer_of(log, FakeConnection()).follow())
    await asyncio.sleep(0.01)
    following.cancel()
    await asyncio.wait([following])
    assert following.cancelled()
    assert not log._listeners


async def test_it_tells_when_to_come_back_once_and_in_a_ping(log: ReplayLog) -> None:
    """A ``retry`` alone would be a block without data, which some clients take for an event they cannot read."""
    connection = FakeConnection()
    viewer = viewer_of(log, connection)
    following = asyncio.create_task(viewer.follow())
    await asyncio.sleep(0.01)
    viewer.tell_retry(1234)
    await asyncio.sleep(0.01)
    publish(log, b"a\n\n")
    await asyncio.sleep(0.01)
    log.end([b"done\n\n"])
    await following
    assert connection.written == [b"start\n\n", ping(1234), b"a\n\n", b"done\n\n"]
    assert b"retry: 1234\n" in ping(1234)
    assert b"data: {}\n" in ping(1234)


async def test_the_past_comes_before_the_moment_to_come_back(log: ReplayLog) -> None:
    connection = FakeConnection()
    viewer = viewer_of(log, connection)
    viewer.tell_retry(1234)
    following = asyncio.create_task(viewer.follow())
    await asyncio.sleep(0.01)
    assert connection.written == [b"start\n\n", ping(1234)]
    log.end()
    await following


@pytest.mark.parametrize("reads", ["all the time", "only later"])
async def test_nothing_follows_the_last_event(log: ReplayLog, reads: str) -> None:
    """Told in the moment of the end, or while a write of it waits: who has ``[DONE]`` does not come back."""
    connection = FakeConnection()
    viewer = viewer_of(log, connection)
    following = asyncio.create_task(viewer.follow())
    await asyncio.sleep(0.01)
    if reads == "only later":
        connection.open.clear()
    log.end([b"done\n\n"])
    viewer.tell_retry(1234)
    await asyncio.sleep(0.01)
    connection.open.set()
    await following
    assert connection.written == [b"start\n\n", b"done\n\n"]


@pytest.mark.parametrize("way", ["is cancelled", "breaks", "takes no end"])
async def test_a_viewer_has_finished_only_when_the_response_has_its_end(log: ReplayLog, way: str) -> None:
    """The desk keeps an answer longer for those who lack something of it."""
    connection = FakeConnection()
    viewer = viewer_of(log, connection)
    following = asyncio.create_task(viewer.follow())
    await asyncio.sleep(0.01)
    if way == "takes no end":
        connection.takes_end = False
        log.end([b"done\n\n"])
        await asyncio.sleep(0.01)
        assert not viewer.finished
    if way == "is cancelled":
        following.cancel()
    else:
        connection.abort()
        publish(log, b"a\n\n")
    await asyncio.wait([following])
    assert following.cancelled() or isinstance(following.exception(), ConnectionError)
    assert not viewer.finished


async def test_a_viewer_that_was_sent_all_has_finished(log: ReplayLog) -> None:
    viewer = viewer_of(log, FakeConnection())
    log.end([b"done\n\n"])
    await viewer.follow()
    assert viewer.finished


async def test_one_that_takes_nothing_holds_nobody_else_up(log: ReplayLog) -> None:
    """Row B24: each has its own place in the log; what one does not take waits for it there."""
    stuck, other = FakeConnection(), FakeConnection()
    stuck.open.clear()
    following = [asyncio.create_task(viewer_of(log, connection).follow()) for connection in (stuck, other)]
    await asyncio.sleep(0.01)
    for number in range(50):
        publish(log, b"%d\n\n" % number)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    log.end([b"done\n\n"])
    await asyncio.sleep(0.01)
    assert other.finished
    assert len(other.written) == 52
    assert stuck.written == [b"start\n\n"]
    stuck.open.set()
    await asyncio.gather(*following)
    assert b"".join(stuck.written) == b"".join(other.written)
    assert len(stuck.written) == 2


# ---- Written to in the moment


class Taking(FakeConnection):
    """A connection that takes bytes without a wait, for as long as it is ``ready``; ``now`` are those."""

    def __init__(self) -> None:
        super().__init__()
        self.now: list[bytes] = []
        self.ready = True

    def write_now(self, data: bytes) -> bool:
        if self.ready:
            self.now.append(data)
            self.written.append(data)
        return self.ready


async def test_a_level_viewer_is_written_to_in_the_call_that_tells_of_a_batch(log: ReplayLog) -> None:
    """No switch to its task: that would cost more than the write."""
    connection = Taking()
    viewer = viewer_of(log, connection)
    log.publish()
    following = asyncio.create_task(viewer.follow())
    await asyncio.sleep(0.01)
    publish(log, b"a\n\n", b"b\n\n")
    assert connection.now == [b"a\n\nb\n\n"]
    log.extend([b"c\n\n"])
    log.extend([b"d\n\n", b"e\n\n"])
    assert connection.now == [b"a\n\nb\n\n", b"c\n\n", b"d\n\ne\n\n"]
    assert viewer.level
    await asyncio.sleep(0.01)
    log.end()
    await following
    assert b"".join(connection.written) == log.read(0, 1000), "its task does not write them once more"


async def test_the_start_goes_out_once_though_it_was_not_published(log: ReplayLog) -> None:
    """It was read from the log before anybody was told of it: the first batch holds it again."""
    connection = Taking()
    following = asyncio.create_task(viewer_of(log, connection).follow())
    await asyncio.sleep(0.01)
    assert connection.written == [b"start\n\n"]
    log.extend([b"a\n\n"])
    await asyncio.sleep(0.01)
    log.extend([b"b\n\n"])
    log.end()
    await following
    assert connection.written == [b"start\n\n", b"a\n\n", b"b\n\n"]


async def test_the_last_events_go_out_with_the_responses_end(log: ReplayLog) -> None:
    """In one segment, and only ``finish`` ends a response."""
    connection = Taking()
    viewer = viewer_of(log, connection)
    following = asyncio.create_task(viewer.follow())
    await asyncio.sleep(0.01)
    log.extend([b"a\n\n"])
    await asyncio.sleep(0.01)
    log.extend([b"b\n\n"])
    log.end([b"usage\n\n", b"done\n\n"])
    assert connection.now == [b"b\n\n"]
    assert not viewer.finished
    await following
    assert connection.written == [b"start\n\n", b"a\n\n", b"b\n\n", b"usage\n\ndone\n\n"]
    assert connection.finished
    assert viewer.finished


@pytest.mark.parametrize("turns", range(4))
async def test_who_refuses_falls_back_to_waiting_and_loses_nothing(log: ReplayLog, turns: int) -> None:
    """Nor gets it twice, wherever its task is when it takes bytes again."""
    connection = Taking()
    following = asyncio.create_task(viewer_of(log, connection).follow())
    await asyncio.sleep(0.01)
    log.publish()
    for number in range(20):
        connection.ready = number % 3 != 1
        if number % 5 == 2:
            connection.open.clear()
        log.extend([b"%d\n\n" % number])
        for _ in range(turns):
            await asyncio.sleep(0)
        connection.open.set()
    log.end([b"done\n\n"])
    await following
    assert b"".join(connection.written) == log.read(0, 1000)
    assert bool(connection.now) is (turns > 0), "the task that waits for its turn finds it in the log"


async def test_one_that_lags_is_written_to_by_its_task(log: ReplayLog) -> None:
    """What it has not been sent yet stands before the batch."""
    connection = Taking()
    connection.open.clear()
    following = asyncio.create_task(viewer_of(log, connection).follow())
    await asyncio.sleep(0.01)
    log.extend([b"a\n\n"])
    log.extend([b"b\n\n"])
    assert connection.now == []
    connection.open.set()
    await asyncio.sleep(0.01)
    assert connection.written == [b"start\n\n", b"a\n\nb\n\n"]
    log.extend([b"c\n\n"])
    assert connection.now == [b"c\n\n"]
    log.end()
    await following


async def test_what_is_written_in_the_moment_takes_the_place_of_pings(log: ReplayLog) -> None:
    connection = Taking()
    following = asyncio.create_task(viewer_of(log, connection, heartbeat=0.3).follow())
    await asyncio.sleep(0.01)
    for _ in range(20):
        log.extend([b"a\n\n"])
        await asyncio.sleep(0.03)
    log.end()
    await following
    assert len(connection.now) > 10
    assert PING not in connection.written


async def test_who_takes_nothing_of_what_was_written_in_the_moment_is_dropped(log: ReplayLog) -> None:
    connection = Taking()
    viewer = viewer_of(log, connection, write_timeout=0.2)
    log.publish()
    following = asyncio.create_task(viewer.follow())
    await asyncio.sleep(0.01)
    log.extend([b"a\n\n"])
    connection.untaken = 3
    assert connection.now == [b"a\n\n"]
    await asyncio.sleep(0.5)
    assert viewer.stalled
    log.end()
    await asyncio.wait([following])
