"""The tables that a run ends with, on stdout."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from ops.loadtest.capacity import Capacity
from ops.loadtest.metrics import PERCENTILES, Distribution
from ops.loadtest.objectives import LATENCIES
from ops.loadtest.record import Outcome
from ops.loadtest.summary import Summary

__all__ = ["open_console", "print_capacity", "print_summary", "shown_latencies"]

_WIDTH = 110  # where there is no terminal that has one

_LATENCY_TITLES = {
    "ttft": "TTFT",
    "itl": "ITL",
    "tpot": "TPOT",
    "e2el": "E2EL",
    "ttft_service": "TTFT, service",
    "e2el_service": "E2EL, service",
    "connect": "connecting",
    "resume": "resuming",
}


def open_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def shown_latencies(summary: Summary) -> Iterator[tuple[str, Distribution]]:
    """Those worth a row: the four always, service times where there is a schedule to differ from, others if any."""
    for name, title in _LATENCY_TITLES.items():
        latency = summary.latencies[name]
        service = name.endswith("_service")
        if name in LATENCIES or (latency.count and (not service or summary.load.rate is not None)):
            yield title, latency


def print_summary(console: Console, summary: Summary) -> None:
    console.print(_rates(summary))
    console.print(_outcomes(summary))
    console.print(_latencies(summary))
    for verdict in summary.verdicts:
        console.print(str(verdict), style="green" if verdict.kept else "red", markup=False)
    console.print(_tester(summary), style="dim")
    for warning in summary.warnings:
        console.print(f"The tester itself was a bottleneck: {warning}.", style="bold red", markup=False)


def print_capacity(console: Console, capacity: Capacity) -> None:
    table = Table("streams", "", "tokens/s", "TTFT p99", "ITL p50", "ITL p99", "failed", title="Capacity", min_width=70)
    for column in table.columns:
        column.justify = "right"
    for step in capacity.steps:
        latencies = step.summary.latencies
        table.add_row(
            str(step.streams),
            "[green]held[/]" if step.held else "[red]broke[/]",
            _number(step.summary.output_throughput),
            _number(latencies["ttft"].p99),
            _number(latencies["itl"].p50),
            _number(latencies["itl"].p99),
            "-" if math.isnan(step.summary.error_rate) else f"{step.summary.error_rate:.1%}",
        )
    console.print(table)
    console.print(f"Capacity: {capacity}", style="bold", markup=False)


def _rates(summary: Summary) -> Table:
    table = Table.grid(padding=(0, 3))
    ended = " (ended early)" if summary.interrupted else ""
    rows = [
        ("measured for", f"{summary.duration:.1f} s{ended}"),
        ("output throughput", f"{_number(summary.output_throughput)} tokens/s"),
        ("request throughput", f"{_number(summary.request_throughput, 2)} completed/s"),
    ]
    if summary.request_goodput is not None:
        kept = ", ".join(objective.text for objective in summary.objectives.request)
        rows.append(("goodput", f"{_number(summary.request_goodput, 2)} completed/s that kept {kept}"))
    rows.append(("most streams open", str(summary.max_concurrent_requests)))
    if summary.reconnects:
        told = f"{summary.reconnects}, {summary.lost} events lost, {summary.doubled} doubled"
        rows.append(("reconnects", told))
    elif summary.lost or summary.doubled:
        rows.append(("events", f"{summary.lost} lost, {summary.doubled} doubled"))
    for row in rows:
        table.add_row(*row)
    return table


def _outcomes(summary: Summary) -> Table:
    table = Table("outcome", "requests", title="Requests in the window", title_justify="left", min_width=40)
    table.columns[1].justify = "right"
    for outcome in Outcome:
        if (count := summary.outcomes[outcome]) or outcome is Outcome.COMPLETED:
            table.add_row(outcome.value.replace("_", " "), str(count))
            for failure in summary.failures:
                if failure.outcome is outcome:
                    table.add_row(f"  {failure}", str(failure.count), style="dim")
    return table


def _latencies(summary: Summary) -> Table:
    table = Table("ms", "count", "mean", "std", "min", *PERCENTILES, "max", title="Latencies", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for title, latency in shown_latencies(summary):
        figures = [latency.get(statistic) for statistic in ("mean", "std", "min", *PERCENTILES, "max")]
        table.add_row(title, str(latency.count), *map(_number, figures))
    return table


def _tester(summary: Summary) -> str:
    overhead = summary.overhead
    return (
        f"The tester: {overhead.cpu_share:.0%} of a core, {_number(overhead.cpu_us_per_token)} µs a token all told; "
        f"its loop was late by {_number(overhead.lag.p50)} ms at p50, {_number(overhead.lag.p99)} at p99, "
        f"{_number(overhead.lag.max)} at most."
    )


def _number(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
