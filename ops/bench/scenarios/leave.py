"""How soon the endpoint hears that nobody listens any more, while many clients come and go."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from ops.bench.figures import Figures, Metric, percentile
from ops.bench.rig import Rig
from ops.bench.scenarios.scenario import TRUST, WRONG, Scale, Scenario
from ops.bench.simulator import Departures, ask_departures
from ops.bench.viewers import Record, Viewer, ViewerFailed

__all__ = ["LEAVE", "Left", "measure_leave", "reckon"]

_STAY_S = (0.2, 1.5)  # of a client, drawn anew each time
_TOKENS_PER_S = (20.0, 50.0)  # of a stream that flows
_SILENT = ("tokens=1 first_after=600", "tokens=1 head_after=600")  # after the head, and before it
_PATIENCE_S = 3.0  # after the last leave; what the endpoint has not heard of by then is missed


@dataclass(frozen=True, slots=True)
class Left:
    """One client's visit: which stream, whether its tokens flowed, and when it left (CLOCK_MONOTONIC, ns)."""

    stream: int
    flowing: bool
    left_ns: int


async def measure_leave(rig: Rig, scale: Scale) -> Figures:
    """Half of the clients leave while tokens flow, half while the upstream is silent; with FIN and RST in turn. They
    ask as clients that cannot resume, whose answers stop when they leave."""
    record, streams = Record(timed=False), itertools.count(1)
    until = asyncio.get_running_loop().time() + scale.window_s
    watched = rig.watch()
    visits = await asyncio.gather(
        *(_come_and_go(rig, streams, record, client, until) for client in range(scale.leavers))
    )
    trust = watched()
    await asyncio.sleep(0.01)  # a connection closes in the turn of the loop after its leave
    viewers = list(itertools.chain(*visits))
    lefts = [Left(viewer.check.stream, "rate" in words, viewer.left_ns) for viewer, words in viewers]
    book = await _when_all_are_known(rig, lefts)
    return reckon(lefts, book) | {
        "leaves_per_s": len(lefts) / trust["wall_s"],
        "wrong": float(sum(viewer.check.wrong for viewer, _ in viewers)),
        **trust,
    }


async def _come_and_go(
    rig: Rig, streams: Iterator[int], record: Record, client: int, until: float
) -> list[tuple[Viewer, str]]:
    """One client's visits until that time of the loop's clock, each with the words that it asked."""
    loop, visits = asyncio.get_running_loop(), list[tuple[Viewer, str]]()
    await asyncio.sleep(random.random() * _STAY_S[1])  # not all at once
    for visit in itertools.count(client):
        stream = next(streams)
        flows = f"tokens=600 rate={random.uniform(*_TOKENS_PER_S):.1f}"
        words = _SILENT[visit % 2] if client % 2 else flows
        viewer = Viewer(rig.relay.ask_once(f"id={stream} {words}"), stream, record)
        await loop.create_connection(lambda viewer=viewer: viewer, "127.0.0.1", rig.port)  # type: ignore[misc]
        await asyncio.sleep(random.uniform(*_STAY_S))
        viewer.leave(reset=visit // 2 % 2 == 1)
        if viewer.failure:
            raise ViewerFailed(f"stream {stream}: {viewer.failure}")
        visits.append((viewer, words))
        if loop.time() > until:
            break
    return visits


async def _when_all_are_known(rig: Rig, lefts: list[Left]) -> Departures:
    deadline = asyncio.get_running_loop().time() + _PATIENCE_S
    while True:
        book = await asyncio.to_thread(ask_departures, rig.endpoint.port)
        known = all(left.stream in book.left for left in lefts if left.stream in book.arrived)
        if known or asyncio.get_running_loop().time() > deadline:
            return book
        await asyncio.sleep(0.1)


def reckon(lefts: list[Left], book: Departures) -> Figures:
    """From each leave to the moment in which the endpoint knew, in milliseconds. A request that reached the endpoint
    only after its client had left tells nothing of that, but it too is missed if it was never closed."""
    figures: Figures = {"missed": float(sum(left.stream in book.arrived.keys() - book.left.keys() for left in lefts))}
    for name, flowing in (("flowing", True), ("silent", False)):
        times_ms = [
            (book.left[left.stream] - left.left_ns) / 1e6
            for left in lefts
            if left.flowing is flowing and left.stream in book.left and book.arrived[left.stream] < left.left_ns
        ]
        figures |= {
            f"{name}_p50_ms": percentile(times_ms, 0.5),
            f"{name}_p99_ms": percentile(times_ms, 0.99),
            f"{name}_max_ms": percentile(times_ms, 1),
        }
    return figures


LEAVE = Scenario(
    "leave: from a client's leaving to the endpoint's seeing its request closed (ms), 200 clients coming and going",
    (
        Metric("flowing_p50_ms", "flowing p50"),
        Metric("flowing_p99_ms", "p99"),
        Metric("flowing_max_ms", "max", ratio=False),
        Metric("silent_p50_ms", "silent p50"),
        Metric("silent_p99_ms", "p99"),
        Metric("silent_max_ms", "max", ratio=False),
        Metric("missed", "missed", 0, fault=True),
        Metric("leaves_per_s", "leaves/s", 0, ratio=False),
        Metric("server_core_percent", "server core %", 0, ratio=False),
        WRONG,
        *TRUST,
    ),
    measure_leave,
    paced=True,
)
