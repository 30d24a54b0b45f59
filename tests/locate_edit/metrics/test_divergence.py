"""Divergences and perplexity shifts from a reference model: by hand, and against full softmaxes on transformers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from locate_edit.metrics.divergence import jensen_shannon, kl_divergence
from locate_edit.metrics.perplexity_shift import perplexity_rose, perplexity_shift
from locate_edit.metrics.predictions import Predictions
from locate_edit.prompts import PromptSet, TokenMask
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

METRICS = (kl_divergence, jensen_shannon, perplexity_shift, perplexity_rose)
TOKENIZER = word_tokenizer(["a", "b"])
A, B = (token_id(TOKENIZER, word) for word in "ab")
N = len(TOKENIZER)
MODEL = Bigram(N, {A: {A: 0.5, B: 0.5}, B: {A: 0.2, B: 0.8}})
OTHER = Bigram(N, {A: {A: 0.25, B: 0.75}, B: {A: 0.2, B: 0.8}})
PROMPTS = PromptSet([("a", " b"), ("b", " a b"), ("a", " a")], TOKENIZER)


def test_by_hand() -> None:
    predictions = Predictions(MODEL, PROMPTS, reference=OTHER)
    # After b they agree; after a it is 1/4, 3/4 against 1/2, 1/2, whose mean is 3/8, 5/8.
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl_divergence(predictions).values == pytest.approx([kl, kl / 2, kl], abs=1e-6)
    theirs = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    ours = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    js = (theirs + ours) / 2
    assert jensen_shannon(predictions).values == pytest.approx([js, js / 2, js], abs=1e-6)
    # Perplexities 2, sqrt(5 * 2), 2 against 4/3, sqrt(5 * 4/3), 4.
    shift = [abs(2 - 4 / 3) / (4 / 3), math.sqrt(1.5) - 1, abs(2 - 4) / 4]
    assert perplexity_shift(predictions).values == pytest.approx(shift, rel=1e-5)
    assert perplexity_rose(predictions).values.tolist() == [1.0, 1.0, 0.0]
    assert [metric(predictions).direction for metric in METRICS] == ["distance"] * 3 + ["down"]
    weighted = PROMPTS.with_token_mask(TokenMask(((1.0,), (0.25, 0.75), (0.0,))))
    values = kl_divergence(Predictions(MODEL, weighted, reference=OTHER))
    assert values.values == pytest.approx([kl, kl * 3 / 4], abs=1e-6)


def test_a_model_is_no_distance_from_itself_and_needs_another() -> None:
    same = Predictions(MODEL, PROMPTS, reference=MODEL)
    for metric in METRICS:
        assert metric(same).estimate == pytest.approx(0.0, abs=1e-7)
        assert metric(MODEL, PROMPTS).withheld.startswith("needs: a reference model")


def test_models_that_exclude_each_other_are_log_two_apart() -> None:
    one, other = Bigram(N, {A: {A: 1.0}}), Bigram(N, {A: {B: 1.0}})
    prompts = PromptSet([("a", " b")], TOKENIZER)
    values = jensen_shannon(Predictions(one, prompts, reference=other))
    assert values.estimate == pytest.approx(math.log(2), abs=2e-6)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_transformers_for_any_batch_size_order_and_padding(family: str) -> None:
    masked = family == "bert"
    model, other = tiny(family), tiny(family, seed=4)
    rows: list[Any] = [("Ann plays", " golf"), ("x", "y"), ("A much longer prompt", " and text")]
    tokenizer, left = byte_tokenizer(mask=masked), byte_tokenizer(mask=masked)
    left.padding_side = "left"
    prompts = PromptSet(rows, tokenizer)
    expected: dict[str, list[float]] = {"kl": [], "js": []}
    for index in range(len(prompts)):
        ids, first = prompts.ids(index), len(prompts.prompt_ids(index))
        kls, shannons = [], []
        for t in range(len(prompts.target_ids(index))):
            row = list(ids)
            if masked:
                row[first + t] = prompts.tokenizer.mask_token_id
            with torch.no_grad():
                p, q = (
                    m(input_ids=torch.tensor([row])).logits[0, first + t - (not masked)].double().softmax(-1)
                    for m in (other, model)
                )  # fmt: skip
            kls.append(float((p * (p / q).log()).sum()))
            mid = (p + q) / 2
            shannons.append(float(((p * (p / mid).log()) + (q * (q / mid).log())).sum() / 2))
        expected["kl"].append(float(np.mean(kls)))
        expected["js"].append(float(np.mean(shannons)))
    order = [2, 0, 1]
    for batch_size in (1, 2, 16):
        straight = Predictions(model, prompts, batch_size=batch_size, reference=other)
        assert kl_divergence(straight).values == pytest.approx(expected["kl"], rel=1e-4)
        assert jensen_shannon(straight).values == pytest.approx(expected["js"], rel=1e-4)
    mixed = Predictions(model, PromptSet([rows[i] for i in order], left), reference=other)
    for metric in METRICS:
        assert metric(mixed).values == pytest.approx(metric(straight).values[order], rel=1e-4)
