"""``python -m ops.bench [SCENARIO…]``: measure Sluice beside its peers, print tables and ratios, write JSON."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ops.bench.figures import Figures, ratio, summary, table
from ops.bench.procs import Cores, environment, fast_loop, raise_descriptor_limit
from ops.bench.relays import RELAYS, Relay
from ops.bench.rig import open_rig
from ops.bench.scenarios import FULL, QUICK, SCENARIOS, Scale, Scenario
from ops.bench.viewers import ViewerFailed

_COMPARED = ("sluice", "plain", "nginx", "direct")


@dataclasses.dataclass(slots=True)
class Results:
    """Of one scenario: each relay's figures, a round after the other, and why a relay has none."""

    rounds: dict[str, list[Figures]]
    failed: dict[str, str]


async def measure(scenario: Scenario, relays: list[Relay], scale: Scale, rounds: int, cores: Cores) -> Results:
    """Every relay once a round, in turn, so that a slow minute of the machine falls on all of them."""
    results = Results({relay.name: [] for relay in relays}, {})
    for _ in range(rounds):
        for relay in relays:
            if relay.name in results.failed:
                continue
            try:
                async with open_rig(relay, cores) as rig:
                    results.rounds[relay.name].append(await scenario.run(rig, scale))
            except (ViewerFailed, RuntimeError, OSError) as exc:
                results.failed[relay.name] = str(exc) or type(exc).__name__
                del results.rounds[relay.name]
    return results


def show(scenario: Scenario, results: Results) -> str:
    """The scenario's table: a row for each relay, and the first one's ratio to each of the others."""
    rows = {name: summary(rounds, scenario.metrics) for name, rounds in results.rounds.items()}
    first, *others = results.rounds or ("",)
    ratios = {
        f"{first} ÷ {other}": {
            metric.key: ratio(results.rounds[first], results.rounds[other], metric.key)
            for metric in scenario.metrics
            if metric.ratio and not metric.fault
        }
        for other in others
        if other != "direct"
    }
    lines = [scenario.title, table(scenario.metrics, rows, ratios)]
    lines += (f"{name}: failed, {reason}" for name, reason in results.failed.items())
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ops.bench", description="Measures the relay over loopback (Linux)."
    )
    parser.add_argument("scenario", nargs="*", help=f"which to run: {', '.join(SCENARIOS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="one round with shorter windows")
    parser.add_argument("--rounds", type=int, help="rounds of which the median is told (default: 3, quick: 1)")
    parser.add_argument(
        "--relay", choices=RELAYS, action="append", help=f"measure only this one (default: {', '.join(_COMPARED)})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures there too")
    arguments = parser.parse_args()
    if unknown := set(arguments.scenario) - SCENARIOS.keys():
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds takes 1 or more")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    scale = QUICK if arguments.quick else FULL
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    relays = [RELAYS[name] for name in arguments.relay or _COMPARED]
    for relay in relays:
        if missing := relay.missing():
            print(f"{relay.name}: skipped, {missing}")
    relays = [relay for relay in relays if not relay.missing()]
    machine, cores = environment(), Cores.choose()
    raise_descriptor_limit()
    os.sched_setaffinity(0, {cores.rig})  # where the viewers run: in this process
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"server on core {cores.server}, simulator and viewers on core {cores.rig}; medians of {rounds} round(s)")
    print("others: the share of the server's core that went to anything but the server")
    if not cores.apart:
        print("only one core: server and rig disturb each other, and delays mean little", file=sys.stderr)

    report: dict[str, Any] = {
        "environment": machine,
        "cores": dataclasses.asdict(cores),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rounds": rounds,
        "scale": dataclasses.asdict(scale),
        "scenarios": {},
    }
    for name in arguments.scenario or SCENARIOS:
        with asyncio.Runner(loop_factory=fast_loop()) as runner:
            results = runner.run(measure(SCENARIOS[name], relays, scale, rounds, cores))
        print(f"\n{show(SCENARIOS[name], results)}", flush=True)
        report["scenarios"][name] = dataclasses.asdict(results)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
