"""The parts of the TOFU run that train nothing."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.tofu_run import Result, general_table, subset, table
from locate_edit.errors import PromptError


def _rows(groups: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"question": f"{group} {k}", "group": group}
        for group, n in groups.items()
        for k in range(n)
    ]


FULL = _rows({"F0": 2, "R0": 2, "R1": 3, "R2": 2, "R3": 2})
FORGET = _rows({"F0": 2})


def _perturbed(*groups: str) -> list[dict[str, Any]]:
    """As the published split has them: the author is not said, blocks are counted."""
    return [{**row, "group": "?"} for row in FULL if row["group"] in groups]


def _authors(rows: tuple[Any, ...]) -> list[str]:
    return [row["group"] for row in rows]


def test_parts_are_whole_authors_and_disjoint() -> None:
    found = subset(FULL, FORGET, _perturbed("R0", "R1", "R2", "R3"), authors=1)
    assert _authors(found.forget) == ["F0", "F0"]
    assert _authors(found.retain) == ["R0", "R0"]
    assert _authors(found.unseen) == ["R1", "R1", "R1"]
    assert _authors(found.holdout) == ["R2", "R2"]


def test_authors_with_a_question_missing_and_forget_authors_are_passed_over() -> None:
    perturbed = _perturbed("F0", "R0", "R1", "R2", "R3")
    perturbed.remove({"question": "R1 1", "group": "?"})
    found = subset(FULL, FORGET, perturbed, authors=1)
    assert [set(_authors(part)) for part in (found.retain, found.unseen, found.holdout)] == [
        {"R0"},
        {"R2"},
        {"R3"},
    ]


def test_a_question_that_two_authors_share_says_nothing_of_the_author() -> None:
    full = [*FULL, {"question": "R0 0", "group": "R3"}]
    found = subset(full, FORGET, _perturbed("R0", "R1", "R2"), authors=0)
    assert found.retain == ()
    with pytest.raises(PromptError, match=r"expected 3 retain authors.*got 2"):
        subset(full, FORGET, _perturbed("R0", "R1", "R2"), authors=1)


def test_rows_are_means_over_seeds_and_what_is_withheld_once_is_a_dash() -> None:
    columns = {"forget/likelihood": "prob.", "forget/forget_quality": "p"}
    results = [
        Result("", "full", 0, {"forget/likelihood": 0.5, "forget/forget_quality": None}),
        Result("random", "NPO", 0, {"forget/likelihood": 0.1, "forget/forget_quality": 0.2}),
        Result("random", "NPO", 1, {"forget/likelihood": 0.3, "forget/forget_quality": None}),
    ]
    assert table(results, columns).splitlines() == [
        "| mask | method | prob. | p |",
        "|---|---|---|---|",
        "| no edit | full | 0.5 | - |",
        "| random | NPO | 0.2 (0.1 to 0.3) | - |",
    ]


def test_general_sets_say_whether_they_are_known() -> None:
    about = {
        "normalised_probability": 0.3,
        "rougeL_recall": 0.01,
        "truth_ratio_better": 0.25,
        "guess": 0.25,
        "interval": (0.2, 0.4),
        "known": False,
    }
    assert general_table({"world facts": about}).splitlines()[-1] == (
        "| world facts | 0.30 (0.20 to 0.40) | 0.25 | 0.01 | 0.25 | no |"
    )
