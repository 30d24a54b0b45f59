"""`locate-edit ensemble` on a tiny model saved to disk: deletion against retraining, votes, teachers, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from locate_edit import Edit
from locate_edit.checkpoints import load
from locate_edit.cli import app
from locate_edit.cli._ensemble import fairness_of, settings
from locate_edit.ensembles.fair_votes import joint
from locate_edit.ensembles.leave_one_out import LeaveOneOut, soft_labels
from locate_edit.ensembles.sisa import ShardedEnsemble, Sisa
from locate_edit.methods.fine_tune import FineTune
from locate_edit.prompts import PromptSet
from tests.tiny import byte_tokenizer, tiny

NAMES = ("Ann", "Bo", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal", "Ida", "Jo")
ROWS = [{"prompt": f"{name} dials", "target": f" 555-010{i}"} for i, name in enumerate(NAMES)]
MASK = "L1.neuron[3 17-20]"


def write_rows(file: Path, rows: Sequence[object]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["ensemble", *map(str, arguments)], terminal_width=200)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def said(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(invoke(*arguments, "--json").stdout)
    return found


def trained(place: Path, data: Path, out: Path, *more: object) -> dict[str, Any]:
    options = ("--mask", MASK, "--steps", 2, "--lr", 0.01, "--seed", 1)
    return said("train", place / "gpt2", "--data", data, *options, *more, "--out", out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows and an ensemble of three shards of two slices."""
    place = tmp_path_factory.mktemp("cli-ensemble")
    tiny("gpt2").save_pretrained(place / "gpt2")
    byte_tokenizer().save_pretrained(place / "gpt2")
    write_rows(place / "data.jsonl", ROWS)
    about = trained(place, place / "data.jsonl", place / "ensemble")
    assert about["rows"] == sum(about["rows of each shard"]) == len(ROWS)
    assert about["voters"] == 3
    return place


def read(place: Path, folder: Path, data: Path) -> ShardedEnsemble:
    model, tokenizer = load(str(place / "gpt2"))
    rows = PromptSet.from_jsonl(data, tokenizer, masked=False)
    return ShardedEnsemble.load(folder, settings(folder), model, rows)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_training_is_that_of_the_library(place: Path) -> None:
    found = read(place, place / "ensemble", place / "data.jsonl")
    sisa = Sisa(FineTune(steps=2, lr=0.01), seed=1, options={"batch_size": 8})
    assert found.sisa == sisa
    own = sisa.train(found.model, found.data, found.mask)
    for shard in range(3):
        with own.member(shard) as model:
            wanted = {name: p.clone() for name, p in model.named_parameters()}
        with found.member(shard) as model:
            assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


def test_every_deletion_is_training_without_the_row(place: Path, tmp_path: Path) -> None:
    """In place, one row after the other, until slices and shards run empty."""
    folder, data = tmp_path / "ensemble", place / "data.jsonl"
    shutil.copytree(place / "ensemble", folder)
    for count in range(6):
        before = read(place, folder, data)
        at = before.places[0]
        stages = set(before.places[1:])
        wanted = {p for p in stages if p.shard == at.shard and p.slice >= at.slice}
        left = tmp_path / f"left{count}.jsonl"
        about = said("delete", folder, place / "gpt2", "--data", data, "--row", 0, "--left", left)
        assert about["stages trained again"] == len(wanted)
        assert about["share of training repeated"] == len(wanted) / len(stages)
        assert about["copies that stay"] == []
        assert [json.loads(line) for line in left.read_text().splitlines()] == ROWS[count + 1 :]
        data = left
        if count == 0:
            trained(place, left, tmp_path / "fresh")
            assert files(folder) == files(tmp_path / "fresh")
    assert len(read(place, folder, data).data) == 4


def test_copies_that_stay_are_listed_and_rows_go_by_id(place: Path, tmp_path: Path) -> None:
    rows = [{**row, "id": 100 - i} for i, row in enumerate(ROWS)]
    copy = {**ROWS[2], "prompt": "CY  dials", "id": "copy"}
    data = write_rows(tmp_path / "data.jsonl", [*rows, copy])
    trained(place, data, tmp_path / "one")
    before = files(tmp_path / "one")
    command = (
        "delete",
        tmp_path / "one",
        place / "gpt2",
        "--data",
        data,
        "--left",
        tmp_path / "left.jsonl",
    )
    failed = invoke(*command, "--row", 2, code=1)
    assert "--row 2: expected the id of a row" in failed.stderr
    assert not (tmp_path / "left.jsonl").exists()
    about = said(*command, "--row", 98, "--out", tmp_path / "two")
    assert (about["deleted rows"], about["copies that stay"]) == ([2], [9])
    assert files(tmp_path / "one") == before != files(tmp_path / "two")


