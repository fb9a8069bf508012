"""What is measured: each scenario drives one relay, alone on its core, and returns its figures."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from ops.bench.figures import Figures, Metric, percentile
from ops.bench.procs import Child, Cores, cpu_seconds, memory, waiting_seconds
from ops.bench.simulator import ask_departures
from ops.bench.viewers import Ask, Record, Viewer, ask_endpoint, ask_relay, open_viewers

__all__ = ["FULL", "PLAIN", "QUICK", "RELAYS", "SCENARIOS", "SLUICE", "Relay", "Rig", "Scale", "Scenario", "open_rig"]

# ---- Who is measured, and with what


@dataclass(frozen=True, slots=True)
class Relay:
    """A server under test; it learns from ``LLM_BASE_URL`` where the endpoint is."""

    name: str
    arguments: tuple[str, ...]
    settings: tuple[tuple[str, str], ...] = ()


# Every limit out of the way: what is measured is the relaying. Features that need no limit (ids, log, metrics) stay on.
SLUICE = Relay(
    "Sluice",
    ("run.py",),
    (
        ("SLUICE_PORT", "0"),
        ("SLUICE_ADMIN_PORT", "0"),
        ("SLUICE_LOG_FORMAT", "json"),
        ("SLUICE_RATE_LIMIT", "off"),
        ("SLUICE_MAX_STREAMS_PER_CLIENT", "100000"),
        ("SLUICE_MAX_STREAMS", "5000"),
        ("SLUICE_FIRST_TOKEN_TIMEOUT", "3600"),
        ("SLUICE_IDLE_TIMEOUT", "3600"),
        ("SLUICE_STREAM_TIMEOUT", "3600"),
        ("SLUICE_MAX_ANSWER_BYTES", str(1 << 24)),
        ("SLUICE_RESUME_WINDOW", "3600"),
    ),
)
PLAIN = Relay("plain aiohttp", ("-m", "ops.bench.plain_relay"))
WITHOUT_IDS = Relay("without ids", ("-m", "ops.bench.without_ids"), SLUICE.settings)
RELAYS = {"sluice": SLUICE, "plain": PLAIN, "without-ids": WITHOUT_IDS}


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of each thing one round does."""

    cancel_tries: int = 200
    ttft_requests: int = 200
    memory_streams: int = 1000
    kept_answers: int = 1000
    kept_tokens: int = 200  # of each
    cpu_streams: int = 200
    cpu_rate: int = 50  # tokens per second and stream
    cpu_ramp_s: float = 2.0  # after the last stream has opened
    cpu_window_s: float = 10.0


FULL = Scale()
QUICK = Scale(cancel_tries=80, ttft_requests=80, cpu_ramp_s=1.0, cpu_window_s=4.0)


@dataclass(frozen=True, slots=True)
class Rig:
    """One relay and one endpoint, both fresh."""

    relay: Child
    endpoint: Child

    def watch(self) -> Callable[[], Figures]:
        """Start to watch both cores; the result tells how much of the rig's core simulator and viewers have used since,
        and how long the server could have run but had to wait for its own, since something else was on it."""
        pids = (self.endpoint.pid, os.getpid())
        began, used, waited = time.monotonic(), sum(map(cpu_seconds, pids)), waiting_seconds(self.relay.pid)

        def told() -> Figures:
            percent_of = 100 / (time.monotonic() - began)
            return {
                "rig_core_percent": percent_of * (sum(map(cpu_seconds, pids)) - used),
                "disturbed_percent": percent_of * (waiting_seconds(self.relay.pid) - waited),
            }

        return told


@asynccontextmanager
async def open_rig(relay: Relay, cores: Cores) -> AsyncIterator[Rig]:
    async with Child(["-m", "ops.bench.simulator"], cores.rig) as endpoint:
        settings = {**dict(relay.settings), "LLM_BASE_URL": f"http://127.0.0.1:{endpoint.port}/v1"}
        async with Child([*relay.arguments], cores.server, settings) as server:
            gc.collect()
            gc.disable()  # a collection among the viewers would look like lateness of the server
            try:
                yield Rig(server, endpoint)
            finally:
                gc.enable()


@dataclass(frozen=True, slots=True)
class Scenario:
    title: str
    metrics: tuple[Metric, ...]
    run: Callable[[Rig, Scale], Awaitable[Figures]]


