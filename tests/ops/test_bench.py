"""The benchmark measures what it says: its endpoint keeps pace, its viewers see every fault, its scenarios run."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys

import pytest

from ops.bench.figures import Metric, percentile, summary, table
from ops.bench.procs import Child, Cores
from ops.bench.relays import PLAIN
from ops.bench.rig import open_rig
from ops.bench.scenarios import SCENARIOS, Scale
from ops.bench.simulator import TICK_NS, Behaviour, Pace, Wheel, ask_departures, read_behaviour
from ops.bench.tokens import TokenCheck
from ops.bench.viewers import ChunkedBody, Record, Viewer, ViewerFailed, ask_endpoint, open_viewers

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")

SECOND_NS = 1_000_000_000

# ---- figures


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1, 100), (0, 1), (0.001, 1)])
def test_a_percentile_is_a_value_that_was_measured(share: float, expected: int) -> None:
    assert percentile(range(100, 0, -1), share) == expected


def test_a_percentile_of_nothing_is_no_number() -> None:
    assert math.isnan(percentile([], 0.5))


def test_rounds_are_told_by_their_median_and_faults_by_the_worst_round() -> None:
    rounds = [{"ms": 9.0, "lost": 0.0}, {"ms": 1.0, "lost": 1.0}, {"ms": 2.0, "lost": 0.0}]
    assert summary(rounds, [Metric("ms", "ms"), Metric("lost", "lost", fault=True)]) == {"ms": 2.0, "lost": 1.0}


def test_the_table_sets_the_ratio_below_the_rows() -> None:
    metrics = [Metric("us", "µs"), Metric("missed", "missed", 0, fault=True)]
    shown = table(metrics, {"a": {"us": 1.5, "missed": 0}, "b": {"us": 3.0, "missed": 1}}, {"a ÷ b": {"us": 0.5}})
    assert [line.split() for line in shown.splitlines()] == [
        ["µs", "missed"],
        ["a", "1.50", "0"],
        ["b", "3.00", "1"],
        ["a", "÷", "b", "0.50", "x"],
    ]


# ---- simulator


def test_the_last_user_message_says_how_to_answer() -> None:
    messages = [
        {"role": "system", "content": "tokens=9"},
        {"role": "user", "content": "tokens=500 rate=2.5 id=17 hold=1 phase=0.25"},
    ]
    asked = read_behaviour(json.dumps({"messages": messages}).encode())
    assert asked == Behaviour(tokens=500, rate=2.5, id=17, phase=0.25, hold=True)


def test_tokens_are_due_at_their_rate() -> None:
    """The first at once, the others 20 ms apart; a late look finds all that are due, and none comes twice."""
    pace = Pace(first_ns=SECOND_NS, rate=50, total=5)
    looks_ms = [999, 1000, 1019, 1020, 1061, 9000, 9001]
    assert [[*pace.take(ms * 1_000_000)] for ms in looks_ms] == [[], [0], [], [1], [2, 3], [4], []]


@pytest.mark.parametrize("rate", [3, 7, 50, 333.3, 2000])
def test_the_next_token_is_due_when_the_pace_says_so(rate: float) -> None:
    """A nanosecond early and the timer would wait a whole tick more."""
    pace = Pace(first_ns=123, rate=rate, total=100)
    pace.take(123)
    for number in range(1, 100):
        assert [*pace.take(pace.next_ns - 1)] == []
        assert [*pace.take(pace.next_ns)] == [number]


@pytest.mark.parametrize("opened_ms", [1000, 1004, 1005, 1019])
def test_streams_keep_their_places_whenever_they_were_opened(opened_ms: int) -> None:
    """At 50 a second and phase 0.25, tokens leave 5 ms after each multiple of 20 ms."""
    pace = Pace(first_ns=opened_ms * 1_000_000, rate=50, total=2)
    pace.align(0.25)
    assert pace.first_ns // 1_000_000 == (1005 if opened_ms <= 1005 else 1025)


def test_rate_zero_means_all_at_once() -> None:
    assert [*Pace(first_ns=0, rate=0, total=3).take(0)] == [0, 1, 2]


def test_the_wheel_acts_at_the_first_turn_that_is_not_early() -> None:
    wheel, acted = Wheel(0), list[tuple[str, int]]()
    wheel.add(3 * TICK_NS - 1, lambda now_ns: acted.append(("soon", now_ns)))
    wheel.add(50 * TICK_NS, lambda now_ns: acted.append(("later", now_ns)))
    wheel.turn(2 * TICK_NS)
    assert acted == []
    wheel.turn(3 * TICK_NS)
    assert acted == [("soon", 3 * TICK_NS)]
    wheel.turn(90 * TICK_NS)
    assert acted[1:] == [("later", 90 * TICK_NS)]
    assert not wheel


# ---- viewers

CHUNKED = b"5\r\nhello\r\n6;ext=1\r\n wor\r\n\r\n0\r\n\r\n"


@pytest.mark.parametrize("cut", range(len(CHUNKED) + 1))
def test_a_chunked_body_does_not_depend_on_where_the_network_cuts(cut: int) -> None:
    body = ChunkedBody()
    assert body.feed(CHUNKED[:cut]) + body.feed(CHUNKED[cut:]) == b"hello wor\r\n"
    assert body.ended


@pytest.mark.parametrize(
    ("tokens", "lost", "doubled", "misplaced"),
    [
        ([(7, 0), (7, 1), (7, 2)], 0, 0, 0),
        ([(7, 0), (7, 2)], 1, 0, 0),
        ([(7, 0), (7, 1)], 1, 0, 0),
        ([(7, 0), (7, 1), (7, 1), (7, 2)], 0, 1, 0),
        ([(7, 0), (7, 2), (7, 1)], 1, 1, 0),
        ([(7, 0), (8, 1), (7, 1), (7, 2)], 0, 0, 1),
    ],
)
def test_a_token_lost_doubled_or_in_the_wrong_stream_is_seen(
    tokens: list[tuple[int, int]], lost: int, doubled: int, misplaced: int
) -> None:
    check = TokenCheck(stream=7)
    check.read(b"".join(b'{"token":"[12345678.%06d.%07d]"}' % token for token in tokens))
    check.end(total=3)
    assert (check.lost, check.doubled, check.misplaced) == (lost, doubled, misplaced)
    assert check.wrong == lost + doubled + misplaced


STREAM = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'2c\r\ndata: {"token":"[00000011.000007.0000000]"}\n\n\r\n'
    b'2c\r\ndata: {"token":"[00000022.000007.0000001]"}\n\n\r\n'
)


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
async def test_a_token_is_read_once_wherever_the_network_cuts(cut: int) -> None:
    record = Record(recording=True)
    viewer = Viewer(b"", 7, record)
    viewer.data_received(STREAM[:cut])
    viewer.data_received(STREAM[cut:])
    await viewer.tokens(2)
    assert (record.tokens, viewer.check.next, viewer.check.wrong) == (2, 2, 0)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n18\r\ndata: {"error":"worse"}\n\n\r\n',
    ],
)
async def test_a_refusal_or_an_error_ends_the_measurement(answer: bytes) -> None:
    viewer = Viewer(b"", 7, Record())
    viewer.data_received(answer)
    with pytest.raises(ViewerFailed):
        await viewer.tokens(1)


# ---- processes


@linux_only
async def test_the_endpoint_keeps_pace_and_knows_who_left() -> None:
    """40 streams at 100 tokens a second for half a second: as many tokens as that makes, each in its place."""
    record = Record(recording=True)
    async with Child([sys.executable, "-m", "ops.bench.simulator"], Cores.choose().rig) as endpoint:
        prompts = [(stream, f"id={stream} tokens=51 rate=100") for stream in range(1, 41)]
        began = asyncio.get_running_loop().time()
        viewers = await open_viewers(endpoint.port, ask_endpoint, prompts, record)
        for viewer in viewers:
            await viewer.tokens(51)
        lasted = asyncio.get_running_loop().time() - began
        [held] = await open_viewers(endpoint.port, ask_endpoint, [(99, "id=99 tokens=1 hold=1")], record)
        held.leave(reset=True)
        await asyncio.sleep(0.2)
        book = await asyncio.to_thread(ask_departures, endpoint.port)
        for viewer in viewers:
            viewer.leave()
    assert record.tokens == 40 * 51 + 1
    assert all(viewer.check.wrong == 0 and viewer.check.next == 51 for viewer in viewers)
    assert lasted >= 0.5
    assert sorted(book.arrived) == [*range(1, 41), 99]
    assert [*book.left] == [99], "who stayed to the end has not left early"
    assert book.left[99] >= held.left_ns


@linux_only
@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_scenario_measures_the_plain_relay(name: str) -> None:
    tiny = Scale(ramp_s=0.1, window_s=0.5, s1_streams=10, s2_streams=20, clients=4)
    mine = os.sched_getaffinity(0)
    async with open_rig(PLAIN, Cores.choose()) as rig:
        figures = await SCENARIOS[name].run(rig, tiny)
    assert os.sched_getaffinity(0) == mine
    assert figures.keys() >= {metric.key for metric in SCENARIOS[name].metrics}
    assert figures.get("missed", 0) == figures.get("wrong", 0) == 0
    assert figures.get("delivered_percent", 100) > 50
    assert figures.get("us_per_token", 1) > 0
    assert figures.get("p50_ms", 1) > 0
    assert figures.get("through_p50_ms", 1) > 0
    assert figures.get("base_rss_mb", 1) > 0
