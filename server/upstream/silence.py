"""The deadline that content, and nothing else, pushes back."""

from __future__ import annotations

import asyncio
from types import TracebackType

__all__ = ["SilenceDeadline"]


class SilenceDeadline:
    """Bounds the silence before and between tokens; a context manager that raises TimeoutError like
    ``asyncio.timeout``.

    ``first`` (s) runs from entering to the first :meth:`heard`, ``idle`` (s) from each :meth:`heard` to the next.
    Hearing costs one reading of the clock: the timer is not moved, it finds on waking that it is early and sleeps on.
    """

    __slots__ = ("_cancelling", "_first", "_idle", "_loop", "_task", "_timer", "_wakes_at", "deadline", "expired")

    def __init__(self, *, first: float, idle: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._first = first
        self._idle = idle
        self._task: asyncio.Task[object] | None = None  # while it is entered
        self.deadline = 0.0  # s, loop clock
        self.expired = False

    def __enter__(self) -> SilenceDeadline:
        task = asyncio.current_task()
        if task is None or self.deadline:
            raise RuntimeError("a deadline can be entered once, in a task")
        self._task = task
        self._cancelling = task.cancelling()
        self.deadline = self._loop.time() + self._first
        self._set_timer(self.deadline)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        # The task is forgotten: who keeps us would be part of a cycle with it.
        task, self._task = self._task, None
        # As asyncio.timeout does: the cancellation ends here if it was ours, and nobody else asked for one.
        if self.expired and task is not None:
            alone = task.uncancel() <= self._cancelling
            if alone and exc_type is asyncio.CancelledError:
                raise TimeoutError from exc

    @property
    def left(self) -> float:
        """Seconds that the silence may still last."""
        return self.deadline - self._loop.time()

    def heard(self) -> None:
        """Content has come: the idle time starts anew."""
        deadline = self._loop.time() + self._idle
        if deadline < self._wakes_at:
            # The first token came early in a first-token time longer than the idle time.
            self._timer.cancel()
            self._set_timer(deadline)
        self.deadline = deadline

    def _wake(self) -> None:
        if self._task is not None and self.left <= 0:
            self.expired = True
            self._task.cancel()
        else:
            self._set_timer(self.deadline)

    def _set_timer(self, at: float) -> None:
        self._wakes_at = at
        self._timer = self._loop.call_at(at, self._wake)