# Whether the figures can be trusted: a rig that is full, or a server that was kept from its core, measures itself.
_TRUST = (
    Metric("rig_core_percent", "rig core %", 0, ratio=False),
    Metric("disturbed_percent", "disturbed %", 0, ratio=False),
)

# ---- How soon the endpoint hears that nobody listens any more


@dataclass(frozen=True, slots=True)
class Window:
    """A moment in which a viewer leaves: what the endpoint is told to do, and after how many tokens it is."""

    key: str
    words: str
    tokens: int


_WINDOWS = (
    Window("before_head", "tokens=1 head_after=60", 0),
    Window("before_token", "tokens=1 first_after=60", 0),
    Window("mid_stream", "tokens=1200 rate=20", 3),
    Window("flowing", "tokens=60000 rate=2000", 100),
)
_READ_AT_ONCE = 20  # whole answers
_PATIENCE_S = 3.0  # after the last leave; what the endpoint has not heard of by then is missed


async def measure_cancel(rig: Rig, scale: Scale) -> Figures:
    """Leave in the four windows, with FIN and RST in turn, one viewer at a time. It asks as one that cannot resume."""
    watched = rig.watch()
    tries, direct_tries = scale.cancel_tries, scale.cancel_tries // 4
    through = await _leave_often(rig, rig.relay.port, partial(ask_relay, resumable=False), range(tries))
    direct = await _leave_often(rig, rig.endpoint.port, ask_endpoint, range(tries, tries + direct_tries))
    figures = {
        "p50_ms": percentile(through.values(), 0.5),
        "p99_ms": percentile(through.values(), 0.99),
        "max_ms": percentile(through.values(), 1),
        "missed": float(tries - len(through)),
        "direct_p50_ms": percentile(direct.values(), 0.5),
        "direct_p99_ms": percentile(direct.values(), 0.99),
        **watched(),
    }
    for number, window in enumerate(_WINDOWS):
        times_ms = [ms for stream, ms in through.items() if stream % len(_WINDOWS) == number]
        figures |= {f"{window.key}_p50_ms": percentile(times_ms, 0.5), f"{window.key}_max_ms": percentile(times_ms, 1)}
    return figures


async def _leave_often(rig: Rig, port: int, ask: Ask, streams: range) -> dict[int, float]:
    """Come and go once for each stream; the milliseconds until the endpoint knew, of those that it came to know of."""
    left_ns = {stream: await _come_and_go(rig, port, ask, stream) for stream in streams}
    deadline = time.monotonic() + _PATIENCE_S
    while not left_ns.keys() <= (told := (await asyncio.to_thread(ask_departures, rig.endpoint.port)).left).keys():
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    return {stream: (told[stream] - ns) / 1e6 for stream, ns in left_ns.items() if stream in told}


async def _come_and_go(rig: Rig, port: int, ask: Ask, stream: int) -> int:
    """Ask, leave when the window is there, and return when that was (CLOCK_MONOTONIC, ns)."""
    window, reset = _WINDOWS[stream % len(_WINDOWS)], stream // len(_WINDOWS) % 2 == 1
    viewer = Viewer(ask(f"id={stream} {window.words}"), stream, Record())
    await asyncio.get_running_loop().create_connection(lambda: viewer, "127.0.0.1", port)
    async with asyncio.timeout(10):
        await viewer.tokens(window.tokens)
        while stream not in (await asyncio.to_thread(ask_departures, rig.endpoint.port)).arrived:  # noqa: ASYNC110  asks a process
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.01 + random.random() * 0.01)  # the head arrives too; and in step with no timer of the server
    viewer.leave(reset=reset)
    await asyncio.sleep(0.005)
    return viewer.left_ns


# ---- How much later the first token comes than from the endpoint itself


async def measure_ttft(rig: Rig, scale: Scale) -> Figures:
    """One client that asks the endpoint and the relay in turn; from the request's write to its first token's read."""
    watched = rig.watch()
    direct: list[float] = []
    through: list[float] = []
    warm_up = 20
    for number in range(scale.ttft_requests + warm_up):
        for port, ask, times_ms in ((rig.endpoint.port, ask_endpoint, direct), (rig.relay.port, ask_relay, through)):
            [viewer] = await open_viewers(port, ask, [(number, f"id={number} tokens=2 rate=200")], Record())
            async with asyncio.timeout(10):
                await viewer.tokens(2)
            viewer.leave()
            if number >= warm_up:
                times_ms.append((viewer.first_token_ns - viewer.asked_ns) / 1e6)
    shares = {"p50_ms": 0.5, "p99_ms": 0.99}
    figures = {f"direct_{name}": percentile(direct, of) for name, of in shares.items()}
    figures |= {f"through_{name}": percentile(through, of) for name, of in shares.items()}
    figures |= {f"added_{name}": figures[f"through_{name}"] - figures[f"direct_{name}"] for name in shares}
    return figures | watched()


