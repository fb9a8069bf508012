"""Which text fits a question best: Okapi BM25 over stemmed English words."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Query", "Ranking", "stem", "terms"]

_K1 = 1.2  # how soon a word's repetition stops to count; the usual value
_B = 0.6  # how much a long text is held back; below the usual 0.75, since sections are long where there is much to say
_SYNONYM_WEIGHT = 0.5
_MIN_STEM = 3
_WORD = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*")

# Words that say nothing about the subject, greetings among them: what is left of a question is what it is about.
_SAYS_NOTHING = """
    a about ah all also am an and any anything are as ask at be because been being but by bye can cannot could d
    did do does doing don done e explain for from g get give good got greetings had has have having hello help
    hey hi him his hm hola how i if in into is it its just kindly know let like ll look m make many may me mean
    might more most much must my need no not now of off ok okay on one only or other our out please question re
    really s say shall she should so some something t tell than thank thanks that the their them then there
    these they thing things this those to too up us use used uses using ve very want was way we well were what
    whats when where which while who whom whose why will with would write yes you your
"""
_STOP_WORDS = frozenset(_SAYS_NOTHING.split())

# A question's word and the documentation's word for the same thing.
_SYNONYMS = (
    "auth authentication authorization credentials login password token jwt keys",
    "benchmark fast latency measured overhead performance quick speed throughput",
    "browser frontend page website",
    "cancel abort stop disconnect",
    "changelog changed new news release version",
    "cluster distributed machines redis scale workers",
    "config configuration configure environment option parameter setting variable",
    "connect endpoint model openai provider upstream",
    "contribute contributing develop development patch",
    "crash error exception fail failure",
    "deploy deployment production systemd nginx",
    "fallback retry",
    "install launch run setup start begin",
    "limit quota throttle",
    "metrics monitor monitoring observability prometheus dashboard",
    "nginx proxy",
    "reconnect resume reload",
    "sse eventsource event",
    "test testing",
)


def stem(word: str) -> str:
    """Cut English endings, so that resume, resumes, resumed and resuming are one: crude, but the same on both sides."""
    if word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > _MIN_STEM:
        word = word[:-1]
    for ending in ("ation", "ating", "ated", "ate", "ment", "ing", "ed", "ion", "or", "er", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= _MIN_STEM:
            word = word[: -len(ending)]
            break
    if len(word) > _MIN_STEM and word[-1] == word[-2] and word[-1] not in "aeos":
        word = word[:-1]
    if len(word) > _MIN_STEM and word[-1] in "ey":
        word = word[:-1]
    return word


def terms(text: str) -> list[str]:
    """The stems of the text's words, in order, without stop words: what two texts can have in common.

    Accents, case and single letters are gone. ``LLM_BASE_URL`` is its three words and itself. Scripts other than Latin
    give nothing, since the documentation is in English. Time is linear in the text.
    """
    letters = unicodedata.normalize("NFKD", text).casefold()
    latin = "".join(c for c in letters if not unicodedata.combining(c))
    found: list[str] = []
    for name in _WORD.findall(latin):
        words = name.split("_")
        found += (stem(word) for word in words if len(word) > 1 and word not in _STOP_WORDS)
        if len(words) > 1:
            found.append(name)
    return found


@dataclass(frozen=True, slots=True)
class Query:
    """A question's terms, each with what may stand for it (itself first) and how much it tells (its rarity)."""

    synonyms: Mapping[str, frozenset[str]]
    rarity: Mapping[str, float]

    def found_in(self, words: Iterable[str]) -> set[str]:
        """The question's terms that stand among these, by themselves or by a synonym."""
        present = frozenset(words)
        return {term for term, others in self.synonyms.items() if term in present or others & present}

    def weight(self, found: Iterable[str]) -> float:
        """How much these of its terms tell, together."""
        return sum(self.rarity[term] for term in found)

    @property
    def total_weight(self) -> float:
        return self.weight(self.rarity)

    def without(self, words: Iterable[str]) -> Query:
        """The question beyond these words, and beyond what they may stand for."""
        left = self.synonyms.keys() - self.found_in(words)
        return Query({term: self.synonyms[term] for term in left}, {term: self.rarity[term] for term in left})


class Ranking:
    """Scores texts against questions; a text is its terms, each with a weight (2.0: as good as standing twice)."""

    def __init__(self, texts: Sequence[Mapping[str, float]]) -> None:
        self._texts = texts
        lengths = [sum(text.values()) for text in texts]
        self._mean_length = sum(lengths) / len(texts) if texts else 1.0
        # One line beats no paragraph for being short alone: below half the mean, length counts no more.
        self._lengths = [max(length, self._mean_length / 2) for length in lengths]
        self._holders = Counter(term for text in texts for term in text)
        self._synonyms: dict[str, frozenset[str]] = {}
        for group in _SYNONYMS:
            stems = frozenset(map(stem, group.split()))
            for each in stems:
                self._synonyms[each] = self._synonyms.get(each, frozenset()) | stems - {each}

    def rarity(self, term: str) -> float:
        """How much a term tells (inverse document frequency): near 0 if every text has it, most if one has.

        A word that no text has tells half of that: it may be off the subject, or of another language.
        """
        if not (holders := self._holders[term]):
            return math.log(1 + 2 / 3 * len(self._texts)) / 2
        return math.log(1 + (len(self._texts) - holders + 0.5) / (holders + 0.5))

    def query(self, question: str) -> Query:
        asked = dict.fromkeys(terms(question))
        synonyms = {term: self._synonyms.get(term, frozenset()) for term in asked}
        return Query(synonyms, {term: self.rarity(term) for term in asked})

    def scores(self, query: Query) -> list[float]:
        """BM25 of each text; a term that a text lacks may be made good by a synonym, at half the weight."""
        return [
            sum(
                max([self._gain(at, term), *(_SYNONYM_WEIGHT * self._gain(at, other) for other in others)])
                for term, others in query.synonyms.items()
            )
            for at in range(len(self._texts))
        ]

    def _gain(self, at: int, term: str) -> float:
        count = self._texts[at].get(term, 0.0)
        norm = _K1 * (1 - _B + _B * self._lengths[at] / self._mean_length)
        return self.rarity(term) * count * (_K1 + 1) / (count + norm)
