"""What a run adds up while it goes on. Bounded memory: histograms and counts, and no list that grows with the run.

What belongs to the measured window is decided here, and once:

    rates and tokens       what happened in the window, whichever request it was of
    TTFT, E2EL, TPOT       requests that were due in the window; E2EL and TPOT of the completed ones
    outcomes               requests that ran in the window or waited for their turn in it, from whenever to whenever
    ITL                    gaps that began in the window, of every request

A wait that is still open when the tester gives up (the window and its grace are over, or the request's timeout is)
counts in TTFT or ITL with what it had lasted: an endpoint that freezes must not look better than one that is slow.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ops.loadtest.metrics import Histogram, e2el_ns, tpot_ns, ttft_ns
from ops.loadtest.objectives import Objectives
from ops.loadtest.record import Outcome, Record

__all__ = ["TIMEOUT_CODES", "Moment", "Tally", "Window"]

TIMEOUT_CODES = frozenset({"timeout", "timeout_first_token"})  # the tester gave up: these waits are open ones

_COARSE_BITS = 5  # of the histograms that a plot over time is made of: within 3 %
_MOMENTS = 240  # points of a plot over time, about; a long run has longer moments
_SHORTEST_MOMENT_S = 0.5


@dataclass(slots=True)
class Window:
    """What is measured; CLOCK_MONOTONIC nanoseconds. ``end_ns`` moves forward where the run ends early."""

    run_ns: int
    begin_ns: int
    end_ns: int

    def __contains__(self, time_ns: int) -> bool:
        return self.begin_ns <= time_ns < self.end_ns

    @property
    def seconds(self) -> float:
        return max(0, self.end_ns - self.begin_ns) / 1e9


@dataclass(slots=True)
class Moment:
    """One point of the plots over time."""

    open_streams: int = 0  # the most that were seen
    tokens: int = 0
    completed: int = 0
    failed: int = 0
    ttft: Histogram = field(default_factory=lambda: Histogram(_COARSE_BITS))  # where the first token came
    itl: Histogram = field(default_factory=lambda: Histogram(_COARSE_BITS))  # where the gap ended


class Tally:
    """The figures of one run. ``moment_s`` is the length of each of its ``moments``."""

    def __init__(self, window: Window, objectives: Objectives) -> None:
        self.window = window
        self._objectives = objectives
        self.moment_s = max(_SHORTEST_MOMENT_S, (window.end_ns - window.run_ns) / 1e9 / _MOMENTS)
        self._moment_ns = round(self.moment_s * 1e9)
        self.moments: list[Moment] = []
        self.ttft, self.ttft_service = Histogram(), Histogram()
        self.e2el, self.e2el_service = Histogram(), Histogram()
        self.tpot, self.itl = Histogram(), Histogram()
        self.connect, self.resume = Histogram(), Histogram()
        self.start_late = Histogram()  # how late the tester itself was to begin a request that was free to go
        self.outcomes: Counter[Outcome] = Counter()
        self.codes: Counter[tuple[Outcome, int, str]] = Counter()
        self.good = 0  # of those whose outcome is counted
        self.tokens = 0  # in the window
        self.all_tokens = 0  # of the whole run
        self.prompt_tokens = self.completion_tokens = 0  # as reported, of the requests that ended in the window
        self.completed_in_window = self.good_in_window = 0
        self.open_streams = self.most_open_streams = 0
        self.begun = 0  # requests, of the whole run
        self.reconnects = self.lost = self.doubled = self.malformed = 0  # of the whole run
        self.reasoning_tokens = self.bytes = 0  # likewise

    def began(self, record: Record) -> None:
        self.begun += 1
        self.open_streams += 1
        self.most_open_streams = max(self.most_open_streams, self.open_streams)
        if record.intended_ns in self.window and not record.queued:
            self.start_late.add(record.started_ns - record.intended_ns)
        moment = self._moment(record.started_ns)
        moment.open_streams = max(moment.open_streams, self.open_streams)

    def look(self, now_ns: int) -> None:
        """Note the state of a moment in which nothing begins."""
        moment = self._moment(now_ns)
        moment.open_streams = max(moment.open_streams, self.open_streams)

    def tokens_came(self, record: Record, count: int, now_ns: int) -> None:
        """``count`` tokens in one network read; called before they are in the record. The hot path."""
        window, times, moment = self.window, record.token_ns, self._moment(now_ns)
        begin_ns, end_ns = window.begin_ns, window.end_ns
        in_window = begin_ns <= now_ns < end_ns
        moment.tokens += count
        self.all_tokens += count
        if in_window:
            self.tokens += count
        if not times:
            self._first_token_came(record, moment, now_ns)
        elif record.resumed_at and record.resumed_at[-1] == len(times):
            return  # what piled up while the tester was away says nothing of the endpoint's pace
        else:
            before_ns = times[-1]
            moment.itl.add(now_ns - before_ns)
            if begin_ns <= before_ns < end_ns:
                self.itl.add(now_ns - before_ns)
        if count > 1 and in_window:
            self.itl.add(0, count - 1)

    def _first_token_came(self, record: Record, moment: Moment, now_ns: int) -> None:
        moment.ttft.add(now_ns - record.intended_ns)
        if record.intended_ns in self.window:
            self.ttft.add(now_ns - record.intended_ns)
            self.ttft_service.add(now_ns - record.started_ns)

    def ended(self, record: Record) -> None:
        """The record is complete."""
        self.open_streams -= 1
        outcome, ended_ns = record.outcome, record.ended_ns
        moment = self._moment(ended_ns)
        moment.completed += outcome is Outcome.COMPLETED
        moment.failed += outcome.failed
        self.reconnects += record.reconnects
        self.lost += record.lost
        self.doubled += record.doubled
        self.malformed += record.malformed
        self.reasoning_tokens += record.reasoning_tokens
        self.bytes += record.bytes
        for resume_ns in record.resume_ns:
            self.resume.add(resume_ns)
        good = self._objectives.good(record)
        if ended_ns in self.window:
            self.completed_in_window += outcome is Outcome.COMPLETED
            self.good_in_window += good
            self.prompt_tokens += record.prompt_tokens or 0
            self.completion_tokens += record.completion_tokens or 0
        if outcome is Outcome.CUT_OFF or record.code in TIMEOUT_CODES:
            self._count_open_wait(record)
        if ended_ns >= self.window.begin_ns and record.intended_ns < self.window.end_ns:
            self.outcomes[outcome] += 1
            self.good += good
            if outcome.failed:
                self.codes[outcome, record.status, record.code] += 1
        if record.intended_ns in self.window:
            self._count_due(record)

    def never_began(self, record: Record) -> None:
        """It was due, and no place came free for it."""
        self.outcomes[Outcome.UNSENT] += 1
        if record.intended_ns in self.window:
            self.ttft.add(record.ended_ns - record.intended_ns)

    def _count_due(self, record: Record) -> None:
        if record.connected_ns and not record.reused:
            self.connect.add(record.connected_ns - record.started_ns)
        if record.outcome is Outcome.COMPLETED:
            _add(self.e2el, e2el_ns(record))
            _add(self.e2el_service, e2el_ns(record, service=True))
            _add(self.tpot, tpot_ns(record))

    def _count_open_wait(self, record: Record) -> None:
        if ttft_ns(record) is None:
            if record.intended_ns in self.window:
                self.ttft.add(record.ended_ns - record.intended_ns)
                self.ttft_service.add(record.ended_ns - record.started_ns)
        elif not record.done_ns and record.token_ns[-1] in self.window:
            self.itl.add(record.ended_ns - record.token_ns[-1])

    def _moment(self, now_ns: int) -> Moment:
        moments, place = self.moments, (now_ns - self.window.run_ns) // self._moment_ns
        while len(moments) <= place:
            moments.append(Moment())
        return moments[max(place, 0)]


def _add(histogram: Histogram, value_ns: float | None) -> None:
    if value_ns is not None:
        histogram.add(round(value_ns))
