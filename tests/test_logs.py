"""The log: contract, section 7; rows L9 (a slow or dead reader), S10 (secrets) and S15 (injection)."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

import pytest
from aiohttp import http_exceptions
from hypothesis import given, settings
from hypothesis import strategies as st

from server import logs
from server.logs import JsonFormatter, TextFormatter, log_event, logging_to

SECRET: Final = "sk-canary-0123456789"
ours: Final = logging.getLogger("sluice.test")
theirs: Final = logging.getLogger("aiohttp.server")

FORMS: Final = pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()], ids=["json", "text"])


def record(event: str = "happened", *, name: str = "sluice.test", exc_info: Any = None, **fields: Any) -> Any:
    made = logging.LogRecord(name, logging.INFO, "file.py", 1, event, None, exc_info)
    made.created, made.msecs = 1_700_000_000.042, 42.0
    made.sluice_fields = fields
    return made


def raised(error: BaseException) -> Any:
    try:
        raise error
    except type(error) as exc:
        return type(exc), exc, exc.__traceback__


class Log:
    """A file that is logged to, and what stands in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> TextIO:
        return self.path.open("a", encoding="utf-8")

    @property
    def lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines()

    @property
    def records(self) -> list[Any]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


# ---- One line an event


def test_json_is_an_object_a_line() -> None:
    assert json.loads(JsonFormatter().format(record(id="a", tokens=3, nothing=False))) == {
        "time": "2023-11-14T22:13:20.042Z",
        "level": "info",
        "event": "happened",
        "id": "a",
        "tokens": 3,
        "nothing": False,
    }


def test_text_is_for_people() -> None:
    line = TextFormatter().format(record(id="a-b_c", tokens=3, url="http://[::1]:4001", note="two words", ok=True))
    assert line == (
        '2023-11-14T22:13:20.042Z info    happened id=a-b_c tokens=3 url=http://[::1]:4001 note="two words" ok=true'
    )


@FORMS
def test_a_foreign_line_names_its_logger(formatter: logging.Formatter) -> None:
    assert "aiohttp.server" in formatter.format(record(name="aiohttp.server"))
    assert "sluice.test" not in formatter.format(record())


NASTY: Final = [
    "\x1b[31mred",
    "two\nlines",
    "a\rb",
    "a\0b",
    "\x7f",
    "\x85",
    "\x9b31m",
    "\u2028",
    "\u2029",
    "\u202egnp.exe",
    "\ufeff",
    '"; x="y',
    "%n%s%(name)s",
    "{0}",
    "a=b level=error",
    "",
    " ",
    "😀",
    "\ud83d",
]


@FORMS
@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_no_text_leaves_its_field(formatter: logging.Formatter, text: str) -> None:
    """Row S15: ESC, NEL, U+2028, ``%n``: escaped, in both forms; nothing that a terminal would obey."""
    line = formatter.format(record(field=text, after=1))
    assert line.isascii()
    assert line.isprintable()
    if isinstance(formatter, JsonFormatter):
        assert json.loads(line)["field"] == text
    else:
        shown = line.partition(" field=")[2].removesuffix(" after=1")
        assert (json.loads(shown) if shown.startswith('"') else shown) == text


@FORMS
@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_no_event_of_a_library_leaves_its_line(formatter: logging.Formatter, text: str) -> None:
    """Libraries put what they got into their messages."""
    line = formatter.format(record(text, name="aiohttp.server"))
    assert line.isascii()
    assert line.isprintable()


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(st.characters(codec=None)))
def test_no_text_at_all_leaves_its_field(text: str) -> None:
    """The same, searched."""
    for formatter in (JsonFormatter(), TextFormatter()):
        line = formatter.format(record(field=text))
        assert line.isascii()
        assert line.isprintable()


