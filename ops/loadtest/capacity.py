"""``--find-capacity``: the most streams at which every objective of the run holds."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ops.loadtest.summary import Summary

__all__ = ["Capacity", "CapacitySearch", "Step", "counted", "find_capacity"]

_FINENESS = 16  # the search ends when what held and what broke are a sixteenth apart


class CapacitySearch:
    """Doubling until it breaks, then halving the distance. Pure: told what held, it says what to try.

    ``held`` is the most streams that held (0: none), ``broke`` the fewest that broke (None: none did).
    """

    def __init__(self, first: int, limit: int) -> None:
        self._first = min(first, limit)
        self._limit = limit
        self.held = 0
        self.broke: int | None = None

    def next(self) -> int | None:
        """How many streams to try; None where the answer is found, or the limit held."""
        if self.broke is None:
            if self.held >= self._limit:
                return None
            return min(self.held * 2, self._limit) if self.held else self._first
        if self.broke - self.held <= max(1, self.held // _FINENESS):
            return None
        return (self.held + self.broke) // 2

    def tell(self, streams: int, *, held: bool) -> None:
        if held:
            self.held = streams
        else:
            self.broke = streams


@dataclass(frozen=True, slots=True)
class Step:
    """One number of streams, measured."""

    streams: int
    summary: Summary

    @property
    def held(self) -> bool:
        return self.summary.kept

    def __str__(self) -> str:
        state = "held" if self.held else "broke"
        return f"{counted(self.streams)} {state}: " + "; ".join(str(verdict) for verdict in self.summary.verdicts)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the search found. ``streams`` held; it is a lower bound where the limit or the tester ended the search."""

    streams: int
    limit: int
    steps: list[Step] = field(default_factory=list)
    tester: list[str] = field(default_factory=list)  # why the tester itself may have broken the last step
    interrupted: bool = False
    unmeasured: str = ""  # objectives that the steps are too short for

    @property
    def limit_held(self) -> bool:
        return self.streams >= self.limit

    def __str__(self) -> str:
        if self.tester:
            return (
                f"at least {counted(self.streams)}; beyond, the tester itself was the bottleneck "
                f"({'; '.join(self.tester)}), so that the endpoint's capacity is not known"
            )
        if self.unmeasured:
            return f"unknown: a step held nothing to measure {self.unmeasured} by; make --step longer than an answer"
        if self.interrupted:
            return f"at least {counted(self.streams)}; the search was ended before it was over"
        if self.limit_held:
            return f"at least {counted(self.streams)}: all objectives held up to --max-streams"
        if not self.streams:
            return "not even one stream keeps the objectives"
        return counted(self.streams)

    def as_json(self) -> dict[str, Any]:
        return {
            "streams": self.streams,
            "verdict": str(self),
            "limit_held": self.limit_held,
            "tester": self.tester,
            "interrupted": self.interrupted,
            "unmeasured": self.unmeasured,
            "steps": [{"streams": step.streams, "held": step.held, **step.summary.as_json()} for step in self.steps],
        }


async def find_capacity(
    first: int, limit: int, measure: Callable[[int], Awaitable[Summary]], say: Callable[[str], None]
) -> Capacity:
    """Measure step after step. One that breaks is measured again, and only counts as broken when that breaks too: a
    hiccup of the network at 16 streams must not hide that 500 are no trouble. An interruption ends the search."""
    search = CapacitySearch(first, limit)
    steps: list[Step] = []
    while (streams := search.next()) is not None:
        for _ in range(2):
            step = Step(streams, await measure(streams))
            steps.append(step)
            say(str(step))
            if step.held or step.summary.interrupted or step.summary.warnings or _unmeasured(step):
                break
        if step.summary.interrupted:
            return Capacity(search.held, limit, steps, interrupted=True)
        if unmeasured := _unmeasured(step):
            return Capacity(search.held, limit, steps, unmeasured=unmeasured)
        if not step.held and step.summary.warnings:
            return Capacity(search.held, limit, steps, step.summary.warnings)
        search.tell(streams, held=step.held)
    return Capacity(search.held, limit, steps)


def counted(streams: int) -> str:
    return "1 stream" if streams == 1 else f"{streams} streams"


def _unmeasured(step: Step) -> str:
    """The objectives without a value, where it is not for failures that there is none."""
    verdicts = step.summary.verdicts
    if any(not verdict.kept and verdict.objective.name == "error_rate" for verdict in verdicts):
        return ""
    return ", ".join(verdict.objective.text for verdict in verdicts if math.isnan(verdict.value))
