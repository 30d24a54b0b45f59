"""Numbers about whole sets as rows of a report: each names the values it is made from, and the states it compares.

    evaluate(edit, [likelihood, ForgetQuality(), PrivLeak(others="holdout")], others={"holdout": ...}, oracle=oracle)

The functions that do the work stand in their own modules (`forget_quality`, `model_utility`, `membership`, `bias`,
`counterfact`); here is only which metric on which prompt set of the report goes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

from locate_edit.metrics import bias, counterfact, membership
from locate_edit.metrics.forget_quality import forget_quality
from locate_edit.metrics.likelihood import likelihood, normalised_probability
from locate_edit.metrics.membership import auc, incomparable, min_k, privleak
from locate_edit.metrics.model_utility import model_utility
from locate_edit.metrics.rouge import rouge
from locate_edit.metrics.statistic import Statistic
from locate_edit.metrics.truth_ratio import truth_ratio
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet

__all__ = [
    "EditScore",
    "ForgetQuality",
    "Icat",
    "Measured",
    "MembershipAuc",
    "ModelUtility",
    "PrivLeak",
    "WholeSets",
]

Metric = Callable[..., Values]
Wanted = tuple[tuple[str, Metric], ...]
"""Names of prompt sets, each with a metric that is needed there."""


@runtime_checkable
class WholeSets(Protocol):
    """A number about whole prompt sets of a report."""

    @property
    def prompts(self) -> str:
        """Which prompt set or sets the row stands under."""

    @property
    def needs(self) -> Wanted:
        """What has to be measured for it."""

    def __call__(
        self, here: Measured, *, before: Measured | None, oracle: Measured | None
    ) -> Statistic:
        """The number for one state of the model, with the states before the edit and of the oracle beside it."""


class Measured:
    """What one state of a model has given, by prompt set and metric.

    Attributes:
        sets: the prompt sets of the report by name.
    """

    def __init__(
        self, values: Mapping[tuple[str, str], Values], sets: Mapping[str, PromptSet]
    ) -> None:
        self._values, self.sets = values, sets

    def __call__(self, prompts: str, metric: Metric) -> Values:
        """The values of a metric on a prompt set; withheld where the report has no such set."""
        name = key_of(metric)
        found = self._values.get((prompts, name))
        return found or Values.none(name, f"needs: a prompt set called {prompts!r}")


def key_of(metric: Metric) -> str:
    """The metric's name, with the settings that a partial fixes."""
    if isinstance(metric, partial):
        settings = ",".join(f"{key}={value}" for key, value in metric.keywords.items())
        # A dot would separate set and metric in the keys of the files.
        return f"{key_of(metric.func)}({settings})".replace(".", "_")
    return str(getattr(metric, "__name__", type(metric).__name__))


@dataclass(frozen=True)
class ForgetQuality:
    """p-value that the truth ratios on the forget set are distributed as the oracle's (`forget_quality`).

    Direction: closeness to the oracle; distance with `report="distance"`.
    Needs: an oracle, and a model that could be told from it before the edit.
    Cost: that of `truth_ratio`.

    Attributes:
        prompts: the set; its targets are paraphrases of the answers, and its rows have `wrong` answers.
        report: "p", or "distance" for the largest difference between the distributions.
    """

    prompts: str = "forget"
    report: Literal["p", "distance"] = "p"

    @property
    def needs(self) -> Wanted:
        """Truth ratios."""
        return ((self.prompts, truth_ratio),)

    def __call__(
        self, here: Measured, *, before: Measured | None, oracle: Measured | None
    ) -> Statistic:
        """The number."""
        if reason := _no_oracle(here, oracle):
            return Statistic.none("forget_quality", reason, unit="p-value", direction="closeness")
        edited, reference = (each(self.prompts, truth_ratio) for each in (here, oracle) if each)
        first = None if before is None else before(self.prompts, truth_ratio)
        return forget_quality(edited, reference, before=first, report=self.report)


@dataclass(frozen=True)
class ModelUtility:
    """Harmonic mean of probability, ROUGE and truth ratio on the sets that should be kept (`model_utility`).

    Direction: up, better kept.
    Needs: rows with `wrong` answers in every set.
    Cost: that of `rouge` and `truth_ratio` on every set.

    Attributes:
        kept: sets whose probability counts as it is (TOFU's retain set).
        chosen: sets whose probability is shared among right and wrong answers (its real authors and world facts).
        paraphrased: for a set, the one with paraphrases as targets that its truth ratio is taken on.
        max_new_tokens: length of the continuations (tokens); None for that of each target.
    """

    kept: tuple[str, ...] = ("retain",)
    chosen: tuple[str, ...] = ()
    paraphrased: Mapping[str, str] | None = None
    max_new_tokens: int | None = None

    @property
    def prompts(self) -> str:
        """All sets."""
        return ", ".join((*self.kept, *self.chosen))

    @property
    def needs(self) -> Wanted:
        """Three metrics on each set."""
        return tuple(each for parts in self._parts().values() for each in parts)

    def __call__(
        self, here: Measured, *, before: Measured | None, oracle: Measured | None
    ) -> Statistic:
        """The number."""
        return model_utility(
            {name: [here(*each) for each in parts] for name, parts in self._parts().items()}
        )

    def _parts(self) -> dict[str, Wanted]:
        spoken = partial(rouge, max_new_tokens=self.max_new_tokens)
        ratio = partial(truth_ratio, aggregate="better")
        other = dict(self.paraphrased or {})
        return {
            name: ((name, first), (name, spoken), (other.get(name, name), ratio))
            for names, first in ((self.kept, likelihood), (self.chosen, normalised_probability))
            for name in names
        }


