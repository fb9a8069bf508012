"""Ten thousand lives of answers, each at random and each held against a small model of the contract (row U47).

Every run is a desk of its own with a few answers, whatever their source says or fails to say, and clients that come,
drop, come back, stall, stop, and a server that drains or goes down. Afterwards, and whenever a moment is over, what the
desk did is compared with what the contract's sentences allow. ``SEED=4711 pytest tests/relay/test_survival.py`` repeats
one run.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from server.errors import (
    InternalError,
    Overloaded,
    ShuttingDown,
    StreamNotFound,
    StreamTimeout,
    TooManyStreams,
    UpstreamError,
    UpstreamFailed,
    UpstreamIncomplete,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from server.relay.admission import Reservation
from server.relay.answer import AnswerRequest
from server.relay.desk import Desk, Stream
from server.relay.life import Outcome
from server.wire.chat import ChatRequest
from server.wire.chunks import Chunk, ChunkSink, Delta, DeltaKind, Usage
from tests.relay.virtual_time import VirtualTimeLoop, run
from tests.sse_client import AnswerReader

RUNS: Final = 10_000
BLOCKS: Final = 8

FIRST_VIEWER: Final = 5.0  # s that a first viewer has, where the grace is 0
INSTANT: Final = 1e-6  # s: what lies no further apart happens at once, and either may be first
REQUEST: Final = ChatRequest(messages=(("user", "hi"),), max_tokens=8, temperature=0.0)

Ending = type[UpstreamFailed] | str


# ---- What is drawn


@dataclass
class Limits:
    """The settings of one run."""

    stream_timeout: float
    max_answer_bytes: int
    max_streams: int
    max_streams_per_client: int
    heartbeat: float
    write_timeout: float
    resume_grace: float
    resume_window: float
    log_prompts: bool = False


@dataclass
class Script:
    """What a source says, and how it ends: ``ending`` is an error it raises, or one of ENDINGS."""

    steps: list[tuple[float, list[Chunk]]]  # s since the last one, and what comes then
    ending: Ending
    pause: float  # s between the last step and the ending
    closing: float  # s that it takes to close, when cancelled
    undecoded: bool  # plain tokens are handed on as they came


FAULTS: Final = [
    UpstreamIncomplete, UpstreamTimeout, UpstreamUnreachable, UpstreamError, UpstreamInvalid, UpstreamRateLimited,
]  # fmt: skip
ENDINGS: Final = [
    "done",
    "done",
    "done and lingers",
    "done and goes on",
    "hangs",
    "returns",
    "bug",
    "time-out of a bug",
]


def _pause(chance: random.Random, longest: float = 3.0) -> float:
    """Often at a moment that others choose too, since that is where it is decided who is first."""
    return chance.choice([0.0, 0.0, 0.5, 1.0, 2.0, 5.0]) if chance.random() < 0.5 else chance.random() * longest


def _draw_limits(chance: random.Random) -> Limits:
    return Limits(
        stream_timeout=chance.choice([6.0, 20.0, 20.0]),
        max_answer_bytes=chance.choice([1024, 100_000, 100_000]),
        max_streams=chance.choice([2, 5]),
        max_streams_per_client=chance.choice([1, 2, 3]),
        heartbeat=chance.choice([2.0, 15.0]),
        write_timeout=chance.choice([8.0, 30.0]),
        resume_grace=chance.choice([0.0, 1.0, 5.0, 5.0, math.inf]),
        resume_window=chance.choice([0.0, 3.0, 60.0]),
    )


def _draw_chunk(chance: random.Random, number: int) -> Chunk:
    text = f"{number}" * chance.choice([1, 1, 1, 150])
    match chance.randrange(12):
        case 0:
            return Chunk((Delta(DeltaKind.REASONING, text),))
        case 1:
            return Chunk((Delta(DeltaKind.OTHER, ""),))
        case 2:
            return Chunk(finish_reason="length", model="spoke")
        case 3:
            return Chunk(usage=Usage(3, number + 1))
        case 4:
            return Chunk((Delta(DeltaKind.REASONING, "r"), Delta(DeltaKind.CONTENT, text)))
        case _:
            return Chunk((Delta(DeltaKind.CONTENT, text),))


def _draw_script(chance: random.Random) -> Script:
    steps = [
        (_pause(chance), [_draw_chunk(chance, 10 * step + n) for n in range(chance.choice([1, 1, 2, 5]))])
        for step in range(chance.randrange(7))
    ]
    ending = chance.choice(FAULTS) if chance.random() < 0.2 else chance.choice(ENDINGS)
    return Script(steps, ending, _pause(chance), chance.choice([0.0, 0.0, 0.1]), chance.random() < 0.7)


# ---- What is known of one answer, from outside


@dataclass
class Known:
    """What was done to an answer and what was seen of it; the clients' side of the story, not the desk's."""

    stream: Stream
    owner: str
    script: Script
    limits: Limits
    budget: float
    opened_at: float
    settled: list[int] = field(default_factory=list)  # what was told to be used of its reservation
    visits: list[tuple[float, bool, bool]] = field(default_factory=list)  # when, whether it came, whether it may return
    stops: list[float] = field(default_factory=list)
    interrupts: list[float] = field(default_factory=list)
    ended_at: float | None = None
    kept_until: float = -math.inf
    present: int = 0
    holds_place: bool = True
    lines: list[dict[str, Any]] = field(default_factory=list)
    asking: int = 0  # requests to the source that are open

    def came(self, now: float) -> None:
        self.present += 1
        self.visits.append((now, True, False))

    def left(self, now: float, *, may_return: bool) -> None:
        self.present -= 1
        self.visits.append((now, False, may_return))
        if self.ended_at is not None:
            self._free()

    def ended(self, now: float) -> None:
        assert self.ended_at is None, "it ended twice"
        self.ended_at = now
        self.kept_until = now + self.limits.resume_window
        self._free()

    def _free(self) -> None:
        if not self.present:
            self.holds_place = False

    def findable(self, now: float) -> bool | None:
        """Whether it is to be found; None where both are right."""
        if self.ended_at is None or self.present:
            return True
        return None if abs(now - self.kept_until) < INSTANT else now < self.kept_until


# ---- The model: how an answer may end, and what it then holds


class Model:
    """What the contract says about one answer, given what was done to it."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self.over_at = known.opened_at + known.limits.stream_timeout
        self.events: list[tuple[float, bytes]] = []  # when it comes, its bytes; for as long as it runs
        self.causes: list[tuple[float, Outcome]] = []  # what ends it, if nothing else has before
        self.possible: list[tuple[float, Outcome]] = []  # what may have ended it, where two things met in one moment
        self.costs: list[tuple[float, int]] = [(-math.inf, 0)]  # LLM tokens, from when on
        self._follow_source()
        self._follow_clients()
        self.causes += [(at, Outcome.STOPPED) for at in known.stops]
        self.causes += [(at, Outcome.INTERRUPTED) for at in known.interrupts]
        self.possible += self.causes

    def _follow_source(self) -> None:
        known, script, limits = self.known, self.known.script, self.known.limits
        now, deltas, finished_at = known.opened_at, 0, math.inf
        number, size = 1, len(_start_event(known.stream.id))
        outcome: Outcome | None = None
        reported = 0
        for pause, chunks in script.steps:
            now += pause
            for delta, chunk in _pieces(chunks):
                if delta is None:
                    finished_at = min(finished_at, now) if chunk.finish_reason else finished_at
                    reported = (chunk.usage and chunk.usage.completion_tokens) or reported
                    self.costs.append((now, reported or deltas))
                    continue
                if deltas >= known.budget:
                    outcome = Outcome.TOKEN_LIMIT
                    break
                deltas += 1
                self.costs.append((now, reported or deltas))
                if delta.kind is DeltaKind.OTHER:
                    continue
                event = _event(known.stream.id, number, delta)
                if size + len(event) > limits.max_answer_bytes:
                    outcome = Outcome.TOO_LARGE
                    break
                self.events.append((now, event))
                number, size = number + 1, size + len(event)
            if outcome is not None:
                break
        if outcome is None:
            now += script.pause
            outcome = _outcome_of(script.ending)
        if outcome is not None and now < self.over_at + INSTANT:
            (self.causes if now < self.over_at - INSTANT else self.possible).append((now, outcome))
        # Where all was said, only the [DONE] never came. Nobody waits until its source is closed.
        self.causes.append((self.over_at, Outcome.COMPLETED if finished_at < self.over_at else Outcome.TIMEOUT))
        if abs(finished_at - self.over_at) < INSTANT:
            self.possible += [(self.over_at, Outcome.COMPLETED), (self.over_at, Outcome.TIMEOUT)]

    def _follow_clients(self) -> None:
        """Nobody is there, and whoever might come has had the grace for it."""
        known, grace = self.known, self.known.limits.resume_grace
        present, alone_since, awaited_until = 0, known.opened_at, known.opened_at + (grace or FIRST_VIEWER)
        ever = False
        for at, came, may_return in [*known.visits, (math.inf, True, False)]:
            if came:
                if not present:
                    due_at = max(alone_since, awaited_until)
                    if due_at < at - INSTANT:
                        self.causes.append((due_at, Outcome.CLIENT_GONE))
                    elif due_at < at + INSTANT:
                        self.possible.append((due_at, Outcome.CLIENT_GONE))
                present += 1
                if not ever:
                    ever, awaited_until = True, -math.inf
            else:
                present -= 1
                alone_since = at
                if may_return:
                    awaited_until = max(awaited_until, at + grace)

    def judge(self) -> Outcome:
        """Assert that it ended as it had to, and return how."""
        known = self.known
        [line] = known.lines
        outcome = Outcome(line["outcome"])
        assert known.ended_at is not None, "it never ended"
        first = min((at for at, _ in self.causes), default=math.inf)
        assert known.ended_at < first + INSTANT, f"it should have ended at {first}: {self.causes}"
        allowed = {cause for at, cause in self.possible if abs(at - known.ended_at) < INSTANT}
        assert outcome in allowed, f"{outcome} at {known.ended_at}, but {self.possible}"
        self._judge_log(outcome, line)
        self._judge_cost()
        assert not known.asking, "its source still runs"
        return outcome

    def _judge_cost(self) -> None:
        known = self.known
        assert len(known.settled) == (known.budget < math.inf), "what it spent is settled once"
        if known.settled:
            assert known.ended_at is not None
            until = min(known.ended_at, self.over_at)
            *_, sure = (cost for at, cost in self.costs if at < until - INSTANT)
            unsure = [cost for at, cost in self.costs if abs(at - until) < INSTANT]
            assert known.settled[0] in (sure, *unsure)

    def _judge_log(self, outcome: Outcome, line: dict[str, Any]) -> None:
        known, log = self.known, self.known.stream.log
        assert known.ended_at is not None
        whole = log.read(0, 1 << 30)
        reader = AnswerReader()
        reader.feed(whole)
        assert bytes(reader.taken) == whole
        until = min(known.ended_at, self.over_at)
        must = [event for at, event in self.events if at < until - INSTANT]
        may = [event for at, event in self.events if at < until + INSTANT]
        last = 2 if outcome in (Outcome.COMPLETED, Outcome.STOPPED) else 1
        said = reader.events[1:-last]
        assert len(must) <= len(said) <= len(may)
        body = b"".join(may[: len(said)])
        start = _start_event(known.stream.id)
        assert whole.startswith(start + body)
        tokens = sum("token" in event.json for event in said)
        assert line["tokens"] == tokens
        if last == 2:
            usage = reader.events[-2]
            assert usage.type == "usage"
            assert usage.json["tokens"] == tokens
            assert (usage.json["finish_reason"] == "cancelled") == (outcome is Outcome.STOPPED)
            assert reader.events[-1].data == "[DONE]"
            assert "code" not in line
        else:
            code = reader.events[-1].json["error"]
            assert code in _codes_of(outcome, known.script.ending)
            assert line["code"] == code


