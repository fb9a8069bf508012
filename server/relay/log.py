"""The replay log: one answer's events as bytes, from which every viewer reads at its own pace."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate, islice
from typing import Protocol

__all__ = ["EventLog", "Listener", "LogFull", "PassingLog", "ReplayLog"]

# Called with what is new, and the log's size with it; returns whether it has taken that.
Listener = Callable[[bytes, int], bool | None]


class EventLog(Protocol):
    """What a reader needs of an answer's log, wherever the answer runs."""

    @property
    def ended(self) -> bool:
        """Whether no event will follow."""

    @property
    def next_number(self) -> int:
        """The number that the next event gets."""

    @property
    def size(self) -> int:
        """Bytes of all events so far."""

    def end_of(self, number: int) -> int:
        """The offset behind event ``number``. Raises IndexError if there is none yet."""

    def read(self, offset: int, limit: int) -> bytes:
        """At most ``limit`` bytes from ``offset`` on; empty for one who is level with the log."""

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener`` whenever there is more, or the end, with the bytes that are new (some of which it may have
        read already); it says whether it has now read all that there is. It must not (un)subscribe anyone, nor wait,
        nor raise."""

    def unsubscribe(self, listener: Listener) -> None: ...


class LogFull(Exception):
    """The event does not fit below the log's bound; nothing of it was appended."""


class ReplayLog:
    """Append-only, in memory, at most ``max_bytes`` of events; the events that end an answer always fit.

    Event N ends at a byte offset that :meth:`end_of` gives, so whoever has seen event N goes on from there: a replay is
    a slice. A viewer that is level with the log is told of more by its callback (:meth:`subscribe`).
    """

    __slots__ = ("_bytes", "_ends", "_listeners", "_max_bytes", "_told", "ended")

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = bytearray()
        self._ends = array("I")  # offset behind event N, at place N; 32 bits, as the bound of an answer is 1 GiB
        self._told = 0  # bytes that the listeners have been told of
        self._listeners: set[Listener] = set()
        self.ended = False

    @property
    def next_number(self) -> int:
        return len(self._ends)

    @property
    def size(self) -> int:
        return len(self._bytes)

    def end_of(self, number: int) -> int:
        if number < 0:
            raise IndexError(number)
        return self._ends[number]

    def append(self, event: bytes) -> None:
        """Add one event; tells nobody yet. Raises LogFull beyond the bound."""
        if len(self._bytes) + len(event) > self._max_bytes:
            raise LogFull
        self._bytes += event
        self._ends.append(len(self._bytes))

    def publish(self) -> None:
        """Tell the viewers of everything appended since they were told last: once a batch, however many events it
        has."""
        if self._told < len(self._bytes) or self.ended:
            self._tell(bytes(self._bytes[self._told :]))

    def extend(self, events: Sequence[bytes]) -> None:
        """Add a batch of events and tell the viewers; as :meth:`append` of each and :meth:`publish`, at less cost.

        Raises LogFull if not all of them fit, with none appended. The hot path.
        """
        if not events:
            return
        held = len(self._bytes)
        batch = self.append_all(events)
        if self._told == held:
            self._tell(batch)
        else:
            self.publish()

    def append_all(self, events: Sequence[bytes]) -> bytes:
        """Add events and return them in one; tells nobody yet. Raises LogFull as :meth:`extend`."""
        held = len(self._bytes)
        batch = b"".join(events)  # of a single one it is that one, and no copy
        if held + len(batch) > self._max_bytes:
            raise LogFull
        self._bytes += batch
        if len(events) == 1:
            self._ends.append(len(self._bytes))
        else:
            self._ends.extend(islice(accumulate(map(len, events), initial=held), 1, None))
        return batch

    def _tell(self, batch: bytes) -> None:
        self._told = size = len(self._bytes)
        for listener in self._listeners:
            listener(batch, size)

    def end(self, last: Sequence[bytes] = ()) -> None:
        """Add the events that end the answer, bound or no bound, and tell the viewers."""
        for event in last:
            self._bytes += event
            self._ends.append(len(self._bytes))
        # What was allocated ahead for a log that grows is given back: many answers are kept after their end.
        self._bytes = self._bytes[:]
        self._ends = self._ends[:]
        self.ended = True
        self.publish()

    def read(self, offset: int, limit: int) -> bytes:
        return bytes(self._bytes[offset : offset + limit])

    def subscribe(self, listener: Listener) -> None:
        self._listeners.add(listener)

    def unsubscribe(self, listener: Listener) -> None:
        self._listeners.discard(listener)


class PassingLog(ReplayLog):
    """A log for one reader, who cannot come back: what has been read is not kept, and ``max_bytes`` bounds what has
    not. Its events have no numbers."""

    __slots__ = ("_gone",)

    def __init__(self, *, max_bytes: int) -> None:
        super().__init__(max_bytes=max_bytes)
        self._gone = 0  # bytes that are no longer kept

    @property
    def next_number(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return self._gone + len(self._bytes)

    def end_of(self, number: int) -> int:
        raise IndexError(number)

    def append(self, event: bytes) -> None:
        if len(self._bytes) + len(event) > self._max_bytes:
            raise LogFull
        self._bytes += event

    def extend(self, events: Sequence[bytes]) -> None:
        if self.append_all(events):
            self.publish()

    def append_all(self, events: Sequence[bytes]) -> bytes:
        batch = b"".join(events)
        self.append(batch)
        return batch

    def publish(self) -> None:
        if self._told < self.size or self.ended:
            self._tell(bytes(self._bytes[max(0, self._told - self._gone) :]))

    def _tell(self, batch: bytes) -> None:
        self._told = size = self.size
        for listener in self._listeners:
            if listener(batch, size):
                self._forget(size)

    def end(self, last: Sequence[bytes] = ()) -> None:
        self._bytes += b"".join(last)
        self.ended = True
        self.publish()

    def read(self, offset: int, limit: int) -> bytes:
        self._forget(offset)
        return bytes(self._bytes[:limit])

    def _forget(self, offset: int) -> None:
        """The reader has taken all that stands before ``offset``."""
        if offset > self._gone:
            del self._bytes[: offset - self._gone]
            self._gone = offset
