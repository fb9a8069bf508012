"""``--self-test``: what the tester costs on this machine, against an endpoint that costs next to nothing.

It runs as any run does; what is left when the endpoint takes no time is the tester's (and the kernel's, and a little
of the loopback endpoint's): the floor below which no latency can be measured, and the processor time of a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ops.loadtest.client import Client
from ops.loadtest.objectives import Objectives
from ops.loadtest.progress import open_display
from ops.loadtest.prompts import Prompt
from ops.loadtest.run import Load, Run
from ops.loadtest.summary import Summary, finite, summarise
from ops.loadtest.target import Kind, Target

__all__ = ["SCENARIOS", "Finding", "Scenario", "findings_as_json", "print_findings", "self_test"]

_ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Scenario:
    title: str
    kind: Kind
    prompt: str
    streams: int
    seconds: float = 4.0
    keep_alive: bool = True
    of_requests: bool = False  # whether a request is what costs here, or a token


SCENARIOS = (
    Scenario("100 streams of 50 tokens/s, Sluice", Kind.SLUICE, "tokens=100000 rate=50", 100),
    Scenario("100 streams of 50 tokens/s, OpenAI", Kind.OPENAI, "tokens=100000 rate=50", 100),
    Scenario("500 streams of 40 tokens/s, Sluice", Kind.SLUICE, "tokens=100000 rate=40", 500),
    Scenario("answers of one token, one at a time", Kind.SLUICE, "tokens=1", 1, 3.0, of_requests=True),
    Scenario(
        "the same, each over a new connection", Kind.SLUICE, "tokens=1", 1, 3.0, keep_alive=False, of_requests=True
    ),
)


@dataclass(frozen=True, slots=True)
class Finding:
    scenario: Scenario
    summary: Summary

    @property
    def cpu_us(self) -> float:
        """Of the tester, for each request or token."""
        return self.summary.overhead.cpu_us_per_token  # one token a request, where requests are what costs


async def self_test(scenarios: Sequence[Scenario] = SCENARIOS, *, quiet: bool = False) -> list[Finding]:
    """Run each scenario in turn."""
    findings = []
    async with open_display(quiet=quiet) as display, _loopback() as port:
        for scenario in scenarios:
            target = Target(kind=scenario.kind, tls=False, host="127.0.0.1", port=port, path="/", model="loopback")
            load = Load(streams=scenario.streams, ramp_s=0.5, warmup_s=0.5, duration_s=scenario.seconds, grace_s=0.0)
            async with Client(target, timeout_s=_TIMEOUT_S, keep_alive=scenario.keep_alive) as client:
                run = Run(load, client, [Prompt(scenario.prompt)], Objectives())
                async with display.showing(run, scenario.title):
                    findings.append(Finding(scenario, summarise(await run.run(), Objectives())))
    return findings


def print_findings(console: Console, findings: list[Finding]) -> None:
    table = Table("self-test", "µs CPU", "of a", "core", "TTFT p50", "p99", "ITL p50", "p99", "lag p99 (ms)")
    for column in table.columns[1:]:
        column.justify = "right"
    for finding in findings:
        overhead, latencies = finding.summary.overhead, finding.summary.latencies
        itl = (
            ["", ""]
            if finding.scenario.of_requests
            else [f"{latencies['itl'].get(name):.2f}" for name in ("p50", "p99")]
        )
        ttft = (
            [f"{latencies['ttft'].get(name):.3f}" for name in ("p50", "p99")]
            if finding.scenario.of_requests
            else ["", ""]
        )
        unit = "request" if finding.scenario.of_requests else "token"
        core = f"{overhead.cpu_share:.0%}"
        table.add_row(
            finding.scenario.title, f"{finding.cpu_us:.1f}", unit, core, *ttft, *itl, f"{overhead.lag.p99:.2f}"
        )
    console.print(table)
    console.print(
        "Latencies in ms, the loopback endpoint's share included: no endpoint can be measured to be quicker.",
        style="dim",
    )


def findings_as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [
        {
            "scenario": finding.scenario.title,
            "of": "request" if finding.scenario.of_requests else "token",
            "cpu_us": finite(finding.cpu_us),
            **finding.summary.as_json(),
        }
        for finding in findings
    ]


@contextlib.asynccontextmanager
async def _loopback() -> AsyncIterator[int]:
    """The port of a loopback endpoint in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "ops.loadtest.loopback"], cwd=_ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None  # noqa: S101  it was asked for
        yield int(await process.stdout.readline())
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
