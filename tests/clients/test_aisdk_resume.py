"""Stop, reload and dropped connections in chats of the AI SDK, majors 5 to 7 (contract, section 6)."""

from __future__ import annotations

from urllib.parse import quote

import aiohttp
import pytest

from tests.clients.aisdk_chat import SDKS, open_chat, outcome, said_by, shows, talk, user
from tests.clients.conftest import RunJs, StartJs
from tests.conftest import Serve
from tests.public.conftest import Wire
from tests.public.steps import by_hand, complete, opened
from tests.upstream_sim import Call, ScriptedUpstream

SETTINGS = {
    "SLUICE_SYSTEM_PROMPT": "",
    "SLUICE_RATE_LIMIT": "off",
    "SLUICE_RESUME_GRACE": "60",  # what ends sooner was ended by somebody
}
ASK = {"do": "send", "text": "Hi"}
RESUME = {"do": "resume"}

ENCODING_SDKS = [sdk for sdk in SDKS if sdk != "ai5"]  # 5.0.0 puts an id into the URL as it is

every_sdk = pytest.mark.parametrize("sdk", SDKS)


async def stop(url: str, chat_id: str = "chat") -> int:
    """Stop that chat's answer as an application does, whose SDK has no call for it, and return the status."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/api/chat/{quote(chat_id, safe='')}/stop") as response,
    ):
        return response.status


async def half_answered(upstream: ScriptedUpstream, count: int = 1) -> Call:
    """The call of that number, which has said "Hel" and leaves the rest to the test."""
    call = await opened(upstream, count)
    await call.token("Hel")
    return call


# ---- stopping


@every_sdk
async def test_a_chat_that_aborts_has_only_left(
    start_js: StartJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """chat.stop() is a disconnect: the upstream goes on within the grace. POST …/stop closes it at once."""
    upstream.script = by_hand
    server = await serve(**SETTINGS)
    async with open_chat(start_js, sdk, server.url, ASK | {"stopAt": "Hel"}) as chat:
        call = await half_answered(upstream)
        [left] = await outcome(chat)
    assert (left.status, left.error, left.text) == ("ready", None, "Hel")
    await call.token("lo")
    assert call.open

    assert await stop(server.url) == 204
    await call.gone()


@every_sdk
async def test_whoever_reads_an_answer_that_is_stopped_sees_it_aborted(
    start_js: StartJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """A stop ends the answer for all its viewers by an `abort` part; what they have stays, and is no error."""
    upstream.script = by_hand
    server = await serve(**SETTINGS)
    async with open_chat(start_js, sdk, server.url, ASK) as chat:
        call = await half_answered(upstream)
        await shows(chat, "Hel")
        async with open_chat(start_js, sdk, server.url, RESUME, messages=[user("Hi")]) as other:
            await shows(other, "Hel")

            assert await stop(server.url) == 204
            await call.gone()

            [asked], [resumed] = await outcome(chat), await outcome(other)
    for seen in (asked, resumed):
        assert (seen.status, seen.error, seen.text) == ("ready", None, "Hel")
        assert seen.part_types[-1] == "abort"
    assert len(upstream.calls) == 1


@every_sdk
async def test_a_chat_goes_on_after_a_stop(
    start_js: StartJs, run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """The next question carries what there was of the stopped answer, and has an answer of its own."""
    upstream.script = by_hand
    server = await serve(**SETTINGS)
    async with open_chat(start_js, sdk, server.url, ASK, {"do": "send", "text": "And?"}) as chat:
        await half_answered(upstream)
        await shows(chat, "Hel")
        assert await stop(server.url) == 204

        call = await half_answered(upstream, 2)
        await complete(call)
        _, again = await outcome(chat)

    assert (again.status, again.text) == ("ready", "Hel")
    assert len(again.messages) == 4
    assert [message["content"] for message in call.json["messages"]] == ["Hi", "Hel", "And?"]


# ---- a reload


@every_sdk
async def test_a_reloaded_page_gets_the_running_answer_from_its_start(
    start_js: StartJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """A page that has kept the question gets the whole answer, as the message that it was before."""
    upstream.script = by_hand
    server = await serve(**SETTINGS)
    async with open_chat(start_js, sdk, server.url, ASK) as chat:
        call = await half_answered(upstream)
        message_id = await shows(chat, "Hel")
    await call.token("lo")
    async with open_chat(start_js, sdk, server.url, RESUME, messages=[user("Hi")]) as reloaded:
        await shows(reloaded, "Hello")
        await call.token("!")
        await complete(call)
        [resumed] = await outcome(reloaded)

    assert (resumed.status, resumed.error) == ("ready", None)
    assert [said_by(message) for message in resumed.messages] == ["Hi", "Hello!"]
    assert resumed.messages[-1]["id"] == message_id
    assert len(upstream.calls) == 1


@every_sdk
async def test_a_reloaded_page_that_kept_half_an_answer_shows_the_whole(
    start_js: StartJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """By the stable id the SDK replaces the half that it knows. 5.0.0 does not, and appends to it."""
    upstream.script = by_hand
    server = await serve(**SETTINGS)
    async with open_chat(start_js, sdk, server.url, ASK) as chat:
        call = await half_answered(upstream)
        message_id = await shows(chat, "Hel")
    half = {
        "id": message_id,
        "role": "assistant",
        "parts": [{"type": "step-start"}, {"type": "text", "text": "Hel", "state": "streaming"}],
    }
    whole = "HelHello" if sdk == "ai5" else "Hello"
    async with open_chat(start_js, sdk, server.url, RESUME, messages=[user("Hi"), half]) as reloaded:
        await call.token("lo")
        await shows(reloaded, whole)
        await complete(call)
        [resumed] = await outcome(reloaded)

    assert [said_by(message) for message in resumed.messages] == ["Hi", whole]
    assert resumed.messages[-1]["id"] == message_id


@every_sdk
async def test_where_nothing_runs_there_is_nothing_to_resume(
    run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """204 before the first question and after the answer's end; 5.0.0 then waits for ever, its successors are ready."""
    server = await serve(**SETTINGS)

    before, asked, after = await talk(run_js, sdk, server.url, RESUME, ASK, RESUME)

    assert (asked.status, asked.text) == ("ready", "Hello")
    for resumed in (before, after):
        assert resumed.status == ("submitted" if sdk == "ai5" else "ready")
        assert (resumed.error, resumed.parts) == (None, [])
    assert after.messages == asked.messages
    assert len(upstream.calls) == 1


