"""What a scenario is, and how much of it one round does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ops.bench.figures import Figures, Metric
from ops.bench.rig import Rig

__all__ = ["FULL", "QUICK", "TRUST", "WRONG", "Scale", "Scenario"]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of each thing one round does."""

    ramp_s: float = 1.0  # between the last stream's opening and the window
    window_s: float = 6.0
    s1_streams: int = 200
    s2_streams: int = 1000
    clients: int = 64  # of s3 and req


FULL = Scale()
QUICK = Scale(ramp_s=0.5, window_s=2.0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """``paced``: the load does not depend on the server, so a server whose core is full falls behind."""

    title: str
    metrics: tuple[Metric, ...]
    run: Callable[[Rig, Scale], Awaitable[Figures]]
    paced: bool = False


WRONG = Metric("wrong", "wrong", 0, fault=True)

# Whether the figures can be trusted: a rig that is full, or a server that had not its core for itself, measures itself.
TRUST = (
    Metric("rig_core_percent", "rig core %", 0, ratio=False),
    Metric("others_percent", "others %", 1, ratio=False),
)
