"""Read the answer off the layers before the last: an edit of the last ones leaves what the earlier ones already say.

Paper: nostalgebraist (2020), "interpreting GPT: the logit lens"; as an attack on edited facts, Patil et al. 2023, Can
Sensitive Information Be Deleted From LLMs? (arXiv:2309.17410), with the probability in place of the presence among the
most likely tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from circuits import ComponentMask, Site, describe
from circuits.logit_lens import logit_lens
from circuits.model_map import ModelMap
from circuits.places import Places, place_of_items
from locate_edit.attacked import Attacked, check_prompts
from locate_edit.attacks._edited import edited_away
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import PromptSet


@dataclass(frozen=True)
class LogitLens:
    """Probability of each target's first token in the layer, among all, that gives it most.

    The attacker sees the residual stream after every layer, read through the model's own final norm and head (see
    `circuits.logit_lens`), the stream before the first layer included. Without the attack it is the probability in the
    model's own prediction. The measure is the *best* over layers, prompt by prompt: the largest of several numbers, so
    it is above the clean one also where nothing is known; ``notes`` hold the mean of every layer.

    Cost: one forward a prompt, and the head once a layer.
    """

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Read every layer; ``seed`` changes nothing."""
        check_prompts(model, forget, retain, batch_size)
        model_map = describe(model)
        found = _by_layer(model_map, forget, batch_size)
        kept = None if retain is None else _by_layer(model_map, retain, batch_size)
        notes: dict[str, Any] = {
            "measure": "probability of the first token in each prompt's best layer",
            "forget by layer": _means(found),
        }
        return Attacked(
            _values(found.max(axis=0)),
            _values(found[-1]),
            None if kept is None else _values(kept.max(axis=0)),
            None if kept is None else _values(kept[-1]),
            notes=notes | ({} if kept is None else {"retain by layer": _means(kept)}),
        )

    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """A positive control: the last layer's neurons, edited against the prompts."""
        check_prompts(model, forget, None, batch_size)
        model_map = describe(model)
        last = Site(model_map.n_layers - 1, "neuron")
        mask = ComponentMask({last: torch.ones(model_map.shape(last), dtype=torch.bool)})
        return edited_away(model, forget, mask=mask, batch_size=batch_size, seed=seed)


def _by_layer(model_map: ModelMap, prompts: PromptSet, batch_size: int) -> Floats:
    """Probability of each target's first token, `layer item`; the first row is before the first layer."""
    found = np.zeros((model_map.n_layers + 1, len(prompts)))
    for batch in prompts.batches(batch_size):
        first = place_of_items(batch)
        places = Places(
            batch.input_ids, batch.attention_mask, batch.row[first], batch.pos[first], batch.label[first]
        )  # fmt: skip
        found[:, list(batch.items)] = logit_lens(model_map, places).probability.double().numpy()
    return found


def _means(found: Floats) -> list[float]:
    return [float(each) for each in found.mean(axis=1)]


def _values(probabilities: Floats) -> Values:
    return Values.make(
        "probability of the first token", probabilities, unit="probability", direction="up"
    )
