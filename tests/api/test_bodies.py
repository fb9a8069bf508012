"""What may be posted to ``/api/streams``: bodies of every kind (contract, section 4; rows A14 to A22, B14)."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import zlib
from typing import Any

import pytest

from tests.api.conftest import Connect, LogLines, Settled
from tests.api.observing import until
from tests.api.raw_client import ASK, CHAT, RawClient, post, request
from tests.conftest import InProcess, Serve
from tests.upstream_sim import Call, ScriptedUpstream

MIB = 1 << 20


def chat(content: str = "hi", **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()


def messages(*given: Any) -> bytes:
    return json.dumps({"messages": given}).encode()


def having(members: str) -> bytes:
    """A good body with more members, as they are written."""
    return CHAT[:-1] + b"," + members.encode("utf-8", "surrogatepass") + b"}"


# ---- Bodies that are refused

NO_JSON = {
    "empty": b"",
    "blank": b" \n",
    "cut": b"{",
    "cut in a string": CHAT[:-6],
    "a BOM": b"\xef\xbb\xbf" + CHAT,
    "UTF-16": CHAT.decode().encode("utf-16"),
    "UTF-16 without a BOM": CHAT.decode().encode("utf-16-le"),
    "UTF-32": CHAT.decode().encode("utf-32"),
    "Latin-1": chat().replace(b"hi", b"\xe9"),
    "a byte that is no UTF-8": chat().replace(b"hi", b"\xff"),
    "an overlong slash": chat().replace(b"hi", b"\xc0\xaf"),
    "a surrogate in UTF-8": chat().replace(b"hi", b"\xed\xa0\xbd"),
    "something behind it": CHAT + b"x",
    "a second value": CHAT + CHAT,
    "NUL behind it": CHAT + b"\0",
    "a form": b"messages=hi",
    "single quotes": CHAT.replace(b'"', b"'"),
    "a comma too many": CHAT[:-1] + b",}",
    "a comment": b"/**/" + CHAT,
    "a line end in a string": chat().replace(b"hi", b"h\ni"),
    "NaN": having('"temperature":NaN'),
    "-NaN": having('"temperature":-NaN'),
    "Infinity": having('"temperature":Infinity'),
    "a number with a leading zero": having('"max_tokens":01'),
    "a number with a plus": having('"max_tokens":+1'),
    "half a surrogate pair": chat("").replace(b'""', rb'"\ud83d"'),
    "the other half": chat("").replace(b'""', rb'"\ude00"'),
    "the halves the wrong way round": chat("").replace(b'""', rb'"\ude00\ud83d"'),
    "half a pair before a letter": chat("").replace(b'""', rb'"\ud83d\u0041"'),
    "an unknown escape": chat("").replace(b'""', rb'"\x41"'),
}

NAMING = {
    # an object, and no other value
    "an array": (b"[]", "object"),
    "a string": (b'"x"', "object"),
    "null": (b"null", "object"),
    "true": (b"true", "object"),
    "a number": (b"5", "object"),
    # its members
    "no messages": (b"{}", "messages"),
    "only others": (b'{"max_tokens":5}', "messages"),
    "an unknown field": (having('"stream":true'), "stream"),
    "an unknown field of ours": (having('"base_url":"http://evil.example"'), "base_url"),
    "another capital": (having('"Model":"x"'), "Model"),
    "an empty name": (having('"":1'), "unknown field"),
    "a field twice": (having('"max_tokens":1,"max_tokens":2'), "max_tokens"),
    "a field twice, once escaped": (having(r'"model":null,"\u006dodel":null'), "model"),
    "messages twice": (having('"messages":[{"role":"user","content":"other"}]'), "messages"),
    "a role twice": (b'{"messages":[{"role":"user","role":"system","content":"a"}]}', "role"),
    # messages
    "messages null": (b'{"messages":null}', "messages"),
    "messages an object": (b'{"messages":{"role":"user","content":"a"}}', "messages"),
    "messages a string": (b'{"messages":"hi"}', "messages"),
    "no message": (messages(), "messages"),
    "10,000 messages": (messages(*[{"role": "user", "content": "a"}] * 10_000), "messages"),
    "a message that is a string": (messages("hi"), "messages[0]"),
    "a message that is null": (messages({"role": "user", "content": "a"}, None), "messages"),
    "a message that is empty": (messages({}), "role"),
    "an unknown field of a message": (messages({"role": "user", "content": "a", "name": "x"}), "name"),
    # a message
    "no role": (messages({"content": "a"}), "role"),
    "the role tool": (messages({"role": "tool", "content": "a"}), "role"),
    "the role developer": (messages({"role": "developer", "content": "a"}), "role"),
    "the role User": (messages({"role": "User", "content": "a"}), "role"),
    "a role that is null": (messages({"role": None, "content": "a"}), "role"),
    "a role that is a number": (messages({"role": 1, "content": "a"}), "role"),
    "no content": (messages({"role": "user"}), "content"),
    "content null": (messages({"role": "user", "content": None}), "content"),
    "content a number": (messages({"role": "user", "content": 5}), "content"),
    "content parts": (messages({"role": "user", "content": [{"type": "text", "text": "a"}]}), "content"),
    "content blank": (chat(" \n\u3000"), "content"),
    "content with NUL": (chat("a\0b"), "content"),
    "content too long": (chat("a" * 32_001), "content"),
    "content too long in emoji": (chat("😀" * 32_001), "content"),
    # numbers and names
    "max_tokens 0": (chat(max_tokens=0), "max_tokens"),
    "max_tokens -1": (chat(max_tokens=-1), "max_tokens"),
    "max_tokens true": (chat(max_tokens=True), "max_tokens"),
    "max_tokens a string": (chat(max_tokens="5"), "max_tokens"),
    "max_tokens a fraction": (chat(max_tokens=1.5), "max_tokens"),
    "max_tokens of 5000 digits": (having('"max_tokens":' + "9" * 5000), "max_tokens"),
    "temperature a string": (chat(temperature="1"), "temperature"),
    "temperature true": (chat(temperature=True), "temperature"),
    "temperature 3": (chat(temperature=3), "temperature"),
    "temperature -0.1": (chat(temperature=-0.1), "temperature"),
    "temperature 1e999": (having('"temperature":1e999'), "temperature"),
    "temperature of 5000 digits": (having('"temperature":' + "1" * 5000), "temperature"),
    "another model": (chat(model="gpt-9"), "model"),
    "the model in capitals": (chat(model="GPT-4O-MINI"), "model"),
    "an empty model": (chat(model=""), "model"),
    "a model that is a list": (chat(model=["gpt-4o-mini"]), "model"),
}


async def _is_refused(
    client: RawClient, upstream: ScriptedUpstream, lines: LogLines, body: bytes, naming: str = ""
) -> None:
    response = await client.ask(post(body))
    assert (response.status, response.error) == (400, "invalid_request")
    assert naming in response.json["message"]
    assert "RateLimit" not in response.headers
    # It is the client's mistake: no failure of ours, no call, no token; and the connection goes on.
    assert lines.failures == []
    assert upstream.calls == []
    assert (await client.ask(post())).status == 201


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON.keys())
async def test_what_is_no_json_is_refused(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, body: bytes
) -> None:
    """Rows A15, A21: JSON in UTF-8 by the letter; never a 500."""
    await _is_refused(await connect(await serve(SLUICE_RATE_LIMIT="1/3600")), upstream, lines, body)


@pytest.mark.parametrize(("body", "naming"), NAMING.values(), ids=NAMING.keys())
async def test_json_of_another_shape_is_refused_by_the_name_of_its_field(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, body: bytes, naming: str
) -> None:
    """Rows A15, A20, A22: 400 ``invalid_request`` "naming the field"."""
    await _is_refused(await connect(await serve(SLUICE_RATE_LIMIT="1/3600")), upstream, lines, body, naming)


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"a":' * 100_000, b'{"messages":' + b"[" * 100_000, CHAT[:-5] + b"[" * 100_000, b"[" * MIB],
    ids=["arrays", "objects", "messages", "content", "1 MiB"],
)
async def test_nesting_is_no_way_to_exhaust_the_stack(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, body: bytes
) -> None:
    """Row A16: the same answer on every Python, at once."""
    client = await connect(await serve())
    began_at = time.perf_counter()
    await _is_refused(client, upstream, lines, body)
    assert time.perf_counter() - began_at < 2


@pytest.mark.parametrize(
    "name",
    ["x" * 100_000, "\u202e" * 5000, "a\r\nX-Evil: 1", "\x1b[31m\x9b\u2028\ue0001", "<script>alert(1)</script>", '"\\'],
    ids=["long", "long and unprintable", "a line end", "control characters", "markup", "quotes"],
)
async def test_a_clients_words_come_back_short_and_escaped(serve: Serve, connect: Connect, name: str) -> None:
    """Row A20: at most 200 characters of echo, none that a terminal or a log would obey."""
    client = await connect(await serve())
    response = await client.ask(post(json.dumps({name: 1}).encode()))
    assert (response.status, response.error) == (400, "invalid_request")
    message = response.json["message"]
    assert message.isprintable()
    assert len(message) < 300
    assert "X-Evil" not in response.headers
    assert response.headers["Content-Type"].startswith("application/json")
    assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_refused_body_stands_in_no_log(
    serve: Serve, connect: Connect, lines: LogLines, caplog: pytest.LogCaptureFixture
) -> None:
    """Section 7: never a prompt."""
    client = await connect(await serve())
    for body in (chat("canary", x=1), b"canary", messages({"role": "canary", "content": "canary"})):
        assert (await client.ask(post(body))).status == 400
    assert len(lines("request")) == 3
    assert not [record for record in caplog.records if "canary" in f"{record.getMessage()} {record.__dict__}"]


# ---- Its type


REFUSED_TYPES = [
    "text/plain",
    "text/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=a",
    "application/octet-stream",
    "application/jsonp",
    "application/problem+json",
    "application/json, text/plain",
    "text/plain; application/json",
    "application/json; charset=utf-7",
    "application/json; charset=utf-16",
    "application/json; charset=bogus",
    "application/json; charset=latin-1",
    "application/json; charset=idna",
    "application/json; charset=é",
    "application/json; charset*=utf-8''%ff",
    "json",
    "/",
    ";",
    "",
]
ACCEPTED_TYPES = [
    "application/json",
    "Application/JSON",
    "application/json; charset=utf-8",
    'application/json;charset="UTF-8"',
]


@pytest.mark.parametrize("content_type", REFUSED_TYPES)
async def test_another_type_is_415(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, content_type: str
) -> None:
    """Row A19: only JSON makes a browser ask first; and an unknown charset is no failure of ours."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="1/3600"))
    response = await client.ask(post(CHAT, f"Content-Type: {content_type}"))
    assert (response.status, response.error) == (415, "unsupported_media_type")
    assert lines.failures == []
    assert upstream.calls == []
    assert (await client.ask(post())).status == 201


