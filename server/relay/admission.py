"""Token buckets: what each client may spend."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from server.settings import Rate

__all__ = ["Allowance", "Reservation", "TokenBuckets"]

_MAX_CLIENTS: Final = 100_000  # about 20 MB of buckets
_ROUNDING: Final = 1e-9  # tokens: it must not cost a client who waited exactly long enough


class Allowance(NamedTuple):
    """How a client stands: admitted or not, whole tokens left, seconds until the next one comes."""

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

    def look(self, client: str) -> Allowance:
        """How the client stands, with nothing taken."""
        return self._allowance(self._missing(client, self._clock()))

    def take(self, client: str) -> Allowance:
        """Take one token out of the client's bucket, if there is a whole one."""
        now = self._clock()
        missing = self._missing(client, now)
        if missing > self.rate.amount - 1 + _ROUNDING:
            return self._allowance(missing)
        self._set_missing(client, missing + 1, now)
        return self._allowance(missing + 1, admitted=True)

    def _allowance(self, missing: float, *, admitted: bool = False) -> Allowance:
        if missing > self.rate.amount - 1 + _ROUNDING:
            return Allowance(admitted, 0, (missing - (self.rate.amount - 1)) * self._token_s)
        return Allowance(
            True,
            math.floor(self.rate.amount - missing + _ROUNDING),
            (missing % 1 or 1.0) * self._token_s if missing > 0 else 0.0,
        )

    def reserve(self, client: str, most: int) -> Reservation | None:
        """Take up to ``most`` tokens, as many whole ones as there are, for something whose cost shows at its end; None
        where there is none."""
        reservation = Reservation(self, client)
        return reservation if reservation.extend(most) else None

    def _missing(self, client: str, now: float) -> float:
        """How many tokens the bucket lacks; more than it holds where the client owes some."""
        full_at = self._full_at.get(client)
        if full_at is None and not self._make_room(now):
            full_at = self._newcomers_full_at
        return max(0.0, (full_at or 0.0) - now) / self._token_s

    def _fill(self, client: str, amount: int) -> None:
        """Put ``amount`` tokens back; a negative one takes them. Nobody ever owes more than a bucket holds."""
        now = self._clock()
        missing = min(max(0.0, self._missing(client, now) - amount), 2.0 * self.rate.amount)
        self._set_missing(client, missing, now)

    def _set_missing(self, client: str, missing: float, now: float) -> None:
        full_at = now + missing * self._token_s
        if client in self._full_at or self._make_room(now):
            self._full_at[client] = full_at
            self._full_at.move_to_end(client)
        else:
            self._newcomers_full_at = full_at

    def _make_room(self, now: float) -> bool:
        """Forget full buckets, oldest first; each fills within twice ``rate.seconds`` of what was taken last."""
        while self._full_at:
            client, full_at = next(iter(self._full_at.items()))
            if full_at > now:
                break
            del self._full_at[client]
        return len(self._full_at) < self._max_clients


class Reservation:
    """Tokens that are taken before it is known how many will be used: ``amount`` of them."""

    __slots__ = ("_buckets", "_client", "_settled", "amount")

    def __init__(self, buckets: TokenBuckets, client: str) -> None:
        self._buckets = buckets
        self._client = client
        self._settled = False
        self.amount = 0

    def extend(self, most: int) -> bool:
        """Take up to ``most`` more; false where there is none."""
        more = min(most, self._buckets.look(self._client).remaining)
        if more < 1:
            return False
        self.amount += more
        self._buckets._fill(self._client, -more)
        return True

    def settle(self, used: int) -> None:
        """Give back what was not ``used``, or charge what was used beyond; once, whatever is said later."""
        if not self._settled:
            self._settled = True
            self._buckets._fill(self._client, self.amount - used)
