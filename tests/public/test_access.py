"""For every reader: by keyboard, by ear, on a phone, and at one's own pace."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from playwright.async_api import expect

from tests.conftest import Launch
from tests.public.conftest import GONE_S, Visit, VisitPage
from tests.public.steps import by_hand, complete, half_answered, opened
from tests.upstream_sim import Call, ScriptedUpstream, answer

SCROLLED = "document.scrollingElement.scrollTop"
TO_END = """(() => {
  const {scrollHeight, clientHeight, scrollTop} = document.scrollingElement;
  return scrollHeight - clientHeight - scrollTop;
})()"""
FOCUS_RING = """(() => {
  const {outlineStyle, outlineWidth} = getComputedStyle(document.activeElement);
  return [outlineStyle, parseFloat(outlineWidth)];
})()"""


# ---- the keyboard


async def test_the_keyboard_is_enough(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage) -> None:
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    keyboard = page.page.keyboard
    assert await page.focused() == "question"  # from the start
    await expect(page["ask"]).to_be_disabled()
    await keyboard.press("Enter")
    await page.reaches("idle")  # nothing to ask
    await keyboard.type("one")
    await keyboard.press("Shift+Enter")
    await keyboard.type("two")
    await keyboard.press("Enter")
    call = await opened(upstream)
    assert call.json["messages"][-1]["content"] == "one\ntwo"
    await call.token("Half")
    await page.shows("Half")
    await keyboard.press("Tab")
    assert await page.focused() == "stop"
    style, width = await page.page.evaluate(FOCUS_RING)
    assert style == "solid"
    assert width >= 2
    await keyboard.press("Enter")
    await page.reaches("stopped")
    await asyncio.wait_for(call.gone(), GONE_S)
    assert await page.focused() == "question"  # not lost with the button
    await keyboard.press("Shift+Tab")
    assert await page.focused() == "retry"
    await keyboard.press("Enter")
    call = await opened(upstream, 2)
    assert await page.focused() == "stop"
    await complete(call)
    await page.reaches("done")
    assert await page.focused() == "question"


async def test_the_list_of_chats_keeps_the_keyboard_until_it_is_closed(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    call = await half_answered(page, upstream)
    await page["chats-open"].focus()
    await page.page.keyboard.press("Enter")
    await expect(page["chats"]).to_be_visible()
    assert await page.page.evaluate("document.activeElement.closest('#chats') !== null")
    await page.page.keyboard.press("Escape")  # closes the list, and stops no answer
    await expect(page["chats"]).to_be_hidden()
    assert await page.focused() == "chats-open"
    await page.reaches("generating")
    await complete(call)
    await page.reaches("done")


# ---- the ear


async def test_a_screen_reader_hears_states_and_no_tokens(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    live = "[aria-live], [role=status], [role=alert], [role=log], output"
    reply = page.page.get_by_role("article", name="Assistant")
    await page.ask()
    call = await opened(upstream)
    await expect(reply).to_have_attribute("aria-busy", "true")
    for number in range(30):
        await call.token(f"{number} ")
        await asyncio.sleep(0.01)
    await complete(call)
    await page.reaches("done")
    await expect(reply).to_have_attribute("aria-busy", "false")
    *before, last = await page.announced()
    assert before == ["Connecting…", "Waiting for the first token…", "Generating…"]
    assert last.startswith("Done: 30 tokens in ")
    assert await page.page.locator(live).evaluate_all("all => all.map(one => one.id)") == ["status"]


async def accessibility_tree(page: Visit) -> list[dict[str, Any]]:
    """What the browser tells assistive technology, in reading order: role, name and properties of each node."""
    session = await page.page.context.new_cdp_session(page.page)
    answered = await session.send("Accessibility.getFullAXTree")
    nodes = {node["nodeId"]: node for node in answered["nodes"]}
    read: list[dict[str, Any]] = []

    def walk(node: dict[str, Any], inside: tuple[str, ...]) -> None:
        role = node.get("role", {}).get("value", "")
        if not node.get("ignored"):
            properties = {one["name"]: one["value"].get("value") for one in node.get("properties", [])}
            name = node.get("name", {}).get("value", "")
            read.append({"role": role, "name": name, "inside": inside, **properties})
            inside = (*inside, role)
        for child in node.get("childIds", []):
            if child in nodes:
                walk(nodes[child], inside)

    walk(answered["nodes"][0], ())
    return read


async def test_the_accessibility_tree_tells_who_speaks_what_is_said_and_what_can_be_done(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    upstream.script = answer(
        ["# Head\n\n- **item**\n\n```py\nx\n```\n\n| a |\n|---|\n| b |\n\n[link](https://x.example)"]
    )
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    await page.ask("First?")
    await page.reaches("done")
    call = await half_answered(page, upstream)
    tree = await accessibility_tree(page)

    def named(role: str) -> list[str]:
        return [node["name"] for node in tree if node["role"] == role]

    # The landmarks and the messages, in the order in which they are read.
    parts = [
        node["role"] for node in tree if node["role"] in {"banner", "main", "article", "status", "form", "textbox"}
    ]
    assert parts == ["banner", "main", *["article"] * 4, "status", "form", "textbox"]
    assert named("article") == ["You", "Assistant", "You", "Assistant"]
    (conversation,) = [node for node in tree if node["role"] == "list" and node["name"] == "Conversation"]
    assert conversation["inside"][-1] == "main"
    messages = [node for node in tree if node["role"] == "listitem" and node["inside"].count("list") == 1]
    assert len(messages) == 4
    # From message to message by headings, and those of an answer below them.
    headings = [(node["name"], node["level"]) for node in tree if node["role"] == "heading"]
    assert headings == [
        ("Sluice", 1), ("You", 2), ("Assistant", 2), ("Head", 3), ("You", 2), ("Assistant", 2),
    ]  # fmt: skip
    # What was said, as what it is.
    for role in ("strong", "code", "table", "columnheader", "cell", "link"):
        assert named(role), role
    assert named("link") == ["link"]
    # What can be done: every control has a name, and the one field its label.
    controls = [node for node in tree if node["role"] in {"button", "link", "textbox", "DisclosureTriangle"}]
    assert all(node["name"].strip() for node in controls)
    buttons = named("button")
    assert buttons[:2] == ["Chats", "New chat"]
    assert {"Copy", "Copy the code", "Stop"} <= set(buttons)
    assert named("textbox") == ["Your question"]
    # What is said unasked: the state, and nothing else.
    assert [node["role"] for node in tree if node.get("live") not in (None, "off") and "root" not in node] == ["status"]
    busy = [node["name"] for node in tree if node.get("busy")]
    assert busy == ["Assistant"]  # the last one, which is being written

    await complete(call)
    await page.reaches("done")
    tree = await accessibility_tree(page)
    assert not [node for node in tree if node.get("busy")]
    assert {"Edit", "Regenerate"} <= set(named("button"))


# ---- the reader's own pace


async def test_the_page_follows_the_end_until_its_reader_scrolls_up(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url, viewport={"width": 800, "height": 600})

    async def write(call: Call, first: int) -> None:
        for number in range(first, first + 40):
            await call.token(f"Line {number}\n\n")
        await expect(page.answer).to_contain_text(f"Line {first + 39}")

    await page.ask()
    call = await opened(upstream)
    await write(call, 100)
    assert await page.page.evaluate(SCROLLED) > 0
    assert await page.page.evaluate(TO_END) <= 2

    await page.page.mouse.move(400, 200)
    await page.page.mouse.wheel(0, -30)
    await expect(page["follow"]).to_be_visible()
    await page.page.wait_for_timeout(300)  # the wheel's own glide
    before = await page.page.evaluate(SCROLLED)
    await write(call, 200)
    assert await page.page.evaluate(SCROLLED) == before

    await page["follow"].click()
    await write(call, 300)
    assert await page.page.evaluate(TO_END) <= 2
    await expect(page["follow"]).to_be_hidden()

    await page.page.keyboard.press("Tab")  # off the field, where the key would move the caret
    await page.page.evaluate("document.activeElement.blur()")
    await page.page.keyboard.press("PageUp")  # not only by wheel
    await expect(page["follow"]).to_be_visible()
    await complete(call)
    await page.reaches("done")
    await expect(page["follow"]).to_be_hidden()


# ---- the screen


async def test_a_phone_is_wide_enough_in_light_and_dark(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url, LLM_MODEL="a-model-with-a-very-long-name-" * 4)
    page = await visit(server.url, viewport={"width": 360, "height": 740}, reduced_motion="reduce")
    await page.ask("q" * 200)
    call = await opened(upstream)
    await call.token("w" * 300)
    await page.shows("w" * 300)
    assert await page.page.evaluate("document.getAnimations().length") == 0  # as asked for
    await complete(call)
    await page.reaches("done")
    assert await page.page.evaluate("document.scrollingElement.scrollWidth") <= 360
    for control in ("ask", "status", "chats-open", "new-chat"):
        await expect(page[control]).to_be_in_viewport(ratio=0.99)
    brightness = {}
    for scheme in ("light", "dark"):
        await page.page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        ground = await page.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        brightness[scheme] = sum(int(part) for part in re.findall(r"\d+", ground)[:3]) / 3
    assert brightness["dark"] < 64 < 192 < brightness["light"]
