"""Scores of rewritten facts and of fluency, worked out by hand from tables of probabilities."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from locate_edit.datasets import counterfact as data
from locate_edit.errors import PromptError
from locate_edit.metrics.counterfact import (
    edit_score,
    efficacy,
    generality,
    locality,
    neighbourhood_success,
    paraphrase_success,
    reliability,
)
from locate_edit.metrics.fluency import (
    distinct,
    distinct_share,
    generation_entropy,
    ngram_entropy,
)
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

WORDS = ["a", "b", "c", "d", "e", "old", "new", "er"]
TOKENIZER = word_tokenizer(WORDS)
A, B, C, D, E, OLD, NEW, ER = (token_id(TOKENIZER, word) for word in WORDS)
TABLE = {
    A: {NEW: 0.6, OLD: 0.1},
    B: {NEW: 0.5, OLD: 0.2},
    C: {NEW: 0.2, OLD: 0.3},
    D: {NEW: 0.1, OLD: 0.9},
    E: {NEW: 0.4, OLD: 0.4},
    NEW: {ER: 0.4},
}
MODEL = Bigram(len(TOKENIZER), TABLE)
BEFORE = Bigram(len(TOKENIZER), {**TABLE, A: {OLD: 0.9}, B: {OLD: 0.9}})
ROWS: list[Any] = [
    {
        "prompt": "a", "target": " old", "wrong": [" new", " b"],
        "paraphrases": ["b", "c"], "neighbours": ["d", "c", "b"],
    },
    {"prompt": "c", "target": " old", "wrong": [" new"], "paraphrases": ["e"], "neighbours": ["d"]},
    {"prompt": "d", "target": " old", "wrong": [" new er"]},
    {"prompt": "d", "target": " old", "paraphrases": ["a"], "neighbours": ["a"]},
]  # fmt: skip
PROMPTS = PromptSet(ROWS, TOKENIZER)


def test_scores_by_hand() -> None:
    values = efficacy(MODEL, PROMPTS)
    assert values.items.tolist() == [0, 1, 2]
    assert values.values.tolist() == [1.0, 0.0, 0.0]
    assert (
        values.note
        == "1 of 4 items left out; needs: a row whose 'wrong' begins with the new answer"
    )
    assert efficacy(MODEL, PROMPTS, magnitude=True).values == pytest.approx(
        [0.5, -0.1, math.sqrt(0.1 * 0.4) - 0.9], rel=1e-5
    )
    para = paraphrase_success(MODEL, PROMPTS)
    assert para.items.tolist() == [0, 1]
    assert para.values.tolist() == [0.5, 0.5]
    near = neighbourhood_success(MODEL, PROMPTS)
    assert near.values == pytest.approx([2 / 3, 1.0])
    amount = neighbourhood_success(MODEL, PROMPTS, magnitude=True)
    assert amount.values == pytest.approx([(0.8 + 0.1 - 0.3) / 3, 0.8], rel=1e-5)
    assert [v.direction for v in (values, para, near)] == ["down", "down", "up"]
    # Means 1/2, 1/2 and 5/6 on the two facts that have all three.
    assert edit_score(values, para, near).estimate == pytest.approx(3 / (2 + 2 + 6 / 5))
    with pytest.raises(PromptError, match="expected values of paraphrase_success"):
        edit_score(values, values, near)
    gone = Values.none("efficacy", "needs: x")
    assert edit_score(gone, para, near).withheld == "efficacy: needs: x"


def test_token_scores_by_hand() -> None:
    # "new" is the most probable token after a, b and (a tie, the first of them) e or not; "er" after new.
    assert reliability(MODEL, PROMPTS).values.tolist() == [1.0, 0.0, 0.5]
    values = generality(MODEL, PROMPTS)
    assert values.values[0] == 0.5
    assert reliability(BEFORE, PROMPTS).values.tolist() == [0.0, 0.0, 0.5]
    predictions = Predictions(MODEL, PROMPTS, reference=BEFORE)
    # Of the neighbours d, c and b the edit changed b.
    assert locality(predictions).values == pytest.approx([2 / 3, 1.0])
    assert locality(Predictions(MODEL, PROMPTS, reference=MODEL)).estimate == 1.0
    assert locality(MODEL, PROMPTS).withheld.startswith("needs: the model before the edit")


def test_sets_without_what_is_needed() -> None:
    bare = PromptSet([("a", " old")], TOKENIZER)
    for metric in (efficacy, paraphrase_success, neighbourhood_success, reliability, generality):
        assert metric(MODEL, bare).withheld.startswith("needs: a row whose 'wrong' begins with")
    with pytest.raises(PromptError, match="holds other tokens than its rows say"):
        efficacy(MODEL, PROMPTS.preceded([[A]] * 4))


def test_what_stands_behind_the_answer_stays() -> None:
    model, other = tiny("bert"), tiny("bert", seed=3)
    row = {
        "prompt": "Ann lives in", "target": " Rome", "wrong": [" Bonn"], "suffix": " since May",
        "paraphrases": ["The home of Ann is"], "neighbours": ["Bo lives in"],
    }  # fmt: skip
    tokenizer = byte_tokenizer(mask=True)
    seen = Predictions(model, PromptSet([row], tokenizer), reference=other)

    def chances(text: str) -> list[float]:
        answers = [" Rome", " Bonn"]
        rows = [{"prompt": text, "target": a, "suffix": row["suffix"]} for a in answers]
        return list(likelihood(model, PromptSet(rows, tokenizer)).values)

    for metric, text, sign in (
        (efficacy, "Ann lives in", 1),
        (paraphrase_success, "The home of Ann is", 1),
        (neighbourhood_success, "Bo lives in", -1),
    ):
        old, new = chances(text)
        values = metric(seen, magnitude=True).values
        assert values == pytest.approx([sign * (new - old)], rel=1e-4, abs=1e-9)
    near = PromptSet(
        [{"prompt": "Bo lives in", "target": " Rome", "suffix": row["suffix"]}], tokenizer
    )
    tops = [Predictions(m, near).top for m in (model, other)]
    assert locality(seen).estimate == (tops[0] == tops[1]).mean()


def test_all_scores_together_read_every_text_once() -> None:
    rows = [
        {**row, "wrong": [" new"], "paraphrases": ["b"], "neighbours": ["d"]} for row in ROWS[:2]
    ]
    model, before = Bigram(len(TOKENIZER), TABLE), Bigram(len(TOKENIZER), TABLE)
    seen = Predictions(model, PromptSet(rows, TOKENIZER), batch_size=1, reference=before)
    for metric in (efficacy, paraphrase_success, neighbourhood_success, reliability, generality):
        assert not metric(seen).withheld
    assert (model.n_calls, before.n_calls) == (6 * 2, 2)
    assert not locality(seen).withheld
    assert (model.n_calls, before.n_calls) == (6 * 2, 2 + 2)


def test_batches_order_and_padding_do_not_matter() -> None:
    model = tiny("llama")
    rows: list[Any] = [
        {"prompt": "Ann lives in", "target": " Rome", "wrong": [" a far larger town"],
         "paraphrases": ["Where Ann lives:", "x"], "neighbours": ["Bo lives in"]},
        {"prompt": "x", "target": "y", "wrong": ["z"], "paraphrases": ["w"], "neighbours": ["v", "u"]},
    ]  # fmt: skip
    left = byte_tokenizer()
    left.padding_side = "left"
    other = tiny("llama", seed=6)
    one = Predictions(model, PromptSet(rows, byte_tokenizer()), batch_size=1, reference=other)
    two = Predictions(model, PromptSet(rows[::-1], left), batch_size=5, reference=other)
    for metric in (efficacy, paraphrase_success, neighbourhood_success):
        straight, mixed = metric(one, magnitude=True), metric(two, magnitude=True)
        assert mixed.values[::-1] == pytest.approx(straight.values, rel=1e-4)
    for metric_ in (reliability, generality, locality):
        assert metric_(two).values[::-1] == pytest.approx(metric_(one).values)


@pytest.mark.skipif(
    not (Path(os.environ.get("LOCATE_EDIT_DATA", "nowhere")) / "counterfact").is_dir(),
    reason="set LOCATE_EDIT_DATA to a folder that holds counterfact",
)
def test_the_real_cases_can_be_scored() -> None:
    folder = Path(os.environ["LOCATE_EDIT_DATA"]) / "counterfact"
    prompts = PromptSet(data.rows(folder)[:4], byte_tokenizer())
    predictions = Predictions(tiny("gpt2"), prompts, reference=tiny("gpt2"))
    for metric in (efficacy, paraphrase_success, neighbourhood_success, locality):
        assert len(metric(predictions)) == 4
    assert locality(predictions).estimate == 1.0


# ---- fluency --------------------------------------------------------------------------------------


def test_ngram_entropy_by_hand() -> None:
    assert ngram_entropy("ha ha ha ha ha") == 0.0
    assert ngram_entropy("") == 0.0
    # Four different bigrams, three different trigrams.
    assert ngram_entropy("one two three four five") == pytest.approx((2 + 2 * math.log2(3)) / 3)
    # Bigrams ab ba ab ba b. (2 2 1), trigrams aba bab aba ba. (2 1 1).
    two = -(0.8 * math.log2(0.4) + 0.2 * math.log2(0.2))
    assert ngram_entropy("a b a b a.") == pytest.approx((two + 2 * 1.5) / 3)


def test_distinct_share_by_hand() -> None:
    assert distinct_share(["a b a b", "a b c"], n=2) == pytest.approx(3 / 7)
    assert distinct_share(["a b a b", "a b c"], n=1) == pytest.approx(3 / 7)
    assert distinct_share(["", " "]) is None
    with pytest.raises(PromptError, match="n must be at least 1, got 0"):
        distinct_share(["a"], n=0)


def test_generated_text_by_hand() -> None:
    model = Bigram(len(TOKENIZER), {A: {B: 0.99}, B: {C: 0.99}, C: {C: 0.99}, D: {D: 0.99}})
    rows: list[Any] = [("a", " b"), {"prompt": "a", "target": " b", "generation": ["d", "a"]}]
    prompts = PromptSet(rows, TOKENIZER)
    # "b c c c" from a: bigrams bc cc cc, trigrams bcc ccc; "d d d d" from d.
    first = (math.log2(3) - 2 / 3 + 2 * 1.0) / 3
    values = generation_entropy(model, prompts, max_new_tokens=4)
    assert values.values == pytest.approx([first, first / 2])
    greedy = distinct(model, prompts, n=1, samples=3, length=4, temperature=0.0)
    assert greedy.values == pytest.approx([2 / 12, 2 / 12])
    predictions = Predictions(model, prompts)
    spread = distinct(predictions, n=1, samples=3, length=4, top_p=1.0, temperature=3.0)
    assert (spread.values > greedy.values).all()
    calls = model.n_calls
    distinct(predictions, n=2, samples=3, length=4, top_p=1.0, temperature=3.0)
    assert model.n_calls == calls  # the same samples serve
    masked = PromptSet([("Ann", " golf")], byte_tokenizer(mask=True))
    assert distinct(tiny("bert"), masked).withheld == "needs: a causal model"
    assert generation_entropy(tiny("bert"), masked).withheld == "needs: a causal model"
