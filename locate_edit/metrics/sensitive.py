"""Memorisation of the sensitive spans of a text alone: S-MA and S-EL.

Paper: Wang et al. 2024, Selective Forgetting: Advancing Machine Unlearning Techniques and Evaluation in Language Models
(arXiv:2402.05813). S-MA as there; S-EL is normalised so that 1 is reached exactly when every sensitive n-gram comes
back, which makes it comparable between texts with much and with little in spans.

Rows mark spans in the field `spans`; a token is sensitive if a span touches it.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from locate_edit.errors import PromptError
from locate_edit.metrics.memorization import continuations
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet
from locate_edit.sampling import LOST

__all__ = ["sensitive_extraction_likelihood", "sensitive_memorization"]


def sensitive_memorization(
    predictions: Predictions | nn.Module, prompts: PromptSet | None = None
) -> Values:
    """S-MA, the fraction of sensitive tokens that greedy decoding gets right with the true ones before them given.

    sum over t in S of 1{argmax p(. | c, x_<t) = x_t} / |S| with S the scored tokens inside spans, averaged over items.
    Token weights play no part.

    Direction: up, better known.
    Needs: a scored token inside a span (`spans`).
    Cost: shared forward.
    """
    predictions = Predictions.of(predictions, prompts)
    values: list[float | None] = []
    for index in range(len(predictions)):
        inside = np.array(predictions.prompts.sensitive(index), dtype=bool)
        right = predictions.correct[predictions.of_item(index)]
        values.append(float(right[inside].mean()) if inside.any() else None)
    return Values.make(
        "sensitive_memorization",
        values,
        unit="fraction of sensitive tokens",
        direction="up",
        precondition="a scored token inside a span ('spans')",
    )


def sensitive_extraction_likelihood(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    n: int = 2,
    stride: int = 1,
) -> Values:
    """S-EL_n, the share of the sensitive n-grams still to come that greedy continuations of every prefix give away.

    For each prefix x_<t with a sensitive n-gram (all n tokens inside spans) in the rest x_>=t: the fraction of those
    n-grams, each place counted, that occur anywhere in the continuation f(c, x_<t), which is as long as the rest. The
    mean over these prefixes, then over items. Token weights play no part.

    Direction: up, better known.
    Needs: a causal model, and a span of n scored tokens (`spans`).
    Cost: shared forward, and greedy generation to the target's end from each wrong token.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        n: length of the n-grams (tokens).
        stride: use every stride-th prefix only (prefixes).

    Raises:
        PromptError: `n` or `stride` is below 1.
    """
    if n < 1 or stride < 1:
        raise PromptError(f"n and stride must be at least 1, got n={n} and stride={stride}.")
    predictions = Predictions.of(predictions, prompts)
    name, unit = f"sensitive_extraction_likelihood_{n}", "fraction of sensitive n-grams"
    if predictions.masked:
        return Values.none(name, "needs: a causal model", unit=unit)
    texts = [predictions.prompts.target_ids(index) for index in range(len(predictions))]
    places: list[list[int]] = []  # where the sensitive n-grams of each item begin
    for index, text in enumerate(texts):
        inside = predictions.prompts.sensitive(index)
        places.append([j for j in range(len(text) - n + 1) if all(inside[j : j + n])])
    starts = [list(range(0, max(found) + 1, stride)) if found else [] for found in places]
    rests = continuations(predictions, starts)
    values: list[float | None] = []
    for index, (text, found) in enumerate(zip(texts, places, strict=True)):
        shares = []
        for start in starts[index]:
            said = rests[index, start]
            if LOST in said:
                shares.append(np.nan)
                continue
            given = {tuple(said[i : i + n]) for i in range(len(said) - n + 1)}
            wanted = [tuple(text[j : j + n]) for j in found if j >= start]
            shares.append(sum(gram in given for gram in wanted) / len(wanted))
        values.append(float(np.mean(shares)) if shares else None)
    return Values.make(
        name,
        values,
        unit=unit,
        direction="up",
        precondition=f"{n} scored tokens in a row inside spans ('spans')",
    )
