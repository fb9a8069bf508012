"""Definitions and percentiles. No I/O, and no clock.

The names are those of vLLM's ``bench serve`` and of AIPerf. With S the start, T1 … Tn the arrivals of a request's
tokens:

    TTFT  time to first token     T1 - S
    ITL   inter-token latency     each Tk - Tk-1, one value a gap; tokens of one network read are 0 apart
    E2EL  end-to-end latency      Tn - S
    TPOT  time per output token   (E2EL - TTFT) / (n - 1), one value a request; AIPerf calls it inter-token latency

S is when the request was due, so that waiting for a slow endpoint (or a slow tester) counts; times from when it really
started are called ``service``. A token is a delta with content or reasoning, as it came: no tokenizer is at work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ops.loadtest.record import Record

__all__ = ["PERCENTILES", "Distribution", "Histogram", "e2el_ns", "gaps_ns", "itl_p99_ns", "tpot_ns", "ttft_ns"]

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}

_LONGEST_NS = (1 << 43) - 1  # 2.4 hours; anything longer counts as that


@dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds; NaN where there was nothing to measure."""

    count: int
    mean: float
    std: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    max: float

    def get(self, statistic: str) -> float:
        """By the name that people write: ``mean``, ``p99``, ``p99.9``, ``max`` …"""
        return float(getattr(self, statistic.replace(".", "_")))

    def as_json(self) -> dict[str, float | int | None]:
        """None for NaN, which JSON lacks."""
        names = ("mean", "std", "min", *PERCENTILES, "max")
        values = ((name, self.get(name)) for name in names)
        return {"count": self.count} | {name: None if math.isnan(value) else round(value, 4) for name, value in values}


class Histogram:
    """Counts of durations in log-linear buckets, as HdrHistogram has them: bounded memory, whatever the run's length.

    A bucket is 2 ** (1 - ``bits``) of its value wide: with 11 bits a percentile is within 0.05 % of a value that was
    measured, and up to 2 µs it is exact. Count, mean, standard deviation, least and greatest are exact.
    """

    __slots__ = ("_bits", "_counts", "_squares", "count", "max_ns", "min_ns", "total_ns")

    def __init__(self, bits: int = 11) -> None:
        self._bits = bits
        self._counts: dict[int, int] = {}  # by bucket; at most 2 ** (bits - 1) * 34 of them
        self._squares = 0  # an int, which does not lose the small ones beside the large
        self.count = self.total_ns = self.max_ns = 0
        self.min_ns = _LONGEST_NS

    def add(self, value_ns: int, times: int = 1) -> None:
        """Count a duration; a negative one (clocks do not, schedules may) as 0."""
        if not 0 <= value_ns <= _LONGEST_NS:
            value_ns = min(max(value_ns, 0), _LONGEST_NS)
        shift = value_ns.bit_length() - self._bits
        bucket = value_ns if shift <= 0 else (shift << (self._bits - 1)) + (value_ns >> shift)
        counts = self._counts
        counts[bucket] = counts.get(bucket, 0) + times
        self.count += times
        self.total_ns += value_ns * times
        self._squares += value_ns * value_ns * times
        if value_ns > self.max_ns:
            self.max_ns = value_ns
        if value_ns < self.min_ns:
            self.min_ns = value_ns

    def percentile_ms(self, share: float) -> float:
        """The smallest value that at least ``share`` (0 to 1) of the values do not exceed; NaN of nothing."""
        return self._percentiles_ms([share])[0]

    def distribution(self) -> Distribution:
        if not self.count:
            return Distribution(0, *[math.nan] * (3 + len(PERCENTILES) + 1))
        mean = self.total_ns / self.count
        deviation = math.sqrt(max(0.0, self._squares / self.count - mean * mean))
        percentiles = self._percentiles_ms(list(PERCENTILES.values()))
        return Distribution(
            self.count, *[mean / 1e6, deviation / 1e6, self.min_ns / 1e6, *percentiles, self.max_ns / 1e6]
        )

    def buckets_ms(self) -> Iterator[tuple[float, int]]:
        """The buckets that hold something, in order: each one's middle, and its count."""
        for bucket, times in sorted(self._counts.items()):
            yield min(max(self._middle_ns(bucket), self.min_ns), self.max_ns) / 1e6, times

    def _percentiles_ms(self, shares: Sequence[float]) -> list[float]:
        """Of shares in rising order, in one pass."""
        ranks = [max(1, math.ceil(share * self.count)) for share in shares]
        found: list[float] = []
        seen = 0
        for value_ms, times in self.buckets_ms():
            seen += times
            while len(found) < len(ranks) and seen >= ranks[len(found)]:
                found.append(value_ms)
        return found + [math.nan] * (len(ranks) - len(found))

    def _middle_ns(self, bucket: int) -> float:
        shift = (bucket >> (self._bits - 1)) - 1
        if shift <= 0:
            return bucket
        lowest = (bucket - (shift << (self._bits - 1))) << shift
        return lowest + (1 << shift) / 2


def ttft_ns(record: Record, *, service: bool = False) -> int | None:
    """Time to first token; None where none came."""
    return record.token_ns[0] - (record.started_ns if service else record.intended_ns) if record.token_ns else None


def e2el_ns(record: Record, *, service: bool = False) -> int | None:
    """End-to-end latency, up to the last token; None where none came, or where the tester itself was away meanwhile."""
    if not record.token_ns or record.resumed_at:
        return None
    return record.token_ns[-1] - (record.started_ns if service else record.intended_ns)


def tpot_ns(record: Record) -> float | None:
    """Time per output token; None with fewer than two, or where the tester itself had interrupted them."""
    if record.tokens < 2 or record.resumed_at:
        return None
    return (record.token_ns[-1] - record.token_ns[0]) / (record.tokens - 1)


def gaps_ns(record: Record) -> list[int]:
    """The request's inter-token latencies, without those of a reconnect: the gap that spans it, and the zeros between
    the tokens that had piled up meanwhile and came in one read."""
    times, resumed_at = record.token_ns, set(record.resumed_at)
    gaps, piled_up = [], False
    for at in range(1, len(times)):
        piled_up = at in resumed_at or (piled_up and times[at] == times[at - 1])
        if not piled_up:
            gaps.append(times[at] - times[at - 1])
    return gaps


def itl_p99_ns(record: Record) -> int | None:
    """The gap that 99 of 100 gaps of this one request do not exceed; up to 99 gaps it is the longest."""
    gaps = sorted(gaps_ns(record))
    return gaps[math.ceil(0.99 * len(gaps)) - 1] if gaps else None
