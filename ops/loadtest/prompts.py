"""What is asked: a file's prompts, or a few of our own."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["BUILT_IN", "BadPrompts", "Prompt", "read_prompts"]

_MAX_FILE_BYTES = 64 << 20


class BadPrompts(ValueError):
    """The prompt file is not usable; the text says where, and what would be."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, or a whole conversation (OpenAI only)."""

    text: str = field(repr=False)
    messages: tuple[dict[str, Any], ...] | None = field(default=None, repr=False)

    def as_messages(self) -> list[dict[str, Any]]:
        return list(self.messages) if self.messages else [{"role": "user", "content": self.text}]


# Several, since an endpoint that caches the beginnings of prompts answers the same question ever faster.
BUILT_IN = tuple(
    Prompt(text)
    for text in (
        "Explain how a river becomes a delta, in about 150 words.",
        "Write a short letter from a lighthouse keeper to the harbour master.",
        "Describe how bread rises, step by step.",
        "What happens between pressing a key and seeing the letter on the screen?",
        "Compare sailing boats and steam ships as a merchant of 1870 would.",
        "Give five ideas for a rainy afternoon with two children.",
        "Explain compound interest to somebody who distrusts banks.",
        "Tell the story of a clock that ran a minute slow for a hundred years.",
    )
)


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """One prompt a line; in a ``.jsonl`` file each line is an object with ``prompt`` (vLLM's custom data set) or
    ``messages``. Blank lines count for nothing. Raises BadPrompts."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise BadPrompts(f"{path} holds more than 64 MiB")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        reason = "it is no UTF-8" if isinstance(exc, UnicodeDecodeError) else exc.strerror
        raise BadPrompts(f"{path} cannot be read: {reason}") from exc
    read = _read_object if path.suffix == ".jsonl" else _read_line
    prompts = tuple(read(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
    if not prompts:
        raise BadPrompts(f"{path} holds no prompt; one a line is expected")
    return prompts


def _read_line(line: str, place: str) -> Prompt:
    if "\0" in line:
        raise BadPrompts(f"{place}: a prompt is text, without NUL")
    return Prompt(line.strip())


def _read_object(line: str, place: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if isinstance(value, dict):
        match value:
            case {"prompt": str(text)} if text.strip():
                return Prompt(text)
            case {"messages": list(messages)} if messages and all(isinstance(message, dict) for message in messages):
                return Prompt("", tuple(messages))
    raise BadPrompts(f'{place}: expected an object such as {{"prompt": "…"}} or {{"messages": […]}}')
