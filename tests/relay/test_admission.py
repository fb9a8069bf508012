"""Token buckets, with the clock in the test's hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.relay.admission import TokenBuckets
from server.settings import Rate


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_full_bucket_admits_its_size_and_then_no_more(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(10, 60.0), clock=clock)
    assert [buckets.take("a").remaining for _ in range(10)] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    refused = buckets.take("a")
    assert (refused.admitted, refused.remaining) == (False, 0)
    assert refused.next_in == pytest.approx(6.0)


def test_a_token_comes_back_after_its_share_of_the_time(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(2, 60.0), clock=clock)
    buckets.take("a")
    buckets.take("a")
    clock.now += 29.9
    assert not buckets.take("a").admitted
    clock.now += 0.1
    assert buckets.take("a").admitted
    assert not buckets.take("a").admitted


def test_who_waits_as_long_as_told_is_admitted(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(7, 3.3), clock=clock)
    for _ in range(50):
        while (allowance := buckets.take("a")).admitted:
            pass
        clock.now += allowance.next_in
        assert buckets.take("a").admitted


def test_a_refusal_costs_nothing(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(1, 10.0), clock=clock)
    buckets.take("a")
    for _ in range(100):
        assert not buckets.take("a").admitted
    clock.now += 10
    assert buckets.take("a").admitted


def test_an_idle_bucket_holds_its_size_and_no_more(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(3, 1.0), clock=clock)
    clock.now += 1e6
    assert [buckets.take("a").admitted for _ in range(4)] == [True, True, True, False]


def test_one_clients_spending_is_not_anothers(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(1, 10.0), clock=clock)
    assert buckets.take("a").admitted
    assert buckets.take("b").admitted
    assert not buckets.take("a").admitted


@given(
    st.integers(1, 20),
    st.floats(0.5, 100),
    st.lists(st.floats(0, 30), min_size=1, max_size=60),
)
def test_no_window_admits_more_than_size_plus_rate(amount: int, seconds: float, waits: list[float]) -> None:
    """The definition of a token bucket: in any time t at most ``amount + t · amount / seconds`` requests."""
    clock = Clock()
    buckets = TokenBuckets(Rate(amount, seconds), clock=clock)
    admitted: list[float] = []
    for wait in waits:
        clock.now += wait
        admitted += [clock.now for _ in range(amount + 2) if buckets.take("a").admitted]
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            bound = amount + (admitted[last] - admitted[first]) * amount / seconds
            assert last - first + 1 <= bound + 1e-3


def test_the_table_is_bounded_and_forgets_only_full_buckets(clock: Clock) -> None:
    """Eviction that refills would give a client with many addresses all it wants."""
    buckets = TokenBuckets(Rate(1, 10.0), clock=clock, max_clients=3)
    for client in "abc":
        assert buckets.take(client).admitted
    assert buckets.take("d").admitted  # the first of those who share a bucket
    assert not buckets.take("e").admitted
    assert not buckets.take("a").admitted
    assert len(buckets) == 3
    clock.now += 10
    assert buckets.take("e").admitted
    assert len(buckets) == 1
