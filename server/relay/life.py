"""An answer's life: its states, the moves between them, and when the next one is due. No I/O and no timer.

 AWAITED ⇄ VIEWED ──ends──▶ REPLAYED ⇄ KEPT ──window over──▶ FORGOTTEN
    └──── ends, or nobody came in time ─▲

The first two change places as viewers come and go, and so do the next two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from enum import Enum
from typing import Final

__all__ = ["MOVES", "Life", "Outcome", "State"]

# Where the grace is 0, a viewer that drops ends the answer at once; but one that never came has dropped nothing, and
# whoever asks by POST needs a moment to come.
_FIRST_VIEWER: Final = 5.0  # s


class State(Enum):
    """Where an answer is in its life."""

    __hash__ = object.__hash__  # there is one of each; an Enum's own is a call in Python

    AWAITED = "awaited"  # it runs, and nobody views it: yet, or any more
    VIEWED = "viewed"  # it runs, and somebody views it
    REPLAYED = "replayed"  # it has ended, and somebody still reads it, or again
    KEPT = "kept"  # it has ended, and nobody reads it, but may come back to
    FORGOTTEN = "forgotten"  # nobody finds it any more


# Every move that an answer may make. It runs in the first two states; no move leads back to them: it ends once.
MOVES: Final = {
    State.AWAITED: frozenset({State.VIEWED, State.KEPT}),
    State.VIEWED: frozenset({State.AWAITED, State.REPLAYED}),
    State.REPLAYED: frozenset({State.KEPT}),
    State.KEPT: frozenset({State.REPLAYED, State.FORGOTTEN}),
    State.FORGOTTEN: frozenset[State](),
}


class Outcome(Enum):
    """How an answer ended; each answer has exactly one."""

    COMPLETED = "completed"
    STOPPED = "stopped"  # its client said so
    CLIENT_GONE = "client_gone"  # nobody was left to read it
    UPSTREAM_ERROR = "upstream_error"
    TIMEOUT = "timeout"  # first token, idle, or the whole answer
    TOO_LARGE = "too_large"
    TOKEN_LIMIT = "token_limit"  # noqa: S105 - the client's LLM tokens were used up
    INTERRUPTED = "interrupted"  # the server went down
    INTERNAL_ERROR = "internal_error"


class Life:
    """Follows one answer and its viewers.

    ``grace`` (s, infinite for "always to its end") is how long it goes on after its last viewer that can come back has
    dropped; ``window`` (s) how long it is kept after its end. When ``due_at`` has come, an answer that runs is to be
    ended and one that has ended is to be forgotten: both are the owner's to do, as it holds what they concern.
    """

    __slots__ = ("_clock", "_grace", "_kept_until", "_return_until", "_window", "due_at", "outcome", "state", "viewers")

    def __init__(self, *, grace: float, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace = grace
        self._window = window
        self._clock = clock
        self._return_until = -math.inf  # until then one of those who dropped may be back
        self._kept_until = -math.inf
        self.state = State.AWAITED
        self.outcome: Outcome | None = None
        self.viewers = 0
        self.due_at: float | None = clock() + (grace or _FIRST_VIEWER)  # s of the clock; None while it is viewed

    @property
    def running(self) -> bool:
        return self.outcome is None

    @property
    def overdue(self) -> bool:
        return self.due_at is not None and self._clock() >= self.due_at

    def join(self) -> None:
        """Somebody comes to view it."""
        self.viewers += 1
        if self.viewers == 1:
            self._move(State.VIEWED if self.running else State.REPLAYED)
            self.due_at = None

    def leave(self, *, may_return: bool) -> None:
        """A viewer leaves; ``may_return``: it has not read all, and its client knows how to go on. An answer that has
        ended is kept no longer for it: whoever came and went could keep it for ever."""
        now = self._clock()
        self.viewers -= 1
        if may_return:
            self._return_until = max(self._return_until, now + self._grace)
        if self.viewers:
            return
        if self.running:
            self._move(State.AWAITED)
            self.due_at = max(now, self._return_until)
        else:
            self._move(State.KEPT)
            self.due_at = self._kept_until

    def end(self, outcome: Outcome) -> None:
        """It has ended, once and for all."""
        self._move(State.REPLAYED if self.viewers else State.KEPT)
        self.outcome = outcome
        self._kept_until = self._clock() + self._window
        self.due_at = None if self.viewers else self._kept_until

    @property
    def given_up(self) -> bool:
        """Whether its window was cut short."""
        return not self.running and self._kept_until == -math.inf

    def give_up(self) -> None:
        """Cut its window short: it is to be forgotten as soon as nobody reads it."""
        self._kept_until = -math.inf
        if self.state is State.KEPT:
            self.due_at = self._kept_until

    def forget(self) -> None:
        self._move(State.FORGOTTEN)
        self.due_at = None

    def _move(self, state: State) -> None:
        if state not in MOVES[self.state]:
            raise AssertionError(f"an answer cannot go from {self.state} to {state}")
        self.state = state
