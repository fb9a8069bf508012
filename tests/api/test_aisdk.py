"""``/api/chat``, to the byte (contract, section 6); tests/clients has the AI SDK itself."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote

import pytest

from tests.api.conftest import Connect, Settled
from tests.api.observing import until
from tests.api.raw_client import LEAVING, RawClient, Response, post, request
from tests.conftest import InProcess, Serve
from tests.upstream_sim import Call, ScriptedUpstream, answer, chunk


def user(*parts: Any) -> dict[str, Any]:
    """A message of the user's; texts are text parts."""
    return {"id": "u", "role": "user", "parts": [_part(part) for part in parts], "metadata": {"any": 1}}


def assistant(*parts: Any) -> dict[str, Any]:
    return {"id": "a", "role": "assistant", "parts": [{"type": "step-start"}, *map(_part, parts)]}


def _part(part: Any) -> Any:
    return {"type": "text", "text": part, "state": "done"} if isinstance(part, str) else part


def ask(*messages: dict[str, Any], chat: str = "c1", **fields: Any) -> bytes:
    body = {"id": chat, "messages": list(messages or [user("hi")]), "trigger": "submit-message"} | fields
    return post(json.dumps(body).encode(), target="/api/chat")


def resume(chat: str = "c1") -> bytes:
    return request(f"/api/chat/{quote(chat, safe='')}/stream")


def stop(chat: str = "c1") -> bytes:
    return request(f"/api/chat/{quote(chat, safe='')}/stop", "Content-Length: 0", method="POST")


def parts_of(body: bytes) -> list[Any]:
    """The parts of a stream: ``data`` blocks alone, and ``[DONE]`` as a text."""
    blocks = [block for block in body.replace(b": ping\n", b"").decode().split("\n\n") if block]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


@pytest.fixture
async def server(serve: Serve) -> InProcess:
    return await serve(SLUICE_RATE_LIMIT="off", SLUICE_SYSTEM_PROMPT="", SLUICE_RETRIES="0")


