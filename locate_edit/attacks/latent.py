"""Perturb the residual stream within a budget, towards the answers.

Paper: Yuan et al. 2024, Towards Robust Knowledge Unlearning (arXiv:2408.10682): the inner minimisation of latent
adversarial unlearning, here as an attack.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from circuits import ModelMap, Site, describe
from circuits.forward import labelled_logits, token_log_probs
from circuits.hooks import replace
from circuits.still import frozen
from locate_edit.attacked import Attacked, Point, check_prompts
from locate_edit.attacks._checks import check_positive, check_whole, is_finite
from locate_edit.attacks._locked import locked_after
from locate_edit.errors import EditError
from locate_edit.losses import per_item_mean
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import Batch, PromptSet


@dataclass(frozen=True)
class LatentPerturbation:
    """Likelihood of the targets under the best small change of the residual stream.

    The attacker may add to the residual stream ``h_t`` after one layer, at every token but padding, anything of a
    length up to ``budget * |h_t|``, anew for each prompt, and knows the target. Projected gradient descent on the
    targets' mean negative log-likelihood, from no change at all: each step moves every token's change by ``step`` of
    its budget along its gradient's direction and brings it back inside. The best step counts, prompt by prompt.

    With enough budget this *writes* an answer that the model does not hold, and the default is enough for some: the
    model that was trained without the shipped organism's facts gains 0.29 to 0.39 on 8 to 80 of them. So a gain alone
    is no sign of knowledge. The reference is the same attack, with the same budget, on a model that never knew (the
    oracle); compare gain with gain. Where there is none, ``notes["forget wrong gain"]`` gives an idea: what the same
    search gains towards each row's first wrong answer, from ``notes["forget wrong clean"]`` to
    ``notes["forget wrong"]`` (mean likelihoods). It is no bound: on 8 of those facts the oracle gains 0.39 towards the
    right answers, and 0.27 towards these.

    Cost: ``steps + 1`` forwards and ``steps`` backwards above the layer, twice where rows have wrong answers. The seed
    changes nothing.

    Deviations: a budget relative to each token's own length (the published code bounds the whole sequence, padding
    included, by one number), no random start, and no clamping to the range of the batch.

    Attributes:
        layer: after which layer (0-based); None for the middle one.
        budget: of the length of the residual stream, at each token (fraction).
        steps: of the descent.
        step: length of one (fraction of the budget); None for ``2 / steps``, at most 1.

    Raises:
        EditError: a budget, steps or step out of range, or no such layer.
    """

    layer: int | None = None
    budget: float = 0.1
    steps: int = 6
    step: float | None = None

    def __post_init__(self) -> None:
        if not is_finite(self.budget) or self.budget < 0:
            raise EditError(
                f"LatentPerturbation: budget must be at least 0 and finite, got {self.budget!r}"
            )
        check_whole("LatentPerturbation", 1, steps=self.steps)
        if self.step is not None:
            check_positive("LatentPerturbation", step=self.step)
        if self.layer is not None:
            check_whole("LatentPerturbation", 0, layer=self.layer)

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Perturb the stream towards the targets of each set."""
        check_prompts(model, forget, retain, batch_size)
        model_map = describe(model)
        layer = self.layer_of(model_map)
        found = self._by_step(model_map, forget, layer, batch_size)
        kept = None if retain is None else self._by_step(model_map, retain, layer, batch_size)
        notes: dict[str, Any] = {"layer": layer, "budget": self.budget}
        wrong = _first_wrong(forget)
        if wrong is not None:
            means = self._by_step(model_map, wrong, layer, batch_size).mean(axis=1)
            notes |= {
                "forget wrong": float(means[-1]),
                "forget wrong clean": float(means[0]),
                "forget wrong gain": float(means[-1] - means[0]),
                "rows with a wrong answer": len(wrong),
            }
        return Attacked(
            _values(found[-1]),
            _values(found[0]),
            None if kept is None else _values(kept[-1]),
            None if kept is None else _values(kept[0]),
            curve=tuple(
                Point(at, float(found[at].mean()), None if kept is None else float(kept[at].mean()))
                for at in range(self.steps + 1)
            ),
            strength="steps",
            notes=notes,
        )

    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """A positive control: a lock that 0.7 of the budget opens, in two directions of the stream after the layer.

        An answer a few directions away is what the attack is made for: refusals are known to hang on one (Arditi et
        al. 2024, arXiv:2406.11717). Only the gradient of the targets tells which: noise of the same length misses them,
        and so does a single step. It shows that the search works at this layer and budget, not that every edit yields.
        """
        check_prompts(model, forget, None, batch_size)
        layer = self.layer_of(describe(model))
        return locked_after(
            model, layer, forget, opens_at=self.budget / 2, batch_size=batch_size, seed=seed
        )

    def layer_of(self, model_map: ModelMap) -> int:
        """The layer after which the stream is perturbed.

        Raises:
            EditError: the model has no such layer.
        """
        layer = (model_map.n_layers - 1) // 2 if self.layer is None else self.layer
        if not 0 <= layer < model_map.n_layers:
            raise EditError(
                f"LatentPerturbation: layer {layer} is none of {model_map.name}'s, which has 0 to "
                f"{model_map.n_layers - 1}"
            )
        return layer

    def _by_step(
        self, model_map: ModelMap, prompts: PromptSet, layer: int, batch_size: int
    ) -> Floats:
        """Best likelihood of each target up to each step, `step item`; step 0 is without the attack."""
        best = np.zeros((self.steps + 1, len(prompts)))
        device = next(model_map.model.parameters()).device
        with frozen(model_map.model), torch.enable_grad():
            for batch in prompts.batches(batch_size):
                each = self._batch(model_map, batch.to(device), layer)
                best[:, list(batch.items)] = each.cummax(dim=0).values.double().cpu().numpy()
        return best

    def _batch(self, model_map: ModelMap, batch: Batch, layer: int) -> Tensor:
        """Likelihood of each target at each step, `step item`."""
        device = batch.input_ids.device
        real = batch.attention_mask[..., None].float()
        place = torch.zeros(*batch.input_ids.shape, model_map.d_model, device=device)
        length = min(1.0, 2.0 / self.steps) if self.step is None else self.step
        found = []
        for step in range(self.steps + 1):
            place.requires_grad_()
            nll = self._nll(model_map, batch, layer, place)
            found.append((-nll).detach().exp())
            if step < self.steps:
                (gradient,) = torch.autograd.grad(nll.sum(), place)
                place = moved(place.detach(), gradient, length) * real
        return torch.stack(found)

    def _nll(self, model_map: ModelMap, batch: Batch, layer: int, place: Tensor) -> Tensor:
        """Mean negative log-likelihood of each target with the stream changed, `item`.

        Args:
            model_map: the model.
            batch: the prompts.
            layer: after which layer.
            place: the change in units of the budget, `row token d_model`.
        """

        def add(hidden: Tensor) -> Tensor:
            radius = self.budget * torch.linalg.vector_norm(
                hidden.detach().float(), dim=-1, keepdim=True
            )
            new: Tensor = hidden + (radius * place).to(hidden.dtype)
            return new

        with replace(model_map, {Site(layer, "layer"): add}):
            log_prob = token_log_probs(labelled_logits(model_map.model, batch), batch.label)
        nll: Tensor = per_item_mean(-log_prob, batch.item, len(batch.items), batch.weight)
        return nll


def moved(place: Tensor, gradient: Tensor, length: float) -> Tensor:
    """``place`` `... d_model` moved by ``length`` against the gradient and brought back to a length of 1 at most."""
    size = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    # A token without gradient stays where it is.
    there = place - length * gradient / size.clamp(min=torch.finfo(size.dtype).tiny)
    beyond: Tensor = torch.linalg.vector_norm(there, dim=-1, keepdim=True).clamp(min=1.0)
    inside: Tensor = there / beyond
    return inside


def _first_wrong(prompts: PromptSet) -> PromptSet | None:
    """The rows that have wrong answers, with the first of them in the place of the target."""
    rows = [
        {key: value for key, value in row.items() if key != "spans"} | {"target": row["wrong"][0]}
        for row in prompts.rows
        if row.get("wrong")
    ]
    return prompts.reread(rows) if rows else None


def _values(likelihoods: Floats) -> Values:
    return Values.make("likelihood", likelihoods, unit="probability", direction="up")
