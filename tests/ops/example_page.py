"""The example page in React: built as its README says, served, and used as a visitor would."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

from playwright.async_api import ConsoleMessage, Locator, Page, expect

from tests.sluice_process import ROOT

__all__ = ["Chat", "Failed", "build", "build_for", "preview"]

EXAMPLE = ROOT / "ops" / "examples" / "react-chat"
BUILT_FROM = EXAMPLE / "node_modules" / ".built-from"  # the SHA-256 of what `dist` was built from
BUILD_S = 240.0  # for each step, on a machine that does other things too
START_S = 20.0


class Failed(Exception):
    """A step ended with a status other than 0; its stderr is the message."""


def build(npm: str) -> None:
    """`npm ci` and `npm run build`, unless just that has been built; safe among processes.

    Raises :class:`Failed` where npm cannot, for want of a registry say.
    """
    with (EXAMPLE / "package-lock.json").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # several workers of one test run come here at once
        digest = _digest_of_sources()
        if (EXAMPLE / "dist" / "index.html").exists() and BUILT_FROM.exists() and BUILT_FROM.read_text() == digest:
            return
        _run(npm, "ci", "--no-audit", "--no-fund")
        _run(npm, "run", "build")
        BUILT_FROM.write_text(digest)


def build_for(npm: str, sluice_url: str, into: Path) -> None:
    """The page for a Sluice of another origin, in a folder of its own."""
    _run(npm, "run", "build", "--", "--outDir", str(into), "--logLevel", "error", VITE_SLUICE_URL=sluice_url)


def _run(npm: str, *arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [npm, *arguments],
        cwd=EXAMPLE,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=BUILD_S,
    )
    if done.returncode != 0:
        raise Failed(f"npm {' '.join(arguments)}: {done.stderr}")


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for file in sorted(path for folder in (EXAMPLE, EXAMPLE / "src") for path in folder.iterdir() if path.is_file()):
        digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


@contextlib.asynccontextmanager
async def preview(node: str, port: int, *arguments: str, **environment: str) -> AsyncIterator[None]:
    """`vite preview` on that port, whose proxy passes /api to SLUICE_URL."""
    vite = await asyncio.create_subprocess_exec(
        *(node, "node_modules/vite/bin/vite.js", "preview"),
        *("--host", "127.0.0.1", "--port", str(port), "--strictPort", *arguments),
        cwd=EXAMPLE,
        env=os.environ | environment,
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(START_S):
            while not await _listens(port):  # noqa: ASYNC110  (another process tells of no event)
                await asyncio.sleep(0.05)
        yield
    finally:
        vite.kill()
        await vite.wait()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


class Chat:
    """The page in a tab. ``complaints`` holds what its console says of errors."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _listen(self, said: ConsoleMessage) -> None:
        if said.type in {"error", "warning"}:
            self.complaints.append(said.text)

    @property
    def alert(self) -> Locator:
        return self.page.get_by_role("alert")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name)

    async def ask(self, question: str = "Why?") -> None:
        await self.page.get_by_label("Your question").fill(question)
        await self.button("Ask").click()

    async def shows(self, *turns: str) -> None:
        """Wait until the texts of the turns are these, reasoning aside."""
        await expect(self.page.locator("li > .text")).to_have_text([*turns])

    async def says(self, status: str) -> None:
        await expect(self.page.get_by_role("status")).to_have_text(status)

    async def is_ready(self) -> None:
        await expect(self.button("Ask")).to_be_visible()
