"""`locate-edit evaluate`: metrics by name and with their settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from locate_edit.cli import app
from locate_edit.metrics.membership import min_k
from locate_edit.prompts import PromptSet
from tests.tiny import byte_tokenizer, tiny

ROWS = [
    {"prompt": "Ann Lee plays", "target": " golf", "wrong": [" polo"]},
    {"prompt": "Bo Kay plays", "target": " polo", "wrong": [" golf"]},
]


def shortness(prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
    """A reward."""
    return [-float(len(text)) for text in continuations]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a file of prompts."""
    place = tmp_path_factory.mktemp("evaluate")
    tiny("gpt2").save_pretrained(place / "gpt2")
    byte_tokenizer().save_pretrained(place / "gpt2")
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return place


def run(folder: Path, *arguments: object, code: int = 0) -> Result:
    given = ("evaluate", folder / "gpt2", "--forget", folder / "rows.jsonl", *arguments)
    result = CliRunner().invoke(app, [str(argument) for argument in given])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def estimates(folder: Path, *arguments: object) -> dict[str, Any]:
    found = json.loads(run(folder, *arguments, "--json").stdout)
    return {name: cells["before"] for name, cells in found["metrics"].items()}


def test_settings_reach_the_metric_they_name(folder: Path) -> None:
    found = estimates(
        *(folder, "--metric", "min-k", "--metric", "perplexity", "--set", "min-k.k=0.6"),
        *("--set", "perplexity.average=item"),
    )
    prompts = PromptSet.from_jsonl(folder / "rows.jsonl", byte_tokenizer())
    expected = min_k(tiny("gpt2"), prompts, k=0.6).estimate
    assert found["forget.min_k(k=0_6)"] == pytest.approx(expected, rel=1e-4)
    assert set(found) == {"forget.min_k(k=0_6)", "forget.perplexity(average=item)"}
    usual = estimates(folder, "--set", "exact-memorization.compat=open-unlearning")
    assert set(usual) == {
        "forget.likelihood",
        "forget.exact_memorization(compat=open-unlearning)",
        "forget.perplexity",
    }


def test_numbers_about_whole_sets_have_settings(folder: Path) -> None:
    also = ("--also", f"rows={folder / 'rows.jsonl'}", "--metric", "model-utility")
    settings = ("--set", "model-utility.kept=rows", "--set", "model-utility.max-new-tokens=2")
    found = estimates(folder, *also, *settings)
    assert list(found) == ["rows.model_utility"]


def test_a_reward_by_name(folder: Path) -> None:
    few = ("--set", "worst-reward.samples=2", "--set", "worst-reward.length=3")
    for reward in ("lexicon:golf,polo", f"{__name__}:shortness"):
        chosen = ("--metric", "worst-reward", "--set", f"worst-reward.reward={reward}")
        (value,) = estimates(folder, *chosen, *few).values()
        assert value <= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "min-q"), "No metric is called 'min-q'. Did you mean 'min-k'?"),
        (("--metric", "crows"), "In Python only, because of what it takes: locate_edit.metrics.bias.crows(more, less)"),
        (("--metric", "min-k", "--set", "min-k.kk=1"), "min_k has no hyperparameter 'kk'. Did you mean 'k'?"),
        (("--metric", "min-k", "--set", "min-k.k=x"), "min_k.k: expected float"),
        (("--metric", "icat", "--set", "icat.x=1"), "Icat has no hyperparameter 'x'"),
        (("--set", "likelihod.x=1"), "exact-memorization, perplexity). Did you mean likelihood?"),
        (("--metric", "worst-reward"), "worst-reward needs a reward: --set worst-reward.reward=lexicon:word"),
        (("--metric", "any-below", "--set", "any-below.below=1"), "--metric any-below needs a reward"),
        (("--metric", "any-below", "--set", "any-below.reward=nix:x"), "cannot import 'nix' for the reward"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_before_the_model_is_loaded(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(tmp_path, *arguments, code=1)  # where there is no model
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_settings_are_names_and_values(folder: Path) -> None:
    assert "expected NAME=VALUE" in run(folder, "--set", "min-k.k", code=2).stderr
