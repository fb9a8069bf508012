"""The example page in React, as its README says, in Chromium, in front of a running Sluice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from playwright.async_api import Browser, expect

from tests.conftest import Launch, miss, node_from
from tests.ops.example_page import Chat, Failed, build, build_for, preview
from tests.public import conftest as public
from tests.public.conftest import GONE_S, Wire
from tests.public.steps import by_hand, complete, opened
from tests.sluice_process import free_port
from tests.upstream_sim import Call, ScriptedUpstream, answer, chunk

LEAST_NODE = (20, 19)  # Vite's

SETTINGS = {
    "SLUICE_SYSTEM_PROMPT": "",
    "SLUICE_RATE_LIMIT": "off",
    "SLUICE_RETRIES": "0",
    "SLUICE_RESUME_GRACE": "60",  # what ends sooner was ended by the page
}

pytestmark = pytest.mark.timeout(60, func_only=True)  # the build has its own time

chromium, browser = public.chromium, public.browser


@pytest.fixture(scope="session")
def node(need: Callable[[str], str]) -> str:
    """The path of Node, where the example is built."""
    path, npm = node_from(need, *LEAST_NODE), need("npm")
    try:
        build(npm)
    except Failed as exc:
        miss(str(exc))
    return path


@pytest.fixture
async def wire(node: str, launch: Launch, upstream: ScriptedUpstream) -> AsyncIterator[Wire]:
    """The way to the page, which shares its origin with Sluice. Every token is the test's to send."""
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url, **SETTINGS)
    port = free_port()
    async with preview(node, port, SLUICE_URL=server.url), Wire(f"http://127.0.0.1:{port}") as wire:
        yield wire


Visit = Callable[[str], Awaitable[Chat]]


@pytest.fixture
def visit(browser: Browser) -> Visit:
    async def open_page(url: str) -> Chat:
        context = await browser.new_context()
        page = await context.new_page()
        page.set_default_timeout(public.PATIENCE_MS)
        chat = Chat(page)
        await page.goto(url)
        return chat

    return open_page


@pytest.fixture
async def chat(wire: Wire, visit: Visit) -> Chat:
    return await visit(wire.url)


async def half_answered(chat: Chat, upstream: ScriptedUpstream) -> Call:
    """Ask, and see the first half of an answer whose rest is the test's to send."""
    await chat.ask()
    call = await opened(upstream)
    await call.token("Half")
    await chat.shows("Why?", "Half")
    return call


# ---- using it


async def test_an_answer_streams_into_the_page(chat: Chat, upstream: ScriptedUpstream) -> None:
    """Each token is shown when it comes; what the model thought is there, folded away; then the next turn."""
    await chat.ask()
    await chat.says("Waiting for the answer…")
    call = await opened(upstream)
    await call.event(chunk({"reasoning_content": "Let me see."}))
    await chat.says("Answering…")
    await call.token("Because\n")
    await chat.shows("Why?", "Because\n")
    await call.token("  it is 🏳️‍🌈.")
    await chat.shows("Why?", "Because\n  it is 🏳️‍🌈.")
    await complete(call)
    await chat.is_ready()

    thought = chat.page.get_by_text("Let me see.")
    await expect(thought).to_be_hidden()
    await chat.page.get_by_text("Reasoning").click()
    await expect(thought).to_be_visible()

    upstream.script = answer(["So."])
    await chat.ask("And?")
    await chat.shows("Why?", "Because\n  it is 🏳️‍🌈.", "And?", "So.")
    assert [message["role"] for message in upstream.calls[1].json["messages"]] == ["user", "assistant", "user"]
    assert chat.complaints == []


async def test_stop_ends_the_answer_and_not_only_its_display(chat: Chat, upstream: ScriptedUpstream) -> None:
    """The upstream is closed at once, whatever the grace; what was said stays, and the chat goes on."""
    call = await half_answered(chat, upstream)

    await chat.button("Stop").click()

    await asyncio.wait_for(call.gone(), GONE_S)
    await chat.says("Stopped.")
    await chat.shows("Why?", "Half")
    upstream.script = answer(["So."])
    await chat.ask("And?")
    await chat.shows("Why?", "Half", "And?", "So.")
    assert chat.complaints == []


