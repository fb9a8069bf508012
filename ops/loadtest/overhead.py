"""What the tester itself costs: its processor time, and how late its event loop is. Measured in every run, and told.

A tester that lacks processor time reads tokens late and calls it the endpoint's latency; one cannot see that in the
latencies, only here.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version

from ops.loadtest.metrics import Distribution, Histogram
from ops.loadtest.tally import Tally

__all__ = ["CPU_BOUND", "LAG_BOUND_MS", "Overhead", "OverheadMeter", "tester_environment"]

CPU_BOUND = 0.8  # of one core: above it, waiting for the processor is a good part of every latency
LAG_BOUND_MS = 10.0  # p99: a tenth of the inter-token latency that one may still call fluent

_TICK_NS = 10_000_000


@dataclass(frozen=True, slots=True)
class Overhead:
    """Over the measured window."""

    cpu_share: float  # of one core, all threads
    cpu_us_per_token: float  # everything included, requests and bookkeeping too; NaN without a token
    lag: Distribution  # how much later than due the event loop ran a timer
    start_late: Distribution  # how much later than due a request was begun that had a free place

    @property
    def warnings(self) -> list[str]:
        """Why the latencies are not the endpoint's alone; empty where they are."""
        found = []
        if self.cpu_share > CPU_BOUND:
            found.append(f"it used {self.cpu_share:.0%} of a core")
        if self.lag.p99 > LAG_BOUND_MS:
            found.append(f"its event loop was {self.lag.p99:.1f} ms late at p99")
        if self.start_late.p99 > LAG_BOUND_MS:
            found.append(f"it began requests {self.start_late.p99:.1f} ms late at p99")
        return found


class OverheadMeter:
    """Watches the event loop that it runs on; ``watch`` goes on until it is cancelled."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._lag = Histogram()
        self._cpu_began_ns = self._cpu_ended_ns = 0
        self._began_ns = self._ended_ns = 0

    async def watch(self) -> None:
        """Look a hundred times a second how late a timer is, and at the processor time while the window lasts.

        A tick costs about 10 µs; uvloop's timers count in milliseconds, so up to 1 ms is no lateness of ours.
        """
        window, due_ns = self._tally.window, time.monotonic_ns() + _TICK_NS
        while True:
            await asyncio.sleep((due_ns - time.monotonic_ns()) / 1e9)
            now_ns = time.monotonic_ns()
            late_ns = now_ns - due_ns
            if now_ns in window:
                self._lag.add(late_ns)
                self._ended_ns, self._cpu_ended_ns = now_ns, time.process_time_ns()
                if not self._began_ns:
                    self._began_ns, self._cpu_began_ns = self._ended_ns, self._cpu_ended_ns
            self._tally.look(now_ns)
            due_ns += _TICK_NS * (max(0, late_ns) // _TICK_NS + 1)

    def result(self) -> Overhead:
        wall_ns, cpu_ns = self._ended_ns - self._began_ns, self._cpu_ended_ns - self._cpu_began_ns
        return Overhead(
            cpu_share=cpu_ns / wall_ns if wall_ns else float("nan"),
            cpu_us_per_token=cpu_ns / 1e3 / self._tally.tokens if self._tally.tokens else float("nan"),
            lag=self._lag.distribution(),
            start_late=self._tally.start_late.distribution(),
        )


def tester_environment() -> dict[str, str]:
    """What the tester's own figures depend on."""
    return {
        "python": platform.python_version(),
        "uvloop": version("uvloop"),
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
    }
