"""``python -m ops.bench [SCENARIO…]``: measure Sluice beside the plain relay, print a table, write JSON."""

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

from ops.bench.figures import Figures, summary, table
from ops.bench.procs import Cores, environment, raise_descriptor_limit
from ops.bench.scenarios import FULL, QUICK, RELAYS, SCENARIOS, Relay, Scale, Scenario, open_rig
from ops.bench.viewers import ViewerFailed


async def measure(
    scenario: Scenario, relays: list[Relay], scale: Scale, rounds: int, cores: Cores
) -> dict[str, list[Figures]]:
    """Every relay once a round, in turn, so that a slow minute of the machine falls on all of them."""
    results: dict[str, list[Figures]] = {relay.name: [] for relay in relays}
    for _ in range(rounds):
        for relay in relays:
            async with open_rig(relay, cores) as rig:
                results[relay.name].append(await scenario.run(rig, scale))
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ops.bench", description="Measures the relay over loopback (Linux)."
    )
    parser.add_argument("scenario", nargs="*", help=f"which to run: {', '.join(SCENARIOS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="one round with shorter windows")
    parser.add_argument("--rounds", type=int, help="rounds of which the median is told (default: 3, quick: 1)")
    parser.add_argument("--streams", type=int, metavar="N", help="streams of the cpu scenario (default: 200)")
    parser.add_argument(
        "--relay", choices=RELAYS, action="append", help="measure only this one (default: sluice, plain)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures there too")
    arguments = parser.parse_args()
    if unknown := set(arguments.scenario) - SCENARIOS.keys():
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    for name in ("rounds", "streams"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name} takes 1 or more")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    scale = QUICK if arguments.quick else FULL
    if arguments.streams:
        scale = dataclasses.replace(scale, cpu_streams=arguments.streams)
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    relays = [RELAYS[name] for name in arguments.relay or ("sluice", "plain")]
    machine, cores = environment(), Cores.choose()
    raise_descriptor_limit()
    os.sched_setaffinity(0, {cores.rig})  # where the viewers run: in this process
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"server on core {cores.server}, simulator and viewers on core {cores.rig}; medians of {rounds} round(s)")
    print("disturbed: the share of the time in which the server could run, but something else had its core")
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
        scenario = SCENARIOS[name]
        try:
            results = asyncio.run(measure(scenario, relays, scale, rounds, cores))
        except (ViewerFailed, RuntimeError, OSError) as exc:
            sys.exit(f"{name}: {exc or type(exc).__name__}")
        rows = {relay: summary(figures, scenario.metrics) for relay, figures in results.items()}
        print(f"\n{scenario.title}\n{table(scenario.metrics, rows, (relays[0].name, relays[-1].name))}", flush=True)
        report["scenarios"][name] = {"summary": rows, "rounds": results}
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
