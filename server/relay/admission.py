"""Token buckets: what each client may spend."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from server.settings import Rate

__all__ = ["Allowance", "TokenBuckets"]

_MAX_CLIENTS: Final = 100_000  # about 20 MB of buckets


@dataclass(frozen=True, slots=True)
class Allowance:
    """How a client stands after asking: admitted or not, whole tokens left, seconds until the next one comes."""

    admitted: bool
    remaining: int
    next_in: float


class TokenBuckets:
    """One bucket a client, all of one rate. No I/O, no timer: a bucket is the moment at which it will be full again.

    Memory is bounded by ``max_clients``, and making room never refills a bucket: only full ones are forgotten. While
    there is no room (an attacker with 100,000 addresses), clients without a bucket share a single one.
    """

    def __init__(
        self, rate: Rate, *, clock: Callable[[], float] = time.monotonic, max_clients: int = _MAX_CLIENTS
    ) -> None:
        self.rate = rate
        self._clock = clock
        self._max_clients = max_clients
        self._token_s = rate.seconds / rate.amount  # s that one token takes to come back
        self._full_at: OrderedDict[str, float] = OrderedDict()  # by client, the one that took last at the end
        self._newcomers_full_at = 0.0

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, client: str) -> Allowance:
        """Take one token out of the client's bucket, if there is a whole one."""
        now = self._clock()
        full_at = self._full_at.get(client)
        crowded = full_at is None and not self._make_room(now)
        if crowded:
            full_at = self._newcomers_full_at
        full_at = max(full_at or 0.0, now)
        missing = (full_at - now) / self._token_s
        if missing > self.rate.amount - 1 + 1e-9:  # rounding must not cost a client who waited exactly long enough
            return Allowance(False, 0, (missing - (self.rate.amount - 1)) * self._token_s)
        full_at += self._token_s
        if crowded:
            self._newcomers_full_at = full_at
        else:
            self._full_at[client] = full_at
            self._full_at.move_to_end(client)
        missing += 1
        return Allowance(True, math.floor(self.rate.amount - missing + 1e-9), (missing % 1 or 1.0) * self._token_s)

    def _make_room(self, now: float) -> bool:
        """Forget full buckets, oldest first; each was filled by what was taken at most ``rate.seconds`` ago."""
        while self._full_at:
            client, full_at = next(iter(self._full_at.items()))
            if full_at > now:
                break
            del self._full_at[client]
        return len(self._full_at) < self._max_clients
