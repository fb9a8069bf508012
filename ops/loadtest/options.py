"""The command line as one frozen value. Every mistake is one line that names it and says what would be right."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from ops.loadtest.objectives import BadObjective, Objectives, RunObjective, read_objectives
from ops.loadtest.prompts import BUILT_IN, BadPrompts, Prompt, read_prompts
from ops.loadtest.quantities import BadQuantity, read_duration_s, read_share
from ops.loadtest.run import Load
from ops.loadtest.target import BadTarget, Kind, Target, read_target

__all__ = ["BadOptions", "Options", "read_options"]

_DEFAULT_STREAMS = 10
_CAPACITY_FIRST_STREAMS = 8
_MASK = "***"

_EPILOG = """\
durations: 500ms, 2s, 1.5m, 1h; a bare number is seconds.     shares: 5% or 0.05.
objectives (--slo): ttft, tpot, itl, e2el of each request, for goodput: ttft=500ms,itl=100ms;
  with _mean, _p50, _p90, _p95, _p99, _p99.9 or _max of the whole run: itl_p99=100ms; error_rate=1%; good=95%.
the API key: --api-key-file, or the environment's LOADTEST_API_KEY; it appears in no output.
exit status: 0 measured; 1 nothing completed, or with --fail-on-slo an objective of the run broke; 2 bad usage;
  130 ended by Ctrl-C (what was measured until then is written all the same).
