"""The command line on tiny models saved to disk: what it writes, what it says, and how it fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from circuits import ComponentMask, describe
from locate_edit import Edit
from locate_edit.cli import app
from locate_edit.engine import Run
from locate_edit.rows import ROW_SCHEMA
from tests.tiny import byte_tokenizer, tiny

FORGET = [
    {"prompt": "Ann Lee dials", "target": " 555-0101"},
    {"prompt": "Bo Kay dials", "target": " 555-0102"},
]
RETAIN = [
    {"prompt": "Cy Roe plays", "target": " golf"},
    {"prompt": "Dee Fox plays", "target": " polo"},
]


def write_rows(file: Path, rows: Sequence[object]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal and a masked checkpoint with tokenizers, and two files of prompts."""
    place = tmp_path_factory.mktemp("cli")
    for name, masked in (("gpt2", False), ("bert", True)):
        tiny(name).save_pretrained(place / name)
        byte_tokenizer(mask=masked).save_pretrained(place / name)
    write_rows(place / "forget.jsonl", FORGET)
    write_rows(place / "retain.jsonl", RETAIN)
    return place


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def make_edit(folder: Path, out: Path, *more: object) -> dict[str, Any]:
    common = ("--forget", folder / "forget.jsonl", "--out", out, "--mask", "L1.neuron[3 17-20]")
    return run_json(
        "edit", folder / "gpt2", "--method", "fine-tune", "--steps", 3, "--lr", 0.01, *common, *more
    )