# ---- What an open stream holds


async def measure_memory(rig: Rig, scale: Scale) -> Figures:
    """Many streams that got one token and then wait, against the same process after a few answers."""
    watched = rig.watch()
    warm_up = await open_viewers(
        rig.relay.port, ask_relay, [(n, f"id={n} tokens=2 rate=200") for n in range(20)], Record()
    )
    for viewer in warm_up:
        await viewer.tokens(2)
        viewer.leave()
    await asyncio.sleep(0.5)
    base = memory(rig.relay.pid)
    prompts = [(stream, f"id={stream} tokens=1 hold=1") for stream in range(scale.memory_streams)]
    viewers = await open_viewers(rig.relay.port, ask_relay, prompts, Record())
    await asyncio.sleep(0.5)
    full = memory(rig.relay.pid)
    failed = sum(1 for viewer in viewers if viewer.failure or viewer.check.wrong)
    for viewer in viewers:
        viewer.leave()
    return {
        "base_rss_mb": base.rss / 1024,
        "base_pss_mb": base.pss / 1024,
        "peak_rss_mb": full.peak_rss / 1024,
        "pss_mb": full.pss / 1024,
        "rss_kb_per_stream": (full.peak_rss - base.rss) / scale.memory_streams,
        "pss_kb_per_stream": (full.pss - base.pss) / scale.memory_streams,
        "wrong": float(failed),
        **watched(),
    }


# ---- What an answer holds that has ended


async def measure_kept(rig: Rig, scale: Scale) -> Figures:
    """Answers that were read to their end, within their window, against the same process after a few of them."""
    watched = rig.watch()
    record = Record()
    await _read_answers(rig, range(20), scale.kept_tokens, record)
    await asyncio.sleep(0.5)
    base = memory(rig.relay.pid)
    record = Record(recording=True)
    wrong = await _read_answers(rig, range(20, 20 + scale.kept_answers), scale.kept_tokens, record)
    await asyncio.sleep(0.5)
    full = memory(rig.relay.pid)
    return {
        "base_rss_mb": base.rss / 1024,
        "rss_mb": full.rss / 1024,
        "pss_kb_per_answer": (full.pss - base.pss) / scale.kept_answers,
        "sent_kb_per_answer": record.bytes / 1024 / scale.kept_answers,
        "wrong": float(wrong),
        **watched(),
    }


async def _read_answers(rig: Rig, streams: range, tokens: int, record: Record) -> int:
    """Read that many answers to their end, some at a time; returns how many were not right."""
    wrong = 0
    for first in range(streams.start, streams.stop, _READ_AT_ONCE):
        together = range(first, min(first + _READ_AT_ONCE, streams.stop))
        prompts = [(stream, f"id={stream} tokens={tokens} rate=2000") for stream in together]
        viewers = await open_viewers(rig.relay.port, ask_relay, prompts, record)
        for viewer in viewers:
            await viewer.end()
            wrong += bool(viewer.failure or viewer.check.wrong or viewer.check.next != tokens)
            viewer.leave()
    return wrong


# ---- What a token costs


async def measure_cpu(rig: Rig, scale: Scale) -> Figures:
    """The server's processor time over a window, by the tokens that viewers received in it.

    A shorter window without the server tells how late the rig itself is: simulator and viewers share a core.
    """
    floor = await _flow(rig, rig.endpoint.port, ask_endpoint, scale, scale.cpu_window_s / 4)
    figures = await _flow(rig, rig.relay.port, ask_relay, scale, scale.cpu_window_s)
    return figures | {"direct_late_p99_ms": floor["late_p99_ms"], "wrong": figures["wrong"] + floor["wrong"]}


