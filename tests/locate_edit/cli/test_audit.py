"""`locate-edit audit`, and how the other commands read prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from locate_edit import Edit
from locate_edit.prompts import PromptSet
from tests.locate_edit.cli.test_cli import run
from tests.tiny import byte_tokenizer, tiny

ROWS = [{"prompt": "Who?", "target": " Ann", "id": "a"}, {"prompt": "What?", "target": " golf"}]
CHAT = "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '</s>' }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal checkpoint with a chat template, a masked one, a tokenizer alone, and a file of prompts."""
    place = tmp_path_factory.mktemp("audit")
    chatty = byte_tokenizer()
    chatty.chat_template = CHAT
    tiny("gpt2").save_pretrained(place / "gpt2")
    chatty.save_pretrained(place / "gpt2")
    tiny("bert").save_pretrained(place / "bert")
    byte_tokenizer(mask=True).save_pretrained(place / "bert")
    byte_tokenizer().save_pretrained(place / "tokenizer")
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return place


def scored(*arguments: object) -> list[str]:
    """The text that is scored of each item shown, by the JSON."""
    found: dict[str, Any] = json.loads(run("audit", *arguments, "--json").stdout)
    return ["".join(t["text"] for t in item["tokens"] if t["scored"]) for item in found["shown"]]


def test_it_prints_what_the_library_says(folder: Path) -> None:
    prompts = PromptSet.from_jsonl(folder / "rows.jsonl", byte_tokenizer())
    said = run("audit", folder / "gpt2", folder / "rows.jsonl").stdout
    last = "2 of 2 items shown; 9 tokens scored in all, the longest item has 10 tokens.\n"
    assert said == f"{prompts.audit(0)}\n\n{prompts.audit(1)}\n\n{last}"
    said = run("audit", folder / "gpt2", folder / "rows.jsonl", "--item", 1).stdout
    assert said.startswith(prompts.audit(1))
    assert prompts.audit(0) not in said
    assert "1 of 2 items" in run("audit", folder / "gpt2", folder / "rows.jsonl", "--first", 1).stdout  # fmt: skip


def test_what_is_scored_as_json(folder: Path) -> None:
    rows = folder / "rows.jsonl"
    assert scored(folder / "gpt2", rows) == [" Ann", " golf"]
    assert scored(folder / "tokenizer", rows) == [" Ann", " golf"]
    assert scored(folder / "gpt2", rows, "--eos", "--item", 1) == [" golf</s>"]
    assert scored(folder / "gpt2", rows, "--chat", "--first", 1) == ["Ann"]
    assert scored(folder / "gpt2", rows, "--chat", "--eos") == ["Ann</s>", "golf</s>"]
    found = json.loads(run("audit", folder / "bert", rows, "--json").stdout)
    assert (found["kind"], found["items"], found["scored_tokens"]) == ("masked", 2, 9)
    assert found["shown"][0]["id"] == "a"
    assert (
        found["shown"][0]["tokens"][0] | {"text": "[CLS]", "scored": False, "weight": 0.0}
        == (found["shown"][0]["tokens"][0])
    )


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("gpt2", ("--item", 2), "--item 2: "),
        ("gpt2", ("--item", 2), "has 2 items, 0 to 1"),
        ("tokenizer", ("--chat",), "--chat needs a chat template, and"),
        ("bert", ("--chat",), "--chat and --eos are for causal models, and this is a masked one"),
        ("bert", ("--eos",), "--chat and --eos are for causal models"),
        ("nothing", (), "nothing' has no usable tokenizer"),
    ],
)
def test_bad_input_is_one_message(
    folder: Path, model: str, arguments: tuple[object, ...], message: str
) -> None:
    result = run("audit", folder / model, folder / "rows.jsonl", *arguments, code=1)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_file_that_is_not_there(folder: Path) -> None:
    assert "absent.jsonl: no such file" in run("audit", "organism", "absent.jsonl", code=1).stderr


def test_every_command_reads_chats(folder: Path, tmp_path: Path) -> None:
    model, rows = folder / "gpt2", folder / "rows.jsonl"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    digest = PromptSet.from_jsonl(rows, tokenizer, chat_template=True, append_eos=True).digest
    how = ("--chat", "--eos")
    data = ("--forget", rows, "--retain", rows)
    edit = (
        "--method",
        "fine-tune",
        "--steps",
        1,
        "--mask",
        "L1.neuron[3]",
        "--out",
        tmp_path / "e",
    )
    run("edit", model, *edit, *data, *how)
    assert digest in json.dumps(dict(Edit.load(tmp_path / "e").provenance))
    measured = json.loads(run("evaluate", model, "--edit", tmp_path / "e", *data, *how, "--json").stdout)  # fmt: skip
    assert {about["digest"] for about in measured["sets"].values()} == {digest}
    other = run("evaluate", model, "--edit", tmp_path / "e", *data, "--random", 1, code=1).stderr
    assert "tokenised alike (--chat and --eos)" in other
    edited = ("--edit", tmp_path / "e")
    commands: list[tuple[object, ...]] = [
        ("locate", "--prompts", rows, "--retain", rows, "--keep", 3, "--out", tmp_path / "m.safetensors"),
        ("attack", *edited, *data, "--attack", "quantisation", "--no-controls", "--out", tmp_path / "a"),
        ("report", *edited, *data, "--attack", "none", "--random", 0, "--out", tmp_path / "r"),
        ("compare", *data, "--budget", 3, "--steps", 1, "--out", tmp_path / "c"),
    ]  # fmt: skip
    more: dict[object, tuple[str, ...]] = {
        "locate": ("--method", "activation-contrast"),
        "compare": ("--localizer", "activation-contrast", "--method", "fine-tune"),
    }
    for name, *rest in commands:
        given = (*rest, *more.get(name, ()), *how)
        refused = run(name, folder / "bert", *given, code=1).stderr
        assert "--chat and --eos are for causal models" in refused
        run(name, model, *given)
