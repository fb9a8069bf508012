"""The replay log: appended once, read by everybody, bounded."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.relay.log import LogFull, PassingLog, ReplayLog

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


# ---- A log for one reader, who cannot come back


class Reader:
    """Reads a log as a viewer does: what comes while it is level it takes at once if it is ``quick``, the rest when it
    gets round to it."""

    def __init__(self, log: PassingLog, *, quick: bool = True) -> None:
        self.log = log
        self.quick = quick
        self.taken = b""
        log.subscribe(self._listen)

    def read(self, limit: int = 1000) -> bytes:
        """The next bytes that have not been taken."""
        data = self.log.read(len(self.taken), limit)
        self.taken += data
        return data

    def read_all(self) -> bytes:
        """All of them; with the look that finds nothing more, the log knows it."""
        before = len(self.taken)
        while self.read():
            pass
        return self.taken[before:]

    def _listen(self, batch: bytes, size: int) -> bool:
        if not self.quick or len(self.taken) + len(batch) != size:
            return False
        self.taken += batch
        return True


def test_what_has_been_read_is_not_kept() -> None:
    """Section 5: nobody can come back for it; a log that kept it would cost memory for nothing."""
    log = PassingLog(max_bytes=10)
    reader = Reader(log, quick=False)
    for _ in range(100):
        log.extend([b"01234", b"56789"])
        assert reader.read_all() == b"0123456789"
    assert log.size == len(reader.taken) == 1000
    assert len(log._bytes) == 0


def test_who_takes_each_batch_at_once_leaves_it_empty() -> None:
    """The hot path: no byte waits in it."""
    log = PassingLog(max_bytes=10)
    reader = Reader(log)
    for _ in range(100):
        log.extend([b"0123456789"])
        assert len(log._bytes) == 0
    assert reader.taken == b"0123456789" * 100


def test_the_bound_is_on_what_has_not_been_read() -> None:
    """SLUICE_MAX_ANSWER_BYTES, for a reader that lags."""
    log = PassingLog(max_bytes=10)
    reader = Reader(log, quick=False)
    log.extend([b"012345"])
    with pytest.raises(LogFull):
        log.extend([b"67", b"890"])
    with pytest.raises(LogFull):
        log.append(b"67890")
    assert log.size == 6, "and nothing of it was appended"
    log.extend([b"6789"])
    assert reader.read_all() == b"0123456789"
    log.extend([b"0123456789"])
    assert reader.read_all() == b"0123456789"


def test_a_batch_larger_than_the_bound_is_too_much_for_the_quickest() -> None:
    log = PassingLog(max_bytes=10)
    reader = Reader(log)
    with pytest.raises(LogFull):
        log.extend([b"01234", b"56789", b"0"])
    assert reader.taken == b""


def test_who_has_not_taken_a_batch_finds_it_later() -> None:
    log = PassingLog(max_bytes=100)
    reader = Reader(log, quick=False)
    log.extend([b"a"])
    reader.quick = True
    log.extend([b"b"])
    assert reader.taken == b"", "it lags, and must not take what is not next"
    assert reader.read() == b"ab"
    log.extend([b"c"])
    assert reader.taken == b"abc"


def test_what_came_before_the_reader_is_there_when_it_comes() -> None:
    log = PassingLog(max_bytes=100)
    log.extend(EVENTS)
    assert Reader(log).read() == b"".join(EVENTS)


def test_its_events_have_no_numbers() -> None:
    """Section 5: no id; so nobody can ask for what is behind one."""
    log = PassingLog(max_bytes=100)
    log.extend(EVENTS)
    assert log.next_number == 0
    with pytest.raises(IndexError):
        log.end_of(0)


def test_an_empty_batch_is_nothing() -> None:
    log, calls = PassingLog(max_bytes=100), []
    log.subscribe(lambda batch, _size: calls.append(batch))
    log.extend([])
    log.extend([b"", b""])
    assert calls == []


@pytest.mark.parametrize("quick", [True, False])
def test_its_last_events_fit_however_full_it_is(quick: bool) -> None:
    """A cut answer must be told to be cut."""
    log = PassingLog(max_bytes=10)
    reader = Reader(log, quick=quick)
    log.extend([b"0123456789"])
    log.end([b"error", b"end"])
    assert log.ended
    assert log.size == 18
    reader.read()
    assert reader.taken == b"0123456789errorend"


def test_its_end_is_told_though_nothing_comes_with_it() -> None:
    """The answer that is not streamed has no last event; its reader waits for the end all the same."""
    log, seen = PassingLog(max_bytes=100), []
    log.subscribe(lambda batch, size: seen.append((batch, size, log.ended)))
    log.extend([b"all"])
    log.end()
    assert seen == [(b"all", 3, False), (b"", 3, True)]


def test_events_appended_one_by_one_are_told_together() -> None:
    log, calls = PassingLog(max_bytes=100), []
    log.subscribe(lambda batch, size: calls.append((batch, size)))
    for event in EVENTS:
        log.append(event)
    assert calls == []
    log.publish()
    log.publish()
    assert calls == [(b"".join(EVENTS), len(b"".join(EVENTS)))]


def test_a_reader_that_is_ahead_of_what_was_told_is_told_what_it_lacks() -> None:
    """It may read between an event and its being told."""
    log, calls = PassingLog(max_bytes=100), []
    reader = Reader(log, quick=False)
    log.subscribe(lambda batch, size: calls.append((batch, size)))
    log.append(b"012345")
    reader.read_all()
    log.append(b"0123456789")
    log.publish()
    assert calls == [(b"0123456789", 16)]
    assert reader.read() == b"0123456789"


def test_a_second_look_from_the_start_takes_nothing_from_the_reader() -> None:
    """What is gone is gone, and what is not stays."""
    log = PassingLog(max_bytes=100)
    reader = Reader(log)
    log.extend([b"01"])
    reader.quick = False
    log.extend([b"23456789"])
    log.read(0, 1000)
    assert reader.read() == b"23456789"


STEPS = st.lists(
    st.lists(st.binary(min_size=1, max_size=6), max_size=3)
    | st.integers(1, 12)
    | st.sampled_from(["quick", "slow", "append", "publish"]),
    max_size=40,
)


@given(STEPS)
def test_any_reader_gets_all_of_it_once_and_in_order(steps: list[list[bytes] | int | str]) -> None:
    """Whatever it takes at once, and however it reads the rest; what waits for it stays within the bound."""
    log = PassingLog(max_bytes=12)
    reader = Reader(log)
    written = b""
    for step in steps:
        new = b"".join(step) if isinstance(step, list) else b"x" if step == "append" else b""
        fits = len(log._bytes) + len(new) <= 12
        with contextlib.nullcontext() if fits else pytest.raises(LogFull):
            if isinstance(step, list):
                log.extend(step)
            elif step == "append":
                log.append(new)
        written += new if fits else b""
        if isinstance(step, int):
            reader.read(step)
        elif step == "publish":
            log.publish()
        elif step in ("quick", "slow"):
            reader.quick = step == "quick"
        assert log.size == len(written)
        assert written.startswith(reader.taken)
    log.end([b"the end"])
    while reader.read(5):
        pass
    assert reader.taken == written + b"the end"
