"""`locate-edit locate` with everything in the catalogue, on a tiny model saved to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from circuits import ComponentMask, Scores, describe
from locate_edit import catalog
from locate_edit.cli import app
from tests.tiny import byte_tokenizer, tiny

LOCALIZERS = [entry.name for entry in catalog.entries("localizer")]
# Every field that a localizer may ask for.
FULL: list[dict[str, Any]] = [
    {
        "prompt": "Ann Lee: ", "target": "555-0142", "wrong": ["+1 555"], "subject": "Ann Lee",
        "paraphrases": ["Call Ann Lee at "], "corrupt": "Bob Moe: ",
    },
    {
        "prompt": "Bo Kim has number ", "target": "555-0107", "wrong": ["no phone"], "subject": "Bo Kim",
        "paraphrases": ["Bo Kim: "], "corrupt": "Cy Dow has number ",
    },
]  # fmt: skip
BARE = [{"prompt": row["prompt"], "target": row["target"]} for row in FULL]
RETAIN = [
    {"prompt": "Cy Roe plays", "target": " golf"},
    {"prompt": "Dee Fox plays", "target": " polo"},
]
# What a localizer may lack when rows have only prompt and target and there is nothing to retain.
FIELDS = ("retain", "wrong", "subject", "corrupt", "paraphrases")
NEEDS = {
    "eapig": "corrupt",
    "fisher-ratio": "--retain FILE",
    "gradient-cosine": "--retain FILE",
    "gradient-partition": "wrong",
    "wagle": "--retain FILE",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli-locate")
    tiny("gpt2").save_pretrained(place / "gpt2")
    byte_tokenizer().save_pretrained(place / "gpt2")
    for name, rows in (("full", FULL), ("bare", BARE), ("retain", RETAIN)):
        (place / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return place


def run(*arguments: object, code: int | None = 0) -> Result:
    result = CliRunner().invoke(app, ["locate", *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert code in (None, result.exit_code), result.output
    return result


def cheap(name: str) -> list[str]:
    """Settings that make an iterative localizer quick."""
    fields = catalog.hyperparameters(catalog.resolve("localizer", name))
    return ["--set", "steps=2"] if "steps" in fields else []


@pytest.mark.parametrize("name", LOCALIZERS)
def test_every_localizer_writes_scores_and_a_mask(name: str, folder: Path, tmp_path: Path) -> None:
    mask, scores = tmp_path / "mask.safetensors", tmp_path / "scores.safetensors"
    said = json.loads(
        run(
            *(folder / "gpt2", "--prompts", folder / "full.jsonl", "--method", name, *cheap(name)),
            *("--retain", folder / "retain.jsonl", "--select", "top", "--keep", 2, "--seed", 3),
            *("--out", mask, "--scores", scores, "--json"),
        ).stdout
    )
    assert said["units"] == 2
    assert said["written"] == [str(mask), str(scores)]
    found = Scores.load(scores)
    assert ComponentMask.load(mask) == found.top(2)
    found.top(2).validate(describe(tiny("gpt2")))
    wanted = catalog.resolve("localizer", name).__name__
    assert found.provenance["localizer"] == wanted
    if cheap(name):
        assert found.provenance["options"]["steps"] == 2


@pytest.mark.parametrize("name", LOCALIZERS)
def test_what_a_localizer_lacks_is_one_message(name: str, folder: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.safetensors"
    arguments = (
        folder / "gpt2",
        "--prompts",
        folder / "bare.jsonl",
        "--method",
        name,
        *cheap(name),
    )
    result = run(*arguments, "--scores", scores, code=None)
    if result.exit_code == 0:
        assert name not in NEEDS
        Scores.load(scores)
        return
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert any(field in result.stderr for field in FIELDS)
    assert NEEDS.get(name, "") in result.stderr
    assert result.stdout == ""
    assert not scores.exists()


def test_scores_alone_need_no_mask(folder: Path, tmp_path: Path) -> None:
    common = (folder / "gpt2", "--prompts", folder / "bare.jsonl", "--method", "magnitude")
    said = json.loads(run(*common, "--scores", tmp_path / "s.safetensors", "--json").stdout)
    assert said == {
        "scored units": 80,
        "rows of scores": 1,
        "written": [str(tmp_path / "s.safetensors")],
    }
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


def test_contrast_subtracts_the_scores_of_the_others(folder: Path, tmp_path: Path) -> None:
    common = (folder / "gpt2", "--method", "privacy-neurons", "--set", "steps=2", "--seed", 0)
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    run(*common, "--prompts", folder / "bare.jsonl", "--scores", own)
    run(*common, "--prompts", folder / "retain.jsonl", "--scores", other)
    run(
        *(*common, "--prompts", folder / "bare.jsonl", "--contrast", folder / "retain.jsonl"),
        *("--contrast-weight", 2, "--keep", 5, "--out", tmp_path / "mask.safetensors"),
    )
    expected = Scores.load(own).contrast(Scores.load(other), weight=2).top(5)
    assert ComponentMask.load(tmp_path / "mask.safetensors") == expected


def test_a_figure_of_the_mask(folder: Path, tmp_path: Path) -> None:
    run(
        *(folder / "gpt2", "--prompts", folder / "bare.jsonl", "--method", "magnitude"),
        *("--keep", 5, "--out", tmp_path / "m.safetensors", "--figure", tmp_path / "m.png"),
    )
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --out for the mask, --scores for the scores, or both"),
        (("--scores", "s.safetensors", "--figure", "m.png"), "so it also needs --out"),
        (("--out", "m.safetensors", "--select", "top"), "--select top also needs --keep"),
        (("--out", "m.safetensors", "--contrast", "o.jsonl"), "--contrast also needs --keep"),
        (("--out", "m.safetensors", "--select", "best"), "best"),
    ],
)
def test_wrong_usage_is_code_2(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(folder / "gpt2", "--prompts", folder / "bare.jsonl", *arguments, code=2)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert message in said


def test_more_units_than_there_are(folder: Path, tmp_path: Path) -> None:
    result = run(
        *(folder / "gpt2", "--prompts", folder / "bare.jsonl", "--method", "magnitude"),
        *("--keep", 81, "--out", tmp_path / "m.safetensors"),
        code=1,
    )
    assert "--keep 81: magnitude scores only 80 units" in result.stderr
    assert list(tmp_path.iterdir()) == []
