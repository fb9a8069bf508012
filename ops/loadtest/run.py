"""One load, from its ramp to its last answer: who asks when, and when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ops.loadtest.arrivals import Backoff, poisson, ramp_starts
from ops.loadtest.client import Client, Departure
from ops.loadtest.objectives import Objectives
from ops.loadtest.overhead import Overhead, OverheadMeter
from ops.loadtest.prompts import Prompt
from ops.loadtest.record import Outcome, Record
from ops.loadtest.tally import Tally, Window

__all__ = ["Load", "Run", "RunResult"]

_SHORTEST_SLEEP_S = 0.001  # uvloop's timers count in milliseconds: a shorter one would spin


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of the endpoint. With a ``rate`` (requests a second) the loop is open, else ``streams`` close it.

    The measured window begins when ramp and warm-up are over, and lasts ``duration_s``, or until ``requests`` that
    began in it have ended. Then nothing new begins; what still runs has ``grace_s`` to end before it is cut off.
    """

    streams: int = 1
    rate: float | None = None
    max_streams: int = 1000  # open at once in the open loop; those that are due meanwhile wait, and that time counts
    think_s: float = 0.0  # in the closed loop, between an answer and the next question
    ramp_s: float = 0.0
    warmup_s: float = 0.0
    duration_s: float = 30.0
    grace_s: float = 10.0
    requests: int | None = None
    abort_rate: float = 0.0  # share of the requests that leave on purpose
    reconnect_rate: float = 0.0  # share that lose their connection on purpose and come back
    leave_within: int = 32  # tokens: behind which of them they leave is drawn evenly from 1 to this
    seed: int = 1


@dataclass(frozen=True, slots=True)
class RunResult:
    """A run's figures. ``interrupted``: it was ended before its time."""

    load: Load
    tally: Tally
    overhead: Overhead
    interrupted: bool


class _Due(NamedTuple):
    """A request that is to begin."""

    record: Record
    departure: Departure | None


