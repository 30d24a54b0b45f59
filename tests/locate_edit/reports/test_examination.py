"""`examine`: the parts agree with what does each alone, random masks are edited once, and the page holds everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from locate_edit import EditError, edit, evaluate, examine, robustness
from locate_edit.attacks.logit_lens import LogitLens
from locate_edit.attacks.quantisation import Quantisation
from locate_edit.attacks.relearning import Relearning
from locate_edit.editing import Edit
from locate_edit.engine import Run
from locate_edit.errors import Interrupted, PromptError
from locate_edit.methods.eul import EUL
from locate_edit.methods.npo import NPO
from locate_edit.metrics.likelihood import likelihood
from locate_edit.prompts import PromptSet
from locate_edit.reports.examination import Examination
from locate_edit.reports.layers import layers
from locate_edit.reports.report import FILES, Report
from tests.locate_edit.engine_setting import model, prompts, some_units
from tests.locate_edit.reports.test_report import read

ATTACKS: list[Any] = [LogitLens(), Quantisation(), Relearning(steps=2)]


@dataclass(frozen=True)
class Counted:
    """Gradient ascent that counts how often it is run."""

    runs: list[int]

    def __call__(self, run: Run) -> None:
        self.runs.append(1)
        NPO(steps=2, lr=1e-2)(run)


def made(method: Any = None) -> tuple[nn.Module, Edit]:
    net, (forget, retain) = model("llama"), prompts("llama")
    return net, edit(
        net, method or NPO(steps=4, lr=2e-2), some_units(net), forget=forget, retain=retain
    )


def believe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model knows nothing, so attacks do not find their controls: take their numbers all the same."""
    monkeypatch.setattr("locate_edit.reports.robustness._not_found", lambda *_: "")


def test_every_part_is_what_its_own_function_gives(
    untouched: Callable[[nn.Module], nn.Module],
) -> None:
    net, done = made()
    untouched(net)
    oracle = untouched(model("llama", hidden_act="relu"))
    found = examine(done, [likelihood], oracle=oracle, attacks=ATTACKS, seed=3)
    assert done.mask is not None
    mask = done.mask.random_like(seed=4)
    alone = evaluate(done, [likelihood], oracle=oracle, random=[mask], seed=3)
    assert found.report.to_json() == alone.to_json()
    attacked = robustness(done, ATTACKS, oracle=oracle, random=[mask], seed=3)
    assert found.robustness is not None
    for mine, other in zip(found.robustness.trials, attacked.trials, strict=True):
        assert (mine.name, mine.withheld, mine.does) == (other.name, other.withheld, other.does)
        for state, each in mine.found.items():
            assert each.forget.estimate == other.found[state].forget.estimate
    looked = layers(done, oracle=oracle, random=[mask])
    assert found.layers is not None
    assert found.layers.to_json() == looked.to_json()
    assert list(found.pictures) == ["weight_change"]
    assert found.notes == ()
    assert "Examination(" in repr(found)


def test_random_masks_are_edited_once() -> None:
    counted = Counted([])
    _, done = made(counted)
    examine(done, [likelihood], attacks=[LogitLens()], random=2)
    assert len(counted.runs) == 1 + 2


def test_the_page_and_the_files(tmp_path: Path) -> None:
    _, done = made()
    found = examine(done, [likelihood], attacks=ATTACKS)
    found.save(tmp_path / "out")
    page = read((tmp_path / "out" / "report.html").read_text("utf-8"))
    text = "".join(page.text)
    for question, said in found.answers.items():
        assert f"{question}{said}" in text
    assert list(found.answers)[-2:] == ["Is it gone, or only hidden?", "Where is it still?"]
    assert page.open == []
    assert "script" not in page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {f"{name}.png" for name in ("carried", "lens", "weight_change", "before_after")}
    assert pictures <= written
    assert all(any(fnmatch(name, pattern) for pattern in FILES) for name in written)
    assert len(page.links) == len([name for name in written if name.endswith(".png")])
    data = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text("utf-8"))
        for name in ("report", "robustness", "layers")
    }
    assert Report.from_json(data["report"]).value("likelihood") == found.report.value("likelihood")
    assert [trial["name"] for trial in data["robustness"]["trials"]] == [
        "LogitLens", "Quantisation", "Relearning",
    ]  # fmt: skip
    assert data["layers"]["layers"] == 3
    for part in (found.to_markdown(), found.to_html(), found._repr_html_(), str(found)):
        assert "Is it gone, or only hidden?" in part
    assert json.dumps(found.to_json(), default=str)
    # A withheld attack says why, on the page too.
    withheld = [trial for trial in found.robustness.trials if trial.withheld]  # type: ignore[union-attr]
    assert withheld
    for trial in withheld:
        assert trial.title in text
        assert f"no number: {trial.withheld}" in text


