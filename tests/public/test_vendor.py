"""The libraries that the page brings along are the published ones, unchanged, each with its licence."""

from __future__ import annotations

import hashlib
import re

import pytest

from tests.sluice_process import ROOT

VENDOR = ROOT / "public" / "vendor"
LIBRARIES = sorted(path.name for path in VENDOR.glob("*.js"))


def test_each_is_there() -> None:
    assert LIBRARIES == ["marked.js", "purify.js"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_each_is_the_file_that_the_list_names(name: str) -> None:
    """Who edits one, or updates it without saying so, is told here."""
    (line,) = re.findall(rf"^{name} .*$", (VENDOR / "README.txt").read_text(), re.MULTILINE)
    assert line.split()[-1] == hashlib.sha256((VENDOR / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", LIBRARIES)
def test_each_brings_its_licence(name: str) -> None:
    """MIT and Apache-2.0 both ask for it."""
    licence = (VENDOR / name.replace(".js", ".LICENSE.txt")).read_text()
    assert {"marked.js": "MarkedJS", "purify.js": "Apache License"}[name] in licence