def _pieces(chunks: list[Chunk]) -> Iterator[tuple[Delta | None, Chunk]]:
    """The deltas in their order, and behind those of a chunk None, for the rest of what it says."""
    for chunk in chunks:
        for delta in chunk.deltas:
            yield delta, chunk
        yield None, chunk


def _outcome_of(ending: Ending) -> Outcome | None:
    if isinstance(ending, type):
        return Outcome.TIMEOUT if ending is UpstreamTimeout else Outcome.UPSTREAM_ERROR
    if ending == "hangs":
        return None
    return Outcome.COMPLETED if ending.startswith("done") else Outcome.INTERNAL_ERROR


def _codes_of(outcome: Outcome, ending: Ending) -> set[str]:
    match outcome:
        case Outcome.TIMEOUT:
            return {StreamTimeout.code, UpstreamTimeout.code}
        case Outcome.UPSTREAM_ERROR:
            assert isinstance(ending, type)
            return {ending.code}
        case Outcome.CLIENT_GONE | Outcome.INTERRUPTED:
            return {"interrupted"}
        case Outcome.TOO_LARGE:
            return {"answer_too_large"}
        case Outcome.TOKEN_LIMIT:
            return {"token_limit_exceeded"}
        case _:
            return {InternalError.code}


def _start_event(stream_id: str) -> bytes:
    return f'retry: 1000\nevent: start\nid: {stream_id}.0\ndata: {{"id":"{stream_id}","model":"asked"}}\n\n'.encode()


