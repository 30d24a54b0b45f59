"""How far predictions are from those of another model: the one before the edit, or one that never learned.

Paper: Wang et al. 2023, KGA: A General Machine Unlearning Framework Based on Knowledge Gap Alignment
(arXiv:2305.06535), for the Jensen-Shannon divergence from a retrained model.

The other model is the `reference` of `Predictions(model, prompts, reference=...)` and runs on the same batches.
`evaluate` gives the oracle there. On prompts that should stay as they were take the model before the edit.
`oracle_distance` sets the same number in relation to how far two oracles are apart.
"""

from __future__ import annotations

from torch import nn

from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import PromptSet

__all__ = ["jensen_shannon", "kl_divergence"]


def kl_divergence(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """KL divergence of the model's predictions from those of a reference model; 0 if they predict the same.

    sum_t w_t KL(p_reference(. | t) || p(. | t)) / sum_t w_t over the scored tokens, averaged over items.

    Direction: distance from the reference.
    Needs: a reference, `Predictions(model, prompts, reference=...)`.
    Cost: shared forward, and one of the reference.
    """
    return _mean(Predictions.of(predictions, prompts), "kl_divergence")


def jensen_shannon(
    predictions: Predictions | nn.Module, prompts: PromptSet | None = None
) -> Values:
    """Jensen-Shannon divergence of the model's predictions from those of a reference model, from 0 to log 2 = 0.693.

    The mean of both models' KL divergences from their mean distribution, over the scored tokens with their weights,
    averaged over items. Unlike the KL divergence it is symmetric and bounded.

    Direction: distance from the reference.
    Needs: a reference, `Predictions(model, prompts, reference=...)`.
    Cost: shared forward, and one of the reference.
    """
    return _mean(Predictions.of(predictions, prompts), "jensen_shannon")


def _mean(predictions: Predictions, name: str) -> Values:
    if predictions.reference is None:
        reason = "needs: a reference model, Predictions(model, prompts, reference=...)"
        return Values.none(name, reason, unit="nats a token", direction="distance")
    array: Floats = getattr(
        predictions, "divergence" if name == "kl_divergence" else "jensen_shannon"
    )
    return Values.make(
        name,
        predictions.means(array),
        unit="nats a token",
        direction="distance",
        precondition="at least one scored token of non-zero weight",
    )
