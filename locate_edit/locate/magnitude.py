"""The second control: units with large weights, whatever the prompts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from circuits import Scores, describe
from locate_edit.locate._common import provenance, sites_of
from locate_edit.prompts import PromptSet


@dataclass(frozen=True)
class Magnitude:
    """Euclidean norm of all weights of each unit (biases included), the same for all prompts.

    Cost: one pass over the weights, no forward pass.

    Attributes:
        kinds: kinds of sites to score, e.g. ("neuron", "head"). Norms of different kinds have different scales.
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
        """Norms of the units' weights; prompts are only named in the provenance, the rest is not used.

        Raises:
            SiteError: the model has no units of a kind.
        """
        model_map = describe(model)
        sites = sites_of(model_map, self.kinds)
        values = {site: model_map.norms(site)[None] for site in sites}
        return Scores(values, provenance(self, model_map, prompts, seed=seed))
