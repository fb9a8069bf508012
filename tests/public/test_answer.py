"""One question and its answer, in a real Chromium before the real server and a scripted upstream (contract, 3, 4)."""

from __future__ import annotations

import asyncio
import re

import pytest
from playwright.async_api import expect

from tests.api.observing import until
from tests.conftest import Launch
from tests.public.conftest import GONE_S, RECONNECT_S, VisitPage
from tests.public.steps import by_hand, complete, half_answered, opened
from tests.upstream_sim import ScriptedUpstream, answer, chunk


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
    for count, text in enumerate(["Hel", "lo", ", wörld", " 👍"], 1):
        await call.token(text)
        shown += text
        await page.shows(shown)
        await expect(page["stat-tokens"]).to_have_text(str(count))
        await page.reaches("generating")
    await call.finish()
    await call.event(chunk(usage={"prompt_tokens": 12, "completion_tokens": 7}))
    await call.done()

    await page.reaches("done")
    await expect(page["status"]).to_have_text(re.compile(r"^Done: 4 tokens in \d+\.\d s$"))
    stats = await page["stats"].inner_text()
    for figure in (r"Tokens\s+4\b", r"Time\s+\d+\.\d s", r"TTFT\s+\d", r"Tokens/s\s+\d+", r"12 in, 7 out"):
        assert re.search(figure, stats), (figure, stats)
    await expect(page["model"]).to_have_text("sim")  # the one that answered
    assert page.complaints == []


