"""Two upstreams at once: who is asked when, who is relayed, and that all others are closed. Hours pass in no time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import UpstreamError, UpstreamFailed, UpstreamIncomplete, UpstreamRejected, UpstreamUnreachable
from server.upstream.attempt import AttemptFailed
from server.upstream.circuit import Circuit, Permit
from server.upstream.endpoint import Endpoint, Upstream
from server.upstream.progress import Progress
from server.upstream.race import Race
from server.upstream.retry import RetryBudget
from server.wire.chunks import Answerer, Chunk, Delta, DeltaKind
from tests.relay.virtual_time import VirtualTimeLoop, run
from tests.upstream.recording import Recording

HEDGE_AFTER: Final = 1.0  # s

Behaviour = Callable[[Progress], Awaitable[None]]


def token(text: str) -> Chunk:
    return Chunk((Delta(DeltaKind.CONTENT, text),))


# ---- What an upstream does when it is asked


def speaking(text: str, *, after: float = 0.0, ends: float = 0.5) -> Behaviour:
    """Two words, the first one ``after`` (s) silence, and the end ``ends`` (s) later."""

    async def behave(progress: Progress) -> None:
        await asyncio.sleep(after)
        progress.take([token(f"{text}1")])
        await asyncio.sleep(ends)
        progress.end([token(f"{text}2")])

    return behave


def failing(error: UpstreamFailed, *, after: float = 0.0, said: str = "", elsewhere: bool = True) -> Behaviour:
    """A failure ``after`` (s), behind what was ``said`` at once."""

    async def behave(progress: Progress) -> None:
        if said:
            progress.take([token(said)])
        await asyncio.sleep(after)
        raise AttemptFailed(error, "as told", elsewhere=elsewhere)

    return behave


async def silent(progress: Progress) -> None:
    await asyncio.sleep(10_000)


def stubborn(text: str) -> Behaviour:
    """Has more to say when it is closed, and takes its time for that."""

    async def behave(progress: Progress) -> None:
        try:
            await silent(progress)
        finally:
            progress.take([token(text)])
            await asyncio.sleep(3)
            progress.end([token(text)])

    return behave


class Lane:
    """One upstream: when it was asked and when that was over (s, from the start of the race), and how."""

    def __init__(self, behaviour: Behaviour, circuit: Circuit | None = None) -> None:
        self.behaviour = behaviour
        self.upstream = Upstream(Endpoint("http://upstream/v1", "m"), circuit or Circuit())
        self.asked_at: float | None = None
        self.closed_at: float | None = None
        self.cancelled = False

    @property
    def times(self) -> tuple[float | None, float | None]:
        return self.asked_at, self.closed_at


def left_out(clock: Callable[[], float] = time.monotonic) -> Lane:
    """An upstream whose circuit has just opened."""
    circuit = Circuit(clock=clock)
    permits = [circuit.enter() for _ in range(5)]
    for permit in permits:
        assert permit is not None
        permit.failed()
    return Lane(silent, circuit)


class Heard(Recording):
    """Knows who was said to answer, each time."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []

    def begin(self, answerer: Answerer) -> None:
        super().begin(answerer)
        self.begun.append(answerer.model)


class Poor(RetryBudget):
    """Has nothing left, and counts who asks."""

    asked = 0

    def take(self) -> bool:
        self.asked += 1
        return False


class Heat:
    """One race between lanes."""

    def __init__(
        self, *lanes: Lane | Behaviour, hedge_after: float | None = HEDGE_AFTER, budget: RetryBudget | None = None
    ) -> None:
        self.lanes = [lane if isinstance(lane, Lane) else Lane(lane) for lane in lanes]
        self.budget = budget or RetryBudget()
        self.heard = Heard()
        self.most_at_once = 0
        self.failure: UpstreamFailed | None = None
        self.seconds = 0.0
        self._running = 0
        self._hedge_after = hedge_after

    def run(self) -> Heat:
        """To its end; who was asked is closed then, in whatever way it ends."""
        run(self._main)
        return self

    async def start(self) -> None:
        """As :meth:`run`, in a loop that runs."""
        loop = asyncio.get_running_loop()
        self._began_at = loop.time()
        try:
            await Race(self._hedge_after, self.budget, self.heard).run(
                [lane.upstream for lane in self.lanes], self._ask
            )
        except AttemptFailed as failed:
            self.failure = failed.error
        finally:
            self.seconds = self._now()
            assert self._running == 0, "closed before run() returns"

    async def _main(self, loop: VirtualTimeLoop) -> None:
        await self.start()

    def _now(self) -> float:
        return round(asyncio.get_running_loop().time() - self._began_at, 3)

    async def _ask(self, upstream: Upstream, permit: Permit, progress: Progress) -> None:
        (number,) = [number for number, lane in enumerate(self.lanes) if lane.upstream is upstream]
        lane = self.lanes[number]
        assert lane.asked_at is None, "nobody is asked twice"
        lane.asked_at = self._now()
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        progress.begin(Answerer(str(number)))
        try:
            await lane.behaviour(progress)
        except asyncio.CancelledError:
            lane.cancelled = True
            raise
        finally:
            self._running -= 1
            lane.closed_at = self._now()
            permit.withdrawn()


