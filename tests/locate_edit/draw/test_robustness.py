"""Figures of attacks: which states are drawn, and what is written beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from circuits.draw import figure_data
from locate_edit.attacked import Attacked, Point
from locate_edit.draw.robustness import attack_curves, attack_dots
from locate_edit.errors import EditError
from locate_edit.metrics.values import Values
from locate_edit.reports.robustness import Robustness, Trial


def values(*numbers: float) -> Values:
    return Values.make("likelihood", list(numbers), unit="probability", direction="up")


def attacked(clean: float, under: float) -> Attacked:
    return Attacked(
        values(under, under), values(clean, clean), values(1.0), values(1.0),
        (Point(0, clean), Point(5, under)), "steps",
    )  # fmt: skip


CURVED = {
    state: attacked(0.1, under) for state, under in (("after", 0.6), ("random", 0.5), ("oracle", 0.2))
}  # fmt: skip


def trial(found: dict[str, Attacked]) -> Trial:
    return Trial("Relearning", "Relearning()", found)


def footer(axes: Any) -> str:
    return " ".join(text.get_text() for text in axes.texts).replace("\n", " ")


def test_a_state_without_a_curve_does_not_cost_the_others() -> None:
    flat = {**CURVED, "random": replace(CURVED["random"], curve=())}
    axes = attack_curves(trial(flat), model="tiny")
    assert {row["method"] for row in figure_data(axes)} == {"after", "oracle (never saw them)"}
    assert "model: tiny | n = 2 prompts" in footer(axes)
    assert {row["method"] for row in figure_data(attack_curves(trial(CURVED)))} == {
        "after", "random mask", "oracle (never saw them)",
    }  # fmt: skip
    with pytest.raises(EditError, match="no curve to draw"):
        attack_curves(trial({"after": replace(CURVED["after"], curve=())}))


def test_dots_say_of_how_many_prompts_and_of_which_model() -> None:
    withheld = Trial("Bad", "Bad()", withheld="no")
    settings = {"model": "tiny", "forget": {"prompts": 9}, "retain": {"prompts": 4}}
    axes = attack_dots(Robustness((trial(CURVED), withheld), settings))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["relearning\nn = 2", "bad"]
    figure: Any = axes.figure
    assert figure.get_supxlabel().startswith("tiny; n: forget prompts tested; retain: n = 4")
    assert {row["prompts"] for row in figure_data(axes)} == {2}
    named: Any = attack_dots(Robustness((trial(CURVED),), settings), model="large").figure
    assert named.get_supxlabel().startswith("large; n")
    alone: Any = attack_dots(Robustness((trial(CURVED),))).figure
    assert alone.get_supxlabel() == "n: forget prompts tested; bars: 95% interval over prompts"
