"""`useChat` of the AI SDK, majors 5 to 7, with nothing changed but its address (contract, section 6)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.errors import RateLimited, UpstreamUnreachable
from tests.clients.aisdk_chat import SDKS, said_by, talk
from tests.clients.conftest import RunJs
from tests.conftest import Serve
from tests.sluice_process import free_port
from tests.upstream_sim import Call, Script, ScriptedUpstream, answer, chunk

pytestmark = pytest.mark.parametrize("sdk", SDKS)

PLAIN = {"SLUICE_SYSTEM_PROMPT": "", "SLUICE_RATE_LIMIT": "off"}  # the upstream sees the chat's own words and no others

# What tears a text that somebody handles as bytes, UTF-16 units or lines: a flag, a family, a combining mark, line ends
# of Unicode and of HTTP, what ends an event, and right-to-left script.
UNICODE = ["🏳️‍🌈", "👨‍👩‍👧", "e\u0301", "\u2028\u0085", "\r\n\n", "data: x\n\n", "שלום", "\ufeff", "\u200d", "漢字"]


def deltas(*given: dict[str, Any]) -> Script:
    """An upstream whose answer is these deltas."""

    async def script(call: Call) -> None:
        await call.head()
        for delta in given:
            await call.event(chunk(delta))
        await call.finish()
        await call.done()

    return script


# ---- asking


async def test_an_answer_is_a_message_of_the_chat(
    run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """The parts are those of the AI SDK's stream, each with the keys that 5.0.0 takes; then the response ends."""
    upstream.script = answer(["Hel", "lo", "!"])
    server = await serve(**PLAIN)

    [asked] = await talk(run_js, sdk, server.url, {"do": "send", "text": "Hi"})

    assert (asked.status, asked.error, asked.text) == ("ready", None, "Hello!")
    assert asked.part_types == [
        *("start", "start-step", "text-start", "text-delta", "text-end", "finish-step", "finish"),
    ]
    assert asked.messages[-1]["id"] == asked.parts[0]["messageId"]
    assert [part.get("state", "done") for part in asked.messages[-1]["parts"]] == ["done", "done"]
    assert upstream.calls[0].json["messages"] == [{"role": "user", "content": "Hi"}]


