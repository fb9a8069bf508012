"""Answers to questions about Sluice, out of its own Markdown documents; pure, and quick enough for the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from server.demo.ranking import Query, Ranking, terms
from server.demo.sections import Section, read_blocks, read_sections

__all__ = ["CLOSING", "DEMO_SENTENCE", "Library"]

DEMO_SENTENCE = (
    "This is Sluice's embedded demo model, not an LLM: it looks answers up in the project's own documentation."
)
CLOSING = """\
To connect a real model, set `LLM_BASE_URL` (any OpenAI-compatible endpoint), `LLM_API_KEY` and `LLM_MODEL`, then \
start Sluice again:

```sh
LLM_BASE_URL=https://api.openai.com/v1 LLM_API_KEY=… LLM_MODEL=gpt-4o-mini make run
```"""

_HEADING_WEIGHT = 4.0  # a heading says what its section is about; one of its words is worth this many in the text
_PARENT_WEIGHT = 1.5  # the headings above, and the document's name
_LATER_DOCUMENT = 0.8  # what a changelog says of a matter is less than what the first document says
_MIN_FIT = 0.4  # of what the question's words tell, the part that a section must hold to be an answer
_SECOND_FIT = 0.75  # of the best section's score, from which on the next one is told too
_MAX_QUESTION_CHARS = 2000  # looked at: the time is words times sections, and the rest seldom tells more
_MAX_CHARS = (1300, 600)  # of the best section and the next: with the rest well under the default of 800 tokens
_WHOLE_LIST = 6  # rows or items; from a longer table or list only those are told that the question asks for
_MAX_TOPICS = 16


@dataclass(frozen=True, slots=True)
class _Entry:
    section: Section
    words: Mapping[str, float]
    heading_words: frozenset[str]


class Library:
    """Markdown documents by file name, the most important first, and the answers that stand in them."""

    def __init__(self, documents: Mapping[str, str]) -> None:
        self._entries = [_entry(each) for name, text in documents.items() for each in read_sections(name, text)]
        self._ranking = Ranking([entry.words for entry in self._entries])
        self._topics = self._list_topics()

    @property
    def topics(self) -> tuple[str, ...]:
        """What can be asked about: the first document's sections, and the other documents by their names."""
        return self._topics

    def answer(self, question: str) -> str:
        """Return Markdown: that this is the demo, what fits the question best, and how to connect a real model.

        A question that nothing fits, in whatever script, and a greeting get an account of what can be asked.
        """
        query = self._ranking.query(question[:_MAX_QUESTION_CHARS])
        told = [_excerpt(entry, query, room) for entry, room in zip(self._pick(query), _MAX_CHARS, strict=False)]
        if not told:
            told = [self._account(greeting=not query.rarity)]
        return "\n\n".join([DEMO_SENTENCE, *told, CLOSING])

    def _pick(self, query: Query) -> list[_Entry]:
        """The sections that answer the question, best first: none, one or two."""
        scored = [
            (score * _likeness(entry.heading_words, query.rarity.keys()) * self._importance(entry), entry)
            for score, entry in zip(self._ranking.scores(query), self._entries, strict=True)
            if score and self._fits(entry, query)
        ]
        best = sorted(scored, key=lambda each: -each[0])[:2]
        return [entry for score, entry in best if score >= _SECOND_FIT * best[0][0]]

    def _fits(self, entry: _Entry, query: Query) -> bool:
        """Whether the section holds enough of what is asked, or the question names its heading, in whatever words.

        The words of the first document's title are no name of a section: nearly every question has them.
        """
        held = query.weight(query.found_in(entry.words))
        name = entry.heading_words - self._entries[0].heading_words
        return held >= _MIN_FIT * query.total_weight or (bool(name) and name <= query.rarity.keys())

    def _importance(self, entry: _Entry) -> float:
        return 1.0 if entry.section.document == self._entries[0].section.document else _LATER_DOCUMENT

    def _account(self, *, greeting: bool) -> str:
        if not self._topics:
            return "It found no documentation on this machine, so it has nothing to tell."
        opening = "Hello! Ask it" if greeting else "It found nothing there that fits your question. Ask it"
        return f"{opening} about one of these, in English:\n\n" + "\n".join(f"- {topic}" for topic in self._topics)

    def _list_topics(self) -> tuple[str, ...]:
        topics: dict[str, None] = {}  # in order, each once
        for section in (entry.section for entry in self._entries):
            if section.document != self._entries[0].section.document:
                topics[section.document.removesuffix(".md").capitalize()] = None
            elif section.level > 1:
                topics[[*section.parents, section.heading][0]] = None
        if not topics:  # nothing but the text under one title
            topics.update((entry.section.heading, None) for entry in self._entries)
        return tuple(topics)[:_MAX_TOPICS]


def _likeness(heading_words: Set[str], asked: Set[str]) -> float:
    """1 for a question that has nothing of the heading, 2 for the very heading."""
    return 1 + len(heading_words & asked) / len(heading_words | asked)


def _entry(section: Section) -> _Entry:
    heading = terms(section.heading)
    words: dict[str, float] = dict.fromkeys(heading, 0.0)
    name = section.document.removesuffix(".md")
    for found, weight in (
        (terms(section.body), 1.0),
        (heading, _HEADING_WEIGHT),
        (terms(" ".join([name, *section.parents])), _PARENT_WEIGHT),
    ):
        for word in found:
            words[word] = words.get(word, 0.0) + weight
    return _Entry(section, words, frozenset(heading))


def _excerpt(entry: _Entry, query: Query, max_chars: int) -> str:
    """The section's heading, as much of its text as fits (what the question asks for first), and where it stands."""
    detail = query.without(entry.heading_words)  # the heading's words would find every row alike

    def weigh(text: str) -> float:
        return detail.weight(detail.found_in(terms(text)))

    blocks = [block.select(weigh, above=_WHOLE_LIST) for block in read_blocks(entry.section.body)]
    told: dict[int, str] = {}
    room = max_chars
    for at in sorted(range(len(blocks)), key=lambda at: -weigh(blocks[at].text)):
        if (shortened := blocks[at].shorten(room, weigh)) is not None:
            told[at] = shortened.text
            room -= len(shortened.text) + 2
    heading = " / ".join([*entry.section.parents, entry.section.heading])
    return "\n\n".join([f"### {heading}", *(told[at] for at in sorted(told)), f"*From {entry.section.document}*"])
