"""The browser's own EventSource, used as the README shows it: no code of ours in the page."""

from __future__ import annotations

import asyncio
import signal

import pytest
from playwright.async_api import Page

from tests.api.observing import until
from tests.conftest import Launch
from tests.public.conftest import VisitPage, Wire
from tests.sluice_process import ROOT, SluiceProcess, free_port
from tests.upstream_sim import Call, ScriptedUpstream, chunk

# The snippet of the README, word for word, and what it is used on.
_FENCE = "```js\n"
SNIPPET = (ROOT / "README.md").read_text(encoding="utf-8").partition(_FENCE)[2].partition("```")[0]
SURROUNDINGS = """
window.text = '';
window.failures = [];
window.ids = [];
const question = 'Why?';
const answer = {append: (token) => { text += token ?? ''; }};
const show = (message) => { failures.push(message); };
"""
CLOSED = 2  # EventSource.readyState
NOTE_IDS = """
stream.addEventListener('message', ({lastEventId}) => ids.push(Number(lastEventId.split('.')[1])));
window.stream = stream;
"""


async def ask_natively(page: Page) -> None:
    await page.evaluate(f"() => {{ {SURROUNDINGS}\n{SNIPPET}\n{NOTE_IDS} }}")


async def becomes(page: Page, expression: str, value: object) -> None:
    """Wait until it is so (Playwright's own waiting evaluates a string in the page, which our CSP forbids)."""
    async with asyncio.timeout(15):
        while await page.evaluate(expression) != value:  # noqa: ASYNC110  (the page sets no asyncio.Event)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("times", [1, 3])
async def test_it_comes_back_by_itself_and_misses_nothing(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage, times: int
) -> None:
    """Contract, section 4: it goes on after event N; no second upstream call, and after the end no further request."""

    async def by_hand(call: Call) -> None:
        """Every byte is the test's to send."""

    upstream.script = by_hand
    server = await launch(LLM_BASE_URL=upstream.base_url)
    async with Wire(server.url) as wire:
        page = (await visit(wire.url)).page
        await ask_natively(page)
        call = await upstream.called()
        await call.head()
        text = ""
        for number in range(times):
            await call.token(f"before {number} ")
            text += f"before {number} "
            await becomes(page, "text", text)
            wire.cut()
            await call.token(f"meanwhile {number} ")
            text += f"meanwhile {number} "
            await becomes(page, "text", text)
        await call.token("end")
        await call.finish()
        await call.event(chunk(usage={"prompt_tokens": 1, "completion_tokens": 1}))
        await call.done()
        await becomes(page, "text", text + "end")
        await becomes(page, "stream.readyState", CLOSED)
        ids = await page.evaluate("ids")
    assert ids == sorted(set(ids))
    assert len(upstream.calls) == 1
    await until(lambda: _statuses(server) == [200] * (times + 1), within=2)  # a line may come a moment later


async def test_a_page_that_does_not_close_it_is_told_to_stop_coming_back(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """An EventSource reconnects after every end; behind the last event it gets 204, and gives up."""
    server = await launch(LLM_BASE_URL=upstream.base_url)
    page = (await visit(server.url)).page
    await page.evaluate("() => { window.stream = new EventSource('/api/stream?q=hi'); }")
    await becomes(page, "stream.readyState", CLOSED)
    await until(lambda: _statuses(server) == [200, 204], within=2)
    assert len(upstream.calls) == 1


async def test_a_server_that_was_killed_has_not_forgotten_in_silence(
    launch: Launch, upstream: ScriptedUpstream, visit: VisitPage
) -> None:
    """Row L5: the next process does not know the stream, says so in it, and generates nothing anew."""

    async def half(call: Call) -> None:
        await call.head()
        await call.token("Half")
        await call.gone()

    upstream.script = half
    port = str(free_port())
    server = await launch(LLM_BASE_URL=upstream.base_url, SLUICE_PORT=port)
    page = (await visit(server.url)).page
    await ask_natively(page)
    await becomes(page, "text", "Half")
    server.signal(signal.SIGKILL)
    await server.exited()
    await launch(LLM_BASE_URL=upstream.base_url, SLUICE_PORT=port)
    await becomes(page, "failures", ["The answer was interrupted before its end."])
    assert await page.evaluate("stream.readyState") == CLOSED
    assert len(upstream.calls) == 1


def _statuses(server: SluiceProcess) -> list[int]:
    """Of the stream's requests that are over, as the log tells."""
    return [line["status"] for line in server.events("request") if line["path"] == "/api/stream"]
