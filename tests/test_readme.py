"""The README tells a stranger the truth."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from server import errors
from server.settings import Option, describe, options, read_settings
from tests.sluice_process import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("option", options(), ids=lambda option: option.variable)
def test_each_setting_stands_in_the_table_with_its_default_and_meaning(option: Option) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `{option.variable}` |"))
    shown = describe(read_settings({}))[options().index(option)].partition("=")[2]
    if option.name != "system_prompt":  # told in words
        assert row == f"| `{option.variable}` | {f'`{shown}`' if shown else 'empty'} | {option.meaning} |"


def test_no_setting_stands_in_the_table_that_does_not_work() -> None:
    named = set(re.findall(r"`((?:SLUICE|LLM)_[A-Z_]+)", README))
    files = {f"{option.variable}_FILE" for option in options() if option.secret}
    assert named <= {option.variable for option in options()} | files | {"SLUICE_CONFIG"}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)# ]+)[) ]", README))))
def test_what_it_links_to_is_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", re.findall(r"^  ([a-z_]+(?:\.py|/)) ", README, re.MULTILINE))
def test_the_map_names_what_is_there(name: str) -> None:
    assert (ROOT / "server" / name).exists()


def test_every_error_code_is_documented() -> None:
    codes = {
        error.code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.RelayError) and error not in (errors.NotFound,)
    }
    assert codes <= set(re.findall(r"`([a-z_]+)`", README))


def test_every_folder_of_the_server_is_on_the_map() -> None:
    folders = {path.parent.name for path in Path(ROOT / "server").glob("*/__init__.py")}
    assert folders <= set(re.findall(r"^  ([a-z_]+)/ ", README, re.MULTILINE))


@pytest.mark.parametrize(
    ("path", "name"), sorted(set(re.findall(r'\]\((tests/[a-z_/]+\.py) "([a-z_0-9]+)"\)', README)))
)
def test_each_mark_in_the_table_of_clients_is_a_test(path: str, name: str) -> None:
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_the_clients_in_the_table_are_those_that_are_pinned() -> None:
    table = set(re.findall(r"^\| `([^`]+)` ([0-9.]+)(?:, [A-Za-z]+)? \|", README, re.MULTILINE))
    pins = json.loads((ROOT / "tests/clients/js/package.json").read_text(encoding="utf-8"))["devDependencies"]
    published = {_published(name, pin) for name, pin in pins.items() if name != "zod"}
    lock = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8")
    published |= set(re.findall(r"^(openai|httpx-sse)==([0-9.]+)", lock, re.MULTILINE))
    assert table == published


def _published(name: str, pin: str) -> tuple[str, str]:
    """A package's own name and version, also where it is pinned under another name."""
    package, _, version = pin.removeprefix("npm:").rpartition("@")
    return package or name, version