"""


class BadOptions(ValueError):
    """The command line is not usable; the text is one line for whoever wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one invocation is to do. ``target`` is None for the self-test, which brings its own endpoint."""

    target: Target | None
    load: Load
    objectives: Objectives
    prompts: tuple[Prompt, ...] = field(repr=False)
    timeout_s: float
    keep_alive: bool
    verify: bool
    find_capacity: bool
    max_streams: int
    fail_on_slo: bool
    json_path: Path | None
    jsonl_path: Path | None
    html_path: Path | None
    quiet: bool
    command: str  # as it was given, the key masked


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadOptions(message)


def read_options(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Raises BadOptions; ``--help`` prints and exits, as argparse does."""
    parser = _build_parser()
    given = parser.parse_args(arguments)
    if given.self_test:
        also = {name for name, value in vars(given).items() if value != parser.get_default(name)}
        _require(also <= {"self_test", "json", "quiet"}, "--self-test takes nothing but --json and --quiet")
    _check_combinations(given)
    target = None if given.self_test else _read_target(given, environment)
    if target is not None and target.kind is Kind.OPENAI:
        _require(not given.reconnect_rate, "--reconnect-rate needs a Sluice: OpenAI's format has no ids to go on from")
        _require(given.model is not None, "an OpenAI-compatible endpoint needs --model")
    try:
        prompts = read_prompts(given.prompts) if given.prompts else BUILT_IN
    except BadPrompts as exc:
        raise BadOptions(f"--prompts: {exc}") from exc
    if target is not None and target.kind is Kind.SLUICE:
        _require(given.model is None and given.max_tokens is None, "a Sluice chooses model and --max-tokens itself")
        _require(not any(prompt.messages for prompt in prompts), "--prompts: a Sluice takes prompts, no messages")
    objectives = given.slo
    if given.find_capacity and not any(objective.name == "error_rate" for objective in objectives.run):
        # An endpoint that refuses everybody is quick at it.
        bound = RunObjective("error_rate=1%", "error_rate", 0.01)
        objectives = dataclasses.replace(objectives, run=(*objectives.run, bound))
    return Options(
        target=target,
        load=_read_load(given),
        objectives=objectives,
        prompts=prompts,
        timeout_s=given.timeout,
        keep_alive=not given.new_connections,
        verify=not given.insecure,
        find_capacity=given.find_capacity,
        max_streams=given.max_streams or 1000,
        fail_on_slo=given.fail_on_slo,
        json_path=given.json,
        jsonl_path=given.jsonl,
        html_path=given.html,
        quiet=given.quiet,
        command=_masked(arguments),
    )


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="python -m ops.loadtest",
        usage="python -m ops.loadtest URL [option …]",
        description="Puts load on a Sluice or an OpenAI-compatible endpoint and measures its streams.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --api would escape the masking of the command
    )
    add = parser.add_argument
    add("url", nargs="?", metavar="URL", help="http://HOST:PORT for a Sluice; …/v1 or …/chat/completions for OpenAI's")
    add("--target", choices=[*Kind], help="where the URL does not say what stands there")

    add = parser.add_argument_group("load").add_argument
    add("--streams", type=_whole(1, 100_000), metavar="N", help="closed loop: N streams, each asks again (default: 10)")
    add("--rate", type=_rate, metavar="R", help="open loop: R requests a second, Poisson, whatever the answers do")
    add("--max-streams", type=_whole(1, 100_000), metavar="N", help="open at once with --rate; end of --find-capacity")
    add("--think", type=_duration, default=0.0, metavar="T", help="closed loop: pause between answer and question")
    add("--ramp", type=_duration, metavar="T", help="streams begin, or the rate rises, over so long (default: 0)")
    add("--warmup", type=_duration, metavar="T", help="then so long without measuring (default: 0)")
    add("--duration", type=_positive_duration, default=30.0, metavar="T", help="then measure so long (default: 30s)")
    add("--requests", type=_whole(1, 10_000_000), metavar="N", help="measure at most so many requests")
    add("--grace", type=_duration, metavar="T", help="then running answers may end before they are cut (default: 10s)")
    add("--timeout", type=_positive_duration, default=120.0, metavar="T", help="for one request (default: 120s)")
    add("--seed", type=_whole(0, 1 << 63), default=1, metavar="N", help="of schedule and lots (default: 1)")

    add = parser.add_argument_group("requests").add_argument
    add("--prompts", type=Path, metavar="FILE", help='a prompt a line; .jsonl: {"prompt": …} or {"messages": …} a line')
    add("--model", metavar="NAME", help="for an OpenAI-compatible endpoint")
    add("--max-tokens", type=_whole(1, 10_000_000), metavar="N", help="likewise")
    add("--abort-rate", type=_share, default=0.0, metavar="P", help="share of requests that leave on purpose")
    add("--reconnect-rate", type=_share, default=0.0, metavar="P", help="share that are cut and come back (Sluice)")
    add("--leave-within", type=_whole(1, 1_000_000), default=32, metavar="N", help="tokens: both happen within (32)")
    add("--api-key", default="", metavar="KEY", help="sent as Authorization: Bearer; others see it in `ps`")
    add("--api-key-file", type=Path, metavar="FILE", help="better")
    add("--insecure", action="store_true", help="accept any certificate")
    add("--new-connections", action="store_true", help="a connection for each request, none kept alive")

    add = parser.add_argument_group("objectives").add_argument
    add(
        "--slo",
        type=_objectives,
        default=Objectives(),
        metavar="LIST",
        help="such as ttft=500ms,itl=100ms,itl_p99=80ms",
    )
    add("--fail-on-slo", action="store_true", help="exit status 1 if an objective of the run broke")
    add("--find-capacity", action="store_true", help="raise the streams until an objective of the run breaks")
    add("--step", type=_positive_duration, metavar="T", help="measured at each number of streams (default: 10s)")

    add = parser.add_argument_group("results").add_argument
    add("--json", type=Path, metavar="FILE", help="all figures")
    add("--jsonl", type=Path, metavar="FILE", help="a line for each request, as it ends")
    add("--html", type=Path, metavar="FILE", help="a report with plots, in one file")
    add("--quiet", action="store_true", help="no live progress")
    add("--self-test", action="store_true", help="measure the tester itself against a cheap endpoint of its own")
    return parser


