"""A run's figures: one value that the tables, the JSON and the report are made of. No I/O."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ops.loadtest.client import OUT_OF_SOCKETS
from ops.loadtest.metrics import Distribution, Histogram
from ops.loadtest.objectives import Objectives, Verdict
from ops.loadtest.overhead import Overhead
from ops.loadtest.record import Outcome
from ops.loadtest.run import Load, RunResult
from ops.loadtest.tally import Tally

__all__ = ["Failure", "OverTime", "Summary", "finite", "summarise"]


@dataclass(frozen=True, slots=True)
class Failure:
    """So many requests that failed alike; ``status`` is 0 where there was no response."""

    outcome: Outcome
    status: int
    code: str
    count: int

    def __str__(self) -> str:
        return " ".join([self.outcome, *([str(self.status)] if self.status else []), self.code]).strip()


@dataclass(frozen=True, slots=True)
class OverTime:
    """The run as lists, one value a moment of ``moment_s``; NaN where a moment has nothing. Latencies are in ms."""

    moment_s: float
    window_s: tuple[float, float]  # where the measured window begins and ends
    open_streams: list[float]
    tokens_per_s: list[float]
    completed_per_s: list[float]
    failed_per_s: list[float]
    ttft_p50: list[float]
    ttft_p99: list[float]
    itl_p50: list[float]
    itl_p99: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Of the measured window, as the docstring of ``ops.loadtest.tally`` defines what belongs to it."""

    load: Load
    objectives: Objectives
    interrupted: bool
    duration: float  # s
    outcomes: dict[Outcome, int]
    failures: list[Failure]  # the most frequent first
    request_throughput: float  # completed a second
    output_throughput: float  # tokens a second
    request_goodput: float | None  # good requests a second; None without an objective of each request
    total_output_tokens: int
    reasoning_tokens: int  # of the run
    reported_input_tokens: int
    reported_output_tokens: int
    bytes: int  # of the run
    max_concurrent_requests: int
    latencies: dict[str, Distribution]
    histograms: dict[str, Histogram]
    error_rate: float
    good: float
    verdicts: list[Verdict]
    reconnects: int
    lost: int
    doubled: int
    malformed: int
    overhead: Overhead
    over_time: OverTime

    @property
    def kept(self) -> bool:
        """Whether every objective of the run was kept."""
        return all(verdict.kept for verdict in self.verdicts)

    @property
    def warnings(self) -> list[str]:
        """Why the figures are not the endpoint's alone: what the tester itself was short of."""
        short = any(failure.code == OUT_OF_SOCKETS for failure in self.failures)
        return [*self.overhead.warnings, *(["its system gave it no more sockets"] if short else [])]

    def as_json(self) -> dict[str, Any]:
        """Names as ``vllm bench serve`` has them, latencies in ms."""
        return {
            "duration": round(self.duration, 3),
            "interrupted": self.interrupted,
            "load": dataclasses.asdict(self.load),
            **{outcome.value: self.outcomes[outcome] for outcome in Outcome},
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
            "error_rate": finite(self.error_rate),
            "request_throughput": finite(self.request_throughput),
            "output_throughput": finite(self.output_throughput),
            "request_goodput": None if self.request_goodput is None else finite(self.request_goodput),
            "good": finite(self.good),
            "total_output_tokens": self.total_output_tokens,
            "reasoning_tokens": self.reasoning_tokens,
            "reported_input_tokens": self.reported_input_tokens,
            "reported_output_tokens": self.reported_output_tokens,
            "bytes": self.bytes,
            "max_concurrent_requests": self.max_concurrent_requests,
            **{f"{name}_ms": latency.as_json() for name, latency in self.latencies.items()},
            "request_objectives": [objective.text for objective in self.objectives.request],
            "objectives": [
                {"objective": verdict.objective.text, "value": finite(verdict.value), "kept": verdict.kept}
                for verdict in self.verdicts
            ],
            "reconnects": self.reconnects,
            "lost": self.lost,
            "doubled": self.doubled,
            "malformed_events": self.malformed,
            "tester": {
                "cpu_share": finite(self.overhead.cpu_share),
                "cpu_us_per_token": finite(self.overhead.cpu_us_per_token),
                "lag_ms": self.overhead.lag.as_json(),
                "start_late_ms": self.overhead.start_late.as_json(),
                "warnings": self.warnings,
            },
            "over_time": {
                name: [finite(item) for item in value] if isinstance(value, list | tuple) else value
                for name, value in dataclasses.asdict(self.over_time).items()
            },
        }


def summarise(result: RunResult, objectives: Objectives) -> Summary:
    tally = result.tally
    seconds = tally.window.seconds
    histograms = {
        "ttft": tally.ttft,
        "itl": tally.itl,
        "tpot": tally.tpot,
        "e2el": tally.e2el,
        "ttft_service": tally.ttft_service,
        "e2el_service": tally.e2el_service,
        "connect": tally.connect,
        "resume": tally.resume,
    }
    latencies = {name: histogram.distribution() for name, histogram in histograms.items()}
    failed = sum(count for outcome, count in tally.outcomes.items() if outcome.failed)
    judged = failed + tally.outcomes[Outcome.COMPLETED]
    tried = judged + tally.outcomes[Outcome.CUT_OFF]
    shares = {
        "error_rate": failed / tried if tried else math.nan,
        "good": tally.good / judged if judged else math.nan,
    }
    return Summary(
        load=result.load,
        objectives=objectives,
        interrupted=result.interrupted,
        duration=seconds,
        outcomes={outcome: tally.outcomes[outcome] for outcome in Outcome},
        failures=[Failure(*key, count) for key, count in tally.codes.most_common()],
        request_throughput=tally.completed_in_window / seconds if seconds else math.nan,
        output_throughput=tally.tokens / seconds if seconds else math.nan,
        request_goodput=tally.good_in_window / seconds if seconds and objectives.request else None,
        total_output_tokens=tally.tokens,
        reasoning_tokens=tally.reasoning_tokens,
        reported_input_tokens=tally.prompt_tokens,
        reported_output_tokens=tally.completion_tokens,
        bytes=tally.bytes,
        max_concurrent_requests=tally.most_open_streams,
        latencies=latencies,
        histograms=histograms,
        error_rate=shares["error_rate"],
        good=shares["good"],
        verdicts=[objective.judge(latencies, shares) for objective in objectives.run],
        reconnects=tally.reconnects,
        lost=tally.lost,
        doubled=tally.doubled,
        malformed=tally.malformed,
        overhead=result.overhead,
        over_time=_over_time(tally),
    )


def finite(value: float) -> float | None:
    """For JSON, which lacks NaN."""
    return None if math.isnan(value) else round(value, 4)


def _over_time(tally: Tally) -> OverTime:
    moments, moment_s, window = tally.moments, tally.moment_s, tally.window
    return OverTime(
        moment_s,
        ((window.begin_ns - window.run_ns) / 1e9, (window.end_ns - window.run_ns) / 1e9),
        open_streams=[float(moment.open_streams) for moment in moments],
        tokens_per_s=[moment.tokens / moment_s for moment in moments],
        completed_per_s=[moment.completed / moment_s for moment in moments],
        failed_per_s=[moment.failed / moment_s for moment in moments],
        ttft_p50=[moment.ttft.percentile_ms(0.5) for moment in moments],
        ttft_p99=[moment.ttft.percentile_ms(0.99) for moment in moments],
        itl_p50=[moment.itl.percentile_ms(0.5) for moment in moments],
        itl_p99=[moment.itl.percentile_ms(0.99) for moment in moments],
    )