async def test_whatever_has_ended_is_not_asked_for_again(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """EventSource reconnects after every end of a response; behind an answer, or its failure, there is nothing more."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    finished, failed = await visit(server.url), await visit(server.url)
    await finished.ask()
    await finished.reaches("done")
    await finished.shows("Hello")
    call = await half_answered(failed, upstream)
    call.reset()
    await failed.reaches("error")
    requests = len(finished.requests), len(failed.requests)
    await asyncio.sleep(RECONNECT_S)
    await finished.listens_no_more()
    await failed.listens_no_more()
    await finished.reaches("done")
    await failed.reaches("error")
    assert (len(finished.requests), len(failed.requests)) == requests
    assert len(upstream.calls) == 2


@pytest.mark.parametrize("how", ["button", "Escape"])
async def test_stop_stops_the_upstream(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage, how: str) -> None:
    """By DELETE, at once: the grace is for those who were cut off, not for those who have had enough."""
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_RESUME_GRACE="60")
    page = await visit(server.url)
    call = await half_answered(page, upstream)

    if how == "button":
        await page["stop"].click()
    else:
        await page.page.keyboard.press(how)

    await page.reaches("stopped")
    await asyncio.wait_for(call.gone(), GONE_S)
    await expect(page["status"]).to_have_text("Stopped after 1 token")
    await page.shows("Half")
    await expect(page["stop"]).to_be_hidden()
    await expect(page["retry"]).to_be_visible()
    await page.listens_no_more()
    assert [request.split()[0] for request in page.requests if "/api/" in request] == ["POST", "GET", "DELETE"]
    assert len(upstream.calls) == 1


async def test_stop_before_the_server_has_said_yes(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """An answer that was begun after its question had been taken back is stopped as soon as its name is known."""
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_RESUME_GRACE="60")
    slow = "const real = fetch; window.fetch = async (...what) => { await window.gate; return real(...what); };"
    page = await visit(server.url, scripts=["window.gate = new Promise((open) => { window.openGate = open; });" + slow])
    await page.ask()
    await page.reaches("connecting")
    await page["stop"].click()
    await page.reaches("stopped")
    await expect(page["status"]).to_have_text("Stopped before the first token")
    await page.page.evaluate("openGate()")
    # The stop may be faster than the question is on its way to the endpoint, which then never hears of it.
    await until(lambda: [line["outcome"] for line in server.events("stream_end")] == ["stopped"], within=GONE_S)
    await until(lambda: not upstream.open_calls, within=GONE_S)
    await page.reaches("stopped")


async def test_a_failure_is_told_in_words_and_asked_again_only_by_retry(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    call = await half_answered(page, upstream)
    await call.event({"error": {"message": "upstream's own words", "code": "server_error"}})

    await page.reaches("error")
    await expect(page["status"]).to_have_text(re.compile(r"\w+ .*\. The answer is incomplete\.$"))
    await expect(page["status"]).not_to_contain_text("own words")
    await expect(page["retry"]).to_be_visible()
    await page.shows("Half")
    await page.listens_no_more()
    assert len(upstream.calls) == 1

    upstream.script = answer(["Whole"])
    await page["retry"].click()
    await page.reaches("done")
    await page.shows("Whole")  # and nothing of the first try
    await expect(page["retry"]).to_be_hidden()
    assert upstream.calls[1].json == call.json
    assert len(upstream.calls) == 2


async def test_model_names_questions_and_reasoning_stay_text(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """Row S7. They are no Markdown either."""
    evil = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script></html>&lt;"\' **x** [y](javascript:1)'
    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url, LLM_MODEL=evil)
    page = await visit(server.url)
    await expect(page["model"]).to_have_text(evil)
    await page.ask(evil)
    call = await opened(upstream)
    await call.event(chunk({"reasoning_content": evil}, model=f"{evil}2"))
    await call.event(chunk({"content": "Yes"}, model=f"{evil}2"))
    await call.event(chunk({}, "stop", model=f"{evil}2"))
    await call.done()
    await page.reaches("done")
    assert await page.page.locator(".reasoning-text").text_content() == evil
    assert await page.page.locator(".asked").text_content() == evil
    assert await page["model"].text_content() == f"{evil}2"
    await page["chats-open"].click()
    await expect(page["chats-list"]).to_contain_text("<img src=x onerror")
    assert await page.page.locator("main :is(img, script, strong, a), .top script, #model *, #chats img").count() == 0
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
    await expect(page.page.locator(".reasoning")).to_be_visible()
    await expect(page.page.locator(".reasoning-text")).to_be_hidden()
    await call.event(chunk({"reasoning_content": "think"}))
    await call.token("Yes")
    await expect(page["status"]).to_have_text("Generating…")
    await complete(call)
    await page.reaches("done")
    await page.shows("Yes")
    await page.page.get_by_text("Reasoning", exact=True).click()
    await expect(page.page.locator(".reasoning-text")).to_have_text("Let me think")


async def test_an_answer_that_was_cut_says_so(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    for reason, words in [("length", "cut at the token limit"), ("content_filter", "cut by the content filter")]:
        upstream.script = answer(["Half"], finish=reason)
        await page.ask()
        await expect(page["status"]).to_have_text(re.compile(rf"^Done: 1 token in .* s\. The answer was {words}\.$"))
        await page.reaches("done")


async def test_a_refusal_is_told_in_words(launch: Launch, upstream: ScriptedUpstream, visit: VisitPage) -> None:
    """What the server said to the POST, and when it is worth another try."""
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_RATE_LIMIT="1/60")
    page = await visit(server.url)
    await page.ask()
    await page.reaches("done")
    await page.ask("Once more")
    await page.reaches("error")
    await expect(page["status"]).to_have_text(
        re.compile(r"^You are asking faster than this server allows\. Try again in [1-6]\d? s\.$")
    )
    await expect(page["retry"]).to_be_visible()
    await page.listens_no_more()
    assert len(upstream.calls) == 1


async def test_a_server_that_is_not_there_is_told_in_words(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = await visit(server.url)
    server.process.kill()
    await server.exited()
    await page.ask()
    await page.reaches("error")
    await expect(page["status"]).to_have_text("The server could not be reached. Wait a moment, then retry.")
    await page.page.context.set_offline(True)
    await page["retry"].click()
    await expect(page["status"]).to_have_text("You seem to be offline. Connect, then retry.")


async def test_the_demo_says_that_it_is_one(launch: Launch, visit: VisitPage) -> None:
    server = await launch()
    page = await visit(server.url)
    await expect(page["demo-note"]).to_be_visible()
    await expect(page["demo-note"]).to_contain_text("not an LLM")
    await expect(page["demo-note"]).to_contain_text("LLM_BASE_URL")
    await page.page.locator("#examples button").first.click()
    await page.reaches("generating")
    await expect(page.answer).not_to_be_empty()
    await page["stop"].click()
    await page.reaches("stopped")
    assert page.complaints == []


async def test_a_question_is_measured_in_code_points_as_the_server_does(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """A chat's message may be 32 times as long as a question of ``/api/stream``; the server takes just that."""
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_MAX_QUERY_CHARS="2")
    page = await visit(server.url)
    await page["question"].fill("  \n ")
    await expect(page["ask"]).to_be_disabled()
    await page["question"].fill("👍" * 65)
    await expect(page["ask"]).to_be_disabled()
    await expect(page["limit"]).to_contain_text("Too long by 1")
    await page["question"].press("Enter")
    await expect(page["status"]).to_contain_text("Too long by 1")
    await page.reaches("idle")
    await page["question"].fill(" " + "👍" * 64 + " \n")
    await expect(page["limit"]).not_to_contain_text("Too long")
    await page["question"].press("Enter")
    await page.reaches("done")
    assert upstream.calls[0].json["messages"][-1]["content"] == "👍" * 64
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
