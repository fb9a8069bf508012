"""The architecture as data: who may import whom, who may touch what. Walked through the source, nothing is executed.

The floors are those of the docstring of server/__init__.py; a module that does not fit them needs a place, or a floor.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent

# Top to bottom. A module belongs to the longest of these names that begins its own; it imports its own floor and those
# below. Names on one line share a floor and do not know each other.
FLOORS: Final = (
    ("run",),
    ("server.main",),
    ("server.app", "server.demo"),
    ("server.api",),
    ("server.relay", "server.upstream"),  # neither knows the other: an answer's source is a protocol
    ("server.wire",),
    ("server.connections", "server.sockets", "server.systemd"),
    ("server.settings", "server.errors", "server.logs"),
)
GROUND: Final = FLOORS[-1]

# Narrower than the floors: these, and nobody else, may import the module (its own package may always).
IMPORTED_ONLY_BY: Final = {
    "run": (),
    "server.main": ("run",),
    "server.app": ("server.main",),
    "server.demo": ("server.main",),
    "server.upstream": ("server.app",),
    "server.connections": ("server.main", "server.app", "server.api.keys"),
    "server.sockets": ("server.main",),
    "server.systemd": ("server.main",),
}

# What these may import of server at all, beside themselves.
IMPORTS_ONLY: Final = {
    "server.demo": (),
    "server.upstream": ("server.wire", *GROUND),
    "server.relay": ("server.wire", *GROUND),
    "server.wire": GROUND,
    "server.connections": GROUND,
    "server.sockets": GROUND,
    "server.systemd": GROUND,
    "server.settings": GROUND,
    "server.errors": GROUND,
    "server.logs": GROUND,
}

# Modules of others that a floor does without, so that it can be tested without them.
DOES_WITHOUT: Final = {
    "server.relay": ("aiohttp", "aiohttp_cors", "socket"),
    "server.wire": ("aiohttp", "aiohttp_cors", "asyncio", "socket", "logging", "time"),
    "server.settings": ("aiohttp", "asyncio", "socket"),
    "server.errors": ("aiohttp", "asyncio", "socket"),
    "server.logs": ("aiohttp", "asyncio", "socket"),
    "server.demo": ("msgspec",),  # as foreign as a real endpoint: it shares no code with the relay
}

# Names that only these modules may use, as ``from module import name`` or ``module.name``.
USED_ONLY_BY: Final = {
    "aiohttp.ClientSession": ("server.upstream",),
    "aiohttp.TCPConnector": ("server.upstream",),
    "os.environ": ("run",),
    "os.getenv": ("run",),
    "os.environb": ("run",),
    "sys.argv": ("run",),
    "aiohttp.web.run_app": (),
}

NO_HOME: Final = frozenset({"util", "utils", "helper", "helpers", "common", "misc", "tools"})


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, and what its text says it uses."""

    name: str
    path: Path
    tree: ast.Module = field(repr=False)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    def imports(self) -> Iterator[str]:
        """Everything imported, anywhere in it, as a dotted name: of ``from a import b`` it is ``a.b``."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: a relative import hides its floor"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def uses(self) -> Iterator[str]:
        """What is imported, and each ``a.b.c`` in the text with the name that ``a`` was imported under."""
        yield from self.imports()
        origins = dict(self._origins())
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and (dotted := _dotted(node)):
                first, _, rest = dotted.partition(".")
                yield f"{origins.get(first, first)}.{rest}"

    def _origins(self) -> Iterator[tuple[str, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
            elif isinstance(node, ast.ImportFrom):
                yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _dotted(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute) if outer := _dotted(value):
            return f"{outer}.{attribute}"
        case _:
            return ""


def _read_modules() -> Iterator[Module]:
    for path in [ROOT / "run.py", *sorted((ROOT / "server").rglob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path)))


MODULES: Final = {module.name: module for module in _read_modules()}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def imported_modules(module: Module) -> set[str]:
    """Those of our own modules that ``module`` imports."""
    found = set()
    for name in module.imports():
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name and name != "server":
            found.add(name)
    return found - {module.name}


def place_of(name: str) -> tuple[int, str]:
    """The floor's number, 0 at the top, and the part of it that the module belongs to."""
    for number, floor in enumerate(FLOORS):
        for part in floor:
            if within(name, part):
                return number, part
    raise AssertionError(f"{name} stands on no floor")


