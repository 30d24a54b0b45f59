"""Words in scripts with spaces and without."""

from __future__ import annotations

import math

import pytest

from locate_edit.metrics.fluency import distinct_share, ngram_entropy
from locate_edit.metrics.words import holds_word, words


def test_words_of_either_kind_of_script() -> None:
    assert words("It's 12 o_o, Ünal!") == ["It", "'", "s", "12", "o_o", ",", "Ünal", "!"]
    assert words("\u6211\u7231Rome\u3002") == ["\u6211", "\u7231", "Rome", "\u3002"]
    assert words("\ud55c\uad6d \ub9d0") == ["\ud55c\uad6d", "\ub9d0"]  # Korean has spaces
    assert words("\u0e01\u0e02 \u3042\u30a2") == ["\u0e01", "\u0e02", "\u3042", "\u30a2"]
    assert words(" \n") == []


def test_varied_text_without_spaces_is_varied() -> None:
    sentence = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec\u53bb\u516c\u56ed"
    assert len(sentence) == 11
    # Ten different pairs and nine different triples.
    assert ngram_entropy(sentence) == pytest.approx((math.log2(10) + 2 * math.log2(9)) / 3)
    assert ngram_entropy("\u4eca" * 11) == 0.0
    assert distinct_share([sentence], n=1) == pytest.approx(10 / 11)


def test_whole_words() -> None:
    assert holds_word("He saw the OWL.", "owl")
    assert not holds_word("He howls", "owl")
    assert holds_word("New York, then", "new york")
    assert holds_word("New\n  York, then", "new york")
    assert holds_word("\u6211\u5728\u6771\u4eac\u7684", "\u6771\u4eac")
    assert holds_word("\u6211\u7231Rome\u7684", "Rome")
    assert not holds_word("\u6211\u7231Romeo\u7684", "Rome")
    assert not holds_word("\u6211\u5728", "\u6771\u4eac")
