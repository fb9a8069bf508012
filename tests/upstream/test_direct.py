"""The short way of an answer's body: the same answer however its bytes come, and the usual way where it is not sure."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from multidict import CIMultiDict

from server.upstream import client as client_module
from server.upstream import direct
from server.upstream.attempt import AttemptFailed
from server.upstream.body import read_body
from server.upstream.client import UpstreamClient
from server.upstream.direct import DirectConnection, Receiver
from server.upstream.endpoint import Endpoint
from server.upstream.reader import AnswerReader
from server.wire.chunks import Chunk
from tests.upstream.conftest import until
from tests.upstream.recording import ASKED, Recording
from tests.upstream_sim import Call, ScriptedUpstream, answer, chunk

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def token(text: str) -> bytes:
    return b"data: %b\n\n" % json.dumps(chunk({"content": text})).encode()


DONE = b"data: [DONE]\n\n"


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.fixture
async def client() -> AsyncIterator[UpstreamClient]:
    async with UpstreamClient(connect_timeout=2, direct=True) as opened:
        yield opened


class Ways:
    """Counts the bodies that took the short way, and those that did not."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.short = 0
        self.usual = 0
        begin = Receiver.begin

        def short(*arguments: Any) -> None:
            self.short += 1
            begin(*arguments)

        async def usual(*arguments: Any) -> None:
            self.usual += 1
            await read_body(*arguments)

        patch.setattr(Receiver, "begin", short)
        patch.setattr(client_module, "read_body", usual)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


async def ask(client: UpstreamClient, upstream: ScriptedUpstream, sink: Recording | None = None) -> Recording:
    sink = sink or Recording()
    async with asyncio.timeout(10):
        await client.ask(Endpoint(upstream.base_url, "asked"), ASKED, sink)
    return sink


# ---- Whether it works


async def test_it_works_with_the_pinned_aiohttp() -> None:
    assert await direct.works()


