"""Two upstreams at once: where the first is slow to speak, the next is asked too, and the first to speak is relayed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any

from server.errors import UpstreamUnreachable
from server.upstream.attempt import AttemptFailed
from server.upstream.circuit import Permit
from server.upstream.endpoint import Upstream
from server.upstream.progress import Progress
from server.upstream.retry import RetryBudget
from server.wire.chunks import ChunkSink

__all__ = ["Ask", "Race", "all_left_out"]

Ask = Callable[[Upstream, Permit, Progress], Coroutine[Any, Any, None]]  # raises AttemptFailed


def all_left_out(upstreams: Iterable[Upstream]) -> AttemptFailed:
    """There is nobody to be asked at the moment."""
    wait = min((upstream.circuit.probed_in for upstream in upstreams), default=0.0)
    return AttemptFailed(UpstreamUnreachable(retry_after=max(1, math.ceil(wait))), "left out")


class Race:
    """One answer, for which at most two upstreams are asked at a time (``SLUICE_HEDGE_AFTER``).

    The next one is asked when the one that runs alone has not spoken for ``hedge_after`` (s), at the cost of one from
    ``budget``, or at once when it has failed. Each runs in a task of its own; none outlives :meth:`run`. A failure that
    nobody else could mend still leaves the other one its time.
    """

    def __init__(self, hedge_after: float | None, budget: RetryBudget, sink: ChunkSink) -> None:
        self._hedge_after = hedge_after
        self._budget = budget
        self._sink = sink
        self._running: dict[asyncio.Task[None], Progress] = {}
        self._winner: Progress | None = None
        self._final: AttemptFailed | None = None  # a failure after which nobody else is asked
        self._over = False

    async def run(self, upstreams: Sequence[Upstream], ask: Ask) -> None:
        """Relay the answer of whoever speaks first. Raises AttemptFailed: the last one, if all fail."""
        waiting = iter(upstreams)
        try:
            if not self._start_next(waiting, ask):
                raise all_left_out(upstreams)
            while True:
                alone = self._winner is None and self._final is None and len(self._running) == 1
                done, _ = await asyncio.wait(
                    self._running,
                    timeout=self._hedge_after if alone else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done and self._winner is None and not (self._budget.take() and self._start_next(waiting, ask)):
                    self._hedge_after = None
                for task in done:
                    if self._is_over(task):
                        return
                    if not self._running and (self._final or not self._start_next(waiting, ask)):
                        raise self._final or task.exception() or all_left_out(upstreams)
        finally:
            await self._stop()

    def _start_next(self, waiting: Iterator[Upstream], ask: Ask) -> bool:
        """Ask the next upstream that is not left out; false where there is none."""
        for upstream in waiting:
            permit = upstream.circuit.enter()
            if permit is not None:
                self._start(upstream, permit, ask)
                return True
        return False

    def _start(self, upstream: Upstream, permit: Permit, ask: Ask) -> None:
        progress = Progress(self._sink, self._claim)
        task = asyncio.create_task(ask(upstream, permit, progress), name="upstream")
        # Where it is cancelled before its first step, nobody else would give the permit back: were it that of a probe,
        # the upstream would be left out for ever.
        task.add_done_callback(lambda _: permit.withdrawn())
        self._running[task] = progress

    def _claim(self, progress: Progress) -> bool:
        """Somebody speaks: the first one is relayed, and the others are closed."""
        if self._winner is not None or self._over:
            return False
        self._winner = progress
        for task, other in self._running.items():
            if other is not progress:
                task.cancel()
        return True

    def _is_over(self, task: asyncio.Task[None]) -> bool:
        """Whether the answer has its end with that task's. Raises what the winner's came to."""
        progress = self._running.pop(task)
        if task.cancelled():  # it was too late
            return False
        failure = task.exception()
        if self._winner is None and isinstance(failure, AttemptFailed):
            if not failure.elsewhere:
                self._final = self._final or failure
            return False
        if self._winner not in (None, progress):
            return False
        task.result()
        return True

    async def _stop(self) -> None:
        """Close what still runs; who speaks only now is not relayed behind a failure."""
        self._over = True
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
