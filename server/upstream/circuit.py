"""A circuit breaker for one upstream: left out while it keeps failing, then tried by one request at a time.

 CLOSED ──keeps failing──▶ OPEN ──after a pause──▶ HALF_OPEN ──one succeeded──▶ CLOSED
                             ▲──── that one failed ────┘

No I/O and no timer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final

__all__ = ["Circuit", "CircuitState", "Permit"]

_IN_A_ROW: Final = 5  # failures that open it
_SHARE: Final = 0.5  # of those in the window that open it, once there are enough to tell
_ENOUGH: Final = 20
_WINDOW: Final = 30.0  # s
_SLICE: Final = 1.0  # s; how finely the window is counted, whatever the number of requests
_PAUSE: Final = 10.0  # s for which the upstream is left out


class CircuitState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Circuit:
    """Counts how the requests to one upstream end, and says whether it may be asked. ``clock`` gives seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open = False
        self._probes_from = 0.0  # s of the clock, while it is open
        self._probing = False  # a probe is out
        self._openings = 0  # so far
        self._in_a_row = 0
        self._counts: deque[_Slice] = deque()  # of the window, the oldest first

    @property
    def state(self) -> CircuitState:
        if not self._open:
            return CircuitState.CLOSED
        return CircuitState.OPEN if self._clock() < self._probes_from else CircuitState.HALF_OPEN

    @property
    def probed_in(self) -> float:
        """Seconds until the next request is let through; 0 while it is closed, or a probe is out."""
        return max(0.0, self._probes_from - self._clock()) if self._open else 0.0

    def enter(self) -> Permit | None:
        """Leave to send one request; None while the upstream is left out. Each permit is to be settled."""
        if not self._open:
            return Permit(self, self._openings)
        if self._probing or self._clock() < self._probes_from:
            return None
        self._probing = True
        return Permit(self, self._openings)

    def _settle(self, openings: int, ok: bool | None) -> None:
        if openings != self._openings:
            return  # asked before it opened: that says nothing about now, nor when it has closed again
        if self._open:
            self._probing = False
            if ok:
                self._open = False
                self._in_a_row = 0
                self._counts.clear()
            elif ok is not None:
                self._probes_from = self._clock() + _PAUSE
        elif ok is not None:
            self._count(ok)
            if not ok and (self._in_a_row >= _IN_A_ROW or self._fails_too_often()):
                self._open = True
                self._openings += 1
                self._probes_from = self._clock() + _PAUSE

    def _count(self, ok: bool) -> None:
        now = self._clock()
        self._in_a_row = 0 if ok else self._in_a_row + 1
        if not self._counts or now >= self._counts[-1].began_at + _SLICE:
            self._counts.append(_Slice(now))
        while self._counts[0].began_at <= now - _WINDOW:
            self._counts.popleft()
        self._counts[-1].requests += 1
        self._counts[-1].failures += not ok

    def _fails_too_often(self) -> bool:
        requests = sum(counted.requests for counted in self._counts)
        return requests >= _ENOUGH and sum(counted.failures for counted in self._counts) >= _SHARE * requests


class Permit:
    """Leave for one request. What became of it is said once; what is said later does not count."""

    __slots__ = ("_circuit", "_openings")

    def __init__(self, circuit: Circuit, openings: int) -> None:
        self._circuit: Circuit | None = circuit
        self._openings = openings  # of the circuit's before it was given

    def succeeded(self) -> None:
        """The upstream answers."""
        self._settle(True)

    def failed(self) -> bool:
        """The upstream is at fault. Returns whether this opened its circuit."""
        circuit = self._circuit
        closed = circuit is not None and circuit.state is CircuitState.CLOSED
        self._settle(False)
        return closed and circuit is not None and circuit.state is not CircuitState.CLOSED

    def withdrawn(self) -> None:
        """Nothing can be said about the upstream: the request was at fault, or nobody waited for its end."""
        self._settle(None)

    def _settle(self, ok: bool | None) -> None:
        circuit, self._circuit = self._circuit, None
        if circuit is not None:
            circuit._settle(self._openings, ok)


class _Slice:
    """A second of the window."""

    __slots__ = ("began_at", "failures", "requests")

    def __init__(self, began_at: float) -> None:
        self.began_at = began_at
        self.requests = 0
        self.failures = 0
