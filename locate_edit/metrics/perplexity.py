"""Perplexity: into how many equally likely tokens the model's surprise translates."""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import nn

from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet

__all__ = ["perplexity"]


def perplexity(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    average: Literal["token", "item"] = "token",
) -> Values:
    """Perplexity of the scored tokens; 1 is certainty, the size of the vocabulary is a uniform guess.

    exp of the mean negative log-likelihood over *all scored tokens of the set*, so that long items count for more,
    as is usual for text. `average="item"` gives the mean over items of each item's own perplexity instead, as KGA's
    scores use it; a few very surprising items dominate that one. For masked models this is the pseudo-perplexity,
    with no random masks to draw: every token is hidden once. An item of more than 709 nats a token has an infinite
    perplexity, and the mean over items is withheld.

    Direction: down, better known.
    Needs: a scored token of non-zero weight.
    Cost: shared forward.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        average: "token" or "item".
    """
    predictions = Predictions.of(predictions, prompts)
    means = predictions.means(-predictions.logprob)
    needs = "at least one scored token of non-zero weight"
    if average == "item":
        with np.errstate(over="ignore"):  # above 709 nats a token it is infinite
            each = [None if mean is None else float(np.exp(mean)) for mean in means]
        return Values.make("perplexity", each, unit="tokens", direction="down", precondition=needs)
    return Values.make(
        "perplexity",
        means,
        unit="tokens",
        direction="down",
        precondition=needs,
        weights=predictions.mass,
        scale="exp",
    )
