"""The page in a real Chromium, in front of the real server and a scripted upstream (the contract, section 3)."""

from __future__ import annotations

import asyncio
import re

import pytest
from playwright.async_api import expect

from tests.conftest import Launch
from tests.public.conftest import Visit, VisitPage, Wire
from tests.upstream_sim import Call, ScriptedUpstream, answer, chunk

RECONNECT_S = 2.5  # the stream's `retry: 1000`, and time for the request to arrive
GONE_S = 5.0

TO_END = """(() => {
  const {scrollHeight, clientHeight, scrollTop} = document.scrollingElement;
  return scrollHeight - clientHeight - scrollTop;
})()"""
FOCUS_RING = """(() => {
  const {outlineStyle, outlineWidth} = getComputedStyle(document.activeElement);
  return [outlineStyle, parseFloat(outlineWidth)];
})()"""


async def by_hand(call: Call) -> None:
    """An upstream that leaves every byte to the test."""


async def opened(upstream: ScriptedUpstream, count: int = 1) -> Call:
    """Wait for that call and open its stream: every token is the test's to send."""
    call = await upstream.called(count)
    await call.head()
    return call


async def half_answered(page: Visit, upstream: ScriptedUpstream) -> Call:
    """Ask by hand, and see the first half of an answer whose rest is the test's to send."""
    upstream.script = by_hand
    await page.ask()
    call = await opened(upstream)
    await call.token("Half")
    await page.shows("Half")
    return call


async def complete(call: Call, reason: str = "stop") -> None:
    await call.finish(reason)
    await call.done()


async def test_each_token_is_shown_as_it_comes_and_the_figures_at_the_end(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """The next token is made only after the page shows the one before: nothing on the way may wait for more."""
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url, LLM_MODEL="asked-for")
    page = await visit(server.url)
    await expect(page["model"]).to_have_text("asked-for")
    await expect(page["demo-note"]).to_be_hidden()
    await page.reaches("idle")

    await page.ask("Say hello")
    await page.reaches("waiting")
    call = await opened(upstream)
    assert call.json["messages"][-1]["content"] == "Say hello"
    shown = ""
    for count, text in enumerate(["Hel", "lo", "\n\n", "wörld", " 👍"], 1):
        await call.token(text)
        shown += text
        await page.shows(shown)
        await expect(page["stat-tokens"]).to_have_text(str(count))
        await page.reaches("generating")
    await call.finish()
    await call.event(chunk(usage={"prompt_tokens": 12, "completion_tokens": 7}))
    await call.done()

    await page.reaches("done")
    await expect(page["status"]).to_have_text(re.compile(r"^Done: 5 tokens in \d+\.\d s$"))
    stats = await page["stats"].inner_text()
    for figure in (r"Tokens\s+5\b", r"Time\s+\d+\.\d s", r"TTFT\s+\d", r"Tokens/s\s+\d+", r"12 in, 7 out"):
        assert re.search(figure, stats), (figure, stats)
    await expect(page["model"]).to_have_text("sim")  # the one that answered
    assert page.complaints == []


