"""The live display. On a terminal a process of its own draws it: rich takes 7 ms for that, in which the tester would
read no token, and then call the endpoint late. The tester only writes a line of JSON into a pipe, twice a second."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ops.loadtest.record import Outcome
from ops.loadtest.run import Run

__all__ = ["Display", "open_display"]

_ROOT = Path(__file__).resolve().parents[2]
_EVERY_S = 0.5
_END_TIMEOUT_S = 2.0
_PLAIN_EVERY_S = 5.0  # where there is no terminal, lines are kept


class Display:
    """Shows runs while they go on, by a drawing process, by plain lines on stderr, or (``quiet``) not at all."""

    def __init__(self, drawer: asyncio.subprocess.Process | None, *, quiet: bool) -> None:
        self._drawer = drawer
        self._quiet = quiet

    @contextlib.asynccontextmanager
    async def showing(self, run: Run, title: str) -> AsyncIterator[None]:
        """Show the run as long as the block lasts."""
        following = asyncio.create_task(self._follow(run, title), name="display")
        try:
            yield
        finally:
            following.cancel()

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._drawer is not None:
            self._send({"line": line})
        elif not self._quiet:
            print(line, file=sys.stderr, flush=True)

    async def _follow(self, run: Run, title: str) -> None:
        if self._quiet:
            return
        tokens = 0
        every_s = _EVERY_S if self._drawer else _PLAIN_EVERY_S
        while True:
            await asyncio.sleep(every_s)
            state = _state(run, title, (run.tally.all_tokens - tokens) / every_s)
            tokens = run.tally.all_tokens
            if self._drawer:
                self._send(state)
            else:
                print(_plain(state), file=sys.stderr, flush=True)

    def _send(self, state: dict[str, Any]) -> None:
        if self._drawer is not None and self._drawer.stdin is not None and not self._drawer.stdin.is_closing():
            self._drawer.stdin.write(json.dumps(state).encode() + b"\n")


@contextlib.asynccontextmanager
async def open_display(*, quiet: bool) -> AsyncIterator[Display]:
    if quiet or not sys.stderr.isatty():
        yield Display(None, quiet=quiet)
        return
    drawer = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "ops.loadtest.progress"],
        cwd=_ROOT,
        stdin=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the tester, which then closes the pipe
    )
    try:
        yield Display(drawer, quiet=False)
    finally:
        if drawer.stdin is not None:
            drawer.stdin.close()  # which ends it
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await drawer.wait()
        except TimeoutError:  # a terminal that was stopped (Ctrl-S) takes nothing
            drawer.kill()
            await drawer.wait()


def _state(run: Run, title: str, tokens_per_s: float) -> dict[str, Any]:
    tally, load, now_ns = run.tally, run.load, time.monotonic_ns()
    window = tally.window
    elapsed_s, all_s = (now_ns - window.run_ns) / 1e9, load.ramp_s + load.warmup_s + load.duration_s
    phase = "measuring" if now_ns in window else "finishing" if now_ns >= window.end_ns else "warming up"
    return {
        "title": title,
        "phase": "ramping up" if elapsed_s < load.ramp_s else phase,
        "elapsed_s": elapsed_s,
        "all_s": all_s,
        "open": tally.open_streams,
        "tokens_per_s": tokens_per_s,
        "outcomes": {outcome: count for outcome in Outcome if (count := tally.outcomes[outcome])},
        "ttft": [tally.ttft.percentile_ms(0.5), tally.ttft.percentile_ms(0.99)],
        "itl": [tally.itl.percentile_ms(0.5), tally.itl.percentile_ms(0.99)],
    }


def _plain(state: dict[str, Any]) -> str:
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in state["outcomes"].items()) or "nothing ended"
    return (
        f"{state['title']}, {state['phase']} {state['elapsed_s']:.0f}/{state['all_s']:.0f} s: {state['open']} open, "
        f"{state['tokens_per_s']:.0f} tokens/s, {outcomes}; "
        f"p99 of TTFT {state['ttft'][1]:.1f} ms, of ITL {state['itl'][1]:.1f} ms"
    )


def _drawing(state: dict[str, Any]) -> Group:
    figures = Table.grid(padding=(0, 3))
    figures.add_row("open streams", f"{state['open']}", "tokens/s", f"{state['tokens_per_s']:.0f}")
    for name, title in (("ttft", "TTFT"), ("itl", "inter-token")):
        p50, p99 = state[name]
        figures.add_row(f"{title} p50", f"{p50:.1f} ms", "p99", f"{p99:.1f} ms")
    ended = Text("   ").join(
        Text(f"{count} {outcome}", style="red" if Outcome(outcome).failed else "green")
        for outcome, count in state["outcomes"].items()
    )
    head = Text.assemble((state["title"], "bold"), f"  {state['phase']}")
    bar = ProgressBar(total=state["all_s"], completed=min(state["elapsed_s"], state["all_s"]), width=60)
    return Group(head, bar, figures, ended)


def _draw() -> None:
    """The drawing process: states come in as lines, until there are no more."""
    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for line in sys.stdin:
            state = json.loads(line)
            if "line" in state:
                live.console.print(state["line"], highlight=False, markup=False)
            else:
                live.update(_drawing(state), refresh=True)


if __name__ == "__main__":
    _draw()