each_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


@each_module
def test_imports_go_down_only(module: Module) -> None:
    """No floor knows the one above it, nor its neighbour (style, point 1)."""
    if module.name == "server":
        assert not imported_modules(module)
        return
    number, part = place_of(module.name)
    wrong = {
        name
        for name in imported_modules(module)
        if place_of(name)[1] != part and place_of(name)[0] <= number and not {part, place_of(name)[1]} <= set(GROUND)
    }
    assert not wrong


def test_no_import_goes_round() -> None:
    """Not even within a floor: what two modules need of each other belongs into a third."""
    graph = {name: imported_modules(module) for name, module in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(f"an import cycle: {' -> '.join(exc.args[1])}")


@pytest.mark.parametrize(("package", "importers"), IMPORTED_ONLY_BY.items(), ids=IMPORTED_ONLY_BY)
def test_a_part_is_known_to_few(package: str, importers: tuple[str, ...]) -> None:
    """What opens sockets, sessions and the demo is put together in one place; nothing else reaches for it."""
    wrong = {
        module.name
        for module in MODULES.values()
        if not within(module.name, package) and not any(within(module.name, importer) for importer in importers)
        if any(within(name, package) for name in imported_modules(module))
    }
    assert not wrong


@pytest.mark.parametrize(("package", "allowed"), IMPORTS_ONLY.items(), ids=IMPORTS_ONLY)
def test_a_part_knows_few(package: str, allowed: tuple[str, ...]) -> None:
    """The lower the floor, the less it needs to be tested (style, point 10)."""
    for module in MODULES.values():
        if within(module.name, package):
            wrong = {
                name for name in imported_modules(module) if not any(within(name, part) for part in (package, *allowed))
            }
            assert not wrong, module.name


@pytest.mark.parametrize(("package", "foreign"), DOES_WITHOUT.items(), ids=DOES_WITHOUT)
def test_a_part_does_without(package: str, foreign: tuple[str, ...]) -> None:
    """Wire formats do no I/O; answers are tested without a web server (style, points 1 and 2)."""
    for module in MODULES.values():
        if within(module.name, package):
            wrong = {name for name in module.imports() for other in foreign if within(name, other)}
            assert not wrong, module.name


@pytest.mark.parametrize(("used", "users"), USED_ONLY_BY.items(), ids=USED_ONLY_BY)
def test_a_name_is_used_by_few(used: str, users: tuple[str, ...]) -> None:
    """Settings are read once, in run.py; the upstream side is the only one with a client session (style, point 12)."""
    wrong = {
        module.name
        for module in MODULES.values()
        if not any(within(module.name, user) for user in users)
        if any(within(name, used) for name in module.uses())
    }
    assert not wrong


@each_module
def test_nothing_is_imported_whole(module: Module) -> None:
    """``import *`` would hide from these tests, and from a reader, what is used."""
    assert not [name for name in module.imports() if name.endswith(".*")]


@each_module
def test_a_module_is_named_for_what_it_holds(module: Module) -> None:
    """A function without a home tells that a module is missing (style, point 11)."""
    assert not NO_HOME & set(module.name.split("."))


@each_module
def test_a_module_says_what_it_is(module: Module) -> None:
    """Its docstring begins with a sentence."""
    text = ast.get_docstring(module.tree)
    assert text
    assert text.split("\n\n")[0].rstrip().endswith(".")


@pytest.mark.parametrize(
    "module",
    [module for module in MODULES.values() if not module.is_package and module.name != "run"],
    ids=lambda module: module.name,
)
def test_a_module_shows_what_it_says_it_shows(module: Module) -> None:
    """``__all__`` is there, and each of its names exists."""
    shown = getattr(importlib.import_module(module.name), "__all__", None)
    assert shown, "no __all__"
    assert len(set(shown)) == len(shown)
    for name in shown:
        assert not name.startswith("_")
        assert hasattr(importlib.import_module(module.name), name), name


@each_module
def test_what_is_imported_from_a_module_is_shown_by_it(module: Module) -> None:
    """Nobody reaches for a private name of a neighbour, or for one that came into it by an import."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES and not MODULES[node.module].is_package:
            shown = set(importlib.import_module(node.module).__all__)
            assert {alias.name for alias in node.names} <= shown, node.module
