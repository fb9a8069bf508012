"""``python -m ops.loadtest`` as it is called: exit statuses, files, the report, and a key that shows nowhere."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.sluice_process import ROOT, free_port
from tests.upstream_sim import Call, ScriptedUpstream, answer

KEY = "sk-do-not-show-me"


class Finished:
    def __init__(self, status: int | None, out: bytes, err: bytes) -> None:
        self.status, self.out, self.err = status, out.decode(), err.decode()


async def start(*arguments: str, stderr: int = asyncio.subprocess.PIPE) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "ops.loadtest", *arguments],
        cwd=ROOT,
        env={**os.environ, "LOADTEST_API_KEY": KEY, "COLUMNS": "110", "TERM": "xterm"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
    )


async def finish(process: asyncio.subprocess.Process) -> Finished:
    async with asyncio.timeout(50):
        out, err = await process.communicate()
    return Finished(process.returncode, out, err or b"")


async def loadtest(*arguments: str) -> Finished:
    return await finish(await start(*arguments))


def nobody() -> str:
    return f"http://127.0.0.1:{free_port()}"


async def test_a_run_is_told_in_tables_json_lines_and_a_report(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    upstream.script = answer(["a", "b", "c"], gap=0.01)
    files = {name: tmp_path / f"out.{name}" for name in ("json", "jsonl", "html")}
    paths = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    done = await loadtest(
        upstream.base_url, "--model", "sim", "--streams", "3", "--requests", "9", "--slo", "ttft=5s,itl_p99=5s", *paths
    )
    assert done.status == 0, done.err
    assert all(call.headers["Authorization"] == f"Bearer {KEY}" for call in upstream.calls)
    for text in (done.out, done.err, *(path.read_text() for path in files.values())):
        assert KEY not in text
    assert "output throughput" in done.out
    assert "itl_p99=5s: " in done.out
    told = json.loads(files["json"].read_text())
    assert (told["completed"], told["error"], told["ttft_ms"]["count"], told["itl_ms"]["count"]) == (9, 0, 9, 18)
    assert told["request_goodput"] == told["request_throughput"] > 0
    assert told["command"].startswith("python -m ops.loadtest http://127.0.0.1:")
    lines = [json.loads(line) for line in files["jsonl"].read_text().splitlines()]
    assert [line["request"] for line in sorted(lines, key=lambda line: line["request"])] == [*range(9)]
    assert {line["outcome"] for line in lines} == {"completed"}
    assert all(line["output_tokens"] == 3 and line["ttft_ms"] > 0 for line in lines)


class Page(HTMLParser):
    """What a page would load, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action"):
                self.links.append(value or "")
            elif name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.said.append(data.strip())


async def test_the_report_needs_nothing_else_and_runs_nothing(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """One file, no script, no foreign address; what came from outside is text in it."""
    report = tmp_path / "report.html"
    hostile = "<script>alert(1)</script>"
    command = [upstream.base_url, "--model", hostile, "--requests", "4", "--slo", "ttft=1s", "--html", str(report)]
    assert (await loadtest(*command, "--streams", "2", "--quiet")).status == 0
    text = report.read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & page.tags
    assert all(link.startswith("#") for link in page.links)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)), "the plots' ids do not collide"
    addresses = re.findall(r"https?://[^\s<\"')]*", text)
    assert set(addresses) <= {upstream.base_url, f"{upstream.base_url}/chat/completions"}
    assert f"openai {hostile}" in page.said
    assert text.count("<svg") == text.count("</svg>") == 3
    assert "var(--first)" in text
    assert "#040404" not in text
    for section in ("Latencies", "Load", "Outcomes", "The tester itself", "Definitions"):
        assert section in page.said


