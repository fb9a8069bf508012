"""Streams at a given rate: what a token costs the server, and how late it comes."""

from __future__ import annotations

import asyncio

from ops.bench.figures import Figures, Metric, percentile
from ops.bench.rig import Rig
from ops.bench.scenarios.scenario import TRUST, WRONG, Scale, Scenario
from ops.bench.viewers import Record, open_viewers

__all__ = ["S1", "S2", "flow"]

_OPENING_S = 10.0  # the first streams must outlast the opening of the last


async def flow(rig: Rig, scale: Scale, *, streams: int, rate: float) -> Figures:
    """The server's processor time over a window, by the tokens that viewers received in it, and their lateness."""
    record = Record()
    tokens = int((_OPENING_S + scale.ramp_s + scale.window_s) * rate)
    # Evenly spread over a token's interval: streams in step would be read together, and look cheaper than they are.
    prompts = [
        (stream, f"id={stream} tokens={tokens} rate={rate} phase={stream * 0.618 % 1:.3f}") for stream in range(streams)
    ]
    viewers = await open_viewers(rig.port, rig.ask, prompts, record)
    await asyncio.sleep(scale.ramp_s)
    watched = rig.watch()
    record.recording = True
    await asyncio.sleep(scale.window_s)
    record.recording = False
    figures = watched()
    failed = sum(1 for viewer in viewers if viewer.failure)
    wrong = sum(viewer.check.wrong for viewer in viewers)
    for viewer in viewers:
        viewer.leave()
    if not record.tokens:
        raise RuntimeError("no token arrived in the window")
    return figures | {
        "us_per_token": 1e6 * figures["cpu_s"] / record.tokens,
        "bytes_per_token": record.bytes / record.tokens,
        "late_p50_ms": percentile(record.late_us, 0.5) / 1e3,
        "late_p99_ms": percentile(record.late_us, 0.99) / 1e3,
        "gap_p99_ms": percentile(record.gap_us, 0.99) / 1e3,
        "delivered_percent": 100 * record.tokens / (streams * rate * figures["wall_s"]),
        "wrong": float(failed + wrong),
    }


async def _run_s1(rig: Rig, scale: Scale) -> Figures:
    return await flow(rig, scale, streams=scale.s1_streams, rate=50)


async def _run_s2(rig: Rig, scale: Scale) -> Figures:
    return await flow(rig, scale, streams=scale.s2_streams, rate=20)


_METRICS = (
    Metric("us_per_token", "µs/token", 1),
    Metric("bytes_per_token", "bytes/token", 0, ratio=False),
    Metric("late_p50_ms", "late p50 ms"),
    Metric("late_p99_ms", "late p99 ms"),
    Metric("gap_p99_ms", "gap p99 ms", 1, ratio=False),
    Metric("delivered_percent", "delivered %", 1, ratio=False),
    Metric("server_core_percent", "server core %", 0, ratio=False),
    WRONG,
    *TRUST,
)

S1 = Scenario(
    "s1: 200 streams at 50 tokens/s (late: from the endpoint's write to the viewer's read; gap: between two of its reads)",
    _METRICS,
    _run_s1,
    paced=True,
)
S2 = Scenario("s2: 1000 streams at 20 tokens/s", _METRICS, _run_s2, paced=True)
