"""Deadlines that are all equally far away when they are set: one timer serves them all."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

__all__ = ["Deadlines"]

_TICK: Final = 0.001  # s

_Item = TypeVar("_Item", bound=Hashable)


class Deadlines(Generic[_Item]):
    """Calls ``expired`` with each item when ``length`` (s, perhaps infinite) has gone by since it was added.

    A timer of the loop for each would cost half a kilobyte. Here the first to come is the first to go, so one timer
    sleeps until then. ``clock`` gives seconds as the loop's own does.
    """

    def __init__(
        self, length: float, expired: Callable[[_Item], object], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._length = length
        self._expired = expired
        self._clock = clock
        # s of the clock, the first one first. In a plain dictionary each look at the first steps over those that went.
        self._due_at = OrderedDict[_Item, float]()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, item: _Item) -> None:
        """Its time begins; once for each."""
        self._due_at[item] = self._clock() + self._length
        if self._timer is None:
            self._sleep()

    def discard(self, item: _Item) -> None:
        """It needs no deadline any more, or never had one."""
        self._due_at.pop(item, None)
        if not self._due_at:
            self._rest()

    def close(self) -> None:
        """Forget all of them."""
        self._due_at.clear()
        self._rest()

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sleep(self) -> None:
        """Until the first one is due."""
        due_at = next(iter(self._due_at.values()), math.inf)
        if due_at < math.inf:
            # uvloop reckons in whole milliseconds and may come half of one early: it would then be called again and
            # again until that has gone by.
            at = max(due_at, self._clock() + _TICK)
            self._timer = asyncio.get_running_loop().call_at(at, self._wake)

    def _wake(self) -> None:
        now = self._clock()
        try:
            while self._due_at:
                item, due_at = next(iter(self._due_at.items()))
                if due_at > now:
                    break
                del self._due_at[item]
                self._expired(item)
        finally:
            self._rest()  # who was called may have set the timer
            self._sleep()
