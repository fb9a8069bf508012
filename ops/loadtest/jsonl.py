"""One line of JSON a request, written as it ends: what it was, for one's own statistics."""

from __future__ import annotations

import json
import time
from typing import IO, Any

from ops.loadtest.metrics import e2el_ns, itl_p99_ns, tpot_ns, ttft_ns
from ops.loadtest.record import Record

__all__ = ["RecordLog", "record_as_json"]


class RecordLog:
    """Writes into an open file. Times are seconds since the log was begun; durations are milliseconds."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._began_ns = time.monotonic_ns()

    def write(self, record: Record, *, streams: int | None, measured: bool) -> None:
        """``streams`` is the step of a capacity search; ``measured``: it was due in the measured window."""
        line = {"streams": streams} if streams is not None else {}
        line |= record_as_json(record, self._began_ns) | {"measured": measured}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")


def record_as_json(record: Record, began_ns: int) -> dict[str, Any]:
    """None stands for what did not come to pass. No prompt, no text of an answer, no key."""
    return {
        "request": record.number,
        "prompt": record.prompt,
        "outcome": record.outcome.value,
        "status": record.status or None,
        "code": record.code or None,
        "intended_s": round((record.intended_ns - began_ns) / 1e9, 6),
        "start_late_ms": _ms(record.started_ns - record.intended_ns if record.started_ns else None),
        "queued": record.queued,
        "reused_connection": record.reused,
        "connect_ms": _ms(record.connected_ns - record.started_ns if record.connected_ns else None),
        "first_byte_ms": _ms(record.first_byte_ns - record.started_ns if record.first_byte_ns else None),
        "ttft_ms": _ms(ttft_ns(record)),
        "ttft_service_ms": _ms(ttft_ns(record, service=True)),
        "tpot_ms": _ms(tpot_ns(record)),
        "itl_p99_ms": _ms(itl_p99_ns(record)),
        "e2el_ms": _ms(e2el_ns(record)),
        "ended_ms": _ms(record.ended_ns - record.intended_ns),
        "output_tokens": record.tokens,
        "reasoning_tokens": record.reasoning_tokens,
        "reported_input_tokens": record.prompt_tokens,
        "reported_output_tokens": record.completion_tokens,
        "bytes": record.bytes,
        "malformed_events": record.malformed,
        "reconnects": record.reconnects,
        "resume_ms": [_ms(resume_ns) for resume_ns in record.resume_ns],
        "lost": record.lost,
        "doubled": record.doubled,
    }


def _ms(duration_ns: float | None) -> float | None:
    return None if duration_ns is None else round(duration_ns / 1e6, 3)
