"""The replay log: appended once, read by everybody, bounded."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.relay.log import LogFull, ReplayLog

EVENTS = [b"first\n\n", b"second\n\n", b"third\n\n"]


def log_of(events: list[bytes], max_bytes: int = 1000) -> ReplayLog:
    log = ReplayLog(max_bytes=max_bytes)
    for event in events:
        log.append(event)
    return log


@pytest.mark.parametrize("seen", range(3))
def test_whoever_has_seen_an_event_goes_on_behind_it(seen: int) -> None:
    """A replay is a slice: nothing lost, nothing twice."""
    log = log_of(EVENTS)
    assert log.read(log.end_of(seen), 1000) == b"".join(EVENTS[seen + 1 :])


@pytest.mark.parametrize("number", [-1, 3])
def test_an_event_that_is_not_there_has_no_end(number: int) -> None:
    with pytest.raises(IndexError):
        log_of(EVENTS).end_of(number)


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=20), st.integers(1, 30))
def test_reading_in_steps_gives_the_whole(events: list[bytes], limit: int) -> None:
    log = log_of(events)
    offset, read = 0, b""
    while piece := log.read(offset, limit):
        assert len(piece) <= limit
        offset += len(piece)
        read += piece
    assert read == b"".join(events)


def test_an_event_over_the_bound_leaves_the_log_as_it_was() -> None:
    log = log_of(EVENTS, max_bytes=25)
    with pytest.raises(LogFull):
        log.append(b"fourth\n\n")
    assert (log.size, log.next_number) == (len(b"".join(EVENTS)), 3)


def test_the_last_events_fit_into_a_full_log() -> None:
    """A cut answer must be told to be cut, however full the log is."""
    log = log_of(EVENTS, max_bytes=len(b"".join(EVENTS)))
    log.end([b"error\n\n"])
    assert log.ended
    assert log.read(log.end_of(2), 100) == b"error\n\n"


def test_viewers_are_told_once_a_batch_and_at_the_end() -> None:
    log, calls = ReplayLog(max_bytes=1000), []
    log.subscribe(lambda _batch, _size: calls.append(log.next_number))
    for event in EVENTS:
        log.append(event)
    assert calls == []
    log.publish()
    log.end([b"done\n\n"])
    assert calls == [3, 4]


def test_who_has_left_is_told_nothing() -> None:
    log, calls = ReplayLog(max_bytes=1000), []

    def listener(_batch: bytes, _size: int) -> None:
        calls.append(1)

    log.subscribe(listener)
    log.unsubscribe(listener)
    log.publish()
    assert calls == []


def test_an_ended_log_is_as_large_as_its_events_and_no_larger() -> None:
    """Many answers are kept after their end: what was allocated ahead is given back."""
    log = ReplayLog(max_bytes=1 << 20)
    while log.size < 500_000:
        log.append(b"event\n\n")
    log.end([b"done\n\n"])
    assert log._bytes.__alloc__() - log.size <= 64
    assert log.end_of(log.next_number - 1) == log.size
    assert log.read(log.end_of(log.next_number - 2), 100) == b"done\n\n"


def test_the_end_is_said_before_it_is_told() -> None:
    """Who is told of the last events finds the log ended, and need not be told again."""
    log, seen = ReplayLog(max_bytes=1000), []
    log.subscribe(lambda _batch, _size: seen.append((log.ended, log.next_number)))
    log.end([b"usage\n\n", b"done\n\n"])
    assert seen == [(True, 2)]


# ---- A batch


@given(st.lists(st.binary(max_size=20), max_size=3), st.lists(st.binary(max_size=20), min_size=1, max_size=6))
@example([], [b""])
def test_a_batch_is_as_appending_each_and_publishing(before: list[bytes], batch: list[bytes]) -> None:
    """The same bytes, numbers and calls; also where something was appended of which nobody has been told."""
    logs = [log_of(before), log_of(before)]
    calls: list[list[tuple[bytes, int]]] = [[], []]
    for log, called in zip(logs, calls, strict=True):
        log.subscribe(lambda data, size, called=called: called.append((data, size)))  # type: ignore[misc]
    logs[0].extend(batch)
    for event in batch:
        logs[1].append(event)
    logs[1].publish()
    ends = [[log.end_of(number) for number in range(log.next_number)] for log in logs]
    assert ends[0] == ends[1]
    assert logs[0].read(0, 1000) == logs[1].read(0, 1000) == b"".join(before + batch)
    assert [call for call in calls[0] if call[0]] == calls[1]


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=6), st.integers(1, 50))
def test_a_batch_over_the_bound_leaves_the_log_as_it_was(batch: list[bytes], lacking: int) -> None:
    """None of it is appended, and nobody is told."""
    size = len(b"".join(EVENTS))
    log, calls = log_of(EVENTS, max_bytes=size + max(0, len(b"".join(batch)) - lacking)), []
    log.publish()
    log.subscribe(lambda data, _size: calls.append(data))
    with pytest.raises(LogFull):
        log.extend(batch)
    assert (log.size, log.next_number, log.end_of(2)) == (size, 3, size)
    assert log.read(0, 1000) == b"".join(EVENTS)
    assert calls == []
    log.end([b"end\n\n"])
    assert calls == [b"end\n\n"]


def test_a_batch_that_fills_the_log_to_its_bound_fits() -> None:
    log = ReplayLog(max_bytes=len(b"".join(EVENTS)))
    log.extend(EVENTS)
    assert (log.size, log.next_number) == (len(b"".join(EVENTS)), 3)


def test_viewers_are_told_what_is_new_and_how_much_there_is() -> None:
    log, calls = ReplayLog(max_bytes=1000), []
    log.subscribe(lambda data, size: calls.append((data, size)))
    log.append(b"start\n\n")
    log.extend([b"a\n\n"])
    log.extend([b"b\n\n", b"c\n\n"])
    log.append(b"d\n\n")
    log.end([b"done\n\n"])
    assert calls == [(b"start\n\na\n\n", 10), (b"b\n\nc\n\n", 16), (b"d\n\ndone\n\n", 25)]


def test_nothing_new_tells_nobody() -> None:
    log, calls = log_of(EVENTS), []
    log.publish()
    log.subscribe(lambda data, _size: calls.append(data))
    log.publish()
    log.publish()
    assert calls == []
