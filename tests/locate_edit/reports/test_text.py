"""The words of a report: what was changed, how near it came to a retrained model, and what else moved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from locate_edit.reports.report import Cell, Line, Report, SideEffect
from locate_edit.reports.text import answers, markdown, remarks
from tests.locate_edit.reports.test_report import line, read, sample

MASK: dict[str, Any] = {
    "units": 101, "of": 2560, "kinds": ["neuron"], "sites": {"L2.neuron": 101}, "fraction_of_parameters": 0.02,
}  # fmt: skip
NPO: dict[str, Any] = {"method": {"name": "NPO"}, "entries_changed": 5}


def changed(mask: dict[str, Any], edit: dict[str, Any]) -> str:
    return answers(sample(mask=mask, edit=edit))["What was changed?"]


@pytest.mark.parametrize(
    ("mask", "edit", "said"),
    [
        (MASK, NPO, "NPO changed only 101 of the 2,560 neurons of tiny, 2.00% of its parameters."),
        (MASK | {"units": 1}, NPO, "NPO changed only 1 of the 2,560 neurons of tiny, 2.00% of its parameters."),
        (MASK | {"units": 2560, "fraction_of_parameters": None}, NPO, "NPO changed all 2,560 neurons of tiny."),
        (MASK | {"kinds": ["head", "neuron"], "fraction_of_parameters": None}, NPO,
         "NPO changed only 101 of the 2,560 heads and neurons of tiny."),
        ({}, NPO, "NPO was free to change all weights of tiny."),
        (MASK, NPO | {"entries_changed": 0}, "NPO changed nothing: every weight of tiny is bit for bit as it was."),
        (MASK, {"method": {"name": "EUL"}, "entries_changed": 0, "additions": ["adapter of 8 at L2.mlp"]},
         "EUL changed no weight of tiny. It added: adapter of 8 at L2.mlp."),
        ({}, NPO | {"additions": list("abcde")},
         "NPO was free to change all weights of tiny. It added: a, b, 3 more of them."),
    ],
)  # fmt: skip
def test_what_was_changed(mask: dict[str, Any], edit: dict[str, Any], said: str) -> None:
    assert changed(mask, edit) == said


def test_the_page_names_no_places_where_no_weight_changed() -> None:
    eul = {"method": {"name": "EUL"}, "entries_changed": 0, "additions": ["adapter of 8 at L2.mlp"]}
    text = "".join(read(sample(mask=MASK, edit=eul).to_html()).text)
    assert "No weight was changed: all of them are bit for bit as they were." in text
    assert "Added to the model: adapter of 8 at L2.mlp." in text
    assert "Every weight outside" not in text
    assert "placeunits" not in text
    text = "".join(read(sample(mask=MASK, edit=NPO).to_html()).text)
    assert "Every weight outside these places is bit for bit as it was." in text
    assert "placeunitsL2.neuron101" in text


# ---- the distance from a retrained model ----------------------------------------------------------


def near(after: Any, before: Any, *, metric: str = "oracle_distance", forgot: bool = True) -> str:
    likelihood = line("likelihood", "forget", {"before": 0.9, "after": 0.1 if forgot else 0.9})
    distance = line(
        metric, "forget", {"before": before, "after": after}, "noise floors", "distance"
    )
    report = sample(lines=(distance, likelihood))
    return answers(report)["Is it as if it had never been learned?"]


def test_a_distance_that_hardly_fell_is_not_praised_and_one_that_fell_is_not_denied() -> None:
    said = near(Cell(4.53, 2.5, 9.05, 16), Cell(4.99, 3.05, 9.96, 16))
    assert "is 4.53 [2.50, 9.05] (before: 4.99 [3.05, 9.96])" in said
    assert "hardly nearer than before the edit, although the prompts are known less well" in said
    assert "confident guess" in said
    assert "no nearer than before the edit" in near(5.0, 4.9)
    # An edit that did nothing gets no explanation of why forgetting did not help.
    idle = near(4.98, 4.99, forgot=False)
    assert "no nearer than before the edit." in idle
    assert "confident guess" not in idle
    wide = near(Cell(1.5, 1.0, 5.0, 16), Cell(3.0, 2.0, 6.0, 16))
    assert "close to a retrained model, though this interval and that before the edit over" in wide
    assert "overlap" not in near(1.5, 40.0)


def test_with_one_oracle_the_plain_distance_is_told_without_a_verdict() -> None:
    said = near(0.5, 2.0, metric="oracle_kl")
    assert "is 0.500 [0.450, 0.550] noise floors (before: 2.00 [1.80, 2.20]). How near" in said
    assert "takes a second retrained model" in said
    assert "close to" not in said
    assert ": no nearer than before" in near(2.1, 2.0, metric="oracle_kl")
    # Where both are there, the one with a unit is told.
    both = (
        line("oracle_kl", "forget", {"after": 0.5}, "nats a token", "distance"),
        line("oracle_distance", "forget", {"after": 1.5}, "noise floors", "distance"),
    )
    assert "is 1.50" in answers(sample(lines=both))["Is it as if it had never been learned?"]


# ---- what else changed ----------------------------------------------------------------------------


def effect(before: float, after: float, **more: float) -> SideEffect:
    return SideEffect(
        "retain", 3, "Bo lives in", " Oslo", {"before": before, "after": after, **more}
    )


def test_the_prompt_that_changed_most_is_in_the_summary_with_its_sign_in_the_table() -> None:
    report = sample(side_effects=(effect(0.2, 0.8), effect(0.9, 0.5)))
    said = answers(report)["What else changed?"]
    assert (
        "Of single prompts “Bo lives in Oslo” (retain) changed most, from 0.200 to 0.800." in said
    )
    text = markdown(report)
    assert "| retain | Bo lives in | Oslo | +0.600 | 0.200 | 0.800 |" in text
    assert "| retain | Bo lives in | Oslo | -0.400 | 0.900 | 0.500 |" in text
    # A random mask is spoken of only where there is one.
    assert "random mask does" not in text
    beside = replace(report, side_effects=(effect(0.9, 0.5, random=0.8),))
    assert "random mask does to the same prompts" in markdown(beside)
    none = answers(sample(side_effects=()))["What else changed?"]
    assert "Of none of the 20 prompts outside the forget set" in none
    long = replace(effect(0.9, 0.1), prompt="word " * 40)
    assert len(answers(sample(side_effects=(long,)))["What else changed?"]) < 200


def test_one_reason_is_one_remark() -> None:
    def exposure(prompts: str, *states: str) -> Line:
        cells = {state: Cell(None, withheld="needs: digits") for state in states}
        return Line("exposure", prompts, "bits", "up", "", cells)

    lines = (
        exposure("forget", "before", "after"),
        exposure("retain", "before", "after"),
        exposure("text", "random"),
    )
    noted = line("likelihood", "forget", {"before": Cell(0.5, note="2 of 9 items left out")})
    assert remarks(Report((*lines, noted), notes=("first",))) == [
        "first",
        "forget.exposure, retain.exposure (before, after): not measured; needs: digits",
        "text.exposure (random mask): not measured; needs: digits",
        "forget.likelihood (before): 2 of 9 items left out",
    ]