# ---- the network drops


@every_sdk
async def test_a_dropped_connection_costs_no_part_of_an_answer(
    start_js: StartJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """The chat that resumes gets the whole answer, and nothing is generated anew.

    Majors 6 and 7 put it in the place of their half; 5 appends it, which an application on 5 has to mend.
    """
    upstream.script = by_hand
    server = await serve(**SETTINGS)
    async with Wire(server.url) as wire, open_chat(start_js, sdk, wire.url, ASK, RESUME) as chat:
        call = await half_answered(upstream)
        message_id = await shows(chat, "Hel")
        wire.cut()
        await call.token("lo")
        whole = "HelHello" if sdk.startswith("ai5") else "Hello"
        await shows(chat, whole)
        await complete(call)
        dropped, resumed = await outcome(chat)

    assert (dropped.status, dropped.text) == ("error", "Hel")
    assert (resumed.status, resumed.error) == ("ready", None)
    assert [said_by(message) for message in resumed.messages] == ["Hi", whole]
    assert resumed.messages[-1]["id"] == message_id
    assert "".join(part.get("delta", "") for part in resumed.parts) == "Hello"
    assert len(upstream.calls) == 1


@every_sdk
async def test_a_connection_that_drops_before_the_first_token_loses_nothing(
    start_js: StartJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """The answer is there to resume as soon as its first bytes have come."""
    upstream.script = by_hand
    server = await serve(**SETTINGS)
    async with Wire(server.url) as wire, open_chat(start_js, sdk, wire.url, ASK, RESUME) as chat:
        call = await opened(upstream)
        while (await chat.says())["role"] != "assistant":
            pass
        wire.cut()
        await call.token("Hello")
        await shows(chat, "Hello")
        await complete(call)
        _, resumed = await outcome(chat)

    assert (resumed.status, resumed.error, resumed.text) == ("ready", None, "Hello")
    assert len(upstream.calls) == 1


@every_sdk
async def test_an_answer_that_ended_while_its_reader_was_gone_is_not_lost(
    start_js: StartJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """It is there to resume although it runs no more, until somebody has had the whole of it."""
    upstream.script = by_hand
    server = await serve(**SETTINGS)
    async with open_chat(start_js, sdk, server.url, ASK) as chat:
        call = await half_answered(upstream)
        message_id = await shows(chat, "Hel")
    await call.token("lo")
    await complete(call)
    async with open_chat(start_js, sdk, server.url, RESUME, RESUME, messages=[user("Hi")]) as reloaded:
        resumed, again = await outcome(reloaded)

    assert (resumed.status, resumed.error, resumed.text) == ("ready", None, "Hello")
    assert resumed.messages[-1]["id"] == message_id
    assert again.parts == []
    assert len(upstream.calls) == 1


# ---- the chat's id


@pytest.mark.parametrize("sdk", ENCODING_SDKS)
@pytest.mark.parametrize("chat_id", ["a b/ü?#%", "%2F", "…/stream", "x.y~z", "日本語"])
async def test_a_chat_may_have_any_id(
    start_js: StartJs, serve: Serve, upstream: ScriptedUpstream, sdk: str, chat_id: str
) -> None:
    """The id is the application's: it comes percent-encoded as one segment of the path, and is compared decoded."""
    upstream.script = by_hand
    server = await serve(**SETTINGS)
    async with open_chat(start_js, sdk, server.url, ASK, chat_id=chat_id) as chat:
        call = await half_answered(upstream)
        await shows(chat, "Hel")
    async with open_chat(start_js, sdk, server.url, RESUME, chat_id=chat_id, messages=[user("Hi")]) as reloaded:
        await shows(reloaded, "Hel")
        assert await stop(server.url, chat_id) == 204
        await call.gone()
        [resumed] = await outcome(reloaded)
    assert resumed.part_types[-1] == "abort"
