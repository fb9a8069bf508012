"""Logging: one line an event, to stderr, as JSON or as text; written by a thread, so that no reader of it can stop us.

A line never holds a prompt, an answer, a secret, or the text of an exception (which may quote any of them).
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO

__all__ = ["JsonFormatter", "TextFormatter", "log_event", "logging_to"]

_FIELDS: Final = "sluice_fields"  # where a record keeps its fields
_MAX_WAITING: Final = 10_000  # lines held while stderr's reader is slow; more are dropped and counted
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.:/@+\-\[\]]+")


def log_event(logger: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Log ``event`` with its fields; a field that is None is left out."""
    if logger.isEnabledFor(level):
        present = {name: value for name, value in fields.items() if value is not None}
        logger.log(level, event, extra={_FIELDS: present})


@contextmanager
def logging_to(stream: TextIO, *, form: str, level: str) -> Iterator[None]:
    """Send all logging to ``stream`` while the context lasts; ``form`` is ``text`` or ``json``."""
    lines: queue.Queue[Any] = queue.Queue(_MAX_WAITING)
    writer = logging.StreamHandler(stream)
    writer.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    listener = logging.handlers.QueueListener(lines, writer)
    handler = _NeverBlocking(lines)
    handler.addFilter(_soften_bad_requests)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("sluice").setLevel(level.upper())
    logging.raiseExceptions = False  # a closed stderr is no reason to write to stderr
    listener.start()
    try:
        yield
    finally:
        root.removeHandler(handler)
        listener.stop()


class _NeverBlocking(logging.handlers.QueueHandler):
    """Queues records for the writing thread; drops and counts what a full queue cannot take."""

    def __init__(self, lines: queue.Queue[Any]) -> None:
        super().__init__(lines)
        self._dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # same process: the formatter may run later, on the record itself

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._dropped:
            setattr(record, _FIELDS, getattr(record, _FIELDS, {}) | {"lines_dropped_before": self._dropped})
        try:
            super().enqueue(record)
            self._dropped = 0
        except queue.Full:
            self._dropped += 1


def _soften_bad_requests(record: logging.LogRecord) -> bool:
    """aiohttp logs each request that is no HTTP as an ERROR with a traceback and the offending bytes: a flood that any
    port scanner causes, and it may hold a credential. Keep the fact, at debug."""
    if record.name != "aiohttp.server" or not record.exc_info or record.exc_info[0] is None:
        return True
    if record.exc_info[0].__module__ != "aiohttp.http_exceptions":
        return True
    log_event(logging.getLogger("sluice.request"), logging.DEBUG, "bad_request", reason=record.exc_info[0].__name__)
    return False


def _read(record: logging.LogRecord) -> dict[str, Any]:
    """A record as the fields of its line."""
    created = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    line: dict[str, Any] = {
        "time": f"{created}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "event": record.getMessage(),
    }
    if not record.name.startswith("sluice"):
        line["logger"] = record.name
    line |= getattr(record, _FIELDS, {})
    if record.exc_info and record.exc_info[0] is not None:
        line["exception"] = record.exc_info[0].__name__
        frames = traceback.extract_tb(record.exc_info[2])
        line["at"] = [
            f"{frame.filename.rpartition('/server/')[2]}:{frame.lineno} {frame.name}" for frame in frames[-8:]
        ]
    return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line; control characters are escaped by JSON itself, all others by ``ensure_ascii``."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_read(record), default=str)


class TextFormatter(logging.Formatter):
    """``time level event name=value …`` for people; whatever is not plain stands in JSON quotes, escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line = _read(record)
        head = f"{line.pop('time')} {line.pop('level'):<7} {line.pop('event')}"
        return " ".join([head, *(f"{name}={_plain(value)}" for name, value in line.items())])


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