async def test_a_delta_of_the_upstream_is_a_delta_of_the_chat(
    run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """No script, emoji, line end or byte order mark is torn, joined or lost, on either way."""
    upstream.script = answer(UNICODE)
    server = await serve(**PLAIN)
    question = "".join(UNICODE)

    [asked] = await talk(run_js, sdk, server.url, {"do": "send", "text": question})

    assert [part["delta"] for part in asked.parts if part["type"] == "text-delta"] == UNICODE
    assert asked.text == question
    assert upstream.calls[0].json["messages"] == [{"role": "user", "content": question}]


async def test_a_character_that_the_upstream_splits_over_two_deltas_arrives_whole(
    run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """Half a surrogate pair stays the JSON escape that it was (section 3), and JavaScript joins the halves."""
    upstream.script = deltas({"content": "a\ud83d"}, {"content": "\ude00b"})
    server = await serve(**PLAIN)

    [asked] = await talk(run_js, sdk, server.url, {"do": "send", "text": "Hi"})

    assert asked.text == "a😀b"


async def test_each_turn_carries_those_before_it(
    run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """The SDK sends its whole history, which the upstream gets as it was said; what was only thought is left out."""
    upstream.script = deltas({"reasoning_content": "Hm."}, {"content": "One"})
    server = await serve(**PLAIN)

    turns = await talk(run_js, sdk, server.url, *({"do": "send", "text": text} for text in ("1?", "2?", "3?")))

    assert [turn.status for turn in turns] == ["ready"] * 3
    assert [call.json["messages"][-3:] for call in upstream.calls[1:]] == [
        [
            {"role": "user", "content": before},
            {"role": "assistant", "content": "One"},
            {"role": "user", "content": text},
        ]
        for before, text in (("1?", "2?"), ("2?", "3?"))
    ]
    assert [message["role"] for message in turns[-1].messages] == ["user", "assistant"] * 3
    ids = [message["id"] for message in turns[-1].messages]
    assert len(set(ids)) == len(ids)


async def test_an_answer_can_be_asked_for_anew(
    run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """regenerate() sends the history without the last answer, which the new one replaces."""
    server = await serve(**PLAIN)
    answers = iter([["First"], ["Second"]])

    async def script(call: Call) -> None:
        await answer(next(answers))(call)

    upstream.script = script
    asked, again = await talk(run_js, sdk, server.url, {"do": "send", "text": "Hi"}, {"do": "regenerate"})

    assert [said_by(message) for message in again.messages] == ["Hi", "Second"]
    assert again.messages[-1]["id"] != asked.messages[-1]["id"]
    assert upstream.calls[1].json["messages"] == [{"role": "user", "content": "Hi"}]


async def test_what_the_model_thinks_is_kept_apart_from_what_it_says(
    run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """Reasoning and text that take turns are parts of their own, in their order, each closed."""
    thoughts = {"reasoning_content": "Let me"}, {"reasoning_content": " see."}
    upstream.script = deltas(*thoughts, {"content": "Yes"}, {"reasoning": "Really?"}, {"content": ", no."})
    server = await serve(**PLAIN)

    [asked] = await talk(run_js, sdk, server.url, {"do": "send", "text": "Hi"})

    shown = [(part["type"], part["text"], part["state"]) for part in asked.messages[-1]["parts"] if "text" in part]
    assert shown == [
        ("reasoning", "Let me see.", "done"),
        ("text", "Yes", "done"),
        ("reasoning", "Really?", "done"),
        ("text", ", no.", "done"),
    ]


async def test_heartbeats_are_not_seen(run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str) -> None:
    """In silence there are comment lines, before the first token and between two; no SDK stumbles over them."""

    async def silent_at_times(call: Call) -> None:
        await call.head()
        for text in ("Hel", "lo"):
            await asyncio.sleep(0.3)  # several heartbeats
            await call.token(text)
        await call.finish()
        await call.done()

    upstream.script = silent_at_times
    server = await serve(SLUICE_HEARTBEAT="0.05", **PLAIN)

    [asked] = await talk(run_js, sdk, server.url, {"do": "send", "text": "Hi"})

    assert (asked.status, asked.text) == ("ready", "Hello")


# ---- failing


async def test_an_upstream_that_is_not_there_is_an_error_in_our_words(run_js: RunJs, serve: Serve, sdk: str) -> None:
    """Any failure is an `error` part, and the chat shows its text."""
    server = await serve(**PLAIN, LLM_BASE_URL=f"http://127.0.0.1:{free_port()}/v1", SLUICE_RETRIES="0")

    [asked] = await talk(run_js, sdk, server.url, {"do": "send", "text": "Hi"})

    assert (asked.status, asked.error) == ("error", UpstreamUnreachable.message)


async def test_an_answer_that_breaks_off_keeps_its_half_and_says_so(
    run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """A cut answer never looks complete, and the next question is answered all the same."""
    answers = iter([["Half"], ["Whole"]])

    async def cut_the_first(call: Call) -> None:
        [text] = next(answers)
        if text == "Half":
            await call.head()
            await call.token(text)
            call.reset()
        else:
            await answer([text])(call)

    upstream.script = cut_the_first
    server = await serve(**PLAIN)

    asked, again = await talk(run_js, sdk, server.url, *({"do": "send", "text": text} for text in ("1?", "2?")))

    assert (asked.status, asked.text) == ("error", "Half")
    assert asked.error
    assert not set(asked.part_types) & {"finish", "abort"}
    assert (again.status, again.text) == ("ready", "Whole")
    assert [message["content"] for message in upstream.calls[1].json["messages"]] == ["1?", "Half", "2?"]


async def test_a_question_that_failed_before_its_answer_began_can_be_asked_again(
    run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """The history then holds an answer without any text, or two questions in a row: neither is refused."""
    answers = iter([None, None, ["Yes"]])

    async def refuse_twice(call: Call) -> None:
        if (tokens := next(answers)) is None:
            await call.refuse(400)
        else:
            await answer(tokens)(call)

    upstream.script = refuse_twice
    server = await serve(**PLAIN)

    steps = {"do": "send", "text": "1?"}, {"do": "regenerate"}, {"do": "send", "text": "2?"}
    failed, failed_again, asked = await talk(run_js, sdk, server.url, *steps)

    assert [failed.status, failed_again.status] == ["error", "error"]
    assert failed.error == failed_again.error
    assert (asked.status, asked.text) == ("ready", "Yes")
    assert upstream.calls[2].json["messages"] == [{"role": "user", "content": text} for text in ("1?", "2?")]


async def test_a_refusal_is_a_sentence_that_a_chat_can_show(
    run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """The SDK makes the body of a 429 its error message: so it is short and plain text, no JSON."""
    server = await serve(**PLAIN | {"SLUICE_RATE_LIMIT": "1/60"})

    asked, refused = await talk(run_js, sdk, server.url, *({"do": "send", "text": text} for text in ("1?", "2?")))

    assert asked.status == "ready"
    assert (refused.status, refused.error) == ("error", RateLimited.message)
    assert len(upstream.calls) == 1


async def test_a_message_over_the_bound_is_refused_in_a_sentence(
    run_js: RunJs, serve: Serve, upstream: ScriptedUpstream, sdk: str
) -> None:
    """A chat's message may have 32 times SLUICE_MAX_QUERY_CHARS code points (section 2), and one more is a 400."""
    server = await serve(**PLAIN, SLUICE_MAX_QUERY_CHARS="10")

    asked, refused = await talk(
        run_js, sdk, server.url, {"do": "send", "text": "😀" * 320}, {"do": "send", "text": "😀" * 321}
    )

    assert asked.status == "ready"
    assert refused.status == "error"
    assert refused.error is not None
    assert 0 < len(refused.error) < 300
    assert not refused.error.startswith("{")
    assert "\n" not in refused.error.strip()
    assert len(upstream.calls) == 1