# ---- One is quick enough


def test_who_speaks_in_time_runs_alone() -> None:
    """SLUICE_HEDGE_AFTER: seconds without a first token; the end may take as long as it likes."""
    heat = Heat(speaking("a", after=0.9, ends=600), speaking("b")).run()
    assert heat.heard.texts == ["a1", "a2"]
    assert heat.heard.done == 1
    assert [lane.times for lane in heat.lanes] == [(0.0, 600.9), (None, None)]


def test_without_a_time_nobody_is_asked_beside_another() -> None:
    """SLUICE_HEDGE_AFTER: off."""
    heat = Heat(speaking("a", after=3600), speaking("b"), hedge_after=None).run()
    assert heat.heard.texts == ["a1", "a2"]
    assert heat.most_at_once == 1


# ---- The hedge


def test_after_so_long_without_a_first_token_the_next_is_asked_too() -> None:
    """SLUICE_HEDGE_AFTER: the first to speak is relayed, the other closed, at once."""
    heat = Heat(silent, speaking("b", after=0.5)).run()
    assert heat.heard.texts == ["b1", "b2"]
    assert heat.heard.begun == ["1"]
    assert [lane.times for lane in heat.lanes] == [(0.0, 1.5), (1.0, 2.0)]
    assert heat.lanes[0].cancelled


def test_the_first_may_still_win() -> None:
    heat = Heat(speaking("a", after=1.2), speaking("b", after=0.3)).run()
    assert heat.heard.texts == ["a1", "a2"]
    assert heat.heard.begun == ["0"]
    assert [lane.times for lane in heat.lanes] == [(0.0, 1.7), (1.0, 1.2)]
    assert heat.lanes[1].cancelled


def test_an_answer_without_a_word_wins_as_well() -> None:
    """A filter's refusal, say: a finish_reason and no content. It is an answer, and the other one is not needed."""

    async def finish(progress: Progress) -> None:
        await asyncio.sleep(1.5)
        progress.take([Chunk(finish_reason="content_filter")])
        progress.end(())

    heat = Heat(silent, finish).run()
    assert [chunk.finish_reason for chunk in heat.heard.chunks] == ["content_filter"]
    assert heat.heard.done == 1
    assert heat.lanes[0].cancelled


@pytest.mark.parametrize("chunk", [Chunk(), Chunk(model="m"), Chunk(finish_reason="stop")])
def test_what_holds_no_content_is_not_yet_speech(chunk: Chunk) -> None:
    """SLUICE_FIRST_TOKEN_TIMEOUT names what is: content, reasoning, a tool call. A role wins no race."""

    async def mumble(progress: Progress) -> None:
        progress.take([chunk])
        await silent(progress)

    heat = Heat(mumble, speaking("b", after=0.5)).run()
    assert heat.heard.texts == ["b1", "b2"]
    assert heat.heard.chunks[0] == Chunk(), "and leaves no trace"


@pytest.mark.parametrize("kind", list(DeltaKind))
def test_every_kind_of_delta_is_speech(kind: DeltaKind) -> None:
    """SLUICE_FIRST_TOKEN_TIMEOUT: content, reasoning or a tool call."""

    async def say(progress: Progress) -> None:
        await asyncio.sleep(0.9)
        progress.take([Chunk((Delta(kind, "x"),))])
        await asyncio.sleep(10)
        progress.end(())

    heat = Heat(say, silent).run()
    assert heat.lanes[1].asked_at is None
    assert heat.heard.done == 1


