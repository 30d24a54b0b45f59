"""`locate-edit report` on a tiny model saved to disk, and the random controls of saved edits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from locate_edit.reports.report import Report
from tests.locate_edit.cli.test_attack import ROWS, invoke
from tests.tiny import byte_tokenizer, tiny

UNITS = "L0.neuron[0-9]; L1.neuron[3-7]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli-report")
    tiny("gpt2").save_pretrained(place / "gpt2")
    byte_tokenizer().save_pretrained(place / "gpt2")
    for name, rows in ROWS.items():
        text = [json.dumps({"prompt": prompt, "target": target}) for prompt, target in rows]
        (place / f"{name}.jsonl").write_text("\n".join(text))
    (place / "more.jsonl").write_text(json.dumps({"prompt": "Eve", "target": " x"}))
    for name, retain in (("edit", True), ("without", False)):
        invoke(
            "edit", place / "gpt2", "--method", "npo", "--steps", 2, "--lr", 0.01, "--mask", UNITS, "--forget",
            place / "forget.jsonl", *(("--retain", place / "retain.jsonl") if retain else ()),
            "--out", place / name, "--json",
        )  # fmt: skip
    return place


def files(folder: Path, edit: str = "edit") -> tuple[object, ...]:
    return (
        folder / "gpt2", "--edit", folder / edit, "--forget", folder / "forget.jsonl", "--retain",
        folder / "retain.jsonl",
    )  # fmt: skip


QUICK = ("--attack", "logit-lens", "--attack", "quantisation")


def test_one_page_with_everything(folder: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in (folder / "gpt2").iterdir()}
    out = tmp_path / "report"
    result = invoke(
        "report", *files(folder), *QUICK, "--set", "quantisation.bits=8", "--metric", "likelihood",
        "--also", f"more={folder / 'more.jsonl'}", "--oracle", folder / "gpt2", "--out", out,
    )  # fmt: skip
    for part in ("Is it forgotten?", "Is it gone, or only hidden?", "random mask", "Written:"):
        assert part in result.stdout
    assert {"report.html", "report.json", "robustness.json", "layers.json"} <= {
        file.name for file in out.iterdir()
    }
    found = Report.from_json(json.loads((out / "report.json").read_text()))
    assert found.columns == ("before", "after", "random", "oracle")
    assert found.set_names == ["forget", "retain", "more"]
    attacked = json.loads((out / "robustness.json").read_text())
    assert [trial["name"] for trial in attacked["trials"]] == ["LogitLens", "Quantisation"]
    assert "bits=8" in attacked["trials"][1]["attack"]
    assert before == {file.name: file.read_bytes() for file in (folder / "gpt2").iterdir()}
    again = invoke(
        "report", *files(folder), "--attack", "none", "--random", 0, "--out", out, "--json"
    )
    said = json.loads(again.stdout)
    assert said["robustness"] is None
    assert "Where is it still?" in said["answers"]
    assert not (out / "robustness.json").exists()


def test_an_edit_made_without_retain_gets_its_control_too(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = invoke("report", *files(folder, "without"), "--attack", "none", "--out", out, "--json")
    assert "random" in json.loads(result.stdout)["report"]["metrics"]["forget.likelihood"]
    assert json.loads(result.stdout)["report"]["metrics"]["forget.likelihood"]["random"] is not None


def test_other_prompts_than_the_edits_leave_no_random_control(folder: Path, tmp_path: Path) -> None:
    mixed = list(files(folder))
    mixed[4] = folder / "more.jsonl"
    result = invoke("report", *mixed, "--attack", "none", "--out", tmp_path / "report")
    assert "Note: No random control: these are not the forget prompts" in " ".join(
        result.stdout.split()
    )
    refused = invoke("report", *mixed, "--random", 1, "--out", tmp_path / "no", code=1)
    assert "--random 1: these are not the forget prompts" in refused.output
    assert not (tmp_path / "no").exists()


def test_evaluate_and_attack_make_the_edit_again(folder: Path, tmp_path: Path) -> None:
    measured = invoke("evaluate", *files(folder), "--metric", "likelihood", "--json")
    numbers = json.loads(measured.stdout)["metrics"]["forget.likelihood"]
    assert None not in (numbers["before"], numbers["after"], numbers["random"])
    without = invoke("evaluate", *files(folder), "--random", 0, "--json")
    assert json.loads(without.stdout)["metrics"]["forget.likelihood"]["random"] is None
    plain = invoke("evaluate", folder / "gpt2", "--forget", folder / "forget.jsonl", "--json")
    assert json.loads(plain.stdout)["notes"] == []
    mixed = list(files(folder))
    mixed[4] = folder / "more.jsonl"
    noted = invoke("evaluate", *mixed, "--json")
    assert "no random control: these are not the forget" in json.loads(noted.stdout)["notes"][0]
    attacked = invoke(
        "attack", *files(folder), "--attack", "logit-lens", "--no-controls", "--random", 2, "--out",
        tmp_path / "attacks", "--json",
    )  # fmt: skip
    said = json.loads(attacked.stdout)
    assert said["settings"]["random_masks"] == 2
    assert "random" in said["trials"][0]["models"]


def test_an_edit_without_a_mask_has_no_random_control_and_a_report_all_the_same(
    folder: Path, tmp_path: Path
) -> None:
    invoke(
        "edit", folder / "gpt2", "--method", "npo", "--steps", 2, "--lr", 0.01, "--forget",
        folder / "forget.jsonl", "--retain", folder / "retain.jsonl", "--out", tmp_path / "whole", "--json",
    )  # fmt: skip
    arguments = list(files(folder))
    arguments[2] = tmp_path / "whole"
    said = invoke("report", *arguments, "--attack", "none", "--out", tmp_path / "report")
    assert "No random control: the edit has no mask" in " ".join(said.stdout.split())
    measured = json.loads(invoke("evaluate", *arguments, "--json").stdout)
    assert "the edit has no mask" in measured["notes"][0]
    refused = invoke("report", *arguments, "--random", 1, "--out", tmp_path / "no", code=1)
    assert "a random control was asked for, but the edit has no mask" in refused.output


def test_an_interruption_writes_what_was_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("locate_edit.reports.robustness._trial", stop)
    out = tmp_path / "report"
    said = invoke("report", *files(folder), *QUICK, "--out", out, code=130)
    assert "Interrupted. What was found by then is in" in said.output
    assert Report.from_json(json.loads((out / "report.json").read_text())).columns
    assert "not run: interrupted" in (out / "report.html").read_text("utf-8")
    attacks = tmp_path / "attacks"
    said = invoke("attack", *files(folder), *QUICK, "--out", attacks, code=130)
    assert "What the attacks found by then is in" in said.output
    kept = json.loads((attacks / "robustness.json").read_text())
    assert [trial["withheld"] for trial in kept["trials"]] == ["not run: interrupted"] * 2


def test_attacks_do_not_overwrite_a_report_or_leave_an_old_figure(
    folder: Path, tmp_path: Path
) -> None:
    report, attacks = tmp_path / "report", tmp_path / "attacks"
    invoke("report", *files(folder), "--attack", "logit-lens", "--random", 0, "--out", report)
    kept = (report / "robustness.json").read_bytes()
    refused = invoke("attack", *files(folder), *QUICK, "--out", report, code=1)
    assert "holds files that the new result lacks" in refused.output
    assert (report / "robustness.json").read_bytes() == kept
    invoke("attack", *files(folder), "--attack", "pruning", "--no-controls", "--out", attacks)
    assert (attacks / "robustness.png").exists()
    invoke("attack", *files(folder), "--attack", "pruning", "--margin", 2, "--out", attacks)
    assert not (attacks / "robustness.png").exists()


def test_settings_of_metrics_and_of_attacks(folder: Path, tmp_path: Path) -> None:
    settings = ("--metric", "min-k", "--set", "min-k.k=0.5", "--set", "quantisation.bits=6")
    out = tmp_path / "report"
    said = invoke(
        "report", *files(folder), "--attack", "quantisation", *settings, "--random", 0, "--out", out, "--json"
    )  # fmt: skip
    assert "bits=6" in json.loads(said.stdout)["robustness"]["trials"][0]["attack"]
    other = invoke(
        "evaluate", *files(folder), "--metric", "min-k", "--set", "min-k.k=0.5", "--random", 0, "--json"
    )  # fmt: skip
    mine = json.loads(said.stdout)["report"]["metrics"]
    assert mine == json.loads(other.stdout)["metrics"]
    lost = invoke(
        "report", *files(folder), *settings, "--attack", "none", "--out", tmp_path / "no", code=2
    )
    assert "there is no attack" in " ".join(lost.output.split())


def test_numbers_do_not_replace_a_report_with_attacks(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    invoke("report", *files(folder), "--attack", "logit-lens", "--random", 0, "--out", out)
    refused = invoke("evaluate", *files(folder), "--random", 0, "--out", out, code=1)
    assert "holds files that the new result lacks" in refused.output
    assert (out / "robustness.json").exists()


def test_a_number_that_is_withheld_says_why(folder: Path) -> None:
    said = invoke(
        "evaluate", folder / "gpt2", "--forget", folder / "forget.jsonl", "--metric", "truth-ratio"
    )
    assert "forget.truth_ratio: no number, needs:" in " ".join(said.stdout.split())


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("keep me")
    refused = invoke("report", *files(folder), "--attack", "none", "--out", other, code=1)
    assert "precious.txt" in refused.output or "not an earlier" in refused.output
    unknown = invoke("report", *files(folder), "--attack", "lens", "--out", tmp_path / "x", code=1)
    assert "No attack is called 'lens'" in unknown.output
    metric = invoke(
        "report", *files(folder), "--metric", "forget-qualty", "--attack", "none", "--out", tmp_path / "x", code=1
    )  # fmt: skip
    assert "No metric is called 'forget-qualty'" in metric.output
    assert not (tmp_path / "x").exists()
