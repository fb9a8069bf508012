"""A steady tick below a millisecond, which no event loop's own timers can give: the kernel's timerfd (Linux)."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable

__all__ = ["Ticker"]

_libc = ctypes.CDLL(None, use_errno=True)  # os.timerfd_create has come with Python 3.13


class _Timespec(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Ticker:
    """Calls ``action`` every ``tick_ns``, on the running loop, between ``start`` and ``stop``. Ticks that the loop came
    too late for are one call."""

    def __init__(self, tick_ns: int, action: Callable[[], None]) -> None:
        self._tick_ns = tick_ns
        self._action = action
        self._fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self.running = False

    def start(self) -> None:
        if not self.running:
            self._set(self._tick_ns)
            asyncio.get_running_loop().add_reader(self._fd, self._tick)
            self.running = True

    def stop(self) -> None:
        if self.running:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._set(0)
            self.running = False

    def close(self) -> None:
        self.stop()
        os.close(self._fd)

    def _tick(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # stopped and started anew since it was seen to be ready
            return
        self._action()

    def _set(self, tick_ns: int) -> None:
        every = _Timespec(*divmod(tick_ns, 1_000_000_000))
        if _libc.timerfd_settime(self._fd, 0, ctypes.byref(_TimerSpec(every, every)), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")