def test_at_most_two_are_asked_at_a_time() -> None:
    """However many there are, and however long both stay silent."""
    heat = Heat(speaking("a", after=3600), silent, silent, silent).run()
    assert heat.heard.texts == ["a1", "a2"]
    assert heat.most_at_once == 2
    assert [lane.asked_at for lane in heat.lanes] == [0.0, 1.0, None, None]


def test_who_is_alone_again_is_given_another_companion_after_as_long() -> None:
    heat = Heat(failing(UpstreamError(), after=5), silent, speaking("c", after=0.5)).run()
    assert heat.heard.texts == ["c1", "c2"]
    assert [lane.times for lane in heat.lanes] == [(0.0, 5.0), (1.0, 6.5), (6.0, 7.0)]


def test_the_late_words_of_the_loser_are_not_handed_on() -> None:
    """Two answers are never mixed; and who is slow to close holds nobody up."""
    heat = Heat(stubborn("late"), speaking("b", after=0.5, ends=1.0)).run()
    assert heat.heard.texts == ["b1", "b2"]
    assert heat.heard.done == 1
    assert heat.heard.begun == ["1"]
    assert heat.seconds == 2.5


def test_two_that_speak_in_the_same_moment_are_not_mixed() -> None:
    heat = Heat(speaking("a", after=2.0), speaking("b", after=1.0)).run()
    assert heat.heard.texts in (["a1", "a2"], ["b1", "b2"])
    assert heat.heard.done == len(heat.heard.begun) == 1
    assert sum(lane.cancelled for lane in heat.lanes) == 1


def test_the_hot_path_of_the_loser_is_not_handed_on_either() -> None:
    async def go_on(progress: Progress) -> None:
        await asyncio.sleep(1.5)
        progress.take([token("late")])
        progress.take_texts([b"late"], b'data: "late"\n\n')

    heat = Heat(go_on, speaking("b", after=0.2)).run()
    assert heat.heard.texts == ["b1", "b2"]
    assert heat.heard.wire == b""


# ---- Failures


def test_a_failure_has_the_next_asked_at_once() -> None:
    """SLUICE_FALLBACKS: tried in order. It is no hedge, and costs nothing of the budget."""
    budget = Poor()
    failed = failing(UpstreamUnreachable(), after=0.25)
    heat = Heat(failed, failed, speaking("c"), budget=budget).run()
    assert heat.heard.texts == ["c1", "c2"]
    assert [lane.times for lane in heat.lanes] == [(0.0, 0.25), (0.25, 0.5), (0.5, 1.0)]
    assert budget.asked == 0


def test_a_hedge_that_fails_leaves_the_first_its_time() -> None:
    heat = Heat(speaking("a", after=30.0), failing(UpstreamError())).run()
    assert heat.heard.texts == ["a1", "a2"]
    assert heat.failure is None


def test_a_first_that_fails_leaves_the_answer_to_the_hedge() -> None:
    heat = Heat(failing(UpstreamError(), after=1.5), speaking("b", after=30.0)).run()
    assert heat.heard.texts == ["b1", "b2"]
    assert heat.failure is None


@pytest.mark.parametrize(("first_after", "second_after", "last"), [(2.0, 0.5, 0), (1.2, 5.0, 1)])
def test_where_all_fail_the_last_failure_is_told(first_after: float, second_after: float, last: int) -> None:
    """As without a hedge; the last one in time, whoever was asked first."""
    errors = [UpstreamError(), UpstreamUnreachable()]
    heat = Heat(failing(errors[0], after=first_after), failing(errors[1], after=second_after)).run()
    assert heat.failure is errors[last]
    assert heat.heard.done == 0
    assert heat.heard.begun == []


def test_two_that_fail_in_the_same_moment_are_one_failure() -> None:
    heat = Heat(failing(UpstreamError(), after=2.0), failing(UpstreamError(), after=1.0)).run()
    assert isinstance(heat.failure, UpstreamError)


def test_a_failure_that_no_other_may_mend_is_the_end() -> None:
    """SLUICE_RETRIES: what is wrong with the question ends the answer; nobody else is asked it."""
    heat = Heat(failing(UpstreamRejected(), after=0.5, elsewhere=False), speaking("b")).run()
    assert isinstance(heat.failure, UpstreamRejected)
    assert heat.seconds == 0.5
    assert heat.lanes[1].asked_at is None


