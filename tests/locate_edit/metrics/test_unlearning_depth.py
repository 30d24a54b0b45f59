from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from locate_edit.errors import LocateEditError
from locate_edit.metrics.unlearning_depth import (
    from_costs,
    read_streams,
    transplant_costs,
    unlearning_depth,
)
from locate_edit.prompts import PromptSet, TokenMask
from tests.tiny import byte_tokenizer, tiny

ROWS: list[Any] = [("Ann", " golf"), ("x", "y"), ("a longer prompt", " and target")]


def prompt_set(family: str = "llama") -> PromptSet:
    return PromptSet(ROWS, byte_tokenizer(mask=family == "bert"))


def near(model: nn.Module, scale: float, seed: int = 0) -> nn.Module:
    """A copy with all weights moved a little."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return moved


def layers_of(model: Any) -> Any:
    return model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers


def literal(source: Any, target: Any, prompts: PromptSet) -> list[list[float]]:
    """One item, one layer, one hook at a time."""
    table = []
    for index in range(len(prompts)):
        batch = prompts.batch([index])
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

        def score(model: Any, batch: Any = batch, inputs: Any = inputs) -> float:
            log_p = model(**inputs).logits.double().log_softmax(-1)
            total = 0.0
            for row, pos, label, weight in zip(
                batch.row, batch.pos, batch.label, batch.weight, strict=True
            ):
                total += float(weight) * float(log_p[row, pos, label])
            return total / float(batch.weight.sum())

        row = []
        for k in range(len(layers_of(target))):
            kept: list[torch.Tensor] = []

            def keep(_m: Any, _a: Any, output: Any, kept: Any = kept) -> None:
                kept.append((output[0] if isinstance(output, tuple) else output).clone())

            def put(_m: Any, _a: Any, output: Any, kept: Any = kept, batch: Any = batch) -> Any:
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                for at, pos in zip(batch.row, batch.pos, strict=True):
                    hidden[at, pos] = kept[0][at, pos]
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            with torch.no_grad():
                handle = layers_of(source)[k].register_forward_hook(keep)
                source(**inputs)
                handle.remove()
                before = score(target)
                handle = layers_of(target)[k].register_forward_hook(put)
                after = score(target)
                handle.remove()
            row.append(before - after)
        table.append(row)
    return table


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_equal_to_a_literal_loop_over_layers(family: str, untouched: Any) -> None:
    source, target = untouched(tiny(family, seed=1).eval()), untouched(tiny(family, seed=2).eval())
    prompts = prompt_set(family)
    weights = [[0.5 + 0.5 / (k + 1) for k, _ in enumerate(prompts.target_ids(i))] for i in range(3)]
    prompts = prompts.with_token_mask(TokenMask(tuple(map(tuple, weights))))
    wanted = np.array(literal(source, target, prompts))
    assert np.abs(wanted).min() > 1e-4, "every layer of every item says something"
    assert wanted[:, 0] != pytest.approx(wanted[:, 1], abs=1e-3)
    for batch_size in (1, 2, 16):
        found = transplant_costs(source, target, prompts, batch_size=batch_size)
        assert found == pytest.approx(wanted, abs=5e-6)


def test_gradients_and_modes_are_as_they_were() -> None:
    one, other = (tiny("llama", seed=seed).train() for seed in (0, 1))
    transplant_costs(one, other, prompt_set(), batch_size=1)
    assert torch.is_grad_enabled()
    assert all(module.training for model in (one, other) for module in model.modules())
    asked = iter(read_streams(one, prompt_set(), batch_size=1))
    next(asked)  # and never again
    assert torch.is_grad_enabled()
    assert one.training


def test_the_score_of_costs_derived_by_hand() -> None:
    s1 = np.array([[2.0, 1.0, 0.01], [0.0, 4.0, 1.0], [0.05, 0.0, -1.0]])
    s2 = np.array([[1.0, 3.0, 9.0], [9.0, -1.0, 0.25], [1.0, 1.0, 1.0]])
    depth = from_costs(s1, s2, np.zeros((2, 3)))
    # (2 * 0.5 + 1 * 1) / 3; (4 * 0 + 1 * 0.25) / 5; no layer above 0.05.
    assert depth.score.values == pytest.approx([2 / 3, 0.05])
    assert depth.score.items.tolist() == [0, 1]
    assert "1 of 3 items left out; needs: a layer that loses more than 0.05" in depth.score.note
    assert (depth.score.direction, depth.score.unit) == ("down", "fraction")
    assert [row["knowing_items"] for row in depth.rows()] == [1, 2, 1]
    assert [row["erased"] for row in depth.rows()] == pytest.approx([0.5, 0.5, 0.25])
    assert depth.rows()[1]["s1"] == pytest.approx(5 / 3)
    assert depth.rows()[0]["between"] is None


def test_no_edit_is_at_zero_and_the_oracle_at_one() -> None:
    original = tiny("llama", seed=1)
    oracle = near(original, 0.1)
    prompts = prompt_set()
    # A tolerance without bound: random models know nothing that a control could be made on.
    options: Any = {"retain": prompts, "tolerance": np.inf}
    none = unlearning_depth(copy.deepcopy(original), original, oracle, prompts, **options)
    full = unlearning_depth(copy.deepcopy(oracle), original, oracle, prompts, **options)
    assert len(none.score) >= 1
    assert none.score.values == pytest.approx(np.zeros(len(none.score)), abs=1e-6)
    assert full.score.values == pytest.approx(np.ones(len(full.score)), abs=1e-6)
    assert full.s2 == pytest.approx(full.s1)


def test_an_edit_of_the_last_layer_alone_leaves_the_layers_below() -> None:
    original = tiny("llama", seed=1)
    oracle = near(original, 0.1)
    edited = copy.deepcopy(original)
    layers_of(edited)[1].load_state_dict(layers_of(oracle)[1].state_dict())
    prompts = prompt_set()
    depth = unlearning_depth(edited, original, oracle, prompts, retain=prompts, tolerance=np.inf)
    assert depth.s2[:, 0] == pytest.approx(np.zeros(3), abs=1e-6)
    assert np.abs(depth.s2[:, 1]).min() > 1e-4


def test_no_score_where_the_oracle_has_another_basis() -> None:
    s1, s2 = np.full((2, 2), 2.0), np.full((2, 2), 1.0)
    clean, dirty = np.full((3, 2), 0.1), np.full((3, 2), 1.5)
    assert from_costs(s1, s2, clean, clean).score.estimate == pytest.approx(0.5)
    for controls, who in (
        ((dirty, None), "the oracle's stream in the original"),
        ((clean, dirty), "another oracle's stream in the oracle"),
    ):
        depth = from_costs(s1, s2, *controls)
        assert depth.score.estimate is None
        assert depth.damage == pytest.approx(0.75)
        assert depth.score.withheld.startswith("needs: ")
        assert who in depth.score.withheld
        assert "75%" in depth.score.withheld
        assert (depth.score.direction, depth.score.unit) == ("down", "fraction")
        assert depth.rows()[0]["s2"] == 1.0, "the table stays"
    # A gain is no damage, nor is what lies below the threshold; layers that no prompt knows do not count.
    gain = np.array([[-5.0, 0.1]])
    assert from_costs(s1, s2, gain).damage == pytest.approx(0.1 / 4)
    assert from_costs(s1, s2, np.full((1, 2), 0.04)).damage == 0.0
    some = np.array([[2.0, 0.0], [0.0, 0.0]])
    assert from_costs(some, s2, np.array([[0.5, 3.0]])).damage == pytest.approx(0.5)
    assert from_costs(np.array([[2.0, 0.0]]), s2[:1], np.array([[0.1, 7.0]])).damage == 0.05


def test_nothing_known_means_no_score() -> None:
    model, prompts = tiny("llama"), prompt_set()
    same = unlearning_depth(
        copy.deepcopy(model), model, copy.deepcopy(model), prompts, retain=prompts
    )
    assert same.score.withheld.startswith("needs: a layer that loses more than 0.05")
    assert np.isnan(same.damage)
    assert same.rows()[0]["erased"] is None


def test_items_without_weight_are_left_out() -> None:
    prompts = PromptSet(ROWS[:2], byte_tokenizer())
    zero = tuple(0.0 for _ in prompts.target_ids(0))
    ones = tuple(1.0 for _ in prompts.target_ids(1))
    prompts = prompts.with_token_mask(TokenMask((zero, ones)))
    found = transplant_costs(tiny("llama", seed=1), tiny("llama", seed=2), prompts)
    assert np.isnan(found).tolist() == [[True, True], [False, False]]


def test_what_cannot_be_compared_is_refused() -> None:
    model, prompts = tiny("llama"), prompt_set()
    with pytest.raises(LocateEditError, match="one object as both"):
        unlearning_depth(model, model, tiny("llama", seed=1), prompts, retain=prompts)
    with pytest.raises(LocateEditError, match=r"of one architecture"):
        transplant_costs(tiny("gpt2"), model, prompts)
