from __future__ import annotations

from typing import Any

import pytest
import torch

from circuits import Scores, Site, SiteError, describe
from locate_edit.locate.magnitude import Magnitude
from locate_edit.locate.random_scores import RandomScores
from locate_edit.prompts import PromptSet
from tests.tiny import byte_tokenizer, tiny

LOCALIZERS = [RandomScores, Magnitude]


def test_random_scores_depend_on_the_seed_alone() -> None:
    model = tiny("llama")
    one, two, other = (RandomScores()(model, seed=seed) for seed in (1, 1, 2))
    sites = describe(model).sites("neuron")
    assert list(one.sites) == sites
    assert all(torch.equal(one[site], two[site]) for site in sites)
    assert not any(torch.equal(one[site], other[site]) for site in sites)
    assert not torch.equal(one[sites[0]], one[sites[1]])
    state = torch.random.get_rng_state()
    RandomScores()(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_scores_choose_every_unit_equally_often() -> None:
    model = tiny("gpt2")
    chosen = sum(
        RandomScores()(model, seed=seed).top(20).on[Site(0, "neuron")].float()
        for seed in range(200)
    )
    # 20 of 80 units, 200 times: each about 50 times, with a standard deviation of about 6.
    assert isinstance(chosen, torch.Tensor)
    assert 25 < float(chosen.min())
    assert float(chosen.max()) < 75


def test_magnitude_is_the_norm_of_all_weights_of_a_unit() -> None:
    model = tiny("gpt2")
    mlp, attn = model.transformer.h[1].mlp, model.transformer.h[1].attn
    scores = Magnitude(kinds=("neuron", "head"))(model)
    read = mlp.c_fc.weight.pow(2).sum(0) + mlp.c_fc.bias.pow(
        2
    )  # columns: this family stores them transposed
    neurons = (read + mlp.c_proj.weight.pow(2).sum(1)).sqrt()
    torch.testing.assert_close(scores[Site(1, "neuron")][0], neurons.detach())
    query = attn.c_attn.weight[:, :24].reshape(24, 4, 6).pow(2).sum((0, 2))
    query = query + attn.c_attn.bias[:24].reshape(4, 6).pow(2).sum(1)
    heads = (query + attn.c_proj.weight.reshape(4, 6, 24).pow(2).sum((1, 2))).sqrt()
    torch.testing.assert_close(scores[Site(1, "head")][0], heads.detach())


def test_magnitude_finds_a_unit_with_large_weights() -> None:
    model = tiny("mixtral")
    with torch.no_grad():
        describe(model).view(1, "up")[2, 7].mul_(50)
    assert str(Magnitude()(model).ranked(1)[0][0]) == "L1.neuron[2,7]"


@pytest.mark.parametrize("localizer", LOCALIZERS)
def test_sites_of_any_kind_and_shape(localizer: Any) -> None:
    model = tiny("qwen3_moe")
    kinds = ("head", "neuron", "expert", "vocab", "neuron")
    scores = localizer(kinds=kinds)(model)
    assert isinstance(scores, Scores)
    assert scores.n_prompts == 1
    model_map = describe(model)
    assert set(scores.sites) == {site for kind in set(kinds) for site in model_map.sites(kind)}
    assert all(tuple(scores[site].shape[1:]) == model_map.shape(site) for site in scores.sites)


@pytest.mark.parametrize("localizer", LOCALIZERS)
def test_provenance_names_prompts_and_seed(localizer: Any) -> None:
    model = tiny("gpt2")
    some = PromptSet([("Ann Lee: ", "555-0142")], byte_tokenizer(), name="phones")
    found = localizer()(model, some, retain=None, batch_size=2, seed=3, progress=True).provenance
    assert found["localizer"] == localizer.__name__
    assert found["options"] == {"kinds": ("neuron",)}
    assert found["prompts"] == {"name": "phones", "prompts": 1, "digest": some.digest}
    assert found["seed"] == 3
    assert found["architecture"] == describe(model).architecture


@pytest.mark.parametrize("localizer", LOCALIZERS)
def test_kinds_that_are_not_there(localizer: Any) -> None:
    with pytest.raises(SiteError, match="has no expert sites; it has neuron, head"):
        localizer(kinds=("expert",))(tiny("gpt2"))
    with pytest.raises(SiteError, match="unknown kind of site 'neurons'"):
        localizer(kinds=("neurons",))(tiny("gpt2"))
    with pytest.raises(SiteError, match="no kinds of sites given"):
        localizer(kinds=())(tiny("gpt2"))
