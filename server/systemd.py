"""What systemd asks of a service: readiness, stopping, and a sign of life (sd_notify(3))."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping

__all__ = ["Notifier"]


class Notifier:
    """Sends states to the socket that ``NOTIFY_SOCKET`` names; without one it does nothing. A context manager."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        # Opened once: a process out of descriptors must still be able to say that it lives, and that it stops.
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self._address else None
        if self._sender is not None:
            self._sender.setblocking(False)
        microseconds = environment.get("WATCHDOG_USEC", "")
        self._watchdog = int(microseconds) / 1e6 if microseconds.isascii() and microseconds.isdigit() else 0.0

    def __enter__(self) -> Notifier:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._sender is not None:
            self._sender.close()

    def ready(self) -> None:
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    @contextlib.asynccontextmanager
    async def watchdog(self) -> AsyncIterator[None]:
        """Tell twice in each watchdog interval that the event loop still turns."""
        if self._sender is None or not self._watchdog:
            yield
            return
        beat = asyncio.create_task(self._beat(), name="watchdog")
        try:
            yield
        finally:
            beat.cancel()

    async def _beat(self) -> None:
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self._watchdog / 2)

    def _send(self, state: str) -> None:
        if self._sender is None:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError):
            self._sender.sendto(state.encode("ascii"), address)
