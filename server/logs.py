"""Logging: one line an event, to stderr, as JSON or as text; written by a thread, so that no reader of it can stop us.

A line never holds a prompt, an answer, a secret, or the text of an exception (which may quote any of them).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import logging.handlers
import os
import queue
import re
import select
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO

import msgspec

__all__ = ["JsonFormatter", "TextFormatter", "log_event", "logging_to"]

_FIELDS: Final = "sluice_fields"  # where a record keeps its fields
_MAX_WAITING: Final = 10_000  # lines held while stderr's reader is slow; more are dropped and counted
_LAST_LINES: Final = 1.0  # s that the end of the process waits for stderr's reader
_GATHER: Final = 0.02  # s in which lines come together to be written at once; a thread that wakes for each costs more
_encode: Final = msgspec.json.Encoder(enc_hook=str).encode
_encode_anything: Final = json.JSONEncoder(default=str, separators=(",", ":")).encode
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.:/@+\-\[\]]+")


_Lines = queue.SimpleQueue[logging.LogRecord | None]  # None is the end


def log_event(logger: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Log ``event`` with its fields; a field that is None is left out."""
    if logger.isEnabledFor(level):
        present = {name: value for name, value in fields.items() if value is not None}
        logger.callHandlers(_Event(logger.name, level, event, present))  # ours have no filters that handle() would ask


_UNKNOWN: Final[dict[str, Any]] = (
    dict.fromkeys(("pathname", "filename", "module", "funcName", "threadName", "processName", "taskName"), "")
    | dict.fromkeys(("lineno", "thread", "process", "relativeCreated"), 0)
    | dict.fromkeys(("exc_info", "exc_text", "stack_info"))
    | {"args": ()}
)


class _Event(logging.LogRecord):
    """A record of ours. It knows nothing of the line, thread and process that it comes from: to find that out costs
    more than all else about it, and no line of the log tells it."""

    def __init__(self, name: str, level: int, event: str, fields: dict[str, Any]) -> None:
        now = time.time()
        self.__dict__ = {
            **_UNKNOWN,
            "name": name,
            "msg": event,
            "levelno": level,
            "levelname": logging.getLevelName(level),
            "created": now,
            "msecs": now % 1 * 1000,
            _FIELDS: fields,
        }


@contextmanager
def logging_to(stream: TextIO | None, *, form: str, level: str) -> Iterator[None]:
    """Send all logging to ``stream`` while the context lasts; None (Python's stderr, where it is closed) takes nothing.

    ``form`` is ``text``, ``json``, or ``auto``: text on a terminal, else JSON.
    """
    if form == "auto":
        form = "text" if stream is not None and stream.isatty() else "json"
    with contextlib.ExitStack() as stack:
        if stream is None:  # takes the number 2, too: what prints to stderr in C must not print into a client's socket
            stream = stack.enter_context(open(os.devnull, "w", encoding="ascii"))
        lines: _Lines = queue.SimpleQueue()
        handler = _NeverBlocking(lines)
        handler.addFilter(_soften_bad_requests)
        stack.enter_context(_handling_all(handler, level))
        stack.enter_context(_writing(lines, stream.fileno(), JsonFormatter() if form == "json" else TextFormatter()))
        yield


@contextmanager
def _handling_all(handler: logging.Handler, level: str) -> Iterator[None]:
    """``handler`` and no other gets what is logged: of ours from ``level`` on, of libraries' their warnings."""
    root, ours = logging.getLogger(), logging.getLogger("sluice")
    handlers, root_level, our_level = root.handlers[:], root.level, ours.level
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    ours.setLevel(level.upper())
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(root_level)
        ours.setLevel(our_level)


@contextmanager
def _writing(lines: _Lines, descriptor: int, form: logging.Formatter) -> Iterator[None]:
    """A thread writes what is queued, some lines at a time. At the end it has a moment for what is left, but a reader
    that takes nothing does not keep the process.

    It writes to the descriptor and not through ``sys.stderr``: stuck in there it would hold that stream's lock, which
    the interpreter needs at its end, or dies.
    """

    def write() -> None:
        record = lines.get()
        while record is not None:
            time.sleep(_GATHER)
            text: list[str] = []
            while record is not None:
                with contextlib.suppress(Exception):  # a line that cannot be formatted is lost, the next may go
                    text.append(f"{form.format(record)}\n")
                if lines.empty():
                    break
                record = lines.get()
            with contextlib.suppress(Exception):  # likewise what cannot be written
                _write_all(descriptor, "".join(text).encode("ascii", "backslashreplace"))
            if record is not None:
                record = lines.get()

    thread = threading.Thread(target=write, name="log writer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        lines.put(None)
        thread.join(_LAST_LINES)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # somebody who shares the terminal or pipe has made it non-blocking
            select.select([], [descriptor], [])


class _NeverBlocking(logging.handlers.QueueHandler):
    """Queues records for the writing thread; drops and counts those that are too many."""

    def __init__(self, lines: _Lines) -> None:
        super().__init__(lines)
        self._lines = lines
        self._dropped = 0

    def handle(self, record: logging.LogRecord) -> bool:
        if type(record) is _Event:  # which no filter is for, and the queue needs no lock
            self.enqueue(record)
            return True
        return bool(super().handle(record))

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # same process: the formatter may run later, on the record itself

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= _MAX_WAITING:
            self._dropped += 1
            return
        if self._dropped:
            setattr(record, _FIELDS, getattr(record, _FIELDS, {}) | {"lines_dropped_before": self._dropped})
            self._dropped = 0
        self._lines.put(record)


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
    line: dict[str, Any] = {
        "time": f"{_second(int(record.created))}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "event": "",
    }
    if type(record) is _Event:
        line["event"] = record.msg
        line |= getattr(record, _FIELDS)
        return line
    # The first line only: asyncio goes on with the repr of a task, and that with the text of its exception.
    line["event"] = record.getMessage().partition("\n")[0]
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


@functools.lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class JsonFormatter(logging.Formatter):
    """One JSON object a line, of printable ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        return _json(_read(record))


class TextFormatter(logging.Formatter):
    """``time level event name=value …`` for people; whatever is not plain stands in JSON quotes, escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line = _read(record)
        head = f"{line.pop('time')} {line.pop('level'):<7} {_plain(line.pop('event'))}"
        return " ".join([head, *(f"{name}={_plain(value)}" for name, value in line.items())])


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else _json(value)
    return text if _PLAIN.fullmatch(text) else _json(text)


def _json(value: Any) -> str:
    """``value`` as JSON in printable ASCII: what JSON itself leaves of the control characters is DEL."""
    try:
        text = _encode(value).decode()  # as the standard library writes it without spaces, at a tenth of the time
    except (ValueError, TypeError, OverflowError):  # half a surrogate pair, a number beyond 64 bits
        text = ""
    if not text or not text.isascii():
        text = _encode_anything(value)
    return text.replace("\x7f", "\\u007f")
