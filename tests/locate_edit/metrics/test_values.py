from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from locate_edit.errors import PromptError
from locate_edit.metrics.values import Values, average_over_runs, difference


def plain(numbers: list[float | None], **options: object) -> Values:
    return Values.make("m", numbers, unit="u", direction="up", precondition="luck", **options)  # type: ignore[arg-type]


def test_the_three_averages() -> None:
    assert plain([1.0, 2.0, 6.0]).estimate == pytest.approx(3.0)
    assert plain([1.0, 2.0], weights=[3.0, 1.0]).estimate == pytest.approx(1.25)
    assert plain([0.0, 2.0], scale="exp").estimate == pytest.approx(np.e)
    ratio = plain([1.0, 3.0], reference=[2.0, 6.0])
    assert ratio.estimate == pytest.approx(0.5)
    assert ratio.each.tolist() == [0.25, 0.75]  # in units of the mean reference, 4


def test_the_interval_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.exponential(size=60)
    ours = plain(numbers.tolist()).interval(n_bootstrap=6000, seed=1)
    theirs = stats.bootstrap(
        (numbers,), np.mean, n_resamples=6000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.015)
    # The weighted ratio: scipy resamples the pairs.
    reference, weights = rng.uniform(1, 2, size=60), rng.uniform(0, 1, size=60)
    ours = plain(numbers.tolist(), reference=reference, weights=weights).interval(
        n_bootstrap=6000, seed=3
    )

    def ratio(a: np.ndarray, b: np.ndarray, w: np.ndarray) -> float:
        return float((a * w).sum() / (b * w).sum())

    theirs = stats.bootstrap(
        (numbers, reference, weights),
        ratio,
        paired=True,
        vectorized=False,
        n_resamples=6000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.015)


def test_intervals_are_seeded_and_follow_the_level() -> None:
    values = plain(np.random.default_rng(0).normal(size=30).tolist())
    assert values.interval(seed=1) == values.interval(seed=1)
    assert values.interval(seed=1) != values.interval(seed=2)
    wide, narrow = values.interval(level=0.99), values.interval(level=0.5)
    assert wide is not None
    assert narrow is not None
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(200):
        interval = plain(rng.normal(size=80).tolist()).interval(n_bootstrap=200, seed=trial)
        assert interval is not None
        hits += interval[0] <= 0.0 <= interval[1]
    assert 0.90 < hits / 200 < 0.98


def test_one_item_has_no_interval() -> None:
    assert plain([1.0]).interval() is None
    assert plain([1.0, None]).interval() is None


def test_items_without_a_value_are_counted_and_named() -> None:
    values = plain([1.0, None, 3.0, float("nan")])
    assert values.items.tolist() == [0, 2]
    assert values.estimate == 2.0
    assert values.note == (
        "2 of 4 items left out; needs: luck; finite predictions, and the model gives NaN or infinity"
    )
    assert plain([None, None]).withheld == "needs: luck"
    assert plain([None]).estimate is None
    assert repr(plain([None])) == "Values(m: withheld, needs: luck)"
    assert repr(plain([0.5, 1.0])) == "Values(m: 0.75 u, 2 items)"


def test_an_infinite_item_is_not_left_out_for_a_better_average() -> None:
    for worst in (float("inf"), float("-inf")):
        values = plain([1.0, worst, None])
        assert values.estimate is None
        assert values.withheld == "needs: numbers that can be averaged; 1 of 3 items are infinite"
    huge = Values.make("m", [800.0, 900.0], unit="u", direction="down", scale="exp")
    assert huge.estimate == float("inf")


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(scale=10, size=40)
    left, right = plain((base + 1).tolist()), plain(base.tolist())
    found = difference(left, right)
    # The items' own spread of 10 cancels: the same items are drawn on both sides.
    assert found == pytest.approx((1.0, 1.0, 1.0))
    assert difference(left, plain([None])) is None
    assert difference(plain([1.0]), plain([2.0])) is None
    with pytest.raises(PromptError, match="they belong to different items"):
        difference(plain([1.0, 2.0]), plain([None, 2.0]))


def test_runs_are_averaged_item_by_item() -> None:
    both = average_over_runs([plain([1.0, 2.0, None]), plain([3.0, 4.0, 5.0])])
    assert both.items.tolist() == [0, 1]
    assert both.values.tolist() == [2.0, 3.0]
    assert both.note.startswith("mean of 2 runs from 1.5 to 4; 1 of 3 items left out")
    one = average_over_runs([plain([float("inf")]), plain([2.0])])
    assert one.estimate == 2.0
    assert one.note.startswith("1 of 2 runs withheld, needs: numbers that can be averaged")
    assert average_over_runs([plain([None])]).withheld == "needs: luck"
