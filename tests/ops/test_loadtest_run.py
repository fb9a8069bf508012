"""The load tester against endpoints that misbehave on command and against the real server, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ops.loadtest.capacity import Capacity, find_capacity
from ops.loadtest.client import Client
from ops.loadtest.objectives import Objectives, read_objectives
from ops.loadtest.prompts import Prompt
from ops.loadtest.record import Outcome, Record
from ops.loadtest.run import Load, Run, RunResult
from ops.loadtest.selftest import SCENARIOS, Scenario, findings_as_json, self_test
from ops.loadtest.summary import Summary, summarise
from ops.loadtest.target import Kind, Target, read_target
from tests.conftest import Serve
from tests.sluice_process import free_port
from tests.upstream_sim import Call, ScriptedUpstream, answer, chunk

NO_OBJECTIVES = Objectives()


def openai(upstream: ScriptedUpstream, **fields: Any) -> Target:
    return Target(
        kind=Kind.OPENAI,
        tls=False,
        host="127.0.0.1",
        port=upstream.port,
        path="/v1/chat/completions",
        model="sim",
        **fields,
    )


class Bench:
    """What a test puts load on, and every record that came of it."""

    def __init__(self, target: Target, *, timeout_s: float = 20.0, keep_alive: bool = True) -> None:
        self.target = target
        self.client = Client(target, timeout_s=timeout_s, keep_alive=keep_alive)
        self.records: list[Record] = []

    def run(self, load: Load, objectives: Objectives = NO_OBJECTIVES) -> Run:
        prompts = [Prompt("What is Sluice?"), Prompt("And why?")]
        return Run(load, self.client, prompts, objectives, self.records.append)

    async def measure(self, load: Load, objectives: Objectives = NO_OBJECTIVES) -> RunResult:
        async with self.client:
            return await self.run(load, objectives).run()

    async def ask(self, requests: int = 1) -> list[Record]:
        """So many requests, one after the other."""
        await self.measure(Load(streams=1, requests=requests, duration_s=15))
        return self.records


async def asked(upstream: ScriptedUpstream, **fields: Any) -> Record:
    [record] = await Bench(openai(upstream), **fields).ask()
    return record


# ---- one request


async def test_a_completed_request_tells_its_tokens_and_its_usage(upstream: ScriptedUpstream) -> None:
    upstream.script = answer(["a", "b", "c"], gap=0.01, usage=(7, 3))
    record = await asked(upstream)
    assert (record.outcome, record.tokens, record.status) == (Outcome.COMPLETED, 3, 200)
    assert (record.prompt_tokens, record.completion_tokens) == (7, 3)
    assert record.intended_ns <= record.started_ns <= record.connected_ns <= record.first_byte_ns
    assert record.first_byte_ns <= record.token_ns[0] < record.token_ns[1] < record.token_ns[2] <= record.done_ns
    [call] = upstream.calls
    assert call.json["stream"] is True
    assert call.json["stream_options"] == {"include_usage": True}
    assert call.json["messages"] == [{"role": "user", "content": "What is Sluice?"}]


async def cut(call: Call) -> None:
    await call.head()
    await call.token("Hel")
    call.close()


async def reset(call: Call) -> None:
    await call.head()
    await call.token("Hel")
    await asyncio.sleep(0.05)
    call.reset()


async def end_early(call: Call) -> None:
    await call.head()
    await call.token("Hel")
    await call.end()


async def fail_in_band(call: Call) -> None:
    await call.head()
    await call.token("Hel")
    await call.event({"error": {"message": "no", "code": "overloaded"}})
    await call.end()


async def refuse(call: Call) -> None:
    await call.refuse(429, {"message": "slow down", "code": "rate_limit_exceeded"}, Retry_After="30")


async def send_json(call: Call) -> None:
    await call.head(content_type="application/json")
    await call.write(b'{"choices": []}')
    await call.end()


async def send_nothing(call: Call) -> None:
    await call.head()
    await call.done()


async def close_at_once(call: Call) -> None:
    call.close()


async def speak_otherwise(call: Call) -> None:
    await call.send(b"220 smtp.example.com\r\n\r\n")


@pytest.mark.parametrize(
    ("script", "outcome", "code"),
    [
        (cut, Outcome.INCOMPLETE, "closed"),
        (reset, Outcome.INCOMPLETE, "reset"),
        (end_early, Outcome.INCOMPLETE, "ended_early"),
        (fail_in_band, Outcome.ERROR, "overloaded"),
        (refuse, Outcome.REFUSED, "rate_limit_exceeded"),
        (send_json, Outcome.ERROR, "not_event_stream"),
        (send_nothing, Outcome.ERROR, "no_tokens"),
        (close_at_once, Outcome.ERROR, "closed_before_response"),
        (speak_otherwise, Outcome.ERROR, "no_http_before_response"),
    ],
)
async def test_each_end_has_its_outcome_and_its_code(
    upstream: ScriptedUpstream, script: Callable[[Call], Any], outcome: Outcome, code: str
) -> None:
    upstream.script = script
    record = await asked(upstream)
    assert (record.outcome, record.code) == (outcome, code)


async def test_nobody_there_is_an_error_and_no_exception() -> None:
    [record] = await Bench(read_target(f"http://127.0.0.1:{free_port()}", None)).ask()
    assert (record.outcome, record.code, record.status) == (Outcome.ERROR, "connect_refused", 0)


async def test_a_request_that_takes_too_long_is_given_up(upstream: ScriptedUpstream) -> None:
    async def stall(call: Call) -> None:
        await call.head()
        await call.gone()

    upstream.script = stall
    record = await asked(upstream, timeout_s=0.2)
    assert (record.outcome, record.code) == (Outcome.ERROR, "timeout_first_token")


async def test_a_body_that_does_not_end_behind_done_is_an_openai_answer_all_the_same(
    upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI clients leave at [DONE]; only the connection cannot be used again."""
    monkeypatch.setattr("ops.loadtest.client._END_TIMEOUT_S", 0.1)

    async def hold(call: Call) -> None:
        await call.head()
        await call.token("Hel")
        await call.event("[DONE]")
        await call.gone()

    upstream.script = hold
    records = await Bench(openai(upstream)).ask(requests=2)
    assert [record.outcome for record in records] == [Outcome.COMPLETED, Outcome.COMPLETED]
    assert upstream.connections == 2


