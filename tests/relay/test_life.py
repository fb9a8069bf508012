"""An answer's life: the table of its moves, and what is due when; the clock is in the test's hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.relay.life import MOVES, Life, Outcome, State

GRACE = 5.0
WINDOW = 60.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def life_of(clock: Clock, grace: float = GRACE, window: float = WINDOW) -> Life:
    return Life(grace=grace, window=window, clock=clock)


# ---- The table


def test_every_state_has_its_row_and_an_answer_ends_once() -> None:
    running = {State.AWAITED, State.VIEWED}
    assert set(MOVES) == set(State)
    assert MOVES[State.FORGOTTEN] == frozenset()
    for state, moves in MOVES.items():
        if state not in running:
            assert not moves & running


@pytest.mark.parametrize("state", State)
def test_a_move_that_the_table_lacks_raises(state: State, clock: Clock) -> None:
    for target in set(State) - MOVES[state]:
        life = life_of(clock)
        life.state = state
        with pytest.raises(AssertionError):
            life._move(target)


# ---- What is due when


def test_who_never_comes_ends_it_after_the_grace(clock: Clock) -> None:
    assert life_of(clock).due_at == 1005.0


def test_without_a_grace_the_first_viewer_still_has_a_moment_to_come(clock: Clock) -> None:
    """Or nothing that was asked for by POST could ever be viewed."""
    life = life_of(clock, grace=0)
    assert life.due_at == 1005.0
    life.join()
    life.leave(may_return=True)
    assert life.overdue


def test_nothing_is_due_while_somebody_views_it(clock: Clock) -> None:
    life = life_of(clock)
    life.join()
    clock.now += 1e6
    assert (life.state, life.due_at, life.overdue) == (State.VIEWED, None, False)


def test_who_may_return_has_the_grace_to_do_so(clock: Clock) -> None:
    life = life_of(clock)
    life.join()
    life.leave(may_return=True)
    assert (life.state, life.due_at) == (State.AWAITED, 1005.0)
    clock.now += 4.9
    assert not life.overdue
    life.join()
    clock.now += 100
    assert not life.overdue


def test_who_cannot_return_ends_it_at_once(clock: Clock) -> None:
    life = life_of(clock)
    life.join()
    life.leave(may_return=False)
    assert life.overdue


def test_one_who_cannot_return_does_not_shorten_the_grace_of_one_who_can(clock: Clock) -> None:
    life = life_of(clock)
    life.join()
    life.join()
    life.leave(may_return=True)
    clock.now += 2
    life.leave(may_return=False)
    assert life.due_at == 1005.0


def test_finish_waits_for_ever(clock: Clock) -> None:
    life = life_of(clock, grace=math.inf)
    assert life.due_at == math.inf
    life.join()
    life.leave(may_return=True)
    clock.now += 1e9
    assert not life.overdue


def test_an_ended_answer_is_kept_for_its_window(clock: Clock) -> None:
    life = life_of(clock)
    life.end(Outcome.COMPLETED)
    assert (life.state, life.outcome, life.due_at) == (State.KEPT, Outcome.COMPLETED, 1060.0)
    clock.now += 60
    assert life.overdue
    life.forget()
    assert (life.state, life.overdue) == (State.FORGOTTEN, False)


def test_reading_it_to_the_end_again_does_not_lengthen_the_window(clock: Clock) -> None:
    life = life_of(clock)
    life.end(Outcome.COMPLETED)
    clock.now += 59
    life.join()
    assert (life.state, life.due_at) == (State.REPLAYED, None)
    clock.now += 2  # it is not forgotten under its reader's eyes
    life.leave(may_return=False)
    assert life.overdue


def test_who_comes_and_goes_does_not_keep_it_for_ever(clock: Clock) -> None:
    life = life_of(clock)
    life.end(Outcome.COMPLETED)
    for _ in range(3):
        clock.now += 19
        life.join()
        life.leave(may_return=True)
        assert life.due_at == 1060.0


def test_an_answer_that_is_given_up_goes_with_its_last_reader(clock: Clock) -> None:
    life = life_of(clock)
    life.join()
    life.end(Outcome.COMPLETED)
    life.give_up()
    assert not life.overdue
    life.leave(may_return=True)
    assert life.overdue


class Lives(RuleBasedStateMachine):
    """Any order of comings, goings and ends, against the sentences of the contract."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.life = life_of(self.clock)
        self.present = 0
        self.stays_until = self.clock.now + GRACE  # the last moment that is promised to somebody
        self.ended_at: float | None = None

    @rule(seconds=st.sampled_from([0.0, 1.0, GRACE, WINDOW]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.life.state is not State.FORGOTTEN and not self.life.overdue)
    @rule()
    def somebody_comes(self) -> None:
        self.life.join()
        self.present += 1
        self.stays_until = -math.inf

    @precondition(lambda self: self.present)
    @rule(may_return=st.booleans())
    def somebody_leaves(self, may_return: bool) -> None:
        self.life.leave(may_return=may_return)
        self.present -= 1
        if may_return:
            self.stays_until = max(self.stays_until, self.clock.now + GRACE)

    @precondition(lambda self: self.life.running)
    @rule(outcome=st.sampled_from(Outcome))
    def it_ends(self, outcome: Outcome) -> None:
        self.life.end(outcome)
        self.ended_at = self.clock.now

    @precondition(lambda self: self.life.overdue and not self.life.running)
    @rule()
    def it_is_forgotten(self) -> None:
        self.life.forget()

    @invariant()
    def its_state_says_what_is_so(self) -> None:
        state, present, ended = self.life.state, bool(self.present), self.ended_at is not None
        assert self.life.running is not ended
        if state is not State.FORGOTTEN:
            expected = {
                (False, False): State.AWAITED,
                (False, True): State.VIEWED,
                (True, True): State.REPLAYED,
                (True, False): State.KEPT,
            }
            assert state is expected[ended, present]

    @invariant()
    def nothing_is_due_before_its_time(self) -> None:
        if self.life.overdue:
            assert not self.present
            if self.ended_at is None:
                assert self.clock.now >= self.stays_until
            else:
                assert self.clock.now >= self.ended_at + WINDOW


TestLives = Lives.TestCase
TestLives.settings = hypothesis_settings(max_examples=200, deadline=None)
