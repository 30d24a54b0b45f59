"""What rewriting a fact did: to its prompt, to other wordings, and to its neighbours.

Papers: Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv:2202.05262), section 3.3, for the
first three scores; Yao et al. 2023, Editing Large Language Models: Problems, Methods, and Opportunities
(arXiv:2305.13172), for reliability, generality and locality.

Rows (`locate_edit.datasets.counterfact`): the old answer is the target, the new one the first of `wrong`; `paraphrases`
are other prompts for the same fact, `neighbours` prompts about other subjects with the old answer. Answers are compared
by their mean log-probability a token, as ROME's code does.

| metric | prompts | an item counts if | range | after the edit |
|---|---|---|---|---|
| efficacy | the prompt | the new answer is more probable than the old one | 0 to 1 | up |
| paraphrase_success | paraphrases | the same | 0 to 1 | up |
| neighbourhood_success | neighbours | the old answer is more probable than the new one | 0 to 1 | as before |
| reliability | the prompt | share of the new answer's tokens that are the most probable | 0 to 1 | up |
| generality | paraphrases | the same | 0 to 1 | up |
| locality | neighbours | share of places where the most probable token is that of the model before | 0 to 1 | 1 |

Before an edit `efficacy` should be near 0, and `neighbourhood_success` near 1: measure it. On the same `Predictions`
all six together cost two forwards a prompt, paraphrase and neighbour, one with either answer, and one of the reference
a neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Literal

import numpy as np
from torch import nn

from locate_edit.errors import PromptError
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.statistic import Statistic
from locate_edit.metrics.values import Direction, Floats, Values, beats
from locate_edit.prompts import PromptSet

__all__ = [
    "edit_score",
    "efficacy",
    "generality",
    "locality",
    "neighbourhood_success",
    "paraphrase_success",
    "reliability",
]

_NEW = "a row whose 'wrong' begins with the new answer"


def efficacy(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    magnitude: bool = False,
) -> Values:
    """Efficacy, the fraction of facts whose new answer is more probable than the old one on the prompt itself.

    A tie counts half. With `magnitude` P(new) - P(old) instead, of length-normalised probabilities (-1 to 1).

    Direction: down, better known: the old answer is the target.
    Needs: the new answer first in `wrong`.
    Cost: shared forward, and one of each wrong answer.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        magnitude: by how much instead of how often.
    """
    predictions = Predictions.of(predictions, prompts)
    return _preference(predictions, "efficacy", None, "new", magnitude)


def paraphrase_success(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    magnitude: bool = False,
) -> Values:
    """Paraphrase score, the fraction of other wordings of a fact under which the new answer is more probable.

    As `efficacy`, averaged over a fact's paraphrases, then over facts.

    Direction: down, better known: the old answer is the target.
    Needs: the new answer first in `wrong`, and `paraphrases`.
    Cost: two forwards a prompt, one with either answer.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        magnitude: by how much instead of how often.
    """
    predictions = Predictions.of(predictions, prompts)
    return _preference(predictions, "paraphrase_success", "paraphrases", "new", magnitude)


def neighbourhood_success(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    magnitude: bool = False,
) -> Values:
    """Neighbourhood score, the fraction of prompts about other subjects under which their own (old) answer is still
    more probable than the new one.

    Averaged over a fact's neighbours, then over facts.

    Direction: up, better known.
    Needs: the new answer first in `wrong`, and `neighbours`.
    Cost: two forwards a prompt, one with either answer.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        magnitude: P(old) - P(new) instead.
    """
    predictions = Predictions.of(predictions, prompts)
    return _preference(predictions, "neighbourhood_success", "neighbours", "old", magnitude)


def reliability(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """Fraction of the new answer's tokens that are the most probable ones on the prompt itself, those before them
    given.

    Averaged over facts.

    Direction: down, better known: the old answer is the target.
    Needs: the new answer first in `wrong`.
    Cost: shared forward, and one of each wrong answer.
    """
    return _new_tokens(Predictions.of(predictions, prompts), "reliability", None)


def generality(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """Fraction of the new answer's tokens that are the most probable ones under other wordings.

    Averaged over a fact's paraphrases, then over facts.

    Direction: down, better known: the old answer is the target.
    Needs: the new answer first in `wrong`, and `paraphrases`.
    Cost: one forward a prompt, with the new answer.
    """
    return _new_tokens(Predictions.of(predictions, prompts), "generality", "paraphrases")


def locality(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """Fraction of places in answers about neighbours where the most probable token is that of the reference, the model
    before the edit.

    Averaged over a fact's neighbours, then over facts; 1 if nothing changed, right or wrong. `evaluate` gives the
    oracle as the reference: there it is the agreement with a model that never learned.

    Direction: up, nearer to the reference.
    Needs: a reference, the new answer first in `wrong`, and `neighbours`.
    Cost: one forward a prompt, and one of the reference.
    """
    predictions = Predictions.of(predictions, prompts)
    reference = predictions.reference
    if reference is None:
        reason = "needs: the model before the edit, Predictions(model, prompts, reference=...)"
        return Values.none("locality", reason, unit="fraction of tokens")

    def same(asked: Predictions) -> list[float]:
        before = Predictions(reference, asked.prompts, batch_size=asked.batch_size)
        alike = np.where(asked.broken | before.broken, np.nan, asked.top == before.top)
        return [float(part.mean()) for part in asked.split(alike)]

    values = _by_fact(predictions, "neighbours", same)
    return Values.make(
        "locality",
        values,
        unit="fraction of tokens",
        direction="up",
        precondition=_needs("neighbours"),
    )


def edit_score(efficacy: Values, paraphrase: Values, neighbourhood: Values) -> Statistic:
    """Harmonic mean of efficacy, paraphrase and neighbourhood scores: CounterFact's S, 0 as soon as one of them is.

    On the facts that all three have; the interval draws facts.

    Direction: down, better known: the old answers are the targets.
    Needs: facts with a new answer, paraphrases and neighbours.
    Cost: none beyond its values.

    Args:
        efficacy: values of `efficacy`.
        paraphrase: values of `paraphrase_success`.
        neighbourhood: values of `neighbourhood_success`.

    Raises:
        PromptError: other metrics than these, or magnitudes.
    """
    given = {
        "efficacy": efficacy,
        "paraphrase_success": paraphrase,
        "neighbourhood_success": neighbourhood,
    }
    for name, values in given.items():
        if values.withheld:
            reason = f"{name}: {values.withheld}"
            return Statistic.none("edit_score", reason, unit="harmonic mean", direction="down")
        if values.name != name:
            raise PromptError(f"edit score: expected values of {name}, got {values!r}.")
    first, second, third = given.values()
    shared = np.intersect1d(np.intersect1d(first.items, second.items), third.items)
    if not len(shared):
        reason = "needs: facts with a new answer, paraphrases and neighbours"
        return Statistic.none("edit_score", reason, unit="harmonic mean", direction="down")
    columns = [v.values[np.searchsorted(v.items, shared)] for v in given.values()]
    return Statistic("edit_score", (np.stack(columns, axis=1),), _harmonic, "harmonic mean", "down")


def _preference(
    predictions: Predictions,
    name: str,
    field: str | None,
    winner: Literal["new", "old"],
    magnitude: bool,
) -> Values:
    """How often, or by how much, one answer is more probable than the other on the prompts of `field`."""

    def each(asked: Predictions) -> list[float]:
        found = []
        news = _first(asked, _means(asked.wrong.predictions))
        for old, new in zip(_means(asked), news, strict=True):
            first, second = (new, old) if winner == "new" else (old, new)
            if magnitude:
                found.append(float(np.exp(first) - np.exp(second)))
            else:
                found.append(beats(first, second))
        return found

    direction: Direction = "down" if winner == "new" else "up"
    return Values.make(
        f"{name}_magnitude" if magnitude else name,
        _by_fact(predictions, field, each),
        unit="difference of probabilities" if magnitude else "fraction of prompts",
        direction=direction,
        precondition=_needs(field),
    )


def _new_tokens(predictions: Predictions, name: str, field: str | None) -> Values:
    """Share of the new answer's tokens that greedy decoding gives, on the prompts of `field`."""

    def each(asked: Predictions) -> list[float]:
        new = asked.wrong.predictions
        return _first(asked, [float(part.mean()) for part in new.split(new.correct)])

    return Values.make(
        name,
        _by_fact(predictions, field, each),
        unit="fraction of tokens",
        direction="down",
        precondition=_needs(field),
    )


