"""The real server as a process of its own: started as a user starts it, observed from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "SluiceProcess", "free_port"]

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A loopback port that nobody listens on now.

    It is none of those that the kernel gives to outgoing connections (Linux: from 32768 on), or one of a thousand that
    another test opens might take it before the program does for which it is.
    """
    while True:
        port = random.randrange(10_000, 32_768)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class SluiceProcess:
    """``python run.py`` with the given environment; an async context manager that waits until it listens.

    ``url`` and ``admin_url`` say where; ``lines`` holds what it wrote to stderr, one string a line.
    """

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self.environment = environment
        self.arguments = arguments
        self.lines: list[str] = []
        self.url = ""
        self.admin_url = ""
        self._listening = asyncio.Event()

    async def __aenter__(self) -> SluiceProcess:
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        settings = {"SLUICE_PORT": "0", "SLUICE_ADMIN_PORT": str(free_port())} | self.environment
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ROOT / "run.py"),
            *self.arguments,
            env=inherited | settings,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        self._reader = asyncio.create_task(self._read_stderr())
        listening = asyncio.create_task(self._listening.wait())
        await asyncio.wait({listening, self._reader}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if not self._listening.is_set():
            await self.__aexit__()
            raise AssertionError("Sluice did not start:\n" + "\n".join(self.lines))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        await self.process.wait()
        await self._reader

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exited(self) -> int:
        """Wait for the end and return the exit status."""
        status = await self.process.wait()
        await self._reader
        return status

    def events(self, name: str) -> list[dict[str, Any]]:
        """The structured log lines of that event, in order."""
        records = (json.loads(line) for line in self.lines if line.startswith("{"))
        return [record for record in records if record["event"] == name]

    async def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            line = raw.decode().rstrip("\n")
            self.lines.append(line)
            if line.startswith("{") and (record := json.loads(line))["event"] == "listening":
                self.url = record["url"]
                self.admin_url = record.get("admin_url", "")
                self._listening.set()
