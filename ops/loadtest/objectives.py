"""``--slo``: what each request, or the run as a whole, has to keep; its grammar, and the verdict. No I/O.

    ttft=500ms  tpot=50ms  itl=100ms  e2el=10s    each request: together they make goodput
    ttft_p99=1s  itl_p99=100ms  e2el_mean=8s      the run: a statistic of all values
    error_rate=1%                    the run: the share of requests that failed (incomplete, error, refused); those that
                                     were cancelled on purpose or never sent do not count
    good=95%                         the run: of the requests that completed or failed, those that completed and kept
                                     every objective of a request

A request's ``itl`` is the p99 of its own gaps, since tokens that arrive in one read are 0 apart and would hide a stall
in a mean; ``tpot`` is the mean. A bound itself still keeps the objective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ops.loadtest import metrics
from ops.loadtest.metrics import PERCENTILES, Distribution
from ops.loadtest.quantities import BadQuantity, read_duration_s, read_share
from ops.loadtest.record import Outcome, Record

__all__ = ["LATENCIES", "BadObjective", "Objectives", "RequestObjective", "RunObjective", "Verdict", "read_objectives"]

LATENCIES = ("ttft", "tpot", "itl", "e2el")
_STATISTICS = ("mean", *PERCENTILES, "max")
_SHARES = ("error_rate", "good")

_OF_REQUEST = {
    "ttft": metrics.ttft_ns,
    "tpot": metrics.tpot_ns,
    "itl": metrics.itl_p99_ns,
    "e2el": metrics.e2el_ns,
}


class BadObjective(ValueError):
    """One part of ``--slo`` is not of the grammar; the text says what would be."""


@dataclass(frozen=True, slots=True)
class RequestObjective:
    """``text`` is what was written."""

    text: str
    latency: str
    bound_ms: float

    def kept_by(self, record: Record) -> bool:
        """Whether a completed request kept it; one that has no such figure (one token: no gap) did."""
        value_ns = _OF_REQUEST[self.latency](record)
        return value_ns is None or value_ns / 1e6 <= self.bound_ms


@dataclass(frozen=True, slots=True)
class RunObjective:
    """An upper bound in ms of one statistic, an upper bound of the error rate, or a lower one of the good share."""

    text: str
    name: str
    bound: float

    def judge(self, latencies: Mapping[str, Distribution], shares: Mapping[str, float]) -> Verdict:
        if self.name in _SHARES:
            value = shares[self.name]
            return Verdict(self, value, value >= self.bound if self.name == "good" else value <= self.bound)
        latency, _, statistic = self.name.partition("_")
        value = latencies[latency].get(statistic)
        return Verdict(self, value, value <= self.bound)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an objective of the run came to. NaN, which is to say no value at all, keeps nothing."""

    objective: RunObjective
    value: float  # ms, or a share of 1
    kept: bool

    def __str__(self) -> str:
        if math.isnan(self.value):
            shown = "nothing to measure"
        elif self.objective.name in _SHARES:
            shown = f"{self.value:.2%}"
        else:
            shown = f"{self.value:.1f} ms"
        return f"{self.objective.text}: {shown}, {'kept' if self.kept else 'broken'}"


@dataclass(frozen=True, slots=True)
class Objectives:
    """All that ``--slo`` says."""

    request: tuple[RequestObjective, ...] = ()
    run: tuple[RunObjective, ...] = ()

    def good(self, record: Record) -> bool:
        """Whether the request counts into goodput: it completed and kept every objective of a request."""
        return record.outcome is Outcome.COMPLETED and all(objective.kept_by(record) for objective in self.request)


def read_objectives(text: str) -> Objectives:
    """Parts ``NAME=BOUND`` between commas. Raises BadObjective."""
    request: list[RequestObjective] = []
    run: list[RunObjective] = []
    for part in text.split(","):
        written = part.strip()
        name, equals, bound = (piece.strip() for piece in written.partition("="))
        if not equals:
            raise BadObjective(f"{written!r} is no objective; one is NAME=BOUND, such as ttft=500ms or itl_p99=100ms")
        if any(name in (known.latency, known.text.partition("=")[0]) for known in request) or any(
            name == known.name for known in run
        ):
            raise BadObjective(f"{name} is given twice")
        latency, _, statistic = name.partition("_")
        try:
            if name in LATENCIES:
                request.append(RequestObjective(written, name, read_duration_s(bound) * 1e3))
            elif name in _SHARES:
                run.append(RunObjective(written, name, read_share(bound)))
            elif latency in LATENCIES and statistic in _STATISTICS:
                run.append(RunObjective(written, name, read_duration_s(bound) * 1e3))
            else:
                raise BadObjective(
                    f"{name!r} is no objective; there are {', '.join(LATENCIES)} (of each request), the same with "
                    f"{', '.join('_' + known for known in _STATISTICS)} (of the run), error_rate and good"
                )
        except BadQuantity as exc:
            raise BadObjective(f"{written}: {exc}") from exc
    if any(objective.name == "good" for objective in run) and not request:
        raise BadObjective("good needs an objective of each request beside it, such as ttft=500ms,good=95%")
    return Objectives(tuple(request), tuple(run))