@pytest.mark.parametrize("who", [0, 1])
def test_whoever_runs_already_may_still_answer_what_the_other_refused(who: int) -> None:
    """What one rejects another may take, and here it costs no further request; a third one is not asked."""
    failed = failing(UpstreamRejected(), after=1.5 - who, elsewhere=False)
    other = speaking("other", after=30.0)
    heat = Heat(*([other, failed] if who else [failed, other]), speaking("c")).run()
    assert heat.failure is None
    assert heat.heard.texts == ["other1", "other2"]
    assert heat.lanes[2].asked_at is None


@pytest.mark.parametrize("who", [0, 1])
def test_a_refusal_is_told_though_the_other_fails_later(who: int) -> None:
    """It says what is wrong with the question; that the other one was ill as well helps nobody."""
    failed = failing(UpstreamRejected(), after=1.5 - who, elsewhere=False)
    other = failing(UpstreamError(), after=30.0)
    heat = Heat(*([other, failed] if who else [failed, other]), speaking("c")).run()
    assert isinstance(heat.failure, UpstreamRejected)
    assert heat.heard.begun == []
    assert heat.lanes[2].asked_at is None


def test_a_winner_that_breaks_off_is_not_followed_by_another() -> None:
    """SLUICE_RETRIES: before the first token; later another answer would say things twice."""
    heat = Heat(silent, failing(UpstreamIncomplete(), after=2.0, said="half"), speaking("c")).run()
    assert isinstance(heat.failure, UpstreamIncomplete)
    assert heat.heard.texts == ["half"]
    assert heat.heard.done == 0
    assert heat.lanes[2].asked_at is None


def test_a_loser_that_fails_while_it_is_closed_changes_nothing() -> None:
    async def break_down(progress: Progress) -> None:
        try:
            await silent(progress)
        finally:
            raise AttemptFailed(UpstreamRejected(), "broke while it was closed", elsewhere=False)

    heat = Heat(break_down, speaking("b", after=0.5)).run()
    assert heat.failure is None
    assert heat.heard.texts == ["b1", "b2"]


async def stumbling(progress: Progress) -> None:
    await asyncio.sleep(0.5)
    raise ZeroDivisionError


def test_a_bug_looks_like_one() -> None:
    """It is not taken for a failure of the upstream's, which another one could mend."""
    heat = Heat(stumbling, speaking("b"))
    with pytest.raises(ZeroDivisionError):
        heat.run()
    assert heat.lanes[1].asked_at is None


def test_what_is_said_behind_the_end_is_not_handed_on() -> None:
    """One end, and nothing behind it: what the other says while it is closed comes too late."""
    heat = Heat(stubborn("late"), stumbling)
    with pytest.raises(ZeroDivisionError):
        heat.run()
    assert heat.lanes[0].cancelled
    assert heat.heard.begun == heat.heard.texts == []


# ---- The budget, and who is left out


def test_without_a_budget_there_is_no_hedge() -> None:
    """Retries and hedges together are bounded: an endpoint that is slow under load must not get twice the load."""
    budget = Poor()
    heat = Heat(speaking("a", after=30.0), speaking("b"), budget=budget).run()
    assert heat.heard.texts == ["a1", "a2"]
    assert heat.most_at_once == 1
    assert budget.asked == 1, "once a race: it does not beg"


def test_without_a_budget_the_next_is_still_there_for_a_failure() -> None:
    heat = Heat(failing(UpstreamError(), after=30.0), speaking("b"), budget=Poor()).run()
    assert heat.heard.texts == ["b1", "b2"]
    assert heat.lanes[1].asked_at == 30.0


def test_where_all_are_left_out_nobody_is_asked() -> None:
    """SLUICE_RETRIES: all open: upstream_unreachable at once."""
    heat = Heat(left_out(), left_out()).run()
    assert isinstance(heat.failure, UpstreamUnreachable)
    assert heat.failure.retry_after == 10
    assert heat.seconds == 0.0
    assert [lane.asked_at for lane in heat.lanes] == [None, None]


def test_who_is_left_out_is_passed_over() -> None:
    heat = Heat(left_out(), silent, left_out(), speaking("d", after=0.5)).run()
    assert heat.heard.texts == ["d1", "d2"]
    assert [lane.asked_at for lane in heat.lanes] == [None, 0.0, None, 1.0]


