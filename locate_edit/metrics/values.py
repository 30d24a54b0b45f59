"""Values: one number an item, with what is needed to average them and to say how sure the average is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from locate_edit.errors import PromptError

__all__ = ["Direction", "Floats", "Values", "average_over_runs", "beats", "difference"]

Direction = Literal["up", "down", "distance"]
Floats = NDArray[np.float64]

# Resamples drawn at once: bounds the memory of the bootstrap at about 100 MB whatever the number of items.
_CHUNK = 10**7


@dataclass(frozen=True, eq=False)
class Values:
    """A metric's value on each item of a prompt set, and its average.

    The average is `sum(weights * values) / sum(weights)`, divided by the same average of `reference` where
    there is one, and passed through `exp` where `scale` is "exp" (perplexity averages in the log domain).

    Attributes:
        name: the metric.
        items: indices of the items in their prompt set, `item` int64; items that a precondition excludes are
            missing.
        values: the values, `item` float64.
        weights: weight of each item in the average, `item` float64.
        unit: of the average, such as "nats a token" or "bits".
        direction: "up" if a larger number means that the model knows the text better, "down" if a smaller one
            does, "distance" if the number tells how far the model is from another one.
        scale: "plain" or "exp".
        reference: what the average is divided by, item by item, `item` float64, or None.
        withheld: why there is no number, if there is none; empty otherwise.
        note: what a reader must know about the number, such as how many items were left out.
    """

    name: str
    items: NDArray[np.int64]
    values: Floats
    weights: Floats
    unit: str
    direction: Direction
    scale: Literal["plain", "exp"] = "plain"
    reference: Floats | None = None
    withheld: str = ""
    note: str = ""

    @classmethod
    def make(
        cls,
        name: str,
        values: Sequence[float | None] | Floats,
        *,
        unit: str,
        direction: Direction,
        precondition: str = "",
        weights: Sequence[float] | Floats | None = None,
        scale: Literal["plain", "exp"] = "plain",
        reference: Sequence[float] | Floats | None = None,
    ) -> Values:
        """Values of all items of a prompt set; None marks an item on which `precondition` fails.

        Items without a value (None, NaN) are left out and counted in the note. If none is left, the number is
        withheld with the precondition as its reason. It is withheld as well where a value is infinite: the average
        would be, and without that item it would say something better.
        """
        raw = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        if endless := int(np.isinf(raw).sum()):
            reason = (
                f"needs: numbers that can be averaged; {endless} of {len(raw)} items are infinite"
            )
            return cls.none(name, reason, unit=unit, direction=direction)
        every_weight = np.ones(len(raw)) if weights is None else np.asarray(weights, np.float64)
        keep = np.isfinite(raw) & (every_weight > 0)
        n_out = int((~keep).sum())
        absent = np.array([value is None for value in values]) | (every_weight <= 0)
        n_failed = int(absent.sum())
        reasons = [precondition] if n_failed else []
        reasons += (
            ["finite predictions, and the model gives NaN or infinity"] if n_out > n_failed else []
        )
        why = "needs: " + "; ".join(reasons)
        return cls(
            name=name,
            items=np.flatnonzero(keep).astype(np.int64),
            values=raw[keep],
            weights=every_weight[keep],
            unit=unit,
            direction=direction,
            scale=scale,
            reference=None if reference is None else np.asarray(reference, np.float64)[keep],
            withheld=why if n_out == len(raw) else "",
            note=f"{n_out} of {len(raw)} items left out; {why}" if n_out else "",
        )

    @classmethod
    def none(cls, name: str, reason: str, *, unit: str = "", direction: Direction = "up") -> Values:
        """No number at all, and why."""
        empty = np.zeros(0)
        return cls(name, empty.astype(np.int64), empty, empty, unit, direction, withheld=reason)

    @property
    def estimate(self) -> float | None:
        """The average over the items; None where the number is withheld."""
        if self.withheld:
            return None
        return float(self._statistic(np.ones((1, len(self.values))))[0])

    @property
    def each(self) -> Floats:
        """The value of each item on the scale of the average, `item` float64."""
        each = self.values
        if self.reference is not None and len(each):
            each = each / np.average(self.reference, weights=self.weights)
        return self._scaled(each)

    def interval(
        self, *, level: float = 0.95, n_bootstrap: int = 1000, seed: int = 0
    ) -> tuple[float, float] | None:
        """Percentile bootstrap interval of the average over items.

        Items are drawn with replacement, with their weights and references. None where the number is
        withheld or rests on a single item, from which no spread can be told.

        Args:
            level: coverage (fraction).
            n_bootstrap: number of resamples.
            seed: of the resampling; the same seed gives the same interval.
        """
        if self.withheld or len(self.values) < 2:
            return None
        drawn = np.concatenate(
            [self._statistic(counts) for counts in _resamples(len(self.values), n_bootstrap, seed)]
        )
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def _statistic(self, counts: Floats) -> Floats:
        """The average under each row of `counts` `resample item`, how often each item was drawn."""
        weighted = counts * self.weights
        if self.reference is None:
            average = weighted @ self.values / weighted.sum(axis=1)
        else:
            average = (weighted @ self.values) / (weighted @ self.reference)
        return self._scaled(average)

    def _scaled(self, numbers: Floats) -> Floats:
        if self.scale == "plain":
            return numbers
        with np.errstate(over="ignore"):  # what no float can hold is infinite
            return np.asarray(np.exp(numbers), dtype=np.float64)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        if self.withheld:
            return f"Values({self.name}: withheld, {self.withheld})"
        return f"Values({self.name}: {self.estimate:.4g} {self.unit}, {len(self)} items)"


def difference(
    left: Values, right: Values, *, level: float = 0.95, n_bootstrap: int = 1000, seed: int = 0
) -> tuple[float, float, float] | None:
    """The average of `left` minus that of `right` and its bootstrap interval, the same items drawn for both.

    None where either is withheld or no interval can be told.

    Raises:
        PromptError: the values belong to different items.
    """
    if left.withheld or right.withheld:
        return None
    if not np.array_equal(left.items, right.items):
        raise PromptError(
            f"cannot compare {left!r} with {right!r} item by item: they belong to different items."
        )
    if len(left) < 2:
        return None
    drawn = np.concatenate(
        [
            left._statistic(counts) - right._statistic(counts)
            for counts in _resamples(len(left), n_bootstrap, seed)
        ]
    )
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    one = np.ones((1, len(left)))
    middle = left._statistic(one)[0] - right._statistic(one)[0]
    return float(middle), float(low), float(high)


def average_over_runs(runs: Sequence[Values]) -> Values:
    """Values whose items are the means over several runs of the same metric (several random masks).

    Items that a run lacks are left out, as are runs whose number is withheld: the note says how many. Where the scale
    is "exp" the mean is taken before `exp`.
    """
    given = [run for run in runs if not run.withheld]
    if not given:
        return runs[0]
    shared = given[0].items
    for run in given[1:]:
        shared = np.intersect1d(shared, run.items)
    if not len(shared):
        return Values.none(runs[0].name, "needs: items that every run could score")
    picks = [np.searchsorted(run.items, shared) for run in given]

    def mean(arrays: Sequence[Floats]) -> Floats:
        chosen = [array[pick] for array, pick in zip(arrays, picks, strict=True)]
        return np.asarray(np.mean(chosen, axis=0), dtype=np.float64)

    references = [run.reference for run in given if run.reference is not None]
    note = given[0].note
    if len(given) > 1:
        low, high = (pick(run.estimate or 0.0 for run in given) for pick in (min, max))
        note = f"mean of {len(given)} runs from {low:.4g} to {high:.4g}" + (
            f"; {note}" if note else ""
        )
    if gone := [run for run in runs if run.withheld]:
        missing = f"{len(gone)} of {len(runs)} runs withheld, {gone[0].withheld}"
        note = f"{missing}; {note}" if note else missing
    return replace(
        given[0],
        items=shared,
        values=mean([run.values for run in given]),
        weights=mean([run.weights for run in given]),
        reference=mean(references) if len(references) == len(given) else None,
        note=note,
    )


def beats(one: float, other: float) -> float:
    """1 if `one` is larger, 1/2 if they are equal, and NaN if either is."""
    if np.isnan(one) or np.isnan(other):
        return float("nan")
    return 0.5 if one == other else float(one > other)


def _resamples(n_items: int, n_bootstrap: int, seed: int) -> list[Floats]:
    """How often each item is drawn in each resample: chunks of `resample item` float64."""
    rng = np.random.default_rng(seed)
    a_chunk = max(1, _CHUNK // n_items)
    share = np.full(n_items, 1.0 / n_items)
    return [
        rng.multinomial(n_items, share, size=min(a_chunk, n_bootstrap - start)).astype(np.float64)
        for start in range(0, n_bootstrap, a_chunk)
    ]
