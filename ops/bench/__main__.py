"""``python -m ops.bench [SCENARIO…]``: measure Sluice beside its peers, print tables, ratios and verdicts; JSON."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ops.bench.figures import Figures, aligned, ratio, summary, table
from ops.bench.goals import verdicts
from ops.bench.procs import Cores, environment, fast_loop, raise_descriptor_limit
from ops.bench.relays import DIRECT, RELAYS, SLUICE, Relay
from ops.bench.rig import open_rig
from ops.bench.scenarios import DOUBTS, FULL, QUICK, SCENARIOS, Scale, Scenario
from ops.bench.viewers import ViewerFailed

_FULL_ONLY = ("s0", "kept")
_COMPARED = ("sluice", "plain", "nginx", "fastapi", "direct")


@dataclasses.dataclass(slots=True)
class Results:
    """Of one scenario: each relay's figures, a round after the other, and why a relay has none."""

    rounds: dict[str, list[Figures]]
    missing: dict[str, str]


def measure(scenario: Scenario, relays: Sequence[Relay], scale: Scale, rounds: int, cores: Cores) -> Results:
    """Every relay once a round, in turn, so that a slow minute of the machine falls on all of them."""
    results = Results({}, {})
    for relay in relays:
        if scenario.streams > relay.most_streams:
            results.missing[relay.name] = f"skipped, it holds no more than {relay.most_streams} streams"
        elif relay.key not in scenario.without:
            results.rounds[relay.name] = []
    for _ in range(rounds):
        for relay in relays:
            if relay.name in results.rounds:
                try:
                    results.rounds[relay.name].append(_measure_once(scenario, relay, scale, cores))
                except (ViewerFailed, RuntimeError, OSError) as exc:
                    print(f"{relay.name}: {exc}", file=sys.stderr)
                    results.missing[relay.name] = f"failed, {(str(exc) or type(exc).__name__).splitlines()[-1]}"
                    del results.rounds[relay.name]
    return results


def _measure_once(scenario: Scenario, relay: Relay, scale: Scale, cores: Cores) -> Figures:
    async def run() -> Figures:
        async with open_rig(relay, cores) as rig:
            return await scenario.run(rig, scale)

    with asyncio.Runner(loop_factory=fast_loop()) as runner:  # a loop of its own: nothing of it outlives a failure
        return runner.run(run())


def show(scenario: Scenario, results: Results) -> str:
    """The scenario's table: a row for each relay, and the first one's ratio to each of the others."""
    summaries = {name: summary(rounds, scenario.metrics) for name, rounds in results.rounds.items()}
    rows = {f"{name} {scenario.doubts(figures)}".rstrip(): figures for name, figures in summaries.items()}
    first, *others = results.rounds or ("",)
    divided = [metric.key for metric in scenario.metrics if metric.ratio and not metric.fault]
    ratios = {
        f"{first} ÷ {other}": {key: ratio(results.rounds[first], results.rounds[other], key) for key in divided}
        for other in others
        if divided and other != DIRECT.name
    }
    lines = [scenario.title, table(scenario.metrics, rows, ratios)]
    lines += (f"{mark} {meaning}" for mark, meaning in DOUBTS.items() if any(mark in name for name in rows))
    lines += (f"{name}: {reason}" for name, reason in results.missing.items())
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ops.bench", description="Measures the relay over loopback (Linux)."
    )
    parser.add_argument(
        "scenario",
        nargs="*",
        help=f"which to run: {', '.join(SCENARIOS)} (default: all; quick: without {' and '.join(_FULL_ONLY)})",
    )
    parser.add_argument("--quick", action="store_true", help="one round with shorter windows")
    parser.add_argument("--rounds", type=int, help="rounds of which the median is told (default: 3, quick: 1)")
    parser.add_argument(
        "--relay",
        choices=RELAYS,
        action="append",
        help=f"measure only this one; again for more (default: {', '.join(_COMPARED)})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures there too")
    arguments = parser.parse_args()
    if unknown := set(arguments.scenario) - SCENARIOS.keys():
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds takes 1 or more")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    scale = QUICK if arguments.quick else FULL
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    relays = choose([RELAYS[name] for name in arguments.relay or _COMPARED])
    machine, cores, began = environment(), Cores.choose(), time.time()
    raise_descriptor_limit()
    os.sched_setaffinity(0, {cores.rig})  # where the viewers run: in this process
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"server on core {cores.server}, simulator and viewers on core {cores.rig}; medians of {rounds} round(s)")
    print("direct: viewers straight at the simulator; others: the share of the server's core that was not the server's")
    if not cores.apart:
        print("only one core: server and rig disturb each other, and delays mean little", file=sys.stderr)

    measured: dict[str, Results] = {}
    report: dict[str, Any] = {
        "environment": machine,
        "cores": dataclasses.asdict(cores),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "rounds": rounds,
        "scale": dataclasses.asdict(scale),
        "scenarios": {},
    }
    for name in arguments.scenario or [name for name in SCENARIOS if not arguments.quick or name not in _FULL_ONLY]:
        measured[name] = measure(SCENARIOS[name], relays, scale, rounds, cores)
        print(f"\n{show(SCENARIOS[name], measured[name])}", flush=True)
    told = verdicts({name: results.rounds for name, results in measured.items()})
    shown = [row for row in told if row[-1] != "not measured" or not arguments.scenario]
    print("\n" + aligned([("goal", "must", "aim", "measured", "verdict"), *shown]))
    print(f"\ntook {(time.time() - began) / 60:.1f} minutes")
    if arguments.json:
        report["scenarios"] = {name: dataclasses.asdict(results) for name, results in measured.items()}
        report["goals"] = [dict(zip(("goal", "must", "aim", "measured", "verdict"), row, strict=True)) for row in told]
        arguments.json.write_text(json.dumps(_without_nan(report), indent=2) + "\n")
    return int(any(SLUICE.name in results.missing for results in measured.values()))


def choose(relays: Sequence[Relay]) -> list[Relay]:
    """Those of the relays that can be measured here; the others are named, with the reason."""
    reasons = [relay.missing() for relay in relays]
    for relay, reason in zip(relays, reasons, strict=True):
        if reason:
            print(f"{relay.name}: skipped, {reason}")
    return [relay for relay, reason in zip(relays, reasons, strict=True) if not reason]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what was not there to be measured is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(main())
