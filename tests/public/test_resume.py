"""An answer outlives the connection, the page's reload and the server's hiccups, and ends when its reader leaves."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import expect

from tests.conftest import Launch
from tests.public.conftest import GONE_S, RECONNECT_S, VisitPage, Wire
from tests.public.steps import by_hand, complete, half_answered, opened
from tests.sluice_process import free_port
from tests.upstream_sim import ScriptedUpstream, answer

PATIENT = {"SLUICE_RESUME_GRACE": "60"}  # so that what ends sooner was ended by the page


# ---- the network drops


@pytest.mark.parametrize("how", ["reset", "closed"])
@pytest.mark.parametrize("before", ["", "Hel"])
@pytest.mark.parametrize("meanwhile", ["nothing", "tokens", "the end"])
async def test_a_dropped_connection_is_no_lost_answer(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage, how: str, before: str, meanwhile: str
) -> None:
    """The page says so, comes back by itself, and the answer goes on where it was: nothing lost, nothing twice."""
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url, **PATIENT)
    async with Wire(server.url) as wire:
        page = await visit(wire.url)
        await page.ask()
        call = await opened(upstream)
        await page.reaches("waiting")
        if before:
            await call.token(before)
            await page.shows(before)

        if how == "reset":
            wire.cut()
        else:
            wire.hang_up()
        await page.has_said("Reconnecting…")
        whole = before
        if meanwhile != "nothing":
            for text in ("lo, ", "wor"):
                await call.token(text)
                whole += text
        if meanwhile != "the end":
            await page.shows(whole)
            await call.token("ld")
            whole += "ld"
            await page.shows(whole)
            await page.reaches("generating")
        await complete(call)

        await page.reaches("done")
        await page.shows(whole)
        await page.has_kept(whole)
        await expect(page["status"]).to_contain_text("Done: ")
        await page.listens_no_more()
        assert len(upstream.calls) == 1


async def test_a_network_that_keeps_dropping_loses_and_doubles_nothing(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    tokens = [f"{number}," for number in range(300)]
    upstream.script = answer(tokens, gap=0.02)
    server = await launch(LLM_BASE_URL=upstream.base_url, **PATIENT)
    async with Wire(server.url) as wire:
        page = await visit(wire.url)
        await page.ask()
        for times in (1, 2, 3):
            await page.reaches("generating")
            wire.cut()
            await page.has_said("Reconnecting…", times)
        await page.reaches("done")
        await page.shows("".join(tokens))
        await page.has_kept("".join(tokens))
        assert len(upstream.calls) == 1


async def test_silence_with_pings_is_patience_and_without_them_another_connection(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """A slow model may take its time; a connection without even heartbeats is dead after 2.5 of them, and replaced."""
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_HEARTBEAT="0.8", **PATIENT)
    async with Wire(server.url) as wire:
        page = await visit(wire.url)
        call = await half_answered(page, upstream)
        await asyncio.sleep(3)  # more than 2.5 heartbeats
        await page.reaches("generating")
        assert await page.page.evaluate("sources.length") == 1
        wire.silence()
        await page.reaches("reconnecting")
        await call.token(", whole")
        await page.shows("Half")
        wire.speak()
        await page.shows("Half, whole")
        await page.reaches("generating")
        await complete(call)
        await page.reaches("done")
        await page.has_kept("Half, whole")
        assert len(upstream.calls) == 1


async def test_a_proxy_that_answers_502_for_a_while_is_waited_for(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """An EventSource that gets a 502 never tries again; the page does."""
    server = await launch(LLM_BASE_URL=upstream.base_url, **PATIENT)
    async with Wire(server.url) as wire:
        page = await visit(wire.url)
        call = await half_answered(page, upstream)
        wire.refusing = True
        wire.cut()
        await page.reaches("reconnecting")
        async with asyncio.timeout(10):
            while wire.refused < 2:  # noqa: ASYNC110  (of two tries, neither by the EventSource alone)
                await asyncio.sleep(0.05)
        await page.reaches("reconnecting")
        wire.refusing = False
        await call.token(", whole")
        await page.shows("Half, whole")
        await complete(call)
        await page.reaches("done")
        await page.has_kept("Half, whole")
        assert len(upstream.calls) == 1


async def test_offline_is_waited_out(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url, **PATIENT)
    async with Wire(server.url) as wire:
        page = await visit(wire.url)
        call = await half_answered(page, upstream)
        await page.page.context.set_offline(True)
        wire.cut()
        await expect(page["status"]).to_have_text("You are offline. The answer goes on when you are back.")
        await page.reaches("reconnecting")
        await call.token(", whole")
        await complete(call)
        await page.page.context.set_offline(False)
        await page.reaches("done")
        await page.has_kept("Half, whole")
        assert len(upstream.calls) == 1


async def test_a_server_that_stays_away_is_given_up(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """After 30 seconds, with what there was of the answer, and a way to ask again."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit("about:blank")
    await page.page.clock.install()
    await page.page.goto(server.url)
    await half_answered(page, upstream)
    server.process.kill()
    await page.reaches("reconnecting")
    await page.page.clock.fast_forward(31_000)
    await page.reaches("error")
    await expect(page["status"]).to_have_text(
        "The connection was lost, and the server could not be reached again. The answer is incomplete."
    )
    await expect(page["retry"]).to_be_visible()
    await page.shows("Half")
    await page.listens_no_more()


