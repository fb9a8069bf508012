"""Deadlines of one length: each goes off in its time, to a few milliseconds, and one timer serves them all."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.relay.deadlines import Deadlines
from tests.relay.virtual_time import VirtualTimeLoop, run


class Scene:
    """Ten seconds of deadlines; ``expired`` tells which went off, and when (s since the beginning)."""

    def __init__(self, length: float = 10.0) -> None:
        self._began_at = asyncio.get_running_loop().time()
        self.expired: list[tuple[object, float]] = []
        self.on_expired: Callable[[object], object] = lambda item: None
        self.deadlines = Deadlines[object](length, self._note, clock=asyncio.get_running_loop().time)

    def _note(self, item: object) -> None:
        self.expired.append((item, round(asyncio.get_running_loop().time() - self._began_at, 2)))
        self.on_expired(item)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 4.0, 10.0, 25.0]),  # s until the next one
            st.one_of(st.none(), st.sampled_from([0.0, 1.0, 9.5, 10.0, 11.0])),  # s from adding to discarding it
        ),
        max_size=12,
    )
)
def test_each_goes_off_in_its_time_unless_it_is_discarded_before(items: list[tuple[float, float | None]]) -> None:
    async def play(loop: VirtualTimeLoop) -> None:
        scene, due, at = Scene(), list[tuple[int, float | None]](), 0.0
        for number, (gap, discarded_after) in enumerate(items):
            scene.deadlines.add(number)
            if discarded_after is not None:
                loop.call_later(discarded_after, scene.deadlines.discard, number)
            if discarded_after is None or discarded_after > 10.0:
                due.append((number, at + 10.0))
            elif discarded_after == 10.0:
                due.append((number, None))  # whichever is first
            await asyncio.sleep(gap)
            at += gap
        await asyncio.sleep(30)
        sure = [(number, when) for number, when in due if when is not None]
        unsure = {number for number, when in due if when is None}
        assert [(item, when) for item, when in scene.expired if item not in unsure] == sure

    run(play)


def test_one_that_goes_off_may_add_and_discard_others() -> None:
    async def play(loop: VirtualTimeLoop) -> None:
        scene = Scene()

        def replace(item: object) -> None:
            scene.deadlines.discard("b")
            if item == "a":
                scene.deadlines.add("c")

        scene.on_expired = replace
        scene.deadlines.add("a")
        scene.deadlines.add("b")
        await asyncio.sleep(30)
        assert scene.expired == [("a", 10.0), ("c", 20.0)]

    run(play)


def test_one_that_fails_does_not_stop_the_others() -> None:
    async def play(loop: VirtualTimeLoop) -> None:
        scene = Scene()
        loop.set_exception_handler(lambda loop, context: None)

        def fail(item: object) -> None:
            raise KeyError(item)

        scene.on_expired = fail
        scene.deadlines.add("a")
        scene.deadlines.add("b")
        await asyncio.sleep(1)
        scene.deadlines.add("c")
        await asyncio.sleep(30)
        assert scene.expired == [("a", 10.0), ("b", 10.0), ("c", 11.0)]

    run(play)


def test_where_they_never_come_there_is_no_timer() -> None:
    async def play(loop: VirtualTimeLoop) -> None:
        scene = Scene(math.inf)
        scene.deadlines.add("a")
        assert scene.deadlines._timer is None
        await asyncio.sleep(1e6)
        assert scene.expired == []

    run(play)


@pytest.mark.parametrize("items", [0, 3])
def test_closed_it_leaves_no_timer(items: int) -> None:
    async def play(loop: VirtualTimeLoop) -> None:
        scene = Scene()
        for number in range(items):
            scene.deadlines.add(number)
        scene.deadlines.close()
        await asyncio.sleep(30)
        assert scene.expired == []

    run(play)


async def test_the_timer_is_not_set_again_and_again_until_its_time_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvloop's are early by up to half a millisecond."""
    wakes = 0
    wake = Deadlines._wake

    def counted(self: Deadlines[object]) -> None:
        nonlocal wakes
        wakes += 1
        wake(self)

    monkeypatch.setattr(Deadlines, "_wake", counted)
    expired: list[object] = []
    for number in range(20):
        deadlines = Deadlines[object](0.0104, expired.append)
        deadlines.add(number)
        await asyncio.sleep(0.02)
    assert len(expired) == 20
    assert wakes <= 40
