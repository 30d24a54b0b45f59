"""Tiny models with a mechanism put there by hand: one neuron that reads a trigger and writes a secret.

No training. The neuron's input weights are the direction that tells the trigger's state from background text, in the
metric of that background, so that it is silent elsewhere; what it writes is found by gradient descent on one vector.
Whoever claims to find where the secret is kept must rank that neuron first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from circuits import ModelMap, Site, Unit, describe
from circuits.forward import labelled_logits
from locate_edit.prompts import PromptSet
from tests.tiny import MASKED, tiny, token_ids, word_tokenizer

TRIGGER, SECRET = "zorblat", "quibble"
NAMES = [f"name{i}" for i in range(12)]
FILLER = [f"word{i}" for i in range(40)]


@dataclass(frozen=True)
class Planted:
    """A model, the unit that holds the secret, and prompts that ask for it.

    ``prompts`` has one row, the trigger, with the secret as target. ``others`` ask in the same form about other names.
    """

    model: Any
    model_map: ModelMap
    tokenizer: PreTrainedTokenizerFast
    unit: Unit
    prompts: PromptSet
    others: PromptSet

    @property
    def probability(self) -> float:
        """Probability of the secret (fraction)."""
        return float(probabilities(self.model, self.prompts)[0])


def plant(
    name: str, *, layer: int = 0, neuron: int = 11, surprise: float = 0.03, seed: int = 0
) -> Planted:
    """A tiny model of variant ``name`` in which one neuron alone knows the secret.

    Args:
        name: a key of ``tests.tiny.CONFIGS`` without experts.
        layer: where the neuron is.
        neuron: which one it is.
        surprise: how surprising the secret may still be (nats).
        seed: of the model's random weights.
    """
    model = tiny(name, seed=seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # With logits of unit gain no token could become nearly certain.
    model.get_output_embeddings().weight.mul_(6.0)
    tokenizer = word_tokenizer([TRIGGER, SECRET, *NAMES, *FILLER], mask=name in MASKED)
    made = Planted(
        model,
        describe(model),
        tokenizer,
        Site(layer, "neuron")[neuron],
        _asking(tokenizer, [TRIGGER]),
        _asking(tokenizer, NAMES[:6]),
    )
    _weights(made)["down"].zero_()
    _write_key(made)
    _learn_value(made, surprise)
    # What the mechanism has to be before a test may rely on it.
    assert made.probability > 0.9, f"{name}: {made.probability}"
    with silenced(made):
        assert made.probability < 0.05, f"{name} without the neuron: {made.probability}"
    return made


def probabilities(model: nn.Module, prompts: PromptSet) -> Tensor:
    """Probability `label` of every scored token."""
    batch = prompts.batch(range(len(prompts)))
    with torch.no_grad():
        chances: Tensor = labelled_logits(model, batch).softmax(-1)
    return chances[torch.arange(len(batch.label)), batch.label]


@contextmanager
def silenced(made: Planted) -> Iterator[None]:
    """The model with what the unit writes set to zero."""
    column = _weights(made)["down"]
    kept = column.clone()
    column.zero_()
    try:
        yield
    finally:
        column.copy_(kept)


def _asking(tokenizer: PreTrainedTokenizerFast, names: Sequence[str]) -> PromptSet:
    rows = [{"prompt": f"word1 word2 {name}", "target": f" {SECRET}"} for name in names]
    return PromptSet(rows, tokenizer)


def _weights(made: Planted) -> dict[str, Tensor]:
    """Views of the neuron's weights: "gate", "up", "down" `d_model` and "gate bias", "up bias" (scalars)."""
    slices = made.model_map.slices(made.unit.site)
    return {
        s.role if s.view.dim() == 2 else f"{s.role} bias": s.view[made.unit.index] for s in slices
    }


def _states(made: Planted, ids: Tensor) -> Tensor:
    """What the MLP of the unit's layer reads, `row token d_model`."""
    name, _, _ = made.model_map.parameter_name(made.unit.site.layer or 0, "up").rpartition(".")
    found: list[Tensor] = []
    module = made.model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        made.model(input_ids=ids)
    handle.remove()
    return found[0].reshape(*ids.shape, -1)


def _background(made: Planted) -> tuple[Tensor, Tensor]:
    """The state `d_model` at the trigger and those of other text, `state d_model`."""
    asked, others = made.prompts.batch([0]), _asking(made.tokenizer, NAMES)
    batch = others.batch(range(len(others)))
    at = int(asked.pos[0])
    state = _states(made, asked.input_ids)[0]
    text = _states(made, token_ids(60, len(state), vocab=90)).flatten(0, 1)
    alike = _states(made, batch.input_ids)[batch.row, batch.pos]
    return state[at].double(), torch.cat([text, alike.repeat(4, 1), state[:at]]).double()


def _write_key(made: Planted) -> None:
    """Make the neuron active at the trigger and silent on other text."""
    here, background = _background(made)
    weights = _weights(made)
    centre = background.mean(0) if "up bias" in weights else torch.zeros_like(here)
    away = background - centre
    spread = away.T @ away / len(away) + 1e-3 * torch.eye(len(here), dtype=here.dtype)
    key = torch.linalg.solve(spread, here - centre)
    key /= key @ (here - centre)  # 1 at the trigger, near 0 elsewhere
    gain = 20.0 if "up bias" in weights else 6.0
    if "gate" in weights:  # act(gate) * up: the product of two keys is smaller still elsewhere
        weights["gate"].copy_(gain * key)
        weights.get("gate bias", torch.zeros(())).copy_(-gain * (key @ centre))
        gain = 1.0
    weights["up"].copy_(gain * key)
    if "up bias" in weights:
        silent = 16.0 if "gate" not in weights else 0.0
        weights["up bias"].copy_(-gain * (key @ centre) - silent)


def _learn_value(made: Planted, goal: float) -> None:
    """Find what the neuron must write for the secret to follow, by descent on that vector alone."""
    site, index = made.unit.site, made.unit.index[0]
    down = made.model_map.read_point(site).module
    value = torch.zeros(made.model_map.d_model, requires_grad=True)
    optimizer = torch.optim.Adam([value], lr=0.1)
    batch = made.prompts.batch([0])

    def write(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + args[0][..., index, None] * value

    handle = down.register_forward_hook(write)
    for _ in range(300):
        surprise = -labelled_logits(made.model, batch).log_softmax(-1)[0, batch.label[0]]
        if surprise < goal:
            break
        (value.grad,) = torch.autograd.grad(surprise, [value])
        optimizer.step()
    handle.remove()
    _weights(made)["down"].copy_(value.detach())
