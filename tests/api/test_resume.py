"""A dropped connection loses nothing, repeats nothing and pays nothing twice (contract, sections 3 and 4)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.api.conftest import Connect, LogLines, Settled
from tests.api.observing import until
from tests.api.raw_client import LEAVING, RawClient, Response, request
from tests.api.returning import FACES, RESUMABLE, WAYS, Paced, Returning, post
from tests.conftest import InProcess, Launch, Serve
from tests.sse_client import AnswerReader, ask
from tests.upstream_sim import Call, ScriptedUpstream, answer

SMALL = 4096  # bytes of a receive buffer: what the kernel takes for a reader that takes nothing


@pytest.fixture
def paced(upstream: ScriptedUpstream) -> Paced:
    paced = Paced()
    upstream.script = paced
    return paced


Opened = Callable[..., Awaitable[Returning]]


@pytest.fixture
async def returning() -> AsyncIterator[Opened]:
    """``await returning(server, face)``: a client that comes back; all its connections are closed in the end."""
    with contextlib.ExitStack() as stack:

        async def open_one(server: InProcess, face: str) -> Returning:
            client = await Returning.of(server, face)
            stack.callback(client.close)
            return client

        yield open_one


async def _replay(server: InProcess, stream_id: str) -> bytes:
    """The whole answer, as somebody sees it who was never cut off."""
    reader = AnswerReader()
    async with await RawClient.connect(server.port) as client:
        response = await client.ask(request(f"/api/streams/{stream_id}"))
        assert response.complete
        reader.feed(response.body)
    assert reader.ended
    return bytes(reader.taken)


async def _come_back(client: Returning) -> None:
    assert (await client.come()).status == 200


async def _has_come(server: InProcess, stream_id: str, number: int) -> None:
    """Wait until the answer has that event."""
    stream = server.desk.find(stream_id)
    assert stream is not None
    await until(lambda: stream.log.next_number > number, within=5)


Proven = Callable[..., Awaitable[None]]


@pytest.fixture
def proven(upstream: ScriptedUpstream, lines: LogLines, settled: Settled) -> Proven:
    """``await proven(server, client)``: it has the whole answer, each byte once, and the answer was paid for once."""

    async def prove(
        server: InProcess, client: Returning, *others: Returning, outcome: str = "completed", calls: int = 1
    ) -> None:
        whole = await _replay(server, client.stream_id)
        for reader in (client.reader, *(other.reader for other in others)):
            assert bytes(reader.taken) == whole
            assert [event.number for event in reader.events] == list(range(len(reader.events)))
            assert {event.id.rpartition(".")[0] for event in reader.events} == {client.stream_id}
        assert (await client.come()).status == 204, "an EventSource would come back for ever"
        assert len(upstream.calls) == calls
        for one in (client, *others):
            one.close()
        await settled(server)
        assert [line["outcome"] for line in lines("stream_end")] == [outcome]
        assert lines.failures == []

    return prove


# ---- One drop


def _name(value: object) -> str | None:
    return {True: "torn", False: "whole"}.get(value) if isinstance(value, bool) else None


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("torn", [False, True], ids=_name)
@pytest.mark.parametrize("heard", range(Paced.last + 1))
async def test_a_drop_at_any_event_loses_nothing_and_repeats_nothing(
    serve: Serve,
    returning: Opened,
    paced: Paced,
    proven: Proven,
    heard: int,
    torn: bool,
    way: str,
    face: str,
) -> None:
    """Section 4, row B6: behind event ``heard``, or within the next one; the answer goes on meanwhile, and the client
    comes back without waiting for anybody to notice that it had left."""
    server = await serve()
    client = await returning(server, face)
    await _come_back(client)
    torn = torn and heard < paced.last
    paced.release(heard + torn)
    await client.hear(heard, torn=torn)
    client.leave(way)
    if heard < paced.last:
        paced.release(heard + torn + 1)
        await _has_come(server, client.stream_id, min(heard + torn + 1, paced.last))
        await _come_back(client)
        paced.release(paced.last)
        await client.hear_all()
    assert client.reader.tokens == list(paced.tokens)
    await proven(server, client)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("torn", [False, True], ids=_name)
async def test_a_drop_before_the_first_id_begins_again_on_the_streams_own_url(
    serve: Serve, returning: Opened, paced: Paced, proven: Proven, torn: bool, way: str
) -> None:
    """Who has no id yet asks without one: what was posted is paid for once all the same."""
    server = await serve()
    client = await returning(server, "/api/streams/SID")
    await _come_back(client)
    if torn:
        await client.hear(-1, torn=True)
    client.leave(way)
    paced.release(2)
    await _has_come(server, client.stream_id, 2)
    await _come_back(client)
    paced.release(paced.last)
    await client.hear_all()
    await proven(server, client)


async def test_an_answer_cut_at_any_byte_is_whole_again(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """An id counts only when its block's blank line has come (WHATWG HTML §9.2.6): every cut of a finished answer."""
    upstream.script = answer(["Hel", "lo 😀", "\n\n"])
    server = await serve()
    url = await post(server.port)
    client = await connect(server)
    whole = (await client.ask(request(url))).body
    assert whole.endswith(b"data: [DONE]\n\n")
    for cut in range(len(whole)):
        reader = AnswerReader()
        reader.feed(whole[:cut])
        reader.disconnected()
        seen = [] if reader.last_event_id is None else [f"Last-Event-ID: {reader.last_event_id}"]
        response = await client.ask(request(url, RESUMABLE, *seen))
        assert response.status == 200, cut
        reader.feed(response.body)
        assert bytes(reader.taken) == whole, cut
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("target", ["/api/stream?q=hi&last_event_id={}", "/api/streams/{sid}?last_event_id={}"])
async def test_the_place_may_stand_in_the_url(
    serve: Serve, returning: Opened, paced: Paced, proven: Proven, connect: Connect, target: str
) -> None:
    """For a page that makes a new EventSource, which can set no header."""
    server = await serve()
    client = await returning(server, "/api/streams/SID")
    await _come_back(client)
    paced.release(2)
    await client.hear(2)
    client.leave("rst")
    paced.release(paced.last)
    again = await connect(server)
    url = target.format(client.reader.last_event_id, sid=client.stream_id)
    response = await again.ask(request(url, RESUMABLE))
    client.reader.feed(response.body)
    await proven(server, client)


