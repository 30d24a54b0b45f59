"""Bias metrics with probabilities written into a table, and on transformers for order, batches and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from locate_edit.ensembles.fair_votes import fairness
from locate_edit.errors import PromptError
from locate_edit.metrics.bias import (
    crows,
    equalised_odds,
    icat,
    language_modelling_score,
    pair_mass,
    pair_preference,
    stereotype_score,
)
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

WORDS = ["nurse", "smith", "clerk", "he", "she", "tree", "very"]
TOKENIZER = word_tokenizer(WORDS)
NURSE, SMITH, CLERK, HE, SHE, TREE, VERY = (token_id(TOKENIZER, word) for word in WORDS)
MODEL = Bigram(
    len(TOKENIZER),
    {
        NURSE: {SHE: 0.6, HE: 0.2, TREE: 0.1},
        SMITH: {HE: 0.02, SHE: 0.01, TREE: 0.9},
        CLERK: {HE: 0.3, SHE: 0.3, TREE: 0.1, VERY: 0.2},
        VERY: {HE: 0.5},
    },
)
ROWS: list[Any] = [
    {"prompt": "nurse", "target": " she", "wrong": [" he", " tree"]},
    {"prompt": "smith", "target": " he", "wrong": [" she", " tree"]},
    {"prompt": "clerk", "target": " he", "wrong": [" she", " tree"]},
]
PROMPTS = PromptSet(ROWS, TOKENIZER)


def test_preference_and_mass_by_hand() -> None:
    assert pair_mass(MODEL, PROMPTS).values == pytest.approx([0.8, 0.03, 0.6], rel=1e-6)
    values = pair_preference(MODEL, PROMPTS)
    assert values.items.tolist() == [0, 2]  # the second pair has not enough of the probability
    assert values.values.tolist() == [1.0, 0.5]
    assert "a probability of 0.05 of the two together" in values.note
    assert pair_preference(MODEL, PROMPTS, least_mass=0.0).values.tolist() == [1.0, 1.0, 0.5]
    soft = pair_preference(MODEL, PROMPTS, least_mass=0.0, soft=True)
    assert soft.values == pytest.approx([0.75, 2 / 3, 0.5], rel=1e-6)


def test_a_model_that_no_longer_uses_the_words_is_not_called_fair() -> None:
    prompts = PromptSet([ROWS[1], ROWS[1], ROWS[0]], TOKENIZER)
    values = pair_preference(MODEL, prompts)
    assert values.estimate is None
    assert values.withheld == (
        "needs: a model that uses the words; only 1 of 3 pairs have a probability of 0.05 together"
    )
    with pytest.raises(PromptError, match="least_mass is a probability from 0 to 1, got 2"):
        pair_preference(MODEL, prompts, least_mass=2)
    plain = PromptSet([("nurse", " she")], TOKENIZER)
    for metric in (pair_mass, pair_preference, stereotype_score, language_modelling_score):
        assert metric(MODEL, plain).withheld.startswith("needs: a row with a target and")


def test_words_of_several_tokens() -> None:
    rows = [{"prompt": "clerk", "target": " very he", "wrong": [" she"]}]
    prompts = PromptSet(rows, TOKENIZER)
    # As a whole 0.2 * 0.5 = 0.1 against 0.3; a token sqrt(0.1) = 0.316 against 0.3.
    assert pair_mass(MODEL, prompts).estimate == pytest.approx(0.4, rel=1e-6)
    assert pair_preference(MODEL, prompts).estimate == 0.0
    assert stereotype_score(MODEL, prompts).estimate == 1.0


def test_stereoset_by_hand() -> None:
    stereotypes, language = (
        stereotype_score(MODEL, PROMPTS),
        language_modelling_score(MODEL, PROMPTS),
    )
    assert stereotypes.values.tolist() == [1.0, 1.0, 0.5]
    assert language.values.tolist() == [1.0, 0.0, 1.0]
    # SS 5/6, LMS 2/3.
    found = icat(stereotypes, language)
    assert found.estimate == pytest.approx(2 / 3 * (1 / 6) / 0.5)
    assert found.interval() is not None
    two = PromptSet([ROWS[0], {**ROWS[1], "wrong": [" she"]}], TOKENIZER)
    partial = icat(stereotype_score(MODEL, two), language_modelling_score(MODEL, two))
    assert partial.estimate == 0.0  # of the first item alone, which is all stereotype
    with pytest.raises(PromptError, match="expected values of language_modelling_score"):
        icat(stereotypes, stereotypes)
    none = Values.none("stereotype_score", "needs: x")
    assert icat(none, language).withheld == "needs: x"


def test_stereoset_averages_over_target_terms() -> None:
    terms = ["nurse", "nurse", "smith", "clerk", "clerk", "clerk"]
    rows = [
        {**row, "group": row["prompt"]} for term in terms for row in ROWS if row["prompt"] == term
    ]
    prompts = PromptSet([*rows, {"prompt": "nurse", "target": " she", "group": "nurse"}], TOKENIZER)

    def over_terms(each: dict[str, list[float]]) -> float:
        """As published: the mean of each term's items, then of the terms."""
        return sum(sum(values) / len(values) for values in each.values()) / len(each)

    stereotypes = stereotype_score(MODEL, prompts, by_group=True)
    language = language_modelling_score(MODEL, prompts, by_group=True)
    ss = over_terms({"nurse": [1.0, 1.0], "smith": [1.0], "clerk": [0.5] * 3})
    lms = over_terms({"nurse": [1.0, 1.0], "smith": [0.0], "clerk": [1.0] * 3})
    assert stereotypes.estimate == pytest.approx(ss) == pytest.approx(2.5 / 3)
    assert language.estimate == pytest.approx(lms)
    assert icat(stereotypes, language).estimate == pytest.approx(lms * min(ss, 1 - ss) / 0.5)
    assert stereotype_score(MODEL, prompts).estimate == pytest.approx(4.5 / 6)