class Held:
    """An answer that says one token, and the rest when it is let."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def __call__(self, call: Call) -> None:
        await call.head()
        await call.token("Hel")
        waits = asyncio.ensure_future(self.go_on.wait())
        gone = asyncio.ensure_future(call.gone())
        await asyncio.wait([waits, gone], return_when=asyncio.FIRST_COMPLETED)
        waits.cancel()
        gone.cancel()
        await call.token("lo")
        await call.finish()
        await call.done()


@pytest.fixture
def held(upstream: ScriptedUpstream) -> Held:
    upstream.script = script = Held()
    return script


# ---- The parts


async def test_an_answer_is_the_parts_of_one_message(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, settled: Settled
) -> None:
    """§6: with the minimal keys of each part only: version 5.0.0 takes no other."""
    response = await (await connect(server)).ask(ask())
    assert (response.status, response.complete) == (200, True)
    assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    start, *parts = parts_of(response.body)
    assert set(start) == {"type", "messageId"}
    assert parts == [
        {"type": "start-step"},
        {"type": "text-start", "id": "1"},
        {"type": "text-delta", "id": "1", "delta": "Hel"},
        {"type": "text-delta", "id": "1", "delta": "lo"},
        {"type": "text-end", "id": "1"},
        {"type": "finish-step"},
        {"type": "finish"},
        "[DONE]",
    ]
    await settled(server)


async def test_reasoning_and_text_take_turns(server: InProcess, upstream: ScriptedUpstream, connect: Connect) -> None:
    async def script(call: Call) -> None:
        await call.head()
        for delta in ({"reasoning": "a"}, {"reasoning": "b"}, {"content": "c"}, {"reasoning_content": "d"}):
            await call.event(chunk(delta))
        await call.finish()
        await call.done()

    upstream.script = script
    _, _, *parts, _, _, _ = parts_of((await (await connect(server)).ask(ask())).body)
    assert [(part["type"], part["id"], part.get("delta")) for part in parts] == [
        ("reasoning-start", "1", None),
        ("reasoning-delta", "1", "a"),
        ("reasoning-delta", "1", "b"),
        ("reasoning-end", "1", None),
        ("text-start", "2", None),
        ("text-delta", "2", "c"),
        ("text-end", "2", None),
        ("reasoning-start", "3", None),
        ("reasoning-delta", "3", "d"),
        ("reasoning-end", "3", None),
    ]


@pytest.mark.parametrize("gap", [0.0, 0.002])
async def test_every_text_arrives_exactly(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, gap: float
) -> None:
    texts = ["a", "ä😀", '"quoted"', "two\nlines", "\u2028", "\\", *map(str, range(20))]
    upstream.script = answer(texts, gap=gap)
    parts = parts_of((await (await connect(server)).ask(ask())).body)
    assert [part["delta"] for part in parts[:-1] if part["type"] == "text-delta"] == texts


async def test_a_failure_is_an_error_part_and_no_done(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """§6: any failure; its text is ours, and the text so far stays."""

    async def script(call: Call) -> None:
        await call.head()
        await call.token("a")
        call.close()

    upstream.script = script
    *_, delta, error = parts_of((await (await connect(server)).ask(ask())).body)
    assert delta["delta"] == "a"
    assert error == {"type": "error", "errorText": "The model's answer was cut before its end."}


async def test_silence_is_filled_with_comments(serve: Serve, upstream: ScriptedUpstream, connect: Connect) -> None:
    async def script(call: Call) -> None:
        await asyncio.sleep(0.4)
        await answer()(call)

    upstream.script = script
    server = await serve(SLUICE_HEARTBEAT="0.1")
    body = (await (await connect(server)).ask(ask())).body
    assert b"\n\n: ping\n" in body
    assert parts_of(body)[-1] == "[DONE]"


# ---- What is asked


@pytest.mark.parametrize(
    ("messages", "sent"),
    [
        ([user("hi")], [("user", "hi")]),
        ([user("a", "b")], [("user", "ab")]),
        ([user("q"), assistant("a"), user("r")], [("user", "q"), ("assistant", "a"), ("user", "r")]),
        ([user("q"), assistant(), user("r")], [("user", "q"), ("user", "r")]),
        (
            [user("q"), assistant({"type": "reasoning", "text": "hm", "id": "0"}, "a"), user("r")],
            [("user", "q"), ("assistant", "a"), ("user", "r")],
        ),
        (
            [{"id": "s", "role": "system", "parts": [{"type": "text", "text": "be"}]}, user("q")],
            [("system", "be"), ("user", "q")],
        ),
        ([user("q"), assistant("half")], [("user", "q"), ("assistant", "half")]),
        (
            [user({"type": "file", "mediaType": "image/png", "url": "data:image/png;base64,AA"}, "what?")],
            [
                (
                    "user",
                    [
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
                        {"type": "text", "text": "what?"},
                    ],
                )
            ],
        ),
    ],
)
async def test_a_chats_messages_reach_the_upstream_as_a_conversation(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, messages: list[Any], sent: list[Any]
) -> None:
    response = await (await connect(server)).ask(
        ask(*messages, trigger="regenerate-message", messageId="a", app={"x": 1})
    )
    assert response.status == 200
    assert [(message["role"], message["content"]) for message in upstream.calls[0].json["messages"]] == sent


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b'{"messages":[]}', "messages"),
        (b'{"id":"c","messages":[]}', "messages"),
        (b'{"id":"","messages":[{"role":"user","parts":[]}]}', "id"),
        (b'{"id":7,"messages":[{"role":"user","parts":[]}]}', "id"),
        (b'{"id":"c","messages":[{"role":"tool","parts":[]}]}', "role"),
        (b'{"id":"c","messages":[{"role":"user","content":"hi"}]}', "parts"),
        (b'{"id":"c","messages":[{"role":"user","parts":[]}]}', "empty"),
        (b'{"id":"c","messages":[{"role":"user","parts":[{"type":"text","text":" "}]}]}', "empty"),
        (b'{"id":"c","messages":[{"role":"user","parts":[{"type":"text","text":"a\\u0000"}]}]}', "NUL"),
        (b'{"id":"c","messages":[{"role":"assistant","parts":[]}]}', "no message"),
        (
            b'{"id":"c","messages":[{"role":"user","parts":[{"type":"file","mediaType":"text/x","url":"data:,"}]}]}',
            "file",
        ),
        (
            b'{"id":"c","messages":[{"role":"user","parts":[{"type":"file","mediaType":"image/png","url":"file:///e"}]}]}',
            "file",
        ),
        (b'{"id":"c","messages":[{"role":"user","parts":[{"type":"text","text":"%b"}]}]}' % (b"x" * 32_001), "32001"),
    ],
    ids=lambda value: value[:70].decode() if isinstance(value, bytes) else None,
)
async def test_a_refusal_is_a_short_plain_text(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, body: bytes, word: str
) -> None:
    """§6: the AI SDK shows it to people as it is."""
    response = await (await connect(server)).ask(post(body, target="/api/chat"))
    assert response.status == 400
    check_refusal(response)
    assert word in response.body.decode()
    assert upstream.calls == []


def check_refusal(response: Response) -> None:
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    text = response.body.decode()
    assert 10 < len(text) < 400
    assert not text.startswith("{")


async def test_limits_are_told_the_same_way(serve: Serve, connect: Connect) -> None:
    server = await serve(SLUICE_RATE_LIMIT="1/1000")
    client = await connect(server)
    await client.ask(ask())
    response = await client.ask(ask())
    assert response.status == 429
    assert int(response.headers["Retry-After"]) > 0
    check_refusal(response)


# ---- Resuming


async def opened(client: RawClient, data: bytes) -> bytes:
    """Ask, and read until the first token is there."""
    await client.send(data)
    assert (await client.read_head()).status == 200
    return await client.read_until(b'"Hel"}')


@pytest.mark.parametrize("how", LEAVING)
async def test_a_chat_that_comes_back_gets_its_answer_from_the_start(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, settled: Settled, held: Held, how: str
) -> None:
    """§6: with the same messageId; a client abort is a disconnect, not a stop. And it is paid for once."""
    client = await connect(server)
    seen = await opened(client, ask(chat="a b/ü?#%"))
    LEAVING[how](client)
    back = await connect(server)
    before = await opened(back, resume("a b/ü?#%"))
    held.go_on.set()
    rest = await back.read_until(b"0\r\n\r\n")
    start = b'"messageId":"'
    assert before.partition(start)[2][:20] == seen.partition(start)[2][:20]
    assert b'"delta":"lo"' in rest
    assert b"[DONE]" in rest
    assert len(upstream.calls) == 1
    await settled(server)


async def test_a_second_tab_reads_along(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, held: Held
) -> None:
    first, second = await connect(server), await connect(server)
    await opened(first, ask())
    await opened(second, resume())
    held.go_on.set()
    for client in (first, second):
        assert b"[DONE]" in await client.read_until(b"0\r\n\r\n")


async def test_204_where_none_runs(server: InProcess, connect: Connect) -> None:
    """§6: unknown, or read to its end."""
    client = await connect(server)
    assert (await client.ask(resume("nobody"))).status == 204
    assert (await client.ask(ask())).complete
    await until(lambda: server.desk.streams == 0, within=2)
    assert (await client.ask(resume())).status == 204


async def test_what_ended_while_the_connection_was_gone_is_not_lost(
    server: InProcess, connect: Connect, held: Held, settled: Settled
) -> None:
    """A dropped connection loses nothing: there, 204 would leave half an answer that looks whole."""
    client = await connect(server)
    await opened(client, ask())
    client.reset()
    held.go_on.set()
    await until(lambda: server.desk.kept == 1, within=2)
    response = await (await connect(server)).ask(resume())
    assert [part["delta"] for part in parts_of(response.body)[:-1] if part["type"] == "text-delta"] == ["Hel", "lo"]
    assert (await (await connect(server)).ask(resume())).status == 204, "it has been read now"
    await settled(server)


async def test_nobody_back_within_the_grace_ends_it(
    serve: Serve, upstream: ScriptedUpstream, connect: Connect, held: Held
) -> None:
    """§6: the grace of section 4 holds."""
    server = await serve(SLUICE_RESUME_GRACE="0.1")
    client = await connect(server)
    await opened(client, ask())
    client.close()
    await until(lambda: upstream.calls[0].gone_at is not None, within=2)
    assert (await (await connect(server)).ask(resume())).status == 204


# ---- Stopping


async def test_a_stop_closes_the_upstream_request_and_is_an_abort(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, settled: Settled, held: Held
) -> None:
    """§6: 204; viewers get ``abort``."""
    client = await connect(server)
    await opened(client, ask())
    other = await connect(server)
    assert (await other.ask(stop())).status == 204
    await until(lambda: upstream.calls[0].gone_at is not None, within=2)
    assert b'data: {"type":"text-end","id":"1"}\n\ndata: {"type":"abort"}\n\ndata: [DONE]' in await client.read_until(
        b"0\r\n\r\n"
    )
    assert (await other.ask(stop())).status == 204
    assert (await other.ask(resume())).status == 204
    assert (await other.ask(stop("nobody"))).status == 204
    await settled(server)


async def test_a_stop_takes_any_body(server: InProcess, connect: Connect, held: Held) -> None:
    """The AI SDK's documents send ``{"activeStreamId":…}``."""
    client = await connect(server)
    await opened(client, ask())
    body = post(b'{"activeStreamId":"x"}', target="/api/chat/c1/stop")
    assert (await (await connect(server)).ask(body)).status == 204


