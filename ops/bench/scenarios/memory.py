"""What the server's processes hold: of an open stream, and of an answer that has ended and can still be replayed."""

from __future__ import annotations

import asyncio

from ops.bench.figures import Figures, Metric
from ops.bench.procs import memory
from ops.bench.rig import Rig
from ops.bench.scenarios.scenario import TRUST, WRONG, Scale, Scenario
from ops.bench.viewers import Record, open_viewers

__all__ = ["KEPT", "MEMORY", "read_answers"]

_READ_AT_ONCE = 20  # whole answers
_SETTLE_S = 0.5


async def measure_memory(rig: Rig, scale: Scale) -> Figures:
    """Many streams that got one token and then wait, against the same process after a few answers."""
    assert rig.server is not None
    watched = rig.watch()
    await read_answers(rig, range(20), 2, Record())
    await asyncio.sleep(_SETTLE_S)
    base = memory(rig.server.pid)
    streams = min(scale.memory_streams, rig.relay.most_streams)
    prompts = [(stream, f"id={stream} tokens=1 hold=1") for stream in range(100, 100 + streams)]
    viewers = await open_viewers(rig.port, rig.ask, prompts, Record())
    await asyncio.sleep(_SETTLE_S)
    full = memory(rig.server.pid)
    failed = sum(1 for viewer in viewers if viewer.failure or viewer.check.wrong)
    for viewer in viewers:
        viewer.leave()
    return {
        "streams": float(streams),
        "base_pss_mb": base.pss / 1024,
        "pss_mb": full.pss / 1024,
        "peak_rss_mb": full.peak_rss / 1024,
        "pss_kb_per_stream": (full.pss - base.pss) / streams,
        "wrong": float(failed),
        **watched(),
    }


async def measure_kept(rig: Rig, scale: Scale) -> Figures:
    """Answers that were read to their end, within their window, against the same process after a few of them."""
    assert rig.server is not None
    watched = rig.watch()
    await read_answers(rig, range(20), scale.kept_tokens, Record())
    await asyncio.sleep(_SETTLE_S)
    base = memory(rig.server.pid)
    record = Record(recording=True, timed=False)
    wrong = await read_answers(rig, range(20, 20 + scale.kept_answers), scale.kept_tokens, record)
    await asyncio.sleep(_SETTLE_S)
    full = memory(rig.server.pid)
    return {
        "base_pss_mb": base.pss / 1024,
        "pss_mb": full.pss / 1024,
        "pss_kb_per_answer": (full.pss - base.pss) / scale.kept_answers,
        "sent_kb_per_answer": record.bytes / 1024 / scale.kept_answers,
        "wrong": float(wrong),
        **watched(),
    }


async def read_answers(rig: Rig, streams: range, tokens: int, record: Record) -> int:
    """Read that many answers to their end, some at a time; returns how many were not right."""
    wrong = 0
    for first in range(streams.start, streams.stop, _READ_AT_ONCE):
        together = range(first, min(first + _READ_AT_ONCE, streams.stop))
        prompts = [(stream, f"id={stream} tokens={tokens} rate=2000") for stream in together]
        viewers = await open_viewers(rig.port, rig.ask, prompts, record)
        for viewer in viewers:
            await viewer.end()
            wrong += bool(viewer.failure or viewer.check.wrong or viewer.check.next != tokens)
            viewer.leave()
    return wrong


MEMORY = Scenario(
    "memory: streams open after one token, the server's processes",
    (
        Metric("streams", "streams", 0, ratio=False),
        Metric("base_pss_mb", "base PSS MB", 1, ratio=False),
        Metric("pss_mb", "PSS MB", 1, ratio=False),
        Metric("peak_rss_mb", "peak RSS MB", 1, ratio=False),
        Metric("pss_kb_per_stream", "KB/stream", 1),
        WRONG,
        *TRUST,
    ),
    measure_memory,
    without=("direct",),
)
KEPT = Scenario(
    "kept: answers that have ended and can still be replayed, the server's processes",
    (
        Metric("base_pss_mb", "base PSS MB", 1, ratio=False),
        Metric("pss_mb", "PSS MB", 1, ratio=False),
        Metric("pss_kb_per_answer", "KB/answer", 1, ratio=False),
        Metric("sent_kb_per_answer", "sent KB/answer", 1, ratio=False),
        WRONG,
        *TRUST,
    ),
    measure_kept,
    without=("plain", "nginx", "fastapi", "direct"),  # they keep none
)
