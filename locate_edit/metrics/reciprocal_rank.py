"""Mean reciprocal rank: how high the true tokens stand among all tokens of the vocabulary.

Paper: Wu et al. 2023, DEPN: Detecting and Editing Privacy Neurons in Pretrained Language Models (arXiv:2310.20138),
which measures names by it (its table shows values above 1, which the definition cannot give).
"""

from __future__ import annotations

import numpy as np
from torch import nn

from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import PromptSet

__all__ = ["reciprocal_rank"]


def reciprocal_rank(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    sensitive: bool = False,
) -> Values:
    """Mean of 1 / rank of the target's tokens, rank 1 being the most probable token; 1 if all of them are.

    Weighted by the token weights, averaged over items. A token that ties with others has the best of their ranks.

    Direction: up, better known.
    Needs: a scored token of non-zero weight, with `sensitive` inside a span (`spans`).
    Cost: shared forward.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        sensitive: take the tokens inside spans alone (names in a sentence, say).
    """
    predictions = Predictions.of(predictions, prompts)
    reciprocal = 1.0 / (predictions.rank + 1)
    values = predictions.means(reciprocal)
    if sensitive:
        values = [_inside(predictions, index, reciprocal) for index in range(len(predictions))]
    return Values.make(
        "reciprocal_rank",
        values,
        unit="1 / rank",
        direction="up",
        precondition="a scored token of non-zero weight" + (" inside a span" if sensitive else ""),
    )


def _inside(predictions: Predictions, index: int, array: Floats) -> float | None:
    """The weighted mean of an array over the scored tokens of an item that are inside spans."""
    where = predictions.of_item(index)
    inside = np.array(predictions.prompts.sensitive(index), dtype=np.float64)
    weight = predictions.weight[where] * inside
    return float(weight @ array[where] / weight.sum()) if weight.any() else None