async def test_the_question_is_not_looked_at_again(
    serve: Serve, upstream: ScriptedUpstream, returning: Opened, paced: Paced, proven: Proven
) -> None:
    """Section 4: ``q`` may be missing, another, or too long; no rate-limit token is spent, whatever it is."""
    server = await serve(SLUICE_RATE_LIMIT="1/3600")
    client = await returning(server, "/api/stream")
    await _come_back(client)
    paced.release(1)
    await client.hear(1)
    for target in ("/api/stream", "/api/stream?q=another", "/api/stream?q=" + "x" * 2000, "/api/stream?q=%ff&q="):
        client.leave("fin")
        client.target = target
        response = await client.come()
        assert response.status == 200
        assert re.fullmatch(r'"requests";r=0;t=[0-9]+', response.headers["RateLimit"])
    paced.release(paced.last)
    await client.hear_all()
    await proven(server, client)


# ---- Many drops


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_of_one_event_a_connection_is_whole(
    serve: Serve, returning: Opened, paced: Paced, proven: Proven, way: str, face: str
) -> None:
    """Dropped behind each event of one answer, and torn in the next one each time."""
    server = await serve()
    client = await returning(server, face)
    for number in range(paced.last):
        await _come_back(client)
        paced.release(number + 1)
        await client.hear(number, torn=True)
        client.leave(way)
    await _come_back(client)
    await client.hear_all()
    assert len(client.connections) == paced.last + 1
    await proven(server, client)


async def test_many_viewers_that_drop_at_random_all_have_the_whole(
    serve: Serve, upstream: ScriptedUpstream, proven: Proven
) -> None:
    """Twenty viewers of one answer, each with its own drops and pauses: any number at once (section 4)."""
    upstream.script = answer((f"{n} " for n in range(150)), gap=0.005)
    server = await serve()
    target = await post(server.port)
    drops = 0

    async def view(seed: int) -> Returning:
        nonlocal drops
        chance = random.Random(seed)
        client = Returning(server.port, target)
        while not client.reader.ended:
            await asyncio.sleep(chance.choice([0, 0, 0.01, 0.2]))
            if (await client.come()).status == 204:
                break
            client_takes = client.reader.seen + chance.randrange(1, 60)
            if client_takes >= 152:
                await client.hear_all()
            else:
                await client.hear(client_takes, torn=client_takes < 151 and chance.random() < 0.5)
                client.leave(chance.choice(WAYS))
                drops += 1
        return client

    async with asyncio.timeout(30):
        first, *others = await asyncio.gather(*(view(seed) for seed in range(20)))
    print(f"{drops} drops")
    assert drops > 60
    await proven(server, first, *others)