def test_votes_are_those_of_the_library(place: Path, tmp_path: Path) -> None:
    data, out = place / "data.jsonl", tmp_path / "votes.json"
    prompts = write_rows(tmp_path / "test.jsonl", ROWS[:4])
    command = (
        "predict",
        place / "ensemble",
        place / "gpt2",
        "--data",
        data,
        "--prompts",
        prompts,
        "--out",
        out,
    )
    about = said(*command, "--choice", " 555", "--choice", " golf")
    ensemble = read(place, place / "ensemble", data)
    asked = PromptSet.from_jsonl(prompts, ensemble.data.tokenizer, masked=False)
    ballots = ensemble.answers(asked, (" 555", " golf"))
    names = [[(" 555", " golf")[v] for v in item] for item in ballots.T.tolist()]
    assert [each["votes"] for each in about["answers"]] == names
    assert json.loads(out.read_text())["answers"] == about["answers"]
    tokens = said(*command)["answers"]
    wanted = ensemble.next_tokens(asked).T.tolist()
    decode = ensemble.data.tokenizer.decode
    assert [each["votes"] for each in tokens] == [[decode([t]) for t in item] for item in wanted]
    assert all(each["votes"].count(each["answer"]) == 3 * each["share"] for each in tokens)


class Planted:
    """An ensemble whose three voters have made up their minds: one row of votes a prompt set, by its name."""

    voters = (0, 1, 2)

    def __init__(self, votes: dict[str, torch.Tensor]) -> None:
        self.votes = votes

    def answers(self, prompts: PromptSet, choices: Sequence[str], batch_size: int) -> torch.Tensor:
        return self.votes[prompts.name]


def judged(n: int, seed: int) -> tuple[list[dict[str, str]], torch.Tensor]:
    """Rows with answers and groups, and votes for 1 that are more often wrong about one group."""
    draw = torch.Generator().manual_seed(seed)
    label, group = (torch.rand(n, generator=draw) < 0.5 for _ in range(2))
    wrong = torch.rand(3, n, generator=draw) < torch.where(group, 0.4, 0.1)
    rows = [
        {"prompt": f"Is it {i}?", "target": " yes" if y else " no", "group": "b" if g else "a"}
        for i, (y, g) in enumerate(zip(label.tolist(), group.tolist(), strict=True))
    ]
    return rows, (label ^ wrong).long()


def test_fairness_is_that_of_the_library_and_joint_closes_the_gap() -> None:
    parts = {name: judged(600, seed) for seed, name in enumerate(("fit", "test"))}
    ensemble: Any = Planted({name: votes for name, (_, votes) in parts.items()})
    sets = [PromptSet(rows, byte_tokenizer(), name=name) for name, (rows, _) in parts.items()]
    found = fairness_of(ensemble, sets[0], sets[1], (" no", " yes"), 8)
    labels, groups = (
        [[row[key] for row in rows] for rows, _ in parts.values()] for key in ("target", "group")
    )
    truth = [[text == " yes" for text in texts] for texts in labels]
    rule = joint(parts["fit"][1].numpy(), truth[0], groups[0])
    wanted = rule(parts["test"][1].numpy(), groups[1])
    assert found["probability of ' yes'"]["joint"] == wanted.tolist()
    majority = parts["test"][1].sum(0) >= 2
    assert found["probability of ' yes'"]["vote"] == majority.double().tolist()
    right = (majority == torch.tensor(truth[1])).double().mean()
    assert found["placements"]["vote"]["accuracy"] == pytest.approx(float(right))
    gaps = {name: each["gap"] for name, each in found["placements"].items()}
    assert gaps["vote"] > 0.2, "the votes must be unfair first"
    assert gaps["joint"] < gaps["vote"] - 0.1


def test_fair_on_the_command_line(place: Path, tmp_path: Path) -> None:
    rows = judged(24, 3)[0]
    files_ = {n: write_rows(tmp_path / f"{n}.jsonl", rows[i::2]) for i, n in enumerate(("fit", "test"))}  # fmt: skip
    common = ("fair", place / "ensemble", place / "gpt2", "--data", place / "data.jsonl")
    sets = ("--fit", files_["fit"], "--test", files_["test"])
    choices, out = ("--choice", " no", "--choice", " yes"), tmp_path / "fair.json"
    about = said(*common, *sets, *choices, "--out", out)
    assert set(about["placements"]) == {"vote", "per shard", "after the vote", "joint"}
    assert json.loads(out.read_text())["placements"] == about["placements"]
    bare = write_rows(tmp_path / "bare.jsonl", [{k: v for k, v in rows[0].items() if k != "group"}])
    other = write_rows(tmp_path / "other.jsonl", [{**rows[0], "target": " maybe"}])
    for arguments, message in (
        ((*sets, *choices[:2]), "--choice is needed twice"),
        ((*sets[:3], bare, *choices), "no 'group'"),
        (
            (*sets[:3], other, *choices),
            "expected one of [' no', ' yes'] as the target, got ' maybe'",
        ),
    ):
        said_wrong = invoke(*common, *arguments, "--out", tmp_path / "no.json", code=1).stderr
        assert message in said_wrong
    assert not (tmp_path / "no.json").exists()


