"""How probable the model finds the targets.

| metric | definition, per item with scored tokens x_1..x_T | range | the better it knows the text |
|---|---|---|---|
| likelihood | exp(mean_t log p(x_t)), the geometric mean of the token probabilities | 0 to 1 | up |
| probability | exp(sum_t log p(x_t)), of the target as a whole | 0 to 1 | up |
| nll | -mean_t log p(x_t) | nats a token | down |

p is the model's probability of the token with what stands before it given (causal), or with all other tokens given
(masked). Token weights enter the means and sums. All three average over items with equal weight; they have no
precondition.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet

__all__ = ["likelihood", "nll", "probability"]

_WEIGHTED = "at least one scored token of non-zero weight"


def likelihood(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """Length-normalised probability of the target, the geometric mean of its tokens' probabilities; 1 is certainty.

    exp of the mean log-probability of the scored tokens, averaged over items: the "probability" of open-unlearning
    and TOFU. Targets of different lengths compare, other than by `probability`.
    """
    predictions = Predictions.of(predictions, prompts)
    values = [_ratio(np.exp, total, mass) for total, mass in _sums(predictions)]
    return Values.make(
        "likelihood", values, unit="probability", direction="up", precondition=_WEIGHTED
    )


def probability(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """Probability of the whole target; 1 is certainty.

    exp of the summed log-probability of the scored tokens, averaged over items. It falls with the length of a target
    even where the model knows it well. For masked models the product of the single tokens' probabilities, each with
    the others visible (a pseudo-likelihood).
    """
    predictions = Predictions.of(predictions, prompts)
    values = [_ratio(np.exp, total, 1.0 if mass else 0.0) for total, mass in _sums(predictions)]
    return Values.make(
        "probability", values, unit="probability", direction="up", precondition=_WEIGHTED
    )


def nll(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """Negative log-likelihood of the target in nats a token; 0 is certainty.

    Minus the mean log-probability of the scored tokens, averaged over items (not over tokens: `perplexity` does
    that).
    """
    predictions = Predictions.of(predictions, prompts)
    values = [_ratio(np.negative, total, mass) for total, mass in _sums(predictions)]
    return Values.make("nll", values, unit="nats a token", direction="down", precondition=_WEIGHTED)


def _sums(predictions: Predictions) -> list[tuple[float, float]]:
    """Weighted sum of the log-probabilities and sum of the weights of each item."""
    weights = predictions.split(predictions.weight)
    logprobs = predictions.split(predictions.logprob)
    return [(float(w @ lp), float(w.sum())) for w, lp in zip(weights, logprobs, strict=True)]


def _ratio(transform: np.ufunc, total: float, mass: float) -> float | None:
    """`transform(total / mass)`, or None where there is no mass."""
    return float(transform(total / mass)) if mass else None
