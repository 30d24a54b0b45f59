"""How an item's perplexity differs from that under another model: LPD and PDLP.

Paper: Wang et al. 2023, KGA: A General Machine Unlearning Framework Based on Knowledge Gap Alignment
(arXiv:2305.06535).

The other model is the `reference` of `Predictions(model, prompts, reference=...)`: a retrained one for LPD, the one
before the edit for PDLP. `evaluate` gives the oracle, which makes `perplexity_rose` the fraction of items less well
known than by a model that never learned them: forgotten too far.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Direction, Values
from locate_edit.prompts import PromptSet

__all__ = ["perplexity_rose", "perplexity_shift"]


def perplexity_shift(
    predictions: Predictions | nn.Module, prompts: PromptSet | None = None
) -> Values:
    """LPD, the relative difference between an item's perplexity and that under the reference; 0 if they are equal.

    |ppl - ppl_reference| / ppl_reference with ppl = exp(mean loss of the scored tokens), averaged over items, of which
    a few very surprising ones may dominate. Withheld where one of them rises beyond what a number can hold (by 709
    nats a token).

    Direction: distance from the reference.
    Needs: a reference, `Predictions(model, prompts, reference=...)`.
    Cost: shared forward, and one of the reference.
    """
    return _compared(
        Predictions.of(predictions, prompts),
        "perplexity_shift",
        lambda rise: float(abs(np.expm1(rise))),
        unit="fraction of the reference's",
    )


def perplexity_rose(
    predictions: Predictions | nn.Module, prompts: PromptSet | None = None
) -> Values:
    """PDLP, the fraction of items whose perplexity is higher than under the reference, the model before the edit.

    By how much plays no part: any noise makes it 0.5 on average.

    Direction: down, better known.
    Needs: a reference, `Predictions(model, prompts, reference=...)`.
    Cost: shared forward, and one of the reference.
    """
    return _compared(
        Predictions.of(predictions, prompts),
        "perplexity_rose",
        lambda rise: rise if np.isnan(rise) else float(rise > 0),
        unit="fraction of items",
    )


def _compared(
    predictions: Predictions, name: str, of: Callable[[float], float], *, unit: str
) -> Values:
    """`of` the difference of the mean losses of each item."""
    direction: Direction = "distance" if name == "perplexity_shift" else "down"
    if predictions.reference is None:
        reason = "needs: a reference model, Predictions(model, prompts, reference=...)"
        return Values.none(name, reason, unit=unit, direction=direction)
    rises = predictions.means(predictions.reference_logprob - predictions.logprob)
    with np.errstate(over="ignore"):
        values = [None if rise is None else of(rise) for rise in rises]
    return Values.make(
        name,
        values,
        unit=unit,
        direction=direction,
        precondition="at least one scored token of non-zero weight",
    )
