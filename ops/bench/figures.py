"""Numbers to figures: percentiles, medians over rounds, ratios within a round, the table that is printed. No I/O."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Figures", "Metric", "aligned", "percentile", "ratio", "summary", "table"]

Figures = dict[str, float]  # by Metric.key; NaN where there is nothing to measure


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


def summary(rounds: Sequence[Figures], metrics: Sequence[Metric] = ()) -> Figures:
    """Each figure's median over the rounds; of faults the most, since a median would hide a single bad round."""
    faults = {metric.key for metric in metrics if metric.fault}
    return {key: (max if key in faults else _median)([figures[key] for figures in rounds]) for key in rounds[0]}


def ratio(over: Sequence[Figures], under: Sequence[Figures], key: str) -> float:
    """The median of what each round's ratio is: the two were measured one after the other, so a slow minute of the
    machine falls on both. NaN where a round has nothing to divide."""
    return _median([_divided(a[key], b[key]) for a, b in zip(over, under, strict=True)])


def _median(values: Sequence[float]) -> float:
    return float("nan") if any(map(math.isnan, values)) else statistics.median(values)


def _divided(over: float, under: float) -> float:
    return over / under if under > 0 else float("nan")


def table(
    metrics: Sequence[Metric], rows: Mapping[str, Figures], ratios: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """The rows under their titles, and below them the rows of ratios; what is NaN or not there stays empty."""
    lines = [["", *(metric.title for metric in metrics)]]
    for name, figures in rows.items():
        lines.append([name, *(_shown(figures[metric.key], f",.{metric.digits}f") for metric in metrics)])
    for name, divided in (ratios or {}).items():
        lines.append([name, *(_shown(divided.get(metric.key, math.nan), ".2f", " x") for metric in metrics)])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def _shown(figure: float, how: str, unit: str = "") -> str:
    return "" if math.isnan(figure) else f"{figure:{how}}{unit}"