async def test_a_new_question_ends_the_answer_that_the_chat_waits_for_no_more(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, held: Held
) -> None:
    """Nobody could find it any more, and it costs money."""
    client = await connect(server)
    await opened(client, ask())
    client.close()
    await opened(await connect(server), ask(user("another")))
    await until(lambda: upstream.calls[0].gone_at is not None, within=2)
    assert upstream.calls[1].open
    back = await connect(server)
    await opened(back, resume())


async def test_a_chat_is_its_clients(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect, held: Held
) -> None:
    """Names of chats are the pages' own, and often the same for all: nobody reads, stops or replaces another's."""
    other = b"X-Forwarded-For: 203.0.113.7\r\nHost:"
    await opened(await connect(server), ask())
    stranger = await connect(server)
    assert (await stranger.ask(resume().replace(b"Host:", other))).status == 204
    assert (await stranger.ask(stop().replace(b"Host:", other))).status == 204
    await opened(stranger, ask(user("mine")).replace(b"Host:", other))
    await asyncio.sleep(0.1)
    assert all(call.open for call in upstream.calls)
    await opened(await connect(server), resume())


async def test_an_answer_of_any_length_does_not_lock_its_chat(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """The bound of a message is for what its client writes; what we wrote comes back with every turn."""
    long = "x" * 40_000
    assert (await (await connect(server)).ask(ask(user("q"), assistant(long), user("r")))).status == 200
    assert upstream.calls[0].json["messages"][1]["content"] == long


async def test_half_a_character_does_not_lock_its_chat(
    server: InProcess, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """An answer that was stopped between two deltas may end with half a surrogate pair, and comes back so."""
    body = ask(user("q"), assistant("a\ud83d"), user("\\ud83d \U0001f600 r"))
    assert b"\\ud83d" in body
    assert (await (await connect(server)).ask(body)).status == 200
    texts = [message["content"] for message in upstream.calls[0].json["messages"]]
    assert texts == ["q", "a\ufffd", "\\ud83d \U0001f600 r"]


async def test_a_chats_answer_is_of_its_own_language_only(server: InProcess, connect: Connect, held: Held) -> None:
    """Its messageId is no stream's id: /api/streams neither shows nor stops it."""
    client = await connect(server)
    seen = await opened(client, ask())
    message_id = seen.partition(b'"messageId":"')[2].partition(b'"')[0].decode()
    other = await connect(server)
    assert (await other.ask(request(f"/api/streams/{message_id}"))).status == 404
    assert (await other.ask(request(f"/api/streams/{message_id}", method="DELETE"))).status == 404
    assert (await other.ask(request(f"/api/streams/{message_id.removeprefix('msg-')}"))).status == 404
