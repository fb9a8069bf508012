"""When an upstream is asked again: how long is waited, and how many further requests there may be over all answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.upstream.retry import RetryBudget, backoff

BURST = 100
EACH_SECOND = 10.0
EACH_ANSWER = 0.2


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def take_all(budget: RetryBudget, at_most: int = 1000) -> int:
    """How many further requests can be paid for now."""
    taken = 0
    while taken < at_most and budget.take():
        taken += 1
    return taken


def spent(clock: Clock) -> RetryBudget:
    """One with nothing left."""
    budget = RetryBudget(clock=clock)
    take_all(budget)
    return budget


# ---- Pauses


@given(st.integers(1, 11), st.floats(0, 1, exclude_max=True))
def test_the_back_off_doubles_up_to_a_bound_and_is_jittered_by_half(tries: int, jitter: float) -> None:
    """SLUICE_RETRIES: jittered exponential back-off; its setting ends at 10."""
    whole = min(8.0, 0.25 * 2 ** (tries - 1))
    assert whole / 2 <= backoff(tries, jitter=lambda: jitter) <= whole


def test_the_back_off_differs_from_one_time_to_the_next() -> None:
    """Those who were refused together must not come back together."""
    assert len({backoff(1) for _ in range(20)}) > 10


# ---- The budget


def test_a_burst_of_further_requests_is_bounded(clock: Clock) -> None:
    """Fault U49: a thousand clients of an endpoint in trouble must not become three thousand requests."""
    assert take_all(RetryBudget(clock=clock)) == BURST


@pytest.mark.parametrize(("passed", "more"), [(0.0, 0), (0.09, 0), (0.5, 5), (3.0, 30), (10.0, 100), (3600.0, 100)])
def test_the_budget_comes_back_with_time_up_to_its_bound(passed: float, more: int, clock: Clock) -> None:
    """A server with few answers can retry as well."""
    budget = spent(clock)
    clock.now += passed
    assert take_all(budget) == more


@pytest.mark.parametrize(("answers", "more"), [(0, 0), (4, 0), (5, 1), (9, 1), (501, 100), (100_000, 100)])
def test_the_budget_comes_back_with_answers_up_to_its_bound(answers: int, more: int, clock: Clock) -> None:
    """One further request for five answers: the load on an endpoint grows by a fifth at most."""
    budget = spent(clock)
    for _ in range(answers):
        budget.deposit()
    assert take_all(budget) == more


def test_a_new_budget_is_full_and_grows_no_fuller(clock: Clock) -> None:
    budget = RetryBudget(clock=clock)
    for _ in range(1000):
        budget.deposit()
    clock.now += 3600.0
    assert take_all(budget) == BURST


def test_who_asks_in_vain_pays_nothing(clock: Clock) -> None:
    """Else a crowd that keeps asking would never have anything again."""
    budget = spent(clock)
    assert not any(budget.take() for _ in range(1000))
    clock.now += 0.11
    assert budget.take()


STEPS = st.lists(st.sampled_from(["answer", "take", "take", "take all"]) | st.floats(0, 20), max_size=60)


@given(STEPS)
def test_any_walk_pays_what_is_there_and_no_more(steps: list[str | float]) -> None:
    """What there is: at most the bound, less what was taken, and with what has come back meanwhile."""
    clock = Clock()
    budget = RetryBudget(clock=clock)
    balance = float(BURST)
    for step in steps:
        taken = 0
        if step == "answer":
            balance = min(BURST, balance + EACH_ANSWER)
            budget.deposit()
        elif isinstance(step, float):
            balance = min(BURST, balance + step * EACH_SECOND)
            clock.now += step
        else:
            taken = take_all(budget, 1 if step == "take" else 1000)
            assert taken == pytest.approx(min(int(balance), 1 if step == "take" else BURST), abs=on_the_edge(balance))
        balance -= taken


def on_the_edge(balance: float) -> int:
    """By how many the last bit of a float may decide."""
    return int(abs(balance - round(balance)) < 1e-6)