async def test_a_key_that_the_endpoint_repeats_is_masked(upstream: ScriptedUpstream) -> None:
    async def repeat_key(call: Call) -> None:
        await call.refuse(401, {"message": "no", "code": call.headers["Authorization"].removeprefix("Bearer ")})

    upstream.script = repeat_key
    [record] = await Bench(openai(upstream, api_key="sk-secret")).ask()
    assert (record.outcome, record.status, record.code) == (Outcome.REFUSED, 401, "masked")


# ---- connections


async def test_a_connection_serves_the_next_request_too(upstream: ScriptedUpstream) -> None:
    records = await Bench(openai(upstream)).ask(requests=4)
    assert upstream.connections == 1
    assert [record.reused for record in records] == [False, True, True, True]


async def test_or_each_request_has_its_own(upstream: ScriptedUpstream) -> None:
    records = await Bench(openai(upstream), keep_alive=False).ask(requests=3)
    assert upstream.connections == 3
    assert not any(record.reused for record in records)


async def test_an_idle_connection_that_breaks_costs_no_request(upstream: ScriptedUpstream) -> None:
    """The endpoint's keep-alive may run out in the very moment in which the next request is sent (RFC 9112, 9.3.1)."""

    async def once_a_connection(call: Call) -> None:
        if len(upstream.calls) == 2:
            call.close()
        else:
            await answer()(call)

    upstream.script = once_a_connection
    records = await Bench(openai(upstream)).ask(requests=2)
    assert [record.outcome for record in records] == [Outcome.COMPLETED, Outcome.COMPLETED]
    assert len(upstream.calls) == 3


