"""What a scenario is, and how much of it one round does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ops.bench.figures import Figures, Metric
from ops.bench.rig import Rig

__all__ = ["DOUBTS", "FULL", "QUICK", "TRUST", "WRONG", "Scale", "Scenario"]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of each thing one round does."""

    ramp_s: float = 1.0  # between the last stream's opening and the window
    window_s: float = 3.5
    s1_streams: int = 200
    s2_streams: int = 1000
    clients: int = 64  # of s3 and req
    leavers: int = 200
    ttft_requests: int = 200
    memory_streams: int = 5000
    kept_answers: int = 1000
    kept_tokens: int = 200  # of each


FULL = Scale()
QUICK = Scale(ramp_s=0.3, window_s=1.2, ttft_requests=40, memory_streams=800)


@dataclass(frozen=True, slots=True)
class Scenario:
    """``paced``: the load does not depend on the server, so a server whose core is full falls behind.

    ``without``: relays of which it would tell nothing. ``streams``: how many a relay must be able to hold."""

    title: str
    metrics: tuple[Metric, ...]
    run: Callable[[Rig, Scale], Awaitable[Figures]]
    paced: bool = False
    without: tuple[str, ...] = ()
    streams: int = 0

    def doubts(self, figures: Figures) -> str:
        """The marks of what speaks against a row of figures."""
        full = self.paced and figures["server_core_percent"] >= _FULL_PERCENT
        alone = not figures["others_percent"] >= _OTHERS_PERCENT  # NaN where there is no server
        return "†" * full + "‡" * (figures["rig_core_percent"] >= _FULL_PERCENT) + "§" * (not alone)


_FULL_PERCENT = 97
_OTHERS_PERCENT = 8  # of a core

DOUBTS = {
    "†": "its core is full: what comes too late is handled many tokens at a time, which flatters its µs/token",
    "‡": "the rig's core is full: the server could do more than the rig can show",
    "§": f"something else took {_OTHERS_PERCENT} % or more of its core",
}


WRONG = Metric("wrong", "wrong", 0, fault=True)

# Whether the figures can be trusted: a rig that is full, or a server that had not its core for itself, measures itself.
TRUST = (
    Metric("rig_core_percent", "rig core %", 0, ratio=False),
    Metric("others_percent", "others %", 1, ratio=False),
)