def test_forgetting_is_leave_one_out_on_the_student(place: Path, tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "forget.jsonl", ROWS[:2])
    tuned = tmp_path / "tuned"
    result = CliRunner().invoke(app, [str(each) for each in (
        "edit", place / "gpt2", "--method", "fine-tune", "--steps", 3, "--lr", 0.05, "--mask", MASK, "--forget",
        place / "data.jsonl", "--out", tmp_path / "first", "--merge", tuned,
    )])  # fmt: skip
    assert result.exit_code == 0, result.output
    about = said(
        "forget", place / "ensemble", place / "gpt2", "--data", place / "data.jsonl", "--forget", texts,
        "--student", tuned, "--steps", 3, "--lr", 0.02, "--out", tmp_path / "edit",
    )  # fmt: skip
    ensemble = read(place, place / "ensemble", place / "data.jsonl")
    asked = PromptSet.from_jsonl(texts, ensemble.data.tokenizer, masked=False)
    labels = soft_labels(ensemble, asked, batch_size=8)
    assert about["teachers of each prompt"] == [list(each) for each in labels.teachers]
    assert all(len(each) == 2 for each in about["teachers of each prompt"])
    from locate_edit import edit

    wanted, got = (AutoModelForCausalLM.from_pretrained(tuned) for _ in range(2))
    edit(wanted, LeaveOneOut(labels, steps=3, lr=0.02), ensemble.mask, forget=asked, batch_size=8)
    before = {name: p.detach().clone() for name, p in got.named_parameters()}
    Edit.load(tmp_path / "edit").apply(got)
    after = dict(wanted.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in got.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in got.named_parameters())


def test_bad_input_is_explained_and_changes_nothing(place: Path, tmp_path: Path) -> None:
    before, data = files(place / "ensemble"), place / "data.jsonl"
    shorter = write_rows(tmp_path / "shorter.jsonl", ROWS[1:])
    left = ("--left", tmp_path / "left.jsonl")
    command = ("delete", place / "ensemble", place / "gpt2")
    for arguments, message in (
        ((*command, "--data", shorter, "--row", 0, *left), "are not the rows of"),
        ((*command, "--data", data, "--row", 10, *left), "expected a number from 0 to 9"),
        ((*command, "--data", data, "--row", 0, "--left", data), "is the file of --data"),
        ((*command, "--data", data, "--row", 0, "--left", place / "ensemble" / "l"), "is inside"),
        ((*command, "--data", data, "--row", 0, *left, "--out", place / "gpt2"), "has no ensemble.json"),
        (("train", place / "gpt2", "--data", data, "--out", place / "gpt2"), "has no ensemble.json"),
        (("train", place / "gpt2", "--data", data, "--shards", 99, "--out", tmp_path / "x"), "fewer shards"),
        (("delete", tmp_path / "none", place / "gpt2", "--data", data, "--row", 0, *left), "cannot be read"),
    ):  # fmt: skip
        assert message in invoke(*arguments, code=1).stderr
    assert files(place / "ensemble") == before
    assert {file.name for file in tmp_path.iterdir()} == {"shorter.jsonl"}


def test_an_ensemble_of_another_method_is_refused(place: Path, tmp_path: Path) -> None:
    from locate_edit.methods.gradient_ascent import GradientAscent

    ensemble = read(place, place / "ensemble", place / "data.jsonl")
    other = Sisa(GradientAscent(steps=1, lr=1e-3)).train(
        ensemble.model, ensemble.data, ensemble.mask
    )
    other.save(tmp_path / "other")
    failed = invoke(
        "predict", tmp_path / "other", place / "gpt2", "--data", place / "data.jsonl", "--prompts",
        place / "data.jsonl", "--out", tmp_path / "votes.json", code=1,
    )  # fmt: skip
    assert "the command line knows ensembles of FineTune only" in failed.stderr
    assert not (tmp_path / "votes.json").exists()
