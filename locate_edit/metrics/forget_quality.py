"""Forget quality: whether truth ratios can be told from those of a model that never learned.

Paper: Maini et al. 2024, TOFU: A Task of Fictitious Unlearning for LLMs (arXiv:2401.06121), section 2.2.2.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.stats import ks_2samp

from locate_edit.errors import PromptError
from locate_edit.metrics.statistic import Statistic, StatisticDirection
from locate_edit.metrics.values import Floats, Values

__all__ = ["forget_quality"]

# Below this p-value two models are told apart.
_TOLD_APART = 0.05


def forget_quality(
    edited: Values,
    oracle: Values,
    *,
    before: Values | None = None,
    report: Literal["p", "distance"] = "p",
) -> Statistic:
    """p-value of the two-sample Kolmogorov-Smirnov test that the edited model's truth ratios are distributed as those
    of the oracle, a model retrained without the forget set.

    Near 1: the test cannot tell them apart; near 0: they differ, *whether too little was forgotten or too much*. It
    compares distributions, not items, and any increasing function of the ratio gives the same number. It falls with
    the number of items, so compare it on the same ones, or report "distance", the largest difference D between the two
    cumulative distributions (0 to 1). No interval: a bootstrap of a p-value means nothing.

    Direction: closeness to the oracle; distance with `report="distance"`.
    Needs: an oracle, and with `before` a model before the edit that the test tells from it.
    Cost: none beyond its values.

    Args:
        edited: values of `truth_ratio` (aggregate "ratio" or "share") on the forget set.
        oracle: those of the oracle on the same prompts.
        before: those of the model before the edit. The number is withheld where the test cannot tell them from the
            oracle's in the first place, for then nothing had to be forgotten.
        report: "p" or "distance".

    Raises:
        PromptError: values of different metrics, of other items, or of an aggregate that is not increasing.
    """
    for values in (oracle, before):
        if values is not None and values.name != edited.name:
            raise PromptError(
                f"forget quality compares like with like: expected {edited.name!r}, got {values.name!r}."
            )
    if edited.name.endswith(("_closer", "_better")):
        raise PromptError(
            f"forget quality needs truth ratios as they are, got {edited.name!r}, which folds or clips them. "
            "Use truth_ratio(..., aggregate='ratio')."
        )
    name = "forget_quality" if report == "p" else "forget_quality_distance"
    unit = "p-value" if report == "p" else "KS distance"
    direction: StatisticDirection = "closeness" if report == "p" else "distance"
    given = [values for values in (edited, oracle, before) if values is not None]
    for values in given:
        if values.withheld:
            return Statistic.none(name, values.withheld, unit=unit, direction=direction)
        if not np.array_equal(values.items, edited.items):
            raise PromptError(f"{values!r} and {edited!r} belong to different items.")
    if before is not None and (p := _p_value(before.values, oracle.values)) > _TOLD_APART:
        reason = (
            "needs: a model before the edit whose truth ratios the test tells from the oracle's; "
            f"here p = {p:.2g}"
        )
        return Statistic.none(name, reason, unit=unit, direction=direction)
    return Statistic(
        name,
        (edited.values, oracle.values),
        _p_value if report == "p" else _distance,
        unit,
        direction,
        resampled=False,
        note=f"KS distance {_distance(edited.values, oracle.values):.3f}" if report == "p" else "",
    )


def _p_value(one: Floats, other: Floats) -> float:
    return float(ks_2samp(one, other).pvalue)


def _distance(one: Floats, other: Floats) -> float:
    return float(ks_2samp(one, other).statistic)