async def test_leaving_in_the_instant_of_the_end_loses_nothing(
    serve: Serve, upstream: ScriptedUpstream, lines: LogLines, settled: Settled
) -> None:
    """Row B5 with clients that can resume, 150 times: the answer is complete, whoever of the two was faster."""
    chance = random.Random(5)
    asking: list[Returning] = []
    begun = asyncio.Event()

    async def script(call: Call) -> None:
        connection, leave_before = asking[-1].client, chance.choice([True, False])  # not the one that it comes back on
        await call.head()
        await call.token("a")
        await begun.wait()  # who has not heard the start knows nothing to come back to
        for _ in range(chance.randrange(8)):
            await asyncio.sleep(0)
        if leave_before:
            LEAVING[chance.choice(list(LEAVING))](connection)
        await call.token("b")
        await call.finish()
        await call.done()
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(0)
        if not leave_before:
            LEAVING[chance.choice(list(LEAVING))](connection)

    upstream.script = script
    server = await serve(SLUICE_RATE_LIMIT="off")
    for number in range(1, 151):
        client = Returning(server.port, "/api/stream?q=hi")
        asking.append(client)
        begun.clear()
        await _come_back(client)
        await client.hear(0)
        begun.set()
        await until(lambda number=number: len(lines("stream_end")) == number, within=5, every=0.001)  # type: ignore[misc]
        client.leave("silence")
        await _come_back(client)
        await client.hear_all()
        assert client.reader.tokens == ["a", "b"]
        assert client.reader.ended
        client.close()
    await settled(server)
    assert len(upstream.calls) == 150
    assert {line["outcome"] for line in lines("stream_end")} == {"completed"}
    assert len(lines("request")) == 300
    assert lines.failures == []


# ---- What the upstream does meanwhile


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("way", WAYS)
async def test_a_drop_before_the_first_token(
    serve: Serve, returning: Opened, paced: Paced, proven: Proven, way: str, face: str
) -> None:
    """The answer's time runs on; that its client was away for a moment changes nothing for the upstream."""
    server = await serve(SLUICE_HEARTBEAT="0.05")
    client = await returning(server, face)
    for _ in range(3):
        await _come_back(client)
        await client.hear(0)
        await asyncio.sleep(0.12)
        client.leave(way)
    await _come_back(client)
    paced.release(paced.last)
    await client.hear_all()
    await proven(server, client)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("way", WAYS)
async def test_a_drop_in_silence_and_its_return_before_the_next_token(
    serve: Serve, returning: Opened, paced: Paced, proven: Proven, way: str, face: str
) -> None:
    """Between two tokens: what is heard on the new connection first is a ping, then the next token."""
    server = await serve(SLUICE_HEARTBEAT="0.05")
    client = await returning(server, face)
    await _come_back(client)
    paced.release(2)
    await client.hear(2)
    client.leave(way)
    await asyncio.sleep(0.02)
    await _come_back(client)
    assert await client.client.read_chunk() == b"event: ping\ndata: {}\n\n"
    paced.release(paced.last)
    await client.hear_all()
    await proven(server, client)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("way", WAYS)
async def test_a_drop_during_a_back_off_neither_stops_nor_doubles_the_next_try(
    serve: Serve, upstream: ScriptedUpstream, returning: Opened, proven: Proven, way: str, face: str
) -> None:
    """Row U47, resume and retry: the try that is due comes, once."""
    whole = answer()

    async def busy_at_first(call: Call) -> None:
        if len(upstream.calls) == 1:
            await call.refuse(503)
        else:
            await whole(call)

    upstream.script = busy_at_first
    server = await serve()
    client = await returning(server, face)
    await _come_back(client)
    await client.hear(0)
    await upstream.called()
    client.leave(way)
    await asyncio.sleep(0.05)
    await _come_back(client)
    await client.hear_all()
    assert client.reader.tokens == ["Hel", "lo"]
    await proven(server, client, calls=2)


FAULTS: dict[str, tuple[Callable[[Call], object], str, str]] = {
    "RST": (Call.reset, "upstream_incomplete", "upstream_error"),
    "FIN": (Call.close, "upstream_incomplete", "upstream_error"),
    "an error object": (lambda call: call.event({"error": {"message": "no"}}), "upstream_error", "upstream_error"),
    "silence": (lambda call: None, "upstream_timeout", "timeout"),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("when", ["before the fault", "at the fault", "in the error event"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_an_error_comes_exactly_once_over_all_connections(
    serve: Serve, upstream: ScriptedUpstream, returning: Opened, proven: Proven, fault: str, when: str, face: str
) -> None:
    """Row U47, resume and fault: told once to who comes back, then 204; nothing is generated anew."""
    fail, code, outcome = FAULTS[fault]
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        await call.token("a")
        await go_on.wait()
        if (failing := fail(call)) is not None:
            await failing  # type: ignore[misc]
        await call.gone()

    upstream.script = script
    server = await serve(SLUICE_IDLE_TIMEOUT="0.2", SLUICE_FIRST_TOKEN_TIMEOUT="5")
    client = await returning(server, face)
    await _come_back(client)
    await client.hear(1)
    if when == "in the error event":
        go_on.set()
        await client.hear(1, torn=True)
    client.leave("rst")
    if when != "before the fault":
        go_on.set()
        await _has_come(server, client.stream_id, 2)
    await _come_back(client)
    go_on.set()
    await client.hear_all()
    assert [event.json.get("error") for event in client.reader.events[2:]] == [code]
    await proven(server, client, outcome=outcome)


# ---- Who does not come back, or late


@pytest.mark.parametrize("way", LEAVING)
@pytest.mark.parametrize("face", FACES)
async def test_who_does_not_come_back_within_the_grace_ends_it(
    serve: Serve,
    upstream: ScriptedUpstream,
    returning: Opened,
    paced: Paced,
    lines: LogLines,
    settled: Settled,
    face: str,
    way: str,
) -> None:
    """Row B4, with a grace of 0.6 s: the upstream request is closed then and not before. A later viewer gets what there
    was, then ``interrupted`` (section 4)."""
    server = await serve(SLUICE_RESUME_GRACE="0.6")
    loop = asyncio.get_running_loop()
    client = await returning(server, face)
    await _come_back(client)
    paced.release(1)
    await client.hear(1)
    call = upstream.calls[0]
    left_at = loop.time()
    client.leave(way)
    async with asyncio.timeout(5):
        await call.gone()
    assert call.gone_at is not None
    print(f"closed {call.gone_at - left_at:.3f} s after the drop")
    assert 0.55 < call.gone_at - left_at < 1.6
    await settled(server)
    assert [line["outcome"] for line in lines("stream_end")] == ["client_gone"]
    await _come_back(client)
    await client.hear_all()
    assert client.reader.events[-1].json["error"] == "interrupted"
    assert client.reader.events[-1].json["retryable"] is True
    assert bytes(client.reader.taken) == await _replay(server, client.stream_id)
    assert (await client.come()).status == 204
    assert len(upstream.calls) == len(lines("stream_end")) == 1


@pytest.mark.parametrize("face", FACES)
async def test_each_return_within_the_grace_keeps_it_going(
    serve: Serve, returning: Opened, paced: Paced, proven: Proven, face: str
) -> None:
    """Row B4: away three times for most of the grace, more than all of it in sum."""
    server = await serve(SLUICE_RESUME_GRACE="1")
    client = await returning(server, face)
    for number in (1, 2, 3):
        await _come_back(client)
        paced.release(number)
        await client.hear(number)
        client.leave("fin")
        await asyncio.sleep(0.5)
    await _come_back(client)
    paced.release(paced.last)
    await client.hear_all()
    await proven(server, client)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("grace", ["0", "5"])
async def test_a_drop_stops_it_at_once_where_nobody_can_come_back(
    serve: Serve, upstream: ScriptedUpstream, returning: Opened, paced: Paced, settled: Settled, grace: str, face: str
) -> None:
    """Section 3: a client that did not ask for an event stream by name cannot; and a grace of 0 is for nobody."""
    server = await serve(SLUICE_RESUME_GRACE=grace)
    client = await returning(server, face)
    if grace == "5":
        client._headers.remove(RESUMABLE)
    await _come_back(client)
    paced.release(1)
    await client.hear(1)
    client.leave("rst")
    await settled(server, within=1)
    assert upstream.calls[0].gone_at is not None


async def test_a_grace_of_finish_brings_it_to_its_end(
    serve: Serve, returning: Opened, paced: Paced, proven: Proven, lines: LogLines
) -> None:
    """Section 2: ``finish`` = always to its end, though nobody is there."""
    server = await serve(SLUICE_RESUME_GRACE="finish")
    client = await returning(server, "/api/stream")
    await _come_back(client)
    await client.hear(0)
    client.leave("rst")
    await until(lambda: not server.desk.viewers, within=2)
    paced.release(paced.last)
    await until(lambda: lines("stream_end"), within=2)
    await _come_back(client)
    await client.hear_all()
    await proven(server, client)


async def test_what_nobody_comes_to_view_is_stopped_after_the_grace(
    serve: Serve, upstream: ScriptedUpstream, paced: Paced, settled: Settled, lines: LogLines
) -> None:
    """Section 4: its generation stops; a later viewer gets what there was, then ``interrupted``."""
    server = await serve(SLUICE_RESUME_GRACE="0.3")
    url = await post(server.port)
    paced.release(1)
    await (await upstream.called()).gone()
    await settled(server)
    reader = AnswerReader()
    async with await RawClient.connect(server.port) as late:
        reader.feed((await late.ask(request(url))).body)
    assert reader.tokens == ["Hel"]
    assert reader.events[-1].json["error"] == "interrupted"
    assert [line["outcome"] for line in lines("stream_end")] == ["client_gone"]


@pytest.mark.parametrize("seen", [True, False], ids=["with its id", "without one"])
@pytest.mark.parametrize("face", FACES)
async def test_after_the_window_it_is_expired_and_never_generated_again(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, face: str, seen: bool
) -> None:
    """Section 4: with a ``Last-Event-ID`` the in-band ``interrupted``, without one 404 (or a new question)."""
    server = await serve(SLUICE_RESUME_WINDOW="0.3")
    first = await ask(server.url, Accept="text/event-stream")
    stream_id = first.events[0].json["id"]
    await until(lambda: not server.desk.kept, within=3)
    client = await connect(server)
    target = "/api/stream?q=hi" if face == "/api/stream" else f"/api/streams/{stream_id}"
    if seen:
        reader = AnswerReader(first.events[1].id)
        response = await client.ask(request(target, f"Last-Event-ID: {first.events[1].id}"))
        reader.feed(response.body)
        assert response.status == 200
        [lost] = reader.events
        assert (lost.json["error"], lost.json["retryable"]) == ("interrupted", True)
    elif face != "/api/stream":
        assert (await client.ask(request(target))).error == "stream_not_found"
    assert len(upstream.calls) == 1


async def test_a_bogus_id_is_no_way_round_the_limit(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines
) -> None:
    """Row S20: after a 429, ids of no stream, of another N and of no form at all: none ever generates."""
    server = await serve(SLUICE_RATE_LIMIT="1/3600")
    client = await connect(server)
    answered = await client.ask(request("/api/stream?q=hi", RESUMABLE))
    own = re.findall(rb"id: ([^.]+)\.", answered.body)[0].decode()
    assert (await client.ask()).status == 429
    expected = {
        "A" * 32 + ".0": (200, "interrupted"),
        "A" * 32 + ".7": (200, "interrupted"),
        own + ".9999": (204, None),
        own: (400, "invalid_last_event_id"),
        "x": (400, "invalid_last_event_id"),
        "*": (400, "invalid_last_event_id"),
    }
    for event_id, (status, code) in expected.items():
        for target in ("/api/stream?q=hi", "/api/stream", f"/api/streams/{event_id.partition('.')[0]}"):
            if "*" in target or target.endswith("/x"):
                continue
            response = await client.ask(request(target, RESUMABLE, f"Last-Event-ID: {event_id}"))
            assert response.status == status, (event_id, target)
            if status == 400:
                assert response.error == code
            elif status == 200:
                assert f'"error":"{code}"'.encode() in response.body
                assert b"[DONE]" not in response.body
    assert (await client.ask()).status == 429
    assert len(upstream.calls) == len(lines("stream_end")) == 1


# ---- Stopped while away


async def _stop(server: InProcess, stream_id: str, *headers: str) -> Response:
    async with await RawClient.connect(server.port) as client:
        return await client.ask(request(f"/api/streams/{stream_id}", *headers, method="DELETE"))


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("way", WAYS)
async def test_who_comes_back_to_a_stopped_answer_is_told_so(
    serve: Serve, upstream: ScriptedUpstream, returning: Opened, paced: Paced, proven: Proven, way: str, face: str
) -> None:
    """Row B23: stopped while its viewer is away; ``usage`` says ``cancelled``, then ``[DONE]``; each once."""
    server = await serve()
    client = await returning(server, face)
    await _come_back(client)
    paced.release(2)
    await client.hear(2)
    client.leave(way)
    assert (await _stop(server, client.stream_id)).status == 204
    async with asyncio.timeout(2):
        await upstream.calls[0].gone()
    assert (await _stop(server, client.stream_id)).status == 204
    await _come_back(client)
    await client.hear_all()
    usage, done = client.reader.events[3:]
    assert (usage.type, usage.json["finish_reason"], usage.json["tokens"]) == ("usage", "cancelled", 1)
    assert done.data == "[DONE]"
    await proven(server, client, outcome="stopped")


async def test_a_stranger_stops_nothing(serve: Serve, returning: Opened, paced: Paced, proven: Proven) -> None:
    """Row B23: 404, as for an unknown id, and the answer goes on."""
    server = await serve()
    client = await returning(server, "/api/stream")
    await _come_back(client)
    await client.hear(0)
    refused = await _stop(server, client.stream_id, "X-Forwarded-For: 203.0.113.9")
    unknown = await _stop(server, "A" * 32)
    assert (refused.status, refused.json) == (unknown.status, unknown.json) == (404, unknown.json)
    paced.release(paced.last)
    await client.hear_all()
    await proven(server, client)


async def test_a_stop_races_the_end_and_the_returns(
    serve: Serve, upstream: ScriptedUpstream, settled: Settled, lines: LogLines
) -> None:
    """Row B23, 100 times: whichever comes first, every viewer sees the same one end."""
    chance = random.Random(23)
    upstream.script = answer(["a", "b", "c"], gap=0.001)
    server = await serve(SLUICE_RATE_LIMIT="off")

    async def one() -> None:
        client = Returning(server.port, await post(server.port))
        stopping = asyncio.create_task(_stop_soon(client.stream_id))
        while not client.reader.ended:
            await _come_back(client)
            await client.hear(client.reader.seen + 1)
            client.leave(chance.choice(list(LEAVING)))
        assert (await stopping).status == 204
        assert bytes(client.reader.taken) == await _replay(server, client.stream_id)
        client.close()

    async def _stop_soon(stream_id: str) -> Response:
        await asyncio.sleep(chance.random() / 100)
        return await _stop(server, stream_id)

    for _ in range(25):
        await asyncio.gather(*(one() for _ in range(4)))
    await settled(server)
    outcomes = [line["outcome"] for line in lines("stream_end")]
    print({outcome: outcomes.count(outcome) for outcome in set(outcomes)})
    assert len(outcomes) == len(upstream.calls) == 100
    assert set(outcomes) == {"completed", "stopped"}
    assert lines.failures == []


# ---- Several viewers


async def test_a_late_viewer_gets_the_past_in_one_write_and_then_the_present(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, returning: Opened, settled: Settled
) -> None:
    """Section 4, "from the start": 900 tokens are one chunk of its body; what comes now comes one by one."""
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        for number in range(900):
            await call.token(f"{number}")
        await go_on.wait()
        await call.token("now")
        await call.finish()
        await call.done()

    upstream.script = script
    server = await serve()
    early = await returning(server, "/api/streams/SID")
    await _come_back(early)
    await early.hear(900)
    late = await returning(server, "/api/streams/SID")
    late.target = early.target
    await _come_back(late)
    past = await late.client.read_chunk()
    late.reader.feed(past)
    assert late.reader.seen == 900
    assert len(past) == len(early.reader.taken) < 64 << 10
    go_on.set()
    present = await late.client.read_chunk()
    assert b'{"token":"now"}' in present
    await early.hear_all()
    early.close()
    late.close()
    await settled(server)


async def _stamped(call: Call, tokens: int, padding: str, gap: float) -> None:
    """Tokens that tell when they were sent."""
    loop = asyncio.get_running_loop()
    await call.head()
    for _ in range(tokens):
        await call.token(json.dumps([loop.time(), padding]))
        await asyncio.sleep(gap)
    await call.finish()
    await call.done()


async def _lateness(client: Returning) -> list[float]:
    """View the answer to its end, and return for each token how long it was under way (s)."""
    loop = asyncio.get_running_loop()
    late = []
    while data := await client.client.read_chunk():
        heard_at, before = loop.time(), len(client.reader.tokens)
        client.reader.feed(data)
        late += [heard_at - json.loads(token)[0] for token in client.reader.tokens[before:]]
    return late


async def test_a_viewer_that_takes_nothing_delays_nobody_and_costs_little(
    serve: Serve, upstream: ScriptedUpstream, returning: Opened, connect: Connect, settled: Settled, lines: LogLines
) -> None:
    """Rows B7, B24: a tab that reads nothing beside one that does, on one answer of 1.2 MB, and another answer: the
    others are on time (the aim is 50 ms; ten times that is for a loaded machine). It holds at most 256 KiB, and is
    dropped after the write timeout."""
    upstream.script = lambda call: _stamped(call, 300, "x" * 4000, 0.008)
    server = await serve(SLUICE_WRITE_TIMEOUT="1", SLUICE_MAX_ANSWER_BYTES="10000000")
    healthy, beside = await returning(server, "/api/streams/SID"), await returning(server, "/api/streams/SID")
    await _come_back(healthy)
    await _come_back(beside)
    stuck = Returning(server.port, healthy.target, receive_buffer=SMALL)
    known = set(server.desk._viewers)
    await _come_back(stuck)
    [viewer] = set(server.desk._viewers) - known
    together = await asyncio.gather(_lateness(healthy), _lateness(beside))
    late = sorted(itertools.chain(*together))
    assert len(late) == 600
    p50, p99, worst = (late[place] * 1000 for place in (300, 593, -1))
    print(f"late beside a stuck viewer: p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {worst:.1f} ms")
    assert p99 < 500
    print(f"handed to the stuck viewer: {viewer._sent_bytes >> 10} KiB")
    assert viewer._sent_bytes < 256 << 10
    await until(lambda: not server.desk.viewers, within=5)
    assert viewer.stalled
    assert [line["id"] for line in lines("viewer_stalled")] == [healthy.stream_id]
    for client in (healthy, beside, stuck):
        client.close()
    await settled(server)
    assert [line["outcome"] for line in lines("stream_end")] == ["completed"] * 2
    assert lines.failures == []


async def test_a_viewer_that_was_dropped_for_taking_nothing_may_come_back(
    serve: Serve, upstream: ScriptedUpstream, proven: Proven, lines: LogLines
) -> None:
    """It was aborted, so it knows that it lacks something; the answer waits for it as for anybody (section 3)."""
    upstream.script = answer(f"{n:04d}" + "x" * 2000 for n in range(400))
    server = await serve(SLUICE_WRITE_TIMEOUT="0.5")
    client = Returning(server.port, "/api/stream?q=hi", receive_buffer=SMALL)
    await _come_back(client)
    await client.hear(3)
    await until(lambda: lines("viewer_stalled"), within=5)
    client.leave("silence")
    client._receive_buffer = None
    await _come_back(client)
    await client.hear_all()
    assert len(client.reader.tokens) == 400
    await proven(server, client)


async def test_a_slow_reader_that_makes_progress_lives_and_resumes(
    serve: Serve, upstream: ScriptedUpstream, proven: Proven, lines: LogLines
) -> None:
    """Row B9: over several write timeouts; then its connection breaks, and it goes on where it was."""
    upstream.script = answer(f"{n:04d}" + "x" * 1000 for n in range(300))
    server = await serve(SLUICE_WRITE_TIMEOUT="0.5")
    client = Returning(server.port, "/api/stream?q=hi", receive_buffer=SMALL)
    loop = asyncio.get_running_loop()
    await _come_back(client)
    began_at = loop.time()
    raw = b""
    while loop.time() - began_at < 1.5:
        raw += await client.client.read(4096)
        await asyncio.sleep(0.1)
    client.reader.feed(re.sub(rb"\r\n[0-9a-f]+\r\n", b"", b"\r\n" + raw))
    client.leave("rst")
    assert 5 < client.reader.seen < 150
    client._receive_buffer = None
    await _come_back(client)
    await client.hear_all()
    assert lines("viewer_stalled") == []
    await proven(server, client)


# ---- The drain

RETRY = re.compile(rb"event: ping\nretry: ([0-9]+)\ndata: \{\}\n\n|retry: ([0-9]+)\nevent: ping\ndata: \{\}\n\n")


def _told_retry(client: Returning) -> list[int]:
    return [int(found[1] or found[2]) for ping in client.reader.pings if (found := RETRY.fullmatch(ping))]


async def test_a_drain_tells_every_viewer_another_moment_to_come_back(
    serve: Serve, upstream: ScriptedUpstream, returning: Opened, paced: Paced, settled: Settled, lines: LogLines
) -> None:
    """Row B18, "jittered before drain": one ping each with a ``retry`` of 1 to 5 s, and the answer goes on; nothing
    comes behind its last event."""
    server = await serve()
    opened = await returning(server, "/api/streams/SID")
    clients = [Returning(server.port, opened.target) for _ in range(20)]
    paced.release(1)
    for client in clients:
        await _come_back(client)
        await client.hear(1)
    drain = asyncio.create_task(server.serving.drain(20, cut_short=asyncio.Event()))
    await asyncio.sleep(0.1)
    paced.release(paced.last)
    for client in clients:
        await client.hear_all()
        client.close()
    retries = []
    for client in clients:
        [retry] = _told_retry(client)
        assert 1000 <= retry <= 5000
        assert len(client.reader.pings) == 1
        retries.append(retry)
    assert len(set(retries)) > 10, retries
    assert {bytes(client.reader.taken) for client in clients} == {bytes(clients[0].reader.taken)}
    assert clients[0].reader.tokens == list(paced.tokens)
    await settled(server)
    async with asyncio.timeout(2):
        await drain
    assert [line["outcome"] for line in lines("stream_end")] == ["completed"]
    assert lines.failures == []


async def test_who_drops_during_a_drain_goes_on_over_a_kept_connection(
    serve: Serve, returning: Opened, paced: Paced, connect: Connect, proven: Proven, upstream: ScriptedUpstream
) -> None:
    """Section 7, "stop accepting": a new connection is refused, one there was goes on; it too is told a ``retry``."""
    server = await serve()
    client = await returning(server, "/api/stream")
    await _come_back(client)
    paced.release(1)
    await client.hear(1)
    kept = [await connect(server) for _ in range(3)]
    for one in kept:
        assert (await one.ask(request("/"))).status == 200
    drain = asyncio.create_task(server.serving.drain(20, cut_short=asyncio.Event()))
    await asyncio.sleep(0.05)
    client.leave("rst")
    with pytest.raises(ConnectionRefusedError):
        await client.come()
    assert (await kept[2].ask(request("/api/stream?q=hi", RESUMABLE))).error == "shutting_down"
    assert (await client.come(over=kept[0])).status == 200
    paced.release(2)
    await client.hear(2)
    assert len(_told_retry(client)) == 1
    assert not drain.done()
    paced.release(paced.last)
    await client.hear_all()
    [whole] = {bytes(client.reader.taken)}
    replay = AnswerReader()
    replay.feed((await kept[1].ask(request(f"/api/streams/{client.stream_id}"))).body)
    assert bytes(replay.taken) == whole
    assert len(upstream.calls) == 1
    async with asyncio.timeout(2):
        await drain


async def test_a_drain_waits_for_the_grace_of_who_may_come_back(
    serve: Serve, returning: Opened, paced: Paced, settled: Settled, lines: LogLines
) -> None:
    """Rows U47, L1: an answer that is paid for is not thrown away because its viewer is between two connections; nor
    does one that nobody comes back to hold the drain up for longer than its grace."""
    server = await serve(SLUICE_RESUME_GRACE="0.5")
    client = await returning(server, "/api/stream")
    await _come_back(client)
    await client.hear(0)
    client.leave("fin")
    await until(lambda: not server.desk.viewers, within=2)
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    async with asyncio.timeout(5):
        await server.serving.drain(20, cut_short=asyncio.Event())
    assert 0.3 < loop.time() - began_at < 2.5
    assert [line["outcome"] for line in lines("stream_end")] == ["client_gone"]


async def test_sigterm_lets_attached_viewers_finish(launch: Launch, upstream: ScriptedUpstream, paced: Paced) -> None:
    """Rows L1, B18, on the real signal: the streams go on, each viewer is told a ``retry``, exit 0."""
    sluice = await launch(LLM_BASE_URL=upstream.base_url)
    port = int(sluice.url.rpartition(":")[2])
    target = await post(port)
    clients = [Returning(port, target) for _ in range(5)]
    for client in clients:
        await _come_back(client)
        await client.hear(0)
    sluice.signal(signal.SIGTERM)
    await until(lambda: sluice.events("draining"), within=5)
    paced.release(paced.last)
    for client in clients:
        await client.hear_all()
        client.close()
        assert len(_told_retry(client)) == 1
        assert client.reader.tokens == list(paced.tokens)
    async with asyncio.timeout(5):
        assert await sluice.exited() == 0
    assert [line["outcome"] for line in sluice.events("stream_end")] == ["completed"]
    assert len(upstream.calls) == 1
