"""What is measured: each scenario drives one relay, alone on its core, and returns its figures.

flow         streams at a given rate: what a token costs, how late it comes, and whether one stream starves others
loop         clients that ask again as soon as they have their answer: how much goes through
memory       what an open stream holds, and a finished answer
leave        how soon the endpoint hears that a client has gone
first_token  how much later the first token comes
"""

from __future__ import annotations

from typing import Final

from ops.bench.scenarios.first_token import TTFT
from ops.bench.scenarios.flow import S0, S1, S2, STARVE
from ops.bench.scenarios.leave import LEAVE
from ops.bench.scenarios.loop import REQ, S3
from ops.bench.scenarios.memory import KEPT, MEMORY
from ops.bench.scenarios.scenario import DOUBTS, FULL, QUICK, Scale, Scenario

__all__ = ["DOUBTS", "FULL", "QUICK", "SCENARIOS", "Scale", "Scenario"]

SCENARIOS: Final = {
    "s0": S0,
    "s1": S1,
    "s2": S2,
    "s3": S3,
    "req": REQ,
    "starve": STARVE,
    "leave": LEAVE,
    "ttft": TTFT,
    "memory": MEMORY,
    "kept": KEPT,
}