@FORMS
def test_whatever_a_field_holds_can_be_written(formatter: logging.Formatter) -> None:
    line = formatter.format(record(a=["x", {"y": 1}], b=ValueError, c=1.5, d=b"\n", e=Path("/x")))
    assert line.isprintable()


def test_a_field_without_a_value_is_left_out(log: Log) -> None:
    with log.open() as stream, logging_to(stream, form="json", level="info"):
        log_event(ours, logging.INFO, "happened", id="a", ttft_ms=None, tokens=0)
    (line,) = log.records
    assert set(line) == {"time", "level", "event", "id", "tokens"}
    assert datetime.now(UTC) >= datetime.fromisoformat(line["time"])


# ---- Exceptions


@FORMS
def test_an_exception_is_told_without_its_text_but_with_where(formatter: logging.Formatter) -> None:
    """Row S10: the text of an exception may quote a key or a prompt; its type and its place never do."""
    line = formatter.format(record("answer_failed", exc_info=raised(ValueError(SECRET))))
    assert SECRET not in line
    assert "ValueError" in line
    assert "test_logs.py:" in line
    assert " raised" in line


@FORMS
def test_neither_is_the_text_of_its_cause(formatter: logging.Formatter) -> None:
    def fail() -> None:
        try:
            raise ValueError(SECRET)
        except ValueError as exc:
            raise KeyError(SECRET) from exc

    try:
        fail()
    except KeyError as exc:
        line = formatter.format(record(exc_info=(type(exc), exc, exc.__traceback__)))
    assert SECRET not in line
    assert "KeyError" in line


def test_where_is_told_but_not_too_deep() -> None:
    def fall(depth: int) -> None:
        if depth:
            fall(depth - 1)
        raise ValueError

    try:
        fall(50)
    except ValueError as exc:
        line = json.loads(JsonFormatter().format(record(exc_info=(type(exc), exc, exc.__traceback__))))
    assert len(line["at"]) == 8
    assert all(place.endswith(" fall") for place in line["at"])


@pytest.mark.parametrize("form", ["json", "text"])
async def test_a_task_that_nobody_awaits_does_not_tell_its_exception(form: str, log: Log) -> None:
    """asyncio's message goes on with the task's repr, and that with the exception's: an aiohttp error holds our key."""

    async def fail() -> None:
        raise ValueError(SECRET)

    with log.open() as stream, logging_to(stream, form=form, level="info"):
        task = asyncio.create_task(fail(), name=SECRET)
        await asyncio.wait({task})
        del task
        await asyncio.sleep(0)
    (line,) = log.lines
    assert "Task exception was never retrieved" in line
    assert "ValueError" in line
    assert SECRET not in line


# ---- What is logged, and what is not