async def test_whatever_has_ended_is_not_asked_for_again(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """EventSource reconnects after every end of a response: an answer, or its failure, would be paid for twice."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    finished, failed = await visit(server.url), await visit(server.url)
    await finished.ask()
    await finished.reaches("done")
    await finished.shows("Hello")
    upstream.script = by_hand
    await failed.ask()
    call = await opened(upstream, 2)
    await call.token("Hel")
    await failed.shows("Hel")
    call.reset()
    await failed.reaches("error")
    await asyncio.sleep(RECONNECT_S)
    await finished.asks_no_more()
    await failed.asks_no_more()
    await finished.reaches("done")
    await failed.reaches("error")
    assert len(upstream.calls) == 2


@pytest.mark.parametrize("how", ["button", "Escape"])
async def test_stop_stops_the_upstream(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage, how: str) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    call = await half_answered(page, upstream)

    if how == "button":
        await page["stop"].click()
    else:
        await page.page.keyboard.press(how)

    await asyncio.wait_for(call.gone(), GONE_S)
    await page.reaches("stopped")
    await expect(page["status"]).to_have_text("Stopped after 1 token")
    await page.shows("Half")
    await expect(page["stop"]).to_be_hidden()
    await expect(page["question"]).to_have_value("Why?")  # to be put in other words
    await page.asks_no_more()
    assert len(upstream.calls) == 1


async def test_a_failure_is_told_in_words_and_asked_again_only_by_retry(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    await page.ask("Why is that?")
    call = await opened(upstream)
    await call.token("Becau")
    await page.shows("Becau")
    await call.event({"error": {"message": "upstream's own words", "code": "server_error"}})

    await page.reaches("error")
    await expect(page["status"]).to_have_text(re.compile(r"\w+ .*\. The answer is incomplete\.$"))
    await expect(page["status"]).not_to_contain_text("own words")
    await expect(page["retry"]).to_be_visible()
    await expect(page["retry"]).to_have_text("Retry")
    await page.shows("Becau")
    await page.asks_no_more()
    assert len(upstream.calls) == 1

    upstream.script = answer(["Because"])
    await page["retry"].click()
    await page.reaches("done")
    await page.shows("Because")  # and nothing of the first try
    assert upstream.calls[1].json == call.json
    assert len(upstream.calls) == 2


async def test_a_reload_in_mid_answer_stops_the_upstream(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    call = await half_answered(page, upstream)
    await page.page.reload()
    await asyncio.wait_for(call.gone(), GONE_S)
    await page.reaches("idle")
    assert len(upstream.calls) == 1


async def test_a_page_that_comes_back_says_that_it_was_left(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """What Back brings out of the browser's cache is the page as it was left, without its connection."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    call = await half_answered(page, upstream)
    await page.page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', {persisted: true}))")
    await asyncio.wait_for(call.gone(), GONE_S)
    await page.page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
    await page.reaches("stopped")
    await expect(page["status"]).to_have_text("Stopped, because you left the page")
    await expect(page["ask"]).to_be_enabled()
    upstream.script = answer()
    await page["ask"].click()
    await page.reaches("done")


async def test_markup_of_the_model_stays_text(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage) -> None:
    """A model can be talked into writing anything; its name comes from elsewhere too."""
    evil = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script></html>&lt;"\''
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url, LLM_MODEL=evil)
    page = await visit(server.url)
    await expect(page["model"]).to_have_text(evil)
    await page.ask(evil)
    call = await opened(upstream)
    await call.event(chunk({"reasoning_content": evil}, model=f"{evil}2"))
    await call.event(chunk({"content": evil}, model=f"{evil}2"))
    await call.event(chunk({}, "stop", model=f"{evil}2"))
    await call.done()
    await page.reaches("done")
    await page.shows(evil)
    assert await page["reasoning-text"].text_content() == evil
    assert await page["asked"].text_content() == evil
    assert await page["model"].text_content() == f"{evil}2"
    assert await page.page.locator("#exchange img, #exchange script, .top script, #model *").count() == 0
    assert await page.page.evaluate("window.harmed") is None
    assert page.complaints == []


async def test_reasoning_stands_apart_and_closed(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage) -> None:
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    await page.ask()
    call = await opened(upstream)
    await call.event(chunk({"reasoning_content": "Let me "}))
    await expect(page["status"]).to_have_text("Reasoning…")
    await expect(page["reasoning"]).to_be_visible()
    await expect(page["reasoning-text"]).to_be_hidden()
    await call.event(chunk({"reasoning_content": "think"}))
    await call.token("Yes")
    await expect(page["status"]).to_have_text("Generating…")
    await complete(call)
    await page.reaches("done")
    await page.shows("Yes")
    await page.page.get_by_text("Reasoning", exact=True).click()
    await expect(page["reasoning-text"]).to_have_text("Let me think")


async def test_an_answer_that_was_cut_says_so(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    for reason, words in [("length", "cut at the token limit"), ("content_filter", "cut by the content filter")]:
        upstream.script = answer(["Half"], finish=reason)
        await page.ask()
        await expect(page["status"]).to_have_text(re.compile(rf"^Done: 1 token in .* s\. The answer was {words}\.$"))
        await page.reaches("done")


async def test_a_refusal_is_told_in_words(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage) -> None:
    """EventSource hides the status, and asking once more to learn it could start a generation."""
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_RATE_LIMIT="1/60")
    page = await visit(server.url)
    await page.ask()
    await page.reaches("done")
    await page.ask("Once more")
    await page.reaches("error")
    await expect(page["status"]).to_contain_text("refused or could not be reached")
    await expect(page["status"]).to_contain_text("too fast")
    await expect(page["retry"]).to_be_visible()
    await page.asks_no_more(times=2)
    assert len(upstream.calls) == 1