async def test_no_type_is_415(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    client = await connect(await serve())
    response = await client.ask(request("/api/streams", f"Content-Length: {len(CHAT)}", method="POST", body=CHAT))
    assert response.status == 415
    assert (await client.ask(request("/api/streams", method="POST"))).status == 415
    assert upstream.calls == []


@pytest.mark.parametrize("content_type", ACCEPTED_TYPES)
async def test_json_is_taken_however_it_is_spelt(serve: Serve, connect: Connect, content_type: str) -> None:
    """Types and charsets have no case (RFC 9110 §8.3.1)."""
    client = await connect(await serve())
    assert (await client.ask(post(CHAT, f"Content-Type: {content_type}"))).status == 201


HOSTILE_TYPES = {
    "comments": "application/json; " + "(" * 4000,
    "a comment each": "application/json " + "(a)" * 2600,
    "parameters": "application/json" + ";" * 8000,
    "quotes": "application/json;" + '"' * 8000,
    "continued": "application/json; " + "".join(f"a*{i}=b;" for i in range(900)),
}


@pytest.mark.parametrize("content_type", HOSTILE_TYPES.values(), ids=HOSTILE_TYPES.keys())
async def test_a_type_is_read_in_no_time(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, content_type: str
) -> None:
    """Row A19, invariant I8: 8 kB of header neither exhaust the stack nor hold up everybody else's tokens."""
    client = await connect(await serve())
    took = []
    for _ in range(3):
        began_at = time.thread_time()
        response = await client.ask(post(b"{", f"Content-Type: {content_type}"))
        took.append(time.thread_time() - began_at)
        assert response.status in (400, 415)
    assert lines.failures == []
    assert min(took) < 0.1


ENCODED = {
    "gzip": gzip.compress(CHAT),
    "deflate": zlib.compress(CHAT),
    "br": CHAT,
    "zstd": CHAT,
    "gzip, gzip": gzip.compress(gzip.compress(CHAT)),
    "x-gzip": gzip.compress(CHAT),
    "unknown": CHAT,
}


@pytest.mark.parametrize(("encoding", "body"), ENCODED.items(), ids=ENCODED.keys())
async def test_an_encoded_body_is_415(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, encoding: str, body: bytes
) -> None:
    """Row A18: nothing is inflated."""
    client = await connect(await serve())
    response = await client.ask(post(body, f"Content-Encoding: {encoding}"))
    assert (response.status, response.error) == (415, "unsupported_media_type")
    assert upstream.calls == []


async def test_a_bomb_is_not_inflated(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Row A18: 10 kB that would be 10 MB, named or not."""
    bomb = gzip.compress(b" " * (10 << 20))
    client = await connect(await serve())
    assert (await client.ask(post(bomb, "Content-Encoding: gzip"))).status == 415
    assert (await client.ask(post(bomb))).status == 400
    assert (await client.ask(post(bomb, "Content-Encoding: identity", "Content-Encoding: gzip"))).status in (400, 415)
    assert upstream.calls == []


async def test_identity_is_no_encoding(serve: Serve, connect: Connect) -> None:
    client = await connect(await serve())
    assert (await client.ask(post(CHAT, "Content-Encoding: identity"))).status == 201


# ---- Its size


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


CHUNKED_POST = request("/api/streams", "Content-Type: application/json", "Transfer-Encoding: chunked", method="POST")


def _sized(size: int) -> bytes:
    """A body of exactly so many bytes, whose message fills it."""
    return chat("a" * (size - len(chat(""))))


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_body_of_just_the_bound_is_taken_whole(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, framing: str
) -> None:
    """Row A17: 1 MiB exactly passes."""
    client = await connect(await serve(SLUICE_MAX_QUERY_CHARS="100000", SLUICE_SYSTEM_PROMPT=""))
    body = _sized(MIB)
    data = post(body) if framing == "length" else CHUNKED_POST + chunked(body[:700_000], body[700_000:])
    response = await client.ask(data)
    assert response.status == 201
    async with asyncio.timeout(5):
        call = await upstream.called()
    assert call.json["messages"] == json.loads(body)["messages"]


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_body_of_one_byte_more_is_413(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, framing: str
) -> None:
    """Row A17."""
    client = await connect(await serve(SLUICE_MAX_QUERY_CHARS="100000"))
    body = _sized(MIB + 1)
    response = await client.ask(post(body) if framing == "length" else CHUNKED_POST + chunked(body))
    assert (response.status, response.error) == (413, "body_too_large")
    assert upstream.calls == []
    assert lines.failures == []


async def test_a_body_is_refused_by_what_it_announces(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Row A17: 10^12 bytes, of which none has come: 413 at once, not after ten seconds."""
    client = await connect(await serve())
    head = request("/api/streams", "Content-Type: application/json", "Content-Length: 1000000000000", method="POST")
    async with asyncio.timeout(5):
        response = await client.ask(head)
    assert (response.status, response.error) == (413, "body_too_large")
    assert upstream.calls == []


async def test_an_endless_body_is_cut_at_the_bound(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row A17: chunks without end; what is read beyond the bound does not grow with what is sent."""
    monkeypatch.setattr("server.main._LINGER", 0.2)
    client = await connect(await serve())
    sent = 0

    async def send_for_ever() -> None:
        nonlocal sent
        await client.send(CHUNKED_POST)
        while True:
            await client.send(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
            sent += 0x4000

    sender = asyncio.create_task(send_for_ever())
    response = await client.read_response()
    assert (response.status, response.error) == (413, "body_too_large")
    sender.cancel()
    await asyncio.gather(sender, return_exceptions=True)
    assert sent < 20 * MIB  # the kernel's buffers are part of it
    assert upstream.calls == []


# ---- Its time


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
async def test_a_body_that_does_not_come_in_time_is_408(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, monkeypatch: pytest.MonkeyPatch, framing: str
) -> None:
    """Row B14: "request body not complete after 10 s" (here 0.4): a byte now and then buys no more time."""
    monkeypatch.setattr("server.api.body._TIMEOUT", 0.4)
    server = await serve(SLUICE_RATE_LIMIT="1/3600")
    client = await connect(server)
    trickle = asyncio.create_task(
        client.trickle(request("/api/streams", "Content-Type: application/json", framing, method="POST"))
    )
    async with asyncio.timeout(5):
        response = await client.read_response()
    assert (response.status, response.error) == (408, "request_timeout")
    trickle.cancel()
    await asyncio.gather(trickle, return_exceptions=True)
    assert upstream.calls == []
    assert (await (await connect(server)).ask(post())).status == 201, "a refusal has spent the client's token"


async def test_a_body_in_crumbs_is_taken_if_it_comes_in_time(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    client = await connect(await serve())
    data = post(chat("why? 😀"))
    for start in range(0, len(data), 7):
        await client.send(data[start : start + 7])
        await asyncio.sleep(0)
    assert (await client.read_response()).status == 201
    call = await upstream.called()
    assert call.json["messages"][-1]["content"] == "why? 😀"


@pytest.mark.parametrize("leaving", ["fin", "rst"])
async def test_a_client_that_leaves_within_its_body_opens_nothing(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines, settled: Settled, leaving: str
) -> None:
    server = await serve()
    client = await connect(server)
    await client.send(post()[:-3])
    await asyncio.sleep(0.05)
    client.close() if leaving == "fin" else client.reset()
    await until(lambda: lines("request"), within=5)
    await settled(server)
    assert upstream.calls == []
    assert lines.failures == []


@pytest.mark.parametrize("body", [b"xyz\r\na", b"5\r\nhello!\r\n", b"-1\r\n"], ids=["no size", "longer", "negative"])
@pytest.mark.parametrize("pause", [0, 0.05], ids=["with the head", "after it"])
async def test_a_body_that_is_not_what_its_head_says_is_refused(
    serve: Serve,
    upstream: ScriptedUpstream,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    body: bytes,
    pause: float,
) -> None:
    """At the latest when its time is over; and what is behind it is not taken for a request (row A12)."""
    monkeypatch.setattr("server.api.body._TIMEOUT", 0.3)
    monkeypatch.setattr("server.main._LINGER", 0.2)
    client = await connect(await serve())
    await client.send(CHUNKED_POST)
    await asyncio.sleep(pause)
    await client.send(body + ASK)
    assert (await client.read_response()).status in (400, 408)
    await client.read_to_end()
    assert upstream.calls == []


async def test_expect_100_continue_is_answered_first(serve: Serve, connect: Connect) -> None:
    """Row A14: curl sends it with every larger body."""
    client = await connect(await serve())
    await client.send(post(CHAT, "Expect: 100-continue").removesuffix(CHAT))
    assert (await client.read_response()).status == 100
    await client.send(CHAT)
    assert (await client.read_response()).status == 201


async def test_another_expectation_is_417(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, lines: LogLines
) -> None:
    """Row A14."""
    client = await connect(await serve())
    assert (await client.ask(post(CHAT, "Expect: x"))).status == 417
    assert upstream.calls == []
    assert lines.failures == []


async def test_http_1_0_may_post_too(serve: Serve, connect: Connect) -> None:
    client = await connect(await serve())
    response = await client.ask(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert (response.status, response.complete) == (201, True)


async def test_pipelined_posts_are_answered_in_order(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Good and bad ones: none of the refused disturbs the next."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="off"))
    bodies = [chat("one"), b"{", chat("two"), chat(x=1), chat("three")]
    await client.send(b"".join(map(post, bodies)))
    assert [(await client.read_response()).status for _ in bodies] == [201, 400, 201, 400, 201]
    await upstream.called(3)
    assert sorted(call.json["messages"][-1]["content"] for call in upstream.calls) == ["one", "three", "two"]


# ---- What the upstream is asked


async def _asked(server: InProcess, connect: Connect, upstream: ScriptedUpstream, body: bytes) -> Any:
    """Post the body; gives what the upstream got, as JSON."""
    client = await connect(server)
    response = await client.ask(post(body))
    assert response.status == 201, response.body
    async with asyncio.timeout(5):
        return (await upstream.called()).json


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, 50),
        ({"max_tokens": None}, 50),
        ({"max_tokens": 1}, 1),
        ({"max_tokens": 49}, 49),
        ({"max_tokens": 50}, 50),
        ({"max_tokens": 51}, 50),
        ({"max_tokens": 10**9}, 50),
        ({"max_tokens": 2**63}, 50),
    ],
    ids=str,
)
async def test_a_client_may_ask_for_fewer_tokens_never_for_more(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, given: dict[str, Any], asked: int
) -> None:
    """Row A22: ``max_tokens`` above SLUICE_MAX_TOKENS is clamped."""
    got = await _asked(await serve(SLUICE_MAX_TOKENS="50"), connect, upstream, chat(**given))
    assert got["max_tokens"] == asked


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, 0.3),
        ({"temperature": None}, 0.3),
        ({"temperature": 0}, 0),
        ({"temperature": 2}, 2),
        ({"temperature": 0.7}, 0.7),
    ],
    ids=str,
)
async def test_the_temperature_is_the_clients_else_the_servers(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, given: dict[str, Any], asked: float
) -> None:
    """0 is a temperature, not "none given"."""
    got = await _asked(await serve(), connect, upstream, chat(**given))
    assert got["temperature"] == asked


@pytest.mark.parametrize("given", [{}, {"model": None}, {"model": "some/model"}], ids=str)
async def test_the_model_is_the_configured_one(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, given: dict[str, Any]
) -> None:
    """A model outside the configured ones is refused (above); null and absent are the server's to choose."""
    got = await _asked(await serve(LLM_MODEL="some/model"), connect, upstream, chat(**given))
    assert got["model"] == "some/model"


async def test_the_upstream_is_asked_as_for_a_question(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    got = await _asked(await serve(SLUICE_SYSTEM_PROMPT="Be brief."), connect, upstream, chat("why?"))
    assert got == {
        "model": "gpt-4o-mini",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 800,
        "temperature": 0.3,
    }


CONVERSATION = [
    {"role": "system", "content": "Answer in French."},
    {"role": "user", "content": "why? \u2028\u2029\x85 😀 \U0010ffff"},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": "\u202eevil\u202c \ufeff\ufffd\r\n\t\x01\x1f\x7f"},
    {"role": "user", "content": '  e\u0301 \\ " / </script> data: [DONE]\n\n  '},
]


@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "UTF-8"])
@pytest.mark.parametrize("prompt", ["Be brief.", ""])
async def test_a_conversation_reaches_the_upstream_exactly(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, ascii_only: bool, prompt: str
) -> None:
    """The server's own instructions first, if there are any; then each message to the character, however written."""
    body = json.dumps({"messages": CONVERSATION}, ensure_ascii=ascii_only).encode()
    got = await _asked(await serve(SLUICE_SYSTEM_PROMPT=prompt), connect, upstream, body)
    assert got["messages"] == [{"role": "system", "content": prompt}] * bool(prompt) + CONVERSATION


@pytest.mark.parametrize("character", ["a", "中", "😀"], ids=["ascii", "cjk", "emoji"])
async def test_a_message_may_have_thirty_two_times_the_characters_of_a_question(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, character: str
) -> None:
    """SLUICE_MAX_QUERY_CHARS: "the bound of one chat message is 32 times that", in code points."""
    server = await serve(SLUICE_MAX_QUERY_CHARS="10")
    got = await _asked(server, connect, upstream, chat(character * 320))
    assert got["messages"][-1]["content"] == character * 320
    response = await (await connect(server)).ask(post(chat(character * 321)))
    assert (response.status, response.error) == (400, "invalid_request")
    assert len(upstream.calls) == 1


async def test_each_message_has_the_bound_not_all_together(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    long = {"role": "user", "content": "a" * 32_000}
    got = await _asked(await serve(SLUICE_SYSTEM_PROMPT=""), connect, upstream, messages(*[long] * 30))
    assert got["messages"] == [long] * 30


async def test_what_the_client_sends_along_stays_here(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Its credentials and its addresses are no business of the upstream's."""
    client = await connect(await serve(LLM_API_KEY="sk-ours"))
    theirs = ("Authorization: Bearer theirs", "Cookie: a=theirs", "X-Request-ID: theirs", "X-Real-IP: 9.9.9.9")
    assert (await client.ask(post(CHAT, *theirs))).status == 201
    call: Call = await upstream.called()
    assert call.headers.getall("Authorization") == ["Bearer sk-ours"]
    assert not any("theirs" in value or "9.9.9.9" in value for value in call.headers.values())
