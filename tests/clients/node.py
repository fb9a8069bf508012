"""Small programs in Node that use a published client as its users do, and tell what came of it.

A script is an ES module in ``js/``; ``js/harness.mjs`` gives it its arguments and takes what it says. Each line of its
stdout is one JSON object, and the last one is its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["DEADLINE_S", "INSTALL_S", "JS", "Failed", "NodeScript", "install_packages", "run_script"]

JS = Path(__file__).resolve().parent / "js"
DEADLINE_S = 30.0  # for the next word of a script; Node alone takes seconds to start on a busy machine
MOST_LINE_BYTES = 1 << 24  # of one line that a script says
INSTALL_S = 240.0  # for `npm ci`, and for the workers that wait until one of them has done it

_INSTALLED = JS / "node_modules" / ".installed-from"  # the SHA-256 of the lock file that these packages came from


class Failed(Exception):
    """A program ended with a status other than 0, or not in time; its stderr is the message."""


def install_packages(npm: str) -> None:
    """Lay out ``node_modules`` exactly as the lock file says, unless that has been done; safe among processes.

    Raises :class:`Failed` where npm cannot, for want of a registry say.
    """
    lock_file = JS / "package-lock.json"
    with lock_file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # several workers of one test run come here at once
        digest = hashlib.sha256(held.read()).hexdigest()
        if _INSTALLED.exists() and _INSTALLED.read_text() == digest:
            return
        try:
            subprocess.run(
                [npm, "ci", "--no-audit", "--no-fund"], cwd=JS, check=True, capture_output=True, timeout=INSTALL_S
            )
        except subprocess.CalledProcessError as exc:
            raise Failed(f"npm ci: {exc.stderr.decode(errors='replace')}") from exc
        except subprocess.TimeoutExpired as exc:
            raise Failed(f"npm ci did not end within {INSTALL_S:g} s") from exc
        _INSTALLED.write_text(digest)


class NodeScript:
    """One script at work; an async context manager, at whose end it is ended.

    ``deadline_s`` bounds each wait for it, not its whole life.
    """

    def __init__(self, node: str, name: str, arguments: dict[str, Any], *, deadline_s: float = DEADLINE_S) -> None:
        self._command = [node, str(JS / name), json.dumps(arguments)]
        self._name = name
        self._deadline_s = deadline_s
        self._last: dict[str, Any] | None = None

    async def __aenter__(self) -> NodeScript:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, cwd=JS, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, limit=MOST_LINE_BYTES
        )
        assert self._process.stderr is not None
        self._complaints = asyncio.create_task(self._process.stderr.read())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._kill()
        await self._process.wait()
        await self._complaints

    async def says(self) -> dict[str, Any]:
        """Wait for the next thing that it tells. Raises :class:`Failed` if it ends, or says nothing, instead."""
        if (told := await self._next()) is None:
            raise await self._failure("ended instead of saying more")
        return told

    async def rest(self) -> list[dict[str, Any]]:
        """Wait for its end and return what it told until then. Raises :class:`Failed` if it did not end well."""
        told = []
        while (one := await self._next()) is not None:
            told.append(one)
        if status := await self._process.wait():  # its stdout has ended, and so does it
            raise await self._failure(f"ended with {status}")
        return told

    async def result(self) -> dict[str, Any]:
        """Wait for its end and return the last that it told. Raises :class:`Failed` if it did not end well."""
        await self.rest()
        if self._last is None:
            raise await self._failure("ended without a word")
        return self._last

    async def _next(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(self._deadline_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise await self._failure(f"said nothing for {self._deadline_s:g} s") from None
        if not line:
            return None
        self._last = json.loads(line)
        return self._last

    async def _failure(self, how: str) -> Failed:
        self._kill()
        stderr = (await self._complaints).decode(errors="replace")
        return Failed(f"{self._name} {how}; its last words were {self._last}, its stderr:\n{stderr}")

    def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


async def run_script(
    node: str, name: str, arguments: dict[str, Any], *, deadline_s: float = DEADLINE_S
) -> dict[str, Any]:
    """Run a script to its end and return its result. Raises :class:`Failed`, with what it wrote to stderr."""
    async with NodeScript(node, name, arguments, deadline_s=deadline_s) as script:
        return await script.result()