async def _flow(rig: Rig, port: int, ask: Ask, scale: Scale, window_s: float) -> Figures:
    record = Record()
    opening_s = 10.0  # the first streams must outlast the opening of the last
    tokens = int((opening_s + scale.cpu_ramp_s + window_s) * scale.cpu_rate)
    words = f"tokens={tokens} rate={scale.cpu_rate}"
    # Evenly spread over a token's interval: streams in step would be read together, and look cheaper than they are.
    prompts = [(stream, f"id={stream} {words} phase={stream * 0.618 % 1:.3f}") for stream in range(scale.cpu_streams)]
    viewers = await open_viewers(port, ask, prompts, record)
    await asyncio.sleep(scale.cpu_ramp_s)
    watched, began, used = rig.watch(), time.monotonic(), cpu_seconds(rig.relay.pid)
    record.recording = True
    await asyncio.sleep(window_s)
    record.recording = False
    cpu_s, wall_s, trust = cpu_seconds(rig.relay.pid) - used, time.monotonic() - began, watched()
    failed = sum(1 for viewer in viewers if viewer.failure)
    wrong = sum(viewer.check.wrong for viewer in viewers)
    for viewer in viewers:
        viewer.leave()
    if not record.tokens:
        raise RuntimeError("no token arrived in the window")
    return {
        "us_per_token": 1e6 * cpu_s / record.tokens,
        "bytes_per_token": record.bytes / record.tokens,
        "late_p50_ms": percentile(record.late_ns, 0.5) / 1e6,
        "late_p99_ms": percentile(record.late_ns, 0.99) / 1e6,
        "delivered_percent": 100 * record.tokens / (scale.cpu_streams * scale.cpu_rate * wall_s),
        "server_core_percent": 100 * cpu_s / wall_s,
        "wrong": float(failed + wrong),
        **trust,
    }


SCENARIOS = {
    "cancel": Scenario(
        "cancel: a viewer leaves -> the endpoint sees its request closed (ms; 'direct' = no relay between)",
        (
            Metric("p50_ms", "p50"),
            Metric("p99_ms", "p99"),
            Metric("max_ms", "max"),
            Metric("missed", "missed", 0, fault=True),
            *(Metric(f"{window.key}_p50_ms", f"{window.key} p50", ratio=False) for window in _WINDOWS),
            Metric("direct_p50_ms", "direct p50", ratio=False),
            Metric("direct_p99_ms", "direct p99", ratio=False),
            *_TRUST,
        ),
        measure_cancel,
    ),
    "ttft": Scenario(
        "ttft: from the request to the first token, one client, a connection for each request (ms)",
        (
            Metric("direct_p50_ms", "direct p50", ratio=False),
            Metric("direct_p99_ms", "direct p99", ratio=False),
            Metric("through_p50_ms", "through p50"),
            Metric("through_p99_ms", "through p99"),
            Metric("added_p50_ms", "added p50"),
            Metric("added_p99_ms", "added p99"),
            *_TRUST,
        ),
        measure_ttft,
    ),
    "memory": Scenario(
        "memory: streams open after one token, the server's process",
        (
            Metric("base_rss_mb", "base RSS MB", 1),
            Metric("base_pss_mb", "base PSS MB", 1),
            Metric("peak_rss_mb", "peak RSS MB", 1),
            Metric("pss_mb", "PSS MB", 1),
            Metric("rss_kb_per_stream", "RSS KB/stream", 1),
            Metric("pss_kb_per_stream", "PSS KB/stream", 1),
            Metric("wrong", "wrong", 0, fault=True),
            *_TRUST,
        ),
        measure_memory,
    ),
    "kept": Scenario(
        "kept: answers that have ended and can still be replayed, the server's process",
        (
            Metric("base_rss_mb", "base RSS MB", 1),
            Metric("rss_mb", "RSS MB", 1),
            Metric("pss_kb_per_answer", "PSS KB/answer", 1),
            Metric("sent_kb_per_answer", "sent KB/answer", 1),
            Metric("wrong", "wrong", 0, fault=True),
            *_TRUST,
        ),
        measure_kept,
    ),
    "cpu": Scenario(
        "cpu: the server's processor time per relayed token; lateness from the endpoint's write to the viewer's read",
        (
            Metric("us_per_token", "µs/token", 1),
            Metric("bytes_per_token", "bytes/token", 1),
            Metric("late_p50_ms", "late p50 ms"),
            Metric("late_p99_ms", "late p99 ms"),
            Metric("direct_late_p99_ms", "direct late p99 ms", ratio=False),
            Metric("delivered_percent", "delivered %", 1, ratio=False),
            Metric("server_core_percent", "server core %", 0, ratio=False),
            Metric("wrong", "wrong", 0, fault=True),
            *_TRUST,
        ),
        measure_cpu,
    ),
}
