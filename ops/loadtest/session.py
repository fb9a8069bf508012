"""What one invocation does: it opens client and display, puts the load on or searches, and tells what it found."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import signal
from collections.abc import Iterator
from dataclasses import dataclass

from ops.loadtest.capacity import Capacity, counted, find_capacity
from ops.loadtest.client import Client
from ops.loadtest.jsonl import RecordLog
from ops.loadtest.options import Options
from ops.loadtest.progress import Display, open_display
from ops.loadtest.record import Record
from ops.loadtest.run import Load, Run
from ops.loadtest.summary import Summary, summarise
from ops.loadtest.target import Target

__all__ = ["Findings", "Interruption", "measure"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Ctrl-C and SIGTERM: the first ends the run that goes on, with its figures; the second is the system's to hear."""

    def __init__(self) -> None:
        self.came = False
        self._run: Run | None = None

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._take)
        try:
            yield
        finally:
            self._disarm()

    @contextlib.contextmanager
    def ending(self, run: Run) -> Iterator[None]:
        """The run that an interruption ends, while the block lasts."""
        self._run = run
        if self.came:
            run.interrupt()
        try:
            yield
        finally:
            self._run = None

    def _take(self) -> None:
        self.came = True
        self._disarm()
        if self._run is not None:
            self._run.interrupt()

    def _disarm(self) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)


@dataclass(frozen=True, slots=True)
class Findings:
    """``summary`` is that of the run, or of the last step of a search that held, or else of its last."""

    summary: Summary
    capacity: Capacity | None = None

    @property
    def interrupted(self) -> bool:
        return self.summary.interrupted or (self.capacity is not None and self.capacity.interrupted)


async def measure(options: Options, target: Target, log: RecordLog | None) -> Findings:
    """Put the load on, or search; never raises for what the endpoint does."""
    interruption = Interruption()
    async with (
        open_display(quiet=options.quiet) as display,
        Client(target, timeout_s=options.timeout_s, keep_alive=options.keep_alive, verify=options.verify) as client,
    ):
        # What is there by now stays; a collection need not look through it while the tester should read tokens.
        gc.freeze()
        session = _Session(options, client, display, log, interruption)
        with interruption.armed():
            return await session.search() if options.find_capacity else Findings(await session.run(options.load))


class _Session:
    def __init__(
        self,
        options: Options,
        client: Client,
        display: Display,
        log: RecordLog | None,
        interruption: Interruption,
    ) -> None:
        self._options = options
        self._client = client
        self._display = display
        self._log = log
        self._interruption = interruption

    async def run(self, load: Load) -> Summary:
        options = self._options

        def ended(record: Record) -> None:
            if self._log is not None:
                streams = load.streams if options.find_capacity else None
                self._log.write(record, streams=streams, measured=record.intended_ns in run.tally.window)

        run = Run(load, self._client, options.prompts, options.objectives, ended)
        title = counted(load.streams) if load.rate is None else f"{load.rate:g} requests/s"
        with self._interruption.ending(run):
            async with self._display.showing(run, title):
                return summarise(await run.run(), options.objectives)

    async def search(self) -> Findings:
        load = self._options.load

        async def measure_step(streams: int) -> Summary:
            return await self.run(dataclasses.replace(load, streams=streams))

        capacity = await find_capacity(load.streams, self._options.max_streams, measure_step, self._display.say)
        held = [step for step in capacity.steps if step.held and step.streams == capacity.streams]
        return Findings((held or capacity.steps)[-1].summary, capacity)
