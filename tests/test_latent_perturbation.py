"""The attack of a claim: nothing without budget, within it otherwise, and towards the answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.claims import latent_adversarial
from circuits import Site, capture, describe
from circuits.hooks import replace
from locate_edit import PromptSet, organism
from locate_edit.metrics.likelihood import likelihood

LAYER = 1


@pytest.fixture(scope="module")
def setting() -> tuple[torch.nn.Module, PromptSet]:
    """The organism and facts that it never met."""
    model, _ = organism.load()
    return model, organism.prompts("facts", "holdout").select(range(4))


def attacked(setting: tuple[torch.nn.Module, PromptSet], budget: float, steps: int) -> Tensor:
    """Probability of each target under attack."""
    return latent_adversarial.latent_perturbation(
        *setting, layer=LAYER, budget=budget, steps=steps, seed=3
    )


def test_without_budget_it_is_the_likelihood(
    setting: tuple[torch.nn.Module, PromptSet],
) -> None:
    want = torch.tensor(likelihood(*setting).values, dtype=torch.float32)
    torch.testing.assert_close(attacked(setting, 0.0, 2), want, rtol=1e-4, atol=1e-7)


def test_steps_go_towards_the_answers(setting: tuple[torch.nn.Module, PromptSet]) -> None:
    start, end = attacked(setting, 0.3, 0), attacked(setting, 0.3, 8)
    assert float(start.max()) < 0.5
    assert float(end.min()) > 0.9


def test_it_stays_within_its_budget(
    setting: tuple[torch.nn.Module, PromptSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = setting
    site = Site(LAYER, "layer")
    (batch,) = prompts.batches(32)  # as the attack reads them
    with torch.no_grad(), capture(describe(model), [site]) as clean:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    found: list[Tensor] = []

    def watched(model_map, changes):  # type: ignore[no-untyped-def]
        def seen(hidden: Tensor) -> Tensor:
            moved: Tensor = changes[site](hidden)
            found.append((moved - hidden).detach())
            return moved

        return replace(model_map, {site: seen})

    monkeypatch.setattr(latent_adversarial, "replace_activations", watched)
    attacked(setting, 0.3, 6)
    bound = 0.3 * clean[site].norm(dim=-1)
    assert len(found) == 7
    for moved in found:
        assert bool((moved.norm(dim=-1) <= bound * 1.0001).all())
    real_tokens = batch.attention_mask.bool()
    assert float((found[-1].norm(dim=-1) / bound)[real_tokens].max()) > 0.9
    assert all(parameter.grad is None for parameter in model.parameters())