@pytest.mark.parametrize(
    ("level", "told"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_is_the_least_that_is_logged(level: str, told: list[str], log: Log) -> None:
    with log.open() as stream, logging_to(stream, form="json", level=level):
        for name in ("debug", "info", "warning", "error"):
            log_event(ours, logging.getLevelNamesMapping()[name.upper()], name)
    assert [line["event"] for line in log.records] == told


def test_of_libraries_only_warnings_are_logged(log: Log) -> None:
    """At debug asyncio and aiohttp would tell what they handle."""
    with log.open() as stream, logging_to(stream, form="json", level="debug"):
        theirs.debug("a debug line of theirs")
        theirs.info("an info line of theirs")
        theirs.warning("a warning of theirs")
    assert [line["event"] for line in log.records] == ["a warning of theirs"]


BAD_REQUESTS: Final = [
    http_exceptions.BadStatusLine(SECRET),
    http_exceptions.LineTooLong(SECRET.encode(), 10),
    http_exceptions.InvalidHeader(SECRET),
    http_exceptions.BadHttpMethod(SECRET),
    http_exceptions.TransferEncodingError(SECRET),
]


@pytest.mark.parametrize("error", BAD_REQUESTS, ids=lambda error: type(error).__name__)
def test_a_request_that_is_no_http_is_a_debug_line(error: Exception, log: Log) -> None:
    """Row A12: aiohttp logs an ERROR with a traceback and the bytes for each; any port scanner makes thousands."""
    with log.open() as stream, logging_to(stream, form="json", level="debug"):
        theirs.error("Error handling request from %s", "192.0.2.1", exc_info=error)
    (line,) = log.records
    assert (line["event"], line["level"], line["reason"]) == ("bad_request", "debug", type(error).__name__)
    assert SECRET not in log.lines[0]


def test_at_info_it_is_no_line_at_all(log: Log) -> None:
    with log.open() as stream, logging_to(stream, form="json", level="info"):
        for error in BAD_REQUESTS:
            theirs.error("Error handling request", exc_info=error)
    assert log.lines == []


def test_a_bug_that_aiohttp_caught_stays_an_error(log: Log) -> None:
    with log.open() as stream, logging_to(stream, form="json", level="info"):
        theirs.error("Error handling request", exc_info=ZeroDivisionError(SECRET))
        theirs.error("Unhandled")
    first, second = log.records
    assert (first["level"], first["exception"], first["logger"]) == ("error", "ZeroDivisionError", "aiohttp.server")
    assert second["event"] == "Unhandled"


def test_bad_requests_of_the_upstream_are_not_softened(log: Log) -> None:
    """Only the server's own parser meets strangers."""
    with log.open() as stream, logging_to(stream, form="json", level="info"):
        logging.getLogger("aiohttp.client").error("broken", exc_info=BAD_REQUESTS[0])
    assert [line["level"] for line in log.records] == ["error"]


def test_logging_is_as_before_when_the_context_ends(log: Log) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.getLogger("sluice").level
    with log.open() as stream, logging_to(stream, form="json", level="debug"):
        assert root.handlers != before[0]
    assert (root.handlers, root.level, logging.getLogger("sluice").level) == before


# ---- Where it goes


@pytest.mark.parametrize(("terminal", "is_json"), [(True, False), (False, True)], ids=["terminal", "file"])
def test_auto_is_text_on_a_terminal_and_json_elsewhere(
    terminal: bool, is_json: bool, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 2, SLUICE_LOG_FORMAT."""
    with log.open() as stream:
        if terminal:
            descriptor, follower = os.openpty()
            os.dup2(follower, stream.fileno())
        with logging_to(stream, form="auto", level="info"):
            log_event(ours, logging.INFO, "happened")
        if terminal:
            line = os.read(descriptor, 4096).decode()
            os.close(descriptor)
            os.close(follower)
        else:
            (line,) = log.lines
    assert line.startswith("{") is is_json
    assert "happened" in line


def test_a_closed_stderr_takes_nothing() -> None:
    """After ``2>&-`` Python's sys.stderr is None."""
    with logging_to(None, form="auto", level="info"):
        log_event(ours, logging.INFO, "happened")


# ---- A reader that is slow, stuck or gone


class Pipe:
    """A pipe of one page, as stderr; its reader takes something when the test says so."""

    def __init__(self) -> None:
        self.reading, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        self.stream = os.fdopen(writing, "w")
        self._taken: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        while data := os.read(self.reading, 65_536):
            self._taken.append(data)

    def start_reading(self) -> None:
        self._reader.start()

    def wait_until_quiet(self) -> None:
        """Return when nothing has come for a while."""
        taken = -1
        while taken < len(self._taken):
            taken = len(self._taken)
            time.sleep(0.3)

    def records(self) -> list[Any]:
        """All that was written, once nobody writes any more."""
        self.stream.close()
        self._reader.join()
        return [json.loads(line) for line in b"".join(self._taken).splitlines()]

    def close(self) -> None:
        self.stream.close()
        if self._reader.is_alive():
            self._reader.join()
        os.close(self.reading)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


@pytest.fixture
def few_lines(monkeypatch: pytest.MonkeyPatch) -> int:
    """A short queue, and little patience at the end."""
    monkeypatch.setattr(logs, "_MAX_WAITING", 20)
    monkeypatch.setattr(logs, "_LAST_LINES", 0.2)
    return 20


def measured(action: Callable[[], None]) -> float:
    began_at = time.monotonic()
    action()
    return time.monotonic() - began_at


def test_a_full_queue_drops_lines_and_counts_them(pipe: Pipe, few_lines: int) -> None:
    """Row L9: what is lost is told by the first line that gets through again."""
    with logging_to(pipe.stream, form="json", level="info"):
        for number in range(1000):
            log_event(ours, logging.INFO, "happened", number=number)
        pipe.start_reading()
        pipe.wait_until_quiet()  # the queue has room again
        log_event(ours, logging.INFO, "happened", number=1000)
        log_event(ours, logging.INFO, "happened", number=1001)
    lines = pipe.records()
    assert len(lines) < 200  # a page and a short queue of them
    assert [line["number"] for line in lines[-2:]] == [1000, 1001]
    # Which ones were lost is the threads' affair; each gap is told by the line behind it, and nothing else is.
    for line, following in itertools.pairwise([{"number": -1}, *lines]):
        assert following.get("lines_dropped_before", 0) == following["number"] - line["number"] - 1


def test_a_reader_that_takes_nothing_holds_nobody_up(pipe: Pipe, few_lines: int) -> None:
    """Row L9: logging never blocks the loop, nor the end of the process."""
    logging_there = contextlib.ExitStack()
    logging_there.enter_context(logging_to(pipe.stream, form="json", level="info"))

    def log_a_lot() -> None:
        for _ in range(1000):
            log_event(ours, logging.INFO, "happened", text="x" * 100)

    assert measured(log_a_lot) < 2
    assert measured(logging_there.close) < 3
    pipe.start_reading()
    pipe.wait_until_quiet()  # the thread that was stuck has its way before the descriptor's number is another's


def test_what_was_logged_before_the_end_is_written(pipe: Pipe) -> None:
    """A living reader gets the last line, "stopped" among them."""
    pipe.start_reading()
    with logging_to(pipe.stream, form="json", level="info"):
        for number in range(500):
            log_event(ours, logging.INFO, "happened", number=number)
    assert [line["number"] for line in pipe.records()] == list(range(500))


def test_a_reader_that_has_gone_is_no_failure(capfd: pytest.CaptureFixture[str]) -> None:
    """Row L9: ``python run.py 2>&1 | head -1``."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream, logging_to(stream, form="json", level="info"):
        os.close(reading)
        for _ in range(100):
            log_event(ours, logging.INFO, "happened")
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_no_failure(capfd: pytest.CaptureFixture[str]) -> None:
    """Row L9."""
    with open("/dev/full", "w") as stream, logging_to(stream, form="json", level="info"):
        log_event(ours, logging.INFO, "happened")
    assert capfd.readouterr().err == ""


def test_a_stderr_that_somebody_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    """Whoever shares the terminal or the pipe may set O_NONBLOCK on it for all."""
    os.set_blocking(pipe.stream.fileno(), False)
    with logging_to(pipe.stream, form="json", level="info"):
        for number in range(500):
            log_event(ours, logging.INFO, "happened", number=number)
        pipe.start_reading()
    assert [line["number"] for line in pipe.records()] == list(range(500))


def test_a_line_that_cannot_be_made_does_not_take_the_next_one_with_it(log: Log) -> None:
    class Broken:
        def __str__(self) -> str:
            raise ValueError

    with log.open() as stream, logging_to(stream, form="json", level="info"):
        log_event(ours, logging.INFO, "lost", field=Broken())
        theirs.warning("%d", "no number")
        log_event(ours, logging.INFO, "happened")
    assert [line["event"] for line in log.records] == ["happened"]