def test_what_cannot_be_told_is_noted_and_the_rest_goes_on() -> None:
    net, (forget, retain) = model("llama"), prompts("llama")
    done = edit(net, EUL(steps=2), some_units(net), forget=forget, retain=retain)
    found = examine(done, [likelihood], attacks=[], random=False)
    assert found.robustness is None
    assert found.pictures == {}
    assert found.notes == ("Not told: where the weights moved. the edit changes no weights",)
    assert found.notes[0] in found.to_html()
    assert "Is it gone" not in str(found)
    done.undo()
    _, whole = made()
    whole.undo()
    alone = edit(net, NPO(steps=1), None, forget=forget, retain=retain)
    found = examine(alone, [likelihood], attacks=[])
    assert "No random control: the edit has no mask" in found.notes[0]


def test_what_goes_wrong_late_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    _, done = made()
    believe(monkeypatch)
    monkeypatch.setattr("locate_edit.reports.examination.layers", broken)
    monkeypatch.setattr("locate_edit.draw.robustness.attack_dots", broken)
    found = examine(done, [likelihood], attacks=[LogitLens()])
    assert (
        "Not told: which layers still carry the answers. RuntimeError: out of memory" in found.notes
    )
    found.save(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Not drawn: the attacks. RuntimeError: out of memory" in page
    assert (tmp_path / "out" / "robustness.json").exists()


def test_an_oracle_of_another_depth_does_not_cost_the_layers() -> None:
    _, done = made()
    oracle = model("llama", num_hidden_layers=2)
    found = examine(done, [likelihood], oracle=oracle, attacks=[])
    assert found.layers is not None
    assert "oracle" not in found.layers.lens
    assert any("Looked at without the oracle" in note for note in found.notes)


@pytest.mark.parametrize("where", ["robustness", "layers"])
def test_an_interruption_keeps_what_was_done(
    where: str, monkeypatch: pytest.MonkeyPatch, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    net, done = made()
    untouched(net)
    target = "robustness._trial" if where == "robustness" else "examination.layers"
    believe(monkeypatch)
    monkeypatch.setattr(f"locate_edit.reports.{target}", stop)
    with pytest.raises(Interrupted) as stopped:
        examine(done, [likelihood], attacks=[LogitLens()])
    found = stopped.value.found
    assert found.report.value("likelihood") is not None
    (trial,) = found.robustness.trials
    assert bool(trial.found) == (where == "layers")
    assert any(note.startswith("Interrupted") for note in found.notes)
    assert "Interrupted" in found.to_html()


def test_several_random_masks_can_be_saved_with_a_curve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, done = made()
    believe(monkeypatch)
    found = examine(done, [likelihood], attacks=[Relearning(steps=2)], random=2)
    assert "random" in found.robustness["Relearning"].found  # type: ignore[index]
    found.save(tmp_path / "out")
    assert (tmp_path / "out" / "relearning.png").exists()


def test_what_cannot_be_examined() -> None:
    net, done = made()
    with pytest.raises(EditError, match=r"takes an applied edit, got LlamaForCausalLM"):
        examine(net)  # type: ignore[arg-type]
    forget = done.forget
    done.undo()
    with pytest.raises(EditError, match="takes an applied edit, got Edit"):
        examine(done)
    done.apply(net)
    done.retain = None
    with pytest.raises(PromptError, match="no retain prompts"):
        examine(done, [likelihood], attacks=[LogitLens()])
    assert isinstance(forget, PromptSet)
    assert isinstance(Examination(Report(())).answers, dict)