async def test_a_server_that_was_killed_and_restarted_is_not_asked_again(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """Row L5. The new process knows nothing of the answer: the page keeps what it has, and says that it is not all."""
    port = str(free_port())
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_PORT=port)
    page = await visit(server.url)
    call = await half_answered(page, upstream)
    server.process.kill()
    await server.exited()
    await page.reaches("reconnecting")
    await asyncio.wait_for(call.gone(), GONE_S)
    await launch(LLM_BASE_URL=upstream.base_url, SLUICE_PORT=port)
    await page.reaches("error")
    await expect(page["status"]).to_have_text("The answer was interrupted before its end. The answer is incomplete.")
    await page.shows("Half")
    await asyncio.sleep(RECONNECT_S)
    await page.listens_no_more()
    assert len(upstream.calls) == 1

    upstream.script = answer(["Whole"])
    await page["retry"].click()
    await page.reaches("done")
    await page.shows("Whole")
    assert len(upstream.calls) == 2


# ---- the page is reloaded


@pytest.mark.parametrize("before", ["", "Half"])
async def test_a_reload_in_mid_answer_goes_on(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage, before: str
) -> None:
    """The same answer, whole and once: no second call, and no time lost for a grace to end."""
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    await page.ask("Why, *then*?")
    call = await opened(upstream)
    await page.reaches("waiting")
    if before:
        await call.token(before)
        await page.shows(before)
    await page.page.reload()
    await page.reaches("generating" if before else "waiting")
    await call.token(", then")
    await page.shows(f"{before}, then")
    await page.reaches("generating")
    await page.page.reload()
    await page.shows(f"{before}, then")
    await call.token(" whole")
    await complete(call)
    await page.reaches("done")
    await page.shows(f"{before}, then whole")
    await page.has_kept(f"{before}, then whole")
    await expect(page.page.locator(".asked")).to_have_text("Why, *then*?")
    tokens = 3 if before else 2
    await expect(page["status"]).to_contain_text(f"Done: {tokens} tokens")
    assert not [request for request in page.requests if request.startswith("DELETE")]
    assert len(upstream.calls) == 1

    sentence = await page["status"].text_content()
    await page.page.reload()  # and one that is complete is simply there
    await page.reaches("done")
    await page.shows(f"{before}, then whole")
    await expect(page["status"]).to_have_text(sentence or "")
    await expect(page["stats"]).to_be_visible()
    assert await page.page.evaluate("sources.length") == 0
    assert page.complaints == []


async def test_a_reload_that_comes_too_late_keeps_what_there_was(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    port = str(free_port())
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_PORT=port)
    page = await visit(server.url)
    await half_answered(page, upstream)
    server.process.kill()
    await server.exited()
    await launch(LLM_BASE_URL=upstream.base_url, SLUICE_PORT=port)
    await page.page.reload()
    await page.reaches("error")
    await expect(page["status"]).to_contain_text("interrupted")
    await page.shows("Half")
    await expect(page["retry"]).to_be_visible()
    assert len(upstream.calls) == 1