async def test_a_reload_in_the_middle_of_an_answer_costs_nothing(chat: Chat, upstream: ScriptedUpstream) -> None:
    """The page resumes the running answer from its start, in the place of the half that it had kept."""
    call = await half_answered(chat, upstream)

    await chat.page.reload()
    await call.token(" and whole")
    await chat.shows("Why?", "Half and whole")
    await chat.says("Answering…")
    await complete(call)
    await chat.is_ready()

    await chat.page.reload()
    await chat.shows("Why?", "Half and whole")
    assert len(upstream.calls) == 1
    assert chat.complaints == []


@pytest.mark.parametrize("meanwhile", ["goes on", "ends"])
async def test_a_dropped_connection_mends_itself(
    chat: Chat, wire: Wire, upstream: ScriptedUpstream, meanwhile: str
) -> None:
    """The page says that it reconnects, resumes, and shows the whole answer once."""
    call = await half_answered(chat, upstream)

    wire.silence()  # so that the page is at it until it is seen
    wire.cut()
    await chat.says("Reconnecting…")
    wire.speak()
    await call.token(" and whole")
    if meanwhile == "ends":
        await complete(call)
    await chat.shows("Why?", "Half and whole")
    if meanwhile != "ends":
        await complete(call)
    await chat.is_ready()

    await expect(chat.alert).to_have_count(0)
    assert len(upstream.calls) == 1


async def test_an_answer_that_nobody_has_any_more_can_be_asked_for_again(
    chat: Chat, wire: Wire, upstream: ScriptedUpstream
) -> None:
    """Where the server has nothing to resume (204), the page says so instead of showing half as the whole."""
    call = await half_answered(chat, upstream)
    chat_id = json.loads(await chat.page.evaluate("Object.values(sessionStorage)[0]"))["id"]

    wire.cut()
    async with aiohttp.ClientSession() as session, session.post(f"{wire.url}/api/chat/{chat_id}/stop"):
        await call.gone()
    await expect(chat.alert).to_contain_text("The connection was lost")
    upstream.script = answer(["Whole"])
    await chat.button("Try again").click()

    await chat.shows("Why?", "Whole")
    await expect(chat.alert).to_have_count(0)


async def test_a_failure_is_told_and_can_be_tried_again(chat: Chat, upstream: ScriptedUpstream) -> None:
    """Sluice's sentence is the alert; the button asks for the answer anew, without the half of before."""
    call = await half_answered(chat, upstream)

    call.reset()
    await expect(chat.alert).to_contain_text("The model")
    upstream.script = answer(["Whole"])
    await chat.button("Try again").click()

    await chat.shows("Why?", "Whole")
    await expect(chat.alert).to_have_count(0)
    assert [message["content"] for message in upstream.calls[1].json["messages"]] == ["Why?"]
    assert chat.complaints == []


async def test_a_page_of_another_origin_works_the_same(
    node: str, need: Callable[[str], str], launch: Launch, upstream: ScriptedUpstream, visit: Visit, tmp_path: Path
) -> None:
    """Built with VITE_SLUICE_URL, and listed in SLUICE_CORS_ORIGINS: it may ask, resume and stop."""
    upstream.script = by_hand
    sluice_port, port = free_port(), free_port()
    origin = f"http://127.0.0.1:{port}"
    await asyncio.to_thread(build_for, need("npm"), f"http://127.0.0.1:{sluice_port}", tmp_path)
    addresses = {"SLUICE_PORT": str(sluice_port), "SLUICE_CORS_ORIGINS": origin}
    await launch(LLM_BASE_URL=upstream.base_url, **SETTINGS, **addresses)
    async with preview(node, port, "--outDir", str(tmp_path)):
        chat = await visit(origin)
        call = await half_answered(chat, upstream)
        await chat.page.reload()
        await call.token(" and whole")
        await chat.shows("Why?", "Half and whole")
        await chat.button("Stop").click()
        await asyncio.wait_for(call.gone(), GONE_S)
        await chat.says("Stopped.")
        assert chat.complaints == []
