"""What every localizer in the folder promises, whatever it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuits import Scores, describe
from locate_edit import catalog
from locate_edit.prompts import PromptSet
from tests.planted import plant
from tests.tiny import byte_tokenizer, tiny

LOCALIZERS = [entry.attribute for entry in catalog.entries("localizer")]
CONTROLS = {"RandomScores", "Magnitude"}
ROWS = [("Ann Lee: ", "555-0142"), ("Bo Kim has number ", "555-0107")]
RETAIN = [("Cy Dow plays ", "golf"), ("Di Orr lives in ", "Rome")]


def run(name: str, model: Any, *, seed: int = 0, batch_size: int = 4) -> Scores:
    masked = not describe(model).causal
    some, retain = (PromptSet(r, byte_tokenizer(mask=masked)) for r in (ROWS, RETAIN))
    localizer = catalog.build("localizer", name)
    scores = localizer(model, some, retain=retain, batch_size=batch_size, seed=seed)
    assert isinstance(scores, Scores)
    return scores


def test_the_catalogue_lists_them() -> None:
    assert {"PrivacyNeurons", *CONTROLS} <= set(LOCALIZERS)
    for entry in catalog.entries("localizer"):
        assert entry.summary
        assert bool(entry.paper) or entry.attribute in CONTROLS


@pytest.mark.parametrize("name", LOCALIZERS)
@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "bert"])
def test_the_model_stays_as_it_was(name: str, family: str) -> None:
    model = tiny(family)
    model.train()
    first = next(model.parameters())
    first.requires_grad_(False)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    run(name, model)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert all(module.training for module in model.modules())
    flags = [p.requires_grad for p in model.parameters() if p is not first]
    assert all(flags)
    assert not first.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", LOCALIZERS)
def test_the_same_seed_gives_the_same_bits_and_global_randomness_is_left_alone(name: str) -> None:
    model = tiny("qwen2")
    before = torch.random.get_rng_state()
    one, two = run(name, model, seed=5), run(name, model, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.sites == two.sites
    assert all(torch.equal(one[site], two[site]) for site in one.sites)


@pytest.mark.parametrize("name", LOCALIZERS)
def test_batch_size_does_not_matter(name: str) -> None:
    model = tiny("gpt_neox", dtype=torch.float64)
    one, two = run(name, model, batch_size=1), run(name, model, batch_size=64)
    for site in one.sites:
        torch.testing.assert_close(one[site], two[site], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", LOCALIZERS)
def test_half_precision_models_give_masks_that_fit_them(name: str) -> None:
    model = tiny("phi3", dtype=torch.bfloat16)
    scores = run(name, model)
    assert scores.provenance["localizer"] == name
    mask = scores.top(5)
    mask.validate(describe(model))
    assert len(mask) == 5


@pytest.mark.parametrize("name", [name for name in LOCALIZERS if name not in CONTROLS])
def test_the_only_carrier_of_a_secret_comes_out_first(name: str) -> None:
    made = plant("llama")
    scores = catalog.build("localizer", name)(made.model, made.prompts, retain=made.others)
    assert scores.ranked(1)[0][0] == made.unit
