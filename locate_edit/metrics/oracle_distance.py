"""Oracle distance: how far an edited model is from one that never learned, in units of retraining noise.

An *oracle* is a model retrained without the forget set. Two oracles trained with different seeds differ, too: their
distance is the floor below which nothing can be told. 1.0 therefore reads "as close as another retraining";
forgetting too much moves a model away from the oracle just as forgetting too little does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from circuits.forward import labelled_logits
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.running import evaluating, label_kl, scored_batches
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import PromptSet

__all__ = ["OracleDistance", "divergences", "from_divergences", "item_means", "oracle_distance"]

# Below this many nats a token two oracles are the same model, and the ratio says nothing.
_NO_NOISE = 1e-7


@dataclass(frozen=True)
class OracleDistance:
    """The distance of a model from an oracle on one prompt set.

    Attributes:
        ratio: in units of the noise floor; withheld without a second oracle.
        nats: the same as raw mean KL in nats a token.
        floor: KL between the two oracles in nats a token; withheld without a second oracle.
    """

    ratio: Values
    nats: Values
    floor: Values


def oracle_distance(
    edited: nn.Module,
    oracle: nn.Module,
    other_oracle: nn.Module | None,
    prompts: PromptSet,
    *,
    batch_size: int = 16,
) -> OracleDistance:
    """Mean KL(oracle || edited) over the scored tokens of each item, over the mean KL(oracle || other oracle).

    d_i(q) = sum_t w_t KL(p_oracle(. | t) || q(. | t)) / sum_t w_t over the scored tokens t of item i with weights w,
    the whole vocabulary entering the KL, in nats. ratio = mean_i d_i(edited) / mean_i d_i(other oracle): the mean
    over items of d_i in units of the mean between-oracle distance on the same items. 1.0 is the distance of another
    retraining seed; a smaller number is closer. All models see the same batches.

    Direction: distance from the oracle.
    Needs: an oracle, and for the ratio a second one that differs from it.
    Cost: one forward of each model.

    Args:
        edited: the model in question.
        oracle: a model retrained without the forget set.
        other_oracle: the same with another seed, or None.
        prompts: the prompts.
        batch_size: rows a forward pass.

    Raises:
        PromptError: the models have vocabularies of different sizes.
    """
    others = [edited] if other_oracle is None else [edited, other_oracle]
    found = divergences(oracle, others, prompts, batch_size=batch_size)
    return from_divergences(found[0], found[1] if other_oracle is not None else None, prompts)


def from_divergences(distance: Floats, noise: Floats | None, prompts: PromptSet) -> OracleDistance:
    """The distance from each item's KL to the edited model and to the other oracle, `item` (nats a token)."""
    about = "at least one scored token of non-zero weight"
    counts = [float(any(prompts.weights(i))) for i in range(len(prompts))]
    nats = Values.make(
        "oracle_kl",
        distance,
        unit="nats a token",
        direction="distance",
        precondition=about,
        weights=counts,
    )
    name, unit = "oracle_distance", "noise floors"
    if noise is None:
        reason = "needs: a second oracle, trained with another seed, for the noise floor"
        missing = Values.none(name, reason, unit=unit, direction="distance")
        return OracleDistance(
            missing, nats, Values.none("noise_floor", reason, direction="distance")
        )
    floor = Values.make(
        "noise_floor",
        noise,
        unit="nats a token",
        direction="distance",
        precondition=about,
        weights=counts,
    )
    if floor.estimate is None or floor.estimate < _NO_NOISE:
        reason = "needs: two oracles that differ; these two predict the same"
        ratio = Values.none(name, reason, unit=unit, direction="distance")
    else:
        ratio = Values.make(
            name,
            distance,
            unit=unit,
            direction="distance",
            precondition=about,
            weights=counts,
            reference=noise,
        )
    return OracleDistance(ratio, nats, floor)


def divergences(
    reference: nn.Module,
    models: Sequence[nn.Module],
    prompts: PromptSet,
    *,
    batch_size: int = 16,
) -> list[Floats]:
    """KL(reference || model) of each item for each model, `item` float64 (nats a token), from one pass over the data.

    The mean over an item's scored tokens, weighted; 0 for an item whose weights are all 0.

    Raises:
        PromptError: the models have vocabularies of different sizes.
    """
    for model in (reference, *models):
        prompts.check_context(model)
    found = [np.zeros(len(prompts)) for _ in models]
    mass = np.zeros(len(prompts))
    with torch.no_grad():
        for batch in scored_batches(reference, prompts, batch_size):
            items = np.array(batch.items)[batch.item.cpu().numpy()]
            weight = batch.weight.double().cpu().numpy()
            np.add.at(mass, items, weight)
            with evaluating(reference):
                wanted = labelled_logits(reference, batch)
            for model, total in zip(models, found, strict=True):
                there = batch.to(next(model.parameters()).device)
                with evaluating(model):
                    got = labelled_logits(model, there).to(wanted.device)
                np.add.at(total, items, weight * label_kl(wanted, got).double().cpu().numpy())
    return [total / np.where(mass > 0, mass, 1.0) for total in found]


def item_means(of: Predictions, values: Floats) -> Floats:
    """The weighted mean over each item's scored tokens, `item` float64; 0 for an item whose weights are all 0."""
    return np.array([0.0 if mean is None else mean for mean in of.means(values)])