async def test_an_answer_unseen_and_forgotten_is_told_to_be_gone(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """Without an event to go on from, the server's word is a 404, which an EventSource keeps to itself."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    await page.ask()
    await page.reaches("done")
    await page.page.evaluate("""() => {
      const key = "sluice.chat." + sessionStorage.getItem("sluice.chat");
      const chat = JSON.parse(localStorage.getItem(key));
      const lost = {answer: "", tokens: 0, state: "running", url: "/api/streams/gone-gone-gone-gone-gone", lastId: ""};
      Object.assign(chat.turns[0], lost);
      localStorage.setItem(key, JSON.stringify(chat));
    }""")
    await page.page.reload()
    await page.reaches("error")
    await expect(page["status"]).to_have_text("The answer was interrupted: the server has it no longer.")
    await expect(page["retry"]).to_be_visible()


# ---- the page is left


async def test_a_page_that_is_left_stops_its_answer_at_once(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """By a DELETE that outlives the page: the grace would be paid for. And it says so when one comes back."""
    server = await launch(LLM_BASE_URL=upstream.base_url, **PATIENT)
    page = await visit(server.url)
    call = await half_answered(page, upstream)
    await page.page.goto("about:blank")
    await asyncio.wait_for(call.gone(), GONE_S)
    await page.page.goto(server.url)
    await page.reaches("stopped")
    await expect(page["status"]).to_have_text("Stopped, because you left the page")
    await page.shows("Half")
    assert len(upstream.calls) == 1


async def test_a_reload_while_the_server_cannot_be_reached_gives_nothing_up(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """What takes the page's place then is somebody's error page: to the page that looks like being left for good."""
    server = await launch(LLM_BASE_URL=upstream.base_url, **PATIENT)
    async with Wire(server.url) as wire:
        page = await visit(wire.url)
        call = await half_answered(page, upstream)
        wire.refusing = True
        wire.cut()
        await page.reaches("reconnecting")
        with contextlib.suppress(PlaywrightError):  # that is what a 502 without a body is to it
            await page.page.reload()
        await page.page.wait_for_url("chrome-error://*/")
        wire.refusing = False
        await call.token(" and whole")
        await page.page.goto(wire.url)
        await page.shows("Half and whole")
        await complete(call)
        await page.reaches("done")
        assert len(upstream.calls) == 1


async def test_a_duplicated_tab_owns_nothing(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage) -> None:
    """It looks on; that it is closed says nothing about the tab that asked."""
    server = await launch(LLM_BASE_URL=upstream.base_url, **PATIENT)
    page = await visit(server.url)
    call = await half_answered(page, upstream)
    async with page.page.expect_popup() as opening:
        await page.page.evaluate("() => { window.open(location.href); }")
    duplicate = await opening.value
    await expect(duplicate.locator("html")).to_have_attribute("data-state", "generating")
    await duplicate.close()
    await call.token(" and whole")
    await page.shows("Half and whole")
    await complete(call)
    await page.reaches("done")


async def test_a_tab_that_is_closed_stops_its_answer_at_once(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url, **PATIENT)
    page = await visit(server.url)
    other = await page.another_tab(server.url)  # or the browser's context would go with its last page
    call = await half_answered(page, upstream)
    await page.page.close()
    await asyncio.wait_for(call.gone(), GONE_S)
    await other["chats-open"].click()
    await other.page.get_by_role("button", name="Why?").first.click()
    await other.reaches("stopped")
    await expect(other["status"]).to_have_text("Stopped, because you left the page")
    await other.shows("Half")


async def test_a_page_that_comes_back_says_that_it_was_left(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """What Back brings out of the browser's cache is the page as it was left, without its connection."""
    server = await launch(LLM_BASE_URL=upstream.base_url, **PATIENT)
    page = await visit(server.url)
    call = await half_answered(page, upstream)
    await page.page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', {persisted: true}))")
    await asyncio.wait_for(call.gone(), GONE_S)
    await page.page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
    await page.reaches("stopped")
    await expect(page["status"]).to_have_text("Stopped, because you left the page")
    upstream.script = answer()
    await page.ask("Again?")
    await page.reaches("done")


async def test_where_leaving_looks_like_a_reload_the_page_only_pauses(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """A browser without ``pageswap`` cannot tell: no DELETE then, and what comes back goes on."""
    server = await launch(LLM_BASE_URL=upstream.base_url, **PATIENT)
    page = await visit(server.url, scripts=["delete window.onpageswap;"])
    call = await half_answered(page, upstream)
    await page.page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', {persisted: true}))")
    await page.listens_no_more()
    await call.token(", whole")
    await page.page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
    await page.shows("Half, whole")
    await complete(call)
    await page.reaches("done")
    await page.has_kept("Half, whole")
    assert len(upstream.calls) == 1
