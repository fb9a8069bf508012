"""The HTML report: one file that needs nothing else, no script among it. Whatever came from outside is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ops.loadtest import plots
from ops.loadtest.capacity import Capacity
from ops.loadtest.metrics import PERCENTILES
from ops.loadtest.options import Options
from ops.loadtest.record import Outcome
from ops.loadtest.run import Load
from ops.loadtest.summary import Summary
from ops.loadtest.target import Target
from ops.loadtest.terminal import shown_latencies

__all__ = ["Report", "render"]

_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1d21; --faint: #6a717b; --line: #dfe3e8; --tint: #f5f7f9;
  --first: #2468b4; --second: #c2691c; --good: #1d7a46; --bad: #c0342c; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --faint: #949ca7; --line: #30363e;
  --tint: #1c2026; --first: #6aa9ee; --second: #e79a55; --good: #5cc48a; --bad: #f0766d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 2.6rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 46rem; }
.faint, figcaption, dt { color: var(--faint); }
.good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.4rem, 1fr)); gap: .8rem; margin: 1.6rem 0 0; }
.tile { background: var(--tint); border-radius: .5rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.45rem; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); font-size: .82rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 500; }
table.narrow { width: auto; min-width: 22rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.sub td { color: var(--faint); border-bottom-style: dotted; } tr.sub td:first-child { padding-left: 1.2rem; }
figure { margin: 1rem 0 1.4rem; } figcaption { font-size: .85rem; margin-top: .2rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: inherit !important; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.4rem; margin: .4rem 0; font-size: .92rem; }
dd { margin: 0; } code { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  overflow-wrap: anywhere; }
"""

_DEFINITIONS = {
    "TTFT": "time to first token: from when the request was due to its first token",
    "ITL": "inter-token latency: each gap between two tokens, of all requests; tokens of one network read are 0 apart",
    "TPOT": "time per output token of a request: (E2EL - TTFT) / (tokens - 1)",
    "E2EL": "end-to-end latency: from when the request was due to its last token; completed requests only",
    "service": "the same, from when the tester really began the request",
    "token": "a delta with content or reasoning, as it came; no tokenizer is at work",
    "goodput": "completed requests a second that kept every objective of a request; a request's itl is the p99 of its "
    "own gaps",
    "cut off": "still running when the tester stopped. Its tokens count in the throughput; a wait that was still open "
    "counts in TTFT or ITL with what it had lasted",
    "window": "TTFT, TPOT and E2EL are of the requests due in the measured window (shaded in the plots), ITL of the "
    "gaps that began in it, rates of what happened in it, outcomes of the requests that ran in it",
}


@dataclass(frozen=True, slots=True)
class Report:
    """All that a report tells."""

    summary: Summary
    capacity: Capacity | None
    target: Target
    options: Options
    began: str
    environment: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """The same as one object."""
        return {
            "began": self.began,
            "command": self.options.command,
            "url": self.target.url,
            "target": self.target.kind.value,
            "model": self.target.model or None,
            "environment": self.environment,
            **self.summary.as_json(),
            "capacity": self.capacity.as_json() if self.capacity else None,
        }


def render(report: Report) -> str:
    summary, capacity = report.summary, report.capacity
    sections = [_head(report), _tiles(summary, capacity), _warnings(summary)]
    if capacity is not None:
        caption = "Each point is one step; a cross broke an objective, the dashed line is its bound."
        sections += [
            _section("Capacity", f"<p>{escape(_sentence(str(capacity)))}</p>"),
            _figure(plots.capacity_plot(capacity), caption),
            _steps(capacity),
        ]
    streams = "" if capacity is None else f" at {summary.load.streams} streams"
    caption = "The share of values that were no greater; the dashed line is an objective."
    sections += [
        _section(f"Latencies{streams}", _latencies(summary)),
        _figure(plots.latency_plot(summary), caption),
        _figure(plots.latency_over_time_plot(summary.over_time), "Shaded: the measured window."),
        _section("Load", ""),
        _figure(plots.load_over_time_plot(summary.over_time), "Shaded: the measured window."),
        _section("Outcomes", _outcomes(summary)),
        _section("Objectives", _objectives(summary)) if summary.verdicts or summary.objectives.request else "",
        _section("The tester itself", _tester(summary)),
        _section("Definitions", _list(_DEFINITIONS.items())),
        _section("Run", _run(report)),
    ]
    title = escape(f"Load test of {report.target.url}")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_CSS}</style>\n'
        + "\n".join(filter(None, sections))
        + "\n</html>\n"
    )


def _head(report: Report) -> str:
    early = ", ended early" if report.summary.interrupted else ""
    return (
        f"<h1>Load test</h1>\n<p><code>{escape(report.target.url)}</code></p>\n"
        f'<p class="faint">{escape(_load_text(report))}{early}; begun {escape(report.began)}</p>'
    )


