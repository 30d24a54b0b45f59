"""Model utility: one number for what a model still knows, low as soon as any part of it is.

Paper: Maini et al. 2024, TOFU: A Task of Fictitious Unlearning for LLMs (arXiv:2401.06121), section 2.2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from locate_edit.errors import PromptError
from locate_edit.metrics.statistic import Statistic
from locate_edit.metrics.values import Floats, Values

__all__ = ["model_utility"]


def model_utility(parts: Mapping[str, Sequence[Values]]) -> Statistic:
    """Harmonic mean of the averages of several metrics on several sets; TOFU's has three of each.

        model_utility({
            "retain": (likelihood(p), rouge(p), truth_ratio(p_paraphrased, aggregate="better")),
            "real authors": (normalised_probability(a), rouge(a), truth_ratio(a, aggregate="better")),
            "world facts": (normalised_probability(w), rouge(w), truth_ratio(w, aggregate="better")),
        })

    Every metric goes from 0 to 1 and up, and is averaged over the items it could score. 0 as soon as one average is 0.
    Withheld if any of them is. The interval draws items of each set, with all metrics that have the same items; others
    are drawn by themselves, and the note says so.

    Direction: up, more useful.
    Needs: each of the averages.
    Cost: none beyond its values.

    Args:
        parts: values by set.

    Raises:
        PromptError: no values, values outside 0 to 1, or such that a smaller one is better.
    """
    flat = [values for several in parts.values() for values in several]
    if not flat:
        raise PromptError("model utility needs one metric on one set at least, got none.")
    samples: list[Floats] = []
    notes = []
    for name, several in parts.items():
        for values in several:
            if values.withheld:
                reason = f"{values.name} on {name}: {values.withheld}"
                return Statistic.none("model_utility", reason, unit="harmonic mean")
            _check(name, values)
        together = _alike(several)
        samples += [np.stack([values.values for values in group], axis=1) for group in together]
        notes += [f"{values.name} on {name}: {values.note}" for values in several if values.note]
        if len(together) > 1:
            counts = (
                f"{' and '.join(v.name for v in group)} of {len(group[0])}" for group in together
            )
            notes.append(f"{name}: {', '.join(counts)} items")
    return Statistic(
        "model_utility",
        tuple(samples),
        _harmonic_mean,
        "harmonic mean",
        "up",
        note="; ".join(notes),
    )


def _check(name: str, values: Values) -> None:
    each = values.each
    # Rounding may lift a probability of one above it.
    if (
        values.direction != "up"
        or values.scale != "plain"
        or each.min() < 0
        or each.max() > 1 + 1e-6
    ):
        raise PromptError(
            f"model utility: {values!r} on {name}: expected values from 0 to 1, of which a larger one is better, "
            f"got values from {each.min():.4g} to {each.max():.4g}, direction {values.direction!r}. The truth ratio "
            "goes in as aggregate='better'."
        )


def _alike(several: Sequence[Values]) -> list[list[Values]]:
    """The values of one set in groups of the same items."""
    groups: dict[bytes, list[Values]] = {}
    for values in several:
        groups.setdefault(values.items.tobytes(), []).append(values)
    return list(groups.values())


def _harmonic_mean(*samples: Floats) -> float:
    means = np.concatenate([sample.mean(axis=0) for sample in samples])
    return 0.0 if (means <= 0).any() else float(len(means) / (1.0 / means).sum())