def test_a_hedge_that_could_only_be_left_out_is_none() -> None:
    heat = Heat(speaking("a", after=30.0), left_out()).run()
    assert heat.heard.texts == ["a1", "a2"]
    assert heat.most_at_once == 1


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Sudden(RetryBudget):
    """Has the first upstream speak in the moment in which the next one is paid for."""

    def __init__(self) -> None:
        super().__init__()
        self.paid = asyncio.Event()

    def take(self) -> bool:
        self.paid.set()
        return True


def test_a_hedge_that_is_not_wanted_before_it_has_begun_gives_its_leave_back() -> None:
    """Were it a probe of its circuit (SLUICE_RETRIES), and its leave lost, its upstream would be left out for ever."""
    clock = Clock()
    probed = left_out(clock)
    clock.now += 10.0
    budget = Sudden()

    async def speak(progress: Progress) -> None:
        await budget.paid.wait()
        progress.end([token("a")])

    heat = Heat(speak, probed, budget=budget).run()
    assert heat.heard.texts == ["a"]
    assert probed.asked_at is None
    assert probed.upstream.circuit.enter() is not None


# ---- Cancellation


@pytest.mark.parametrize("after", [0.5, 1.5])
def test_cancelling_the_race_closes_whoever_runs(after: float) -> None:
    """Section 3: a client that goes away closes the upstream request; both, where there are two."""
    heat = Heat(silent, silent)

    async def leave(loop: VirtualTimeLoop) -> None:
        task = asyncio.create_task(heat.start())
        await asyncio.sleep(after)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    run(leave)
    assert [lane.cancelled for lane in heat.lanes] == [True, after > HEDGE_AFTER]
    assert [lane.closed_at for lane in heat.lanes] == [after, after if after > HEDGE_AFTER else None]
    assert heat.heard.begun == []


def test_cancelling_behind_the_first_word_closes_the_winner() -> None:
    heat = Heat(silent, speaking("b", ends=600))

    async def leave(loop: VirtualTimeLoop) -> None:
        task = asyncio.create_task(heat.start())
        await asyncio.sleep(5)
        task.cancel()
        await asyncio.wait([task])

    run(leave)
    assert [lane.closed_at for lane in heat.lanes] == [1.0, 5.0]
    assert heat.heard.texts == ["b1"]
    assert heat.heard.done == 0


# ---- Any race


class Plan(NamedTuple):
    """What one upstream does: ``kind`` after ``after`` (s)."""

    kind: str
    after: float


def lane_of(number: int, plan: Plan) -> Lane:
    kind, after = plan
    match kind:
        case "speaks":
            return Lane(speaking(f"{number}.", after=after))
        case "breaks":
            return Lane(failing(UpstreamIncomplete(), after=after, said=f"{number}.1"))
        case "fails":
            return Lane(failing(UpstreamError(), after=after))
        case "refuses":
            return Lane(failing(UpstreamRejected(), after=after, elsewhere=False))
        case "left out":
            return left_out()
        case _:
            return Lane(stubborn(f"{number}.late"))


PLANS = st.builds(
    Plan,
    st.sampled_from(["speaks", "fails", "fails", "breaks", "refuses", "left out", "is stubborn"]),
    st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.1, 2.0, 2.5]),
)


@given(st.lists(PLANS, max_size=5), st.sampled_from([None, 0.0, 0.3, 1.0]), st.booleans())
def test_any_race_has_one_voice_and_one_end(plans: list[Plan], hedge_after: float | None, poor: bool) -> None:
    """Whatever the upstreams do: at most two at a time, one of them heard, all closed, and an answer or a failure."""
    lanes = [lane_of(number, plan) for number, plan in enumerate(plans)]
    heat = Heat(*lanes, hedge_after=hedge_after, budget=Poor() if poor else None).run()
    assert heat.most_at_once <= (1 if hedge_after is None or poor else 2)
    assert len(heat.heard.begun) <= 1
    assert {text.partition(".")[0] for text in heat.heard.texts} <= set(heat.heard.begun)
    assert (heat.heard.done == 1) is (heat.failure is None)
    asked = [lane.asked_at for lane in heat.lanes if lane.asked_at is not None]
    assert asked == sorted(asked), "in order"
