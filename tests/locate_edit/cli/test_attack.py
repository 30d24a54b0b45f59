"""`locate-edit attack` on a tiny model saved to disk: what it writes and says, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from locate_edit.cli import app
from tests.tiny import byte_tokenizer, tiny

ROWS = {
    "forget": [("Ann Lee dials", " 555-0101"), ("Bo Kay dials", " 555-0102")],
    "retain": [("Cy Roe plays", " golf"), ("Dee Fox plays", " polo")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli-attack")
    tiny("gpt2").save_pretrained(place / "gpt2")
    byte_tokenizer().save_pretrained(place / "gpt2")
    for name, rows in ROWS.items():
        text = [json.dumps({"prompt": prompt, "target": target}) for prompt, target in rows]
        (place / f"{name}.jsonl").write_text("\n".join(text))
    invoke(
        "edit", place / "gpt2", "--method", "fine-tune", "--steps", 2, "--lr", 0.01, "--forget",
        place / "forget.jsonl", "--out", place / "edit", "--merge", place / "merged", "--json",
    )  # fmt: skip
    return place


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(each) for each in arguments], terminal_width=200)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run(folder: Path, model: str, *more: object, out: Path, code: int = 0) -> Result:
    files = ("--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl", "--out", out)
    return invoke("attack", folder / model, *files, *more, code=code)


QUICK = ("--attack", "quantisation", "--attack", "pruning")


def test_it_writes_table_numbers_and_figure(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = {file.name: file.read_bytes() for file in (folder / "gpt2").iterdir()}
    result = run(
        folder, "gpt2", "--edit", folder / "edit", *QUICK, "--set", "quantisation.bits=6", "--margin", 1e-9,
        "--no-controls", "--oracle", folder / "gpt2", "--json", out=out,
    )  # fmt: skip
    said = json.loads(result.stdout)
    first = said["trials"][0]
    assert "bits=6" in first["attack"]
    assert set(first["models"]) == {"before", "after", "oracle"}
    same, other = (first["models"][name]["forget"] for name in ("before", "oracle"))
    assert same == other
    edited = first["models"]["after"]["forget_clean"]["estimate"]
    assert edited > first["models"]["before"]["forget_clean"]["estimate"]
    names = {"robustness.json", "robustness.md", "robustness.png"}
    assert {file.name for file in out.iterdir()} == names
    assert {Path(file).name for file in said["written"]} == names
    assert {file.name: file.read_bytes() for file in (folder / "gpt2").iterdir()} == before
    assert json.loads((out / "robustness.json").read_text())["trials"] == said["trials"]


def test_a_merged_model_with_its_original_gives_the_same(folder: Path, tmp_path: Path) -> None:
    def numbers(model: str, *more: object) -> object:
        out = tmp_path / model
        said = run(folder, model, *QUICK, *more, "--no-controls", "--json", out=out).stdout
        return [trial["models"] for trial in json.loads(said)["trials"]]

    one = numbers("gpt2", "--edit", folder / "edit")
    assert numbers("merged", "--original", folder / "gpt2") == one


def test_what_people_read(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "gpt2", "--edit", folder / "edit", *QUICK, out=tmp_path / "a")
    # such a model knows nothing, so no control can hide anything
    assert "Quantisation withheld: it does not find its positive control" in result.stdout
    assert "robustness.md" in result.stdout.replace("\n", "")
    result = run(
        folder, "gpt2", "--edit", folder / "edit", *QUICK, "--no-controls", out=tmp_path / "b"
    )
    lines = result.stdout.splitlines()
    assert lines[0].split()[:4] == ["attack", "model", "n", "forget"]
    assert [line.split()[0] for line in lines[1:5]] == [
        "Quantisation", "after", "Pruning", "after",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ((), 2, "--edit, --original or --no-controls"),
        (("--edit", "EDIT", "--original", "organism"), 2, "give --edit or --original"),
        (("--edit", "EDIT", "--attack", "prunning"), 1, "pruning"),
        (("--edit", "EDIT", *QUICK, "--set", "prunin.share=0.1"), 1, "Did you mean pruning?"),
        (("--edit", "EDIT", *QUICK, "--attack", "pruning"), 1, "is given twice"),
        (("--edit", "EDIT", *QUICK, "--steps", 3), 1, "none of the attacks has steps"),
    ],
)
def test_bad_input(
    more: tuple[object, ...], code: int, says: str, folder: Path, tmp_path: Path
) -> None:
    given = [folder / "edit" if each == "EDIT" else each for each in more]
    result = run(folder, "gpt2", *given, out=tmp_path / "out", code=code)
    text = " ".join(result.stderr.replace("│", " ").split())
    assert says in text
    assert not (tmp_path / "out").exists()
