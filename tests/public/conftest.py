"""Chromium, the page as a visitor meets it, and a wire between the two that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from playwright.async_api import Browser, ConsoleMessage, Locator, Page, async_playwright, expect

__all__ = ["GONE_S", "RECONNECT_S", "Visit", "VisitPage", "Wire"]

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",  # which containers and root lack
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 10_000  # a slow machine is no failure: every wait ends as soon as it may

RECONNECT_S = 2.5  # the stream's `retry: 1000`, and time for the request to arrive
GONE_S = 5.0  # until an upstream call that nobody wants is closed, on a slow machine

# Keeps every EventSource that the page makes, every sentence that the status line says, and the last text copied.
OBSERVE = """
window.sources = [];
window.EventSource = class extends EventSource {
  constructor(url) { super(url); sources.push(this); }
};
Object.defineProperty(navigator, "clipboard", {
  configurable: true,
  value: {writeText: async (text) => { window.copied = text; }},
});
addEventListener("DOMContentLoaded", () => {
  window.announced = [];
  const status = document.getElementById("status");
  const hear = () => announced.push(status.textContent);
  new MutationObserver(hear).observe(status, {childList: true, characterData: true, subtree: true});
});
"""


class Visit:
    """The page in a tab. ``complaints`` holds its console's errors and warnings: broken CSP rules, failed loads."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []  # "METHOD URL" of each, whoever in the page made it
        page.on("request", lambda request: self.requests.append(f"{request.method} {request.url}"))
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _listen(self, said: ConsoleMessage) -> None:
        if said.type in {"error", "warning"}:
            self.complaints.append(said.text)

    def __getitem__(self, element_id: str) -> Locator:
        return self.page.locator(f"#{element_id}")

    async def ask(self, question: str = "Why?") -> None:
        await self["question"].fill(question)
        await self["ask"].click()

    async def reaches(self, state: str) -> None:
        await expect(self.page.locator("html")).to_have_attribute("data-state", state)

    @property
    def answer(self) -> Locator:
        """The last answer."""
        return self.page.locator(".answer").last

    async def shows(self, text: str) -> None:
        """Wait until the last answer is exactly that text, its markup aside."""
        async with asyncio.timeout(PATIENCE_MS / 1000):
            while await self.answer.text_content() != text:  # noqa: ASYNC110  (the page sets no asyncio.Event)
                await asyncio.sleep(0.02)

    async def kept(self) -> Any:
        """The conversation of this tab, as the browser's storage holds it."""
        read = 'JSON.parse(localStorage.getItem("sluice.chat." + sessionStorage.getItem("sluice.chat")))'
        return await self.page.evaluate(read)

    async def has_kept(self, *answers: str) -> None:
        """The answers of this conversation are these, to the letter, as they would be copied or sent along."""
        assert [turn["answer"] for turn in (await self.kept())["turns"]] == list(answers)

    async def listens_no_more(self) -> None:
        """Nothing is left that could reconnect: every EventSource is closed."""
        assert set(await self.page.evaluate("sources.map(source => source.readyState)")) <= {2}

    async def another_tab(self, url: str) -> Visit:
        """A further tab of the same browser, which shares what it keeps."""
        return await _open(await self.page.context.new_page(), url, [])

    async def announced(self) -> list[str]:
        sentences: list[str] = await self.page.evaluate("announced")
        return sentences

    async def has_said(self, sentence: str, times: int = 1) -> None:
        """Wait until the status line has said that, so often; it may have said more since."""
        async with asyncio.timeout(PATIENCE_MS / 1000):
            while (await self.announced()).count(sentence) < times:  # noqa: ASYNC110  (as in shows)
                await asyncio.sleep(0.02)

    async def focused(self) -> str:
        element_id: str = await self.page.evaluate("document.activeElement.id")
        return element_id


class VisitPage(Protocol):
    def __call__(self, url: str, *, scripts: list[str] | None = None, **options: Any) -> Awaitable[Visit]: ...


@pytest.fixture(scope="session")
def chromium(need: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Chromium for all tests, as the URL of its DevTools: to start one costs as much as a whole test."""
    profile = tmp_path_factory.mktemp("chromium")
    arguments = [*CHROMIUM_ARGUMENTS, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    with subprocess.Popen(
        [need("chromium"), *arguments, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield f"http://127.0.0.1:{_devtools_port(process, profile / 'DevToolsActivePort')}"
        finally:
            process.terminate()


def _devtools_port(process: subprocess.Popen[bytes], file: Path) -> str:
    """Wait until Chromium has written down where it listens."""
    deadline = time.monotonic() + 2 * PATIENCE_MS / 1000
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and len(lines := file.read_text().split()) == 2:
            return lines[0]
        time.sleep(0.05)
    raise AssertionError("Chromium did not start")


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """This test's own connection to it, since Playwright's lives in one event loop; what it opens closes with it."""
    expect.set_options(timeout=PATIENCE_MS)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.connect_over_cdp(chromium)
        yield browser
        for context in browser.contexts[1:]:  # the first is the profile's own
            await context.close()
        await browser.close()


@pytest.fixture
def visit(browser: Browser) -> VisitPage:
    """``await visit(url, color_scheme="dark", …)`` opens the page in a profile of its own."""

    async def open_page(url: str, *, scripts: list[str] | None = None, **options: Any) -> Visit:
        context = await browser.new_context(**options)
        return await _open(await context.new_page(), url, scripts or [])

    return open_page


async def _open(page: Page, url: str, scripts: list[str]) -> Visit:
    page.set_default_timeout(PATIENCE_MS)
    for script in [OBSERVE, *scripts]:
        await page.add_init_script(script)
    visit = Visit(page)
    await page.goto(url)
    return visit


class Wire:
    """A TCP proxy on a loopback port, in whose place a Wi-Fi or a proxy would fail; an async context manager.

    ``cut()`` resets the connections there are, ``hang_up()`` ends them in good order. ``silence()`` forwards no byte
    any more and keeps every connection open, until ``speak()``. While ``refusing``, each new connection gets a 502.
    """

    def __init__(self, url: str) -> None:
        self._port = int(url.rpartition(":")[2])
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._forwarding = asyncio.Event()
        self._forwarding.set()
        self.refusing = False
        self.refused = 0  # so many times
        self.url = ""

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def silence(self) -> None:
        self._forwarding.clear()

    def speak(self) -> None:
        self._forwarding.set()

    def cut(self) -> None:
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
            writer.transport.abort()

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.close()

    def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._refuse(writer) if self.refusing else self._join(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refuse(self, writer: asyncio.StreamWriter) -> None:
        self.refused += 1
        with contextlib.suppress(OSError):
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
            writer.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._writers |= ends
        ways = [asyncio.create_task(self._carry(*way)) for way in ((reader, far_writer), (far_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._writers -= ends
            for end in ends:
                end.transport.abort()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._forwarding.wait()
                writer.write(data)
                await writer.drain()
