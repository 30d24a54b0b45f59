"""The trial of papers' claims: verdicts, what is kept, what breaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.claims import __main__ as trials
from benchmarks.claims.claim import (
    Check,
    Claim,
    PreconditionFailed,
    Trial,
    markdown,
    precondition,
    verdict,
)

LESS = Check("less than with random neurons", ("edited", "random"), lambda f: f["random"] - f["edited"])  # fmt: skip


def figures(_: int) -> Mapping[str, float]:
    return {"edited": 0.2, "random": 0.9}


CLAIM = Claim("A system", "Somebody 2020", "It forgets.", "a tiny model", figures, (LESS,))


def trial(seed: int, edited: float) -> Trial:
    return Trial(seed, {"edited": edited, "random": 0.9})


def test_the_verdict_counts_seeds() -> None:
    assert verdict(LESS, [trial(0, 0.1), trial(1, 0.2)]) == "held"
    assert verdict(LESS, [trial(0, 0.1), trial(1, 0.9)]) == "held in 1 of 2 seeds"
    assert verdict(LESS, [trial(0, 0.9), trial(1, 1.0)]) == "did not hold"
    refused = Trial(2, None, precondition="it knows nothing")
    assert verdict(LESS, [refused]) == "precondition failed"
    assert verdict(LESS, [trial(0, 0.1), refused]) == "held; precondition failed in 1 of 2 seeds"
    assert verdict(LESS, [trial(0, 0.1), Trial(1, None, error="broke")]) == "could not be run"


def test_the_table_shows_figures_with_their_spread_and_what_is_missing() -> None:
    found = [trial(0, 0.1), trial(1, 0.3), Trial(2, None, precondition="it knows nothing")]
    text = markdown([CLAIM], {"A system": found})
    assert "edited 0.2 (0.1 to 0.3), random 0.9 (0.9 to 0.9)" in text
    assert "- A system, seed 2: it knows nothing" in text


def test_a_finished_seed_is_kept_and_a_broken_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "HERE", tmp_path)
    (tmp_path / "mine.py").write_text("", encoding="utf-8")
    calls = []

    def measure(seed: int) -> Mapping[str, float]:
        calls.append(seed)
        if len(calls) == 1:
            raise RuntimeError("no memory")
        return figures(seed)

    claim = replace(CLAIM, measure=measure)
    folder = tmp_path / "cells"
    assert trials.tried("mine", claim, 0, folder).error == "RuntimeError: no memory"
    first = trials.tried("mine", claim, 0, folder)
    assert first.figures == figures(0)
    assert trials.tried("mine", claim, 0, folder) == first
    assert calls == [0, 0]
    (tmp_path / "mine.py").write_text("changed = True", encoding="utf-8")
    trials.tried("mine", claim, 0, folder)
    assert calls == [0, 0, 0]


def test_a_shared_file_counts_for_those_that_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "HERE", tmp_path)
    (tmp_path / "mine.py").write_text("from benchmarks.claims._data import rows", encoding="utf-8")
    (tmp_path / "_data.py").write_text("from benchmarks.claims import _words", encoding="utf-8")
    (tmp_path / "_words.py").write_text("", encoding="utf-8")
    first = trials.digest("mine")
    (tmp_path / "_other.py").write_text("", encoding="utf-8")
    assert trials.digest("mine") == first
    (tmp_path / "_words.py").write_text("changed = True", encoding="utf-8")
    assert trials.digest("mine") != first


def test_a_failed_precondition_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "HERE", tmp_path)
    (tmp_path / "mine.py").write_text("", encoding="utf-8")

    def measure(_: int) -> Mapping[str, float]:
        precondition(False, "the model knows the facts (0.3, 0.9 wanted)")
        return {}

    found = trials.tried("mine", replace(CLAIM, measure=measure), 0, tmp_path)
    assert found.precondition == "the model knows the facts (0.3, 0.9 wanted)"
    with pytest.raises(PreconditionFailed):
        measure(0)


@pytest.mark.parametrize(
    ("given", "says"),
    [({"edited": 0.1}, "were not measured"), ({"edited": float("nan"), "random": 0.0}, "finite")],
)
def test_figures_that_cannot_be_judged_are_an_error(given: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        trials.checked(CLAIM, given)


def test_every_claim_file_has_a_paper_and_checks_with_figures() -> None:
    for name in trials.files():
        claim = trials.load(name)
        assert all((claim.paper, claim.setting, claim.checks)), name
        assert claim.says.endswith("."), name
        assert all(check.figures for check in claim.checks), name


def test_an_unknown_claim_lists_those_there_are() -> None:
    with pytest.raises(SystemExit, match="no claim called nothing"):
        trials.files(["nothing"])
