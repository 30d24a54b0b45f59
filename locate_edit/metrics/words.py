"""Words of a text, also in scripts that write them without spaces between."""

from __future__ import annotations

import re

__all__ = ["holds_word", "whole_words", "words"]

# Thai, Lao, Tibetan, Burmese, Khmer, Japanese kana, and Chinese characters wherever they stand.
_UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
_LETTER = rf"[^\W{_UNSPACED}]"  # of a script with spaces, digits included
_WORD = re.compile(rf"{_LETTER}+|[^\s]")


def words(text: str) -> list[str]:
    """Runs of letters and digits, and every other character by itself.

    So is every letter of a script without spaces between words: one character is a word there.
    """
    return _WORD.findall(text)


def holds_word(text: str, wanted: str) -> bool:
    """Whether a word or words stand in a text as whole words, whatever their case and the white space between them."""
    return bool(re.search(whole_words(wanted), text, re.IGNORECASE))


def whole_words(wanted: str) -> str:
    """A regular expression of a word or words as whole words.

    Between scripts without spaces there is nothing that ends a word: there they may stand anywhere.
    """
    unspaced = re.compile(f"[{_UNSPACED}]")
    before = "" if unspaced.match(wanted[:1]) else rf"(?<!{_LETTER})"
    behind = "" if unspaced.match(wanted[-1:]) else rf"(?!{_LETTER})"
    return before + r"\s+".join(map(re.escape, wanted.split())) + behind
