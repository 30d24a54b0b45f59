"""Every family's table entry satisfies the output identities, and wrong entries do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from circuits.errors import SiteError
from circuits.families import FAMILIES, Family
from circuits.layout import Weight
from circuits.model_map import ModelMap, describe, verify
from tests.circuits.identities import IDENTITIES, Gap, restored
from tests.tiny import CONFIGS, SQUARE, tiny

GATED = {
    "phi",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "bloom",
    "falcon",
    "opt",
    "bert",
    "roberta",
    "distilbert",
}
FULL_QK_NORM = {"olmo2", "olmoe"}


def not_applicable(identity: str, model_type: str) -> bool:
    return (identity == "up_scales_like_down" and model_type in GATED) or (
        identity == "queries_are_keys" and model_type in FULL_QK_NORM
    )


@pytest.fixture(scope="module")
def maps() -> Callable[[str], ModelMap]:
    known: dict[str, ModelMap] = {}

    def get(name: str) -> ModelMap:
        if name not in known:
            known[name] = describe(tiny(name, dtype=torch.float64))
        return known[name]

    return get


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_identity(name: str, identity: str, maps: Callable[[str], ModelMap]) -> None:
    gaps = list(IDENTITIES[identity](maps(name)))
    if not_applicable(identity, CONFIGS[name][0]):
        assert gaps == []
        return
    assert gaps
    for gap in gaps:
        assert gap.holds, gap
        assert gap.effect > 1e-3, f"the change has no effect, so the identity shows nothing: {gap}"


def test_every_entry_of_the_table_has_a_tiny_model(maps: Callable[[str], ModelMap]) -> None:
    used = {id(maps(name).family) for name in CONFIGS}
    assert [family.names for family in FAMILIES if id(family) not in used] == []
    types = {model_type for model_type, _ in CONFIGS.values()}
    assert {name for family in FAMILIES for name in family.names} == types


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "opt", "falcon", "bert", "distilbert", "mixtral"]
)
def test_bare_and_classification_models(name: str, auto: Any) -> None:
    model_map = describe(tiny(name, auto=auto, dtype=torch.float64))
    assert model_map.prefix == (
        "" if auto is AutoModel else f"{model_map.model.base_model_prefix}."
    )
    for identity in ("neurons_read_is_write", "values_are_output_columns"):
        for gap in IDENTITIES[identity](model_map):
            assert gap.holds
            assert gap.effect > 1e-3


# ---- wrong entries ------------------------------------------------------------------------------------------------


def swap(one: str, two: str) -> Callable[[Family], Family]:
    def change(family: Family) -> Family:
        exchanged: dict[str, Any] = {one: family.weights(two), two: family.weights(one)}
        return replace(family, **exchanged)

    return change


def rewrite(old: str, new: str, *names: str) -> Callable[[Family], Family]:
    def change(family: Family) -> Family:
        changed: dict[str, Any] = {}
        for name in names:
            weights = family.weights(name)
            assert any(old in w.text for w in weights), (
                f"{name} has no {old!r}: the mutant is the original"
            )
            changed[name] = tuple(Weight(w.text.replace(old, new)) for w in weights)
        return replace(family, **changed)

    return change


SQUARE_GPT = {"n_inner": 24}
SQUARE_OPT = {"ffn_dim": 24}

MUTANTS: dict[str, tuple[str, dict[str, Any], Callable[[Family], Family]]] = {
    "attention output of a Conv1D read as Linear": (
        "gpt2",
        {},
        rewrite("(head d_head) d_model", "d_model (head d_head)", "o"),
    ),
    "MLP input of a Conv1D read as Linear": (
        "gpt2",
        SQUARE_GPT,
        rewrite("d_model neuron", "neuron d_model", "up"),
    ),
    "MLP output of a Conv1D read as Linear": (
        "gpt2",
        SQUARE_GPT,
        rewrite("neuron d_model", "d_model neuron", "down"),
    ),
    "attention output of a Linear read as Conv1D": (
        "llama",
        SQUARE,
        rewrite("d_model (head d_head)", "(head d_head) d_model", "o"),
    ),
    "both sides of the MLP transposed": (
        "bert",
        {"intermediate_size": 24},
        lambda f: rewrite("neuron d_model", "d_model neuron", "up")(
            rewrite("d_model neuron", "neuron d_model", "down")(f)
        ),
    ),
    "keys for values": ("llama", {}, swap("k", "v")),
    "keys for values, fused and concatenated": ("gpt2", {}, swap("k", "v")),
    "keys for values, fused in blocks": ("phi3", {}, swap("k", "v")),
    "keys for values, grouped": ("falcon", {}, swap("k", "v")),
    "queries for keys": ("llama", SQUARE, swap("q", "k")),
    "queries for keys, bidirectional": ("bert", {}, swap("q", "k")),
    "queries for keys, fused": ("gpt_neox", {}, swap("q", "k")),
    "queries for values": ("opt", {}, swap("q", "v")),
    "concatenated for interleaved": (
        "gpt_neox",
        {},
        rewrite("head qkv", "qkv head", "q", "k", "v"),
    ),
    "interleaved for concatenated": ("gpt2", {}, rewrite("qkv head", "head qkv", "q", "k", "v")),
    "places of a group for groups": (
        "falcon",
        {},
        rewrite("kv_head slot", "slot kv_head", "q", "k", "v"),
    ),
    "gate for up": ("llama", {}, swap("gate", "up")),
    "gate for up, fused": ("phi3", {}, swap("gate", "up")),
    "gate for up, experts": ("mixtral", {}, swap("gate", "up")),
    "interleaved for concatenated, experts": (
        "mixtral",
        {},
        rewrite("(two neuron)", "(neuron two)", "gate", "up"),
    ),
    "concatenated for interleaved, experts": (
        "gpt_oss",
        {},
        rewrite("(neuron two)", "(two neuron)", "gate", "up"),
    ),
    "output of the experts transposed": (
        "mixtral",
        {"intermediate_size": 24},
        rewrite("d_model neuron", "neuron d_model", "down"),
    ),
    "no offset of up": ("gpt_oss", {}, lambda f: replace(f, up_offset=0.0)),
    "MLP input for MLP output": (
        "opt",
        SQUARE_OPT,
        lambda f: rewrite("fc1", "fc2", "up")(rewrite("fc2", "fc1", "down")(f)),
    ),
    "heads within their dimensions": ("llama", {}, rewrite("head d_head", "d_head head", "q")),
    "another block's output": (
        "bert",
        {"intermediate_size": 24},
        rewrite("output.dense", "attention.output.dense", "down"),
    ),
}


def caught_by(model_map: ModelMap) -> set[str]:
    broken = set()
    with restored(model_map.model):
        for name, identity in IDENTITIES.items():
            try:
                holds = all(gap.holds for gap in identity(model_map))
            except SiteError:  # experts recomputed by the wrong entry are not the model's
                holds = False
            if not holds:
                broken.add(name)
    return broken


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_entry_is_caught(mutant: str) -> None:
    name, overrides, change = MUTANTS[mutant]
    right = describe(tiny(name, dtype=torch.float64, **overrides))
    wrong = ModelMap(right.model, change(right.family), right.prefix)
    verify(wrong)  # its shapes are right, so only the identities can tell
    assert caught_by(right) == set()
    assert caught_by(wrong)


class Striped(ModelMap):
    """Heads dealt out to groups in turn instead of in runs."""

    def heads_of(self, kv_heads: Tensor) -> Tensor:
        return kv_heads.repeat(self.n_heads // self.n_kv_heads)


@pytest.mark.parametrize("name", ["llama", "falcon", "phi3", "qwen3"])
def test_wrong_groups_of_heads_are_caught(name: str) -> None:
    right = describe(tiny(name, dtype=torch.float64))
    wrong = Striped(right.model, right.family, right.prefix)
    assert "values_are_output_columns" in caught_by(wrong)


def test_a_gap_that_is_not_small_does_not_hold() -> None:
    assert Gap("", 1e-9, 1.0).holds
    assert not Gap("", 1e-3, 1.0).holds
    assert not Gap("", float("nan"), 1.0).holds