async def test_it_does_not_work_where_the_connector_makes_connections_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says so, and raises nothing."""

    class Otherwise(aiohttp.TCPConnector):
        def __init__(self) -> None:
            super().__init__()
            del self._factory

    monkeypatch.setattr(aiohttp, "TCPConnector", Otherwise)
    assert await direct.works() is False


async def test_it_does_not_work_where_connections_are_of_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "ResponseHandler", type("Other", (ResponseHandler,), {}))
    assert await direct.works() is False


def _raise(*_: Any, **__: Any) -> None:
    raise AttributeError("aiohttp has changed")


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


@pytest.mark.parametrize("name", ["begin", "set_response_params", "data_received"])
@pytest.mark.parametrize("instead", [_raise, _do_nothing], ids=["raises", "does nothing"])
async def test_it_does_not_work_where_a_connection_behaves_otherwise(
    monkeypatch: pytest.MonkeyPatch, name: str, instead: Any
) -> None:
    monkeypatch.setattr(DirectConnection, name, instead)
    assert await asyncio.wait_for(direct.works(), 10) is False


# ---- However the bytes come


@pytest.mark.parametrize("cut", range(1, len(HEAD)))
async def test_a_head_may_be_cut_anywhere(cut: int) -> None:
    """Also inside the blank line at its end. No sockets: one byte at the wrong place would come with its neighbours."""
    connection, taken, _ = waiting()
    connection.data_received(HEAD[:cut])
    connection.data_received(HEAD[cut:] + framed(b"hello"))
    connection.data_received(framed(b"you") + LAST)
    assert (taken.head, taken.payload) == (HEAD, b"helloyou")
    assert not connection.should_close


@pytest.mark.parametrize("step", [1, 3, 50])
async def test_an_answer_may_come_in_small_pieces(
    client: UpstreamClient, upstream: ScriptedUpstream, ways: Ways, step: int
) -> None:
    wire = HEAD + framed(token("Hel")) + framed(token("lo")) + framed(DONE) + LAST

    async def script(call: Call) -> None:
        for at in range(0, len(wire), step):
            await call.send(wire[at : at + step])
            await asyncio.sleep(0)
        call.ended = True

    upstream.script = script
    for _ in range(3):
        assert (await ask(client, upstream)).texts == ["Hel", "lo"]
    assert upstream.connections == 1
    assert (ways.short, ways.usual) == (3, 0)


@pytest.mark.parametrize("body", [framed(token("Hel") + token("lo") + DONE) + LAST, framed(token("Hel")), b"1"])
async def test_the_head_and_the_bodys_beginning_may_come_in_one_segment(
    client: UpstreamClient, upstream: ScriptedUpstream, body: bytes
) -> None:
    whole = framed(token("Hel")) + framed(token("lo") + DONE) + LAST

    async def script(call: Call) -> None:
        wire = body if body.endswith(LAST) else whole
        await call.send(HEAD + wire[: len(body)])
        await asyncio.sleep(0.02)
        await call.send(wire[len(body) :])
        call.ended = True

    upstream.script = script
    for _ in range(2):
        assert (await ask(client, upstream)).texts == ["Hel", "lo"]
    assert upstream.connections == 1


@pytest.mark.parametrize("last", [LAST, b"0;x=y\r\n\r\n", b"0\r\nETag: x\r\n\r\n"])
async def test_a_last_chunk_in_a_segment_of_its_own_leaves_the_connection_fit_for_use(
    client: UpstreamClient, upstream: ScriptedUpstream, ways: Ways, last: bytes
) -> None:
    async def script(call: Call) -> None:
        await call.send(HEAD + framed(token("Hel")))
        await asyncio.sleep(0.005)
        await call.send(framed(token("lo") + DONE))
        await asyncio.sleep(0.005)
        await call.send(last[:2])
        await asyncio.sleep(0.005)
        await call.send(last[2:])
        call.ended = True

    upstream.script = script
    for _ in range(3):
        assert (await ask(client, upstream)).texts == ["Hel", "lo"]
    assert upstream.connections == 1
    assert ways.short == 3


@pytest.mark.parametrize("together", [True, False])
async def test_an_interim_response_is_no_head_of_the_answer(
    client: UpstreamClient, upstream: ScriptedUpstream, ways: Ways, together: bool
) -> None:
    """RFC 8297: a 103 comes before the 200."""

    async def script(call: Call) -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        if not together:
            await call.send(early)
            await asyncio.sleep(0.01)
            early = b""
        await call.send(early + HEAD + framed(token("Hel")) + framed(token("lo") + DONE) + LAST)
        call.ended = True

    upstream.script = script
    for _ in range(2):
        assert (await ask(client, upstream)).texts == ["Hel", "lo"]
    assert upstream.connections == 1
    assert ways.short == 2


# ---- The usual way

BODY = token("Hel") + token("lo") + DONE


@pytest.mark.parametrize("kind", ["gzip", "until the close", "Content-Length"])
async def test_other_bodies_take_the_usual_way(
    client: UpstreamClient, upstream: ScriptedUpstream, ways: Ways, kind: str
) -> None:
    async def script(call: Call) -> None:
        if kind == "gzip":
            await call.head(Content_Encoding="gzip")
        elif kind == "until the close":
            await call.head(Connection="close")
        else:
            await call.head(Content_Length=str(len(BODY)))
        body = gzip.compress(BODY) if kind == "gzip" else BODY
        await call.write(body[:60])
        await asyncio.sleep(0.01)
        await call.write(body[60:])
        await call.end()

    upstream.script = script
    for _ in range(2):
        assert (await ask(client, upstream)).texts == ["Hel", "lo"]
    assert (ways.short, ways.usual) == (0, 2)
    upstream.script = answer()
    assert (await ask(client, upstream)).texts == ["Hel", "lo"]
    assert ways.short == 1, "the next answer may be another kind of body"


def waiting() -> tuple[DirectConnection, Taken, Idle]:
    """A connection on which a request has been sent, and who takes the answer."""
    connection, taken, transport = DirectConnection(asyncio.get_running_loop()), Taken(), Idle()
    connection.connection_made(transport)
    connection.begin(taken)
    return connection, taken, transport


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"1.1", b"1.0"),
        HEAD.replace(b"200 OK", b"201 Created"),
        HEAD.replace(b"event-stream", b"html"),
        HEAD.replace(b"chunked", b"gzip, chunked"),
        HEAD.replace(b"chunked", b"chunked\r\n folded: on"),
        HEAD.replace(b"chunked", b"chunked\nX-Lone: LF"),
        HEAD.replace(b"chunked", b"chunked\r\nTransfer-Encoding: chunked"),
        HEAD.replace(b"chunked", b"chunked\r\nContent-Type: text/plain"),
        HEAD.replace(b"chunked", b"chunked\r\nContent-Length: 5"),
        HEAD.replace(b"chunked", b"chunked\r\nContent-Encoding: gzip"),
        HEAD.replace(b"chunked", b"chunked\r\nConnection: close"),
        HEAD.replace(b"chunked", b"chunked\r\nX-Control: \x01"),
        HEAD.replace(b"chunked", b"chunked\r\nno field"),
        HEAD.replace(b"chunked", b"chunked\r\nX-Long: " + b"x" * 9000),
        HEAD.replace(b"chunked", b"chunked" + b"\r\nX-Many: x" * 120),
    ],
)
@pytest.mark.parametrize("cut", [1, 12, 40, 1 << 16])
async def test_a_head_in_which_something_is_to_be_settled_is_aiohttps(head: bytes, cut: int) -> None:
    connection, taken, _ = waiting()
    for piece in (head[:cut], head[cut:]):
        if piece:
            connection.data_received(piece)
    assert taken.head == b""
    assert taken.woken
    assert connection.usual


@pytest.mark.parametrize("garbage", [b"S", b"HTTP/1.x", b"HTTP/1.1 200 OK\r\nA: b\nC"])
async def test_what_will_never_be_a_head_is_not_waited_for(garbage: bytes) -> None:
    connection, taken, _ = waiting()
    connection.data_received(garbage)
    assert connection.usual, "aiohttp says what is wrong with it"
    assert taken.woken


async def test_a_head_keeps_its_fields() -> None:
    connection, _, _ = waiting()
    seen: list[Mapping[str, str]] = []
    receiver = Receiver(AnswerReader(Recording()), seen.append)
    connection.begin(receiver)
    connection.data_received(HEAD[:-2] + b"X-Request-Id:  r\xc3\xa9-1 \t\r\nX-Empty:\r\n\r\n")
    for headers in (*seen, receiver.headers):
        assert headers["x-request-id"] == "ré-1"
        assert headers["X-Empty"] == ""
        assert headers["content-type"] == "text/event-stream"
        assert len(headers) == 4
    assert len(seen) == 1


async def test_a_connection_left_with_half_a_head_is_not_used_again(
    client: UpstreamClient, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked leaves in the instant in which aiohttp is given it; the rest would be the next question's answer."""
    leave_to_aiohttp = DirectConnection._leave_to_aiohttp

    def leaving(connection: DirectConnection, data: bytes) -> None:
        leave_to_aiohttp(connection, data)
        asking.cancel()

    async def script(call: Call) -> None:
        await call.send(b"HTTP/1.0 500 Oh\r\nContent-")
        await call.gone()

    monkeypatch.setattr(DirectConnection, "_leave_to_aiohttp", leaving)
    upstream.script = script
    asking = asyncio.create_task(ask(client, upstream))
    with pytest.raises(asyncio.CancelledError):
        await asking
    upstream.script = answer(["other"])
    assert (await ask(client, upstream)).texts == ["other"]
    assert upstream.connections == 2