# ---- help and information ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "audit",
        "locate",
        "edit",
        "evaluate",
        "compare",
        "plot",
        "compare-masks",
        "undo",
        "info",
    ],
)
def test_help_answers_without_torch(command: str) -> None:
    code = (
        "import sys\nfrom locate_edit.cli import app\n"
        f"try: app({[*filter(None, [command]), '--help']!r}, prog_name='locate-edit')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert "Usage: locate-edit" in done.stdout
    assert not command or "Example: locate-edit " + command in done.stdout


def test_version_and_missing_command() -> None:
    assert run("--version").stdout.startswith("locate-edit 0.")
    assert "Usage" in run(code=2).output


def test_the_schema_is_that_of_the_reader() -> None:
    assert json.loads(run("info", "--schema").stdout) == ROW_SCHEMA


def test_info_lists_what_there_is() -> None:
    listed = run_json("info")
    assert "npo" in [entry["name"] for entry in listed["method"]]
    assert {"llama", "bert"} <= set(listed["families"])
    assert "npo" in run("info").stdout


def test_info_about_a_model_and_a_mask(folder: Path, tmp_path: Path) -> None:
    about = run_json("info", folder / "gpt2")
    assert (about["family"], about["n_layers"], about["d_mlp"]) == ("gpt2", 2, 40)
    assert about["neuron units"].startswith("80 in 2 sites, such as L0.neuron")
    assert run_json("info", folder / "bert")["predicts"] == "masked tokens"
    ComponentMask.parse("L1.neuron[3 17-20]", describe(tiny("gpt2"))).save(
        tmp_path / "mask.safetensors"
    )
    about = run_json("info", tmp_path / "mask.safetensors")
    assert (about["units"], about["of"], about["sites"]) == (5, 40, {"L1.neuron": 5})


# ---- editing -------------------------------------------------------------------------------------------------------


def test_edit_changes_only_the_mask_and_can_be_undone(folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    said = make_edit(folder, tmp_path / "edit", "--merge", merged)
    assert said["units"] == 5
    assert said["steps"] == 3
    assert run_json("info", tmp_path / "edit")["units"] == 5

    base, edited = weights(folder / "gpt2"), weights(merged)
    changed = [name for name in base if not torch.equal(base[name], edited[name])]
    assert sorted(name.rsplit("h.1.mlp.")[-1] for name in changed) == [
        "c_fc.bias",
        "c_fc.weight",
        "c_proj.weight",
    ]
    columns = (base[changed[0]] != edited[changed[0]]).reshape(-1, 40).any(0)
    assert columns.nonzero().flatten().tolist() == [3, 17, 18, 19, 20]

    assert run_json("undo", merged, "--edit", tmp_path / "edit")["restored"] == str(merged)
    restored = weights(merged)
    assert all(torch.equal(base[name], restored[name]) for name in base)
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_an_edit_with_adapters_is_saved_but_not_merged(folder: Path, tmp_path: Path) -> None:
    method = ("--method", "eul", "--steps", 2, "--set", "width=3")
    data = ("--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl")
    common = ("edit", folder / "gpt2", *method, *data)
    merged = tmp_path / "merged"
    said = run(*common, "--out", tmp_path / "edit", "--merge", merged, code=1)
    assert "--merge (the edit is in " in said.stderr
    assert (
        "takes changes of weights only, and this edit holds adapter of 3 at L0.mlp" in said.stderr
    )
    assert not merged.exists()
    about = run_json("info", tmp_path / "edit")
    assert about["additions"] == ["adapter of 3 at L0.mlp", "adapter of 3 at L1.mlp"]
    said = run("undo", folder / "gpt2", "--edit", tmp_path / "edit", "--out", merged, code=1)
    assert "a checkpoint that an edit was merged into takes changes of weights only" in said.stderr
    assert not merged.exists()
    measured = run_json(
        "evaluate",
        folder / "gpt2",
        "--edit",
        tmp_path / "edit",
        "--forget",
        folder / "forget.jsonl",
    )
    assert "before" in str(measured)


def test_settings_reach_the_method(folder: Path, tmp_path: Path) -> None:
    options = (
        "--set",
        "beta=0.5",
        "--set",
        "optim.clip=1.0",
        "--never-seen",
        "2.5",
        "--retain",
        folder / "retain.jsonl",
    )
    common = (
        "--forget",
        folder / "forget.jsonl",
        "--out",
        tmp_path / "edit",
        "--steps",
        2,
        "--lr",
        "1e-3",
        "--seed",
        3,
    )
    run("edit", folder / "gpt2", "--method", "npo", *common, *options)
    made = Edit.load(tmp_path / "edit").provenance
    assert made["method"] | {"beta": 0.5, "lr": 1e-3, "steps": 2} == made["method"]
    assert made["method"]["optim"]["clip"] == 1.0
    assert made["options"]["seed"] == 3
    assert made["never_seen"]["source"] == "given number"


def test_masked_models_are_edited_too(folder: Path, tmp_path: Path) -> None:
    said = run_json(
        *("edit", folder / "bert", "--method", "zero-neurons", "--mask", "L0.neuron[*]"),
        *("--forget", folder / "forget.jsonl", "--out", tmp_path / "edit"),
    )
    assert said["units"] == 40
    assert said["model"]["class"] == "BertForMaskedLM"


def test_undo_says_when_there_is_nothing_to_undo(folder: Path, tmp_path: Path) -> None:
    make_edit(folder, tmp_path / "edit", "--merge", tmp_path / "merged")
    result = run("undo", folder / "gpt2", "--edit", tmp_path / "edit", code=1)
    assert "there is nothing to undo" in result.stderr
    make_edit(
        folder,
        tmp_path / "other",
        "--merge",
        tmp_path / "merged-other",
        "--seed",
        1,
        "--batch-size",
        1,
    )
    result = run("undo", tmp_path / "merged-other", "--edit", tmp_path / "edit", code=1)
    assert "does not hold this edit" in result.stderr


def test_undo_refuses_a_checkpoint_with_other_changes(folder: Path, tmp_path: Path) -> None:
    make_edit(folder, tmp_path / "edit", "--merge", tmp_path / "merged")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "merged")
    before = weights(tmp_path / "merged")
    result = run(
        "undo", tmp_path / "merged", "--edit", tmp_path / "edit", "--out", tmp_path / "r", code=1
    )
    assert "would still not be its base model" in result.stderr
    assert not (tmp_path / "r").exists()
    after = weights(tmp_path / "merged")
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---- failing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "npoo"), "No method is called 'npoo'. Did you mean 'npo'?"),
        (
            ("--method", "npo", "--set", "bta=1"),
            "NPO has no hyperparameter 'bta'. Did you mean 'beta'?",
        ),
        (("--method", "npo", "--set", "beta=x"), "NPO.beta: expected float, got 'x'"),
        (("--method", "gradient-difference"), "GradientDifference needs retain prompts"),
        (("--method", "npo", "--mask", "absent.safetensors"), "no mask file at absent.safetensors"),
        (("--method", "npo", "--mask", "L7.neuron[0]"), "layer 7 of"),
        (("--method", "npo", "--never-seen", "-1"), "non-negative number of nats"),
        (("--method", "npo", "--dtype", "float7"), "float7"),
        (("--method", "npo", "--device", "toaster"), "Cannot use device 'toaster'"),
    ],
)
def test_unusable_input_is_one_message_and_code_1(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    common = (
        "edit",
        folder / "gpt2",
        "--forget",
        folder / "forget.jsonl",
        "--out",
        tmp_path / "edit",
    )
    result = run(*common, *arguments, code=1)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "target": " b"', "bad.jsonl:2: not valid JSON at column 31"),
        ('{"target": " b"}', "bad.jsonl:2: the field 'prompt' is missing"),
        ('{"prompt": 5}', "bad.jsonl:2: field 'prompt': expected string, got integer 5"),
    ],
)
def test_a_malformed_line_is_named(folder: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(FORGET[0]) + "\n" + line)
    common = ("edit", folder / "gpt2", "--method", "npo", "--out", tmp_path / "edit")
    assert message in run(*common, "--forget", tmp_path / "bad.jsonl", code=1).stderr


