"""Streams at a given rate: what a token costs the server, and how late it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ops.bench.figures import Figures, Metric, percentile
from ops.bench.rig import Rig
from ops.bench.scenarios.scenario import TRUST, WRONG, Scale, Scenario
from ops.bench.viewers import Record, Viewer, ViewerFailed, open_viewers

__all__ = ["S0", "S1", "S2", "STARVE", "flow"]

_OPENED_PER_S = 600  # streams; about half of what an ordinary relay can open
_MARGIN_S = 2.0  # that a stream lives longer than its window
_GREEDY_RATE = 200_000  # tokens per second of one stream, about what a whole core can relay


async def flow(rig: Rig, scale: Scale, *, streams: int, rate: float) -> Figures:
    """The server's processor time over a window, by the tokens that viewers received in it, and their lateness."""
    record = Record()
    viewers = await _open(rig, scale, streams, rate, record)
    return await _watch(rig, scale, viewers, (record,)) | _told(record, streams * rate * scale.window_s)


async def _run_s0(rig: Rig, scale: Scale) -> Figures:
    return await flow(rig, scale, streams=scale.s1_streams, rate=5)


async def _run_s1(rig: Rig, scale: Scale) -> Figures:
    return await flow(rig, scale, streams=scale.s1_streams, rate=50)


async def _run_s2(rig: Rig, scale: Scale) -> Figures:
    return await flow(rig, scale, streams=scale.s2_streams, rate=20)


async def _run_starve(rig: Rig, scale: Scale) -> Figures:
    """The figures are those of the ordinary streams; of the greedy one, how much it got."""
    rate, record, greedy = 50, Record(), Record(timed=False)
    viewers = await _open(rig, scale, scale.s1_streams, rate, record)
    tokens = int((scale.ramp_s + scale.window_s + _MARGIN_S) * _GREEDY_RATE)
    stream = scale.s1_streams
    viewers += await open_viewers(
        rig.port, rig.ask, [(stream, f"id={stream} tokens={tokens} rate={_GREEDY_RATE}")], greedy
    )
    figures = await _watch(rig, scale, viewers, (record, greedy))
    told = _told(record, scale.s1_streams * rate * scale.window_s)
    return figures | told | {"greedy_tokens_per_s": greedy.tokens / figures["wall_s"]}


async def _open(rig: Rig, scale: Scale, streams: int, rate: float, record: Record) -> list[Viewer]:
    opening_s = 0.5 + streams / _OPENED_PER_S
    start = time.monotonic() + opening_s
    tokens = int((opening_s + scale.ramp_s + scale.window_s + _MARGIN_S) * rate)
    words = f"tokens={tokens} rate={rate} start={start:.3f}"
    # Evenly spread over a token's interval: streams in step would be read together, and look cheaper than they are.
    prompts = [(stream, f"id={stream} {words} phase={stream * 0.618 % 1:.3f}") for stream in range(streams)]
    viewers = await open_viewers(rig.port, rig.ask, prompts, record)
    await asyncio.sleep(start - time.monotonic())
    return viewers


async def _watch(rig: Rig, scale: Scale, viewers: Sequence[Viewer], records: Sequence[Record]) -> Figures:
    """Let the streams flow for the window, then leave."""
    await asyncio.sleep(scale.ramp_s)
    watched = rig.watch()
    for record in records:
        record.recording = True
    await asyncio.sleep(scale.window_s)
    for record in records:
        record.recording = False
    figures = watched()
    wrong = sum(viewer.check.wrong for viewer in viewers)
    if failures := [viewer.failure for viewer in viewers if viewer.failure]:
        raise ViewerFailed(f"{len(failures)} of {len(viewers)} streams, such as: {failures[0]}")
    for viewer in viewers:
        viewer.leave()
    tokens = sum(record.tokens for record in records)
    if not tokens:
        raise RuntimeError("no token arrived in the window")
    return figures | {
        "us_per_token": 1e6 * figures["cpu_s"] / tokens,
        "tokens_per_wake_up": tokens / max(figures["wake_ups"], 1),  # what the server's one look at its sockets finds
        "wrong": float(wrong),
    }


def _told(record: Record, nominal_tokens: float) -> Figures:
    return {
        "bytes_per_token": record.bytes / record.tokens if record.tokens else float("nan"),
        "tokens_per_read": record.tokens / record.reads if record.reads else float("nan"),
        "late_p50_ms": percentile(record.late_us, 0.5) / 1e3,
        "late_p99_ms": percentile(record.late_us, 0.99) / 1e3,
        "gap_p99_ms": percentile(record.gap_us, 0.99) / 1e3,
        "delivered_percent": 100 * record.tokens / nominal_tokens,
    }


_LATE = (
    Metric("late_p50_ms", "late p50 ms", ratio=False),
    Metric("late_p99_ms", "late p99 ms", ratio=False),
    Metric("gap_p99_ms", "inter-token p99 ms", 1, ratio=False),
    Metric("delivered_percent", "delivered %", 1, ratio=False),
    Metric("server_core_percent", "server core %", 0, ratio=False),
)
_METRICS = (
    Metric("us_per_token", "µs/token", 1),
    Metric("bytes_per_token", "bytes/token", 0, ratio=False),
    Metric("tokens_per_read", "tokens/read", 2, ratio=False),
    *_LATE,
    WRONG,
    *TRUST,
)

S0 = Scenario(
    "s0: 200 streams at 5 tokens/s, which leaves every core half idle: what a token costs a server that keeps up",
    _METRICS,
    _run_s0,
    paced=True,
    without=("plain", "direct"),  # s1 tells of them: they keep up there too
)
S1 = Scenario(
    "s1: 200 streams at 50 tokens/s (late: from the endpoint's write to the viewer's read)",
    _METRICS,
    _run_s1,
    paced=True,
)
S2 = Scenario("s2: 1000 streams at 20 tokens/s", _METRICS, _run_s2, paced=True, streams=1000)
STARVE = Scenario(
    "starve: one stream at 200,000 tokens/s beside 200 ordinary ones at 50 (late: the ordinary ones)",
    (Metric("greedy_tokens_per_s", "greedy tokens/s", 0, ratio=False), *_LATE, WRONG, *TRUST),
    _run_starve,
    without=("fastapi", "direct"),  # it does not get far enough with the ordinary ones
)
