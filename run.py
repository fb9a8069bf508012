#!/usr/bin/env python3
"""The command line: arguments, environment and file become Settings; server.main does the rest."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from server.main import run, takes_fast_path
from server.settings import Mistakes, describe, options, read_settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line a mistake, as for every other setting."""
        message = message if message.isprintable() else repr(message)
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what there is\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where it cannot listen, 2 where the configuration is wrong."""
    parser = _Parser(
        prog="run.py",
        description="Sluice streams an LLM's answer into a browser, from any OpenAI-compatible endpoint.",
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file with settings (also SLUICE_CONFIG)")
    parser.add_argument("--host", metavar="H", help="the public listener's address (SLUICE_HOST)")
    parser.add_argument("--port", metavar="P", help="the public listener's port (SLUICE_PORT)")
    parser.add_argument("--demo", action="store_true", help="use the embedded demo model, whatever LLM_BASE_URL says")
    parser.add_argument("--check", action="store_true", help="check the configuration, print it, and exit")
    given = parser.parse_args(arguments)

    overrides = {name: value for name in ("host", "port") if (value := getattr(given, name)) is not None}
    if given.demo:
        overrides["llm_base_url"] = ""
    try:
        settings = read_settings(os.environ, config=given.config, overrides=overrides)
    except Mistakes as mistakes:
        sys.stderr.writelines(f"{line}\n" for line in mistakes.lines)
        return 2
    if given.check:
        code = sys.stdout.encoding
        in_force = "yes" if asyncio.run(takes_fast_path(settings)) else "no"
        # A prompt may hold letters that the locale lacks; stderr escapes by itself.
        for line in [*describe(settings), f"# fast path in force: {in_force}"]:
            sys.stdout.write(f"{line}\n".encode(code, "backslashreplace").decode(code))
        return 0
    return run(settings, os.environ)


def _settings_help() -> str:
    title = "settings (environment; in the TOML file in lower case, without SLUICE_):"
    lines = [f"  {option.variable:<32} {option.meaning}; takes {option.reader.takes}" for option in options()]
    return "\n".join([title, *lines])


if __name__ == "__main__":
    sys.exit(main())
