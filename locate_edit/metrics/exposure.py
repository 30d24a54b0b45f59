"""Exposure of digit secrets: how much of the guessing of a number the model saves.

Papers: Carlini et al. 2019, "The secret sharer" (exposure = log2 |R| - log2 rank); Wu et al. 2023, "DEPN" (the
estimator from single digits).

The digits of an item are its scored tokens that are single digits; separators do not count, nor do tokens of weight
0, so a token mask can leave out a prefix that everybody shares. Every digit is predicted with the true tokens around
it given: those before it (causal) or all others (masked). Needs targets with digits and a tokenizer with one token a
digit: an item with a longer token that holds a digit ("123") has no number, for a part of the secret would not count.
"""

from __future__ import annotations

import string
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import PromptSet

__all__ = ["digit_accuracy", "exposure"]

# Two halves of six digits are a million sums each; longer secrets would need more than a few megabytes.
_MOST_DIGITS = 12
_NEEDS = "digits among the scored tokens, one token a digit"


def exposure(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    estimator: Literal["rank", "depn"] = "rank",
) -> Values:
    """Exposure of the digits of each target in bits; log2(10) a digit is full exposure, about 1.4 a guess.

    exposure = d log2(10) - log2 rank for d digits, where rank counts from 1 the strings of d digits that the model
    ranks at least as high as the true one:

    - "rank": strings are ranked by the product of the model's digit probabilities at each place, normalised over the
      ten digits, the true digits around each place given. The count is exact. It treats the places as independent,
      which spares the 10^d forward passes of the literal definition. A never-seen number has rank uniform on
      1..10^d, so 1/ln 2 = 1.44 bits on average.
    - "depn": rank = 1 + sum_i r_i 10^(d-i) with r_i the 0-based rank of the i-th digit among the ten. It is decided
      by the leading digits: an unsure first digit costs all bits but 3.3, an unsure last one nothing. Kept for
      comparison with that paper.

    Report `digit_accuracy` beside it. Averaged over items.

    Direction: up, better known.
    Needs: digits among the scored tokens, one token a digit (at most 12 for "rank").
    Cost: shared forward.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        estimator: how the rank is found. "rank" needs at most 12 digits.
    """
    predictions = Predictions.of(predictions, prompts)
    needs = _NEEDS + (f", at most {_MOST_DIGITS} of them" if estimator == "rank" else "")
    values: list[float | None] = []
    for true, logprob in _by_item(predictions):
        n_digits = len(true)
        if n_digits == 0 or (estimator == "rank" and n_digits > _MOST_DIGITS):
            values.append(None)
            continue
        if not _finite(true, logprob):
            values.append(np.nan)
            continue
        rank = _depn_rank(true, logprob) if estimator == "depn" else _product_rank(true, logprob)
        values.append(n_digits * float(np.log2(10.0)) - float(np.log2(rank)))
    return Values.make("exposure", values, unit="bits", direction="up", precondition=needs)


def digit_accuracy(
    predictions: Predictions | nn.Module, prompts: PromptSet | None = None
) -> Values:
    """Fraction of a target's digits that rank first among the ten digits; 0.1 is a guess.

    Averaged over items. The companion of `exposure`, which hides whether one digit or all are lost.

    Direction: up, better known.
    Needs: digits among the scored tokens, one token a digit.
    Cost: shared forward.
    """
    predictions = Predictions.of(predictions, prompts)
    values: list[float | None] = []
    for true, logprob in _by_item(predictions):
        if len(true) == 0:
            values.append(None)
        else:
            right = float(np.mean(_ranks(true, logprob) == 0))
            values.append(right if _finite(true, logprob) else np.nan)
    return Values.make(
        "digit_accuracy", values, unit="fraction of digits", direction="up", precondition=_NEEDS
    )


def _by_item(predictions: Predictions) -> list[tuple[NDArray[np.int64], Floats]]:
    """Each item's true digits `digit` and log-probabilities `digit 10`, digits of weight 0 left out.

    Both are empty for an item with digits in longer tokens.
    """
    digits = predictions.digits
    longer = _with_digits(predictions)
    longer[digits.label] = False
    unseen = set(predictions.item[longer & (predictions.weight > 0)].tolist())
    counted = predictions.weight[digits.label] > 0
    label, value, logprob = digits.label[counted], digits.value[counted], digits.logprob[counted]
    bounds = [predictions.of_item(i) for i in range(len(predictions))]
    picks = [
        np.flatnonzero((label >= b.start) & (label < b.stop) & (index not in unseen))
        for index, b in enumerate(bounds)
    ]
    return [(value[pick], logprob[pick]) for pick in picks]


def _with_digits(predictions: Predictions) -> NDArray[np.bool_]:
    """Which scored tokens hold a digit, alone or among other characters, `label`."""
    different, where = np.unique(predictions.label, return_inverse=True)
    texts = predictions.prompts.tokenizer.batch_decode(
        [[token] for token in different.tolist()], skip_special_tokens=True
    )
    has = np.array([any(letter in string.digits for letter in text) for text in texts], dtype=bool)
    return has[where]


def _finite(true: NDArray[np.int64], logprob: Floats) -> bool:
    """Whether every true digit has a log-probability, with which the others can be compared."""
    own = logprob[np.arange(len(true)), true]
    return bool(np.isfinite(own).all() and not np.isnan(logprob).any())


def _ranks(true: NDArray[np.int64], logprob: Floats) -> NDArray[np.int64]:
    """How many of the other nine digits are more probable than the true one, at each place: `digit`."""
    own = logprob[np.arange(len(true)), true]
    return np.asarray((logprob > own[:, None]).sum(axis=1), dtype=np.int64)


def _depn_rank(true: NDArray[np.int64], logprob: Floats) -> int:
    """1 + sum_i r_i 10^(d-i), in exact integers."""
    rank = 0
    for place in _ranks(true, logprob):
        rank = rank * 10 + int(place)
    return rank + 1


def _product_rank(true: NDArray[np.int64], logprob: Floats) -> int:
    """1 + the number of digit strings with a larger product of probabilities than the true one, in exact integers.

    Meet in the middle: the log-probabilities of all strings of the first half of the places and of the second are
    sorted, and for each of the first a binary search counts the second ones that lift the sum over the true string's.
    """
    # Relative to the true digit the true string sums to zero, whatever the half it is cut into.
    relative = logprob - logprob[np.arange(len(true)), true][:, None]
    half = len(true) // 2
    left, right = _all_sums(relative[:half]), np.sort(_all_sums(relative[half:]))
    # Rounding must not let a string that ties with the true one count as larger.
    larger = len(right) - np.searchsorted(right, -left + 1e-9, side="right")
    return 1 + int(larger.sum())


def _all_sums(relative: Floats) -> Floats:
    """The sum over places for every digit string, `10**place`."""
    sums = np.zeros(1)
    for place in relative:
        sums = (sums[:, None] + place[None, :]).ravel()
    return sums
