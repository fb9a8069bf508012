"""The benchmark measures what it says: its endpoint keeps pace, its viewers see every fault, its scenarios run."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ops.bench.__main__ import Results, choose, measure, show
from ops.bench.figures import Figures, Metric, percentile, ratio, summary, table
from ops.bench.goals import GOALS, Goal, verdict, verdicts
from ops.bench.peers.fastapi_stack import build_venv
from ops.bench.plots import draw
from ops.bench.procs import Child, Cores, cpu_seconds, idle_seconds, process_tree
from ops.bench.relays import DIRECT, FASTAPI, NGINX, PLAIN, Relay
from ops.bench.rig import open_rig
from ops.bench.scenarios import SCENARIOS, Scale, Scenario
from ops.bench.scenarios.leave import Left, reckon
from ops.bench.simulator import (
    TICK_NS,
    Behaviour,
    Departures,
    Pace,
    Wheel,
    ask_departures,
    read_behaviour,
    token_chunks,
)
from ops.bench.ticker import Ticker
from ops.bench.tokens import MAX_ID, TokenCheck, late_us, stamp_us, stamps_in
from ops.bench.viewers import ChunkedBody, Record, Viewer, ViewerFailed, ask_endpoint, open_clients, open_viewers

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


def test_a_ratio_is_taken_within_each_round() -> None:
    """A slow minute of the machine doubles both figures of its round and no ratio."""
    ours, theirs = [{"us": 10.0}, {"us": 20.0}, {"us": 11.0}], [{"us": 20.0}, {"us": 40.0}, {"us": 20.0}]
    assert ratio(ours, theirs, "us") == 0.5
    assert math.isnan(ratio(ours, [{"us": math.nan}] * 3, "us"))
    assert math.isnan(ratio(ours, [{"us": 0.0}] * 3, "us"))


def test_the_table_sets_the_ratios_below_the_rows_and_leaves_out_what_is_no_number() -> None:
    metrics = [Metric("us", "µs"), Metric("missed", "missed", 0, fault=True)]
    rows = {"a": {"us": 1.5, "missed": 0}, "b": {"us": 3000.0, "missed": 1}, "c": {"us": math.nan, "missed": 0}}
    assert [line.split() for line in table(metrics, rows, {"a ÷ b": {"us": 0.5}}).splitlines()] == [
        ["µs", "missed"],
        ["a", "1.50", "0"],
        ["b", "3,000.00", "1"],
        ["c", "0"],
        ["a", "÷", "b", "0.50", "x"],
    ]


# ---- goals


@pytest.mark.parametrize(
    ("least", "figure", "expected"),
    [
        (False, 1.5, "aim met"),
        (False, 2.0, "must met"),
        (False, 2.5, "MISSED"),
        (True, 5.0, "aim met"),
        (True, 1.9, "must met"),
        (True, 1.0, "MISSED"),
        (False, math.nan, "not measured"),
    ],
)
def test_a_verdict_compares_with_must_and_aim(least: bool, figure: float, expected: str) -> None:
    must, aim = (1.7, 3.0) if least else (2.4, 1.6)
    assert verdict(Goal("goal", lambda measured: figure, must, aim, least=least), {}) == expected


def test_a_goal_without_a_must_can_miss_only_its_aim() -> None:
    assert verdict(Goal("goal", lambda measured: 71, math.nan, 70), {}) == "aim missed"


def test_goals_are_read_from_what_was_measured() -> None:
    """Ratios against the peer by name, faults of all scenarios together, and nothing where nothing was measured."""
    measured = {
        "s1": {"Sluice": [{"us_per_token": 40.0, "wrong": 1.0}], "nginx": [{"us_per_token": 20.0, "wrong": 0.0}]},
        "leave": {"Sluice": [{"missed": 0.0, "wrong": 1.0}]},
    }
    told = {goal: (figure, word) for goal, _, _, figure, word in verdicts(measured)}
    assert len(told) == len(GOALS)
    assert told["s1, CPU per token against nginx"] == ("2.00 x", "must met")
    assert told["s1, CPU per token against the FastAPI stack"] == ("", "not measured")
    assert told["leave, missed"] == ("0", "aim met")
    assert told["tokens lost, doubled, out of order or in the wrong stream"] == ("2", "MISSED")


# ---- what is told


async def _nothing(rig: Any, scale: Scale) -> Figures:
    return {}


def scenario(**changes: Any) -> Scenario:
    return Scenario("title", (Metric("us", "µs"),), _nothing, **changes)


@pytest.mark.parametrize(
    ("paced", "server", "others", "rig", "marks"),
    [
        (True, 80, 2, 60, ""),
        (True, 99, 2, 60, "†"),
        (False, 99, 2, 60, ""),
        (False, 50, 2, 99, "‡"),
        (True, 100, 9, 98, "†‡§"),
        (True, math.nan, math.nan, 60, ""),
    ],
)
def test_a_row_that_cannot_be_trusted_is_marked(
    paced: bool, server: float, others: float, rig: float, marks: str
) -> None:
    figures = {"server_core_percent": server, "others_percent": others, "rig_core_percent": rig}
    assert scenario(paced=paced).doubts(figures) == marks


def test_the_reader_learns_why_a_row_is_missing_and_what_a_mark_means() -> None:
    trust = {"others_percent": 1.0, "rig_core_percent": 99.0, "server_core_percent": 50.0}
    shown = show(scenario(), Results({"Sluice": [{"us": 3.0} | trust]}, {"nginx": "failed, no reason"}))
    assert "Sluice ‡" in shown
    assert "‡ the rig's core is full" in shown
    assert "† " not in shown
    assert shown.endswith("nginx: failed, no reason")


def test_a_relay_that_cannot_hold_the_streams_is_left_out_by_name() -> None:
    results = measure(scenario(streams=1000, without=("direct",)), [FASTAPI, DIRECT], Scale(), 1, Cores(0, 0))
    assert results.missing == {"FastAPI stack": "skipped, it holds no more than 900 streams"}
    assert results.rounds == {}


def test_a_peer_that_cannot_be_had_is_skipped_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    def relay(name: str, reason: str) -> Relay:
        return Relay(
            key=name, name=name, open=DIRECT.open, ask=ask_endpoint, ask_once=ask_endpoint, missing=lambda: reason
        )

    assert [relay.name for relay in choose([relay("here", ""), relay("away", "not installed")])] == ["here"]
    assert capsys.readouterr().out == "away: skipped, not installed\n"


def test_a_venv_that_cannot_be_built_is_a_reason_and_no_failure(tmp_path: Path) -> None:
    assert "could not be built" in build_venv(python=str(tmp_path / "no-python"), venv=tmp_path / "venv")
    assert "could not be built" in build_venv(python="/bin/false", venv=tmp_path / "venv")
    assert not (tmp_path / "venv" / "built-of.txt").exists()


# ---- tokens


@pytest.mark.parametrize(
    ("tokens", "lost", "doubled", "misplaced"),
    [
        ([(7, 0), (7, 1), (7, 2)], 0, 0, 0),
        ([(7, 0), (7, 2)], 1, 0, 0),
        ([(7, 0), (7, 1)], 1, 0, 0),
        ([(7, 1), (7, 2)], 1, 0, 0),
        ([(7, 0), (7, 1), (7, 1), (7, 2)], 0, 1, 0),
        ([(7, 0), (7, 2), (7, 1)], 1, 1, 0),
        ([(7, 0), (8, 1), (7, 1), (7, 2)], 0, 0, 1),
        ([(7, 0), (8, 1), (7, 2)], 1, 0, 1),
        ([(7, 0), (7, 0), (7, 2)], 1, 1, 0),
        ([], 3, 0, 0),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_a_token_lost_doubled_or_in_the_wrong_stream_is_seen(
    tokens: list[tuple[int, int]], lost: int, doubled: int, misplaced: int, together: bool
) -> None:
    """In one read as in one for each: as many tokens as it should be, the first and the last right, are not enough."""
    check = TokenCheck(stream=7)
    texts = [b'{"token":"[12345678.%06d.%07d]"}' % token for token in tokens]
    assert sum(check.read(text) for text in ([b"".join(texts)] if together else texts)) == len(tokens)
    check.end(total=3)
    assert (check.lost, check.doubled, check.misplaced) == (lost, doubled, misplaced)
    assert check.wrong == lost + doubled + misplaced


def test_a_check_tells_where_the_last_whole_token_ends() -> None:
    check = TokenCheck(7)
    text = b"..[00000001.000007.0000000]..[00000001.000007.00"
    assert check.read(text) == 1
    assert text[check.read_to :] == b"..[00000001.000007.00"
    assert check.read(b"[DONE]") == 0
    assert check.read_to == 0


def test_a_stamp_tells_how_late_a_token_is_even_where_the_clock_turns_over() -> None:
    """Eight digits of microseconds turn over every 100 s."""
    written_ns = 1_299_999_900_000
    assert stamps_in(b"[%08d.000007.0000000][" % stamp_us(written_ns)) == [99_999_900]
    assert late_us(99_999_900, written_ns + 150_000) == 150


# ---- simulator


def behaviour(prompt: str, system: str = "tokens=9") -> Behaviour:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    return read_behaviour(json.dumps({"model": "bench", "messages": messages}).encode())


def test_the_last_user_message_says_how_to_answer() -> None:
    asked = behaviour("tokens=500 rate=2.5 id=17 hold=1 phase=0.25 start=12.5")
    assert asked == Behaviour(tokens=500, rate=2.5, id=17, phase=0.25, start=12.5, hold=True)


def test_an_id_that_no_token_can_tell_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than"):
        behaviour(f"id={MAX_ID + 1}")


@pytest.mark.parametrize("numbers", [range(1), range(3, 9), range(16_380, 16_390), range(20_000, 20_002), range(5, 5)])
def test_tokens_are_chunks_of_their_own(numbers: range) -> None:
    """However far an answer has come, and however many are written at once."""
    written = token_chunks(7, numbers, now_ns=5_000)
    payload = ChunkedBody().feed(written)
    check = TokenCheck(7)
    check.next = numbers.start
    assert check.read(payload) == len(numbers) == written.count(b"\r\ndata: ")
    assert (check.next, check.wrong) == (numbers.stop, 0)
    assert stamps_in(payload) == [5] * len(numbers)
    events = [json.loads(line[6:]) for line in payload.splitlines() if line]
    assert [event["choices"][0]["delta"]["content"] for event in events] == [
        f"[00000005.000007.{number:07d}]" for number in numbers
    ]


def test_tokens_are_due_at_their_rate() -> None:
    """The first at once, the others 20 ms apart; a late look finds all that are due, and none comes twice."""
    pace = Pace(first_ns=SECOND_NS, rate=50, total=5)
    looks_ms = [999, 1000, 1019, 1020, 1061, 9000, 9001]
    assert [[*pace.take(ms * 1_000_000)] for ms in looks_ms] == [[], [0], [], [1], [2, 3], [4], []]


def test_no_more_are_taken_at_once_than_asked_for() -> None:
    pace = Pace(first_ns=0, rate=1000, total=5)
    assert [[*pace.take(SECOND_NS, most=2)] for _ in range(4)] == [[0, 1], [2, 3], [4], []]


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


def test_a_stream_that_waits_for_the_others_goes_on_at_the_start() -> None:
    pace = Pace(first_ns=0, rate=50, total=3)
    pace.wait(SECOND_NS)
    looks_ms = [10, 999, 1000, 1019, 1020]
    assert [[*pace.take(ms * 1_000_000)] for ms in looks_ms] == [[], [], [1], [], [2]]


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


@linux_only
async def test_a_ticker_ticks_while_it_runs() -> None:
    ticked = asyncio.Event()
    ticker = Ticker(1_000_000, ticked.set)
    for _ in range(2):
        ticker.start()
        for _ in range(3):
            ticked.clear()
            await ticked.wait()
        ticker.stop()
        ticked.clear()
        await asyncio.sleep(0.02)
        assert not ticked.is_set()
    ticker.close()


# ---- viewers

CHUNKED = b"5\r\nhello\r\n6;ext=1\r\n wor\r\n\r\n0\r\n\r\n"


@pytest.mark.parametrize("cut", range(len(CHUNKED) + 1))
def test_a_chunked_body_does_not_depend_on_where_the_network_cuts(cut: int) -> None:
    body = ChunkedBody()
    assert body.feed(CHUNKED[:cut]) + body.feed(CHUNKED[cut:]) == b"hello wor\r\n"
    assert body.ended


def test_a_chunked_body_comes_whole_in_crumbs() -> None:
    body = ChunkedBody()
    assert b"".join(body.feed(CHUNKED[at : at + 1]) for at in range(len(CHUNKED))) == b"hello wor\r\n"
    assert body.ended


STREAM = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'2d\r\ndata: {"token":"[00000011.000007.0000000]"}\n\n\r\n'
    b'2d\r\ndata: {"token":"[00000022.000007.0000001]"}\n\n\r\n'
)


def connected(viewer: Viewer) -> Viewer:
    class Nowhere(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            pass

    viewer.connection_made(Nowhere())
    return viewer


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
async def test_a_token_is_read_once_wherever_the_network_cuts(cut: int) -> None:
    record = Record(recording=True)
    viewer = connected(Viewer(b"", 7, record))
    viewer.data_received(STREAM[:cut])
    viewer.data_received(STREAM[cut:])
    await viewer.tokens(2)
    assert (record.tokens, viewer.check.next, viewer.check.wrong) == (2, 2, 0)
    assert len(record.late_us) == 2
    assert len(record.gap_us) == record.reads - 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n18\r\ndata: {"error":"worse"}\n\n\r\n',
    ],
)
async def test_a_refusal_or_an_error_ends_the_measurement(answer: bytes) -> None:
    viewer = connected(Viewer(b"", 7, Record()))
    viewer.data_received(answer)
    with pytest.raises(ViewerFailed):
        await viewer.tokens(1)


# ---- who has left


def test_leaves_are_reckoned_by_what_the_endpoint_saw() -> None:
    """A request that came after its client had left tells no time, but has to be closed all the same."""
    lefts = [
        Left(1, flowing=True, left_ns=10_000_000),
        Left(2, flowing=True, left_ns=10_000_000),
        Left(3, flowing=False, left_ns=10_000_000),
        Left(4, flowing=False, left_ns=10_000_000),  # came too late, and was closed
        Left(5, flowing=False, left_ns=10_000_000),  # never came
        Left(6, flowing=False, left_ns=10_000_000),  # never closed
    ]
    arrived = {1: 1, 2: 1, 3: 1, 4: 30_000_000, 6: 1}
    left = {1: 11_000_000, 2: 13_000_000, 3: 12_000_000, 4: 90_000_000}
    figures = reckon(lefts, Departures(arrived, left))
    assert figures["missed"] == 1
    assert (figures["flowing_p50_ms"], figures["flowing_max_ms"]) == (1, 3)
    assert (figures["silent_p50_ms"], figures["silent_max_ms"]) == (2, 2)


# ---- plots


def test_the_same_figures_give_the_same_image(tmp_path: Path) -> None:
    """On white, for a dark page too; an image is drawn when all of its curves are there."""
    points = [{"streams": 0.0, "pss_mb": 30.0}, {"streams": 10.0, "pss_mb": 31.0}]
    curves = {"open": {"Sluice": points, "nginx": points}, "finished": {"Sluice": [{"answers": 1.0, "pss_mb": 2.0}]}}
    [image] = draw(curves, tmp_path)
    assert image.name == "curves-memory.svg"
    once = image.read_bytes()
    assert b"#ffffff" in once
    assert b"<dc:date>" not in once
    assert b"idle streams</text>" in once
    draw(curves, tmp_path)
    assert image.read_bytes() == once


# ---- processes


@linux_only
def test_a_server_is_its_whole_process_tree() -> None:
    """The time of a worker counts, while it runs, with that of its master."""
    spin = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    master = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    process = subprocess.Popen([sys.executable, "-c", master])
    try:
        deadline = time.monotonic() + 20
        while cpu_seconds(process.pid) < 0.3 and time.monotonic() < deadline:
            time.sleep(0.05)
        tree = process_tree(process.pid)
        assert len(tree) == 2
        assert cpu_seconds(process.pid) > cpu_seconds(tree[1]) > 0
    finally:
        for pid in process_tree(process.pid):
            os.kill(pid, 9)
        process.wait()


@linux_only
def test_a_core_is_never_idle_for_longer_than_time_passes() -> None:
    core, began = Cores.choose().server, time.monotonic()
    idle = idle_seconds(core)
    time.sleep(0.2)
    assert 0 <= idle_seconds(core) - idle <= time.monotonic() - began + 0.1


@linux_only
async def test_a_child_that_does_not_start_says_what_it_said() -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        async with Child([sys.executable, "-c", "raise SystemExit('no such luck')"], Cores.choose().rig):
            pass


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
async def test_the_endpoint_writes_no_more_than_is_read_and_clients_ask_again() -> None:
    """Without a rate an answer is as fast as its reader; the next one comes on the same connection."""
    record = Record(recording=True, timed=False)
    async with Child([sys.executable, "-m", "ops.bench.simulator"], Cores.choose().rig) as endpoint:
        [slow] = await open_viewers(endpoint.port, ask_endpoint, [(1, "id=1 tokens=200000")], Record(timed=False))
        slow._transport.pause_reading()  # the endpoint has to wait, and must not forget to go on
        await asyncio.sleep(0.3)
        arrived = slow.check.next
        slow._transport.resume_reading()
        await slow.tokens(200_000)
        await slow.end()
        clients = await open_clients(endpoint.port, ask_endpoint, 3, 20, record)
        while record.answers < 30:  # noqa: ASYNC110  no event tells of it
            await asyncio.sleep(0.01)
        for client in clients:
            client.leave()
    assert arrived < 200_000
    assert slow.check.wrong == record.wrong == 0
    assert not any(client.failure for client in clients)
    assert record.tokens >= 30 * 20


# ---- scenarios

TINY = Scale(
    ramp_s=0.1,
    window_s=0.5,
    s1_streams=10,
    s2_streams=20,
    clients=4,
    leavers=6,
    ttft_requests=5,
    memory_streams=20,
    kept_answers=20,
    kept_tokens=5,
)


@linux_only
@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_scenario_measures_the_plain_relay(name: str) -> None:
    mine = os.sched_getaffinity(0)
    async with open_rig(PLAIN, Cores.choose()) as rig:
        figures = await SCENARIOS[name].run(rig, TINY)
    assert os.sched_getaffinity(0) == mine
    assert figures.keys() >= {metric.key for metric in SCENARIOS[name].metrics}
    assert figures.get("missed", 0) == figures["wrong"] == 0
    assert figures.get("delivered_percent", 100) > 50
    for key in ("us_per_token", "tokens_per_s", "through_p50_ms", "flowing_p50_ms", "base_pss_mb"):
        assert figures.get(key, 1) > 0


@linux_only
@pytest.mark.parametrize("name", ["s1", "s3", "req"])
async def test_a_scenario_measures_the_rig_itself(name: str) -> None:
    """Nobody between viewers and endpoint: what the server took is no number, not zero."""
    async with open_rig(DIRECT, Cores.choose()) as rig:
        figures = await SCENARIOS[name].run(rig, TINY)
    assert math.isnan(figures["cpu_s"])
    assert figures["wrong"] == figures.get("missed", 0) == 0
    assert figures["rig_core_percent"] > 0


@linux_only
@pytest.mark.parametrize("name", ["s1", "req", "leave", "memory"])
async def test_a_scenario_measures_nginx(name: str, need: Callable[[str], str]) -> None:
    """Its tokens reach the viewers unchanged, and the time of its worker is counted."""
    need("nginx")
    async with open_rig(NGINX, Cores.choose()) as rig:
        figures = await SCENARIOS[name].run(rig, TINY)
        assert rig.server is not None
        tree = process_tree(rig.server.pid)
    assert len(tree) == 2
    assert figures["wrong"] == figures.get("missed", 0) == 0
    assert figures["cpu_s"] > 0
    for pid in tree:  # no worker outlives its master
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