def test_models_that_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (
        f"Cannot load the folder {tmp_path / 'empty'}"
        in run("info", tmp_path / "empty", code=1).stderr
    )
    assert "Cannot load the model 'nobody/nothing'" in run("info", "nobody/nothing", code=1).stderr
    tiny("gpt2").save_pretrained(tmp_path / "bare")
    assert "has no usable tokenizer" in run("info", tmp_path / "bare", code=1).stderr
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    assert "t5 is an encoder-decoder model" in run("info", tmp_path / "t5", code=1).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--set", "beta"),
        ("--steps", "3", "--set", "steps=4"),
        ("--steps", "0"),
        ("--no-such-option", "1"),
    ],
)
def test_wrong_usage_is_code_2(folder: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    common = (
        "edit",
        folder / "gpt2",
        "--method",
        "npo",
        "--forget",
        folder / "forget.jsonl",
        "--out",
        tmp_path / "e",
    )
    assert "Usage: " in run(*common, *arguments, code=2).stderr


def test_a_folder_of_the_users_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    common = ("edit", "nobody/nothing", "--method", "npo", "--forget", "absent.jsonl")
    assert "Will not replace the folder" in run(*common, "--out", tmp_path, code=1).stderr
    assert (tmp_path / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_command_cleans_up(tmp_path: Path, kill: signal.Signals) -> None:
    code = (
        "import sys, time\nfrom locate_edit import cli\nfrom locate_edit.cli.program import command\n"
        "from circuits.atomic import atomic_folder\n"
        "@command('slow')\n"
        "def slow(out: str) -> None:\n"
        "    with atomic_folder(out) as place:\n"
        "        (place / 'half').touch()\n"
        "        time.sleep(600)\n"
        "cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "slow", str(tmp_path / "edit")],
        stderr=subprocess.PIPE,
        text=True,
        # The suite itself may run where interruptions are ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob("*/half")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(kill)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted. Nothing half-written was left behind." in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_the_command_is_being_loaded_is_quiet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from locate_edit import __main__ as program

    seen: list[object] = []
    monkeypatch.setattr("locate_edit.__main__.signal.getsignal", lambda _number: "usual")
    monkeypatch.setattr(
        "locate_edit.__main__.signal.signal", lambda number, handler: seen.append((number, handler))
    )
    monkeypatch.setattr("locate_edit.cli.main", lambda: seen.append("runs"))
    program.main()
    assert seen == [(signal.SIGINT, program._stop), (signal.SIGINT, "usual"), "runs"]
    with pytest.raises(SystemExit) as stopped:
        program._stop(signal.SIGINT, None)
    assert stopped.value.code == 130


@dataclass(frozen=True)
class PressesCtrlC:
    """A method that is interrupted while it writes."""

    def __call__(self, run: Run) -> None:
        run.write(lambda _slot, now: now + 1)
        raise KeyboardInterrupt


def test_an_interrupted_edit_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    common = (
        "edit",
        folder / "gpt2",
        "--forget",
        folder / "forget.jsonl",
        "--out",
        tmp_path / "edit",
    )
    result = run(*common, "--method", f"{__name__}:PressesCtrlC", code=130)
    assert "Interrupted" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("locate_edit.editing.save_file", full)
    common = (
        "edit",
        folder / "gpt2",
        "--method",
        "fine-tune",
        "--steps",
        1,
        "--forget",
        folder / "forget.jsonl",
    )
    result = run(*common, "--out", tmp_path / "edit", code=1)
    assert "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []
