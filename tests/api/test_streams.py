"""``/api/streams`` and ``Last-Event-ID``: opening, viewing, going on, stopping (contract, section 4, row by row)."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable

import pytest

from tests.api.conftest import Connect, LogLines, Settled
from tests.api.observing import until
from tests.api.raw_client import ASK, CHAT, RawClient, Response, post, request
from tests.conftest import InProcess, Serve
from tests.sse_client import open_stream, open_view, view
from tests.upstream_sim import Call, Script, ScriptedUpstream, answer

EVENT_STREAM = "text/event-stream"  # who asks for it by name can resume
ELSEWHERE = "X-Real-IP: 203.0.113.7"  # another client, as a trusted proxy names it
UNKNOWN = "A" * 32
LISTED = "https://page.example"
PATIENCE = 5.0  # s for what should happen at once


class Tap:
    """A script that says what the test tells it to, when it tells it to."""

    def __init__(self) -> None:
        self._said: asyncio.Queue[str | None] = asyncio.Queue()

    def say(self, *texts: str) -> None:
        for text in texts:
            self._said.put_nowait(text)

    def finish(self) -> None:
        self._said.put_nowait(None)

    async def __call__(self, call: Call) -> None:
        await call.head()
        while (text := await self._said.get()) is not None:
            await call.token(text)
        await call.finish()
        await call.done()


@pytest.fixture
def tap(upstream: ScriptedUpstream) -> Tap:
    upstream.script = tap = Tap()
    return tap


async def start(client: RawClient, *headers: str) -> str:
    """Open an answer; gives its SID."""
    response = await client.ask(post(CHAT, *headers))
    assert response.status == 201, response.body
    return str(response.json["id"])


def delete(stream_id: str, *headers: str) -> bytes:
    return request(f"/api/streams/{stream_id}", *headers, method="DELETE")


def get(stream_id: str, *headers: str) -> bytes:
    return request(f"/api/streams/{stream_id}", *headers)


async def ended(client: RawClient, *headers: str) -> tuple[str, bytes]:
    """An answer that is over: its SID and all of its events."""
    stream_id = await start(client, *headers)
    return stream_id, (await client.ask(get(stream_id, *headers))).body


async def shown(server: InProcess, stream_id: str, number: int) -> None:
    """Wait until the answer has its event of that number."""
    stream = server.desk.find(stream_id)
    assert stream is not None
    await until(lambda: stream.log.next_number > number, within=PATIENCE)


def remaining(response: Response) -> int:
    """``r`` of the RateLimit header."""
    match = re.search(r";r=(\d+)", response.headers["RateLimit"])
    assert match is not None
    return int(match[1])


# ---- POST /api/streams


async def test_who_posts_a_conversation_is_told_where_its_answer_is(serve: Serve, connect: Connect) -> None:
    """201, ``Location: /api/streams/SID``, ``{"id":SID,"url":…}``."""
    client = await connect(await serve())
    response = await client.ask(post())
    assert response.status == 201
    assert response.json == {"id": response.json["id"], "url": response.headers["Location"]}
    assert response.headers["Location"] == f"/api/streams/{response.json['id']}"
    assert re.fullmatch(r"[A-Za-z0-9_-]{22,64}", response.json["id"])
    assert response.headers["Content-Type"].startswith("application/json")
    assert response.headers["Cache-Control"] == "no-store"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", response.headers["X-Request-ID"])


async def test_an_opened_stream_shows_how_the_client_stands(serve: Serve, connect: Connect) -> None:
    """Section 3: every admitted answer carries RateLimit and RateLimit-Policy; a POST costs a request."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="3/3600"))
    opened = [await client.ask(post()) for _ in range(2)]
    assert [remaining(response) for response in opened] == [2, 1]
    assert {response.headers["RateLimit-Policy"] for response in opened} == {'"requests";q=3;w=3600'}


async def test_the_bucket_is_the_same_for_both_ways_to_ask(serve: Serve, connect: Connect) -> None:
    client = await connect(await serve(SLUICE_RATE_LIMIT="2/3600"))
    assert (await client.ask(ASK)).status == 200
    assert (await client.ask(post())).status == 201
    assert (await client.ask(ASK)).error == "rate_limit_exceeded"
    assert (await client.ask(post())).error == "rate_limit_exceeded"


async def test_generation_starts_before_anybody_views_it(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """ "generation starts now"; and what was said meanwhile is not lost."""
    server = await serve()
    client = await connect(server)
    stream_id = await start(client)
    async with asyncio.timeout(PATIENCE):
        call = await upstream.called()
    await until(lambda: call.ended, within=PATIENCE)
    given = await view(f"{server.url}/api/streams/{stream_id}")
    assert (given.text, given.complete) == ("Hello", True)
    assert len(upstream.calls) == 1


async def test_every_opened_stream_has_an_id_of_its_own(serve: Serve, connect: Connect) -> None:
    client = await connect(await serve(SLUICE_RATE_LIMIT="off"))
    ids = {await start(client) for _ in range(8)}
    assert len(ids) == 8


async def test_a_post_is_one_request_line_and_one_stream_end_line(
    serve: Serve, connect: Connect, lines: LogLines
) -> None:
    """Section 7: one line a request and one a stream's end, which has the SID."""
    server = await serve()
    client = await connect(server)
    stream_id = await start(client)
    await until(lambda: lines("stream_end"), within=PATIENCE)
    [requested], [over] = lines("request"), lines("stream_end")
    assert (requested["method"], requested["path"], requested["status"]) == ("POST", "/api/streams", 201)
    assert (over["id"], over["outcome"], over["tokens"]) == (stream_id, "completed", 2)
    assert lines.failures == []


async def test_an_empty_bucket_refuses_a_post(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    client = await connect(await serve(SLUICE_RATE_LIMIT="1/3600"))
    await start(client)
    response = await client.ask(post())
    assert (response.status, response.error) == (429, "rate_limit_exceeded")
    assert 3500 < int(response.headers["Retry-After"]) <= 3600
    assert remaining(response) == 0
    await upstream.called()
    assert len(upstream.calls) == 1


async def test_a_client_has_its_places_and_no_more(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap
) -> None:
    """Row B20, for answers that nobody views: they count, and no token is spent on the refusal."""
    server = await serve(SLUICE_MAX_STREAMS_PER_CLIENT="2", SLUICE_RATE_LIMIT="4/3600")
    client = await connect(server)
    for _ in range(2):
        await start(client)
    response = await client.ask(post())
    assert (response.status, response.error) == (429, "too_many_streams")
    assert int(response.headers["Retry-After"]) > 0
    assert await start(client, ELSEWHERE)
    assert (await client.ask(ASK)).error == "too_many_streams"
    await upstream.called(3)
    assert len(upstream.calls) == 3


async def test_all_clients_together_have_their_places_and_no_more(
    serve: Serve, connect: Connect, tap: Tap, settled: Settled
) -> None:
    server = await serve(SLUICE_MAX_STREAMS="1")
    client = await connect(server)
    stream_id = await start(client)
    response = await client.ask(post(CHAT, ELSEWHERE))
    assert (response.status, response.error) == (503, "overloaded")
    assert int(response.headers["Retry-After"]) > 0
    assert (await client.ask(delete(stream_id))).status == 204
    assert await start(client, ELSEWHERE)


async def test_a_draining_server_opens_nothing(serve: Serve, connect: Connect, tap: Tap, settled: Settled) -> None:
    """503 shutting_down, on a connection that was there before."""
    server = await serve()
    client = await connect(server)
    stream_id = await start(client)
    drain = asyncio.create_task(server.serving.drain(20, cut_short=asyncio.Event()))
    await asyncio.sleep(0)
    response = await client.ask(post())
    assert (response.status, response.error) == (503, "shutting_down")
    assert int(response.headers["Retry-After"]) > 0
    assert (await client.ask(delete(stream_id))).status == 204
    await settled(server)
    await drain


# ---- GET /api/streams/SID


async def test_a_view_is_the_stream_that_a_question_gets(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """ "the same events as section 3, from the start", with the same headers."""
    client = await connect(await serve())
    stream_id = await start(client)
    viewed, asked = await client.ask(get(stream_id)), await client.ask(ASK)
    assert viewed.status == 200
    assert viewed.complete
    timing = re.compile(rb'_ms":\d+')
    own_id = re.search(rb'"id":"([^"]+)"', asked.body)
    assert own_id is not None
    expected = asked.body.replace(own_id[1], stream_id.encode())
    assert timing.sub(b"", viewed.body) == timing.sub(b"", expected)
    varying = {"Date", "X-Request-ID", "RateLimit"}
    assert {**viewed.headers, **dict.fromkeys(varying)} == {**asked.headers, **dict.fromkeys(varying)}


async def test_any_number_may_view_at_once(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, settled: Settled
) -> None:
    """Each from the start, whenever it comes, and each all of it; for one upstream call and one place."""
    server = await serve(SLUICE_MAX_STREAMS_PER_CLIENT="1")
    client = await connect(server)
    stream_id = await start(client)
    viewers = []
    for number in range(6):
        tap.say(str(number))
        await shown(server, stream_id, number + 1)
        viewers.append(asyncio.create_task(view(f"{server.url}/api/streams/{stream_id}")))
        await until(lambda: server.desk.viewers == len(viewers), within=PATIENCE)
    tap.finish()
    answers = await asyncio.gather(*viewers)
    assert {bytes(given.raw) for given in answers} == {bytes(answers[0].raw)}
    assert (answers[0].text, answers[0].complete) == ("012345", True)
    assert len(upstream.calls) == 1
    await settled(server)


async def test_a_finished_answer_can_be_read_again(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """Within SLUICE_RESUME_WINDOW, byte for byte; it holds no place meanwhile."""
    server = await serve(SLUICE_MAX_STREAMS_PER_CLIENT="1")
    client = await connect(server)
    stream_id, first = await ended(client)
    assert server.desk.streams == 0
    for _ in range(3):
        assert (await client.ask(get(stream_id))).body == first
    assert first.endswith(b"data: [DONE]\n\n")
    assert len(upstream.calls) == 1
    await settled(server)


async def test_an_answer_to_a_question_can_be_read_again_by_its_id(serve: Serve, connect: Connect) -> None:
    """The streams of both URLs are of one kind."""
    client = await connect(await serve())
    asked = (await client.ask(ASK)).body
    stream_id = json.loads(asked.partition(b"data: ")[2].partition(b"\n")[0])["id"]
    assert (await client.ask(get(stream_id))).body == asked


@pytest.mark.parametrize(
    "stream_id", [UNKNOWN, "x", "..", "%2e%2e", "%00", "%ff", "a%2Fb", "😀", "%20", UNKNOWN + ".0", "a" * 8000]
)
async def test_an_unknown_stream_is_404(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, stream_id: str
) -> None:
    """Without ``Last-Event-ID``: a status, since nobody waits for its events."""
    client = await connect(await serve())
    response = await client.ask(get("".join(c if c.isascii() else "%F0%9F%98%80" for c in stream_id)))
    assert response.status == 404
    assert response.error in ("stream_not_found", "not_found")
    assert len(response.body) < 300
    assert upstream.calls == []
    assert lines.failures == []


async def test_an_unknown_stream_is_told_by_its_code(serve: Serve, connect: Connect) -> None:
    client = await connect(await serve())
    assert (await client.ask(get(UNKNOWN))).error == "stream_not_found"


# ---- Last-Event-ID

Going = Callable[..., bytes]

WAYS: dict[str, Going] = {
    "stream, header": lambda stream_id, seen, *more: get(stream_id, f"Last-Event-ID: {seen}", *more),
    "stream, query": lambda stream_id, seen, *more: get(f"{stream_id}?last_event_id={seen}", *more),
    "question, header": lambda stream_id, seen, *more: request("/api/stream?q=hi", f"Last-Event-ID: {seen}", *more),
    "question, query": lambda stream_id, seen, *more: request(f"/api/stream?q=hi&last_event_id={seen}", *more),
}
each_way = pytest.mark.parametrize("going", WAYS.values(), ids=WAYS.keys())


@each_way
async def test_a_viewer_goes_on_behind_the_event_that_it_saw(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, going: Going
) -> None:
    """Nothing lost, nothing twice, no second upstream call: what is missing is exactly what was seen."""
    server = await serve()
    client = await connect(server)
    stream_id, whole = await ended(client)
    for number in range(4):
        response = await client.ask(going(stream_id, f"{stream_id}.{number}"))
        assert (response.status, response.complete) == (200, True)
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.body == b"".join(re.findall(rb".+?\n\n", whole, re.DOTALL)[number + 1 :])
    assert len(upstream.calls) == 1


@each_way
async def test_a_viewer_goes_on_with_an_answer_that_runs(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, settled: Settled, going: Going
) -> None:
    """Also from the very last event so far: then it waits for the next."""
    server = await serve()
    client, viewer = await connect(server), await connect(server)
    stream_id = await start(client)
    tap.say("one", "two")
    await shown(server, stream_id, 2)
    await viewer.send(going(stream_id, f"{stream_id}.2"))
    assert (await viewer.read_head()).status == 200
    tap.say("three")
    rest = await viewer.read_until(b'{"token":"three"}\n\n')
    assert b"one" not in rest
    assert b"two" not in rest
    assert f"id: {stream_id}.3\n".encode() in rest
    tap.finish()
    await viewer.read_until(b"data: [DONE]\n\n")
    assert len(upstream.calls) == 1
    await settled(server)


@pytest.mark.parametrize("target", ["/api/streams/{}", "/api/stream"])
async def test_the_header_wins_over_the_query(serve: Serve, connect: Connect, target: str) -> None:
    """An EventSource keeps its URL when it comes back, and only the header tells where it is by then."""
    server = await serve()
    client = await connect(server)
    stream_id, _ = await ended(client)
    url = f"{target.format(stream_id)}?last_event_id={stream_id}.0"
    response = await client.ask(request(url, f"Last-Event-ID: {stream_id}.2"))
    assert re.findall(rb"id: [\w-]+\.(\d+)", response.body) == [b"3", b"4"]


@each_way
@pytest.mark.parametrize("number", ["4", "5", "99", "9" * 20])
async def test_who_has_seen_all_is_told_not_to_come_back(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, going: Going, number: str
) -> None:
    """At or past the last event of a finished stream: 204, upon which an EventSource stops reconnecting."""
    server = await serve()
    client = await connect(server)
    stream_id, whole = await ended(client)
    assert whole.endswith(b".4\ndata: [DONE]\n\n")
    response = await client.ask(going(stream_id, f"{stream_id}.{number}"))
    assert (response.status, response.body) == (204, b"")
    assert "Content-Type" not in response.headers
    assert (await client.ask(get(stream_id))).status == 200
    assert len(upstream.calls) == 1


async def test_that_all_has_been_seen_is_for_no_cache(serve: Serve, connect: Connect) -> None:
    """A 204 may be stored by default, and the next question of the same text would get it (RFC 9111 §4.2.2, S22)."""
    server = await serve()
    client = await connect(server)
    stream_id, _ = await ended(client)
    response = await client.ask(WAYS["question, header"](stream_id, f"{stream_id}.4"))
    assert (response.status, response.headers["Cache-Control"]) == (204, "no-store")


@each_way
@pytest.mark.parametrize("number", ["2", "3", "1000", "9" * 20])
async def test_an_event_that_a_running_stream_has_not_reached_is_400(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, going: Going, number: str
) -> None:
    server = await serve()
    client = await connect(server)
    stream_id = await start(client)
    tap.say("a")
    await shown(server, stream_id, 1)
    response = await client.ask(going(stream_id, f"{stream_id}.{number}"))
    assert (response.status, response.error) == (400, "invalid_last_event_id")
    assert len(upstream.calls) == 1


MALFORMED = {
    "empty": "",
    "no number": "SID",
    "an empty number": "SID.",
    "a negative number": "SID.-1",
    "a signed number": "SID.+1",
    "an exponent": "SID.1e3",
    "a fraction": "SID.1.0",
    "hexadecimal": "SID.0x1",
    "an underscore": "SID.1_0",
    "an Arabic digit": "SID.%D9%A3",
    "a full-width digit": "SID.%EF%BC%93",
    "a superscript": "SID.%C2%B2",
    "a space within": "SID.%201",
    "a second id": "SID.1,SID.2",
    "no id": ".1",
    "an id too short": "abc.1",
    "an id too long": "a" * 65 + ".1",
    "an id of other characters": "SID!.1",
    "not ASCII": "S%C3%A9D.1",
    "not UTF-8": "SID.1%FF",
    "7 kB": "SID." + "1" * 7000,
}


@pytest.mark.parametrize("going", [WAYS["stream, header"], WAYS["question, query"]], ids=["header", "query"])
@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_last_event_id_is_400(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, going: Going, value: str
) -> None:
    """Row A23: not ``SID.N`` with N a plain decimal; never taken for a fresh question, which would cost an answer."""
    server = await serve()
    client = await connect(server)
    stream_id, _ = await ended(client)
    value = value.replace("SID", stream_id)
    data = going(stream_id, value)
    if b"Last-Event-ID: " in data:  # a header is not percent-encoded
        data = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), data)
    response = await client.ask(data)
    assert (response.status, response.error) == (400, "invalid_last_event_id")
    assert len(response.body) < 300
    assert len(upstream.calls) == 1
    assert lines.failures == []


@each_way
@pytest.mark.parametrize("value", ["SID.1\0", "SID.1\r", "SID.1" + "1" * 10_000], ids=["NUL", "CR", "10 kB"])
async def test_what_no_header_may_hold_is_400_too(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, going: Going, value: str
) -> None:
    """Row A23: where it stands in a header it is refused by the parser."""
    server = await serve()
    client = await connect(server)
    stream_id, _ = await ended(client)
    data = going(stream_id, value.replace("SID", stream_id))
    if b"Last-Event-ID: " not in data:
        data = data.replace(b"\0", b"%00").replace(b"1\r ", b"1%0D ")
    assert (await client.ask(data)).status == 400
    assert len(upstream.calls) == 1


TWICE: dict[str, Going] = {
    "stream, headers": lambda sid: get(sid, f"Last-Event-ID: {sid}.1", f"Last-Event-ID: {sid}.1"),
    "stream, query": lambda sid: get(f"{sid}?last_event_id={sid}.1&last_event_id={sid}.1"),
    "question, headers": lambda sid: request("/api/stream", f"Last-Event-ID: {sid}.1", f"Last-Event-ID: {sid}.2"),
    "question, query": lambda sid: request(f"/api/stream?last_event_id={sid}.1&last_event_id={sid}.2"),
}


@pytest.mark.parametrize("twice", TWICE.values(), ids=TWICE.keys())
async def test_a_last_event_id_given_twice_is_400(serve: Serve, connect: Connect, twice: Going) -> None:
    """Row A23: never silently the first."""
    server = await serve()
    client = await connect(server)
    stream_id, _ = await ended(client)
    response = await client.ask(twice(stream_id))
    assert (response.status, response.error) == (400, "invalid_last_event_id")


@pytest.mark.parametrize("going", [WAYS["stream, header"], WAYS["stream, query"]], ids=["header", "query"])
@pytest.mark.parametrize("other", ["known", "unknown"])
async def test_a_last_event_id_of_another_stream_is_400(
    serve: Serve, connect: Connect, going: Going, other: str
) -> None:
    """Row A23: under /api/streams/SID only SID's own events can have been seen."""
    server = await serve()
    client = await connect(server)
    stream_id, _ = await ended(client)
    another = (await ended(client))[0] if other == "known" else UNKNOWN
    response = await client.ask(going(stream_id, f"{another}.1"))
    assert (response.status, response.error) == (400, "invalid_last_event_id")


@each_way
@pytest.mark.parametrize("number", ["0", "7", "9" * 20])
async def test_a_stream_that_is_not_there_any_more_is_told_in_band(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, going: Going, number: str
) -> None:
    """A script cannot read an EventSource's status: 200 and ``interrupted``; never a silent second generation."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="5/3600"))
    response = await client.ask(going(UNKNOWN, f"{UNKNOWN}.{number}"))
    assert (response.status, response.complete) == (200, True)
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    match = re.fullmatch(rf"id: {UNKNOWN}\.\d+\ndata: (.+)\n\n", response.body.decode())
    assert match is not None
    error = json.loads(match[1])
    assert error == {"error": "interrupted", "message": error["message"], "retryable": True}
    assert remaining(response) == 5
    assert upstream.calls == []


QUERIES = ["", "?q=", "?q=" + "a" * 1001, "?q=%ff", "?q=%00", "?q=a&q=b", "?x=1"]


@pytest.mark.parametrize("query", QUERIES, ids=[query[:6] or "none" for query in QUERIES])
async def test_with_a_last_event_id_the_question_is_not_looked_at(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, query: str
) -> None:
    """ "`q` is not looked at", be it missing, too long or no text at all."""
    server = await serve()
    client = await connect(server)
    stream_id, whole = await ended(client)
    response = await client.ask(request(f"/api/stream{query}", f"Last-Event-ID: {stream_id}.0"))
    assert response.status == 200
    assert whole.endswith(response.body)
    assert len(upstream.calls) == 1


# ---- Coming back costs nothing


@each_way
async def test_coming_back_spends_no_token(serve: Serve, connect: Connect, going: Going) -> None:
    """Whatever comes of it: the rest, 204, in-band ``interrupted``, 400."""
    server = await serve(SLUICE_RATE_LIMIT="5/3600")
    client = await connect(server)
    stream_id, _ = await ended(client)
    for number, status in ((1, 200), (4, 204)):
        response = await client.ask(going(stream_id, f"{stream_id}.{number}"))
        assert (response.status, remaining(response)) == (status, 4)
    assert (await client.ask(going(stream_id, "x"))).status == 400
    assert remaining(await client.ask(post())) == 3


async def test_viewing_spends_no_token(serve: Serve, connect: Connect) -> None:
    """It was spent on the POST; one who views tells how the client stands all the same."""
    server = await serve(SLUICE_RATE_LIMIT="2/3600")
    client = await connect(server)
    stream_id = await start(client)
    assert [remaining(await client.ask(get(stream_id))) for _ in range(5)] == [1] * 5


@each_way
async def test_who_has_nothing_left_may_come_back(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, going: Going
) -> None:
    """With an empty bucket and every place taken, its own and the server's: the answer has a place already."""
    server = await serve(SLUICE_RATE_LIMIT="1/3600", SLUICE_MAX_STREAMS_PER_CLIENT="1", SLUICE_MAX_STREAMS="1")
    client, viewer = await connect(server), await connect(server)
    stream_id = await start(client)
    tap.say("one", "two")
    await shown(server, stream_id, 2)
    assert (await client.ask(ASK)).error == "too_many_streams"
    await viewer.send(going(stream_id, f"{stream_id}.1"))
    response = await viewer.read_head()
    assert (response.status, remaining(response)) == (200, 0)
    await viewer.read_until(b'{"token":"two"}\n\n')
    assert (await client.ask(delete(stream_id))).status == 204
    await viewer.read_until(b"[DONE]\n\n")
    assert (await client.ask(ASK)).error == "rate_limit_exceeded"
    assert len(upstream.calls) == 1


@each_way
async def test_one_may_come_back_while_the_server_drains(
    serve: Serve, connect: Connect, tap: Tap, settled: Settled, going: Going
) -> None:
    """Over a connection that was there before: who was cut off by a proxy's restart still gets the rest."""
    server = await serve()
    client = await connect(server)
    stream_id = await start(client)
    tap.say("one", "two")
    await shown(server, stream_id, 2)
    drain = asyncio.create_task(server.serving.drain(20, cut_short=asyncio.Event()))
    await asyncio.sleep(0)
    await client.send(going(stream_id, f"{stream_id}.1"))
    assert (await client.read_head()).status == 200
    tap.say("three")
    tap.finish()
    rest = await client.read_until(b"data: [DONE]\n\n")
    assert b'{"token":"two"}' in rest
    assert b'{"token":"one"}' not in rest
    await settled(server)
    await drain


# ---- The grace


async def _gone_after(upstream: ScriptedUpstream, since: float) -> float:
    """Wait for the upstream's call to be closed; how long after ``since`` (s) that was."""
    async with asyncio.timeout(PATIENCE):
        call = await upstream.called()
        await call.gone()
    assert call.gone_at is not None
    return call.gone_at - since


def _now() -> float:
    return asyncio.get_running_loop().time()


async def test_an_answer_that_nobody_comes_to_view_is_stopped(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, lines: LogLines, settled: Settled
) -> None:
    """ "its generation stops; a later viewer gets what there was, then `interrupted`, `retryable: true`"."""
    tap.say("a", "b")
    server = await serve(SLUICE_RESUME_GRACE="0.4")
    client = await connect(server)
    opened_at = _now()
    stream_id = await start(client)
    assert await _gone_after(upstream, opened_at) >= 0.35
    await settled(server)
    given = await view(f"{server.url}/api/streams/{stream_id}")
    assert [event.type for event in given.events] == ["start", "message", "message", "message"]
    assert (given.text, given.complete) == ("ab", False)
    assert (given.error["error"], given.error["retryable"]) == ("interrupted", True)
    assert [line["outcome"] for line in lines("stream_end")] == ["client_gone"]
    assert lines.failures == []


async def test_an_answer_that_nobody_comes_back_to_is_stopped(
    serve: Serve, upstream: ScriptedUpstream, tap: Tap, settled: Settled
) -> None:
    """Row B4: after the grace, not before; who comes later gets the rest of what there was, then ``interrupted``."""
    tap.say("a", "b")
    server = await serve(SLUICE_RESUME_GRACE="0.5")
    async with open_stream(server.url, Accept=EVENT_STREAM) as stream:
        assert await stream.token() == "a"
        seen = stream.answer.events[-1].id
    left_at = _now()
    assert await _gone_after(upstream, left_at) >= 0.4
    await settled(server)
    rest = await view(f"{server.url}/api/stream?q=hi", Last_Event_ID=seen)
    assert rest.tokens == ["b"]
    assert (rest.error["error"], rest.error["retryable"]) == ("interrupted", True)
    assert rest.events[-1].number == 3
    last = rest.events[-1].id
    assert (await view(f"{server.url}/api/stream?q=hi", Last_Event_ID=last)).status == 204
    assert len(upstream.calls) == 1


async def test_an_answer_that_somebody_comes_back_to_goes_on(
    serve: Serve, upstream: ScriptedUpstream, tap: Tap, settled: Settled
) -> None:
    """Row B4: the grace is over as soon as somebody is there, and the next drop has a whole one again."""
    server = await serve(SLUICE_RESUME_GRACE="0.8")
    seen: dict[str, str] = {}
    texts = []
    for round_ in range(4):
        tap.say(str(round_))
        async with open_stream(server.url, Accept=EVENT_STREAM, **seen) as stream:
            texts.append(await stream.token())
            await asyncio.sleep(0.1)
        seen = {"Last_Event_ID": stream.answer.events[-1].id}
        await asyncio.sleep(0.3)
    tap.finish()
    rest = await view(f"{server.url}/api/stream", **seen)
    assert rest.complete
    assert texts == ["0", "1", "2", "3"]
    assert len(upstream.calls) == 1
    await settled(server)


@pytest.mark.parametrize("url", ["/api/stream?q=hi", "/api/streams/SID"])
@pytest.mark.parametrize(
    ("accept", "resumable"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream;q=0.9, */*", True),
        ("application/json, text/event-stream", True),
        ("*/*", False),
        ("text/*", False),
        ("text/event-streams", False),
        ("application/json", False),
    ],
)
async def test_who_can_resume_is_told_by_accept(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, url: str, accept: str, resumable: bool
) -> None:
    """Section 3: "its request said ``Accept: text/event-stream``"; any other client's leaving ends it at once."""
    tap.say("a")
    server = await serve(SLUICE_RESUME_GRACE="30")
    if "SID" in url:
        url = url.replace("SID", await start(await connect(server)))
    async with open_view(server.url + url, Accept=accept) as stream:
        await stream.token()
    left_at = _now()
    if resumable:
        await asyncio.sleep(0.2)
        assert len(upstream.open_calls) == 1
    else:
        assert await _gone_after(upstream, left_at) < PATIENCE


async def test_a_client_without_accept_cannot_resume(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, settled: Settled
) -> None:
    tap.say("a")
    server = await serve(SLUICE_RESUME_GRACE="30")
    client = await connect(server)
    await client.send(ASK)
    await client.read_until(b'{"token":"a"}')
    client.close()
    await settled(server)


async def test_without_a_grace_an_answer_stops_with_its_last_viewer(
    serve: Serve, upstream: ScriptedUpstream, tap: Tap, settled: Settled
) -> None:
    """``SLUICE_RESUME_GRACE=0``: "stop at once", even one that could come back."""
    tap.say("a")
    server = await serve(SLUICE_RESUME_GRACE="0")
    async with open_stream(server.url, Accept=EVENT_STREAM) as stream:
        await stream.token()
    await settled(server)


async def test_without_a_grace_what_was_posted_can_still_be_viewed(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A viewer that has not come yet has not dropped: it has a moment, but no more than that."""
    monkeypatch.setattr("server.relay.life._FIRST_VIEWER", 0.5)
    server = await serve(SLUICE_RESUME_GRACE="0")
    client = await connect(server)
    first = await start(client)
    tap.say("a")
    tap.finish()
    assert (await view(f"{server.url}/api/streams/{first}", Accept=EVENT_STREAM)).complete
    await start(client)
    await upstream.called(2)
    await until(lambda: not upstream.open_calls, within=PATIENCE)


async def test_finish_brings_what_nobody_views_to_its_end(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, settled: Settled
) -> None:
    """``SLUICE_RESUME_GRACE=finish``: "always to its end", opened by POST or left by its only viewer."""
    server = await serve(SLUICE_RESUME_GRACE="finish")
    client = await connect(server)
    async with open_stream(server.url, Accept=EVENT_STREAM) as stream:
        left = (await anext(aiter(stream))).json["id"]
    posted = await start(client)
    await upstream.called(2)
    await asyncio.sleep(0.3)
    assert len(upstream.open_calls) == 2
    for _ in range(2):
        tap.say("a")
        tap.finish()
    await settled(server)
    for stream_id in (left, posted):
        assert (await view(f"{server.url}/api/streams/{stream_id}")).complete


async def test_one_viewer_that_stays_keeps_the_answer_going(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, settled: Settled
) -> None:
    """Whoever leaves, and whoever stays: the one that can resume, or the one that cannot."""
    server = await serve(SLUICE_RESUME_GRACE="0.2")
    client = await connect(server)
    url = f"{server.url}/api/streams/{await start(client)}"
    tap.say("a")
    async with open_view(url) as curl:
        async with open_view(url, Accept=EVENT_STREAM) as page:
            await page.token()
            await curl.token()
        await asyncio.sleep(0.4)  # the page's grace passes
        tap.say("b")
        assert await curl.token() == "b"
        async with open_view(url, Accept=EVENT_STREAM) as page:
            await page.token()
            await curl.close()
            await asyncio.sleep(0.3)
            tap.say("c")
            assert [await page.token() for _ in range(2)] == ["b", "c"]
            tap.finish()
            await page.read_all()
            assert page.answer.complete
    await settled(server)


async def test_one_that_cannot_resume_does_not_take_the_grace_of_one_that_can(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, settled: Settled
) -> None:
    """Mixed viewers: "after its last resumable viewer dropped", even if curl is the last to leave."""
    server = await serve(SLUICE_RESUME_GRACE="1")
    client = await connect(server)
    stream_id = await start(client)
    url = f"{server.url}/api/streams/{stream_id}"
    tap.say("a")
    async with open_view(url) as curl:
        async with open_view(url, Accept=EVENT_STREAM) as page:
            await page.token()
        left_at = _now()
        await curl.token()
    assert await _gone_after(upstream, left_at) >= 0.9
    await settled(server)


async def test_the_places_of_those_that_were_left_are_free_again(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, settled: Settled
) -> None:
    """An answer within its grace holds its place; one that was stopped for want of viewers does not."""
    server = await serve(SLUICE_RESUME_GRACE="0.3", SLUICE_MAX_STREAMS_PER_CLIENT="1")
    client = await connect(server)
    await start(client)
    assert (await client.ask(post())).error == "too_many_streams"
    await settled(server)
    await start(client)


# ---- The window


@pytest.mark.parametrize("window", ["0", "0.3"])
async def test_after_its_window_a_stream_is_unknown(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, window: str
) -> None:
    """SLUICE_RESUME_WINDOW: 404 without ``Last-Event-ID``, in-band ``interrupted`` with it, and DELETE knows it not."""
    server = await serve(SLUICE_RESUME_WINDOW=window)
    client = await connect(server)
    stream_id, _ = await ended(client)
    await until(lambda: server.desk.find(stream_id) is None, within=PATIENCE)
    assert (await client.ask(get(stream_id))).error == "stream_not_found"
    for going in WAYS.values():
        response = await client.ask(going(stream_id, f"{stream_id}.4"))
        assert response.status == 200
        assert b'"error":"interrupted"' in response.body
    assert (await client.ask(delete(stream_id))).error == "stream_not_found"
    assert len(upstream.calls) == 1


async def test_the_window_begins_at_the_end(serve: Serve, connect: Connect, tap: Tap) -> None:
    """A long answer is kept no shorter than a short one."""
    server = await serve(SLUICE_RESUME_WINDOW="0.5")
    client = await connect(server)
    stream_id = await start(client)
    async with open_view(f"{server.url}/api/streams/{stream_id}") as stream:
        tap.say("a")
        await stream.token()
        await asyncio.sleep(0.7)
        tap.finish()
        await stream.read_all()
    assert (await client.ask(get(stream_id))).status == 200


async def test_an_answer_that_is_too_large_ends_so_and_can_be_replayed(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, settled: Settled
) -> None:
    """SLUICE_MAX_ANSWER_BYTES: ``answer_too_large``, not retryable; the upstream is closed; the log stays in bounds."""

    async def flood(call: Call) -> None:
        await call.head()
        for _ in range(100):
            await call.token("x" * 50)
        await call.gone()

    upstream.script = flood
    server = await serve(SLUICE_MAX_ANSWER_BYTES="2048")
    client = await connect(server)
    stream_id = await start(client)
    await until(lambda: lines("stream_end"), within=PATIENCE)
    first = await client.ask(get(stream_id))
    assert len(first.body) < 2048 + 300
    last = first.body.rpartition(b"data: ")[2]
    assert {**json.loads(last), "message": ""} == {"error": "answer_too_large", "message": "", "retryable": False}
    assert (await client.ask(get(stream_id))).body == first.body
    seen = int(re.findall(rb"id: [\w-]+\.(\d+)", first.body)[-1])
    assert (await client.ask(get(stream_id, f"Last-Event-ID: {stream_id}.{seen}"))).status == 204
    assert [line["outcome"] for line in lines("stream_end")] == ["too_large"]
    await settled(server)


@pytest.mark.parametrize("size", [900, 990, 1000, 1010, 1100])
async def test_an_answer_of_just_the_bound_is_whole_or_cut_in_order(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, size: int
) -> None:
    """The last events always fit: whatever the size, there is exactly one end."""
    upstream.script = answer(["x" * size])
    server = await serve(SLUICE_MAX_ANSWER_BYTES="1024")
    client = await connect(server)
    _, whole = await ended(client)
    assert whole.count(b"[DONE]") + whole.count(b'"error":"answer_too_large"') == 1
    assert (b"[DONE]" in whole) is (b"x" * size in whole)


# ---- DELETE /api/streams/SID


async def test_a_stopped_answer_ends_in_order_and_at_once(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, lines: LogLines, settled: Settled
) -> None:
    """204; the upstream request is closed; viewers get usage with finish_reason ``cancelled``, then ``[DONE]``."""
    server = await serve(SLUICE_RESUME_GRACE="30")
    client = await connect(server)
    stream_id = await start(client)
    tap.say("a", "b")
    url = f"{server.url}/api/streams/{stream_id}"
    async with open_view(url) as one, open_view(url, Accept=EVENT_STREAM) as other:
        for stream in (one, other):
            assert [await stream.token() for _ in range(2)] == ["a", "b"]
        stopped_at = _now()
        response = await client.ask(delete(stream_id))
        assert (response.status, response.body) == (204, b"")
        assert await _gone_after(upstream, stopped_at) < PATIENCE
        for stream in (one, other):
            await stream.read_all()
            assert [event.type for event in stream.answer.events] == ["start", "message", "message", "usage", "message"]
            assert stream.answer.usage["finish_reason"] == "cancelled"
            assert stream.answer.usage["tokens"] == 2
            assert stream.answer.events[-1].data == "[DONE]"
            assert stream.answer.error is None
    await settled(server)
    assert [line["outcome"] for line in lines("stream_end")] == ["stopped"]
    assert lines.failures == []


async def test_stopping_again_is_204_again(serve: Serve, connect: Connect, tap: Tap) -> None:
    server = await serve()
    client = await connect(server)
    stream_id = await start(client)
    assert [(await client.ask(delete(stream_id))).status for _ in range(3)] == [204] * 3


async def test_two_may_stop_at_once(serve: Serve, connect: Connect, tap: Tap, lines: LogLines) -> None:
    """Row B23."""
    server = await serve()
    clients = [await connect(server) for _ in range(4)]
    stream_id = await start(clients[0])
    responses = await asyncio.gather(*(client.ask(delete(stream_id)) for client in clients))
    assert [response.status for response in responses] == [204] * 4
    await until(lambda: lines("stream_end"), within=PATIENCE)
    assert len(lines("stream_end")) == 1


async def test_stopping_what_is_over_changes_nothing(serve: Serve, connect: Connect, lines: LogLines) -> None:
    server = await serve()
    client = await connect(server)
    stream_id, whole = await ended(client)
    assert (await client.ask(delete(stream_id))).status == 204
    assert (await client.ask(get(stream_id))).body == whole
    assert [line["outcome"] for line in lines("stream_end")] == ["completed"]


async def test_a_stopped_answer_can_be_replayed(serve: Serve, connect: Connect, tap: Tap) -> None:
    """Within the window, as any other: a second tab must come to the same end."""
    server = await serve()
    client, viewer = await connect(server), await connect(server)
    stream_id = await start(client)
    await viewer.send(get(stream_id))
    await viewer.read_head()
    tap.say("a")
    await shown(server, stream_id, 1)
    await client.ask(delete(stream_id))
    replayed = await client.ask(get(stream_id))
    assert b'"finish_reason":"cancelled"' in replayed.body
    assert replayed.body.endswith(b".3\ndata: [DONE]\n\n")
    assert (await client.ask(get(stream_id, f"Last-Event-ID: {stream_id}.3"))).status == 204


@pytest.mark.parametrize("stream_id", [UNKNOWN, "x", "%00", "%ff", "a" * 5000])
async def test_an_unknown_stream_cannot_be_stopped(serve: Serve, connect: Connect, stream_id: str) -> None:
    client = await connect(await serve())
    response = await client.ask(delete(stream_id))
    assert (response.status, response.error) == (404, "stream_not_found")


@pytest.mark.parametrize(("path", "status"), [("/api/streams", 405), ("/api/streams/", 404)])
async def test_without_an_id_nothing_is_stopped(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, path: str, status: int
) -> None:
    """Row B23."""
    client = await connect(await serve())
    await start(client)
    await upstream.called()
    response = await client.ask(request(path, method="DELETE"))
    assert response.status == status
    assert len(upstream.open_calls) == 1


async def test_somebody_elses_stream_is_as_good_as_unknown(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap
) -> None:
    """404 and nothing stopped, in the very words that an unknown id gets: who guesses learns nothing."""
    server = await serve()
    client = await connect(server)
    stream_id = await start(client)
    await upstream.called()
    refused, unknown = await client.ask(delete(stream_id, ELSEWHERE)), await client.ask(delete(UNKNOWN, ELSEWHERE))
    assert (refused.status, refused.error) == (404, "stream_not_found")
    assert refused.body == unknown.body
    assert refused.headers.keys() == unknown.headers.keys()
    assert len(upstream.open_calls) == 1
    tap.say("a")
    tap.finish()
    assert (await view(f"{server.url}/api/streams/{stream_id}")).complete
    assert (await client.ask(delete(stream_id, ELSEWHERE))).status == 404


async def test_the_one_it_was_opened_for_may_stop_it_over_any_connection(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, settled: Settled
) -> None:
    server = await serve()
    stream_id = await start(await connect(server), ELSEWHERE)
    response = await (await connect(server)).ask(delete(stream_id, ELSEWHERE.replace("X-Real-IP", "X-Forwarded-For")))
    assert response.status == 204
    await settled(server)


async def test_a_question_can_be_stopped_by_its_streams_id(
    serve: Serve, connect: Connect, tap: Tap, settled: Settled
) -> None:
    """The page's Stop button works for an answer that ``/api/stream?q=`` opened."""
    server = await serve(SLUICE_RESUME_GRACE="30")
    async with open_stream(server.url, Accept=EVENT_STREAM) as stream:
        stream_id = (await anext(aiter(stream))).json["id"]
        assert (await (await connect(server)).ask(delete(stream_id))).status == 204
        await stream.read_all()
        assert (stream.answer.usage["finish_reason"], stream.answer.complete) == ("cancelled", True)
    await settled(server)


async def _before_the_head(call: Call) -> None:
    await call.gone()


async def _before_the_first_token(call: Call) -> None:
    await call.head()
    await call.gone()


async def _during_a_back_off(call: Call) -> None:
    await call.refuse(503, Retry_After="20")


@pytest.mark.parametrize("script", [_before_the_head, _before_the_first_token, _during_a_back_off])
async def test_an_answer_can_be_stopped_before_it_says_anything(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled, script: Script
) -> None:
    """Rows B2, B23: no further try is made, and the viewers still get their two last events."""
    upstream.script = script
    server = await serve(SLUICE_FIRST_TOKEN_TIMEOUT="30")
    client = await connect(server)
    stream_id = await start(client)
    async with open_view(f"{server.url}/api/streams/{stream_id}") as stream:
        assert (await anext(aiter(stream))).type == "start"
        await upstream.called()
        if script is _during_a_back_off:
            await until(lambda: not upstream.open_calls, within=PATIENCE)
        assert (await client.ask(delete(stream_id))).status == 204
        await stream.read_all()
    assert [event.type for event in stream.answer.events] == ["start", "usage", "message"]
    assert stream.answer.usage["finish_reason"] == "cancelled"
    assert stream.answer.usage["tokens"] == 0
    assert stream.answer.usage["ttft_ms"] is None
    assert stream.answer.complete
    await settled(server)
    await asyncio.sleep(0.05)
    assert len(upstream.calls) == 1


async def test_an_answer_can_be_stopped_as_soon_as_it_is_opened(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, lines: LogLines, settled: Settled
) -> None:
    """Before the upstream has even been connected to: each ends once, and no request is left behind."""
    server = await serve(SLUICE_RATE_LIMIT="off")
    client = await connect(server)
    for _ in range(20):
        stream_id = await start(client)
        assert (await client.ask(delete(stream_id))).status == 204
        assert (await client.ask(get(stream_id))).body.endswith(b"[DONE]\n\n")
    await settled(server)
    assert [line["outcome"] for line in lines("stream_end")] == ["stopped"] * 20
    assert lines.failures == []


async def test_a_viewer_that_reads_nothing_delays_no_stop(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Row B24: the others get the end at once, and so does the client that asked for it."""

    async def pour(call: Call) -> None:
        await call.head()
        for _ in range(700):
            await call.token("x" * 1000)
        await call.token("end")
        await call.gone()

    upstream.script = pour
    server = await serve()
    client, stuck = await connect(server), await connect(server, receive_buffer=4096)
    stream_id = await start(client)
    await stuck.send(get(stream_id))
    async with asyncio.timeout(10), open_view(f"{server.url}/api/streams/{stream_id}") as stream:
        while await stream.token() != "end":
            pass
        assert (await client.ask(delete(stream_id))).status == 204
        await stream.read_all()
    assert stream.answer.usage["finish_reason"] == "cancelled"
    await until(lambda: not upstream.open_calls, within=PATIENCE)
    assert server.desk.viewers == 1
    # And it still gets all of it, once it reads.
    await stuck.read_head()
    assert await stuck.read_until(b"data: [DONE]\n\n")


@pytest.mark.parametrize("ending", ["done", "reset", "too large"])
async def test_a_stop_that_races_the_end_leaves_one_end(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, settled: Settled, ending: str
) -> None:
    """Row B23: exactly one terminal event, whoever comes first, and the same for every viewer."""
    chance = random.Random(ending)

    async def script(call: Call) -> None:
        await call.head()
        await call.token("a")
        await asyncio.sleep(chance.random() / 100)
        if ending == "done":
            await call.finish()
            await call.done()
        elif ending == "reset":
            call.reset()
        else:
            await call.token("x" * 5000)
            await call.gone()

    upstream.script = script
    server = await serve(SLUICE_RATE_LIMIT="off", SLUICE_MAX_ANSWER_BYTES="4096")
    client, viewer = await connect(server), await connect(server)
    ends = set()
    for _ in range(30):
        stream_id = await start(client)
        await viewer.send(get(stream_id))
        await asyncio.sleep(chance.random() / 80)
        assert (await client.ask(delete(stream_id))).status == 204
        seen = (await viewer.read_response()).body
        assert seen == (await client.ask(get(stream_id))).body
        assert seen.count(b"[DONE]") + seen.count(b'"error":') == 1
        assert seen.count(b"event: usage") == seen.count(b"[DONE]")
        ends.add(b"cancelled" in seen)
    await settled(server)
    assert len(lines("stream_end")) == 30
    assert lines.failures == []
    print(f"{ending}: stopped in time and too late" if len(ends) == 2 else f"{ending}: cancelled {ends}")


async def test_stopping_spends_nothing_and_frees_the_place(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap
) -> None:
    """With an empty bucket too, or one who asked too much could not even stop it."""
    server = await serve(SLUICE_RATE_LIMIT="2/3600", SLUICE_MAX_STREAMS_PER_CLIENT="1")
    client = await connect(server)
    for _ in range(2):
        assert (await client.ask(delete(await start(client)))).status == 204
    assert (await client.ask(post())).error == "rate_limit_exceeded"


async def test_a_body_of_a_delete_is_read_and_dropped(serve: Serve, connect: Connect, tap: Tap) -> None:
    client = await connect(await serve())
    stream_id = await start(client)
    response = await client.ask(delete(stream_id, "Content-Length: 5") + b"hello")
    assert response.status == 204
    assert (await client.ask(get(stream_id))).status == 200


# ---- Other origins

GRANTED = [
    ("/api/streams", "POST", "content-type"),
    ("/api/streams", "POST", "authorization,content-type"),
    ("/api/streams/SID", "DELETE", ""),
    ("/api/streams/SID", "GET", "last-event-id"),
]


def preflight(target: str, origin: str, method: str, headers: str) -> bytes:
    wanted = [f"Access-Control-Request-Headers: {headers}"] if headers else []
    return request(target, f"Origin: {origin}", f"Access-Control-Request-Method: {method}", *wanted, method="OPTIONS")


@pytest.mark.parametrize(("target", "method", "headers"), GRANTED)
async def test_a_preflight_of_a_listed_page_is_granted(
    serve: Serve, connect: Connect, target: str, method: str, headers: str
) -> None:
    client = await connect(await serve(SLUICE_CORS_ORIGINS=LISTED))
    response = await client.ask(preflight(target, LISTED, method, headers))
    assert response.status in (200, 204)
    assert response.headers["Access-Control-Allow-Origin"] == LISTED
    assert method in response.headers["Access-Control-Allow-Methods"].split(",")
    granted = response.headers.get("Access-Control-Allow-Headers", "").lower().replace(" ", "").split(",")
    assert set(filter(None, headers.split(","))) <= set(granted)


@pytest.mark.parametrize(("target", "method", "headers"), GRANTED)
async def test_a_preflight_of_another_page_is_refused(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, target: str, method: str, headers: str
) -> None:
    client = await connect(await serve(SLUICE_CORS_ORIGINS=LISTED))
    response = await client.ask(preflight(target, "https://evil.example", method, headers))
    assert response.status == 403
    assert not [name for name in response.headers if name.lower().startswith("access-control-")]
    assert upstream.calls == []


CROSS_SITE = {
    "JSON": (["Origin: https://evil.example"], 403),
    "a form's text/plain": (["Origin: https://evil.example", "Content-Type: text/plain"], 403),
    "a form's text/plain from nowhere": (["Origin: null", "Content-Type: text/plain"], 403),
    "no-cors without an Origin": (["Sec-Fetch-Site: cross-site", "Content-Type: text/plain"], 403),
    "text/plain of an old browser": (["Content-Type: text/plain"], 415),
    "a form of an old browser": (["Content-Type: application/x-www-form-urlencoded"], 415),
    "JSON that is called a form": (["Content-Type: multipart/form-data; boundary=a"], 415),
}


@pytest.mark.parametrize(("headers", "status"), CROSS_SITE.values(), ids=CROSS_SITE.keys())
async def test_a_page_of_another_site_opens_nothing(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, headers: list[str], status: int
) -> None:
    """Rows A19, S4, S19: a page that may not read an answer may not cause one; and nothing is spent on it."""
    client = await connect(await serve(SLUICE_CORS_ORIGINS=LISTED, SLUICE_RATE_LIMIT="1/3600"))
    response = await client.ask(post(CHAT, *headers))
    assert response.status == status
    assert response.error == {403: "origin_not_allowed", 415: "unsupported_media_type"}[status]
    assert upstream.calls == []
    await start(client)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_page_of_another_site_neither_views_nor_stops(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, method: str
) -> None:
    client = await connect(await serve(SLUICE_CORS_ORIGINS=LISTED))
    stream_id = await start(client)
    await upstream.called()
    response = await client.ask(
        request(
            f"/api/streams/{stream_id}", "Origin: https://evil.example", f"Last-Event-ID: {stream_id}.0", method=method
        )
    )
    assert (response.status, response.error) == (403, "origin_not_allowed")
    assert len(upstream.open_calls) == 1


async def test_a_listed_page_may_read_every_answer(serve: Serve, connect: Connect) -> None:
    """Refusals too; and ``Location``, or it would not know what it has opened."""
    server = await serve(SLUICE_CORS_ORIGINS=LISTED, SLUICE_RATE_LIMIT="1/3600")
    client = await connect(server)
    origin = f"Origin: {LISTED}"
    opened = await client.ask(post(CHAT, origin))
    stream_id = opened.json["id"]
    for data, status in (
        (None, 201),
        (get(stream_id, origin), 200),
        (get(stream_id, origin, f"Last-Event-ID: {stream_id}.4"), 204),
        (get(stream_id, origin, f"Last-Event-ID: {UNKNOWN}.4"), 400),
        (get(UNKNOWN, origin), 404),
        (request("/api/stream", origin, f"Last-Event-ID: {UNKNOWN}.4"), 200),
        (delete(stream_id, origin), 204),
        (delete(UNKNOWN, origin), 404),
        (request("/api/streams", origin), 405),
        (post(CHAT, origin), 429),
        (post(b"{", origin), 400),
        (post(CHAT, origin, "Content-Type: text/plain"), 415),
        (post(b" " * (1 << 20) + CHAT, origin), 413),
    ):
        response = opened if data is None else await client.ask(data)
        assert response.status == status
        assert response.headers.getall("Access-Control-Allow-Origin") == [LISTED]
        exposed = {name.strip() for name in response.headers["Access-Control-Expose-Headers"].split(",")}
        assert exposed == {"RateLimit", "RateLimit-Policy", "Retry-After", "X-Request-ID", "Location"}
        assert "Origin" in response.headers["Vary"]


# ---- Other methods


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [("/api/streams", method, "POST") for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")]
    + [("/api/streams/SID", method, "DELETE, GET") for method in ("HEAD", "POST", "PUT", "PATCH", "OPTIONS", "TRACE")],
)
async def test_another_method_is_405(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, tap: Tap, path: str, method: str, allowed: str
) -> None:
    """With ``Allow``; no body follows HEAD, and what runs is not touched."""
    client = await connect(await serve())
    stream_id = await start(client)
    await upstream.called()
    await client.send(request(path.replace("SID", stream_id), method=method) + get(UNKNOWN))
    response = await client.read_response(to=method)
    assert response.status == 405
    assert set(response.headers["Allow"].split(", ")) - {"OPTIONS"} == set(allowed.split(", "))
    assert (await client.read_response()).error == "stream_not_found"
    assert len(upstream.calls) == len(upstream.open_calls) == 1
