"""Processes of a run: each on a core of its own, and what the kernel says of the time and memory they took (Linux).

A server is its whole process tree: nginx is a master and its workers. Processor time is user and system time together,
in nanoseconds, as the scheduler counts it for each thread (``/proc/PID/task/TID/schedstat``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

__all__ = [
    "ROOT",
    "Child",
    "Cores",
    "Memory",
    "cpu_seconds",
    "environment",
    "fast_loop",
    "free_port",
    "idle_seconds",
    "memory",
    "process_tree",
    "raise_descriptor_limit",
    "wake_ups",
]

ROOT = Path(__file__).resolve().parents[2]
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's event loop where it is installed: the cheaper the rig, the less of it is measured."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


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
    """A command on one core; an async context manager that waits until it listens.

    On ``port``, if that is given; else its ``listening`` line on stderr says where. ``settings`` are its environment,
    beside PATH, HOME and LANG. Raises RuntimeError, with what it said, where it ends first or takes too long."""

    def __init__(
        self, command: Sequence[str], core: int, settings: dict[str, str] | None = None, port: int = 0
    ) -> None:
        self._command = command
        self._core = core
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self._environment = inherited | (settings or {})
        # A file and not a pipe: nobody must wake up to read what a server under load logs.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by __aexit__
        self._asked_port = port
        self.port = 0

    async def __aenter__(self) -> Child:
        with _on_core(self._core):  # inherited from the first moment on, by a master's workers too
            self._process = subprocess.Popen(  # noqa: ASYNC220  takes a millisecond, while nothing is measured
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self.port:
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = "\n".join(self._lines()[-20:])
                await self.__aexit__()
                raise RuntimeError(f"{' '.join(self._command)} did not start:\n{said}")
            await asyncio.sleep(0.02)
            self.port = self._listening_port()
        return self

    async def __aexit__(self, exc_type: object = None, *exc_info: object) -> None:
        tree = process_tree(self.pid)
        if len(tree) > 1:  # a master ends and reaps its workers; alone, no process holds what a graceful end would save
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        if exc_type:
            print(f"{' '.join(self._command)} said last:", *self._lines()[-10:], sep="\n", file=sys.stderr)
        self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _lines(self) -> list[str]:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace").splitlines()

    def _listening_port(self) -> int:
        if self._asked_port:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self._asked_port), timeout=1).close()
                return self._asked_port
            return 0
        for line in self._lines():
            if line.startswith("{") and line.endswith("}") and (record := json.loads(line)).get("event") == "listening":
                return int(record["url"].rpartition(":")[2].strip("/"))
        return 0


@contextlib.contextmanager
def _on_core(core: int) -> Iterator[None]:
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def free_port() -> int:
    """A port that nobody listens on, for a server that cannot choose one itself and say which."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def process_tree(pid: int) -> list[int]:
    """The process and all its descendants, each parent before its children; those that have ended are left out."""
    tree = [pid]
    for parent in tree:
        for thread in _threads(parent):
            with contextlib.suppress(OSError):
                tree += map(int, (thread / "children").read_text().split())
    return tree


def _threads(pid: int) -> list[Path]:
    try:
        return [*Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []


def cpu_seconds(pid: int) -> float:
    """User and system time of the process tree so far."""
    total_ns = 0
    for process in process_tree(pid):
        for thread in _threads(process):
            with contextlib.suppress(OSError):
                total_ns += int((thread / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def wake_ups(pid: int) -> int:
    """How often threads of the process tree went to sleep of their own accord so far, and so were woken up again."""
    total = 0
    for process in process_tree(pid):
        for thread in _threads(process):
            with contextlib.suppress(OSError):
                told = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", (thread / "status").read_text(), re.MULTILINE)
                total += int(told[1]) if told else 0
    return total


def idle_seconds(core: int) -> float:
    """How long the core had nothing to do so far. What is neither idle nor the server's is somebody else's: another
    process, the kernel's own work, or a hypervisor that ran another machine there."""
    fields = re.search(rf"^cpu{core} (.*)", Path("/proc/stat").read_text(), re.MULTILINE)
    assert fields is not None
    return sum(map(int, fields[1].split()[3:5])) / _TICKS_PER_SECOND  # idle, and idle while a disk works


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process tree, in KB: resident now, its proportional share of shared pages, and the most ever resident."""

    rss: int
    pss: int
    peak_rss: int


def memory(pid: int) -> Memory:
    """What the process tree holds; reading it walks its page tables, so not while something is timed."""
    tree = process_tree(pid)
    return Memory(
        rss=sum(_kilobytes(f"/proc/{process}/smaps_rollup", "Rss:") for process in tree),
        pss=sum(_kilobytes(f"/proc/{process}/smaps_rollup", "Pss:") for process in tree),
        peak_rss=sum(_kilobytes(f"/proc/{process}/status", "VmHWM:") for process in tree),
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
