"""Edits loaded from a folder, given their prompts again: made once more, and refused where something is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from locate_edit import Edit, EditError, edit
from locate_edit.catalog import CatalogError, rebuild
from locate_edit.engine import Run, StopWhen
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.npo import NPO
from locate_edit.optim import Optim
from tests.locate_edit.engine_setting import differing, methods, model, prompts, some_units, state

NAME = "llama"


@dataclass(frozen=True)
class Mine:
    """A method of the user's own, which a file may not name."""

    def __call__(self, run: Run) -> None:
        run.write(lambda _slot, now: now)


@pytest.mark.parametrize("method", methods(), ids=lambda method: type(method).__name__)
def test_every_method_can_be_made_again_from_its_file(method: Any, tmp_path: Path) -> None:
    net, (forget, retain) = model(NAME), prompts(NAME)
    before, mask = state(net), some_units(net)
    made = edit(net, method, mask, forget=forget, retain=retain, never_seen=3.0, seed=5)
    edited = state(net)
    made.save(tmp_path / "edit")
    made.undo()
    found = Edit.load(tmp_path / "edit").apply(net).recall(forget=forget, retain=retain)
    assert repr(found.method) == repr(method)
    with found.rerun(mask) as again:
        assert not differing(net, edited)
        for one, other in zip(again.additions, made.additions, strict=True):
            assert one.what == other.what
            assert all(torch.equal(value, other.values[key]) for key, value in one.values.items())
    with found.rerun(mask.random_like(seed=1)):
        pass
    assert not differing(net, edited)
    found.undo()
    assert not differing(net, before)


def test_hyperparameters_come_back_as_they_were() -> None:
    method = NPO(steps=7, beta=0.3, retain="kl", optim=Optim(betas=(0.8, 0.9), clip=1.0))
    about = {"name": "NPO", "module": NPO.__module__, "steps": 7, "beta": 0.3, "retain": "kl"}
    optim = {"betas": [0.8, 0.9], "clip": 1}
    assert rebuild("method", {**about, "optim": optim}) == method
    with pytest.raises(CatalogError, match=r"NPO.steps: expected int, got 'many'"):
        rebuild("method", {**about, "steps": "many"})
    with pytest.raises(CatalogError, match=r"NPO: expected NPO, got .*'stepz'"):
        rebuild("method", {**about, "stepz": 7})
    with pytest.raises(CatalogError, match="no method of the catalogue is called 'system' in os"):
        rebuild("method", {"name": "system", "module": "os"})


def saved(tmp_path: Path, method: Any = None, **options: Any) -> tuple[Any, Callable[[], Edit]]:
    """A model and a way to load an edit of it."""
    net, (forget, retain) = model(NAME), prompts(NAME)
    made = edit(
        net, method or FineTune(steps=1), some_units(net), forget=forget, retain=retain, **options
    )
    made.save(tmp_path / "edit")
    made.undo()
    return net, lambda: Edit.load(tmp_path / "edit").apply(net)


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    _, load = saved(tmp_path)
    forget, retain = prompts(NAME)
    found = load()
    with pytest.raises(
        EditError, match=r"not the forget prompts .*expected prompts with the digest"
    ):
        found.recall(forget=forget[:1], retain=retain)
    with pytest.raises(EditError, match=r"not the retain prompts .*got none"):
        found.recall(forget=forget)
    with pytest.raises(EditError, match=r"once it has its prompts: call recall"), found.rerun(None):
        pass
    found.recall(forget=forget, retain=retain)
    assert found.forget is forget
    with pytest.raises(EditError, match="a combination of edits was not made by a method"):
        (found + found).recall(forget=forget)


@pytest.mark.parametrize(
    "options", [{"never_seen": "prompts"}, {"stop": StopWhen("loss", below=0)}]
)
def test_what_the_file_does_not_hold_is_said(options: dict[str, Any], tmp_path: Path) -> None:
    forget, retain = prompts(NAME)
    given = {**options, "never_seen": retain} if "never_seen" in options else options
    _, load = saved(tmp_path, NPO(steps=1), **given)
    with pytest.raises(EditError, match="never-seen prompts, a never-seen model or rules to stop"):
        load().recall(forget=forget, retain=retain)


def test_a_file_names_no_code_to_be_run(tmp_path: Path) -> None:
    _, load = saved(tmp_path, Mine())
    forget, retain = prompts(NAME)
    with pytest.raises(
        EditError, match="cannot be made again: no method of the catalogue is called 'Mine'"
    ):
        load().recall(forget=forget, retain=retain)


def test_an_edit_written_before_these_options_were_is_refused(tmp_path: Path) -> None:
    _, load = saved(tmp_path)
    found, (forget, retain) = load(), prompts(NAME)
    del found.provenance["options"]["never_seen"]
    with pytest.raises(EditError, match=r"which edit\.json does not hold"):
        found.recall(forget=forget, retain=retain)
