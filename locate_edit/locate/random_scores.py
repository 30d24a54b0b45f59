"""The control every localization is compared with: scores that know nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from circuits import Scores, describe
from locate_edit.locate._common import provenance, sites_of
from locate_edit.prompts import PromptSet


@dataclass(frozen=True)
class RandomScores:
    """Uniform random scores between 0 and 1 for every unit of some kinds, the same for all prompts.

    ``RandomScores()(model, prompts, seed=1).top(200)`` is a random mask of 200 units. For a mask with as many units per
    site as another one, use `ComponentMask.random_like`. Cost: no forward pass.

    Attributes:
        kinds: kinds of sites to score, e.g. ("neuron", "head").
    """

    kinds: tuple[str, ...] = ("neuron",)

    def __call__(
        self,
        model: nn.Module,
        prompts: PromptSet | None = None,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
        progress: bool = False,
    ) -> Scores:
        """Draw the scores from ``seed``; prompts are only named in the provenance, the rest is not used.

        Raises:
            SiteError: the model has no units of a kind.
        """
        model_map = describe(model)
        generator = torch.Generator().manual_seed(seed)
        sites = sites_of(model_map, self.kinds)
        values = {
            site: torch.rand((1, *model_map.shape(site)), generator=generator) for site in sites
        }
        return Scores(values, provenance(self, model_map, prompts, seed=seed))
