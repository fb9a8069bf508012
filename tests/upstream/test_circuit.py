"""The circuit of one upstream: what opens it, who may ask then, and what closes it; the clock is in the test's hand."""

from __future__ import annotations

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.upstream.circuit import Circuit, CircuitState, Permit

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def enter(circuit: Circuit) -> Permit:
    permit = circuit.enter()
    assert permit is not None
    return permit


def ask(circuit: Circuit, story: str) -> None:
    """One request after the other: S succeeds, F fails, W is withdrawn."""
    for end in story:
        permit = enter(circuit)
        {"S": permit.succeeded, "F": permit.failed, "W": permit.withdrawn}[end]()


@pytest.fixture
def opened(clock: Clock) -> Circuit:
    """One that has just opened."""
    circuit = Circuit(clock=clock)
    ask(circuit, "FFFFF")
    return circuit


# ---- What opens it

STORIES = {
    "": CLOSED,
    "F": CLOSED,
    "FFFF": CLOSED,
    "FFFFF": OPEN,
    "FFFFSFFFF": CLOSED,
    "SFFFFF": OPEN,
    "SF" * 9: CLOSED,  # 18 are not enough to tell, though half of them failed
    "SF" * 9 + "F": CLOSED,
    "SF" * 10: OPEN,
    "SF" * 9 + "SS": CLOSED,  # 9 of 20
    "SF" * 9 + "SSFF": OPEN,  # 11 of 22
    "SSF" * 20: CLOSED,
    "S" * 100 + "FFFFSFFFFS": CLOSED,
    "W" * 30: CLOSED,
    "FFFFWWWF": OPEN,
    "SF" * 9 + "WW": CLOSED,
    "SF" * 9 + "WSWF": OPEN,
}


@pytest.mark.parametrize(("story", "state"), STORIES.items())
def test_five_failures_in_a_row_or_half_of_twenty_open_it(story: str, state: CircuitState, clock: Clock) -> None:
    """SLUICE_RETRIES: 5 in a row, or half of >= 20 in 30 s; what is withdrawn counts nothing, neither way."""
    circuit = Circuit(clock=clock)
    ask(circuit, story)
    assert circuit.state is state


def test_a_success_does_not_open_it(clock: Clock) -> None:
    """It completes the twenty of which half failed; but it is the next failure that shows an upstream which is ill."""
    circuit = Circuit(clock=clock)
    ask(circuit, "FS" * 10)
    assert circuit.state is CLOSED
    ask(circuit, "F")
    assert circuit.state is OPEN


@pytest.mark.parametrize(("passed", "state"), [(0.0, OPEN), (29.9, OPEN), (30.0, CLOSED), (3600.0, CLOSED)])
def test_the_share_is_that_of_the_last_thirty_seconds(passed: float, state: CircuitState, clock: Clock) -> None:
    """SLUICE_RETRIES: in 30 s."""
    circuit = Circuit(clock=clock)
    ask(circuit, "SF" * 9)
    clock.now += passed
    ask(circuit, "SF")
    assert circuit.state is state


def test_the_window_slides(clock: Clock) -> None:
    """Good times go out of it as bad ones do: what counts is how the upstream does now."""
    circuit = Circuit(clock=clock)
    ask(circuit, "S" * 100)
    clock.now += 20.0
    ask(circuit, "FFFFS" * 4)
    assert circuit.state is CLOSED, "16 of 120"
    clock.now += 10.0
    ask(circuit, "F")
    assert circuit.state is OPEN, "17 of 21"


def test_failures_in_a_row_may_be_far_apart(clock: Clock) -> None:
    """SLUICE_RETRIES: 5 in a row, with no time named; an upstream that nobody asks does not get well by that."""
    circuit = Circuit(clock=clock)
    for _ in range(5):
        assert circuit.state is CLOSED
        ask(circuit, "F")
        clock.now += 3600.0
    assert circuit.enter() is not None
    assert circuit.enter() is None, "one at a time: it had opened"


def test_many_requests_cost_no_more_memory_than_few(clock: Clock) -> None:
    """The window is counted by seconds."""
    circuit = Circuit(clock=clock)
    for _ in range(6000):
        clock.now += 0.01
        ask(circuit, "SSF")
    assert len(circuit._counts) <= 31


