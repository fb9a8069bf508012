"""Watching from outside: until something holds, and what a process has open and resident."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

__all__ = ["command_line", "descriptors", "leaving_no_trace", "resident_bytes", "until"]


async def until(holds: Callable[[], object], *, within: float, every: float = 0.01) -> None:
    """Look every ``every`` s until ``holds()``. Raises TimeoutError after ``within`` s."""
    async with asyncio.timeout(within):
        while not holds():  # noqa: ASYNC110 - what is watched tells nobody of its changes
            await asyncio.sleep(every)


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def leaving_no_trace(pid: int, *, most_growth: int = 16 << 20) -> AsyncIterator[None]:
    """I3, I4: what happens inside costs the process no descriptor, and at most ``most_growth`` bytes that stay."""
    descriptors_before, resident_before = descriptors(pid), resident_bytes(pid)
    yield
    # The pool of the upstream's connections may keep a few for the next question.
    await until(lambda: descriptors(pid) <= descriptors_before + 8, within=10)
    growth = resident_bytes(pid) - resident_before
    print(f"resident: {growth / 1024:+.0f} KiB")
    assert growth < most_growth