async def test_a_lost_connection_is_told_and_not_paid_for_twice(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    async with Wire(server.url) as wire:
        page = await visit(wire.url)
        await half_answered(page, upstream)
        wire.cut()
        await page.reaches("error")
        await expect(page["status"]).to_have_text("The connection was lost. The answer is incomplete.")
        await expect(page["retry"]).to_be_visible()
        await page.asks_no_more()
        assert len(upstream.calls) == 1


async def test_silence_with_pings_is_patience_and_without_them_death(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """A slow model may take its time; a connection that lost even its heartbeats is given up after 2.5 of them."""
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_HEARTBEAT="0.8")
    async with Wire(server.url) as wire:
        page = await visit(wire.url)
        await page.ask()
        call = await opened(upstream)
        await asyncio.sleep(3)  # more than 2.5 heartbeats
        await page.reaches("waiting")
        wire.silence()
        await page.reaches("error")
        await expect(page["status"]).to_contain_text("silent")
        await expect(page["retry"]).to_be_visible()
        await page.asks_no_more()
        await asyncio.wait_for(call.gone(), GONE_S)


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


async def test_a_screen_reader_hears_states_and_no_tokens(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    live = "[aria-live], [role=status], [role=alert], [role=log], output"
    assert await page.page.locator(live).evaluate_all("all => all.map(one => one.id)") == ["status"]
    await expect(page["status"]).to_have_attribute("role", "status")
    await page.ask()
    call = await opened(upstream)
    await expect(page["answer"]).to_have_attribute("aria-busy", "true")
    for number in range(30):
        await call.token(f"{number} ")
        await asyncio.sleep(0.01)
    await complete(call)
    await page.reaches("done")
    await expect(page["answer"]).to_have_attribute("aria-busy", "false")
    *before, last = await page.announced()
    assert before == ["Connecting…", "Waiting for the first token…", "Generating…"]
    assert last.startswith("Done: 30 tokens in ")
    named = "all => all.filter(one => !(one.labels?.length || one.textContent.trim())).map(one => one.id)"
    assert await page.page.locator("button, textarea, summary").evaluate_all(named) == []


async def test_the_demo_says_that_it_is_one(launch: Launch, visit: VisitPage) -> None:
    server = await launch()
    page = await visit(server.url)
    await expect(page["demo-note"]).to_be_visible()
    await expect(page["demo-note"]).to_contain_text("not an LLM")
    await expect(page["demo-note"]).to_contain_text("LLM_BASE_URL")
    await page.page.locator("#examples button").first.click()
    await page.reaches("generating")
    await expect(page["answer"]).not_to_be_empty()
    await page["stop"].click()
    await page.reaches("stopped")
    assert page.complaints == []


async def test_a_question_is_measured_in_code_points_as_the_server_does(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_MAX_QUERY_CHARS="5")
    page = await visit(server.url)
    await page["question"].fill("  \n ")
    await expect(page["ask"]).to_be_disabled()
    await page["question"].fill("👍👍👍👍👍👍")
    await expect(page["ask"]).to_be_disabled()
    await expect(page["limit"]).to_contain_text("Too long by 1")
    await page["question"].press("Enter")
    await page.reaches("idle")
    await page["question"].fill(" 👍👍👍👍👍 \n")
    await expect(page["limit"]).not_to_contain_text("Too long")
    await page["question"].press("Enter")
    await page.reaches("done")
    assert upstream.calls[0].json["messages"][-1]["content"] == "👍👍👍👍👍"
    assert len(upstream.calls) == 1


async def test_the_tail_is_shown_where_no_frames_are_drawn(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """In a hidden tab or a covered window, requestAnimationFrame waits for ever."""
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url, scripts=["window.requestAnimationFrame = () => 1;"])
    await page.ask()
    call = await opened(upstream)
    await call.token("Hel")
    await page.shows("Hel")
    await call.token("lo")
    await complete(call)
    await page.reaches("done")
    await page.shows("Hello")


async def test_the_page_follows_the_end_until_its_reader_scrolls_up(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url, viewport={"width": 800, "height": 600})

    async def write(call: Call, first: int) -> None:
        for number in range(first, first + 40):
            await call.token(f"Line {number}\n")
        await expect(page["answer"]).to_contain_text(f"Line {first + 39}")

    await page.ask()
    call = await opened(upstream)
    await write(call, 100)
    assert await page.page.evaluate("document.scrollingElement.scrollTop") > 0
    assert await page.page.evaluate(TO_END) <= 2

    await page.page.mouse.move(400, 200)
    await page.page.mouse.wheel(0, -30)
    await expect(page["follow"]).to_be_visible()
    await page.page.wait_for_timeout(300)  # the wheel's own glide
    before = await page.page.evaluate("document.scrollingElement.scrollTop")
    await write(call, 200)
    assert await page.page.evaluate("document.scrollingElement.scrollTop") == before

    await page["follow"].click()
    await write(call, 300)
    assert await page.page.evaluate(TO_END) <= 2
    await expect(page["follow"]).to_be_hidden()


async def test_a_long_answer_is_kept_to_the_letter(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """The page cuts a long answer into blocks; no character, newline or half of an emoji may change by it."""
    lines = [f"{number}. {'word ' * (number % 23)}\n{'  indented 👍' * (number % 3)}\n" for number in range(300)]
    whole = "".join(lines) + "x" * 5000
    upstream.script = answer([whole[start : start + 7] for start in range(0, len(whole), 7)])
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    await page.ask()
    await page.reaches("done")
    assert await page["answer"].text_content() == whole
    select = "getSelection().selectAllChildren(document.getElementById('answer')), getSelection().toString()"
    assert await page.page.evaluate(select) == whole  # and so it is copied


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
    await expect(page["ask"]).to_be_in_viewport()
    await expect(page["status"]).to_be_in_viewport()
    brightness = {}
    for scheme in ("light", "dark"):
        await page.page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        ground = await page.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        brightness[scheme] = sum(int(part) for part in re.findall(r"\d+", ground)[:3]) / 3
    assert brightness["dark"] < 64 < 192 < brightness["light"]