@pytest.mark.parametrize(("verify", "outcome", "code"), [(False, "completed", ""), (True, "error", "tls_certificate")])
async def test_a_self_signed_certificate_is_accepted_only_on_demand(
    certificate: Path, verify: bool, outcome: str, code: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            body = b'id: s.0\ndata: {"token":"t"}\n\nid: s.1\ndata: [DONE]\n\n'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body)
            await writer.drain()
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        bench = Bench(read_target(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", None))
        bench.client = Client(bench.target, timeout_s=5.0, verify=verify)
        [record] = await bench.ask()
    assert (record.outcome, record.code) == (outcome, code)


# ---- the closed loop


async def test_streams_ask_again_as_soon_as_an_answer_is_over(upstream: ScriptedUpstream) -> None:
    upstream.script = answer(gap=0.01)
    bench = Bench(openai(upstream))
    result = await bench.measure(Load(streams=3, requests=12, duration_s=15))
    assert result.tally.outcomes == {Outcome.COMPLETED: 12}
    assert result.tally.most_open_streams == 3
    assert not result.interrupted
    assert result.tally.window.seconds < 10, "it ended with its requests, not with its time"


async def test_a_storm_of_refusals_does_not_become_a_busy_loop(upstream: ScriptedUpstream) -> None:
    """With Retry-After: 30 each stream asks once; without one it asks ever more rarely."""
    upstream.script = refuse
    await Bench(openai(upstream)).measure(Load(streams=4, duration_s=0.5, grace_s=0))
    assert len(upstream.calls) == 4

    async def refuse_without_advice(call: Call) -> None:
        await call.refuse(503, {"message": "no", "code": "overloaded"})

    upstream.script = refuse_without_advice
    bench = Bench(openai(upstream))
    result = await bench.measure(Load(streams=4, duration_s=1.0, grace_s=0))
    assert 4 < len(bench.records) < 40
    assert result.tally.codes[Outcome.REFUSED, 503, "overloaded"] == len(bench.records)


async def test_what_runs_at_the_end_may_finish_within_the_grace_and_is_cut_off_then(upstream: ScriptedUpstream) -> None:
    async def first_finishes(call: Call) -> None:
        await call.head()
        await call.token("Hel")
        await asyncio.sleep(0.4 if call is upstream.calls[0] else 30)
        await call.done()

    upstream.script = first_finishes
    bench = Bench(openai(upstream))
    result = await bench.measure(Load(streams=2, duration_s=0.2, grace_s=1.5))
    assert result.tally.outcomes == {Outcome.COMPLETED: 1, Outcome.CUT_OFF: 1}
    assert result.tally.tokens == 2, "the tokens of a cut answer count"
    assert (result.tally.e2el.count, result.tally.completed_in_window) == (1, 0)


async def test_an_interruption_ends_the_run_and_keeps_its_figures(upstream: ScriptedUpstream) -> None:
    upstream.script = answer(["t"] * 1000, gap=0.01)
    bench = Bench(openai(upstream))
    run = bench.run(Load(streams=2, duration_s=60))
    async with bench.client:
        task = asyncio.create_task(run.run())
        await upstream.called(2)
        await asyncio.sleep(0.2)
        run.interrupt()
        result = await asyncio.wait_for(task, 5)
    assert result.interrupted
    assert result.tally.outcomes == {Outcome.CUT_OFF: 2}
    assert result.tally.tokens > 0
    assert result.tally.window.seconds < 30


async def test_warm_up_requests_are_not_measured(upstream: ScriptedUpstream) -> None:
    upstream.script = answer(["t"])
    bench = Bench(openai(upstream))
    result = await bench.measure(Load(streams=1, think_s=0.02, ramp_s=0.1, warmup_s=0.3, duration_s=0.3))
    assert 0 < result.tally.ttft.count < len(bench.records)
    begin_ns = result.tally.window.begin_ns
    assert result.tally.ttft.count == sum(record.intended_ns >= begin_ns for record in bench.records)


# ---- the open loop


async def test_the_schedule_does_not_wait_for_the_answers(upstream: ScriptedUpstream) -> None:
    """An endpoint that takes a second for each answer is still asked fifty times a second."""
    upstream.script = answer(["a", "b"], gap=0.5)
    bench = Bench(openai(upstream))
    result = await bench.measure(Load(rate=50, duration_s=1.0, grace_s=5))
    assert len(bench.records) > 25
    assert result.tally.most_open_streams > 15
    assert result.tally.outcomes == {Outcome.COMPLETED: len(bench.records)}
    assert result.tally.start_late.count == len(bench.records)


async def test_waiting_for_a_place_counts_as_latency(upstream: ScriptedUpstream) -> None:
    """Coordinated omission would be to start the clock when the request is sent."""
    upstream.script = answer(["a", "b"], gap=0.1)
    bench = Bench(openai(upstream))
    result = await bench.measure(Load(rate=40, max_streams=2, duration_s=1.0, grace_s=0.5))
    figures = result.tally
    assert figures.most_open_streams == 2
    assert figures.outcomes[Outcome.UNSENT] > 5
    assert figures.ttft.distribution().p50 > 3 * figures.ttft_service.distribution().p50
    assert figures.start_late.count == sum(not record.queued for record in bench.records)


async def test_a_seed_gives_the_same_requests_again(upstream: ScriptedUpstream) -> None:
    due = []
    for _ in range(2):
        bench = Bench(openai(upstream))
        result = await bench.measure(Load(rate=100, duration_s=0.3, seed=5))
        began_ns = result.tally.window.run_ns
        due.append([record.intended_ns - began_ns for record in sorted(bench.records, key=lambda one: one.number)])
    assert due[0] == due[1] != []


# ---- leaving


async def test_an_aborted_request_leaves_behind_its_token_and_is_told_apart(upstream: ScriptedUpstream) -> None:
    upstream.script = answer(["t"] * 200, gap=0.005)
    bench = Bench(openai(upstream))
    result = await bench.measure(Load(streams=2, requests=6, duration_s=15, abort_rate=1.0, leave_within=5))
    assert result.tally.outcomes == {Outcome.CANCELLED: 6}
    assert all(1 <= record.tokens <= 5 for record in bench.records)
    for call in upstream.calls:
        await asyncio.wait_for(call.gone(), 5)


async def test_an_abort_closes_sluices_request_upstream(upstream: ScriptedUpstream, serve: Serve) -> None:
    upstream.script = answer(["t"] * 500, gap=0.01)
    sluice = await serve(SLUICE_RATE_LIMIT="off", SLUICE_RESUME_GRACE="0")
    bench = Bench(read_target(sluice.url, None))
    result = await bench.measure(Load(streams=3, requests=3, duration_s=15, abort_rate=1.0, leave_within=3))
    assert result.tally.outcomes == {Outcome.CANCELLED: 3}
    for call in upstream.calls:
        await asyncio.wait_for(call.gone(), 5)


async def test_a_reconnect_loses_and_repeats_nothing_of_a_sluice_answer(
    upstream: ScriptedUpstream, serve: Serve
) -> None:
    """Every request is cut once and comes back with its Last-Event-ID; nothing is generated twice."""
    upstream.script = answer([str(number) for number in range(60)], gap=0.005)
    sluice = await serve(SLUICE_RATE_LIMIT="off")
    bench = Bench(read_target(sluice.url, None))
    result = await bench.measure(Load(streams=4, requests=8, duration_s=30, reconnect_rate=1.0, leave_within=40))
    assert result.tally.outcomes == {Outcome.COMPLETED: 8}
    assert (result.tally.reconnects, result.tally.lost, result.tally.doubled) == (8, 0, 0)
    assert all(record.tokens == 60 for record in bench.records)
    assert len(upstream.calls) == 8
    assert result.tally.resume.count == 8
    assert result.tally.itl.distribution().max < 900, "the second in which the tester was away is no latency"


async def test_a_server_that_starts_anew_behind_a_reconnect_is_found_out(upstream: ScriptedUpstream) -> None:
    async def forget(call: Call) -> None:
        await call.head()
        for number in range(5):
            await call.write(b'retry: 10\nid: stream.%d\ndata: {"token":"t"}\n\n' % number)
            await asyncio.sleep(0.01)
        await call.write(b"id: stream.5\ndata: [DONE]\n\n")
        await call.end()

    upstream.script = forget
    bench = Bench(read_target(f"http://127.0.0.1:{upstream.port}", None))
    await bench.measure(Load(streams=1, requests=1, duration_s=15, reconnect_rate=1.0, leave_within=1))
    [record] = bench.records
    assert (record.reconnects, record.doubled, record.tokens) == (1, 1, 5)
    assert upstream.calls[1].headers["Last-Event-ID"] == "stream.0"


async def test_an_answer_without_ids_cannot_be_resumed(upstream: ScriptedUpstream) -> None:
    async def speak_without_ids(call: Call) -> None:
        await call.head()
        for _ in range(3):
            await call.event({"token": "t"})
        await call.done()

    upstream.script = speak_without_ids
    bench = Bench(read_target(f"http://127.0.0.1:{upstream.port}", None))
    await bench.measure(Load(streams=1, requests=1, duration_s=15, reconnect_rate=1.0, leave_within=1))
    [record] = bench.records
    assert (record.outcome, record.code) == (Outcome.ERROR, "no_event_id")
    assert len(upstream.calls) == 1


# ---- a Sluice


async def test_a_sluice_is_measured_as_its_page_sees_it(upstream: ScriptedUpstream, serve: Serve) -> None:
    upstream.script = answer(["t"] * 20, gap=0.005)
    sluice = await serve(SLUICE_RATE_LIMIT="off")
    bench = Bench(read_target(sluice.url, None))
    objectives = read_objectives("ttft=10s,itl=10s,itl_p99=10s,good=90%")
    result = await bench.measure(Load(streams=4, requests=12, duration_s=30), objectives)
    summary = summarise(result, objectives)
    assert summary.outcomes[Outcome.COMPLETED] == 12
    assert (summary.lost, summary.doubled, summary.malformed) == (0, 0, 0)
    assert (summary.total_output_tokens, summary.reported_output_tokens) == (240, 24)
    assert summary.latencies["ttft"].count == summary.latencies["tpot"].count == 12
    assert summary.latencies["itl"].count == 12 * 19
    assert summary.kept
    assert summary.request_goodput == summary.request_throughput > 0


async def test_sluices_refusals_and_errors_are_told_by_their_codes(upstream: ScriptedUpstream, serve: Serve) -> None:
    upstream.script = fail_in_band
    sluice = await serve(SLUICE_RATE_LIMIT="2/60")
    bench = Bench(read_target(sluice.url, None))
    result = await bench.measure(Load(streams=3, duration_s=0.6, grace_s=1))
    assert result.tally.codes[Outcome.ERROR, 200, "upstream_error"] == 2
    assert result.tally.codes[Outcome.REFUSED, 429, "rate_limit_exceeded"] >= 1


# ---- the search, the figures, the display


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tester and endpoint share a loop here, on a machine that may be busy: that is not what is tested."""
    monkeypatch.setattr("ops.loadtest.overhead.LAG_BOUND_MS", 1e6)
    monkeypatch.setattr("ops.loadtest.overhead.CPU_BOUND", 1e6)


async def search(
    upstream: ScriptedUpstream, objectives: str, limit: int, say: Callable[[str], None] = lambda line: None, **load: Any
) -> Capacity:
    bench = Bench(openai(upstream))
    read = read_objectives(objectives)

    async def measure(streams: int) -> Summary:
        return summarise(await bench.run(Load(streams=streams, duration_s=0.4, grace_s=1, **load), read).run(), read)

    async with bench.client:
        return await find_capacity(2, limit, measure, say)


@pytest.mark.usefixtures("unhurried")
async def test_the_capacity_is_where_an_objective_breaks(upstream: ScriptedUpstream) -> None:
    """An endpoint with five places: with more streams than that somebody is refused."""

    async def serve_five(call: Call) -> None:
        if len(upstream.open_calls) > 5:
            await call.refuse(503, {"message": "full", "code": "overloaded"})
        else:
            await answer(["a", "b", "c"], gap=0.02)(call)

    said: list[str] = []
    upstream.script = serve_five
    capacity = await search(upstream, "itl_p99=10s,error_rate=1%", 64, said.append)
    assert capacity.streams == 5
    assert str(capacity) == "5 streams"
    assert [step.streams for step in capacity.steps] == [2, 4, 8, 8, 6, 6, 5], "what breaks is tried twice"
    assert said[-1].startswith("5 streams held: itl_p99=10s")


async def test_the_search_stops_at_its_limit_and_says_so(upstream: ScriptedUpstream) -> None:
    upstream.script = answer(["a", "b"], gap=0.02)
    capacity = await search(upstream, "itl_p99=10s", 3)
    assert str(capacity) == "at least 3 streams: all objectives held up to --max-streams"


async def test_a_search_that_the_tester_itself_ended_says_so(
    upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What broke may have been the tester's doing: the endpoint's capacity is not known then."""
    monkeypatch.setattr("ops.loadtest.overhead.LAG_BOUND_MS", -1.0)
    upstream.script = answer(["a", "b"], gap=0.02)
    capacity = await search(upstream, "itl_p99=1us", 64)
    assert capacity.streams == 0
    assert "beyond, the tester itself was the bottleneck (its event loop was" in str(capacity)


async def test_steps_shorter_than_an_answer_cannot_tell_its_time_to_first_token(upstream: ScriptedUpstream) -> None:
    upstream.script = answer(["t"] * 1000, gap=0.01)
    capacity = await search(upstream, "ttft_p99=1s,error_rate=1%", 64, ramp_s=0.2)
    assert len(capacity.steps) == 1
    assert "nothing to measure ttft_p99=1s by" in str(capacity)


async def test_figures_that_there_are_none_of_are_null_in_json() -> None:
    nobody = read_target(f"http://127.0.0.1:{free_port()}", None)
    result = await Bench(nobody).measure(Load(duration_s=0.05, grace_s=0))
    told = json.loads(json.dumps(summarise(result, NO_OBJECTIVES).as_json(), allow_nan=False))
    assert told["error"] >= 1
    assert (told["completed"], told["ttft_ms"]["p99"], told["tester"]["cpu_us_per_token"]) == (0, None, None)


async def test_the_self_test_tells_what_the_tester_costs() -> None:
    scenarios = [
        Scenario("tokens", Kind.OPENAI, "tokens=100000 rate=50", 5, seconds=0.5),
        Scenario("requests", Kind.SLUICE, "tokens=1", 1, seconds=0.3, of_requests=True),
    ]
    tokens, requests = await self_test(scenarios, quiet=True)
    assert tokens.cpu_us > 0
    assert tokens.summary.outcomes[Outcome.CUT_OFF] == 5
    assert requests.summary.outcomes[Outcome.COMPLETED] > 10
    assert requests.summary.latencies["ttft"].min > 0
    assert [told["of"] for told in findings_as_json([tokens, requests])] == ["token", "request"]
    assert len({scenario.title for scenario in SCENARIOS}) == len(SCENARIOS)


async def test_malformed_events_are_counted_and_skipped(upstream: ScriptedUpstream) -> None:
    async def stutter(call: Call) -> None:
        await call.head()
        await call.event("{")
        await call.event(chunk({"content": "t"}))
        await call.done()

    upstream.script = stutter
    record = await asked(upstream)
    assert (record.outcome, record.malformed, record.tokens) == (Outcome.COMPLETED, 1, 1)
