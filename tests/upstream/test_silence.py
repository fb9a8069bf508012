"""The deadline that content, and nothing else, pushes back."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from server.upstream.silence import SilenceDeadline


async def test_silence_from_the_start_ends_with_the_first_time() -> None:
    """SLUICE_FIRST_TOKEN_TIMEOUT."""
    silence = SilenceDeadline(first=0.05, idle=10)
    began_at = time.monotonic()
    with pytest.raises(TimeoutError), silence:
        await asyncio.sleep(10)
    assert silence.expired
    assert 0.04 <= time.monotonic() - began_at < 2


async def test_the_idle_time_runs_from_what_was_heard_last() -> None:
    """SLUICE_IDLE_TIMEOUT."""
    silence = SilenceDeadline(first=10, idle=0.4)
    began_at = time.monotonic()

    async def listen() -> None:
        with silence:
            for _ in range(4):
                await asyncio.sleep(0.1)
                silence.heard()
            await asyncio.sleep(10)

    with pytest.raises(TimeoutError):
        await listen()
    assert 0.75 <= time.monotonic() - began_at < 4, "four times heard, and then one idle time"


async def test_the_first_time_no_longer_matters_once_something_was_heard() -> None:
    with SilenceDeadline(first=0.1, idle=10) as silence:
        silence.heard()
        await asyncio.sleep(0.2)
    assert not silence.expired


async def test_hearing_moves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token costs one reading of the clock; only the first, in a long first-token time, sets the timer anew."""
    loop = asyncio.get_running_loop()
    timers = 0
    call_at = loop.call_at

    def counting(*args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        nonlocal timers
        timers += 1
        return call_at(*args, **kwargs)

    with SilenceDeadline(first=30, idle=20) as silence:
        monkeypatch.setattr(loop, "call_at", counting)
        for _ in range(10_000):
            silence.heard()
    assert timers == 1


async def test_a_timer_that_wakes_early_sleeps_on() -> None:
    """It is set once an idle time, however many tokens come in it."""
    with SilenceDeadline(first=0.1, idle=5) as silence:
        for _ in range(10):
            silence.heard()
            await asyncio.sleep(0.03)
    assert not silence.expired


async def test_nothing_expires_after_leaving() -> None:
    with SilenceDeadline(first=0.05, idle=0.05) as silence:
        silence.heard()
    await asyncio.sleep(0.15)
    assert not silence.expired


async def test_an_error_inside_goes_through() -> None:
    with pytest.raises(KeyError), SilenceDeadline(first=10, idle=10):
        raise KeyError


async def test_a_timeout_of_somebody_else_is_not_ours() -> None:
    silence = SilenceDeadline(first=10, idle=10)
    with pytest.raises(TimeoutError), silence:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(10)
    assert not silence.expired


@pytest.mark.parametrize("turns", range(-1, 5))
async def test_a_cancellation_that_meets_the_expiry_is_never_swallowed(turns: int) -> None:
    """A viewer who leaves in the instant of a time-out has left: CancelledError goes on (style, point 14).

    The cancellation comes so many turns of the loop after the deadline's timer, or in the turn before it.
    """
    loop = asyncio.get_running_loop()
    silence = SilenceDeadline(first=0.05, idle=10)
    accepted = None

    async def listen() -> None:
        with silence:
            await asyncio.sleep(10)

    def cancel(left: int) -> None:
        nonlocal accepted
        if left > 0:
            loop.call_soon(cancel, left - 1)
        else:
            accepted = task.cancel()

    task = asyncio.create_task(listen())
    await asyncio.sleep(0)
    loop.call_at(silence.deadline - (0.001 if turns < 0 else 0), cancel, turns)
    await asyncio.wait([task], timeout=5)
    assert task.done()
    assert task.cancelled() is bool(accepted), "it is refused only where the task was over"
    if not task.cancelled():
        assert isinstance(task.exception(), TimeoutError)
