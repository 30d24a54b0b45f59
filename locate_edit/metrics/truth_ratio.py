"""Truth ratio: how probable wrong answers are beside the right one.

Paper: Maini et al. 2024, TOFU: A Task of Fictitious Unlearning for LLMs (arXiv:2401.06121), section 2.2.2.

For a right answer with mean log-probability a token log P and wrong ones with log W_1..W_n,

    R = mean_j W_j / P        below 1 if the model takes the right answer for the more probable

TOFU scores a *paraphrase* of the right answer, so that verbatim memory of its wording does not count: give prompts
whose target is the paraphrase (`locate_edit.datasets.tofu.prompts(..., answer="paraphrased_answer")`).

The paper prints the arithmetic mean of the W_j; its code, all published numbers and open-unlearning take the geometric
one (losses are averaged before exp), which is the default here. On the same model the two differ much: 0.52 against
0.53 for the forget set of a Llama-2-7B trained on all of TOFU, but 0.60 against 0.51 for its real authors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from locate_edit.errors import PromptError
from locate_edit.metrics.compat import check_compat
from locate_edit.metrics.predictions import Predictions, Wrong
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import PromptSet

__all__ = ["from_losses", "truth_ratio", "wrong_losses"]

Aggregate = Literal["ratio", "closer", "better", "share"]
Mean = Literal["geometric", "arithmetic"]
Compat = Literal["open-unlearning", "tofu"]

_UNITS: dict[str, str] = {
    "ratio": "wrong over right",
    "closer": "min(R, 1/R)",
    "better": "max(0, 1 - R)",
    "share": "1 / (1 + R)",
}
_NEEDS = "a right answer and one wrong answer at least ('wrong')"
GUARD = 1e-10
"""What open-unlearning adds to denominators."""


def truth_ratio(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    aggregate: Aggregate = "ratio",
    mean: Mean = "geometric",
    compat: Compat | None = None,
) -> Values:
    """Truth ratio R, the length-normalised probability of wrong answers over that of the right one; 1 if it cannot
    tell.

    | aggregate | value of an item | direction | used |
    |---|---|---|---|
    | ratio | R; the average is its geometric mean over items | down | for forget quality |
    | closer | min(R, 1/R), 1 where wrong and right are alike | down | TOFU, forget set |
    | better | max(0, 1 - R), 0 where wrong ones are as probable | up | TOFU, retain set, real authors, world facts |
    | share | 1 / (1 + R), the right answer's share | up | open-unlearning, "prob_mean" |

    "closer" also falls when wrong answers become *more* probable than the right one. Token weights enter the right
    answer alone.

    Direction: down, better known; up for "better" and "share".
    Needs: a right answer with a scored token of non-zero weight, and wrong answers (`wrong`).
    Cost: shared forward, and one of each wrong answer.

    Args:
        predictions: predictions, or a model; TOFU's targets are paraphrases of the answers.
        prompts: the prompts, with a model.
        aggregate: what becomes of R.
        mean: of the wrong answers' probabilities; "arithmetic" is what the paper prints, and nobody computes.
        compat: "open-unlearning" adds 1e-10 to every denominator, which tells where probabilities vanish; "tofu" is the
            plain definition, and has no "share".

    Raises:
        PromptError: an unknown setting, or one that the toolkit lacks.
    """
    predictions = Predictions.of(predictions, prompts)
    right = predictions.means(-predictions.logprob)
    wrong = [np.zeros(0)] * len(right)
    if any(row.get("wrong") for row in predictions.prompts.rows):
        wrong = wrong_losses(predictions.wrong, len(right))
    return from_losses(right, wrong, aggregate=aggregate, mean=mean, compat=compat)


def from_losses(
    right: Sequence[float | None] | Floats,
    wrong: Sequence[Sequence[float] | Floats],
    *,
    aggregate: Aggregate = "ratio",
    mean: Mean = "geometric",
    compat: Compat | None = None,
) -> Values:
    """Truth ratios from losses in nats a token, such as those of a published log.

    Args:
        right: mean loss of each item's right answer, `item`; None for an item without any.
        wrong: mean losses of its wrong answers, `item wrong`; items may have different numbers of them.
        aggregate: as for `truth_ratio`.
        mean: as for `truth_ratio`.
        compat: as for `truth_ratio`.

    Raises:
        PromptError: another number of right answers than of items with wrong ones, or an unknown setting.
    """
    if len(right) != len(wrong):
        raise PromptError(
            f"truth ratio: expected wrong answers for each of {len(right)} items, got {len(wrong)}."
        )
    if aggregate not in _UNITS or mean not in ("geometric", "arithmetic"):
        raise PromptError(
            f"truth ratio: expected aggregate among {', '.join(_UNITS)} and mean 'geometric' or 'arithmetic', "
            f"got {aggregate!r} and {mean!r}."
        )
    check_compat("truth ratio", compat, get_args(Compat))
    if compat == "tofu" and aggregate == "share":
        raise PromptError("truth ratio: TOFU has no aggregate 'share'; open-unlearning has.")
    guard = GUARD if compat == "open-unlearning" else 0.0
    found = [
        _value(float(loss), np.asarray(others, np.float64), aggregate, mean, guard)
        if len(others) and loss is not None
        else None
        for loss, others in zip(right, wrong, strict=True)
    ]
    name = "truth_ratio" if aggregate == "ratio" else f"truth_ratio_{aggregate}"
    return Values.make(
        name,
        found,
        unit=_UNITS[aggregate],
        direction="down" if aggregate in ("ratio", "closer") else "up",
        precondition=_NEEDS,
        scale="exp" if aggregate == "ratio" else "plain",
    )


def wrong_losses(wrong: Wrong, n_items: int) -> list[Floats]:
    """Mean loss of each wrong answer, gathered by item: `item` arrays of `wrong` (nats a token)."""
    each = np.array([-part.mean() for part in wrong.predictions.split(wrong.predictions.logprob)])
    places: NDArray[np.int64] = np.searchsorted(wrong.of, np.arange(n_items + 1))
    return [each[a:b] for a, b in pairwise(places)]


def _value(right: float, wrong: Floats, aggregate: Aggregate, mean: Mean, guard: float) -> float:
    """One item's value; for "ratio" its logarithm."""
    if np.isnan(right) or np.isnan(wrong).any():
        return float("nan")
    if mean == "geometric":
        log_wrong = -float(wrong.mean())
    else:
        log_wrong = float(np.logaddexp.reduce(-wrong)) - float(np.log(len(wrong)))
    log_guard = np.log(guard) if guard else -np.inf
    if aggregate == "share":
        whole = float(np.logaddexp(np.logaddexp(-right, log_wrong), log_guard))
        return float(np.exp(-right - whole))
    log_ratio = log_wrong - float(np.logaddexp(-right, log_guard))
    if aggregate == "ratio":
        return log_ratio
    if aggregate == "closer":
        inverse = -float(np.logaddexp(log_ratio, log_guard))
        return float(np.exp(min(log_ratio, inverse)))
    return float(max(0.0, -np.expm1(log_ratio)))
