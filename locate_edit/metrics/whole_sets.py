"""Numbers about whole sets as rows of a report: each names the values it is made from, and the states it compares.

    evaluate(edit, [likelihood, ForgetQuality(), PrivLeak(others="holdout")], others={"holdout": ...}, oracle=oracle)

The functions that do the work stand in their own modules (`forget_quality`, `model_utility`, `membership`, `bias`,
`counterfact`); here is only which metric on which prompt set of the report goes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args, runtime_checkable

from locate_edit.errors import PromptError
from locate_edit.metrics import bias, counterfact, membership
from locate_edit.metrics.forget_quality import forget_quality
from locate_edit.metrics.likelihood import likelihood, nll, normalised_probability
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
Score = Literal["nll", "zlib_loss", "min_k", "min_k_plus_plus", "reference_loss", "gradient_norm"]
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
        compat: as for `truth_ratio`.
    """

    prompts: str = "forget"
    report: Literal["p", "distance"] = "p"
    compat: Literal["open-unlearning", "tofu"] | None = None

    @property
    def needs(self) -> Wanted:
        """Truth ratios."""
        return ((self.prompts, _with(truth_ratio, compat=self.compat)),)

    def __call__(
        self, here: Measured, *, before: Measured | None, oracle: Measured | None
    ) -> Statistic:
        """The number."""
        if reason := _no_oracle(here, oracle):
            return Statistic.none("forget_quality", reason, unit="p-value", direction="closeness")
        (wanted,) = self.needs
        edited, reference = (each(*wanted) for each in (here, oracle) if each)
        first = None if before is None else before(*wanted)
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
        max_new_tokens: length of the continuations (tokens); None for that of each target, with `compat` 200.
        compat: as for `truth_ratio` and `normalised_probability`.
    """

    kept: tuple[str, ...] = ("retain",)
    chosen: tuple[str, ...] = ()
    paraphrased: Mapping[str, str] | None = None
    max_new_tokens: int | None = None
    compat: Literal["open-unlearning", "tofu"] | None = None

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
        length = self.max_new_tokens
        if length is None and self.compat is not None:
            length = 200
        spoken = partial(rouge, max_new_tokens=length)
        ratio = _with(truth_ratio, aggregate="better", compat=self.compat)
        share = _with(normalised_probability, compat=self.compat)
        other = dict(self.paraphrased or {})
        return {
            name: ((name, first), (name, spoken), (other.get(name, name), ratio))
            for names, first in ((self.kept, likelihood), (self.chosen, share))
            for name in names
        }


@dataclass(frozen=True)
class MembershipAuc:
    """Area under the ROC curve of telling forget prompts from prompts never seen, by a membership score (`auc`).

    Direction: up, members are told; 0.5 tells nothing.
    Needs: hold-out prompts of the same making, and a model before the edit that tells members from them.
    Cost: the score's on both sets.

    Attributes:
        prompts: the members.
        others: the prompts never seen.
        score: one of `locate_edit.metrics.membership`, or "nll", the plain loss attack.
        k: fraction of least probable tokens that count, for "min_k" and "min_k_plus_plus"; None for theirs.

    Raises:
        PromptError: an unknown score, or `k` for one that has none.
    """

    prompts: str = "forget"
    others: str = "holdout"
    score: Score = "min_k"
    k: float | None = None

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise PromptError(
                f"MembershipAuc: expected a score among {', '.join(get_args(Score))}, got {self.score!r}."
            )
        if self.k is not None and not self.score.startswith("min_k"):
            raise PromptError(f"MembershipAuc: {self.score} has no fraction k, got {self.k}.")

    @property
    def needs(self) -> Wanted:
        """The score on both sets."""
        found: Metric = nll if self.score == "nll" else getattr(membership, self.score)
        metric = _with(found, k=self.k)
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
    Needs: an oracle (but with `compat="open-unlearning"`), and hold-out prompts of the same making.
    Cost: shared forward of both sets.

    Attributes:
        prompts: the members.
        others: the prompts never seen.
        k: fraction of least probable tokens that count (0.4 in MUSE and open-unlearning).
        compat: as for `min_k` and `privleak`: "open-unlearning" takes the AUC of an oracle for 0.5 where there is none.
    """

    prompts: str = "forget"
    others: str = "holdout"
    k: float = 0.4
    compat: Literal["open-unlearning", "muse"] | None = None

    @property
    def needs(self) -> Wanted:
        """Min-K% on both sets."""
        score = _with(min_k, k=self.k, compat=self.compat)
        return ((self.prompts, score), (self.others, score))

    def __call__(
        self, here: Measured, *, before: Measured | None, oracle: Measured | None
    ) -> Statistic:
        """The number."""
        alone = oracle is None and self.compat == "open-unlearning"
        reason = "" if alone else _no_oracle(here, oracle)
        if not reason and self.prompts in here.sets and self.others in here.sets:
            reason = incomparable(here.sets[self.prompts], here.sets[self.others])
        if reason:
            return Statistic.none("privleak", reason, unit="percent", direction="distance")
        found = [each(*wanted) for each in (here, oracle) if each for wanted in self.needs]
        return privleak(*found, compat=self.compat)


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


def _with(metric: Metric, **settings: object) -> Metric:
    """The metric with those of the settings that are given; itself where none is."""
    given = {key: value for key, value in settings.items() if value is not None}
    return partial(metric, **given) if given else metric


def _no_oracle(here: Measured, oracle: Measured | None) -> str:
    """Why there is nothing to compare with; empty if there is."""
    if oracle is None:
        return "needs: an oracle"
    return "the oracle is what the others are compared with" if oracle is here else ""
