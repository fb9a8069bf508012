"""What a client may spend: the token bucket, the caps on open streams, and what a refusal costs (contract, §3)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from typing import Any
from urllib.parse import quote

import pytest

from tests.api.conftest import Connect, LogLines, Settled
from tests.api.observing import until
from tests.api.raw_client import ASK, CHAT, LEAVING, RawClient, Response, post, request
from tests.conftest import InProcess, Serve
from tests.sse_client import ask, open_stream, view
from tests.upstream_sim import Call, Script, ScriptedUpstream, answer, chunk


async def _hold(call: Call) -> None:
    await call.head()
    await call.token("a")
    await call.gone()


async def _admitted(client: RawClient, data: bytes = ASK) -> Response:
    """Ask, and read until the first token has come."""
    await client.send(data)
    response = await client.read_head()
    assert response.status == 200
    await client.read_until(b'{"token":"a"}')
    return response


# ---- The bucket


async def test_an_empty_bucket_is_429(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Ten in sixty seconds: the eleventh is refused, with the whole seconds until a token is back, rounded up."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="3/60"))
    for left in (2, 1, 0):
        response = await client.ask()
        assert response.status == 200
        assert response.headers["RateLimit-Policy"] == '"requests";q=3;w=60'
        assert re.fullmatch(rf'"requests";r={left};t=(19|20)', response.headers["RateLimit"])
    response = await client.ask()
    assert (response.status, response.error) == (429, "rate_limit_exceeded")
    assert response.headers["RateLimit-Policy"] == '"requests";q=3;w=60'
    assert re.fullmatch(r'"requests";r=0;t=(19|20)', response.headers["RateLimit"])
    assert response.headers["Retry-After"] in ("19", "20")
    assert len(upstream.calls) == 3


async def test_who_waits_as_long_as_told_is_admitted(serve: Serve, connect: Connect) -> None:
    """``Retry-After`` is a promise: rounded up, never down to a 0 that would be refused again."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="1/0.6"))
    assert (await client.ask()).status == 200
    response = await client.ask()
    assert response.status == 429
    assert response.headers["Retry-After"] == "1"
    await asyncio.sleep(1)
    assert (await client.ask()).status == 200


async def test_without_limits_nothing_is_told_of_them(serve: Serve, connect: Connect) -> None:
    """The contract: "unless limits are off"."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="off"))
    for _ in range(30):
        response = await client.ask()
        assert response.status == 200
    assert not any(name.lower().startswith("ratelimit") for name in response.headers)


async def test_each_client_has_a_bucket_of_its_own(serve: Serve) -> None:
    server = await serve(SLUICE_RATE_LIMIT="1/3600")
    for address in ("203.0.113.1", "203.0.113.2"):
        assert (await ask(server.url, X_Forwarded_For=address)).status == 200
        assert (await ask(server.url, X_Forwarded_For=address)).status == 429


async def test_a_bucket_is_no_way_round_another_connection(serve: Serve, connect: Connect) -> None:
    server = await serve(SLUICE_RATE_LIMIT="2/3600")
    statuses = [(await (await connect(server)).ask()).status for _ in range(3)]
    assert statuses == [200, 200, 429]


REFUSED = {
    "missing_query": request("/api/stream"),
    "query_too_long": request("/api/stream?q=" + quote("é" * 1001)),
    "invalid_query": request("/api/stream?q=%ff"),
    "origin_not_allowed": request("/api/stream?q=hi", "Origin: https://evil.example"),
    "method_not_allowed": request(method="POST"),
    "not_found": request("/api/nothing?q=hi"),
    "preflight": request("/api/stream?q=hi", "Origin: x", "Access-Control-Request-Method: GET", method="OPTIONS"),
    "page": request("/"),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
async def test_a_refusal_spends_nothing(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, data: bytes
) -> None:
    """Only what is admitted costs a token; a 400 tells nothing of the bucket either."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="1/3600"))
    for _ in range(3):
        response = await client.ask(data)
        assert response.status != 429
        assert "RateLimit" not in response.headers
    assert upstream.calls == []
    assert (await client.ask()).status == 200


