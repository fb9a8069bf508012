"""Processes of a run: each on a core of its own, and what the kernel says of the time and memory it took (Linux)."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

__all__ = [
    "Child",
    "Cores",
    "Memory",
    "cpu_seconds",
    "environment",
    "memory",
    "raise_descriptor_limit",
    "waiting_seconds",
]

ROOT = Path(__file__).resolve().parents[2]
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_START_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Cores:
    """The server has one core for itself; simulator and viewers share another."""

    server: int
    rig: int

    @classmethod
    def choose(cls) -> Cores:
        mine = sorted(os.sched_getaffinity(0))
        return cls(mine[0], mine[-1])

    @property
    def apart(self) -> bool:
        return self.server != self.rig


class Child:
    """``python ARGUMENTS`` on one core; an async context manager that waits for its ``listening`` line on stderr."""

    def __init__(self, arguments: list[str], core: int, settings: dict[str, str] | None = None) -> None:
        self._arguments = arguments
        self._core = core
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self._environment = inherited | (settings or {})
        # A file and not a pipe: nobody must wake up to read what a server under load logs.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by __aexit__
        self.port = 0

    async def __aenter__(self) -> Child:
        self._process = subprocess.Popen(  # noqa: ASYNC220  takes a millisecond, while nothing is measured
            [sys.executable, *self._arguments],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        os.sched_setaffinity(self._process.pid, {self._core})
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self.port:
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = "\n".join(self._lines()[-20:])
                await self.__aexit__()
                raise RuntimeError(f"{' '.join(self._arguments)} did not start:\n{said}")
            await asyncio.sleep(0.02)
            self.port = self._listening_port()
        return self

    async def __aexit__(self, exc_type: object = None, *exc_info: object) -> None:
        self._process.kill()  # nothing in it is worth a graceful end
        self._process.wait()
        if exc_type:
            print(f"{' '.join(self._arguments)} said last:", *self._lines()[-10:], sep="\n", file=sys.stderr)
        self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _lines(self) -> list[str]:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace").splitlines()

    def _listening_port(self) -> int:
        for line in self._lines():
            if line.startswith("{") and line.endswith("}") and (record := json.loads(line)).get("event") == "listening":
                return int(record["url"].rpartition(":")[2].strip("/"))
        return 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process, in KB: resident now, its proportional share of shared pages, and the most ever resident."""

    rss: int
    pss: int
    peak_rss: int


def cpu_seconds(pid: int) -> float:
    """User and system time of the process so far; the kernel counts in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def waiting_seconds(pid: int) -> float:
    """How long the process's first thread could have run while something else had its core."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def memory(pid: int) -> Memory:
    """What the process holds; reading it walks its page tables, so not while something is timed."""
    return Memory(
        rss=_kilobytes(f"/proc/{pid}/smaps_rollup", "Rss:"),
        pss=_kilobytes(f"/proc/{pid}/smaps_rollup", "Pss:"),
        peak_rss=_kilobytes(f"/proc/{pid}/status", "VmHWM:"),
    )


def _kilobytes(path: str, name: str) -> int:
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(name))


def raise_descriptor_limit() -> None:
    """Allow this process and its children as many connections as the system lets it ask for."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def environment() -> dict[str, str | int]:
    """What the figures depend on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "python": platform.python_version(),
        "aiohttp": version("aiohttp"),
        "kernel": platform.release(),
        "processor": models[0].partition(": ")[2] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
    }
