"""The command line: contract, sections 1 and 2; run.py as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from run import main as run_main
from server.settings import describe, options, read_settings
from tests.sluice_process import ROOT

SECRET: Final = "sk-canary-0123456789"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python run.py`` with nothing in its environment but what is given; it must end by itself."""
    inherited = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


Main = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """The same without a process of its own, where all is over before anything is served."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        for name in [name for name in os.environ if name.startswith(("SLUICE_", "LLM_", "CREDENTIALS_"))]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            status = run_main(arguments)
        except SystemExit as exc:
            status = int(exc.code or 0)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return call


def test_help_lists_every_argument_and_every_setting() -> None:
    """Section 1, last row; section 2."""
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for argument in ("--config FILE", "--host H", "--port P", "--demo", "--check"):
        assert argument in done.stdout
    for option in options():
        assert option.variable in done.stdout
        assert option.reader.takes in done.stdout


# ---- --check


def test_check_prints_every_setting_and_ends_with_0(main: Main, tmp_path: Path) -> None:
    """Section 1: validates the configuration, prints it, and exits 0."""
    config = tmp_path / "sluice.toml"
    config.write_text('heartbeat = 7\nsystem_prompt = "one\\ntwo"\n')
    done = main("--check", "--config", str(config), "--port", "0", SLUICE_RATE_LIMIT="5/1")
    expected = read_settings({"SLUICE_RATE_LIMIT": "5/1"}, config=str(config), overrides={"port": "0"})
    assert (done.returncode, done.stderr) == (0, "")
    *settings, fast_path = done.stdout.splitlines()
    assert settings == describe(expected)
    assert fast_path == "# fast path in force: yes"
    assert {"SLUICE_HEARTBEAT=7", "SLUICE_PORT=0", "SLUICE_RATE_LIMIT=5/1"} < set(done.stdout.splitlines())


def test_check_tells_whether_the_fast_path_is_in_force() -> None:
    """Section 2: SLUICE_FAST_PATH=off leaves only aiohttp's public calls."""
    assert run("--check", SLUICE_FAST_PATH="off").stdout.endswith("\n# fast path in force: no\n")


def test_check_masks_secrets() -> None:
    """Section 1; row S10."""
    done = run("--check", LLM_API_KEY=SECRET)
    assert done.returncode == 0
    assert "LLM_API_KEY=***\n" in done.stdout
    assert SECRET not in done.stdout + done.stderr


def test_check_can_be_printed_in_every_locale() -> None:
    """What the locale has no letter for is escaped, not the end of the check."""
    done = run("--check", SLUICE_SYSTEM_PROMPT="naïve 😀", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "SLUICE_SYSTEM_PROMPT=na\\xefve \\U0001f600\n" in done.stdout


@pytest.mark.parametrize("arguments", [["--check"], []], ids=["check", "serve"])
def test_mistakes_are_a_line_each_on_stderr_and_nothing_else(arguments: list[str]) -> None:
    """Sections 1 and 2, row L7: exit 2, one line per mistake, whether it was to check or to serve."""
    done = run(*arguments, SLUICE_PORT="x", SLUICE_HEARTBEAT="0", SLUICE_PROT="1", LLM_API_KEY=f"{SECRET} x")
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == [
        "LLM_API_KEY",
        "SLUICE_HEARTBEAT",
        "SLUICE_PORT",
        "SLUICE_PROT",
    ]
    assert SECRET not in done.stderr


def test_an_unreadable_key_file_is_a_mistake(main: Main) -> None:
    """Row L7."""
    done = main("--check", LLM_API_KEY_FILE="/nowhere/key")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("LLM_API_KEY_FILE: /nowhere/key cannot be read")


# ---- Arguments


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "x"], "--port: got 'x', takes an integer from 0 to 65535"),
        (["--port", "65536"], "--port: got '65536', takes an integer from 0 to 65535"),
        (["--port", ""], "--port: got '', takes an integer from 0 to 65535"),
        (["--host", "a b"], "--host: got 'a b', takes an address or host name"),
        (["--config", "/nowhere"], "/nowhere: the configuration file cannot be read"),
        (["--port"], "--port"),
        (["--nonsense"], "--nonsense"),
        (["--por", "4001"], "--por"),  # an abbreviation works until the next option begins like it
        (["--workers", "2"], "--workers"),  # of a later version
        (["serve"], "serve"),
        (["--check=1"], "--check"),
        (["two\nlines"], "two"),
        (["\x1b[31mred"], "red"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_one_line_and_2(main: Main, arguments: list[str], told: str) -> None:
    """Section 2, for the command line."""
    done = main(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("\n")
    assert done.stderr[:-1].isprintable()
    assert told in done.stderr


def test_the_command_line_wins_over_environment_and_file(main: Main, tmp_path: Path) -> None:
    config = tmp_path / "sluice.toml"
    config.write_text('port = 1\nhost = "file"\nllm_model = "file"\n')
    done = main("--check", "--port", "3", SLUICE_CONFIG=str(config), SLUICE_PORT="2", SLUICE_HOST="environment")
    lines = done.stdout.splitlines()
    assert {"SLUICE_PORT=3", "SLUICE_HOST=environment", "LLM_MODEL=file"} < set(lines)


@pytest.mark.parametrize("url", ["http://host/v1", "no URL at all"])
def test_demo_wins_over_the_endpoint(main: Main, url: str) -> None:
    """Section 1: ``--demo`` asks for the demo model, whatever LLM_BASE_URL says."""
    done = main("--check", "--demo", LLM_BASE_URL=url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "LLM_BASE_URL=\n" in done.stdout
