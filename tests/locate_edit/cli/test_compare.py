"""`locate-edit compare` on a tiny model saved to disk: results, going on after an interruption, and bad input."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from locate_edit.cli import app
from locate_edit.engine import Run
from locate_edit.methods.fine_tune import FineTune
from tests.tiny import byte_tokenizer, tiny

ROWS = {
    "forget": [("Ann Lee dials", " 555-0101"), ("Bo Kay dials", " 555-0102")],
    "retain": [("Cy Roe plays", " golf"), ("Dee Fox plays", " polo")],
    "others": [("Ed Poe plays", " chess")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli-compare")
    tiny("gpt2").save_pretrained(place / "gpt2")
    byte_tokenizer().save_pretrained(place / "gpt2")
    for name, rows in ROWS.items():
        text = [json.dumps({"prompt": prompt, "target": target}) for prompt, target in rows]
        (place / f"{name}.jsonl").write_text("\n".join(text))
    return place


def run(folder: Path, *more: object, out: Path, code: int = 0) -> Result:
    files = ("--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl", "--out", out)
    result = CliRunner().invoke(
        app, ["compare", *map(str, (folder / "gpt2", *files, *more))], terminal_width=200
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


SMALL = ("--localizer", "magnitude", "--budget", 3, "--lr", 0.01)


def test_it_writes_table_numbers_and_figures(folder: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in (folder / "gpt2").iterdir()}
    out = tmp_path / "out"
    result = run(
        folder, *SMALL, "--budget", 5, "--method", "fine-tune", "--method", "npo", "--steps", 2,
        "--set", "npo.beta=0.3", "--seeds", 2, "--also", f"others={folder / 'others.jsonl'}",
        "--oracle", folder / "gpt2", "--json", out=out,
    )  # fmt: skip
    said = json.loads(result.stdout)
    assert len(said["cells"]) == 2 * 2 * 2 * 2
    assert {cell["localizer"] for cell in said["cells"]} == {"Magnitude", said["random"]}
    assert {"forget/oracle_kl", "retain/likelihood", "others/likelihood"} <= set(said["original"])
    assert all(cell["values"]["others/likelihood"] for cell in said["cells"])
    names = {"comparison.json", "comparison.md", "heat-map.png", "trade-off.png"}
    assert {Path(file).name for file in said["written"]} == names
    assert {file.name for file in out.iterdir()} == names | {"cells"}
    assert (out / "heat-map.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "cells").iterdir())) == 16
    assert {file.name: file.read_bytes() for file in (folder / "gpt2").iterdir()} == before
    values = {c["method"]: c["values"]["forget/likelihood"] for c in said["cells"][:8]}
    assert values["FineTune"] > said["original"]["forget/likelihood"] > values["NPO"]


def test_the_table_for_people(folder: Path, tmp_path: Path) -> None:
    result = run(folder, *SMALL, "--method", "fine-tune", "--steps", 1, out=tmp_path / "out")
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["localizer", "method", "units"]
    assert [line.split()[0] for line in lines[1:4]] == ["original", "Magnitude", "random"]
    assert "trade-off.png" in "".join(lines[4:]).replace("\n", "")


def test_settings_reach_what_they_name(folder: Path, tmp_path: Path) -> None:
    def values(out: str, *more: object) -> object:
        named = ("--method", "fine-tune", "--json")
        cells = json.loads(run(folder, *SMALL, *named, *more, out=tmp_path / out).stdout)["cells"]
        return [cell["values"] for cell in cells]

    plain = values("a", "--steps", 2)
    assert values("b", "--set", "fine-tune.steps=2") == plain
    assert values("c", "--steps", 1, "--set", "fine-tune.steps=2") == plain  # its own goes first
    assert values("d", "--steps", 1) != plain
    assert values("e", "--steps", 2, "--set", "magnitude.kinds=head") != plain


def test_metrics_take_settings_and_finished_cells_are_theirs_alone(
    folder: Path, tmp_path: Path
) -> None:
    def cells(k: float) -> set[str]:
        run(
            folder, *SMALL, "--method", "fine-tune", "--steps", 1, "--metric", "min-k", "--set", f"min-k.k={k}",
            "--folder", tmp_path / "cells", out=tmp_path / f"{k}",
        )  # fmt: skip
        return {file.name for file in (tmp_path / "cells").iterdir()}

    first = cells(0.2)
    assert cells(0.2) == first
    both = cells(0.9)
    assert first < both
    assert len(both) == 2 * len(first)


@dataclass(frozen=True)
class PressesCtrlC:
    """A method that is interrupted."""

    def __call__(self, run: Run) -> None:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Breaks:
    """A method that cannot do it."""

    def __call__(self, run: Run) -> None:
        raise ValueError("no way")


def test_an_interruption_keeps_finished_cells_and_the_same_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = (
        *SMALL,
        "--method",
        "fine-tune",
        "--method",
        f"{__name__}:PressesCtrlC",
        "--steps",
        1,
    )
    result = run(folder, *arguments, out=out, code=130)
    said = "".join(result.stderr.split("\n"))
    assert "Interrupted. 1 cells of 4 were done now and are kept in" in said
    assert "The same command goes on from there." in said
    assert [file.name for file in out.iterdir()] == ["cells"]
    times: list[int] = []
    original = FineTune.__call__

    def counted(self: FineTune, given: Run) -> None:
        times.append(1)
        original(self, given)

    monkeypatch.setattr(FineTune, "__call__", counted)
    monkeypatch.setattr(PressesCtrlC, "__call__", original_of(steps=1))
    run(folder, *arguments, out=out)
    assert len(times) == 1  # the cell of the random mask; the other one was kept
    assert (out / "comparison.md").is_file()


def original_of(steps: int) -> object:
    def call(self: PressesCtrlC, given: Run) -> None:
        given.write(lambda _slot, now: now + 0.01 * steps)

    return call


def test_cells_can_be_kept_elsewhere(folder: Path, tmp_path: Path) -> None:
    arguments = (*SMALL, "--method", "fine-tune", "--steps", 1, "--folder", tmp_path / "kept")
    run(folder, *arguments, out=tmp_path / "out")
    assert len(list((tmp_path / "kept").glob("cell-*.json"))) == 2
    assert not (tmp_path / "out" / "cells").exists()


def test_failed_cells_are_said_and_the_others_are_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        folder, *SMALL, "--method", f"{__name__}:Breaks", "--method", "fine-tune", "--method",
        "selective-forgetting", "--steps", 1, "--budget", 10**6, out=out, code=1,
    )  # fmt: skip
    said = " ".join(result.stderr.split())
    assert "10 of 12 cells have no values" in said
    assert "1 x Magnitude, Breaks: ValueError: no way" in said
    assert "spans" in said
    assert "1000000" in said.replace(",", "")
    assert "| Magnitude | FineTune | 3 | 0." in (out / "comparison.md").read_text()
    assert (out / "trade-off.png").is_file()
    nothing = run(
        folder, *SMALL, "--method", f"{__name__}:Breaks", "--steps", 1, out=tmp_path / "b", code=1
    )
    assert "none of the methods has such a hyperparameter" in " ".join(nothing.stderr.split())
    everything = (
        "--localizer", "magnitude", "--budget", 3, "--method", f"{__name__}:Breaks"
    )  # fmt: skip
    result = run(folder, *everything, out=tmp_path / "c", code=1)
    assert "2 of 2 cells have no values" in " ".join(result.stderr.split())
    assert not (tmp_path / "c" / "heat-map.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "npoo"), "No method is called 'npoo'. Did you mean 'npo'?"),
        (("--method", "npo", "--localizer", "wandaa"), "Did you mean 'wanda'?"),
        (("--method", "npo", "--set", "nbo.beta=1"), "Did you mean npo?"),
        (("--method", "npo", "--set", "beta=1"), "expected NAME.HYPERPARAMETER=VALUE"),
        (("--method", "npo", "--set", "npo.bta=1"), "Did you mean 'beta'?"),
        (("--method", "npo", "--metric", "likelyhood"), "Did you mean 'likelihood'?"),
        (("--method", "npo", "--method", "npo"), "two things to compare are called"),
        (("--method", "npo", "--budget", 3), "the budget 3 is given twice"),
        (("--method", "npo", "--oracle", "nowhere/model"), "nowhere/model"),
        (("--method", "npo", "--also", "retain=FOLDER/others.jsonl"), "cannot be called 'retain'"),
    ],
)
def test_bad_input_is_one_message(
    folder: Path, tmp_path: Path, more: tuple[object, ...], message: str
) -> None:
    given = [str(one).replace("FOLDER", str(folder)) for one in more]
    result = run(folder, *SMALL, *given, out=tmp_path / "out", code=1)
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_wrong_usage_and_a_folder_of_something_else(folder: Path, tmp_path: Path) -> None:
    common = ("--localizer", "magnitude", "--method", "npo")
    run(folder, *common, "--budget", 0, out=tmp_path / "out", code=2)
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years")
    result = run(folder, *common, "--budget", 2, out=tmp_path, code=1)
    assert str(tmp_path) in "".join(result.stderr.split("\n"))
    assert thesis.read_text() == "years"
