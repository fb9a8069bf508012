"""What is to be reached, and whether it was. Pure: summaries and ratios in, verdicts out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ops.bench.figures import Figures, ratio, summary
from ops.bench.scenarios import SCENARIOS

__all__ = ["GOALS", "Goal", "Measured", "verdict", "verdicts"]

Measured = Mapping[str, Mapping[str, Sequence[Figures]]]  # by scenario, then by relay: a round after the other
Figure = Callable[[Measured], float]  # NaN where it was not measured

_SLUICE: Final = "Sluice"


@dataclass(frozen=True, slots=True)
class Goal:
    """``must`` and ``aim`` are the most that the figure may be, or the least where ``least`` says so; NaN = none."""

    title: str
    figure: Figure
    must: float
    aim: float
    unit: str = ""
    digits: int = 2
    least: bool = False

    def met(self, figure: float, bound: float) -> bool:
        return math.isnan(bound) or (figure >= bound if self.least else figure <= bound)

    def shown(self, figure: float) -> str:
        return "" if math.isnan(figure) else f"{figure:.{self.digits}f} {self.unit}".strip()

    def bound(self, bound: float) -> str:
        return "" if math.isnan(bound) else f"{'≥' if self.least else '≤'} {bound:g} {self.unit}".strip()


def _of(scenario: str, key: str) -> Figure:
    def figure(measured: Measured) -> float:
        rounds = measured.get(scenario, {}).get(_SLUICE)
        return summary(rounds, SCENARIOS[scenario].metrics).get(key, math.nan) if rounds else math.nan

    return figure


def _against(scenario: str, key: str, peer: str) -> Figure:
    def figure(measured: Measured) -> float:
        relays = measured.get(scenario, {})
        if not relays.get(_SLUICE) or not relays.get(peer):
            return math.nan
        return ratio(relays[_SLUICE], relays[peer], key)

    return figure


def _wrong_tokens(measured: Measured) -> float:
    faults = [figures["wrong"] for relays in measured.values() for figures in relays.get(_SLUICE, ())]
    return sum(faults) if faults else math.nan


GOALS: Final = (
    Goal("s1, CPU per token against nginx", _against("s1", "us_per_token", "nginx"), 2.4, 1.6, "x"),
    Goal(
        "s1, CPU per token against the FastAPI stack", _against("s1", "us_per_token", "FastAPI stack"), 0.1, 0.06, "x"
    ),
    Goal("s2, delivered of the nominal rate", _of("s2", "delivered_percent"), 99, 99, "%", 1, least=True),
    Goal("s2, lateness p99", _of("s2", "late_p99_ms"), 100, 40, "ms", 1),
    Goal("s2, core busy", _of("s2", "server_core_percent"), math.nan, 70, "%", 0),
    Goal("s3, tokens/s against plain aiohttp", _against("s3", "tokens_per_s", "plain aiohttp"), 5, 8, "x", least=True),
    Goal(
        "req, answers/s against plain aiohttp",
        _against("req", "answers_per_s", "plain aiohttp"),
        1.7,
        3,
        "x",
        least=True,
    ),
    Goal("starve, lateness p99 of the ordinary streams", _of("starve", "late_p99_ms"), 60, 60, "ms", 1),
    Goal("leave, tokens flowing, p50", _of("leave", "flowing_p50_ms"), math.nan, 2, "ms"),
    Goal("leave, tokens flowing, p99", _of("leave", "flowing_p99_ms"), 25, 10, "ms"),
    Goal("leave, upstream silent, p50", _of("leave", "silent_p50_ms"), math.nan, 2, "ms"),
    Goal("leave, upstream silent, p99", _of("leave", "silent_p99_ms"), 25, 10, "ms"),
    Goal("leave, missed", _of("leave", "missed"), 0, 0, digits=0),
    Goal("ttft, added, p50", _of("ttft", "added_p50_ms"), 0.7, 0.4, "ms"),
    Goal("memory per idle stream", _of("memory", "pss_kb_per_stream"), 30, 22, "KB", 1),
    Goal("tokens lost, doubled, out of order or in the wrong stream", _wrong_tokens, 0, 0, digits=0),
)


def verdict(goal: Goal, measured: Measured) -> str:
    figure = goal.figure(measured)
    if math.isnan(figure):
        return "not measured"
    if not goal.met(figure, goal.must):
        return "MISSED"
    if goal.met(figure, goal.aim):
        return "aim met"
    return "aim missed" if math.isnan(goal.must) else "must met"


def verdicts(measured: Measured) -> list[tuple[str, str, str, str, str]]:
    """A row for each goal: what, must, aim, measured, verdict."""
    return [
        (
            goal.title,
            goal.bound(goal.must),
            goal.bound(goal.aim),
            goal.shown(goal.figure(measured)),
            verdict(goal, measured),
        )
        for goal in GOALS
    ]
