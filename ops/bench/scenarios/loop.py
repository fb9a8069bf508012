"""Clients that ask again as soon as they have their answer, from an endpoint that sends as fast as it is read."""

from __future__ import annotations

import asyncio

from ops.bench.figures import Figures, Metric
from ops.bench.rig import Rig
from ops.bench.scenarios.scenario import TRUST, WRONG, Scale, Scenario
from ops.bench.viewers import Record, ViewerFailed, open_clients

__all__ = ["REQ", "S3"]

_LONG = 10_000  # tokens of an answer; 700 KB of events, which Sluice's replay log holds as it is shipped
_SHORT = 8


async def _loop(rig: Rig, scale: Scale, tokens: int) -> Figures:
    record = Record(timed=False)
    clients = await open_clients(rig.port, rig.ask, scale.clients, tokens, record)
    await asyncio.sleep(scale.ramp_s)
    watched = rig.watch()
    record.recording = True
    await asyncio.sleep(scale.window_s)
    record.recording = False
    figures = watched()
    wrong = record.wrong + sum(client.check.wrong for client in clients)
    for client in clients:
        client.leave()
    if failures := [client.failure for client in clients if client.failure]:
        raise ViewerFailed(f"{len(failures)} of {len(clients)} clients, such as: {failures[0]}")
    if not record.tokens:
        raise RuntimeError("no token arrived in the window")
    return figures | {
        "tokens_per_s": record.tokens / figures["wall_s"],
        "answers_per_s": record.answers / figures["wall_s"],
        "us_per_token": 1e6 * figures["cpu_s"] / record.tokens,
        "us_per_answer": 1e6 * figures["cpu_s"] / record.answers if record.answers else float("nan"),
        "wrong": float(wrong),
    }


async def _run_s3(rig: Rig, scale: Scale) -> Figures:
    return await _loop(rig, scale, _LONG)


async def _run_req(rig: Rig, scale: Scale) -> Figures:
    return await _loop(rig, scale, _SHORT)


S3 = Scenario(
    "s3: 64 clients, answers of 10,000 tokens as fast as they go",
    (
        Metric("tokens_per_s", "tokens/s", 0),
        Metric("us_per_token", "µs/token"),
        Metric("server_core_percent", "server core %", 0, ratio=False),
        WRONG,
        *TRUST,
    ),
    _run_s3,
)
REQ = Scenario(
    "req: 64 clients, answers of 8 tokens as fast as they go, connections kept",
    (
        Metric("answers_per_s", "answers/s", 0),
        Metric("us_per_answer", "µs/answer", 0),
        Metric("server_core_percent", "server core %", 0, ratio=False),
        WRONG,
        *TRUST,
    ),
    _run_req,
)
