"""The report's plots as SVG. Drawn with matplotlib's object API and no global state; colours are names that the page's
style sheet decides, so that one plot is readable on white and on black."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ops.loadtest.capacity import Capacity, Step
from ops.loadtest.metrics import Histogram
from ops.loadtest.summary import OverTime, Summary

__all__ = ["PALETTE", "capacity_plot", "latency_over_time_plot", "latency_plot", "load_over_time_plot"]

# What matplotlib is told, and the name of the style sheet's variable that takes its place.
PALETTE: Final = {
    "#010101": "--ink",
    "#020202": "--faint",
    "#030303": "--line",
    "#040404": "--first",
    "#050505": "--second",
    "#060606": "--bad",
}
_INK, _FAINT, _LINE, _FIRST, _SECOND, _BAD = PALETTE

_WIDTH_IN, _HEIGHT_IN = 8.0, 2.5
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font, and can be searched
    "svg.hashsalt": "loadtest",
    "font.size": 9.0,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _FAINT,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _FAINT,
    "ytick.labelcolor": _FAINT,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.solid_joinstyle": "round",
}


def latency_plot(summary: Summary) -> str:
    """How TTFT, ITL and E2EL are distributed: the share of values that were no greater."""

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (name, title) in zip(axes, (("ttft", "TTFT"), ("itl", "ITL"), ("e2el", "E2EL")), strict=True):
            _draw_distribution(axis, summary.histograms[name], title)
            for bound_ms in [known.bound_ms for known in summary.objectives.request if known.latency == name]:
                axis.axvline(bound_ms, color=_BAD, linestyle=(0, (4, 3)), linewidth=1)
        axes[0].set_ylabel("share of values")

    return _svg("latency", 3, draw, height_in=2.6)


def load_over_time_plot(over_time: OverTime) -> str:
    """Open streams, tokens a second and requests that ended, over the run."""

    def draw(axes: Sequence[Axes]) -> None:
        _draw_over_time(axes[0], over_time, "open streams", [("", over_time.open_streams, _FIRST)])
        _draw_over_time(axes[1], over_time, "tokens/s", [("", over_time.tokens_per_s, _FIRST)])
        ended = [("completed", over_time.completed_per_s, _FIRST), ("failed", over_time.failed_per_s, _BAD)]
        _draw_over_time(axes[2], over_time, "requests/s that ended", ended)

    return _svg("load", 3, draw)


def latency_over_time_plot(over_time: OverTime) -> str:
    """TTFT and ITL over the run."""

    def draw(axes: Sequence[Axes]) -> None:
        ttft = [("p99", over_time.ttft_p99, _SECOND), ("p50", over_time.ttft_p50, _FIRST)]
        _draw_over_time(axes[0], over_time, "TTFT (ms)", ttft)
        itl = [("p99", over_time.itl_p99, _SECOND), ("p50", over_time.itl_p50, _FIRST)]
        _draw_over_time(axes[1], over_time, "ITL (ms)", itl)

    return _svg("latencies", 2, draw)


def capacity_plot(capacity: Capacity) -> str:
    """Latency over the number of streams; steps that broke are crosses."""

    objectives = capacity.steps[0].summary.objectives
    measured = [
        (name, title)
        for name, title in (("itl", "ITL"), ("ttft", "TTFT"))
        if any(step.summary.latencies[name].count for step in capacity.steps)
    ]

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (name, title) in zip(axes, measured, strict=False):
            for statistic, colour in (("p99", _SECOND), ("p50", _FIRST)):
                _draw_steps(axis, capacity.steps, name, statistic, colour)
            for bound in [known.bound for known in objectives.run if known.name.startswith(f"{name}_")]:
                axis.axhline(bound, color=_BAD, linestyle=(0, (4, 3)), linewidth=1)
            axis.set_title(f"{title} (ms)")
            axis.set_xlabel("streams")
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.legend(loc="upper left", labelcolor=_INK, fontsize=8)

    return _svg("capacity", max(1, len(measured)), draw, height_in=2.8)


def _draw_distribution(axis: Axes, histogram: Histogram, title: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("ms")
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
    if not histogram.count:
        axis.text(0.5, 0.5, "nothing to measure", transform=axis.transAxes, ha="center", color=_FAINT)
        return
    values, shares, seen = [], [], 0
    for value_ms, times in histogram.buckets_ms():
        seen += times
        values.append(value_ms)
        shares.append(seen / histogram.count)
    axis.step([values[0], *values], [0.0, *shares], where="post", color=_FIRST)
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        at = histogram.percentile_ms(share)
        axis.plot([at], [share], marker="o", markersize=3.5, color=_INK)
        axis.annotate(f"{name} {at:.4g}", (at, share), (6, -9), textcoords="offset points", color=_INK, fontsize=8)
    axis.set_xlim(*_bounds(histogram))


def _bounds(histogram: Histogram) -> tuple[float, float]:
    """Up to a little beyond p99.9: one outlier must not squeeze all the others into a line."""
    least, most = histogram.percentile_ms(0.0), max(histogram.percentile_ms(0.999), 1e-3)
    space = max((most - least) * 0.08, most * 0.02)
    return max(0.0, least - space), most + space * 3  # and room for the last label


def _draw_over_time(
    axis: Axes, over_time: OverTime, title: str, lines: Sequence[tuple[str, Sequence[float], str]]
) -> None:
    begin_s, end_s = over_time.window_s
    for name, values, colour in lines:
        times = [(place + 0.5) * over_time.moment_s for place in range(len(values))]
        axis.plot(times, values, color=colour, label=name or None, marker="o", markersize=1.8)
    axis.axvspan(begin_s, max(begin_s, end_s), color=_LINE, alpha=0.35, linewidth=0)
    axis.set_title(title)
    axis.set_xlabel("s")
    axis.set_xlim(0, max(len(over_time.open_streams), 1) * over_time.moment_s)
    highest = max((value for _, values, _ in lines for value in values if not math.isnan(value)), default=0.0)
    axis.set_ylim(0, highest * 1.1 or 1.0)
    if any(name for name, _, _ in lines):
        axis.set_ylim(0, highest * 1.35 or 1.0)  # room for the legend
        axis.legend(loc="upper right", labelcolor=_INK, ncols=2, fontsize=8, borderaxespad=0.1)


def _draw_steps(axis: Axes, steps: Sequence[Step], latency: str, statistic: str, colour: str) -> None:
    """A line through the steps; a number that was measured twice shows both, and the line goes through the second."""
    last = {step.streams: step for step in steps}
    line = sorted(last.values(), key=lambda step: step.streams)
    values = [step.summary.latencies[latency].get(statistic) for step in line]
    axis.plot([step.streams for step in line], values, color=colour, label=statistic)
    for step in steps:
        value = step.summary.latencies[latency].get(statistic)
        axis.plot([step.streams], [value], marker="o" if step.held else "x", markersize=5, color=colour)


def _svg(name: str, columns: int, draw: Callable[[Sequence[Axes]], None], height_in: float = _HEIGHT_IN) -> str:
    """One row of plots as an ``<svg>`` element to stand in a page: no prolog, no foreign address, ids of its own."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        draw(figure.subplots(1, columns, squeeze=False)[0])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", drawn)
    drawn = drawn.replace("xlink:href", "href")
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
    for colour, variable in PALETTE.items():
        drawn = drawn.replace(colour, f"var({variable})")
    return drawn
