"""Markdown documents to sections, and a section's text to blocks that can be shortened without breaking Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

__all__ = ["Block", "Section", "read_blocks", "read_sections"]

_FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})")
_HEADING = re.compile(r"[ ]{0,3}(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$")
_BULLET = re.compile(r"([-*+]|\d{1,9}[.)])[ \t]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# What makes no sense outside its own file: comments, HTML, images (badges), links to places beside the document.
# Code spans come first, so that what they quote stays as it is.
_NOISE = re.compile(
    r"(?P<code>(?P<ticks>`+).+?(?P=ticks)(?!`))"
    r"|<!--.*?-->|</?[a-zA-Z][\w-]*(?:\s[^<>]*)?/?>"
    r"|\[?!\[[^\]]*\]\([^)]*\)(?:\]\([^)]*\))?"
    r"|\[(?P<text>[^\[\]]*)\]\((?!https?:)[^)]*\)",
    re.DOTALL,
)
_NEARLY = 0.7

Weigh = Callable[[str], float]


@dataclass(frozen=True, slots=True)
class Section:
    """What stands between one heading and the next, of whatever level.

    ``parents`` are the headings above it, outermost first and without the document's title; ``level`` is 1 for the
    title and for text that no heading precedes, whose heading is the document's name.
    """

    document: str
    heading: str
    level: int
    parents: tuple[str, ...]
    body: str


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, list, table or piece of code, in parts that can be left out.

    ``lead`` must precede the parts (a sentence ending with a colon, a table's head, a fence), ``tail`` must follow.
    A ``selective`` block (list, table) makes sense with any of its parts, another one only with the first ones.
    """

    lead: str
    parts: tuple[str, ...]
    joint: str = "\n"
    tail: str = ""
    selective: bool = False

    @property
    def text(self) -> str:
        return self.lead + self.joint.join(self.parts) + self.tail

    def select(self, weigh: Weigh, *, above: int) -> Block:
        """Keep the parts that weigh the most, or nearly; for a selective block of more than ``above`` parts."""
        if not self.selective or len(self.parts) <= above:
            return self
        least = _NEARLY * max(map(weigh, self.parts))
        return replace(self, parts=tuple(part for part in self.parts if weigh(part) >= least))

    def shorten(self, max_chars: int, weigh: Weigh) -> Block | None:
        """Leave parts out until it fits: the lightest of a selective block, the last of another; None if none fits."""
        order = range(len(self.parts))
        ranked: Sequence[int] = sorted(order, key=lambda at: -weigh(self.parts[at])) if self.selective else order
        kept: list[int] = []
        room = max_chars - len(self.lead) - len(self.tail) + len(self.joint)  # one joint fewer than parts
        for at in ranked:
            room -= len(self.parts[at]) + len(self.joint)
            if room < 0:
                break
            kept.append(at)
        return replace(self, parts=tuple(self.parts[at] for at in sorted(kept))) if kept else None


def read_sections(document: str, text: str) -> list[Section]:
    """Cut a Markdown document at its headings (``#``, outside code); a section without text of its own is left out.

    Its heading still stands among the ``parents`` of what follows below it.
    """
    sections: list[Section] = []
    heading, level = document, 1
    open_headings: dict[int, str] = {}
    lines: list[str] = []

    def close() -> None:
        parents = tuple(title for depth, title in sorted(open_headings.items()) if 1 < depth < level)
        if body := "\n".join(lines).strip():
            sections.append(Section(document, heading, level, parents, body))
        lines.clear()

    for line, in_code in _lines(text):
        if in_code or not (match := _HEADING.match(line)):
            lines.append(line)
            continue
        close()
        level, heading = len(match[1]), match[2]
        open_headings = {depth: title for depth, title in open_headings.items() if depth < level} | {level: heading}
    close()
    return sections


def read_blocks(body: str) -> list[Block]:
    """Cut a section's text into blocks; a paragraph that ends with a colon is one block with what it announces."""
    blocks: list[Block] = []
    lead = ""
    for lines in _runs(body):
        block = _block(lines)
        if lead:
            block = replace(block, lead=lead + block.lead)
            lead = ""
        if block.text.endswith(":") and not block.selective:
            lead = block.text + "\n\n"
        else:
            blocks.append(block)
    if lead:
        blocks.append(Block("", (lead.rstrip(),)))
    return blocks


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """The lines, each with whether it belongs to fenced code; outside code their noise is gone."""
    fence = ""
    prose: list[str] = []

    def clean() -> Iterator[tuple[str, bool]]:
        joined = "\n".join(prose)
        yield from ((line, False) for line in _NOISE.sub(_without_noise, joined).split("\n") if prose)
        prose.clear()

    for line in text.splitlines():
        match = _FENCE.match(line)
        if fence:
            yield line, True
            if match and match[1].startswith(fence) and not line[match.end() :].strip():
                fence = ""
        elif match:
            yield from clean()
            fence = match[1]
            yield line, True
        else:
            prose.append(line)
    yield from clean()


def _without_noise(match: re.Match[str]) -> str:
    return match["code"] or match["text"] or ""


def _runs(body: str) -> Iterator[list[str]]:
    """The lines of each block: cut at blank lines, and where a list, a table or code touches what precedes it."""
    run: list[str] = []
    run_kind = ""
    for line, in_code in _lines(body):
        kind = _kind(line, in_code)
        inside_item = run_kind == "list" and line.startswith(" ")
        touches = kind != run_kind and not inside_item and (kind != "text" or run_kind == "code")
        blank = not in_code and not line.strip()
        if run and (touches or blank):
            yield run
            run = []
        if not blank:
            run_kind = run_kind if run else kind
            run.append(line)
    if run:
        yield run


def _kind(line: str, in_code: bool) -> str:
    if in_code:
        return "code"
    if line.startswith("|"):
        return "table"
    return "list" if _BULLET.match(line) else "text"


def _block(lines: list[str]) -> Block:
    if fence := _FENCE.match(lines[0]):
        inside = lines[1:-1] if lines[-1].strip() == fence[1] else lines[1:]  # a document may end inside its code
        return Block(lines[0] + "\n", tuple(inside), tail="\n" + fence[1])
    if lines[0].startswith("|") and len(lines) > 2:
        return Block("\n".join(lines[:2]) + "\n", tuple(lines[2:]), selective=True)
    if _BULLET.match(lines[0]):
        items: list[str] = []
        for line in lines:
            if _BULLET.match(line):
                items.append(line)
            else:
                items[-1] += "\n" + line
        return Block("", tuple(items), selective=True)
    return Block("", tuple(_SENTENCE_END.split("\n".join(lines))), joint=" ")
