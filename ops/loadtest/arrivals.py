"""When requests begin. Pure: seconds in, seconds out; the clock and the sleeping are the runner's."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

__all__ = ["Backoff", "poisson", "ramp_starts", "read_retry_after_s"]

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_LONGEST_RETRY_AFTER_S = 3600.0


def ramp_starts(streams: int, ramp_s: float) -> list[float]:
    """When each stream of the closed loop begins: evenly over the ramp, the first at once."""
    return [ramp_s * number / streams for number in range(streams)]


def poisson(rate: float, ramp_s: float, rng: random.Random) -> Iterator[float]:
    """When the requests of the open loop are due: a Poisson process of ``rate`` a second, without end.

    While the ramp lasts the rate rises evenly from 0, so that half as many are due in it. The schedule never looks at
    the answers: an endpoint that slows down does not slow it down, which is what coordinated omission would be.
    """
    due = 0.0  # in expected arrivals; exponential gaps there are the process at rate 1
    while True:
        due += rng.expovariate(1.0)
        in_ramp = rate * ramp_s / 2
        yield math.sqrt(2 * ramp_s * due / rate) if due < in_ramp else ramp_s + (due - in_ramp) / rate


class Backoff:
    """How long a stream of the closed loop pauses after failures in a row, so that no storm of them is made of it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._failures = 0

    def after_success(self) -> None:
        self._failures = 0

    def after_failure(self, retry_after_s: float | None) -> float:
        """Seconds: what the endpoint asked for, or else 0.1 s, doubled with each failure up to 5 s, less up to half."""
        self._failures += 1
        if retry_after_s is not None:
            return retry_after_s
        pause = min(_LONGEST_PAUSE_S, math.ldexp(_FIRST_PAUSE_S, min(self._failures - 1, 16)))
        return pause * self._rng.uniform(0.5, 1.0)


def read_retry_after_s(text: str, now_s: float) -> float | None:
    """What a ``Retry-After`` asks for: whole seconds, or a date (RFC 9110, 10.2.3); None where it is neither.

    ``now_s`` is the time of day since the epoch.
    """
    if text.isascii() and text.isdigit() and len(text) < 10:
        pause = float(text)
    else:
        try:
            pause = parsedate_to_datetime(text).timestamp() - now_s
        except ValueError:
            return None
    return min(max(pause, 0.0), _LONGEST_RETRY_AFTER_S)