async def test_a_search_for_the_capacity_is_told_with_its_steps(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    upstream.script = answer(["a", "b", "c"], gap=0.01)
    told, report = tmp_path / "out.json", tmp_path / "out.html"
    done = await loadtest(
        *[upstream.base_url, "--model", "sim", "--find-capacity", "--slo", "itl_p99=10s", "--streams", "1"],
        *["--max-streams", "2", "--step", "300ms", "--ramp", "0", "--warmup", "0", "--grace", "1s"],
        *["--json", str(told), "--html", str(report)],
    )
    assert done.status == 0, done.err
    assert "1 stream held: itl_p99=10s" in done.err
    assert "Capacity: at least 2 streams" in done.out
    capacity = json.loads(told.read_text())["capacity"]
    assert [(step["streams"], step["held"]) for step in capacity["steps"]] == [(1, True), (2, True)]
    assert "streams held" in Page(report.read_text()).said


async def refuse(call: Call) -> None:
    await call.refuse(429, {"message": "no", "code": "rate_limit_exceeded"})


@pytest.mark.parametrize(
    ("script", "arguments", "status"),
    [
        (answer(), ["--slo", "ttft_p99=1us"], 0),
        (answer(), ["--slo", "ttft_p99=1us", "--fail-on-slo"], 1),
        (answer(), ["--slo", "ttft_p99=60s", "--fail-on-slo"], 0),
        (refuse, [], 1),
    ],
    ids=["objectives are only told", "unless they are to be kept", "and are", "nothing completed"],
)
async def test_the_exit_status_says_what_came_of_it(
    upstream: ScriptedUpstream, script: Any, arguments: list[str], status: int
) -> None:
    upstream.script = script
    done = await loadtest(upstream.base_url, "--model", "sim", "--requests", "2", "--duration", "2", *arguments)
    assert done.status == status, done.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "what to test? Give a URL"),
        (["http://localhost", "--slo", "ttft"], "argument --slo: 'ttft' is no objective; one is NAME=BOUND"),
        (["http://localhost", "--jsonl", "/"], "/: Is a directory"),
    ],
)
async def test_bad_usage_is_one_line_and_status_2(arguments: list[str], told: str) -> None:
    done = await loadtest(*arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("ops.loadtest: ")
    assert told in done.err
    assert done.err.count("\n") == 1


async def test_help_tells_the_exit_statuses() -> None:
    done = await loadtest("--help")
    assert done.status == 0
    assert "130 ended by Ctrl-C" in done.out


async def test_ctrl_c_ends_the_run_and_what_was_measured_is_written(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    upstream.script = answer(["t"] * 10_000, gap=0.01)
    told = tmp_path / "out.json"
    process = await start(upstream.base_url, "--model", "sim", "--streams", "2", "--json", str(told), "--quiet")
    await asyncio.wait_for(upstream.called(2), 20)
    await asyncio.sleep(0.5)
    process.send_signal(signal.SIGINT)
    done = await finish(process)
    assert (done.status, done.err) == (130, "")
    assert "ended early" in done.out
    figures = json.loads(told.read_text())
    assert figures["interrupted"]
    assert figures["cut_off"] == 2
    assert figures["total_output_tokens"] > 0


async def test_a_terminal_gets_a_live_display(upstream: ScriptedUpstream) -> None:
    upstream.script = answer(["t"] * 30, gap=0.01)
    command = [upstream.base_url, "--model", "sim", "--streams", "2", "--duration", "1200ms"]
    screen, terminal = pty.openpty()
    try:
        process = await start(*command, stderr=terminal)
        os.close(terminal)
        drawing = asyncio.create_task(asyncio.to_thread(_read_all, screen))
        done = await finish(process)
        drawn = await asyncio.wait_for(drawing, 10)
    finally:
        os.close(screen)
    assert done.status == 0
    assert b"open streams" in drawn
    assert b"measuring" in drawn


def _read_all(descriptor: int) -> bytes:
    """Until the other side is closed, which a terminal tells by an error."""
    read = b""
    try:
        while piece := os.read(descriptor, 4096):
            read += piece
    except OSError:
        pass
    return read