def test_requests_under_way_are_not_bounded_while_it_is_closed(clock: Clock) -> None:
    circuit = Circuit(clock=clock)
    assert None not in [circuit.enter() for _ in range(1000)]


def test_whoever_fails_is_told_whether_that_opened_it(opened: Circuit, clock: Clock) -> None:
    """For the log, which is to have one line of it, and not one for each request."""
    circuit = Circuit(clock=clock)
    permits = [enter(circuit) for _ in range(8)]
    assert [permit.failed() for permit in permits] == [False, False, False, False, True, False, False, False]
    clock.now += 10.0
    assert not enter(opened).failed(), "it was open"


# ---- While it is open


def test_an_open_circuit_leaves_its_upstream_out_for_ten_seconds(opened: Circuit, clock: Clock) -> None:
    """SLUICE_RETRIES: left out for 10 s."""
    assert (opened.state, opened.enter()) == (OPEN, None)
    clock.now += 9.9
    assert (opened.state, opened.enter()) == (OPEN, None)
    clock.now += 0.1
    assert opened.state is HALF_OPEN
    assert opened.enter() is not None


def test_it_is_probed_by_one_request_at_a_time(opened: Circuit, clock: Clock) -> None:
    """SLUICE_RETRIES: probed by one request at a time, however long that one takes."""
    clock.now += 10.0
    probe = enter(opened)
    clock.now += 3600.0
    assert [opened.enter(), opened.enter()] == [None, None]
    probe.withdrawn()
    assert opened.enter() is not None
    assert opened.enter() is None


def test_a_probe_that_fails_leaves_the_upstream_out_for_ten_seconds_more(opened: Circuit, clock: Clock) -> None:
    """SLUICE_RETRIES: until one succeeds; the ten seconds run from that failure."""
    clock.now += 10.0
    probe = enter(opened)
    clock.now += 3.0
    probe.failed()
    assert opened.state is OPEN
    clock.now += 9.9
    assert opened.enter() is None
    clock.now += 0.1
    assert opened.enter() is not None


def test_a_probe_that_succeeds_closes_it_for_all(opened: Circuit, clock: Clock) -> None:
    """SLUICE_RETRIES: until one succeeds."""
    clock.now += 10.0
    enter(opened).succeeded()
    assert opened.state is CLOSED
    assert None not in [opened.enter() for _ in range(100)]


@pytest.mark.parametrize("before", ["FFFFF", "SF" * 10])
def test_what_opened_it_is_forgotten_when_it_closes(before: str, clock: Clock) -> None:
    """An upstream that is well again is judged by what it does from then on."""
    circuit = Circuit(clock=clock)
    ask(circuit, before)
    clock.now += 10.0
    ask(circuit, "S" + "FFFFS" * 3 + "FF")
    assert circuit.state is CLOSED
    ask(circuit, "FFF")
    assert circuit.state is OPEN


def test_a_probe_that_is_withdrawn_leaves_room_for_the_next(opened: Circuit, clock: Clock) -> None:
    """Its client left, or its request was at fault: nothing is known, and nobody has to wait ten seconds for that."""
    clock.now += 10.0
    enter(opened).withdrawn()
    assert opened.state is HALF_OPEN
    enter(opened).succeeded()
    assert opened.state is CLOSED


def test_it_says_when_the_next_request_is_let_through(opened: Circuit, clock: Clock) -> None:
    """For Retry-After, where nobody else can be asked."""
    assert Circuit(clock=clock).probed_in == 0.0
    assert opened.probed_in == 10.0
    clock.now += 7.5
    assert opened.probed_in == 2.5
    clock.now += 7.5
    probe = enter(opened)
    assert opened.probed_in == 0.0
    probe.failed()
    assert opened.probed_in == 10.0


# ---- What says nothing about now


@pytest.mark.parametrize("passed", [0.0, 10.0])
def test_requests_from_before_it_opened_neither_close_it_nor_keep_it_open(passed: float, clock: Clock) -> None:
    """They were sent to an upstream that failed; only a probe knows whether it still does."""
    circuit = Circuit(clock=clock)
    early, late = enter(circuit), enter(circuit)
    ask(circuit, "FFFFF")
    clock.now += passed
    early.succeeded()
    late.failed()
    assert circuit.state is (HALF_OPEN if passed else OPEN)
    clock.now += 10.0 - passed
    assert circuit.enter() is not None