class Run:
    """One load against one endpoint. ``tally`` can be read while it goes on; ``ended`` is told each record."""

    def __init__(
        self,
        load: Load,
        client: Client,
        prompts: Sequence[Prompt],
        objectives: Objectives,
        ended: Callable[[Record], None] = lambda record: None,
    ) -> None:
        begin_ns = time.monotonic_ns()
        window_ns = begin_ns + round((load.ramp_s + load.warmup_s) * 1e9)
        self.load = load
        self.tally = Tally(Window(begin_ns, window_ns, window_ns + round(load.duration_s * 1e9)), objectives)
        self._client = client
        self._prompts = prompts
        self._ended = ended
        # Each its own, so that the schedule and the lots do not depend on what the endpoint does.
        self._lots = random.Random(load.seed)  # noqa: S311  to be repeated, and no secret
        self._pauses = random.Random(load.seed)  # noqa: S311  likewise
        self._closing = asyncio.Event()  # nothing new begins
        self._interrupted = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()  # those whose end is the run's
        self._queue: deque[_Due] = deque()  # due in the open loop, and waiting for a place
        self._number = 0
        self._in_window = 0  # requests

    def interrupt(self) -> None:
        """End the run now: what still runs is cut off."""
        self._interrupted.set()

    async def run(self) -> RunResult:
        """Run to the end; never raises for what the endpoint does."""
        meter = OverheadMeter(self.tally)
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(meter.watch(), name="overhead")
            source = tasks.create_task(self._send_all(tasks), name="source")
            await self._until_over(source)
            for task in [source, *self._tasks]:
                task.cancel()
            await asyncio.wait([source, *self._tasks])
            watching.cancel()
        self._give_up_queue()
        return RunResult(self.load, self.tally, meter.result(), self._interrupted.is_set())

    async def _send_all(self, tasks: asyncio.TaskGroup) -> None:
        """Begin requests until it is time to stop, then wait for those that still run."""
        if self.load.rate is None:
            for number, start_s in enumerate(ramp_starts(self.load.streams, self.load.ramp_s)):
                stream = self._ask_in_turn(self.tally.window.run_ns + round(start_s * 1e9))
                self._add(tasks.create_task(stream, name=f"stream {number}"))
        else:
            await self._follow_schedule(tasks, self.load.rate)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _add(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _until_over(self, source: asyncio.Task[None]) -> None:
        """Wait for the first of: everything asked for has ended, window and grace are over, an interruption."""
        window = self.tally.window
        interrupted = asyncio.create_task(self._interrupted.wait())
        waiting: set[asyncio.Task[None] | asyncio.Task[bool]] = {source, interrupted}
        for seconds in (window.end_ns / 1e9 - time.monotonic(), self.load.grace_s):
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            self._closing.set()
            if source.done() or interrupted.done():
                window.end_ns = min(window.end_ns, time.monotonic_ns())
                break
        interrupted.cancel()

    # ---- closed loop

    async def _ask_in_turn(self, start_ns: int) -> None:
        """One stream of the closed loop: a question when the answer before it is over."""
        backoff = Backoff(self._pauses)
        await self._pause(start_ns)
        due_ns = start_ns
        while (due := self._next_due(due_ns)) is not None:
            if self._used_up:
                self._closing.set()  # streams that pause have nothing to wait for
            record = await self._ask(due)
            due_ns = time.monotonic_ns()
            if record.outcome.failed:
                due_ns += round(backoff.after_failure(record.retry_after_s) * 1e9)
            else:
                backoff.after_success()
                due_ns += round(self.load.think_s * 1e9)
            await self._pause(due_ns)

    async def _pause(self, until_ns: int) -> None:
        """Sleep until then, or until nothing new may begin."""
        while (left_s := (until_ns - time.monotonic_ns()) / 1e9) > 0 and not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(left_s, _SHORTEST_SLEEP_S)):
                    await self._closing.wait()

    # ---- open loop

    async def _follow_schedule(self, tasks: asyncio.TaskGroup, rate: float) -> None:
        """Begin each request when it is due, whatever has become of those before it."""
        for due_s in poisson(rate, self.load.ramp_s, random.Random(self.load.seed)):  # noqa: S311  likewise
            due_ns = self.tally.window.run_ns + round(due_s * 1e9)
            await self._pause(due_ns)
            due = self._next_due(due_ns)
            if due is None:
                return
            if len(self._tasks) < self.load.max_streams:
                self._add(tasks.create_task(self._ask_and_follow(due), name=f"request {due.record.number}"))
            else:
                due.record.queued = True
                self._queue.append(due)

    async def _ask_and_follow(self, due: _Due) -> None:
        """Ask, and then ask what waits for a place: this one's has come free."""
        await self._ask(due)
        while self._queue and not self._closing.is_set():
            await self._ask(self._queue.popleft())

    def _give_up_queue(self) -> None:
        now_ns = time.monotonic_ns()
        for record, _ in self._queue:
            record.end(Outcome.UNSENT, now_ns)
            self.tally.never_began(record)
            self._ended(record)

    # ---- both

    @property
    def _used_up(self) -> bool:
        return self.load.requests is not None and self._in_window >= self.load.requests

    def _next_due(self, due_ns: int) -> _Due | None:
        """The next request, or None where none may begin any more. It is due that counts: one that the tester comes to
        late, when the window is over already, is begun all the same, or the tester's own lateness would hide itself."""
        in_window = due_ns in self.tally.window
        if due_ns >= self.tally.window.end_ns or (in_window and self._used_up):
            return None
        self._in_window += in_window
        number = self._number
        self._number += 1
        record = Record(number=number, intended_ns=due_ns, prompt=number % len(self._prompts))
        return _Due(record, self._draw_departure())

    async def _ask(self, due: _Due) -> Record:
        record = due.record
        record.started_ns = time.monotonic_ns()
        self.tally.began(record)
        try:
            await self._client.ask(self._prompts[record.prompt], record, self.tally, due.departure)
        finally:
            if not record.ended_ns:
                record.end(Outcome.CUT_OFF, time.monotonic_ns())
            self.tally.ended(record)
            self._ended(record)
        return record

    def _draw_departure(self) -> Departure | None:
        """Whether this request is to be cut on purpose; two draws each time, so that a seed gives one sequence."""
        lot, after_tokens = self._lots.random(), self._lots.randint(1, self.load.leave_within)
        if lot < self.load.abort_rate:
            return Departure(after_tokens, come_back=False)
        if lot < self.load.abort_rate + self.load.reconnect_rate:
            return Departure(after_tokens, come_back=True)
        return None
