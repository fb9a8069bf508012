"""Numbers to figures: percentiles, medians over rounds, and the table that is printed. No I/O."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Figures", "Metric", "percentile", "summary", "table"]

Figures = dict[str, float]  # by Metric.key


@dataclass(frozen=True, slots=True)
class Metric:
    """One column: where its figure stands, what it is called (with its unit), and how it is printed."""

    key: str
    title: str
    digits: int = 2
    ratio: bool = True  # whether one relay's ÷ another's says anything about it
    fault: bool = False  # a count of faults: of several rounds the worst is told, and no ratio


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least ``share`` (0 to 1) of the values do not exceed; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(rounds: Sequence[Figures], metrics: Sequence[Metric]) -> Figures:
    """Each figure's median over the rounds; of faults the most, since a median would hide a single bad round."""
    faults = {metric.key for metric in metrics if metric.fault}
    return {key: (max if key in faults else statistics.median)(figures[key] for figures in rounds) for key in rounds[0]}


def table(metrics: Sequence[Metric], rows: dict[str, Figures], ratio_of: tuple[str, str]) -> str:
    """The rows under their titles; below, the first row of ``ratio_of`` divided by the second, where both are there."""
    lines = [["", *(metric.title for metric in metrics)]]
    for name, figures in rows.items():
        lines.append([name, *(f"{figures[metric.key]:.{metric.digits}f}" for metric in metrics)])
    if ratio_of[0] != ratio_of[1] and all(name in rows for name in ratio_of):
        over, under = (rows[name] for name in ratio_of)
        lines.append([" ÷ ".join(ratio_of), *(_ratio(metric, over, under) for metric in metrics)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _ratio(metric: Metric, over: Figures, under: Figures) -> str:
    if not metric.ratio or metric.fault or not under[metric.key] > 0:
        return ""
    return f"{over[metric.key] / under[metric.key]:.2f} x"