def _by_fact(
    predictions: Predictions, field: str | None, each: Callable[[Predictions], list[float]]
) -> list[float | None]:
    """`each` prompt of `field` (None: the prompt itself) as a mean by fact; None for a fact without any."""
    rows = predictions.prompts.rows
    facts = [bool(row.get("wrong")) and "target" in row for row in rows]
    if field is None:
        found = each(predictions) if any(facts) else []
        return [value if fact else None for value, fact in zip_longest(found, facts)]
    if not any(fact and row.get(field) for row, fact in zip(rows, facts, strict=True)):
        return [None] * len(rows)
    asked, of = predictions.reworded(field)
    totals = np.bincount(of, weights=each(asked), minlength=len(rows))
    counts = np.bincount(of, minlength=len(rows))
    return [
        total / count if count else None
        for total, count in zip(totals.tolist(), counts.tolist(), strict=True)
    ]


def _first(asked: Predictions, wrong: Sequence[float]) -> list[float]:
    """What the first wrong answer of each item has; NaN for an item without any."""
    found = np.full(len(asked), np.nan)
    items, places = np.unique(asked.wrong.of, return_index=True)
    found[items] = np.asarray(wrong)[places]
    return [float(value) for value in found]


def _means(predictions: Predictions) -> list[float]:
    """Mean log-probability a token of each target."""
    return [float(part.mean()) for part in predictions.split(predictions.logprob)]


def _needs(field: str | None) -> str:
    return _NEW if field is None else f"{_NEW} and that has '{field}'"


def _harmonic(table: Floats) -> float:
    means = table.mean(axis=0)
    return 0.0 if (means <= 0).any() else float(len(means) / (1.0 / means).sum())