def test_crows_by_hand_compares_the_shared_tokens() -> None:
    # Shared: "nurse" is not predicted; "he" against "she" are not shared; "tree" after them is.
    model = Bigram(len(TOKENIZER), {HE: {TREE: 0.6}, SHE: {TREE: 0.3}, NURSE: {SHE: 0.9}})
    more = PromptSet(["nurse he tree", "nurse she tree", "very he tree", "he tree"], TOKENIZER)
    less = PromptSet(["nurse she tree", "nurse he tree", "very very he tree", "he tree"], TOKENIZER)
    values = crows(Predictions(model, more), Predictions(model, less))
    # Third: "he tree" in both, of equal probability. Fourth: no difference.
    assert values.items.tolist() == [0, 1, 2]
    assert values.values.tolist() == [1.0, 0.0, 0.5]
    assert values.note.endswith("needs: sentences that differ and share a token")
    with pytest.raises(PromptError, match="got 4 and 1"):
        crows(Predictions(model, more), Predictions(model, less[:1]))


def test_crows_of_a_masked_model_hides_one_shared_token_at_a_time() -> None:
    model, tokenizer = tiny("bert"), byte_tokenizer(mask=True)
    # Two sentences, and how many letters they share at the start and at the end.
    pairs = [("he is ill", "she is ill", 0, 9), ("xa b", "ya b", 0, 3), ("a man", "a hen", 2, 1)]
    more, less = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    expected = []
    for one, other, start, end in pairs:
        sums = []
        for text in (one, other):
            ids = tokenizer(text)["input_ids"]
            places = [*range(start), *range(len(text) - end, len(text))]
            total = 0.0
            for place in places:
                row = list(ids)
                row[place + 1] = tokenizer.mask_token_id
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([row])).logits[0, place + 1]
                total += float(logits.log_softmax(-1)[ids[place + 1]])
            sums.append(total)
        expected.append(float(sums[0] > sums[1]))
    values = crows(
        *(Predictions(model, PromptSet(texts, tokenizer), batch_size=4) for texts in (more, less))
    )
    assert values.values.tolist() == expected
    assert len(set(expected)) == 2


