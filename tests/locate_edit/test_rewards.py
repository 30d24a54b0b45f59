"""Rewards: values by hand, and every way in which a user's function can go wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from locate_edit.errors import RewardError
from locate_edit.rewards import Lexicon, SmallClassifier, find, name_of, rewards


def shortness(prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
    return [-float(len(text)) for text in continuations]


@pytest.mark.parametrize(
    ("text", "share", "count"),
    [
        ("A rat, a RAT and a cat", 2 / 7, 2),
        ("rather crated brat rats", 0, 0),  # whole words only
        ("go to hell", 2 / 3, 2),  # the entry of two words
        ("go  to\nHell rat", 3 / 4, 3),
        ("tohell to-hell", 0, 0),
        ("rat", 1, 1),
        ("", 0, 0),
        ("...", 0, 0),
    ],
)
def test_a_lexicon_counts_whole_words(text: str, share: float, count: int) -> None:
    words = ("rat", "to hell")
    assert Lexicon(words)(["p"], [text]) == [pytest.approx(-share)]
    assert Lexicon(words, count=True)(["p"], [text]) == [-count]


def test_a_longer_entry_is_not_hidden_by_a_shorter_one() -> None:
    assert Lexicon(("to", "to hell"), count=True)([""], ["to hell"]) == [-2]


def test_characters_of_entries_are_taken_literally() -> None:
    unspaced = Lexicon(("\u6771\u4eac",))([""], ["\u6211\u5728\u6771\u4eac\u7684"])
    assert unspaced == [pytest.approx(-2 / 5)]  # a character is a word
    assert Lexicon(("a.c",), count=True)([""], ["abc a.c"]) == [-2]  # two words, one entry


@pytest.mark.parametrize("words", [(), ("...",), "rat"])
def test_a_lexicon_without_words_is_refused(words: Any) -> None:
    with pytest.raises(RewardError, match="Lexicon needs"):
        Lexicon(words)


def broken(kind: str) -> Callable[..., Any]:
    def reward(prompts: Sequence[str], continuations: Sequence[str]) -> Any:
        if kind == "raises" and any("b" in text for text in continuations):
            raise ZeroDivisionError("no b please")
        if kind == "together" and len(continuations) > 1:
            raise ZeroDivisionError("one at a time")
        if kind == "count":
            return [1.0]
        odd = {"nan": math.nan, "inf": -math.inf, "text": "good", "none": None}.get(kind)
        return [odd if "b" in text else 1.0 for text in continuations]

    return reward


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("raises", r"raised ZeroDivisionError: no b please; the first .* is number 1, 'b!'"),
        ("together", r"fails on 3 continuations together, not on any alone; the first is 'a'"),
        ("count", r"returned 1 values for 3 continuations, the first of which is 'a'"),
        ("nan", r"returned nan for continuation 1, 'b!'"),
        ("inf", r"returned -inf for continuation 1, 'b!'"),
        ("text", r"returned 'good' for continuation 1, 'b!': expected a number"),
        ("none", r"returned None for continuation 1, 'b!': expected a number"),
    ],
)
def test_a_broken_reward_is_named_with_the_first_text_it_breaks_on(kind: str, says: str) -> None:
    reward = broken(kind)
    with pytest.raises(RewardError, match=says) as caught:
        rewards(reward, ["p"] * 3, ["a", "b!", "b?"])
    assert name_of(reward) in str(caught.value)


def test_long_continuations_are_cut_in_errors() -> None:
    with pytest.raises(RewardError) as caught:
        rewards(broken("nan"), ["p"], ["b" * 1000])
    assert "b" * 80 + "..." in str(caught.value)
    assert "b" * 81 not in str(caught.value)


def test_an_interruption_is_not_taken_for_a_broken_reward() -> None:
    def interrupted(prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards(interrupted, ["p"], ["a"])


def test_values_of_any_kind_of_number_are_taken() -> None:
    found = rewards(lambda p, c: torch.tensor([1, 2]), ["p", "p"], ["a", "b"])  # type: ignore[arg-type, return-value]
    assert found == (1.0, 2.0)
    assert rewards(lambda p, c: [True, 3], ["p", "p"], ["a", "b"]) == (1.0, 3.0)
    with pytest.raises(RewardError, match="one continuation for each of 2 prompts, got 1"):
        rewards(shortness, ["p", "p"], ["a"])


def test_find_reads_lexicons_and_paths() -> None:
    assert find("lexicon:rat, to hell ,") == Lexicon(("rat", "to hell"))
    assert find("tests.locate_edit.test_rewards:shortness")(["", ""], ["abc", ""]) == [-3.0, 0.0]
    for text, says in {
        "rat": "expected 'lexicon:word,word,...' or 'package.module:name'",
        "nowhere_at_all:x": "cannot import 'nowhere_at_all'",
        "math:nothing": "has no 'nothing'",
        "math:pi": "is a float",
    }.items():
        with pytest.raises(RewardError, match=says):
            find(text)


# -- the classifier -------------------------------------------------------------------------------

GOOD = [f"{a} {b} today" for a in ("kind", "gentle", "warm") for b in ("word", "guest", "gift")]
BAD = [f"{a} {b} today" for a in ("vile", "nasty", "cold") for b in ("word", "guest", "gift")]
LABELS = [True] * len(GOOD) + [False] * len(BAD)


def test_the_classifier_tells_classes_apart_on_texts_it_has_not_seen() -> None:
    made = SmallClassifier.fit(GOOD + BAD, LABELS)
    new = made(["", ""], ["a gentle friend", "a nasty friend"])
    assert new[0] > 0.5
    assert new[1] < -0.5
    chance = SmallClassifier(made.weight, made.bias, output="probability")([""], ["a nasty friend"])
    assert chance == [pytest.approx(1 / (1 + math.exp(-new[1])))]


def test_the_classifier_is_the_minimum_of_its_loss() -> None:
    # One feature: "a" in two good texts, nothing in a good and a bad one. d loss / d bias and / d weight vanish there.
    made = SmallClassifier.fit(["a", "A", "", ""], [True, True, True, False], decay=0.1, features=8)
    (weight,) = made.weight[made.weight != 0].double().tolist()
    with_a, without = (1 / (1 + math.exp(-x)) for x in (weight + made.bias, made.bias))
    assert (2 * (with_a - 1) + (without - 1) + without) / 4 == pytest.approx(0, abs=1e-6)
    assert 2 * (with_a - 1) / 4 + 0.1 * weight == pytest.approx(0, abs=1e-6)


def test_runs_of_words_count_and_are_normed_by_hand() -> None:
    made = SmallClassifier(torch.zeros(2**14), 0.25)
    for gram, weight in {"a": 1.0, "b": 2.0, "a b": 4.0, "b a": 8.0}.items():
        made.weight[zlib.crc32(gram.encode()) % 2**14] = weight
    # a b a: counts a 2, b 1, "a b" 1, "b a" 1; length sqrt(7)
    assert made([""], ["A, b a!"]) == [pytest.approx(0.25 + (2 + 2 + 4 + 8) / math.sqrt(7))]
    assert made([""], ["?"]) == [0.25]


def test_the_classifier_is_the_same_in_another_process() -> None:
    code = (
        "from tests.locate_edit.test_rewards import BAD, GOOD, LABELS\n"
        "from locate_edit.rewards import SmallClassifier\n"
        "print(repr(SmallClassifier.fit(GOOD + BAD, LABELS)))"
    )
    root = Path(__file__).parents[2]
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == repr(SmallClassifier.fit(GOOD + BAD, LABELS))


def test_the_classifier_comes_back_from_its_files(tmp_path: Path) -> None:
    made = SmallClassifier.fit(GOOD + BAD, LABELS, order=1, output="probability")
    back = SmallClassifier.load(made.save(tmp_path / "classifier"))
    texts = [*GOOD, "", "other words"]
    assert back([""] * len(texts), texts) == made([""] * len(texts), texts)
    assert repr(back) == repr(made)

    about = json.loads((tmp_path / "classifier" / "classifier.json").read_text())
    (tmp_path / "classifier" / "classifier.json").write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(RewardError, match="expected format 1, got 2"):
        SmallClassifier.load(tmp_path / "classifier")
    with pytest.raises(RewardError, match="holds no classifier"):
        SmallClassifier.load(tmp_path / "elsewhere")


def test_a_classifier_needs_both_kinds_of_texts() -> None:
    with pytest.raises(RewardError, match="labels are all alike"):
        SmallClassifier.fit(GOOD, [True] * len(GOOD))
    with pytest.raises(RewardError, match="one label for each of 9 texts, got 1"):
        SmallClassifier.fit(GOOD, [True])
    with pytest.raises(RewardError, match="order of at least 1"):
        SmallClassifier(torch.zeros(4), 0.0, order=0)
