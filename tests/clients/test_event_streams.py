"""Published readers of server-sent events, unchanged, on ``/api/stream`` and ``/api/streams/SID``.

Each knows the standard in its own way: ``eventsource`` is the browser's API for Node, ``@microsoft/fetch-event-source``
reads what ``fetch`` brings (and calls ``onmessage`` for blocks that the standard says are no event), and ``httpx-sse``
leaves the reconnecting to its user.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import httpx
import pytest
from httpx_sse import aconnect_sse

from tests.clients.node import DEADLINE_S, NodeScript
from tests.conftest import InProcess, Serve
from tests.public.conftest import Wire
from tests.public.steps import by_hand, complete, opened
from tests.upstream_sim import Call, ScriptedUpstream, answer, chunk

PATIENT = {"SLUICE_RESUME_GRACE": "60"}  # so that no slow machine makes a returning reader late

Event = dict[str, Any]  # {"type", "data", "id"}, or {"type": "lost"}: the connection


class Reader(Protocol):
    async def says(self) -> Event:
        """Wait for the next event."""

    async def rest(self) -> list[Event]:
        """Wait for the end and return the events until then."""


class HttpxSse:
    """``httpx-sse`` as its README shows it, with a loop around it that goes on after the last event seen."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    async def __aenter__(self) -> HttpxSse:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def says(self) -> Event:
        event = await self._next()
        assert event is not None
        return event

    async def rest(self) -> list[Event]:
        events = []
        while (event := await self._next()) is not None:
            events.append(event)
        return events

    async def _next(self) -> Event | None:
        async with asyncio.timeout(DEADLINE_S):
            return await self._events.get()

    async def _read(self) -> None:
        last_event_id, retry_ms = "", 3000
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
                try:
                    async with aconnect_sse(client, "GET", self._url, headers=headers) as source:
                        async for event in source.aiter_sse():
                            last_event_id = event.id
                            retry_ms = event.retry or retry_ms
                            self._events.put_nowait({"type": event.event, "data": event.data, "id": event.id})
                            if event.data == "[DONE]":
                                self._events.put_nowait(None)
                                return
                except httpx.TransportError:
                    self._events.put_nowait({"type": "lost"})
                await asyncio.sleep(retry_ms / 1000)


Read = Callable[[str], AbstractAsyncContextManager[Reader]]


@pytest.fixture(params=["eventsource", "fetch-event-source", "httpx-sse"])
def read(request: pytest.FixtureRequest) -> Read:
    """``async with read(url) as reader`` reads that stream with one of the clients."""
    if request.param == "httpx-sse":
        return HttpxSse
    node: str = request.getfixturevalue("node")
    return lambda url: NodeScript(node, f"{request.param}.mjs", {"url": url})


FACES = ["a question", "a conversation"]


async def _url(server: InProcess, face: str, through: str = "") -> str:
    """The URL of a new answer: the one that asks, or that of an answer which a POST has begun."""
    base = through or server.url
    if face == "a question":
        return f"{base}/api/stream?q=Why%3F"
    async with httpx.AsyncClient(trust_env=False) as client:
        chat = {"messages": [{"role": "user", "content": "Why?"}]}
        made = await client.post(f"{server.url}/api/streams", json=chat)
        assert made.status_code == 201
        return f"{base}{made.headers['Location']}"


def _tokens(events: list[Event]) -> list[str]:
    messages = [
        json.loads(event["data"]) for event in events if event["type"] == "message" and event["data"] != "[DONE]"
    ]
    return [message["token"] for message in messages]


def _is_whole(events: list[Event]) -> bool:
    """Every event from the start to ``[DONE]``, each once and in order."""
    own = [event for event in events if event["type"] not in {"ping", "lost"}]
    numbers = [int(event["id"].rpartition(".")[2]) for event in own]
    return numbers == list(range(len(own))) and own[0]["type"] == "start" and own[-1]["data"] == "[DONE]"


@pytest.mark.parametrize("face", FACES)
async def test_an_answer_is_read_whole(serve: Serve, upstream: ScriptedUpstream, read: Read, face: str) -> None:
    """One event a delta, with exactly its text, between a start and a usage (contract, section 3)."""
    texts = ["Hel", "lo, ", "wörld 😀", "\n\n", "data: [DONE]\n\n", "\u2028\u0085", " ", '"\\']

    async def script(call: Call) -> None:
        await call.head()
        await call.event(chunk({"reasoning_content": "hm"}))
        for text in texts:
            await call.token(text)
        await complete(call)

    upstream.script = script
    server = await serve()
    async with read(await _url(server, face)) as reader:
        events = await reader.rest()
    assert _tokens(events) == texts
    assert _is_whole(events)
    types = [event["type"] for event in events]
    assert types == ["start", "reasoning", *["message"] * len(texts), "usage", "message"]
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("how", ["reset", "closed"])
@pytest.mark.parametrize("face", FACES)
async def test_a_dropped_connection_costs_nothing(
    serve: Serve, upstream: ScriptedUpstream, read: Read, face: str, how: str
) -> None:
    """It comes back with its Last-Event-ID and gets exactly the rest, from the same upstream call (section 4)."""
    upstream.script = by_hand
    server = await serve(**PATIENT)
    async with Wire(server.url) as wire, read(await _url(server, face, through=wire.url)) as reader:
        call = await opened(upstream)
        await call.token("Hel")
        events = [await reader.says(), await reader.says()]
        assert _tokens(events) == ["Hel"]

        if how == "reset":
            wire.cut()
        else:
            wire.hang_up()
        events.append(await reader.says())
        assert events[-1] == {"type": "lost"}
        await call.token("lo, ")
        await call.token("world")
        await complete(call)

        events += await reader.rest()
    assert _tokens(events) == ["Hel", "lo, ", "world"]
    assert _is_whole(events)
    assert len(upstream.calls) == 1


async def test_a_heartbeat_is_heard_and_is_no_message(serve: Serve, upstream: ScriptedUpstream, read: Read) -> None:
    """In silence ``event: ping`` comes, without an id: it changes nothing in what was read, or where (section 3)."""
    upstream.script = answer(["Hel", "lo"], gap=0.7)
    server = await serve(SLUICE_HEARTBEAT="0.2")
    async with read(await _url(server, "a question")) as reader:
        events = await reader.rest()
    assert [event["data"] for event in events if event["type"] == "ping"].count("{}") >= 2
    assert _tokens(events) == ["Hel", "lo"]
    assert _is_whole(events)


async def test_an_eventsource_that_nobody_closes_stops_by_itself(
    serve: Serve, upstream: ScriptedUpstream, node: str
) -> None:
    """Behind the end of a finished answer it finds a 204, and asks no more (section 4)."""
    server = await serve()
    arguments = {"url": await _url(server, "a question"), "stays": True}
    async with NodeScript(node, "eventsource.mjs", arguments) as reader:
        events = await reader.rest()
    assert [event["type"] for event in events[-3:]] == ["message", "lost", "closed"]
    assert _is_whole(events[:-1])
    assert len(upstream.calls) == 1


async def test_a_refusal_ends_an_eventsource(serve: Serve, upstream: ScriptedUpstream, node: str) -> None:
    """A status other than 200 is final to it, so what can be told in the stream is told there (section 3)."""
    server = await serve()
    async with NodeScript(node, "eventsource.mjs", {"url": f"{server.url}/api/stream?q=%20"}) as reader:
        assert await reader.rest() == [{"type": "closed"}]
    assert upstream.calls == []
