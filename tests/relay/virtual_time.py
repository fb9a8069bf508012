"""An event loop in which hours pass in no time: when nothing is ready, the clock jumps to the next timer."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

__all__ = ["NothingIsDue", "VirtualTimeLoop", "run"]

T = TypeVar("T")

# s that each turn of the loop takes. On a clock that stood still, `due_at <= now` and `now - begun_at >= timeout` could
# differ for ever by the last bit of a float, and who waits for both would spin.
_STEP: Final = 1e-9


class NothingIsDue(Exception):
    """Everybody waits, and no timer is set: they would wait for ever."""


class _Clock(selectors.SelectSelector):
    """Says at once that nothing came, and lets pass the time for which it was to wait. No descriptor is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.at_rest: Callable[[], None] = lambda: None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise NothingIsDue
        if timeout > 0:
            self.at_rest()
        self.now += timeout + _STEP
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """For coroutines that wait for timers and for each other, and for no descriptor, thread or signal."""

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def call_at_rest(self, look: Callable[[], None]) -> None:
        """Call ``look`` whenever all that could happen in a moment has happened, just before time goes on."""
        self._clock.at_rest = look

    @property
    def timers(self) -> int:
        """How many are set."""
        handles: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return sum(not handle.cancelled() for handle in handles)


def run(main: Callable[[VirtualTimeLoop], Coroutine[Any, Any, T]]) -> T:
    """Run ``main(loop)`` in a loop of its own. Asserts that it leaves no task and no timer behind."""
    loop = VirtualTimeLoop()
    asyncio.set_event_loop(loop)
    try:
        result = loop.run_until_complete(main(loop))
        left = asyncio.all_tasks(loop)
        assert not left, f"left behind: {left}"
        assert not loop.timers, "a timer was left behind"
        return result
    finally:
        loop.call_at_rest(lambda: None)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(1000))
        asyncio.set_event_loop(None)
        loop.close()
