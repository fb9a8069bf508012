"""Steps that the page's tests share: an upstream whose every token is the test's to send."""

from __future__ import annotations

from tests.public.conftest import Visit
from tests.upstream_sim import Call, ScriptedUpstream

__all__ = ["by_hand", "complete", "half_answered", "opened"]


async def by_hand(call: Call) -> None:
    """An upstream that leaves every byte to the test."""


async def opened(upstream: ScriptedUpstream, count: int = 1) -> Call:
    """Wait for that call and open its stream: every token is the test's to send."""
    call = await upstream.called(count)
    await call.head()
    return call


async def half_answered(page: Visit, upstream: ScriptedUpstream) -> Call:
    """Ask by hand, and see the first half of an answer whose rest is the test's to send."""
    upstream.script = by_hand
    count = len(upstream.calls) + 1
    await page.ask()
    call = await opened(upstream, count)
    await call.token("Half")
    await page.shows("Half")
    return call


async def complete(call: Call, reason: str = "stop") -> None:
    await call.finish(reason)
    await call.done()