def _event(stream_id: str, number: int, delta: Delta) -> bytes:
    if delta.kind is DeltaKind.CONTENT:
        return f'id: {stream_id}.{number}\ndata: {{"token":"{delta.text}"}}\n\n'.encode()
    return f'event: reasoning\nid: {stream_id}.{number}\ndata: {{"reasoning":"{delta.text}"}}\n\n'.encode()


# ---- What plays the world


class Wire:
    """A connection; what ``cut_after`` bytes do not reach, it takes, and ``stalls`` once for so long (s). ``direct``
    says that it takes what it need not wait for in the moment of its coming."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, cut_after: float, stall: tuple[int, float], *, direct: bool
    ) -> None:
        self._loop = loop
        self._direct = direct
        self._cut_after = cut_after
        self._stall_at, self._stall_for = stall  # before that write it takes nothing, for so long
        self._dropped = asyncio.Event()
        self._writes = 0
        self.got = bytearray()
        self.answer_bytes = 0  # of what was got, without pings
        self.told_retry = 0  # times
        self.untaken = 0
        self.stalled_at: float | None = None  # while it takes nothing
        self.heard_at = loop.time()
        self.ended = False  # the response has its end

    @property
    def dropped(self) -> bool:
        return self._dropped.is_set()

    async def write(self, data: bytes) -> None:
        if self._cut_after < len(self.got) + len(data):
            self.got += data[: int(self._cut_after) - len(self.got)]
            self.abort()
        await self._take(len(data))
        self._note(data)

    def write_now(self, data: bytes) -> bool:
        waits = self._cut_after < len(self.got) + len(data) or self._writes + 1 == self._stall_at
        if not self._direct or self.dropped or waits:
            return False
        self._writes += 1
        self._note(data)
        return True

    def _note(self, data: bytes) -> None:
        self.got += data
        self.heard_at = self._loop.time()
        if b"event: ping\n" not in data:
            self.answer_bytes += len(data)
        elif b"retry: " in data:
            self.told_retry += 1

    async def finish(self, data: bytes) -> None:
        if data:
            await self.write(data)
        await self._take(5)
        self.ended = True

    async def _take(self, size: int) -> None:
        if self.dropped:
            raise ConnectionResetError
        self._writes += 1
        if self._writes == self._stall_at:
            self.untaken, self.stalled_at = size, self._loop.time()
            try:
                async with asyncio.timeout(self._stall_for):
                    await self._dropped.wait()
            except TimeoutError:
                pass
            finally:
                self.untaken, self.stalled_at = 0, None
            if self.dropped:
                raise ConnectionResetError

    def untaken_bytes(self) -> int:
        return self.untaken

    def abort(self) -> None:
        self._dropped.set()

    def reset(self) -> None:
        self.abort()


class Source:
    """Plays the script of whichever answer asks; ``known`` says which that is, by its request's own words."""

    def __init__(self) -> None:
        self.known: dict[str, Known] = {}

    can_ask = True

    def model_for(self, request: AnswerRequest, /) -> str:
        return "asked"

    async def relay(self, request: AnswerRequest, sink: ChunkSink, /) -> None:
        known = self.known[request.prompt]
        script = known.script
        known.asking += 1
        try:
            for pause, chunks in script.steps:
                await asyncio.sleep(pause)
                texts = [delta.text.encode() for chunk in chunks for delta in chunk.deltas]
                if script.undecoded and chunks == [Chunk((Delta(DeltaKind.CONTENT, text.decode()),)) for text in texts]:
                    sink.take_texts(texts, b"".join(texts))
                else:
                    sink.take(chunks)
            await asyncio.sleep(script.pause)
            if isinstance(script.ending, type):
                raise script.ending
            match script.ending:
                case "bug":
                    raise ZeroDivisionError
                case "time-out of a bug":
                    raise TimeoutError
                case "hangs":
                    await asyncio.Event().wait()
                case "done":
                    sink.end(())
                case "done and lingers":
                    sink.end(())
                    await asyncio.sleep(1)
                case "done and goes on":  # none of which may be heard
                    sink.end(())
                    sink.take([Chunk((Delta(DeltaKind.CONTENT, "more"),), "stop", Usage(9, 9), "another")])
                    sink.end(())
                    raise UpstreamIncomplete
        except asyncio.CancelledError:
            await asyncio.sleep(script.closing)
            raise
        finally:
            known.asking -= 1


