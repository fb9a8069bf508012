"""When an upstream is asked again: how long to wait, and how many further requests all answers together may cause."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

__all__ = ["RetryBudget", "backoff"]

_FIRST_DELAY: Final = 0.25  # s; doubled for each further try
_LONGEST_DELAY: Final = 8.0  # s

_EACH_ANSWER: Final = 0.2  # further requests that an answer puts into the budget: one for five
_EACH_SECOND: Final = 10.0  # and what comes back by itself, so that a server with few answers can retry at all
_MOST: Final = 100.0


def backoff(tries: int, *, jitter: Callable[[], float] = random.random) -> float:
    """Seconds to wait before the next try: exponential, with jitter so that the refused do not come back together.

    ``tries`` counts those that failed, from 1; ``jitter`` gives a value in [0, 1).
    """
    return float(min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** (tries - 1)) * (0.5 + jitter() / 2))


class RetryBudget:
    """Bounds the requests beyond the first one of each answer (further tries, hedges), over all answers.

    Retries by answer alone would multiply the load on an endpoint just when it cannot bear it: a thousand clients, each
    with two further tries, are two thousand requests more. No I/O; ``clock`` gives seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._balance = _MOST
        self._as_of = clock()

    def deposit(self) -> None:
        """An answer has begun."""
        self._balance += _EACH_ANSWER  # bounded when something is taken

    def take(self) -> bool:
        """Pay for one further request; false where there is nothing left."""
        now = self._clock()
        self._balance = min(_MOST, self._balance + (now - self._as_of) * _EACH_SECOND)
        self._as_of = now
        if self._balance < 1:
            return False
        self._balance -= 1
        return True
