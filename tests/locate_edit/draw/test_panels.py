"""Figures of several panels: `figure_data` takes whatever they return, and gives the numbers of all panels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from circuits.draw import figure_data, figure_frame
from locate_edit.draw import before_after, carried_map, layer_lines, lens_map, slope_panels
from locate_edit.metrics.unlearning_depth import from_costs
from tests.locate_edit.draw.test_edits import report
from tests.locate_edit.reports.test_layers import made_up


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_maps_of_layers_give_the_numbers_of_both_panels() -> None:
    found = made_up([0.9, 0.6, 0.1], [1.0, 0.4, 0.9])
    rows = figure_data(carried_map(found))
    assert len(rows) == 2 * 2 * 3
    after = [row for row in rows if row["state"] == "after"]
    assert [row["likelihood"] for row in after if row["prompts"] == "forget"] == pytest.approx(
        [0.9, 0.6, 0.1]
    )
    assert [row["likelihood"] for row in after if row["prompts"] == "retain"] == pytest.approx(
        [1.0, 0.4, 0.9]
    )
    assert [row["fits"] for row in after] == [True, False, True] * 2
    rows = figure_data(lens_map(found))
    assert len(rows) == 2 * 2 * 4
    assert rows[0] == {
        "state": "before", "prompt": "a → b", "item": 0, "layer": -1, "probability": 1.0
    }  # fmt: skip
    assert {row["probability"] for row in rows if row["state"] == "after"} == {0.25}
    costs: Any = np.array([[2.0, 4.0], [4.0, 8.0]])
    lines = figure_data(layer_lines(from_costs(costs, costs / 2, np.zeros((2, 2)))))
    assert [row["s1"] for row in lines] == [3.0, 6.0]


def test_panels_of_a_report_give_their_numbers_together() -> None:
    rows = figure_data(before_after(report()))
    assert {row["metric"] for row in rows} == {"likelihood", "perplexity", "exposure"}
    both = {"one": report(), "two": report(0.3)}
    drawn = slope_panels(both, ["likelihood"])
    assert len(drawn) == 2
    after = [
        r["value"] for r in figure_data(drawn) if r["state"] == "after" and r["set"] == "forget"
    ]
    assert after == [0.2, 0.3]
    assert len(figure_frame(drawn)) == len(figure_data(drawn))
