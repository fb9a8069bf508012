"""Terms and their weights: which words count as the same, and which text wins."""

from __future__ import annotations

from collections import Counter

import pytest

from server.demo.ranking import Ranking, terms


def best(question: str, *texts: str) -> int:
    ranking = Ranking([Counter(terms(text)) for text in texts])
    scores = ranking.scores(ranking.query(question))
    return scores.index(max(scores))


@pytest.mark.parametrize(
    "words",
    [
        "resume resumes resumed resuming",
        "limit limits limited limiting",
        "configure configured configuring configuration",
        "retry retries retrying",
        "cancel cancels cancelled canceled cancellation",
        "connect connects connected connection connections",
        "deploy deploys deployed deploying deployment",
        "authenticate authenticated authentication",
        "drop dropped dropping",
        "Café cafe CAFÉ \uff43\uff41\uff46\uff45",
    ],
)
def test_forms_of_a_word_are_one_term(words: str) -> None:
    """A question's grammar is not the documentation's."""
    assert len(set(terms(words))) == 1


def test_words_that_tell_nothing_are_no_terms() -> None:
    assert terms("What is it, and how do I use it? Hello! Please explain a, b or c.") == []


def test_a_setting_s_name_is_its_words_and_itself() -> None:
    """Found by "rate limit", and told from its neighbours when it is spelled out."""
    assert terms("SLUICE_RATE_LIMIT") == ["sluic", "rat", "limit", "sluice_rate_limit"]


@pytest.mark.parametrize("text", ["", "如何限制", "как?", "🙂", "\ud800", "\x00", "____", "\u02bcn"])
def test_any_text_has_terms_or_none(text: str) -> None:
    terms(text)


def test_a_rare_word_tells_more_than_a_common_one() -> None:
    assert best("stream on nginx", "stream stream stream", "stream nginx", "stream redis") == 1


def test_of_two_texts_that_say_it_the_shorter_wins() -> None:
    assert best("redis", "redis " + "lorem ipsum dolor " * 30, "redis shares", "nothing here") == 1


def test_a_synonym_finds_but_the_word_itself_finds_better() -> None:
    assert best("monitoring", "streams", "prometheus") == 1
    assert best("monitoring", "prometheus", "monitoring", "streams") == 1


def test_nothing_to_rank_is_no_error() -> None:
    ranking = Ranking([])
    assert ranking.scores(ranking.query("anything")) == []
