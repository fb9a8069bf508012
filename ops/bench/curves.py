"""``python -m ops.bench.curves [CURVE…]``: how the cost grows with the work, as JSON and as plots for the README.

Each curve changes one thing. It is a measurement of several minutes beside ``make bench``, so it is a command of its
own; a curve that is asked for takes its place in the JSON, the others stay as they were, and all plots are drawn anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ops.bench.figures import Figures, summary
from ops.bench.plots import draw
from ops.bench.procs import ROOT, Cores, environment, fast_loop, memory, raise_descriptor_limit
from ops.bench.relays import NGINX, SLUICE, Relay, sluice
from ops.bench.rig import Rig, open_rig
from ops.bench.scenarios.flow import flow
from ops.bench.scenarios.memory import read_answers
from ops.bench.scenarios.scenario import Scale
from ops.bench.viewers import Record, Viewer, open_viewers

__all__ = ["CURVES", "Curve"]

_IMAGES: Final = ROOT / "ops" / "images"
_SCALE: Final = Scale(ramp_s=1.0, window_s=3.0)
_SETTLE_S: Final = 0.5

Points = list[Figures]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Curve:
    """``measure`` gives the points of one relay, in the order of what was changed."""

    relays: tuple[Relay, ...]
    measure: Callable[[Relay, Cores], Points]


# ---- What a token costs: each point with a server of its own

_ROUNDS: Final = 3  # of which the median is told
_TOKENS_PER_S: Final = 5_000  # together; half of what fills the core, so that no point is one of a full one


def measure_streams(relay: Relay, cores: Cores) -> Points:
    """The same number of tokens a second, spread over more and more streams: what is left is what a stream costs.

    It is not all that differs. A server that is woken up for each token pays for that too, and thousands of streams
    make the rig's ticks longer, so that more tokens leave in one: ``tokens_per_wake_up`` tells, and nginx's curve shows
    what that alone does. ``tokens_per_read`` tells whether tokens of one stream shared a read."""
    return [_flow(relay, cores, streams, _TOKENS_PER_S / streams) for streams in (10, 100, 1000, 5000)]


def measure_rate(relay: Relay, cores: Cores) -> Points:
    """The same 200 streams, faster and faster, to where the core is full."""
    return [_flow(relay, cores, 200, rate) for rate in (10, 25, 50, 100, 200)]


def _flow(relay: Relay, cores: Cores, streams: int, rate: float) -> Figures:
    async def run(rig: Rig) -> Figures:
        return {"streams": streams, "rate": rate, **await flow(rig, _SCALE, streams=streams, rate=rate)}

    rounds = [_with_rig(relay, cores, run) for _ in range(_ROUNDS)]
    return summary(rounds)


# ---- What a stream holds: one server, more and more in it


def measure_open(relay: Relay, cores: Cores) -> Points:
    """Streams that got one token and then wait."""

    async def run(rig: Rig) -> Points:
        base, points, viewers = await _base_pss(rig), list[Figures](), list[Viewer]()
        for streams in (0, 500, 1000, 2000, 3000, 4000, 5000):
            more = range(1000 + len(viewers), 1000 + streams)
            viewers += await open_viewers(rig.port, rig.ask, _one_token_each(more), Record())
            points.append({"streams": streams, "pss_mb": await _pss(rig) / 1024, "base_pss_mb": base / 1024})
        return points

    return _with_rig(relay, cores, run)


def measure_finished(relay: Relay, cores: Cores) -> Points:
    """Answers of 200 tokens that were read to their end and can still be replayed: all within the window of 60 s."""

    async def run(rig: Rig) -> Points:
        base, points, read = await _base_pss(rig), list[Figures](), 0
        for answers in (0, 500, 1000, 1500, 2000, 2500):
            if await read_answers(rig, range(1000 + read, 1000 + answers), 200, Record()):
                raise RuntimeError("an answer was not right")
            read = answers
            points.append({"answers": answers, "pss_mb": await _pss(rig) / 1024, "base_pss_mb": base / 1024})
        return points

    return _with_rig(relay, cores, run)


def _one_token_each(streams: range) -> list[tuple[int, str]]:
    return [(stream, f"id={stream} tokens=1 hold=1") for stream in streams]


async def _base_pss(rig: Rig) -> int:
    await read_answers(rig, range(20), 200, Record())
    return await _pss(rig)


async def _pss(rig: Rig) -> int:
    assert rig.server is not None
    await asyncio.sleep(_SETTLE_S)
    return memory(rig.server.pid).pss


# ---- What a heartbeat costs

_PING: Final = b"event: ping\ndata: {}\n\n"


def measure_heartbeat(relay: Relay, cores: Cores) -> Points:
    """Idle streams that get a heartbeat every second, of which each is to be heard."""

    async def run(rig: Rig) -> Points:
        points, viewers, record = list[Figures](), list[Viewer](), Record(timed=False)
        for streams in (0, 1000, 2000, 3000, 4000, 5000):
            more = range(1000 + len(viewers), 1000 + streams)
            viewers += await open_viewers(rig.port, rig.ask, _one_token_each(more), record)
            await asyncio.sleep(1.5)  # all of them have had their first
            record.bytes, record.recording = 0, True
            watched = rig.watch()
            await asyncio.sleep(4)
            figures, pings = watched(), record.bytes / len(_PING)
            record.recording = False
            cost = {"us_per_ping": 1e6 * figures["cpu_s"] / pings} if pings else {}
            points.append({"streams": streams, "pings_per_s": pings / figures["wall_s"], **figures, **cost})
        return points

    return _with_rig(relay, cores, run)


def _with_rig(relay: Relay, cores: Cores, run: Callable[[Rig], Awaitable[T]]) -> T:
    async def opened() -> T:
        async with open_rig(relay, cores) as rig:
            return await run(rig)

    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        return runner.run(opened())


CURVES: Final = {
    "streams": Curve((SLUICE, NGINX), measure_streams),
    "rate": Curve((SLUICE, NGINX), measure_rate),
    "open": Curve((SLUICE, NGINX), measure_open),
    "finished": Curve((SLUICE,), measure_finished),
    "heartbeat": Curve((sluice(SLUICE_HEARTBEAT="1"),), measure_heartbeat),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ops.bench.curves", description="Measures how the cost grows with the work, and plots it."
    )
    parser.add_argument("curve", nargs="*", help=f"which to measure: {', '.join(CURVES)} (default: all)")
    parser.add_argument("--draw", action="store_true", help="measure nothing, only draw what was measured before")
    arguments = parser.parse_args()
    if unknown := set(arguments.curve) - CURVES.keys():
        parser.error(f"no such curve: {', '.join(sorted(unknown))}")
    told = _IMAGES / "curves.json"
    report: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {}
    if not arguments.draw:
        cores = Cores.choose()
        raise_descriptor_limit()
        os.sched_setaffinity(0, {cores.rig})
        for name in arguments.curve or CURVES:
            report[name] = {
                "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "environment": environment(),
                "points": measure(name, cores),
            }
            told.write_text(json.dumps(report, indent=1) + "\n")
    for path in draw({name: curve["points"] for name, curve in report.items()}, _IMAGES):
        print(path.relative_to(ROOT))
    return 0


def measure(name: str, cores: Cores) -> dict[str, Points]:
    """The curve's points for each of its relays that can be had here."""
    points: dict[str, Points] = {}
    for relay in CURVES[name].relays:
        if reason := relay.missing():
            print(f"{relay.name}: skipped, {reason}")
            continue
        points[relay.name] = [_rounded(point) for point in CURVES[name].measure(relay, cores)]
        print(name, relay.name, *points[relay.name], sep="\n  ", flush=True)
    return points


def _rounded(figures: Figures) -> Figures:
    """Four significant digits: more would be noise in every diff of the file."""
    return {key: float(f"{figure:.4g}") for key, figure in figures.items() if not math.isnan(figure)}


if __name__ == "__main__":
    sys.exit(main())
