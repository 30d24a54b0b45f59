"""How probable the model finds the targets.

| metric | definition, per item with scored tokens x_1..x_T | range | the better it knows the text |
|---|---|---|---|
| likelihood | exp(mean_t log p(x_t)), the geometric mean of the token probabilities | 0 to 1 | up |
| probability | exp(sum_t log p(x_t)), of the target as a whole | 0 to 1 | up |
| nll | -mean_t log p(x_t) | nats a token | down |
| normalised_probability | P / (P + sum_j W_j), likelihoods of the target and of wrong answers | 0 to 1 | up |

p is the model's probability of the token with what stands before it given (causal), or with all other tokens given
(masked). Token weights enter the means and sums. All average over items with equal weight; only the last has a
precondition, wrong answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
from torch import nn

from locate_edit.metrics.compat import check_compat
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.truth_ratio import GUARD, Compat, wrong_losses
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import PromptSet

__all__ = ["likelihood", "nll", "normalised_from_losses", "normalised_probability", "probability"]

_WEIGHTED = "at least one scored token of non-zero weight"


def likelihood(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """Length-normalised probability of the target, the geometric mean of its tokens' probabilities; 1 is certainty.

    exp of the mean log-probability of the scored tokens, averaged over items: the "probability" of open-unlearning
    and TOFU. Targets of different lengths compare, other than by `probability`.

    Direction: up, better known.
    Needs: a scored token of non-zero weight.
    Cost: shared forward.
    """
    predictions = Predictions.of(predictions, prompts)
    values = [None if mean is None else math.exp(mean) for mean in _means(predictions)]
    return Values.make(
        "likelihood", values, unit="probability", direction="up", precondition=_WEIGHTED
    )


def probability(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """Probability of the whole target; 1 is certainty.

    exp of the summed log-probability of the scored tokens, averaged over items. It falls with the length of a target
    even where the model knows it well. For masked models the product of the single tokens' probabilities, each with
    the others visible (a pseudo-likelihood).

    Direction: up, better known.
    Needs: a scored token of non-zero weight.
    Cost: shared forward.
    """
    predictions = Predictions.of(predictions, prompts)
    values = [
        None if mean is None else math.exp(mean * mass)
        for mean, mass in zip(_means(predictions), predictions.mass.tolist(), strict=True)
    ]
    return Values.make(
        "probability", values, unit="probability", direction="up", precondition=_WEIGHTED
    )


def nll(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """Negative log-likelihood of the target in nats a token; 0 is certainty.

    Minus the mean log-probability of the scored tokens, averaged over items (not over tokens: `perplexity` does
    that).

    Direction: down, better known.
    Needs: a scored token of non-zero weight.
    Cost: shared forward.
    """
    predictions = Predictions.of(predictions, prompts)
    values = [None if mean is None else -mean for mean in _means(predictions)]
    return Values.make("nll", values, unit="nats a token", direction="down", precondition=_WEIGHTED)


def normalised_probability(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    compat: Compat | None = None,
) -> Values:
    """The target's share of the length-normalised probability of all answers, right and wrong; 1 is certainty.

    P / (P + sum_j W_j) with P and W_j exp of the mean log-probability a token: TOFU's "probability" on real authors
    and world facts. With n wrong answers 1 / (1 + n) is a guess. Averaged over items.

    Direction: up, better known.
    Needs: rows with wrong answers (`wrong`).
    Cost: shared forward, and one of each wrong answer.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        compat: "open-unlearning" adds 1e-10 to the denominator, which tells where probabilities vanish; "tofu" is the
            plain definition.

    Raises:
        PromptError: another toolkit.
    """
    predictions = Predictions.of(predictions, prompts)
    losses = [None if mean is None else -mean for mean in _means(predictions)]
    wrong: list[Floats] = [np.zeros(0)] * len(losses)
    if any(row.get("wrong") for row in predictions.prompts.rows):
        wrong = wrong_losses(predictions.wrong, len(losses))
    return normalised_from_losses(losses, wrong, compat=compat)


def normalised_from_losses(
    right: Sequence[float | None] | Floats,
    wrong: Sequence[Sequence[float] | Floats],
    *,
    compat: Compat | None = None,
) -> Values:
    """`normalised_probability` from losses in nats a token: right ones `item`, wrong ones `item wrong`.

    Raises:
        PromptError: as `normalised_probability`.
    """
    check_compat("normalised probability", compat, get_args(Compat))
    guard = [-float(np.log(GUARD))] if compat == "open-unlearning" else []

    def share(loss: float, others: Sequence[float] | Floats) -> float:
        every = -np.array([loss, *others, *guard], np.float64)
        if np.isnan(every).any():
            return float("nan")
        return float(np.exp(-loss - float(np.logaddexp.reduce(every))))

    values = [
        share(float(loss), others) if len(others) and loss is not None else None
        for loss, others in zip(right, wrong, strict=True)
    ]
    return Values.make(
        "normalised_probability",
        values,
        unit="probability",
        direction="up",
        precondition="a wrong answer at least ('wrong')",
    )


def _means(predictions: Predictions) -> list[float | None]:
    """Mean log-probability a token of each item."""
    return predictions.means(predictions.logprob)
