"""Token buckets, with the clock in the test's hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.relay.admission import Allowance, Reservation, TokenBuckets
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


# ---- Looking


def test_looking_takes_nothing(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(2, 60.0), clock=clock)
    assert [buckets.look("a") for _ in range(5)] == [Allowance(True, 2, 0.0)] * 5
    assert len(buckets) == 0
    buckets.take("a")
    assert [buckets.look("a") for _ in range(5)] == [Allowance(True, 1, 30.0)] * 5
    buckets.take("a")
    assert [buckets.look("a") for _ in range(5)] == [Allowance(False, 0, 30.0)] * 5


@given(st.integers(1, 20), st.floats(0.5, 100), st.lists(st.floats(0, 30), min_size=1, max_size=60))
def test_whoever_is_told_to_be_admitted_is(amount: int, seconds: float, waits: list[float]) -> None:
    """What a look says is what a taking then finds, to the token; and a wait of ``next_in`` brings one more."""
    clock = Clock()
    buckets = TokenBuckets(Rate(amount, seconds), clock=clock)
    for wait in waits:
        clock.now += wait
        seen = buckets.look("a")
        assert seen.admitted is (seen.remaining > 0)
        taken = buckets.take("a")
        assert taken.admitted is seen.admitted
        assert taken.remaining == max(0, seen.remaining - 1)
        if not seen.admitted:
            clock.now += seen.next_in
            assert buckets.look("a").admitted


# ---- Reserving


def reserved(buckets: TokenBuckets, most: int, client: str = "a") -> Reservation:
    reservation = buckets.reserve(client, most)
    assert reservation is not None
    return reservation


def left(buckets: TokenBuckets, client: str = "a") -> int:
    return buckets.look(client).remaining


def test_what_is_reserved_is_taken_until_it_is_settled(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock)
    reservation = reserved(buckets, 6)
    assert (reservation.amount, left(buckets)) == (6, 4)
    reservation.settle(2)
    assert left(buckets) == 8


def test_a_reservation_is_as_large_as_the_bucket_allows(clock: Clock) -> None:
    """Whole tokens, and no more than there are."""
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock)
    reserved(buckets, 7)
    clock.now += 5  # half a token
    assert reserved(buckets, 800).amount == 3
    assert buckets.reserve("a", 800) is None
    assert buckets.look("a").next_in == pytest.approx(5.0)


def test_where_there_is_nothing_nothing_is_taken(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(1, 10.0), clock=clock)
    reserved(buckets, 1)
    for _ in range(10):
        assert buckets.reserve("a", 1) is None
    clock.now += 10
    assert reserved(buckets, 1).amount == 1


@pytest.mark.parametrize("most", [0, -1, -(10**9)])
def test_a_reservation_of_nothing_is_none(clock: Clock, most: int) -> None:
    """Least of all one that would fill the bucket."""
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock)
    reserved(buckets, 5)
    assert buckets.reserve("a", most) is None
    assert left(buckets) == 5


def test_two_reservations_do_not_share_a_token(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock)
    first, second = reserved(buckets, 6), reserved(buckets, 6)
    assert (first.amount, second.amount) == (6, 4)
    assert buckets.reserve("a", 1) is None
    second.settle(0)
    assert left(buckets) == 4
    first.settle(6)
    assert left(buckets) == 4


def test_a_reservation_can_grow_while_there_is_something_left(clock: Clock) -> None:
    """For an answer that is longer than was thought; what it grew by is trued up with the rest."""
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock)
    reservation = reserved(buckets, 4)
    assert reservation.extend(3)
    assert (reservation.amount, left(buckets)) == (7, 3)
    assert reservation.extend(64)
    assert (reservation.amount, left(buckets)) == (10, 0)
    assert not reservation.extend(1)
    assert reservation.amount == 10
    reservation.settle(5)
    assert left(buckets) == 5


def test_a_reservation_grows_by_nothing_that_another_has(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock)
    first, second = reserved(buckets, 4), reserved(buckets, 6)
    assert not first.extend(1)
    second.settle(0)
    assert first.extend(1)
    assert (first.amount, left(buckets)) == (5, 5)


def test_a_reservation_is_settled_once(clock: Clock) -> None:
    """The ways in which an answer ends may meet; the refund of one must not be given twice."""
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock)
    reservation = reserved(buckets, 10)
    reservation.settle(4)
    for used in (0, 4, 10, 10**9):
        reservation.settle(used)
    assert left(buckets) == 6


def test_a_refund_never_makes_a_bucket_more_than_full(clock: Clock) -> None:
    """It has filled by itself meanwhile."""
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock)
    reservation = reserved(buckets, 10)
    clock.now += 99
    reservation.settle(0)
    assert left(buckets) == 10
    clock.now += 1000
    assert [buckets.take("a").admitted for _ in range(11)] == [True] * 10 + [False]


def test_what_was_used_beyond_is_charged(clock: Clock) -> None:
    """An endpoint that counts more than it was asked for: the client owes it, and waits longer."""
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock)
    reserved(buckets, 10).settle(14)
    assert not buckets.look("a").admitted
    assert buckets.look("a").next_in == pytest.approx(50.0)
    clock.now += 50
    assert left(buckets) == 1


@pytest.mark.parametrize("used", [20, 21, 10**9, 1 << 53])
def test_nobody_owes_more_than_a_bucket(clock: Clock, used: int) -> None:
    """Row U44: a huge ``completion_tokens`` must not lock a client out for a year."""
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock)
    reserved(buckets, 10).settle(used)
    assert buckets.look("a").next_in == pytest.approx(110.0)
    clock.now += 200
    assert left(buckets) == 10


def test_a_reservation_is_its_clients_own(clock: Clock) -> None:
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock)
    first = reserved(buckets, 10, "a")
    assert reserved(buckets, 10, "b").amount == 10
    first.settle(0)
    assert (left(buckets, "a"), left(buckets, "b")) == (10, 0)


def test_reservations_of_many_clients_stay_in_the_table(clock: Clock) -> None:
    """Those who find no room share one bucket, in which they settle too; nobody is refilled by being forgotten."""
    buckets = TokenBuckets(Rate(10, 100.0), clock=clock, max_clients=2)
    known = [reserved(buckets, 10, client) for client in "ab"]
    stranger = reserved(buckets, 10, "c")
    assert buckets.reserve("d", 1) is None
    stranger.settle(4)
    assert reserved(buckets, 10, "d").amount == 6
    assert len(buckets) == 2
    for reservation in known:
        reservation.settle(10)
    assert buckets.reserve("a", 1) is None
    clock.now += 100
    assert reserved(buckets, 10, "e").amount == 10
    assert len(buckets) == 1


class Spending(RuleBasedStateMachine):
    """One client, any history of requests, reservations and settlements, against the definition of a token bucket."""

    @initialize(amount=st.integers(1, 50), seconds=st.sampled_from([0.5, 7.0, 3600.0]))
    def open(self, amount: int, seconds: float) -> None:
        self.clock = Clock()
        self.began_at = self.clock.now
        self.rate = Rate(amount, seconds)
        self.buckets = TokenBuckets(self.rate, clock=self.clock, max_clients=3)
        self.open_reservations: list[Reservation] = []
        self.spent = 0  # by what was taken and what was used, within its reservation
        self.beyond = 0  # used beyond a reservation: nobody could know before

    @rule(share=st.floats(0, 1.5))
    def time_passes(self, share: float) -> None:
        self.clock.now += share * self.rate.seconds

    @rule()
    def take(self) -> None:
        self.spent += self.buckets.take("a").admitted

    @rule(most=st.integers(-1, 80))
    def reserve(self, most: int) -> None:
        seen = left(self.buckets)
        reservation = self.buckets.reserve("a", most)
        assert (reservation.amount if reservation else 0) == max(0, min(most, seen))
        if reservation is not None:
            assert left(self.buckets) == seen - reservation.amount
            self.open_reservations.append(reservation)

    @precondition(lambda self: self.open_reservations)
    @rule(data=st.data(), most=st.integers(-1, 80))
    def extend(self, data: st.DataObject, most: int) -> None:
        reservation = data.draw(st.sampled_from(self.open_reservations))
        seen, before = left(self.buckets), reservation.amount
        assert reservation.extend(most) is (min(most, seen) > 0)
        assert reservation.amount - before == seen - left(self.buckets) == max(0, min(most, seen))

    @precondition(lambda self: self.open_reservations)
    @rule(data=st.data(), used=st.integers(0, 120) | st.just(1 << 53))
    def settle(self, data: st.DataObject, used: int) -> None:
        place = data.draw(st.integers(0, len(self.open_reservations) - 1))
        reservation = self.open_reservations.pop(place)
        seen = left(self.buckets)
        reservation.settle(used)
        if used <= reservation.amount:
            assert left(self.buckets) >= seen
        else:
            assert left(self.buckets) <= seen
        after = self.buckets.look("a")
        reservation.settle(0)
        reservation.settle(used)
        assert self.buckets.look("a") == after
        self.spent += min(used, reservation.amount)
        self.beyond += max(0, used - reservation.amount)

    @rule(client=st.sampled_from("bc"))
    def somebody_else_spends(self, client: str) -> None:
        self.buckets.take(client)

    @invariant()
    def no_more_is_spent_than_the_rate_allows(self) -> None:
        held = sum(reservation.amount for reservation in self.open_reservations)
        bound = self.rate.amount * (1 + (self.clock.now - self.began_at) / self.rate.seconds)
        assert self.spent + held <= bound + 1e-6 * bound

    @invariant()
    def what_is_told_is_within_bounds(self) -> None:
        told = self.buckets.look("a")
        token_s = self.rate.seconds / self.rate.amount
        assert 0 <= told.remaining <= self.rate.amount
        assert told.admitted is (told.remaining > 0)
        assert 0 <= told.next_in <= (self.rate.amount + 1) * token_s * (1 + 1e-6)
        assert math.ceil(told.next_in) > 0 or told.admitted
        assert len(self.buckets) <= 3


TestSpending = Spending.TestCase
TestSpending.settings = hypothesis_settings(max_examples=150, stateful_step_count=40, deadline=None)