def test_a_request_from_before_it_opened_is_no_probe(clock: Clock) -> None:
    circuit = Circuit(clock=clock)
    early = enter(circuit)
    ask(circuit, "FFFFF")
    clock.now += 10.0
    probe = enter(circuit)
    early.withdrawn()
    assert circuit.enter() is None, "the probe is still out"
    probe.succeeded()
    assert circuit.state is CLOSED


def test_requests_from_before_it_opened_do_not_open_it_again(clock: Clock) -> None:
    """A crowd that waited for an upstream in trouble runs into its time-outs when the upstream is well again."""
    circuit = Circuit(clock=clock)
    crowd = [enter(circuit) for _ in range(50)]
    ask(circuit, "FFFFF")
    clock.now += 10.0
    ask(circuit, "S")
    assert not any(permit.failed() for permit in crowd)
    assert circuit.state is CLOSED


@pytest.mark.parametrize("first", ["succeeded", "failed", "withdrawn"])
def test_what_became_of_a_request_is_said_once(first: str, clock: Clock) -> None:
    """A stream that breaks after its first token was a success; a failure is no withdrawal besides."""
    circuit = Circuit(clock=clock)
    ask(circuit, "FFF")
    permit = enter(circuit)
    getattr(permit, first)()
    assert not permit.failed()
    permit.succeeded()
    permit.withdrawn()
    ask(circuit, "F")
    assert circuit.state is (OPEN if first == "failed" else CLOSED)


# ---- Any walk


class Walk(RuleBasedStateMachine):
    """Requests that begin and end in any order, against the rules in their plainest form.

    Time goes by whole seconds, the grain of the window: there the two agree to the last request.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.circuit = Circuit(clock=self.clock)
        self.permits: list[tuple[Permit, int]] = []  # under way, and how often it had opened before each of them
        self.opened = 0
        self.probes_from: float | None = None  # None: closed
        self.ends: list[tuple[float, bool]] = []  # since it closed last
        self.row = 0

    def expected_state(self) -> CircuitState:
        if self.probes_from is None:
            return CLOSED
        return OPEN if self.clock.now < self.probes_from else HALF_OPEN

    @rule()
    def begin(self) -> None:
        probing = any(era == self.opened for _, era in self.permits)
        permit = self.circuit.enter()
        state = self.expected_state()
        assert (permit is not None) is (state is CLOSED or (state is HALF_OPEN and not probing))
        if permit is not None:
            self.permits.append((permit, self.opened))

    @precondition(lambda self: self.permits)
    @rule(data=st.data(), end=st.sampled_from(["S", "F", "F", "W"]))
    def end(self, data: st.DataObject, end: str) -> None:
        permit, era = self.permits.pop(data.draw(st.integers(0, len(self.permits) - 1)))
        self.settle(permit, era, end)

    @rule(ends=st.text("SF", min_size=8, max_size=12))
    def quickly(self, ends: str) -> None:
        for end in ends:
            if self.probes_from is None:
                permit = self.circuit.enter()
                assert permit is not None
                self.settle(permit, self.opened, end)

    def settle(self, permit: Permit, era: int, end: str) -> None:
        opens = False
        if era == self.opened and end != "W":
            if self.probes_from is None:
                self.ends.append((self.clock.now, end == "S"))
                self.row = 0 if end == "S" else self.row + 1
                recent = [ok for at, ok in self.ends if at > self.clock.now - 30]
                opens = self.row >= 5 or (end == "F" and len(recent) >= 20 and 2 * recent.count(False) >= len(recent))
                self.opened += opens
                self.probes_from = self.clock.now + 10 if opens else None
            elif end == "S":
                self.probes_from = None
                self.row = 0
                self.ends.clear()
            else:
                self.probes_from = self.clock.now + 10
        said = {"S": permit.succeeded, "F": permit.failed, "W": permit.withdrawn}[end]()
        assert bool(said) is opens

    @rule(seconds=st.integers(1, 4) | st.sampled_from([9, 10, 11, 29, 30, 31]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @invariant()
    def the_state_is_the_expected_one(self) -> None:
        assert self.circuit.state is self.expected_state()


TestWalk = Walk.TestCase
TestWalk.settings = hypothesis_settings(max_examples=150, stateful_step_count=60, deadline=None)
