"""The demo's tokenizer: text to the pieces that its deltas carry."""

from __future__ import annotations

import re

__all__ = ["split_tokens"]

# Scripts written without spaces, a character a token as tokenizers have it: kana (without the combining voice marks
# U+3099 and U+309A, which belong to the character before), Han, Hangul syllables, compatibility and further Han.
_UNSPACED = "\u3041-\u3096\u30a1-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"\s*(?:[{_UNSPACED}][^\s{_UNSPACED}]*|[^\s{_UNSPACED}]+)|\s+\Z")


def split_tokens(text: str) -> list[str]:
    """Cut the text into words, each with the white space before it; joined they are the text again.

    A cut stands only before white space or before a character of an unspaced script, so never inside a grapheme:
    accents, variation selectors, skin tones, flags and joined emoji stay with what they modify. Time is linear in the
    text.
    """
    return _TOKEN.findall(text)
