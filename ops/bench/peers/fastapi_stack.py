"""FastAPI, sse-starlette and the openai client: the common stack, in a venv of its own that is built when first asked
for, since neither Sluice nor its tests want any of these packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ops.bench.procs import ROOT, Child

__all__ = ["build_venv", "open_fastapi"]

_HERE = Path(__file__).parent
_VENV = ROOT / ".venv-peers"
_PYTHON = _VENV / "bin" / "python"
_BUILD_TIMEOUT_S = 300


def build_venv(python: str = sys.executable, venv: Path = _VENV) -> str:
    """Build what is not there yet, or was built of other versions; returns why that failed, empty where it did not."""
    wanted = (_HERE / "fastapi-requirements.txt").read_text()
    built = venv / "built-of.txt"
    if built.exists() and built.read_text() == wanted:
        return ""
    print("FastAPI stack: building its venv", file=sys.stderr)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        for command in ([python, "-m", "venv", str(venv)], [*pip, "-r", str(_HERE / "fastapi-requirements.txt")]):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    except subprocess.CalledProcessError as exc:
        said = (exc.stderr or exc.stdout or "").strip().splitlines()
        return f"its venv could not be built: {said[-1] if said else exc}"
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"its venv could not be built: {exc}"
    built.write_text(wanted)
    return ""


@asynccontextmanager
async def open_fastapi(endpoint_port: int, core: int) -> AsyncIterator[Child]:
    environment = {"LLM_BASE_URL": f"http://127.0.0.1:{endpoint_port}/v1"}
    async with Child([str(_PYTHON), str(_HERE / "fastapi_relay.py")], core, environment) as child:
        yield child
