"""The replay log: appended once, read by everybody, bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
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