async def test_too_many_open_streams_spend_no_token(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """The cap is asked before the bucket."""
    upstream.script = _hold
    server = await serve(SLUICE_RATE_LIMIT="2/3600", SLUICE_MAX_STREAMS_PER_CLIENT="1")
    first, second = await connect(server), await connect(server)
    await _admitted(first)
    for _ in range(5):
        assert (await second.ask()).error == "too_many_streams"
    first.close()
    await settled(server)
    upstream.script = answer()
    assert (await second.ask()).status == 200
    assert (await second.ask()).error == "rate_limit_exceeded"


async def test_a_refused_stream_is_cheap(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Row B19: a storm from one client gets 429s of less than 300 bytes, and the upstream none of it."""
    client = await connect(await serve(SLUICE_RATE_LIMIT="1/3600"))
    assert (await client.ask()).status == 200
    began_at = time.perf_counter()
    for _ in range(50):
        await client.send(ASK * 20)
        for _ in range(20):
            response = await client.read_response()
            assert response.status == 429
            assert len(response.body) < 300
    seconds = time.perf_counter() - began_at
    print(f"{1000 / seconds:.0f} refusals/s, client and server on one core")
    assert len(upstream.calls) == 1
    assert seconds < 10


# ---- The caps


async def test_the_ninth_stream_of_a_client_is_429(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """Row B20: 8 open at once; another client is not concerned."""
    upstream.script = _hold
    server = await serve(SLUICE_RATE_LIMIT="off")
    clients = [await connect(server) for _ in range(8)]
    for client in clients:
        await _admitted(client)
    ninth = await connect(server)
    response = await ninth.ask()
    assert (response.status, response.error) == (429, "too_many_streams")
    assert int(response.headers["Retry-After"]) > 0
    assert len(upstream.calls) == 8
    await _admitted(ninth, request("/api/stream?q=hi", "X-Forwarded-For: 203.0.113.1"))
    for client in (*clients, ninth):
        client.close()
    await settled(server)


async def test_one_stream_more_than_all_may_have_is_503(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """Row B20, for SLUICE_MAX_STREAMS."""
    upstream.script = _hold
    server = await serve(SLUICE_MAX_STREAMS="3")
    clients = [await connect(server) for _ in range(3)]
    for number, client in enumerate(clients):
        await _admitted(client, request("/api/stream?q=hi", f"X-Forwarded-For: 203.0.113.{number}"))
    late = await connect(server)
    response = await late.ask(request("/api/stream?q=hi", "X-Forwarded-For: 203.0.113.9"))
    assert (response.status, response.error) == (503, "overloaded")
    assert int(response.headers["Retry-After"]) > 0
    assert len(upstream.calls) == 3
    clients[0].close()
    await until(lambda: server.desk.streams < 3, within=5)
    await _admitted(late)
    for client in (*clients, late):
        client.close()
    await settled(server)


async def test_a_draining_server_is_503(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """While the server drains: 503 shutting_down, on a connection that was there before; who streams goes on."""
    upstream.script = _hold
    server = await serve(SLUICE_RATE_LIMIT="2/3600", SLUICE_CORS_ORIGINS="https://a.example")
    streaming, idle = await connect(server), await connect(server)
    await _admitted(streaming)
    assert (await idle.ask(request("/"))).status == 200
    drain = asyncio.create_task(server.serving.drain(20, cut_short=asyncio.Event()))
    await asyncio.sleep(0)
    for _ in range(2):
        response = await idle.ask(request("/api/stream?q=hi", "Origin: https://a.example"))
        assert (response.status, response.error) == (503, "shutting_down")
        assert int(response.headers["Retry-After"]) > 0
        assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert len(upstream.open_calls) == 1
    streaming.close()
    await settled(server)
    await drain


# ---- Places get free again

WINDOWS = ["before the head", "before the first token", "mid-stream", "at the end", "failing"]
ENDINGS = [*LEAVING, "stay"]


async def test_a_stream_that_ended_in_any_way_frees_its_place(
    serve: Serve, upstream: ScriptedUpstream, lines: LogLines, settled: Settled
) -> None:
    """Row B20: 300 streams of one client, killed at random; afterwards all of its places are free."""
    chance = random.Random(20)

    async def script(call: Call) -> None:
        window = call.json["messages"][-1]["content"]
        if window == "failing":
            await call.refuse(chance.choice([400, 500]))
            return
        if window == "before the head":
            await call.gone()
        await call.head()
        if window == "before the first token":
            await call.gone()
        await call.token("a")
        if window == "mid-stream":
            await call.gone()
        await call.finish()
        await call.done()

    upstream.script = script
    server = await serve(SLUICE_RATE_LIMIT="off", SLUICE_RETRIES="0", SLUICE_SYSTEM_PROMPT="")

    async def one_after_another(count: int) -> None:
        for _ in range(count):
            await _kill_at_random(server, chance)

    async with asyncio.timeout(50), asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(one_after_another(50))
    await settled(server)
    assert len(lines("stream_end")) + sum(line["status"] == 429 for line in lines("request")) == 300
    assert {line["outcome"] for line in lines("stream_end")} == {"completed", "client_gone", "upstream_error"}
    assert lines.failures == []
    upstream.script = _hold
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(8):
            stream = await stack.enter_async_context(open_stream(server.url))
            assert stream.answer.status == 200
    await settled(server)


async def _kill_at_random(server: InProcess, chance: random.Random) -> None:
    window, ending = chance.choice(WINDOWS), chance.choice(ENDINGS)
    if ending == "stay" and window not in ("at the end", "failing"):
        ending = "rst"
    async with await RawClient.connect(server.port) as client:
        await client.send(request(f"/api/stream?q={quote(window)}"))
        if ending == "stay":
            assert (await client.read_response()).status in (200, 429)
            return
        if window != "at the end":
            await client.read_head()
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.01]))
        LEAVING[ending](client)
        if ending == "half-close":
            await client.read_to_end()


# ---- Generated tokens (SLUICE_TOKEN_LIMIT)


def _say(deltas: int, usage: Any = None, *, every: Any = None) -> Script:
    """So many tokens, then a chunk with ``usage``; ``every(n)`` is what the chunk of token n says of it."""

    async def script(call: Call) -> None:
        await call.head()
        for number in range(1, deltas + 1):
            more = {} if every is None else {"usage": every(number)}
            await call.event(chunk({"content": "x"}, **more))
        await call.finish()
        if usage is not None:
            await call.event(chunk(usage=usage))
        await call.done()

    return script


async def _flood(call: Call) -> None:
    """More tokens than any limit in here, and no end."""
    await call.head()
    for _ in range(200):
        await call.token("x")
        await asyncio.sleep(0)
    await call.gone()


async def _left(server: InProcess, upstream: ScriptedUpstream) -> int:
    """How many tokens the client may still have generated: as many as an endless answer gets, which uses them up."""
    upstream.script = _flood
    given = await ask(server.url)
    if given.status == 429:
        assert given.json["error"] == "token_limit_exceeded"
        return 0
    assert given.error["error"] == "token_limit_exceeded"
    return len(given.tokens)


def _delete(stream_id: str) -> bytes:
    return request(f"/api/streams/{stream_id}", method="DELETE")


@pytest.mark.parametrize("data", [ASK, post()], ids=["GET", "POST"])
async def test_who_has_used_up_its_tokens_is_429(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, data: bytes
) -> None:
    """``token_limit_exceeded`` with ``Retry-After``; the refusal costs no request, and the upstream is not asked."""
    upstream.script = _say(10)
    client = await connect(await serve(SLUICE_TOKEN_LIMIT="10/3600", SLUICE_RATE_LIMIT="5/3600"))
    assert (await client.ask()).body.endswith(b"[DONE]\n\n")
    for _ in range(3):
        response = await client.ask(data)
        assert (response.status, response.error) == (429, "token_limit_exceeded")
        assert response.headers["Retry-After"] in ("359", "360")
        assert re.match(r'"requests";r=4;', response.headers["RateLimit"])
    assert len(upstream.calls) == 1


async def test_an_empty_request_bucket_takes_no_tokens(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """The one refusal must not cost what the other limit counts."""
    upstream.script = _say(2)
    server = await serve(SLUICE_TOKEN_LIMIT="100/36000", SLUICE_RATE_LIMIT="2/2")
    client = await connect(server)
    admitted = 0
    while (response := await client.ask()).status == 200:
        admitted += 1
    assert response.error == "rate_limit_exceeded"
    await asyncio.sleep(1)
    assert await _left(server, upstream) == 100 - 2 * admitted


async def test_who_waits_as_long_as_told_has_a_token(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    server = await serve(SLUICE_TOKEN_LIMIT="2/2", SLUICE_RATE_LIMIT="off")
    client = await connect(server)
    upstream.script = _say(2)
    assert (await client.ask()).status == 200
    response = await client.ask()
    assert (response.error, response.headers["Retry-After"]) == ("token_limit_exceeded", "1")
    await asyncio.sleep(1)
    upstream.script = _say(1)
    assert (await client.ask()).body.endswith(b"[DONE]\n\n")


async def test_an_answer_that_reaches_the_limit_ends_there(
    serve: Serve, upstream: ScriptedUpstream, lines: LogLines, settled: Settled
) -> None:
    """In-band ``token_limit_exceeded``, not retryable; no token more, and the upstream is closed."""
    upstream.script = _flood
    server = await serve(SLUICE_TOKEN_LIMIT="5/3600")
    given = await ask(server.url)
    assert (len(given.tokens), given.complete, given.usage) == (5, False, None)
    assert (given.error["error"], given.error["retryable"]) == ("token_limit_exceeded", False)
    await settled(server)
    assert [line["outcome"] for line in lines("stream_end")] == ["token_limit"]
    assert (await ask(server.url)).json["error"] == "token_limit_exceeded"
    assert len(upstream.calls) == 1
    assert lines.failures == []


@pytest.mark.parametrize("name", ["reasoning_content", "tool_calls"])
async def test_what_is_not_shown_as_a_token_counts_too(serve: Serve, upstream: ScriptedUpstream, name: str) -> None:
    """Reasoning and tool calls are generated like everything else."""

    async def script(call: Call) -> None:
        await call.head()
        for _ in range(10):
            await call.event(chunk({name: "x" if name == "reasoning_content" else [{"index": 0}]}))
        await call.gone()

    upstream.script = script
    given = await ask((await serve(SLUICE_TOKEN_LIMIT="5/3600")).url)
    assert given.error["error"] == "token_limit_exceeded"
    assert len(given.reasoning) == (5 if name == "reasoning_content" else 0)


async def test_an_answer_goes_on_while_its_client_has_tokens(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """What is reserved is an estimate: deltas are no tokens, and an endpoint may send a few more of them than
    ``max_tokens``. The code says that the limit is used up, so it is not told to one who has 95 left."""
    upstream.script = _say(7, {"completion_tokens": 5})
    server = await serve(SLUICE_TOKEN_LIMIT="100/36000")
    client = await connect(server)
    response = await client.ask(post(CHAT[:-1] + b',"max_tokens":5}'))
    given = await view(server.url + response.headers["Location"])
    assert (len(given.tokens), given.complete) == (7, True)
    assert await _left(server, upstream) == 95


async def test_an_answer_of_just_what_is_left_is_whole(serve: Serve, upstream: ScriptedUpstream) -> None:
    upstream.script = _say(5)
    given = await ask((await serve(SLUICE_TOKEN_LIMIT="5/3600")).url)
    assert (len(given.tokens), given.complete) == (5, True)


USAGES: dict[str, tuple[Script, int]] = {
    "absent": (_say(6), 6),
    "as counted": (_say(6, {"prompt_tokens": 900, "completion_tokens": 6}), 6),
    "fewer than deltas": (_say(6, {"completion_tokens": 4}), 4),
    "more than deltas": (_say(6, {"completion_tokens": 9}), 9),
    "more than there are": (_say(6, {"completion_tokens": 15}), 20),
    "huge": (_say(6, {"completion_tokens": 10**12}), 20),
    "beyond what JavaScript counts": (_say(6, {"completion_tokens": 10**30}), 6),
    "zero": (_say(6, {"completion_tokens": 0}), 6),
    "negative": (_say(6, {"completion_tokens": -50}), 6),
    "a string": (_say(6, {"completion_tokens": "1"}), 6),
    "a fraction": (_say(6, {"completion_tokens": 0.5}), 6),
    "true": (_say(6, {"completion_tokens": True}), 6),
    "null": (_say(6, {"prompt_tokens": None, "completion_tokens": None}), 6),
    "empty": (_say(6, {}), 6),
    "no object": (_say(6, 5), 6),
    "in every chunk": (_say(6, every=lambda number: {"completion_tokens": number}), 6),
    "null in every chunk but the last": (_say(6, {"completion_tokens": 7}, every=lambda number: None), 7),
    "in every chunk, at last null": (_say(6, {"completion_tokens": None}, every=lambda n: {"completion_tokens": n}), 6),
}


@pytest.mark.parametrize(("script", "charged"), USAGES.values(), ids=USAGES.keys())
async def test_what_was_reserved_is_trued_up_by_what_was_used(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, script: Script, charged: int
) -> None:
    """Row U44: as the upstream reports, where that is a count at all; else as many as there were deltas."""
    upstream.script = script
    server = await serve(SLUICE_TOKEN_LIMIT="10/3600", SLUICE_RATE_LIMIT="off")
    given = await ask(server.url)
    assert given.complete
    reported = given.usage["completion_tokens"]
    assert reported is None or (isinstance(reported, int) and reported >= 0)
    assert await _left(server, upstream) == max(0, 10 - charged)


async def test_an_answer_that_used_too_much_is_owed(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """The wait is longer then, but never more than twice the time in which a bucket fills."""
    client = await connect(await serve(SLUICE_TOKEN_LIMIT="10/1000", SLUICE_RATE_LIMIT="off"))
    upstream.script = _say(6, {"completion_tokens": 15})
    await client.ask()
    assert (await client.ask()).headers["Retry-After"] in ("599", "600")
    other = request("/api/stream?q=hi", "X-Real-IP: 203.0.113.1")
    upstream.script = _say(6, {"completion_tokens": 10**15})
    await client.ask(other)
    assert (await client.ask(other)).headers["Retry-After"] in ("1099", "1100")


async def test_what_was_used_is_known_at_done(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Not when the upstream's connection is tidied up later: an immediate next request is measured by it."""
    closing = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        for _ in range(3):
            await call.token("x")
        await call.finish()
        await call.event(chunk(usage={"completion_tokens": 10}))
        await call.event("[DONE]")
        await closing.wait()
        await call.end()

    upstream.script = script
    server = await serve(SLUICE_TOKEN_LIMIT="10/3600", SLUICE_RATE_LIMIT="off")
    client, other = await connect(server), await connect(server)
    await client.send(ASK)
    await client.read_until(b"data: [DONE]\n\n")
    assert (await other.ask()).error == "token_limit_exceeded"
    closing.set()


async def test_what_was_not_used_is_there_again_at_done(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    upstream.script = _say(1)
    client = await connect(await serve(SLUICE_TOKEN_LIMIT="10/3600", SLUICE_RATE_LIMIT="off"))
    for _ in range(10):
        assert (await client.ask()).body.endswith(b"[DONE]\n\n")
    assert (await client.ask()).error == "token_limit_exceeded"


async def test_two_answers_at_once_do_not_share_a_token(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """What an answer may still generate is reserved while it runs, and given back when it is over."""
    upstream.script = _hold
    server = await serve(SLUICE_TOKEN_LIMIT="10/3600", SLUICE_RATE_LIMIT="off")
    client = await connect(server)
    small = CHAT[:-1] + b',"max_tokens":4}'
    running = [await _holding(server, client, small) for _ in range(2)]
    assert await _left(server, upstream) == 2
    assert (await client.ask(post(small))).error == "token_limit_exceeded"
    for stream_id in running:
        assert (await client.ask(_delete(stream_id))).status == 204
    assert await _left(server, upstream) == 6


async def _holding(server: InProcess, client: RawClient, body: bytes) -> str:
    """Open an answer of ``_hold`` and wait until it has said its one token; gives its SID."""
    response = await client.ask(post(body))
    assert response.status == 201
    stream = server.desk.find(response.json["id"])
    assert stream is not None
    await until(lambda: stream.log.next_number > 1, within=5)
    return stream.id


async def test_an_answer_that_asks_for_fewer_tokens_reserves_fewer(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """And without a word of the client's as many as SLUICE_MAX_TOKENS."""
    upstream.script = _hold
    server = await serve(SLUICE_TOKEN_LIMIT="100/3600", SLUICE_MAX_TOKENS="30", SLUICE_RATE_LIMIT="off")
    client = await connect(server)
    for members in (b"", b',"max_tokens":5', b',"max_tokens":1000'):
        await _holding(server, client, CHAT[:-1] + members + b"}")
    upstream.script = _say(30)
    assert (await client.ask()).body.endswith(b"[DONE]\n\n")
    assert await _left(server, upstream) == 100 - 30 - 5 - 30 - 30


async def _before_the_head(call: Call) -> None:
    await call.gone()


async def _refuse(call: Call) -> None:
    await call.refuse(400)


async def _cut_after_two(call: Call) -> None:
    await call.head()
    await call.token("x")
    await call.token("x")
    call.reset()


@pytest.mark.parametrize(("script", "charged"), [(_refuse, 0), (_cut_after_two, 2)])
async def test_an_answer_that_fails_costs_what_it_generated(
    serve: Serve, upstream: ScriptedUpstream, script: Script, charged: int
) -> None:
    upstream.script = script
    server = await serve(SLUICE_TOKEN_LIMIT="10/3600", SLUICE_RETRIES="0")
    assert (await ask(server.url)).error is not None
    assert await _left(server, upstream) == 10 - charged


@pytest.mark.parametrize(("script", "charged"), [(_before_the_head, 0), (_hold, 1)])
@pytest.mark.parametrize("how", ["delete", "leave"])
async def test_an_answer_that_is_stopped_costs_what_it_generated(
    serve: Serve,
    upstream: ScriptedUpstream,
    connect: Connect,
    settled: Settled,
    script: Script,
    charged: int,
    how: str,
) -> None:
    """By DELETE, or because its only viewer left for good: what was reserved beyond it is given back at once."""
    upstream.script = script
    server = await serve(SLUICE_TOKEN_LIMIT="10/3600", SLUICE_RATE_LIMIT="off")
    async with open_stream(server.url) as stream:
        stream_id = (await anext(aiter(stream))).json["id"]
        await upstream.called()
        if charged:
            await stream.token()
        assert (await ask(server.url)).json["error"] == "token_limit_exceeded"
        if how == "delete":
            assert (await (await connect(server)).ask(_delete(stream_id))).status == 204
            assert await _left(server, upstream) == 10 - charged
    if how == "leave":
        await settled(server)
        assert await _left(server, upstream) == 10 - charged


async def test_a_retry_costs_nothing(serve: Serve, upstream: ScriptedUpstream) -> None:
    async def script(call: Call) -> None:
        if len(upstream.calls) == 1:
            await call.refuse(503)
        else:
            await _say(3)(call)

    upstream.script = script
    server = await serve(SLUICE_TOKEN_LIMIT="10/3600")
    assert (await ask(server.url)).complete
    assert await _left(server, upstream) == 7


async def test_each_client_has_tokens_of_its_own(serve: Serve, upstream: ScriptedUpstream) -> None:
    upstream.script = _say(10)
    server = await serve(SLUICE_TOKEN_LIMIT="10/3600")
    for address in ("203.0.113.1", "203.0.113.2"):
        assert (await ask(server.url, X_Real_IP=address)).complete
        assert (await ask(server.url, X_Real_IP=address)).status == 429


async def test_viewing_again_costs_no_tokens(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    """And is possible when all are used up: they were generated once."""
    upstream.script = _say(10)
    server = await serve(SLUICE_TOKEN_LIMIT="10/3600", SLUICE_RATE_LIMIT="off")
    given = await ask(server.url)
    stream_id = given.events[0].json["id"]
    for _ in range(3):
        assert (await view(f"{server.url}/api/streams/{stream_id}")).raw == given.raw
        rest = await view(f"{server.url}/api/stream", Last_Event_ID=f"{stream_id}.3")
        assert len(rest.tokens) == 7
    assert (await ask(server.url)).status == 429


async def test_too_many_streams_take_no_tokens(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """The cap is asked before both buckets."""
    upstream.script = _hold
    server = await serve(SLUICE_TOKEN_LIMIT="10/3600", SLUICE_MAX_STREAMS_PER_CLIENT="1", SLUICE_RATE_LIMIT="off")
    client = await connect(server)
    small = CHAT[:-1] + b',"max_tokens":2}'
    stream_id = await _holding(server, client, small)
    for _ in range(5):
        assert (await client.ask(post(small))).error == "too_many_streams"
    assert (await client.ask(_delete(stream_id))).status == 204
    await settled(server)
    assert await _left(server, upstream) == 9


@pytest.mark.parametrize("data", [request("/api/stream?q="), post(b"{"), post(CHAT[:-1] + b',"model":"x"}')])
async def test_a_refused_request_takes_no_tokens(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, data: bytes
) -> None:
    server = await serve(SLUICE_TOKEN_LIMIT="3/3600", SLUICE_RATE_LIMIT="off")
    client = await connect(server)
    for _ in range(5):
        assert (await client.ask(data)).status == 400
    assert await _left(server, upstream) == 3


async def test_many_answers_at_once_never_have_more_than_the_limit(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """A storm of one client, some of it stopped: what was generated is never more than the bucket held."""
    chance = random.Random(44)
    generated = 0

    async def script(call: Call) -> None:
        await call.head()
        for _ in range(chance.randrange(12)):
            await call.token("x")
            await asyncio.sleep(0)
        if chance.random() < 0.3:
            call.reset()
            return
        await call.finish()
        await call.done()

    upstream.script = script
    server = await serve(
        SLUICE_TOKEN_LIMIT="100/36000", SLUICE_RATE_LIMIT="off", SLUICE_RETRIES="0", SLUICE_MAX_STREAMS_PER_CLIENT="50"
    )

    async def one(members: bytes) -> int:
        client = await connect(server)
        response = await client.ask(post(CHAT[:-1] + members + b"}"))
        if response.status == 429:
            return 0
        stream_id = response.json["id"]
        if chance.random() < 0.3:
            await client.ask(_delete(stream_id))
        return (await client.ask(request(f"/api/streams/{stream_id}"))).body.count(b'{"token":')

    for _ in range(12):
        sizes = [chance.choice([b"", b',"max_tokens":3', b',"max_tokens":20']) for _ in range(6)]
        generated += sum(await asyncio.gather(*map(one, sizes)))
    await settled(server)
    assert 60 <= generated <= 100
    assert generated + await _left(server, upstream) == 100


async def test_without_a_token_limit_nothing_is_counted(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """``off`` is the default: an upstream that ignores ``max_tokens`` is relayed to its end."""
    upstream.script = _say(30, {"completion_tokens": 10**9})
    client = await connect(await serve(SLUICE_MAX_TOKENS="5"))
    for _ in range(2):
        assert (await client.ask()).body.endswith(b"[DONE]\n\n")
