"""Statistic: one number about whole samples of items, where no single item has a value.

The p-value of a test, the area under a curve, a harmonic mean of averages. The sibling of `Values`: it has the same
`name`, `estimate`, `interval`, `unit`, `direction`, `withheld` and `note`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from locate_edit.metrics.values import Floats

__all__ = ["Statistic", "StatisticDirection"]

StatisticDirection = Literal["up", "down", "distance", "closeness"]


@dataclass(frozen=True, eq=False)
class Statistic:
    """A function of samples, and how sure it is.

    Attributes:
        name: the metric.
        samples: what it is computed from, each `item` or `item column` float64. Rows of one sample belong together;
            samples are independent of each other.
        of: the function of the samples, in their order.
        unit: of the number.
        direction: "up" if a larger number means that the model knows the text better, "down" if a smaller one does,
            "distance" if the number tells how far the model is from another one, "closeness" if it tells how near.
        resampled: whether a bootstrap makes sense; that of a p-value does not.
        withheld: why there is no number, if there is none; empty otherwise.
        note: what a reader must know about the number.
    """

    name: str
    samples: tuple[Floats, ...]
    of: Callable[..., float]
    unit: str
    direction: StatisticDirection
    resampled: bool = True
    withheld: str = ""
    note: str = ""

    @classmethod
    def none(
        cls, name: str, reason: str, *, unit: str = "", direction: StatisticDirection = "up"
    ) -> Statistic:
        """No number at all, and why."""
        return cls(name, (), _nothing, unit, direction, resampled=False, withheld=reason)

    @cached_property
    def estimate(self) -> float | None:
        """The number; None where it is withheld."""
        return None if self.withheld else float(self.of(*self.samples))

    def interval(
        self, *, level: float = 0.95, n_bootstrap: int = 1000, seed: int = 0
    ) -> tuple[float, float] | None:
        """Percentile bootstrap interval: the items of each sample are drawn with replacement, whole rows at a time.

        None where the number is withheld, where a bootstrap makes no sense, and where a sample has a single item.

        Args:
            level: coverage (fraction).
            n_bootstrap: number of resamples.
            seed: of the resampling; the same seed gives the same interval.
        """
        if self.withheld or not self.resampled or min(map(len, self.samples), default=0) < 2:
            return None
        rng = np.random.default_rng(seed)
        drawn = [
            self.of(
                *(sample[rng.integers(len(sample), size=len(sample))] for sample in self.samples)
            )
            for _ in range(n_bootstrap)
        ]
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def __len__(self) -> int:
        return sum(map(len, self.samples))

    def __repr__(self) -> str:
        if self.withheld:
            return f"Statistic({self.name}: withheld, {self.withheld})"
        sizes = " and ".join(str(len(sample)) for sample in self.samples)
        return f"Statistic({self.name}: {self.estimate:.4g} {self.unit}, {sizes} items)"


def _nothing(*_samples: Sequence[float]) -> float:
    return float("nan")
