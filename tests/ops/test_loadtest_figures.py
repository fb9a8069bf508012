"""The load tester's figures are what they are called: percentiles, definitions, objectives, schedules, the search."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import statistics
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.loadtest.arrivals import Backoff, poisson, ramp_starts, read_retry_after_s
from ops.loadtest.capacity import CapacitySearch
from ops.loadtest.metrics import Histogram, e2el_ns, gaps_ns, itl_p99_ns, tpot_ns, ttft_ns
from ops.loadtest.objectives import BadObjective, Objectives, read_objectives
from ops.loadtest.quantities import BadQuantity, read_duration_s, read_share
from ops.loadtest.record import Outcome, Record
from ops.loadtest.tally import Tally, Window

MS = 1_000_000
SECOND = 1_000 * MS


def record(*tokens_ms: float, due_ms: float = 0, started_ms: float = 0, outcome: Outcome = Outcome.COMPLETED) -> Record:
    """A request with tokens at those times; it ended with the last."""
    made = Record(number=0, intended_ns=round(due_ms * MS), started_ns=round(started_ms * MS))
    made.token_ns = array("q", [round(time_ms * MS) for time_ms in tokens_ms])
    made.end(outcome, made.token_ns[-1] if tokens_ms else made.started_ns)
    return made


# ---- percentiles


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 1 << 42), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999, 1.0]))
def test_a_percentile_is_within_a_thousandth_of_a_value_that_was_measured(values: list[int], share: float) -> None:
    """Nearest rank: the smallest value that at least that share do not exceed."""
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    assert histogram.percentile_ms(share) * MS == pytest.approx(exact, rel=0.0006, abs=1)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=50))
def test_count_mean_deviation_least_and_greatest_are_exact(values: list[int]) -> None:
    histogram = Histogram(bits=5)
    for value in values:
        histogram.add(value)
    told = histogram.distribution()
    assert told.count == len(values)
    assert told.mean * MS == pytest.approx(statistics.fmean(values))
    assert told.std * MS == pytest.approx(statistics.pstdev(values), rel=1e-3, abs=1e3)
    assert (round(told.min * MS), round(told.max * MS)) == (min(values), max(values))


def test_percentiles_never_leave_the_range_of_what_was_measured() -> None:
    histogram = Histogram(bits=5)
    histogram.add(1_000_003)
    told = histogram.distribution()
    assert told.p50 == told.p99_9 == told.min == told.max


def test_a_value_counted_many_times_is_as_many_values() -> None:
    histogram = Histogram()
    histogram.add(0, 99)
    histogram.add(5 * MS)
    assert histogram.distribution().p99 == 0
    assert histogram.distribution().p99_9 == pytest.approx(5, rel=0.001)


def test_nothing_measured_is_no_number_and_null_in_json() -> None:
    told = Histogram().distribution()
    assert math.isnan(told.p99)
    assert json.loads(json.dumps(told.as_json(), allow_nan=False))["p99.9"] is None


# ---- definitions


def test_latencies_count_from_when_the_request_was_due() -> None:
    """Coordinated omission would be to count from when the tester found the time."""
    late = record(1500, 1600, due_ms=1000, started_ms=1400)
    assert ttft_ns(late) == 500 * MS
    assert ttft_ns(late, service=True) == 100 * MS
    assert e2el_ns(late) == 600 * MS
    assert e2el_ns(late, service=True) == 200 * MS


def test_time_per_output_token_leaves_the_first_out() -> None:
    """(E2EL - TTFT) / (n - 1), as vLLM's and AIPerf's benchmarks have it."""
    assert tpot_ns(record(100, 110, 130, 160)) == 20 * MS
    assert tpot_ns(record(100)) is None


def test_tokens_of_one_read_are_zero_apart() -> None:
    assert gaps_ns(record(100, 100, 130)) == [0, 30 * MS]


def test_what_a_reconnect_of_the_testers_costs_is_no_latency() -> None:
    """Neither the gap that it made, nor the tokens that had piled up behind it."""
    cut = record(10, 20, 1500, 1500, 1500, 1510)
    cut.resumed_at.append(2)
    assert gaps_ns(cut) == [10 * MS, 10 * MS]
    assert tpot_ns(cut) is None
    assert e2el_ns(cut) is None
    assert ttft_ns(cut) == 10 * MS


def test_a_requests_inter_token_latency_is_the_p99_of_its_own_gaps() -> None:
    times = [*range(0, 2000, 10), 5000]
    assert itl_p99_ns(record(*times)) == 10 * MS
    assert itl_p99_ns(record(0, 10, 90)) == 80 * MS, "up to 99 gaps it is the longest"
    assert itl_p99_ns(record(7)) is None


# ---- quantities and objectives


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("2s", 2), ("1.5m", 90), ("1h", 3600), ("250us", 0.00025), ("0.25", 0.25)]
)
def test_a_duration_is_a_number_with_its_unit(text: str, seconds: float) -> None:
    assert read_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "ms", "-1s", "1 s", "1e3", "nan", "inf", "1d", "1.s", "\u0661s"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(BadQuantity, match="no duration"):
        read_duration_s(text)


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("100%", 1), ("0", 0), ("1", 1)])
def test_a_share_is_written_either_way(text: str, share: float) -> None:
    assert read_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "5", "101%", "-1%", "nan"])
def test_anything_else_is_no_share(text: str) -> None:
    with pytest.raises(BadQuantity, match="no share"):
        read_share(text)


def test_objectives_are_of_a_request_or_of_the_run() -> None:
    objectives = read_objectives("ttft=500ms, itl=100ms,itl_p99.9=80ms,e2el_mean=2s,error_rate=1%,good=95%")
    assert [(known.latency, known.bound_ms) for known in objectives.request] == [("ttft", 500), ("itl", 100)]
    assert [(known.name, known.bound) for known in objectives.run] == [
        ("itl_p99.9", 80),
        ("e2el_mean", 2000),
        ("error_rate", 0.01),
        ("good", 0.95),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no objective"),
        ("ttft", "one is NAME=BOUND"),
        ("speed=5", "'speed' is no objective; there are ttft"),
        ("itl_p98=5ms", "'itl_p98' is no objective"),
        ("ttft=fast", "'fast' is no duration"),
        ("error_rate=2", "'2' is no share"),
        ("ttft=1s,ttft=2s", "ttft is given twice"),
        ("itl_p99=1s,itl_p99=2s", "itl_p99 is given twice"),
        ("good=95%", "needs an objective of each request"),
    ],
)
def test_a_wrong_objective_is_told_with_what_would_be_right(text: str, told: str) -> None:
    with pytest.raises(BadObjective, match=told):
        read_objectives(text)


def test_a_good_request_completed_and_kept_every_objective() -> None:
    """A bound itself still keeps it; what a request has no figure for it keeps."""
    objectives = read_objectives("ttft=100ms,tpot=20ms,itl=30ms,e2el=1s")
    assert objectives.good(record(100, 120, 140))
    assert objectives.good(record(100)), "one token has no gap"
    assert not objectives.good(record(101, 120, 140))
    assert not objectives.good(record(100, 110, 145)), "a gap of 35 ms"
    assert not objectives.good(record(100, 120, 140, outcome=Outcome.INCOMPLETE))


def test_the_run_is_judged_by_its_statistics() -> None:
    [latency, errors, good] = read_objectives("ttft=1s,itl_p99=100ms,error_rate=1%,good=95%").run
    measured = {"itl": dataclasses.replace(Histogram().distribution(), p99=100.0)}
    shares = {"error_rate": 0.02, "good": 0.95}
    assert latency.judge(measured, shares).kept
    assert not errors.judge(measured, shares).kept
    assert good.judge(measured, shares).kept
    assert str(errors.judge(measured, shares)) == "error_rate=1%: 2.00%, broken"


def test_an_objective_without_a_value_is_broken() -> None:
    """An endpoint that sends nothing at all must not look as if it kept everything."""
    [latency] = read_objectives("itl_p99=100ms").run
    verdict = latency.judge({"itl": Histogram().distribution()}, {})
    assert not verdict.kept
    assert "nothing to measure" in str(verdict)


# ---- the window


def tally(objectives: str = "ttft=1s") -> Tally:
    """A run that began at 0, measured from 1 s to 11 s."""
    return Tally(Window(0, SECOND, 11 * SECOND), read_objectives(objectives))


def play(into: Tally, played: Record) -> None:
    """Tell a tally of a record as the client does, token by token."""
    tokens, played.token_ns = played.token_ns, array("q")
    into.began(played)
    for time_ns, same in itertools.groupby(tokens):
        count = len(list(same))
        into.tokens_came(played, count, time_ns)
        played.token_ns.extend([time_ns] * count)
    into.ended(played)


def test_latencies_are_of_requests_due_in_the_window_and_rates_of_what_happened_in_it() -> None:
    figures = tally()
    play(figures, record(950, 1050, 1150, due_ms=900, started_ms=900))  # due in the warm-up
    play(figures, record(2100, 2100, 2200, due_ms=2000, started_ms=2000))
    play(figures, record(10950, 11050, due_ms=10900, started_ms=10900))  # its second token came in the grace
    assert figures.tokens == 2 + 3 + 1
    assert (figures.ttft.count, figures.e2el.count, figures.tpot.count) == (2, 2, 2)
    assert figures.itl.count == 1 + 2 + 1, "gaps that began in the window"
    assert figures.outcomes == {Outcome.COMPLETED: 3}
    assert (figures.completed_in_window, figures.good_in_window) == (2, 2)


def test_failed_requests_have_no_end_to_end_latency() -> None:
    figures = tally()
    play(figures, record(2100, 2200, due_ms=2000, started_ms=2000, outcome=Outcome.INCOMPLETE))
    assert (figures.ttft.count, figures.itl.count) == (1, 1)
    assert (figures.e2el.count, figures.tpot.count, figures.good) == (0, 0, 0)
    assert figures.codes == {(Outcome.INCOMPLETE, 0, ""): 1}


def test_a_request_that_broke_in_the_window_is_counted_whenever_it_began() -> None:
    figures = tally()
    play(figures, record(500, 5000, due_ms=400, started_ms=400, outcome=Outcome.INCOMPLETE))
    play(figures, record(500, 800, due_ms=400, started_ms=400, outcome=Outcome.INCOMPLETE))  # of the warm-up
    assert figures.outcomes == {Outcome.INCOMPLETE: 1}


def test_a_wait_still_open_at_the_end_counts_with_what_it_has_lasted() -> None:
    """An endpoint that freezes must not look better than one that is slow."""
    figures = tally()
    silent, frozen = record(due_ms=3000, started_ms=3000), record(2100, 2120, due_ms=2000, started_ms=2000)
    for waiting in (silent, frozen):
        waiting.end(Outcome.CUT_OFF, 13 * SECOND)
        play(figures, waiting)
    assert figures.ttft.distribution().max == 10_000
    assert figures.itl.distribution().max == 13_000 - 2_120


def test_a_request_that_never_got_a_place_counts_with_its_wait() -> None:
    figures = tally()
    waiting = record(due_ms=2000)
    waiting.end(Outcome.UNSENT, 11 * SECOND)
    figures.never_began(waiting)
    assert figures.outcomes == {Outcome.UNSENT: 1}
    assert figures.ttft.distribution().max == 9_000


def test_a_request_that_waited_for_a_place_does_not_make_the_tester_late() -> None:
    figures = tally()
    queued = record(5000, due_ms=2000, started_ms=4900)
    queued.queued = True
    play(figures, queued)
    play(figures, record(5000, due_ms=2000, started_ms=2003))
    assert figures.start_late.count == 1
    assert figures.start_late.distribution().max == 3


# ---- schedules


def test_streams_begin_evenly_over_the_ramp() -> None:
    assert ramp_starts(4, 2.0) == [0.0, 0.5, 1.0, 1.5]
    assert ramp_starts(3, 0.0) == [0.0, 0.0, 0.0]


def test_a_poisson_process_has_its_rate_and_its_spread() -> None:
    """The gaps of a Poisson process have a standard deviation like their mean."""
    due = list(itertools.islice(poisson(50, 0.0, random.Random(7)), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert min(gaps) >= 0


def test_the_rate_rises_from_nothing_over_the_ramp() -> None:
    """Half as many in all as at full rate; a quarter of those in the first half."""
    due = list(itertools.takewhile(lambda time: time < 20, poisson(1000, 10.0, random.Random(7))))
    in_ramp = [time for time in due if time < 10]
    assert len(in_ramp) == pytest.approx(5_000, rel=0.05)
    assert sum(time < 5 for time in in_ramp) == pytest.approx(len(in_ramp) / 4, rel=0.1)
    assert len(due) - len(in_ramp) == pytest.approx(10_000, rel=0.05)


def test_a_seed_gives_one_schedule() -> None:
    first, again = (list(itertools.islice(poisson(5, 3.0, random.Random(3)), 50)) for _ in range(2))
    assert first == again


def test_failures_in_a_row_are_asked_again_ever_later_but_not_never() -> None:
    backoff = Backoff(random.Random(1))
    pauses = [backoff.after_failure(None) for _ in range(40)]
    assert all(0.05 <= pause <= 5 for pause in pauses)
    assert pauses[0] <= 0.1
    assert min(pauses[10:]) >= 2.5
    backoff.after_success()
    assert backoff.after_failure(None) <= 0.1


def test_what_the_endpoint_asks_for_goes_before_the_back_off() -> None:
    assert Backoff(random.Random(1)).after_failure(7.0) == 7.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3", 3.0),
        ("0", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        ("999999999", 3600.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, seconds: float | None) -> None:
    """RFC 9110, 10.2.3."""
    assert read_retry_after_s(text, now_s=60.0) == seconds


# ---- the search for the capacity


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 5000), st.integers(1, 64), st.integers(1, 4000))
def test_the_search_ends_beside_the_true_capacity(truth: int, first: int, limit: int) -> None:
    search, steps = CapacitySearch(first, limit), 0
    while (streams := search.next()) is not None:
        assert 1 <= streams <= limit
        search.tell(streams, held=streams <= truth)
        steps += 1
    assert search.held <= min(truth, limit)
    assert min(truth, limit) - search.held <= max(1, search.held // 16)
    assert steps <= 30


def test_the_search_doubles_and_then_halves() -> None:
    search, tried = CapacitySearch(8, 1000), []
    while (streams := search.next()) is not None:
        tried.append(streams)
        search.tell(streams, held=streams <= 50)
    assert tried == [8, 16, 32, 64, 48, 56, 52, 50]
    assert (search.held, search.broke) == (50, 52)


def test_no_objective_makes_every_completed_request_good() -> None:
    assert Objectives().good(record(1))