def _load_text(report: Report) -> str:
    load: Load = report.summary.load
    if report.capacity is not None:
        return f"Search for the capacity, {load.duration_s:g} s a step"
    kind = f"{load.streams} streams, closed loop" if load.rate is None else f"{load.rate:g} requests/s, open loop"
    return f"{kind}, measured for {report.summary.duration:.1f} s"


def _tiles(summary: Summary, capacity: Capacity | None) -> str:
    latencies = summary.latencies
    tiles = [
        (_number(summary.output_throughput, 0), "tokens/s"),
        (_number(summary.request_throughput, 2), "requests/s"),
        (_number(latencies["ttft"].p99), "ms TTFT p99"),
        (_number(latencies["itl"].p99), "ms ITL p99"),
    ]
    if capacity is not None:
        tiles.insert(0, (str(capacity.streams), "streams held"))
    if summary.request_goodput is not None:
        tiles.append((_number(summary.request_goodput, 2), "good requests/s"))
    tiles.append(("-" if math.isnan(summary.error_rate) else f"{summary.error_rate:.2%}", "failed"))
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _warnings(summary: Summary) -> str:
    return "".join(
        f'<p class="bad">The tester itself was a bottleneck: {escape(warning)}.</p>' for warning in summary.warnings
    )


def _latencies(summary: Summary) -> str:
    statistics = ("mean", "std", "min", *PERCENTILES, "max")
    rows = [
        [title, str(latency.count), *(_number(latency.get(statistic)) for statistic in statistics)]
        for title, latency in shown_latencies(summary)
    ]
    return _table(["ms", "count", *statistics], rows)


def _steps(capacity: Capacity) -> str:
    rows = []
    for step in capacity.steps:
        latencies = step.summary.latencies
        rows.append(
            [
                str(step.streams),
                "held" if step.held else "broke",
                _number(step.summary.output_throughput, 0),
                *(_number(latencies[name].get(statistic)) for name in ("ttft", "itl") for statistic in ("p50", "p99")),
                "-" if math.isnan(step.summary.error_rate) else f"{step.summary.error_rate:.2%}",
                f"{step.summary.overhead.cpu_share:.0%}",
            ]
        )
    titles = ["streams", "", "tokens/s", "TTFT p50", "p99", "ITL p50", "p99", "failed", "tester's core"]
    return _table(titles, rows)


def _outcomes(summary: Summary) -> str:
    rows = []
    for outcome in Outcome:
        count = summary.outcomes[outcome]
        rows.append(f"<tr><td>{escape(outcome.replace('_', ' '))}</td><td>{count}</td></tr>")
        rows += [
            f'<tr class="sub"><td>{escape(str(failure))}</td><td>{failure.count}</td></tr>'
            for failure in summary.failures
            if failure.outcome is outcome
        ]
    resumed = ""
    if summary.reconnects or summary.lost or summary.doubled:
        wrong = "bad" if summary.lost or summary.doubled else "good"
        resumed = (
            f'<p class="{wrong}">{summary.reconnects} reconnects: {summary.lost} events lost, '
            f"{summary.doubled} doubled.</p>"
        )
    malformed = f'<p class="bad">{summary.malformed} malformed events.</p>' if summary.malformed else ""
    return f'<div class="wide"><table class="narrow">{"".join(rows)}</table></div>{resumed}{malformed}'


def _objectives(summary: Summary) -> str:
    goodput = ""
    if kept := ", ".join(objective.text for objective in summary.objectives.request):
        share = "" if math.isnan(summary.good) else f", {summary.good:.2%} of those that completed or failed"
        shown = f"{_number(summary.request_goodput or 0.0, 2)} requests/s kept {kept}{share}."
        goodput = f"<p>{escape(shown)}</p>"
    return goodput + "".join(
        f'<p class="{"good" if verdict.kept else "bad"}">{escape(str(verdict))}</p>' for verdict in summary.verdicts
    )


def _tester(summary: Summary) -> str:
    overhead = summary.overhead
    lag, late = overhead.lag, overhead.start_late
    return _list(
        [
            (
                "processor",
                f"{overhead.cpu_share:.0%} of one core; {_number(overhead.cpu_us_per_token)} µs a token, all told",
            ),
            (
                "event loop late by",
                f"{_number(lag.p50, 2)} ms p50, {_number(lag.p99, 2)} p99, {_number(lag.max, 2)} max",
            ),
            (
                "requests begun late by",
                f"{_number(late.p50, 2)} ms p50, {_number(late.p99, 2)} p99, {_number(late.max, 2)} max",
            ),
        ]
    )


def _run(report: Report) -> str:
    load = report.summary.load
    told = [
        ("command", f"<code>{escape(report.options.command)}</code>"),
        ("target", escape(f"{report.target.kind} {report.target.model}".strip())),
        ("ramp, warm-up, grace", f"{load.ramp_s:g} s, {load.warmup_s:g} s, {load.grace_s:g} s"),
        *((name, escape(value)) for name, value in report.environment.items()),
    ]
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in told) + "</dl>"


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _list(entries: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries) + "</dl>"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _number(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
