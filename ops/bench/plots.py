"""The curves as SVG for the README: text stays text, the background is white for a dark page too, and the same figures
give the same bytes. It draws what it is given; nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from ops.bench.figures import Figures

__all__ = ["draw"]

Curves = Mapping[str, Mapping[str, Sequence[Figures]]]  # by curve, then by relay


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: which curve, which figures of it, and how the axes are named. ``log`` is the x axis's."""

    curve: str
    x: str
    y: str
    title: str
    x_label: str
    y_label: str
    log: bool = False


_IMAGES: Final = {
    "curves-token.svg": (
        Panel(
            "streams", "streams", "us_per_token", "5,000 tokens/s over more streams", "streams", "µs per token", True
        ),
        Panel("rate", "rate", "us_per_token", "200 streams, faster", "tokens/s of each stream", "µs per token", True),
    ),
    "curves-memory.svg": (
        Panel("open", "streams", "pss_mb", "Open, idle streams", "streams", "MB"),
        Panel("finished", "answers", "pss_mb", "Finished answers in their window", "answers of 200 tokens", "MB"),
    ),
    "curves-heartbeat.svg": (
        Panel("heartbeat", "streams", "server_core_percent", "A heartbeat a second", "idle streams", "% of a core"),
        Panel("heartbeat", "streams", "us_per_ping", "What one costs", "idle streams", "µs per heartbeat"),
    ),
}
_COLOURS: Final = {"Sluice": "#0969da", "nginx": "#6e7781"}
_STYLE: Final[dict[RcKeyType, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sluice",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d0d7de",
    "grid.linewidth": 0.6,
}


def draw(curves: Curves, folder: Path) -> list[Path]:
    """Draw each image whose curves were all measured, and return where they are."""
    drawn = []
    for name, panels in _IMAGES.items():
        if all(panel.curve in curves for panel in panels):
            drawn.append(folder / name)
            _draw(panels, curves, drawn[-1])
    return drawn


def _draw(panels: Sequence[Panel], curves: Curves, path: Path) -> None:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 2.9), facecolor="#ffffff", layout="constrained")
        for number, panel in enumerate(panels, start=1):
            _draw_panel(figure.add_subplot(1, len(panels), number), panel, curves[panel.curve])
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_panel(axes: Axes, panel: Panel, relays: Mapping[str, Sequence[Figures]]) -> None:
    for relay, points in relays.items():
        there = [point for point in points if panel.y in point]
        xs, ys = [point[panel.x] for point in there], [point[panel.y] for point in there]
        axes.plot(xs, ys, "o-", label=relay, color=_COLOURS.get(relay), markersize=4, linewidth=1.5)
    if panel.log:
        axes.set_xscale("log")
        ticks = sorted({point[panel.x] for points in relays.values() for point in points})
        axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if len(relays) > 1:
        axes.legend(frameon=False)