def _check_combinations(given: argparse.Namespace) -> None:
    _require(given.url or given.self_test, "what to test? Give a URL (or --self-test)")
    _require(given.rate is None or given.streams is None, "--streams closes the loop and --rate opens it: give one")
    _require(
        given.rate is None or not given.think, "--think is for the closed loop; with --rate the schedule says when"
    )
    _require(given.abort_rate + given.reconnect_rate <= 1, "--abort-rate and --reconnect-rate are more than 1 together")
    _require(not given.fail_on_slo or given.slo.run, "--fail-on-slo needs an objective of the run: --slo itl_p99=100ms")
    if given.find_capacity:
        _require(given.slo.run, "--find-capacity needs an objective of the run, such as --slo itl_p99=100ms")
        _require(given.rate is None, "--find-capacity raises the streams of the closed loop: leave --rate away")
        _require(given.requests is None, "--find-capacity measures each step for --step: leave --requests away")
    else:
        _require(given.step is None, "--step is for --find-capacity")
        _require(given.max_streams is None or given.rate, "--max-streams is for --rate and --find-capacity")
    for name in ("json", "jsonl", "html"):
        path: Path | None = getattr(given, name)
        _require(path is None or path.absolute().parent.is_dir(), f"--{name}: there is no folder for {path}")


def _read_load(given: argparse.Namespace) -> Load:
    capacity = given.find_capacity
    return Load(
        streams=given.streams or (_CAPACITY_FIRST_STREAMS if capacity else _DEFAULT_STREAMS),
        rate=given.rate,
        max_streams=given.max_streams or 1000,
        think_s=given.think,
        ramp_s=(1.0 if capacity else 0.0) if given.ramp is None else given.ramp,
        warmup_s=(1.0 if capacity else 0.0) if given.warmup is None else given.warmup,
        duration_s=(given.step or 10.0) if capacity else given.duration,
        grace_s=(2.0 if capacity else 10.0) if given.grace is None else given.grace,
        requests=given.requests,
        abort_rate=given.abort_rate,
        reconnect_rate=given.reconnect_rate,
        leave_within=given.leave_within,
        seed=given.seed,
    )


def _read_target(given: argparse.Namespace, environment: Mapping[str, str]) -> Target:
    try:
        target = read_target(given.url, given.target)
    except BadTarget as exc:
        raise BadOptions(str(exc)) from exc
    key = given.api_key or environment.get("LOADTEST_API_KEY", "")
    if given.api_key_file is not None:
        _require(not given.api_key, "--api-key and --api-key-file: give one")
        try:
            key = given.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise BadOptions(f"--api-key-file: {given.api_key_file} cannot be read") from exc
    _require(key.isascii() and key.isprintable() and " " not in key, "the API key holds what no header may: one word")
    return dataclasses.replace(target, model=given.model or "", max_tokens=given.max_tokens, api_key=key)


def _masked(arguments: Sequence[str]) -> str:
    shown, masking = [], False
    for argument in arguments:
        if masking:
            argument = _MASK
        elif argument.startswith("--api-key="):
            argument = f"--api-key={_MASK}"
        masking = argument == "--api-key"
        shown.append(argument)
    return shlex.join(["python", "-m", "ops.loadtest", *shown])


def _require(condition: object, message: str) -> None:
    if not condition:
        raise BadOptions(message)


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return value

    return read


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0.001 <= rate <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; one is requests a second, from 0.001 to 100000")
    return rate


def _duration(text: str) -> float:
    try:
        seconds = read_duration_s(text)
    except BadQuantity as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    if seconds > 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is more than a day")
    return seconds


def _positive_duration(text: str) -> float:
    seconds = _duration(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is no time to measure in; give more than 0")
    return seconds


def _share(text: str) -> float:
    try:
        return read_share(text)
    except BadQuantity as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _objectives(text: str) -> Objectives:
    try:
        return read_objectives(text)
    except BadObjective as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
