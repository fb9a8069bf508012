"""Several turns: what is sent along, what can be changed, what is kept and by which tab (contract, section 4)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from playwright.async_api import Locator, expect

from tests.conftest import Launch
from tests.public.conftest import GONE_S, Visit, VisitPage
from tests.public.steps import complete, half_answered
from tests.upstream_sim import Call, ScriptedUpstream, answer

BOUNDLESS = {"SLUICE_RATE_LIMIT": "off"}


def sent(call: Call) -> list[tuple[str, str]]:
    """The conversation as the upstream got it, the server's own instructions aside."""
    return [(one["role"], one["content"]) for one in call.json["messages"] if one["role"] != "system"]


async def exchange(page: Visit, upstream: ScriptedUpstream, question: str, reply: str) -> None:
    upstream.script = answer([reply])
    await page.ask(question)
    await page.shows(reply)
    await page.reaches("done")


def tool(page: Visit, speaker: str, place: int, name: str) -> Locator:
    """The button of that name below what the speaker said in that turn."""
    message = page.page.get_by_role("article", name=speaker).nth(place)
    return message.get_by_role("button", name=name, exact=True).last


async def questions(page: Visit) -> list[str]:
    return await page.page.locator(".asked").all_text_contents()


# ---- several turns


async def test_each_question_is_sent_with_what_was_said_before(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """The Markdown as it was written, not as it is shown."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    await exchange(page, upstream, "One?", "First")
    upstream.script = answer(["**Sec", "ond**\n\n- a"])
    await page.ask("Two?")
    await page.reaches("done")
    await exchange(page, upstream, "Three?", "Third")
    assert sent(upstream.calls[2]) == [
        ("user", "One?"),
        ("assistant", "First"),
        ("user", "Two?"),
        ("assistant", "**Second**\n\n- a"),
        ("user", "Three?"),
    ]
    assert await questions(page) == ["One?", "Two?", "Three?"]


async def test_an_answer_that_never_began_is_left_out_and_a_stopped_one_is_not(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    upstream.script = lambda call: call.refuse(400)
    await page.ask("One?")
    await page.reaches("error")
    await half_answered(page, upstream)
    await page["stop"].click()
    await page.reaches("stopped")
    await exchange(page, upstream, "Three?", "Third")
    assert sent(upstream.calls[-1]) == [("user", "One?"), ("user", "Why?"), ("assistant", "Half"), ("user", "Three?")]
    notes = page.page.locator(".note")
    await expect(notes.nth(0)).to_be_visible()  # what became of them stands by them, now that the status is another's
    await expect(notes.nth(1)).to_have_text("Stopped after 1 token")
    await expect(notes.nth(2)).to_be_hidden()


async def test_the_oldest_turns_make_way_where_the_server_takes_no_more(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """At most 1,000 messages, 1 MiB of JSON, each within its bound; the question itself is never dropped."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    choose = """async ([turns, max]) => {
      const {messagesOf} = await import("/conversation.js");
      return messagesOf({turns: turns.map(([question, answer]) => ({question, answer}))}, max);
    }"""

    async def chosen(turns: list[tuple[str, str]], longest: int = 32_000) -> list[Any]:
        messages: list[Any] = await page.page.evaluate(choose, [turns, longest])
        assert len(messages) <= 1000
        assert len(json.dumps({"messages": messages}, ensure_ascii=False).encode()) <= 1 << 20
        return messages

    many = await chosen([(f"q{number}", f"a{number}") for number in range(800)] + [("last", "")])
    assert (many[0]["content"], many[0]["role"], many[-1]["content"]) == ("q301", "user", "last")
    large = await chosen([(f"q{number}", "ü" * 30_000) for number in range(40)] + [("last", "")])
    assert 15 < len(large) < 40
    assert large[0]["role"] == "user"
    assert await chosen([("q" * 50, "👍" * 50), ("last", "")], 10) == [
        {"role": "user", "content": "q" * 10},
        {"role": "assistant", "content": "👍" * 10},
        {"role": "user", "content": "last"},
    ]
    assert (await chosen([("a\0b", "x"), ("last", "")]))[0]["content"] == "ab"


async def test_a_question_may_be_written_while_an_answer_is_under_way(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    call = await half_answered(page, upstream)
    await page["question"].fill("And then?")
    await page["question"].press("Enter")
    assert len(upstream.calls) == 1
    await complete(call)
    await page.reaches("done")
    await expect(page["question"]).to_have_value("And then?")
    upstream.script = answer(["Then"])
    await page["question"].press("Enter")
    await page.shows("Then")


# ---- changing what was said


async def test_an_edited_question_is_asked_instead_and_what_came_after_it_goes(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    for number in ("One", "Two", "Three"):
        await exchange(page, upstream, f"{number}?", f"Answer {number}")
    editor = page.page.get_by_role("textbox", name="Your question, to be changed")

    await tool(page, "You", 1, "Edit").click()
    await expect(editor).to_be_focused()
    await expect(editor).to_have_value("Two?")
    await page.page.keyboard.press("Escape")  # leaves all as it was, and the keyboard where it was
    await expect(editor).to_have_count(0)
    await expect(tool(page, "You", 1, "Edit")).to_be_focused()
    assert await questions(page) == ["One?", "Two?", "Three?"]

    await tool(page, "You", 1, "Edit").click()
    await editor.fill("  ")
    await expect(page.page.get_by_role("button", name="Ask instead")).to_be_disabled()
    await editor.fill("Two, please?")
    upstream.script = answer(["Instead"])
    await page.page.keyboard.press("Enter")
    await page.shows("Instead")
    await page.reaches("done")
    assert await questions(page) == ["One?", "Two, please?"]
    assert sent(upstream.calls[-1]) == [("user", "One?"), ("assistant", "Answer One"), ("user", "Two, please?")]
    await page.has_kept("Answer One", "Instead")


async def test_a_question_edited_while_another_is_answered_stops_that_answer(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_RESUME_GRACE="60")
    page = await visit(server.url)
    await exchange(page, upstream, "One?", "First")
    await tool(page, "You", 0, "Edit").click()
    call = await half_answered(page, upstream)
    upstream.script = answer(["Instead"])
    await page.page.get_by_role("textbox", name="Your question, to be changed").press("Enter")
    await asyncio.wait_for(call.gone(), GONE_S)
    await page.shows("Instead")
    await page.reaches("done")
    await page.has_kept("Instead")


async def test_regenerate_asks_the_same_again(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage) -> None:
    """Of the last answer only, and not while one is under way."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    await exchange(page, upstream, "One?", "First")
    await exchange(page, upstream, "Two?", "Second")
    regenerate = page.page.get_by_role("button", name="Regenerate")
    await expect(regenerate).to_have_count(1)
    await regenerate.focus()
    upstream.script = answer(["Better"])
    await page.page.keyboard.press("Enter")
    await page.shows("Better")
    await page.reaches("done")
    assert await page.focused() in {"stop", "question"}  # and not lost with the button
    assert upstream.calls[2].json == upstream.calls[1].json
    await page.has_kept("First", "Better")

    call = await half_answered(page, upstream)
    await expect(regenerate).to_have_count(0)
    await expect(page.page.get_by_role("button", name="Edit")).to_have_count(0)
    await complete(call)


async def test_messages_and_code_are_copied_to_the_letter(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    code = 'def f():\n\treturn "<b>&amp;"  # 👍\n\n\nf()'
    whole = f"**Look:**\n\n```python\n{code}\n```\n\n1. `x`\n"
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    upstream.script = answer([whole[start : start + 5] for start in range(0, len(whole), 5)])
    await page.ask("Show *me*")
    await page.reaches("done")

    await page.page.get_by_role("button", name="Copy the code").click()
    assert await page.page.evaluate("copied") == code
    await expect(page.page.get_by_role("button", name="Copy the code")).to_have_text("Copied")
    await expect(page.page.locator(".code-language")).to_have_text("python")
    await tool(page, "Assistant", 0, "Copy").click()
    assert await page.page.evaluate("copied") == whole
    await tool(page, "You", 0, "Copy").click()
    assert await page.page.evaluate("copied") == "Show *me*"


async def test_there_is_no_copying_where_the_browser_has_no_clipboard(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """Plain http on a local network lacks it: a button that cannot work is not shown."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url, scripts=["delete navigator.clipboard, delete Navigator.prototype.clipboard;"])
    upstream.script = answer(["First\n\n```\ncode\n```"])
    await page.ask()
    await page.reaches("done")
    await expect(page.page.get_by_role("button", name="Regenerate")).to_be_visible()
    await expect(page.page.get_by_role("button", name="Copy")).to_have_count(0)


# ---- what is kept


async def test_chats_are_kept_found_again_and_deleted(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """In this browser, for a new tab too; newest first."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    await exchange(page, upstream, "One?\nMore of it", "First")
    await page["new-chat"].click()
    await page.reaches("idle")
    await expect(page["welcome"]).to_be_visible()
    assert await page.focused() == "question"
    assert await questions(page) == []
    await exchange(page, upstream, "Two?", "Second")
    assert sent(upstream.calls[1]) == [("user", "Two?")]

    tab = await page.another_tab(server.url)
    await tab.reaches("idle")
    await page.page.close()
    await tab["chats-open"].click()
    chats = tab.page.locator(".chat-open span")
    await expect(chats).to_have_text(["Two?", "One?"])
    await tab.page.get_by_role("button", name="One?").first.click()
    await expect(tab["chats"]).to_be_hidden()
    await tab.shows("First")
    await tab.reaches("done")
    await exchange(tab, upstream, "And?", "So")
    assert sent(upstream.calls[2]) == [("user", "One?\nMore of it"), ("assistant", "First"), ("user", "And?")]

    await tab["chats-open"].click()
    await expect(chats).to_have_text(["One?", "Two?"])
    await tab.page.get_by_role("button", name="Delete “One?”").click()
    await expect(chats).to_have_text(["One?", "Two?"])  # not at the first press
    await tab.page.get_by_role("button", name="Really delete “One?”").click()
    await expect(chats).to_have_text(["Two?"])
    await tab.page.keyboard.press("Escape")
    await tab.reaches("idle")
    assert await questions(tab) == []
    await tab.page.reload()
    await tab["chats-open"].click()
    await expect(chats).to_have_text(["Two?"])


async def test_a_new_chat_by_the_keyboard_stops_the_answer_under_way(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_RESUME_GRACE="60")
    page = await visit(server.url)
    call = await half_answered(page, upstream)
    await page.page.keyboard.press("Control+Shift+O")
    await asyncio.wait_for(call.gone(), GONE_S)
    await page.reaches("idle")
    assert await page.focused() == "question"
    await page["chats-open"].click()
    await page.page.get_by_role("button", name="Why?").first.click()
    await page.reaches("stopped")
    await expect(page["status"]).to_have_text("Stopped, because you turned to another chat")


async def test_two_tabs_keep_out_of_each_others_way(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """Each has a chat of its own; one that both show follows what either does."""
    server = await launch(LLM_BASE_URL=upstream.base_url, **BOUNDLESS)
    one = await visit(server.url)
    two = await one.another_tab(server.url)
    call_one = await half_answered(one, upstream)
    call_two = await half_answered(two, upstream)
    await call_one.token(" of one")
    await call_two.token(" of two")
    await one.shows("Half of one")
    await two.shows("Half of two")
    await complete(call_one)
    await complete(call_two)
    await one.reaches("done")
    await two.reaches("done")
    await one.has_kept("Half of one")
    await two.has_kept("Half of two")

    await two["chats-open"].click()
    await two.page.locator(".chat-open:not([aria-current])").click()
    await two.shows("Half of one")
    call = await half_answered(two, upstream)
    await one.shows("Half")  # it has followed
    assert await questions(one) == ["Why?", "Why?"]
    await call.token(" again")
    await one.shows("Half again")
    await one.page.close()  # and a tab that only looked on ends nothing
    await call.token(" and on")
    await complete(call)
    await two.reaches("done")
    await two.has_kept("Half of one", "Half again and on")


async def test_a_tab_that_was_overtaken_keeps_its_turns_apart(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """Two tabs that change one chat at the same time make two chats of it; neither loses a word."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    outcome = await page.page.evaluate("""async () => {
      const {History} = await import("/history.js");
      const {newConversation, newTurn} = await import("/conversation.js");
      const history = new History();
      const mine = newConversation();
      mine.turns.push(newTurn("shared"));
      history.change(mine);
      const theirs = history.load(mine.id);
      theirs.turns.push(newTurn("theirs"));
      history.change(theirs);
      history.save(mine);
      const before = mine.id;
      mine.turns.push(newTurn("mine"));
      history.change(mine);
      const read = (id) => history.load(id).turns.map(({question}) => question);
      return [before !== mine.id, read(before), read(mine.id), history.list().length];
    }""")
    assert outcome == [True, ["shared", "theirs"], ["shared", "mine"], 2]


@pytest.mark.parametrize("storage", ["localStorage", "sessionStorage"])
async def test_a_browser_that_keeps_nothing_chats_all_the_same(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage, storage: str
) -> None:
    forbid = (
        f"Object.defineProperty(window, '{storage}', {{get() {{ throw new DOMException('no', 'SecurityError'); }}}})"
    )
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url, scripts=[forbid])
    await exchange(page, upstream, "One?", "First")
    await exchange(page, upstream, "Two?", "Second")
    assert len(sent(upstream.calls[1])) == 3
    await page["chats-open"].click()
    await expect(page.page.locator(".chat-open span")).to_have_text(["One?"])
    assert page.complaints == []


async def test_a_full_storage_drops_the_oldest_and_breaks_nothing(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """Of conversations there are at most 50, and fewer where there is no room for them."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    fill = """async (size) => {
      const {History} = await import("/history.js");
      const {newConversation, newTurn} = await import("/conversation.js");
      const history = new History();
      for (let number = 0; number < 60; number += 1) {
        const conversation = newConversation();
        conversation.turns.push({...newTurn(`q${number}`), answer: "x".repeat(size)});
        history.change(conversation);
      }
      const titles = history.list().map(({title}) => title);
      const whole = history.list().every(({id}) => history.load(id).turns[0].answer.length === size);
      return [titles.length, titles[0], titles.at(-1), whole, Object.keys(localStorage).length - 1];
    }"""
    assert await page.page.evaluate(fill, 10) == [50, "q59", "q10", True, 50]
    length, first, _, whole, keys = await page.page.evaluate(fill, 400_000)
    assert 3 < length < 50
    assert (first, whole, keys) == ("q59", True, length)
    await exchange(page, upstream, "One?", "First")
    await page.page.reload()
    await page.shows("First")


async def test_what_is_kept_but_no_conversation_is_passed_over(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    spoil = """for (const [key, value] of [["sluice.chats", "nonsense"], ["sluice.chat.x", "{}"]])
      localStorage.setItem(key, value);
    sessionStorage.setItem("sluice.chat", "x");"""
    page = await visit(server.url, scripts=[spoil])
    await page.reaches("idle")
    await exchange(page, upstream, "One?", "First")
    assert page.complaints == []
