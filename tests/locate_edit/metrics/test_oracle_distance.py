from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from locate_edit.errors import PromptError
from locate_edit.metrics.oracle_distance import divergences, oracle_distance
from locate_edit.prompts import PromptSet, TokenMask
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

TOKENIZER = word_tokenizer(["a", "b"])
A, B = token_id(TOKENIZER, "a"), token_id(TOKENIZER, "b")
V = len(TOKENIZER)
PROMPTS = PromptSet([("a", " b"), ("b", " a b")], TOKENIZER)


def two_way(p: float, q: float) -> float:
    """KL of (p, rest spread) from (q, rest spread) over V tokens, in nats."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_hand_derived_distances() -> None:
    oracle = Bigram(V, {A: {B: 0.5}, B: {A: 0.5}})
    edited = Bigram(V, {A: {B: 0.9}, B: {A: 0.5}})  # differs after "a" only
    other = Bigram(V, {A: {B: 0.6}, B: {A: 0.4}})
    found = oracle_distance(edited, oracle, other, PROMPTS)
    after_a, noise_a, noise_b = two_way(0.5, 0.9), two_way(0.5, 0.6), two_way(0.5, 0.4)
    # Item 0 is scored after "a"; item 1 after "b" and after "a".
    assert found.nats.values == pytest.approx([after_a, after_a / 2], rel=1e-5)
    assert found.floor.values == pytest.approx([noise_a, (noise_b + noise_a) / 2], rel=1e-5)
    floor = (noise_a + (noise_b + noise_a) / 2) / 2
    assert found.ratio.estimate == pytest.approx(0.75 * after_a / floor, rel=1e-5)
    assert found.ratio.each == pytest.approx([after_a / floor, after_a / 2 / floor], rel=1e-5)
    assert found.ratio.direction == "distance"


def test_another_retraining_is_at_one_and_the_oracle_itself_at_zero() -> None:
    oracle, other = tiny("llama", seed=1), tiny("llama", seed=2)
    prompts = PromptSet([("Ann", " golf"), "some plain text"], byte_tokenizer())
    assert oracle_distance(other, oracle, other, prompts).ratio.estimate == pytest.approx(1.0)
    same = oracle_distance(copy.deepcopy(oracle), oracle, other, prompts)
    assert same.ratio.estimate == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_equal_to_the_literal_definition(family: str) -> None:
    models = [tiny(family, seed=seed) for seed in (1, 2, 3)]
    oracle, other, edited = models
    prompts = PromptSet(
        [("Ann", " golf"), ("x", "y"), "a longer plain text"], byte_tokenizer(mask=family == "bert")
    )
    weights = [[0.5 + 0.5 / (k + 1) for k, _ in enumerate(prompts.target_ids(i))] for i in range(3)]
    prompts = prompts.with_token_mask(TokenMask(tuple(map(tuple, weights))))

    def literal(model: Any, index: int) -> float:
        batch = prompts.batch([index])
        with torch.no_grad():
            p, q = (
                m(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                .logits[batch.row, batch.pos]
                .double()
                .log_softmax(-1)
                for m in (oracle, model)
            )
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        weight = batch.weight.double()
        return float((weight * kl).sum() / weight.sum())

    for batch_size in (1, 16):
        found = oracle_distance(edited, oracle, other, prompts, batch_size=batch_size)
        assert found.nats.values == pytest.approx([literal(edited, i) for i in range(3)], abs=2e-6)
        assert found.floor.values == pytest.approx([literal(other, i) for i in range(3)], abs=2e-6)


def test_the_direction_is_from_the_oracle() -> None:
    oracle = Bigram(V, {A: {B: 0.5}})
    edited = Bigram(V, {A: {B: 0.9}})
    forth = divergences(oracle, [edited], PROMPTS[:1])[0]
    back = divergences(edited, [oracle], PROMPTS[:1])[0]
    assert forth == pytest.approx([two_way(0.5, 0.9)], rel=1e-5)
    assert back == pytest.approx([two_way(0.9, 0.5)], rel=1e-5)


def test_one_pass_of_every_model() -> None:
    edited, oracle, other = (Bigram(V, {}) for _ in range(3))
    oracle_distance(edited, oracle, other, PROMPTS, batch_size=2)
    assert [model.n_calls for model in (edited, oracle, other)] == [1, 1, 1]


def test_a_ratio_needs_two_oracles_that_differ() -> None:
    oracle, edited = Bigram(V, {}), Bigram(V, {A: {B: 0.9}})
    without = oracle_distance(edited, oracle, None, PROMPTS)
    assert without.ratio.withheld.startswith("needs: a second oracle")
    assert without.nats.estimate is not None
    twice = oracle_distance(edited, oracle, copy.deepcopy(oracle), PROMPTS)
    assert twice.ratio.withheld == "needs: two oracles that differ; these two predict the same"


def test_items_without_weight_are_left_out() -> None:
    prompts = PROMPTS.with_token_mask(TokenMask(((0.0,), (1.0, 1.0))))
    oracle, edited, other = Bigram(V, {}), Bigram(V, {A: {B: 0.9}}), Bigram(V, {A: {B: 0.5}})
    found = oracle_distance(edited, oracle, other, prompts)
    assert found.ratio.items.tolist() == [1]
    assert (
        found.nats.note
        == "1 of 2 items left out; needs: at least one scored token of non-zero weight"
    )


def test_models_of_different_vocabularies_are_refused() -> None:
    with pytest.raises(PromptError, match="vocabularies of 9 and 10 tokens"):
        oracle_distance(Bigram(V + 1, {}), Bigram(V, {}), None, PROMPTS)
