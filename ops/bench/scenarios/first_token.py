"""How much later the first token comes than from the endpoint itself."""

from __future__ import annotations

import asyncio

from ops.bench.figures import Figures, Metric, percentile
from ops.bench.rig import Rig
from ops.bench.scenarios.scenario import TRUST, WRONG, Scale, Scenario
from ops.bench.viewers import Ask, Record, ask_endpoint, open_viewers

__all__ = ["TTFT"]

_WARM_UP = 20  # requests


async def measure_ttft(rig: Rig, scale: Scale) -> Figures:
    """One client that asks the endpoint and the relay in turn; from the request's write to its first token's read.

    Both cores sleep between two requests, and a relay has to wake its own: the row of nginx tells what that takes.
    """
    watched = rig.watch()
    direct, through, wrong = list[float](), list[float](), 0
    for number in range(scale.ttft_requests + _WARM_UP):
        for port, ask, times_ms in ((rig.endpoint.port, ask_endpoint, direct), (rig.port, rig.ask, through)):
            took_ms, faults = await _ask(port, ask, number)
            wrong += faults
            if number >= _WARM_UP:
                times_ms.append(took_ms)
    # Of the differences, not the difference of the medians: each pair was measured within two milliseconds.
    added = [behind - ahead for ahead, behind in zip(direct, through, strict=True)]
    return {
        "direct_p50_ms": percentile(direct, 0.5),
        "through_p50_ms": percentile(through, 0.5),
        "through_p99_ms": percentile(through, 0.99),
        "added_p50_ms": percentile(added, 0.5),
        "added_p99_ms": percentile(added, 0.99),
        "wrong": float(wrong),
        **watched(),
    }


async def _ask(port: int, ask: Ask, number: int) -> tuple[float, int]:
    [viewer] = await open_viewers(port, ask, [(number, f"id={number} tokens=2 rate=200")], Record())
    async with asyncio.timeout(10):
        await viewer.tokens(2)
    viewer.leave()
    return (viewer.first_token_ns - viewer.asked_ns) / 1e6, viewer.check.wrong


TTFT = Scenario(
    "ttft: from the request to the first token, one client, a connection for each request (ms)",
    (
        Metric("direct_p50_ms", "direct p50", ratio=False),
        Metric("through_p50_ms", "through p50", ratio=False),
        Metric("through_p99_ms", "through p99", ratio=False),
        Metric("added_p50_ms", "added p50"),
        Metric("added_p99_ms", "added p99", ratio=False),
        WRONG,
        *TRUST,
    ),
    measure_ttft,
    without=("direct",),
)
