"""What is measured: each scenario drives one relay, alone on its core, and returns its figures.

flow   streams at a given rate: what a token costs, and how late it comes
loop   clients that ask again as soon as they have their answer: how much goes through
"""

from __future__ import annotations

from typing import Final

from ops.bench.scenarios.flow import S1, S2
from ops.bench.scenarios.loop import REQ, S3
from ops.bench.scenarios.scenario import FULL, QUICK, Scale, Scenario

__all__ = ["FULL", "QUICK", "SCENARIOS", "Scale", "Scenario"]

SCENARIOS: Final = {"s1": S1, "s2": S2, "s3": S3, "req": REQ}