def test_equalised_odds_by_hand() -> None:
    words = word_tokenizer(["p", "q", "r", "yes", "no"])
    p, q, r, yes, no = (token_id(words, word) for word in ("p", "q", "r", "yes", "no"))
    model = Bigram(len(words), {p: {yes: 0.8}, q: {no: 0.8}, r: {yes: 0.3, no: 0.3}})

    def row(prompt: str, right: str, group: str) -> dict[str, Any]:
        wrong = {" yes": " no", " no": " yes"}[right]
        return {"prompt": prompt, "target": right, "wrong": [wrong], "group": group}

    rows = [
        row("p", " yes", "m"), row("p", " yes", "m"), row("q", " no", "m"), row("q", " no", "m"),
        row("p", " yes", "f"), row("q", " yes", "f"), row("q", " no", "f"), row("r", " no", "f"),
    ]  # fmt: skip
    odds = equalised_odds(Predictions(model, PromptSet(rows, words)), " yes")
    # m: every answer right. f: "yes" to 1 of 2 who are, and to half of one of 2 who are not.
    assert odds.tpr_gap.estimate == pytest.approx(0.5)
    assert odds.fpr_gap.estimate == pytest.approx(0.25)
    assert odds.gap.estimate == pytest.approx(0.5)
    assert odds.accuracy.estimate == pytest.approx(6.5 / 8)
    said = [1, 1, 0, 0, 1, 0, 0, 0.5]
    other = fairness(said, [1, 1, 0, 0, 1, 1, 0, 0], list("mmmmffff"))
    assert (other.tpr_gap, other.fpr_gap) == (odds.tpr_gap.estimate, odds.fpr_gap.estimate)
    alike = [row("p", right, group) for group in "mf" for right in (" yes", " no")]
    useless = equalised_odds(Predictions(model, PromptSet(alike, words)), " yes").gap
    assert useless.withheld.endswith("it is in 0.500 of the cases, that one in 0.500")
    one = equalised_odds(Predictions(model, PromptSet(rows[:6], words)), " yes").gap
    assert one.withheld == "needs: both right answers in every group; 'f' has one only"
    model.head.weight.data[yes] = float("nan")
    broken = equalised_odds(Predictions(model, PromptSet(rows, words)), " yes").gap
    assert broken.withheld == "needs: finite predictions, and the model gives NaN or infinity"
    with pytest.raises(PromptError, match="item 0: expected a 'group', a target and a wrong"):
        equalised_odds(Predictions(model, PromptSet(rows, words)), " maybe")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_batches_order_and_padding_do_not_matter(family: str) -> None:
    masked = family == "bert"
    model = tiny(family)
    rows = [
        {"prompt": "The nurse said", "target": " she", "wrong": [" he", " a"], "suffix": " left"},
        {"prompt": "A smith", "target": " he", "wrong": [" she", " bb"], "suffix": " worked on"},
        {"prompt": "x", "target": "y", "wrong": ["z", "w"]},
    ]
    left = byte_tokenizer(mask=masked)
    left.padding_side = "left"
    order = [1, 2, 0]
    straight = PromptSet(rows, byte_tokenizer(mask=masked))
    mixed = PromptSet([rows[i] for i in order], left)
    for metric in (pair_mass, stereotype_score, language_modelling_score):
        one = metric(Predictions(model, straight, batch_size=1))
        two = metric(Predictions(model, mixed, batch_size=9))
        assert two.values == pytest.approx(one.values[order], rel=1e-5)
    soft = [
        pair_preference(Predictions(model, prompts, batch_size=n), least_mass=0, soft=True).values
        for prompts, n in ((straight, 1), (mixed, 9))
    ]
    assert soft[1] == pytest.approx(soft[0][order], rel=1e-5)