class Spending(Reservation):
    """``amount`` LLM tokens, and ``more`` that the client has left; ``settled`` is told what was used."""

    def __init__(self, amount: int, more: int, settled: list[int]) -> None:
        self.amount, self.more, self.settled = amount, more, settled

    def extend(self, most: int) -> bool:
        more = min(most, self.more)
        self.amount, self.more = self.amount + more, self.more - more
        return more > 0

    def settle(self, used: int) -> None:
        self.settled.append(used)


class Attached:
    """A client's connection while it views."""

    def __init__(self, known: Known, wire: Wire, offset: int) -> None:
        self.known, self.wire, self.offset = known, wire, offset


class World:
    """One run: a desk, and everybody round it."""

    def __init__(self, seed: int, loop: VirtualTimeLoop, log: StreamLines) -> None:
        self.chance = random.Random(seed)
        self.loop = loop
        self.limits = _draw_limits(self.chance)
        self.source = Source()
        self.desk = Desk(self.source, self.limits, clock=loop.time)
        self.known: list[Known] = []
        self.attached: set[Attached] = set()
        self.clients: set[asyncio.Task[None]] = set()
        self.draining = False
        self.seen: Counter[str] = Counter()
        self._log = log

    async def live(self) -> None:
        """Play it to its end, and judge."""
        chance = self.chance
        began_at = self.loop.time()
        self.loop.call_at_rest(self.look)
        acts = [self.open_answer] * chance.choice([1, 1, 2, 3])
        acts += [act for act in (self.stop_one, self.stop_one, self.drain, self.interrupt) if chance.random() < 0.2]
        for at, act in sorted(((_pause(chance, 10), act) for act in acts), key=lambda due: due[0]):
            await asyncio.sleep(max(0.0, began_at + at - self.loop.time()))
            act()
        if chance.random() < 0.15:  # the process ends, whoever is there; as the runner does, handlers first
            await asyncio.sleep(_pause(chance, 8))
            for client in list(self.clients):
                client.cancel()
        while self.clients:
            await asyncio.wait(self.clients)
        if chance.random() < 0.8:
            await self.desk.empty()
            await asyncio.sleep(2 * self.limits.resume_window + 2)
            assert self.loop.timers == 0, "a timer is set, though all is over"
            assert all(self.desk.find(known.stream.id) is None for known in self.known)
        now = self.loop.time()
        for known in self.known:
            known.interrupts.append(now)
        await self.desk.close()
        self.loop.call_at_rest(lambda: None)
        self.judge()

    # ---- What is done

    def open_answer(self) -> None:
        client = self.chance.choice("ab")
        script = _draw_script(self.chance)
        if (refusal := self._refusal(client)) is not None:
            with pytest.raises(refusal):
                self.desk.admit(client)
            self.seen["refused"] += 1
            return
        self.desk.admit(client)
        settled: list[int] = []
        reservation = self.chance.choice([None, None, Spending(3, 0, settled), Spending(2, 3, settled)])
        budget = math.inf if reservation is None else reservation.amount + reservation.more
        now = self.loop.time()
        name = f"{len(self.known)}"
        request = ChatRequest(messages=(("user", name),), max_tokens=8, temperature=0.0)
        stream = self.desk.open(client, request, reservation)
        known = Known(stream, client, script, self.limits, budget, now, settled)
        self.source.known[name] = known
        self.known.append(known)

        def listen(_batch: bytes, _size: int) -> None:
            if stream.log.ended:
                known.ended(self.loop.time())

        stream.log.subscribe(listen)
        for number in range(self.chance.choice([0, 1, 1, 2, 3])):
            # The first is often the one that asked by GET: there is no moment between its opening and its viewing.
            at_once = number == 0 and self.chance.random() < 0.6
            self._send(self.visit(known, random.Random(self.chance.random()), at_once=at_once))

    def _refusal(self, client: str) -> type[Exception] | None:
        places = Counter(known.owner for known in self.known if known.holds_place)
        if self.draining:
            return ShuttingDown
        if places[client] >= self.limits.max_streams_per_client:
            return TooManyStreams
        return Overloaded if places.total() >= self.limits.max_streams else None

    def stop_one(self) -> None:
        if not self.known:
            return
        known, who = self.chance.choice(self.known), self.chance.choice("abb")
        now = self.loop.time()
        running = known.ended_at is None
        findable = known.findable(now)
        try:
            self.desk.stop(known.stream.id, who)
        except StreamNotFound:
            assert who != known.owner or not findable
        else:
            assert who == known.owner
            assert findable is not False
            if running:
                known.stops.append(now)
                assert known.ended_at == now, "who has stopped it need not wait"

    def drain(self) -> None:
        self.draining = True
        self.desk.drain()

    def interrupt(self) -> None:
        now = self.loop.time()
        for known in self.known:
            if known.ended_at is None:
                known.interrupts.append(now)
        self.desk.interrupt()
        if self.chance.random() < 0.5:
            self.desk.abort_viewers()

    def _send(self, client: Any) -> None:
        task = self.loop.create_task(client)
        self.clients.add(task)
        task.add_done_callback(self._returned)

    def _returned(self, task: asyncio.Task[None]) -> None:
        self.clients.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    # ---- A client

    async def visit(self, known: Known, chance: random.Random, *, at_once: bool) -> None:
        """Come, drop, and come back as often as it likes; then see whether it has what it came for."""
        stream_id = known.stream.id
        may_return = chance.random() < 0.75
        reader, first = AnswerReader(), 0
        if not at_once:
            await asyncio.sleep(_pause(chance, 10))
            next_number = known.stream.log.next_number
            if chance.random() < 0.3:  # a tab that has seen some of it somewhere else
                first = chance.randrange(next_number) + 1
                reader = AnswerReader(f"{stream_id}.{first - 1}")
        for _ in range(chance.choice([1, 2, 4])):
            viewing = self.loop.create_task(self._view(known, reader, chance, may_return=may_return))
            patience = chance.choice([0.0, _pause(chance, 10), math.inf, math.inf])
            try:
                await asyncio.wait([viewing], timeout=None if patience == math.inf else patience)
            finally:
                viewing.cancel()  # what aiohttp does to a handler whose client has gone
                await asyncio.wait([viewing])
                reader.disconnected()
            if not viewing.cancelled() and not viewing.result():
                break
            await asyncio.sleep(_pause(chance, 8))
        log = known.stream.log
        begin = log.end_of(first - 1) if first else 0
        assert bytes(reader.taken) == log.read(begin, len(reader.taken)), "not a part of the one answer"
        self.seen["whole"] += reader.ended

    async def _view(self, known: Known, reader: AnswerReader, chance: random.Random, *, may_return: bool) -> bool:
        """What server/api/ does with a request; returns whether there was something to view."""
        loop, log, findable = self.loop, known.stream.log, known.findable(self.loop.time())
        if self.desk.find(known.stream.id) is None:
            assert not findable, "it was forgotten before its time"
            self.seen["expired"] += 1
            return False
        assert findable is not False, "it was kept for too long"
        if log.ended and reader.seen == log.next_number - 1:
            return False  # 204
        after = None if reader.last_event_id is None else reader.seen
        cut_after = chance.choice([math.inf, math.inf, chance.randrange(600)])
        stall = (chance.randrange(1, 4), chance.choice([1.0, 5.0, 100.0])) if chance.random() < 0.15 else (0, 0.0)
        wire = Wire(loop, cut_after, stall, direct=chance.random() < 0.7)
        attached = Attached(known, wire, 0 if after is None else log.end_of(after))
        self.seen["viewed"] += 1
        with self.desk.viewing(known.stream, wire, after=after, may_return=may_return) as viewer:
            known.came(loop.time())
            self.attached.add(attached)
            try:
                await viewer.follow()
                assert wire.ended
                assert log.ended
            except ConnectionError:
                wire.abort()
            finally:
                reader.feed(bytes(wire.got))
                self.attached.remove(attached)
                if viewer.stalled:
                    self.seen["stalled"] += 1
                    assert stall[1] >= self.limits.write_timeout, "it took something all the time"
                known.left(loop.time(), may_return=may_return and not wire.ended)
        return True

    # ---- What must be so

    def look(self) -> None:
        """A moment is over: all who can know what happened in it know it."""
        desk, now = self.desk, self.loop.time()
        assert desk.streams == sum(known.holds_place for known in self.known)
        assert desk.viewers == len(self.attached) == sum(known.present for known in self.known)
        kept = [known for known in self.known if known.ended_at is not None]
        sure = sum(known.findable(now) is True for known in kept)
        unsure = sum(known.findable(now) is None for known in kept)
        assert sure <= desk.kept <= sure + unsure
        for attached in self.attached:
            self._look_at(attached, now)

    def _look_at(self, attached: Attached, now: float) -> None:
        wire, log = attached.wire, attached.known.stream.log
        if wire.stalled_at is not None:
            assert now < wire.stalled_at + self.limits.write_timeout * 1.25 + INSTANT, "it holds us up for ever"
            return
        assert attached.offset + wire.answer_bytes == log.end_of(log.next_number - 1), "it waits for what is there"
        assert not log.ended, "it waits for an end that is there"
        assert now < wire.heard_at + self.limits.heartbeat + INSTANT, "it heard nothing for longer than a heartbeat"
        assert wire.told_retry == self.draining, "it is to be told once when to come back, in a drain"

    def judge(self) -> None:
        assert (self.desk.streams, self.desk.viewers, self.desk.kept) == (0, 0, 0)
        for known in self.known:
            known.lines = self._log.ends.pop(known.stream.id, [])
            self.seen[Model(known).judge().value] += 1
        assert not self._log.ends, "a line about no answer of this run"


