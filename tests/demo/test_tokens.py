"""The demo's tokens: words with the space before them, joined the text again, never cut inside a grapheme."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.demo.tokens import split_tokens


def test_a_token_is_a_word_with_the_white_space_before_it() -> None:
    """As the tokenizers of language models have it: " world", not "Hello "."""
    assert split_tokens("Hello, wide world.\n\n- one\n") == ["Hello,", " wide", " world.", "\n\n-", " one", "\n"]


def test_a_script_without_spaces_is_told_a_character_at_a_time() -> None:
    """A page of Chinese is no single token, and what does not start a word of its own stays with what precedes it."""
    assert split_tokens("流れる。はい") == ["流", "れ", "る。", "は", "い"]


@pytest.mark.parametrize(
    "grapheme",
    ["e\u0301", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "❤\ufe0f", "か\u3099", "葛\U000e0100", "क्षि", "กำ", "\r\n"],
    ids=[
        "accent",
        "family",
        "skin tone",
        "flag",
        "emoji style",
        "voice mark",
        "han variant",
        "conjunct",
        "thai",
        "crlf",
    ],
)
def test_a_grapheme_is_never_cut(grapheme: str) -> None:
    """What a reader sees as one character arrives at once (UAX #29)."""
    assert any(grapheme in token for token in split_tokens(f"a {grapheme}漢 b"))


@given(st.text())
def test_joined_the_tokens_are_the_text(text: str) -> None:
    """Nothing is lost, added or empty, whatever the text."""
    tokens = split_tokens(text)
    assert "".join(tokens) == text
    assert all(tokens)
