from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from locate_edit.errors import PromptError
from locate_edit.metrics.likelihood import likelihood, nll, probability
from locate_edit.metrics.perplexity import perplexity
from locate_edit.metrics.perplexity_shift import perplexity_rose, perplexity_shift
from locate_edit.metrics.predictions import Predictions
from locate_edit.prompts import PromptSet, TokenMask
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.tiny import word_tokenizer

WORDS = ["a", "b", "c", "d"]
TOKENIZER = word_tokenizer(WORDS)
A, B, C, D = (token_id(TOKENIZER, word) for word in WORDS)
# p(b|a) = 0.5, p(c|b) = 0.25, p(d|c) = 0.1; the rest does not matter.
MODEL = Bigram(len(TOKENIZER), {A: {B: 0.5}, B: {C: 0.25}, C: {D: 0.1}})
# Item 0 scores 0.5 and 0.25, item 1 scores 0.1, item 2 scores 0.5, 0.25 and 0.1.
PROMPTS = PromptSet([("a", " b c"), ("a b c", " d"), "a b c d"], TOKENIZER)


def test_hand_derived_likelihoods() -> None:
    each = [math.sqrt(0.125), 0.1, 0.0125 ** (1 / 3)]
    values = likelihood(MODEL, PROMPTS)
    assert values.values == pytest.approx(each, rel=1e-6)
    assert values.estimate == pytest.approx(np.mean(each), rel=1e-6)
    assert values.direction == "up"

    whole = probability(MODEL, PROMPTS)
    assert whole.values == pytest.approx([0.125, 0.1, 0.0125], rel=1e-6)

    losses = nll(MODEL, PROMPTS)
    assert losses.values == pytest.approx([-math.log(x) for x in each], rel=1e-6)
    assert losses.direction == "down"


def test_perplexity_weighs_every_token_alike() -> None:
    # Six tokens: 0.5 0.25 | 0.1 | 0.5 0.25 0.1; the mean over items of each perplexity is another number.
    product = 0.125 * 0.1 * 0.0125
    assert perplexity(MODEL, PROMPTS).estimate == pytest.approx(product ** (-1 / 6), rel=1e-6)
    by_item = (0.125**-0.5 + 10 + 0.0125 ** (-1 / 3)) / 3
    assert perplexity(MODEL, PROMPTS, average="item").estimate == pytest.approx(by_item, rel=1e-6)
    assert perplexity(MODEL, PROMPTS).each == pytest.approx(
        [0.125**-0.5, 10, 0.0125 ** (-1 / 3)], rel=1e-6
    )


def test_token_weights_enter_every_mean() -> None:
    mask = TokenMask(((1.0, 0.5), (0.0,), (0.0, 1.0, 1.0)))
    prompts = PROMPTS.with_token_mask(mask)
    first = math.exp((math.log(0.5) + 0.5 * math.log(0.25)) / 1.5)
    values = likelihood(MODEL, prompts)
    assert values.items.tolist() == [0, 2]
    assert values.values == pytest.approx([first, math.sqrt(0.025)], rel=1e-6)
    assert values.note.startswith("1 of 3 items left out; needs: at least one scored token of non")
    assert probability(MODEL, prompts).values == pytest.approx([0.5 * 0.5, 0.025], rel=1e-6)
    log = math.log(0.5) + 0.5 * math.log(0.25) + math.log(0.25) + math.log(0.1)
    assert perplexity(MODEL, prompts).estimate == pytest.approx(math.exp(-log / 3.5), rel=1e-6)


def test_a_number_is_withheld_when_no_item_can_be_scored() -> None:
    prompts = PROMPTS.with_token_mask(TokenMask(((0.0, 0.0), (0.0,), (0.0, 0.0, 0.0))))
    for metric in (likelihood, probability, nll, perplexity):
        values = metric(MODEL, prompts)
        assert values.estimate is None
        assert values.withheld == "needs: at least one scored token of non-zero weight"


def test_a_broken_model_gives_a_reason_and_no_number() -> None:
    broken = Bigram(len(TOKENIZER), {})
    with torch.no_grad():
        broken.states.weight[A] = math.nan  # after "a" nothing is defined
    values = likelihood(broken, PROMPTS)
    assert values.items.tolist() == [1]
    assert "the model gives NaN or infinity" in values.note
    assert likelihood(broken, PROMPTS[:1]).estimate is None


def test_what_no_float_holds_is_no_better_number() -> None:
    sure = Bigram(len(TOKENIZER), {})
    prompts = PROMPTS[:2]
    with torch.no_grad():
        sure.head.weight[prompts.target_ids(1)] = -800.0  # the second answer is impossible
    seen = Predictions(sure, prompts, reference=Bigram(len(TOKENIZER), {}))
    assert np.isfinite(seen.logprob).all()
    for values in (perplexity(seen, average="item"), perplexity_shift(seen)):
        assert values.withheld.startswith("needs: numbers that can be averaged; ")
    assert perplexity_rose(seen).estimate is not None
    assert likelihood(seen).estimate is not None


def test_predictions_and_prompts_are_not_mixed() -> None:
    predictions = Predictions(MODEL, PROMPTS)
    assert likelihood(predictions).estimate == likelihood(MODEL, PROMPTS).estimate
    with pytest.raises(PromptError, match="give a metric either predictions, or a model"):
        likelihood(predictions, PROMPTS)
    with pytest.raises(PromptError, match="a metric of Bigram needs a prompt set"):
        likelihood(MODEL)