async def test_what_comes_unasked_closes_the_connection(client: UpstreamClient, upstream: ScriptedUpstream) -> None:
    """It would be taken for the next question's answer."""
    await ask(client, upstream)
    await upstream.calls[0].send(HEAD + framed(BODY) + LAST)
    await asyncio.sleep(0.02)
    upstream.script = answer(["other"])
    assert (await ask(client, upstream)).texts == ["other"]
    assert upstream.connections == 2


# ---- Much at once


async def test_much_that_comes_at_once_is_taken_in_pieces(
    client: UpstreamClient, upstream: ScriptedUpstream, ways: Ways
) -> None:
    """U39: other streams get their turn between them, and nothing is lost or changes places."""
    turn = 0
    handed_on: list[tuple[int, int]] = []

    class Noting(Recording):
        def take(self, chunks: Sequence[Chunk]) -> None:
            super().take(chunks)
            handed_on.append((turn, len(chunks)))

        def take_texts(self, texts: Sequence[bytes], wire: bytes) -> None:
            super().take_texts(texts, wire)
            handed_on.append((turn, len(texts)))

    async def turning() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    texts = [str(number) for number in range(10_000)]

    async def script(call: Call) -> None:
        await call.head()
        for at in range(0, len(texts), 2500):
            await call.write(b"".join(map(token, texts[at : at + 2500])))
        await call.done()

    upstream.script = script
    others = asyncio.create_task(turning())
    sink = await ask(client, upstream, Noting())
    others.cancel()
    assert sink.texts == texts
    assert ways.short == 1
    # Two, where the last piece of one read meets the first of the next; a piece that learns hands on twice.
    assert max(Counter(turn for turn, _ in handed_on).values()) <= 4
    assert max(count for _, count in handed_on) < 1000


