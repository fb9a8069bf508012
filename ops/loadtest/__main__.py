"""``python -m ops.loadtest URL``: the command line, the results' files, and the exit status."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from ops.loadtest.jsonl import RecordLog
from ops.loadtest.options import BadOptions, Options, read_options
from ops.loadtest.overhead import tester_environment
from ops.loadtest.record import Outcome
from ops.loadtest.report import Report, render
from ops.loadtest.selftest import findings_as_json, print_findings, self_test
from ops.loadtest.session import Findings, measure
from ops.loadtest.target import Target
from ops.loadtest.terminal import open_console, print_capacity, print_summary

_MEASURED, _BROKE, _BAD_USAGE, _INTERRUPTED = 0, 1, 2, 130


def main() -> int:
    try:
        options = read_options(sys.argv[1:], os.environ)
    except BadOptions as exc:
        print(f"ops.loadtest: {exc}", file=sys.stderr)
        return _BAD_USAGE
    _raise_descriptor_limit()
    try:
        return _test_itself(options) if options.target is None else _test(options, options.target)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except OSError as exc:  # of a result's file: what the endpoint does is no exception
        print(f"ops.loadtest: {exc.filename}: {exc.strerror}", file=sys.stderr)
        return _BAD_USAGE


def _test(options: Options, target: Target) -> int:
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    with contextlib.ExitStack() as stack:
        log = None
        if options.jsonl_path is not None:
            log = RecordLog(stack.enter_context(options.jsonl_path.open("w", encoding="utf-8")))
        findings = uvloop.run(measure(options, target, log))
    _tell(findings, Report(findings.summary, findings.capacity, target, options, began, tester_environment()))
    return _status(findings, options)


def _tell(findings: Findings, report: Report) -> None:
    console = open_console()
    print_summary(console, findings.summary)
    if findings.capacity is not None:
        print_capacity(console, findings.capacity)
    if (path := report.options.json_path) is not None:
        _write_json(path, report.as_json())
    if (path := report.options.html_path) is not None:
        path.write_text(render(report), encoding="utf-8")


def _status(findings: Findings, options: Options) -> int:
    if findings.interrupted:
        return _INTERRUPTED
    nothing = not findings.summary.outcomes[Outcome.COMPLETED] and not findings.summary.total_output_tokens
    broke = options.fail_on_slo and not findings.summary.kept
    return _BROKE if nothing or broke else _MEASURED


def _test_itself(options: Options) -> int:
    findings = uvloop.run(self_test(quiet=options.quiet))
    print_findings(open_console(), findings)
    if options.json_path is not None:
        _write_json(options.json_path, {"environment": tester_environment(), "self_test": findings_as_json(findings)})
    return _MEASURED


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _raise_descriptor_limit() -> None:
    """Allow as many connections as the system lets a process ask for."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