@dataclass(frozen=True)
class MembershipAuc:
    """Area under the ROC curve of telling forget prompts from prompts never seen, by a membership score (`auc`).

    Direction: up, members are told; 0.5 tells nothing.
    Needs: hold-out prompts of the same making, and a model before the edit that tells members from them.
    Cost: shared forward of both sets.

    Attributes:
        prompts: the members.
        others: the prompts never seen.
        score: one of `locate_edit.metrics.membership`.
    """

    prompts: str = "forget"
    others: str = "holdout"
    score: Literal["min_k", "min_k_plus_plus", "zlib_loss"] = "min_k"

    @property
    def needs(self) -> Wanted:
        """The score on both sets."""
        metric: Metric = getattr(membership, self.score)
        return ((self.prompts, metric), (self.others, metric))

    def __call__(
        self, here: Measured, *, before: Measured | None, oracle: Measured | None
    ) -> Statistic:
        """The number."""
        members, others = (here(*each) for each in self.needs)
        reason = members.withheld or others.withheld
        if reason or (reason := incomparable(here.sets[self.prompts], here.sets[self.others])):
            return Statistic.none("membership_auc", reason, unit="AUC")
        first = None if before is None else self(before, before=None, oracle=None)
        return auc(members, others, before=first)


@dataclass(frozen=True)
class PrivLeak:
    """PrivLeak, how much more than in the oracle the forget prompts look like members, in percent (`privleak`).

    Below 0 they are still recognised, above it the removal shows.

    Direction: distance from the oracle, either way.
    Needs: an oracle, and hold-out prompts of the same making.
    Cost: shared forward of both sets.

    Attributes:
        prompts: the members.
        others: the prompts never seen.
        k: fraction of least probable tokens that count (0.4 in MUSE).
    """

    prompts: str = "forget"
    others: str = "holdout"
    k: float = 0.4

    @property
    def needs(self) -> Wanted:
        """Min-K% on both sets."""
        score = partial(min_k, k=self.k)
        return ((self.prompts, score), (self.others, score))

    def __call__(
        self, here: Measured, *, before: Measured | None, oracle: Measured | None
    ) -> Statistic:
        """The number."""
        reason = _no_oracle(here, oracle)
        if not reason and self.prompts in here.sets and self.others in here.sets:
            reason = incomparable(here.sets[self.prompts], here.sets[self.others])
        if reason:
            return Statistic.none("privleak", reason, unit="percent", direction="distance")
        found = [each(*wanted) for each in (here, oracle) if each for wanted in self.needs]
        return privleak(*found)


@dataclass(frozen=True)
class Icat:
    """ICAT, 1 for a fluent model without preference, 0 for one that is all stereotype (`bias.icat`).

    Direction: up, fluent and without preference.
    Needs: rows with a stereotyped word, its opposite and one without meaning.
    Cost: that of `stereotype_score`.

    Attributes:
        prompts: the set of such rows.
    """

    prompts: str = "forget"

    @property
    def needs(self) -> Wanted:
        """SS and LMS."""
        return (
            (self.prompts, bias.stereotype_score),
            (self.prompts, bias.language_modelling_score),
        )

    def __call__(
        self, here: Measured, *, before: Measured | None, oracle: Measured | None
    ) -> Statistic:
        """The number."""
        return bias.icat(*(here(*wanted) for wanted in self.needs))


@dataclass(frozen=True)
class EditScore:
    """CounterFact's S, the harmonic mean of efficacy, paraphrase and neighbourhood scores (`counterfact.edit_score`).

    Direction: down, better known: the old answers are the targets.
    Needs: rows with a new answer in `wrong`, `paraphrases` and `neighbours`.
    Cost: that of `efficacy` on every wording and neighbour.

    Attributes:
        prompts: the set of such rows.
    """

    prompts: str = "forget"

    @property
    def needs(self) -> Wanted:
        """The three scores."""
        return (
            (self.prompts, counterfact.efficacy),
            (self.prompts, counterfact.paraphrase_success),
            (self.prompts, counterfact.neighbourhood_success),
        )

    def __call__(
        self, here: Measured, *, before: Measured | None, oracle: Measured | None
    ) -> Statistic:
        """The number."""
        return counterfact.edit_score(*(here(*wanted) for wanted in self.needs))


def _no_oracle(here: Measured, oracle: Measured | None) -> str:
    """Why there is nothing to compare with; empty if there is."""
    if oracle is None:
        return "needs: an oracle"
    return "the oracle is what the others are compared with" if oracle is here else ""