class Idle(asyncio.Transport):
    """A transport that notes whether it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = True

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None: ...
    def abort(self) -> None: ...


class Taken:
    def __init__(self) -> None:
        self.head = b""
        self.payload = b""
        self.woken = 0

    def begin(self, head: bytes, fields: CIMultiDict[str]) -> None:
        self.head = head

    def receive(self, payload: bytes) -> None:
        self.payload += payload

    def wake(self) -> None:
        self.woken += 1


async def test_the_network_is_read_no_further_while_much_waits() -> None:
    connection, taken, transport = waiting()
    pieces = [bytes([number]) * 1000 for number in range(100)]
    connection.data_received(HEAD + b"".join(map(framed, pieces)))
    assert len(taken.payload) < 100_000
    read_meanwhile = transport.reading
    assert await until(lambda: len(taken.payload) == 100_000)
    assert taken.payload == b"".join(pieces)
    assert (read_meanwhile, transport.reading) == (False, True)
    connection.data_received(framed(b"more"))
    assert taken.payload.endswith(b"more")


async def test_a_connection_that_breaks_with_bytes_waiting_gives_them_first() -> None:
    connection, taken, _ = waiting()
    connection.data_received(HEAD + b"".join([framed(b"x" * 1000)] * 100))
    assert len(taken.payload) < 100_000
    connection.connection_lost(ConnectionResetError())
    assert taken.payload == b"x" * 100_000
    assert taken.woken
    assert connection.exception() is not None
    assert not connection.receiving
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(taken.payload) == 100_000


@pytest.mark.parametrize("come", [b"", HEAD[:30], HEAD])
async def test_who_waits_hears_of_a_connection_that_breaks(come: bytes) -> None:
    connection, taken, _ = waiting()
    if come:
        connection.data_received(come)
    assert taken.woken == 0
    connection.connection_lost(None)
    assert taken.woken > 0
    assert not connection.receiving


async def test_who_is_detached_is_handed_nothing_more() -> None:
    connection, taken, _ = waiting()
    connection.data_received(HEAD + framed(b"hello"))
    connection.detach(taken)
    connection.data_received(framed(b"you"))
    connection.connection_lost(ConnectionResetError())
    assert (taken.payload, taken.woken) == (b"hello", 0)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_break_loses_no_token_that_came_before_it(
    client: UpstreamClient, upstream: ScriptedUpstream, ways: Ways, how: str
) -> None:
    texts = [str(number) for number in range(300)]

    async def script(call: Call) -> None:
        await call.send(HEAD + framed(b"".join(map(token, texts))))
        await asyncio.sleep(0.05)  # a reset takes back what the kernel has not sent
        getattr(call, how)()

    upstream.script = script
    sink = Recording()
    with pytest.raises(AttemptFailed) as caught:
        await ask(client, upstream, sink)
    assert caught.value.error.code == "upstream_incomplete"
    assert sink.texts == texts


@pytest.mark.parametrize("malformed", [b"no number\r\n", b"5\r\nhelloworld\r\n"])
async def test_a_broken_framing_ends_the_answer_behind_what_was_good(
    client: UpstreamClient, upstream: ScriptedUpstream, malformed: bytes
) -> None:
    async def script(call: Call) -> None:
        await call.send(HEAD + framed(token("Hel")))
        await asyncio.sleep(0.01)
        await call.send(framed(token("lo")) + malformed)
        await call.gone()

    upstream.script = script
    sink = Recording()
    with pytest.raises(AttemptFailed) as caught:
        await ask(client, upstream, sink)
    assert caught.value.error.code == "upstream_incomplete"
    assert sink.texts == ["Hel", "lo"]
