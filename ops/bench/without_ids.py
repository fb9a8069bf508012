"""Sluice with all of its parts but resuming: events without ids, a log that does not know where its events begin.

Only to measure what resuming adds per token: ``python -m ops.bench cpu --relay sluice --relay without-ids``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

import run
from server.relay.log import LogFull, ReplayLog
from server.wire.events import EventEncoder

_encode = msgspec.json.Encoder().encode


def _token_without_id(self: EventEncoder, number: int, text: str) -> bytes:
    return b'data: {"token":%b}\n\n' % _encode(text)


def _append_without_place(self: ReplayLog, event: bytes) -> None:
    if len(self._bytes) + len(event) > self._max_bytes:
        raise LogFull
    self._bytes += event


def main(arguments: Sequence[str]) -> int:
    EventEncoder.token = _token_without_id  # type: ignore[method-assign]
    ReplayLog.append = _append_without_place  # type: ignore[method-assign]
    return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