class StreamLines(logging.Handler):
    """Takes the lines about answers; ``ends`` holds those of their ends, by id."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, list[dict[str, Any]]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "stream_end":
            fields: dict[str, Any] = getattr(record, "sluice_fields")  # noqa: B009 - set by log_event, unknown to mypy
            self.ends.setdefault(fields["id"], []).append(fields)


@pytest.fixture
def stream_lines() -> Iterator[StreamLines]:
    logger, lines = logging.getLogger("sluice.stream"), StreamLines()
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False  # nobody else need format all that
    logger.addHandler(lines)
    yield lines
    logger.removeHandler(lines)
    logger.setLevel(before[0])
    logger.propagate = before[1]


def _seeds(block: int) -> range:
    if (only := os.environ.get("SEED")) is not None:
        return range(int(only), int(only) + 1)
    return range(block * RUNS // BLOCKS, (block + 1) * RUNS // BLOCKS)


@pytest.mark.parametrize("block", [0] if "SEED" in os.environ else range(BLOCKS))
def test_whatever_is_done_to_it_an_answer_ends_once_and_every_viewer_reads_it(
    block: int, stream_lines: StreamLines
) -> None:
    """Row U47: 10,000 runs in all. One outcome, one line and one place each; no viewer misses or repeats a byte."""
    seen: Counter[str] = Counter()
    for seed in _seeds(block):
        worlds: list[World] = []

        async def live(loop: VirtualTimeLoop, seed: int = seed, worlds: list[World] = worlds) -> None:
            worlds.append(World(seed, loop, stream_lines))
            await worlds[0].live()

        try:
            run(live)
        except BaseException as exc:
            exc.add_note(f"To repeat this run: SEED={seed} pytest tests/relay/test_survival.py")
            raise
        seen += worlds[0].seen
    print(json.dumps(dict(seen.most_common())))
    if "SEED" not in os.environ:
        wanted = {outcome.value for outcome in Outcome} | {"refused", "expired", "stalled", "viewed", "whole"}
        assert wanted <= set(seen), "the runs have not met everything"
