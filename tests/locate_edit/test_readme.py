"""The README keeps its promises: its tables, its example, its commands and its links."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from docs import make_reference
from docs.make_readme import README, ROOT, rewritten
from locate_edit import __version__, catalog

TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.S | re.M)


def test_tables_are_what_the_code_says() -> None:
    assert rewritten(TEXT) == TEXT, "run: python docs/make_readme.py"


@pytest.mark.parametrize("name", make_reference.PAGES)
def test_the_reference_is_what_the_docstrings_say(name: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert make_reference.page(name) == written, "run: python docs/make_reference.py"
    kind = make_reference.PAGES[name][0]
    for entry in catalog.entries(kind):
        part = written.split(f"\n## {entry.attribute}\n")[1].split("\n## ")[0]
        for option in catalog.hyperparameters(entry.load()):
            (row,) = re.findall(rf"^\| `{option}` \| .* \| (.*) \|$", part, re.M)
            assert row, f"{entry.attribute}.{option} is not explained"


def test_the_page_of_ensembles_is_what_the_docstrings_say() -> None:
    written = (ROOT / "docs" / make_reference.ENSEMBLES).read_text(encoding="utf-8")
    assert make_reference.ensembles() == written, "run: python docs/make_reference.py"
    modules = {
        f"locate_edit.ensembles.{p.stem}" for p in (ROOT / "locate_edit/ensembles").glob("[!_]*.py")
    }
    assert modules | {"locate_edit.fusion"} == set(make_reference.MODULES)
    for name in ("Sisa", "ShardedEnsemble.delete", "LeaveOneOut", "joint", "fuse"):
        assert len(re.findall(rf"^#+ {name}\n\n`{name}", written, re.M)) == 1


def test_the_page_of_metrics_is_what_the_docstrings_say() -> None:
    written = (ROOT / "docs" / make_reference.METRICS).read_text(encoding="utf-8")
    assert make_reference.metrics() == written, "run: python docs/make_reference.py"
    whole = [path.split(".")[1] for path in make_reference.STATISTICS]
    single = [entry.attribute for entry in catalog.entries("metric")]
    for name in (*single, *whole):
        assert len(re.findall(rf"^### {name}$", written, re.M)) == 1
        (line,) = re.findall(rf"^\| \[`{name}`\]\(#{name}\) \|.*$", written, re.M)
        assert len(re.split(r"(?<!\\)\|", line)) == 7, "five cells"
        part = written.split(f"\n### {name}\n")[1].split("\n##")[0]
        for option, about in re.findall(r"^\| `(\w+)` \| .*? \| (.*) \|$", part, re.M):
            assert about, f"{name}({option}=...) is not explained"
    statistics = [entry.load() for entry in catalog.entries("statistic")]
    for target in statistics:
        assert {"Direction", "Needs", "Cost"} <= set(
            make_reference.stated(inspect.getdoc(target) or "")
        )
        assert f"\n### {target.__name__}\n" in written


@pytest.mark.parametrize(("who", "what", "call"), make_reference.VARIANTS)
def test_what_is_published_elsewhere_can_be_asked_for(who: str, what: str, call: str) -> None:
    known = {entry.attribute: entry.load() for entry in catalog.entries("metric")}
    for path in make_reference.STATISTICS:
        module, name = path.split(".")
        known[name] = getattr(importlib.import_module(f"locate_edit.metrics.{module}"), name)
    calls = [node for node in ast.walk(ast.parse(call, mode="eval")) if isinstance(node, ast.Call)]
    assert calls
    for node in calls:
        function = known[ast.unparse(node.func)]
        hints = typing.get_type_hints(function)
        bound = inspect.signature(function).bind(
            *node.args, **{k.arg or "": k.value for k in node.keywords}
        )
        for name, value in bound.arguments.items():
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                assert value.value in str(hints[name]), f"{who}, {what}: {name}={value.value!r}"


def test_the_page_of_attacks_is_what_the_docstrings_say() -> None:
    written = (ROOT / "docs" / make_reference.ATTACKS).read_text(encoding="utf-8")
    assert make_reference.attacks() == written, "run: python docs/make_reference.py"
    for entry in catalog.entries("attack"):
        part = written.split(f"\n## {entry.attribute}\n")[1].split("\n## ")[0]
        assert "\nPositive control: " in part
        assert "\nCost: " in part
        for option in catalog.hyperparameters(entry.load()):
            (about,) = re.findall(rf"^\| `{option}` \| .* \| (.*) \|$", part, re.M)
            assert about, f"{entry.attribute}.{option} is not explained"


def test_a_docstring_without_what_a_table_needs_is_named() -> None:
    class Bare:
        """Asks."""

        def hide(self) -> None:
            """Hides the answers."""

    with pytest.raises(ValueError, match="Bare: say in a sentence what 'The attacker' may do"):
        make_reference.attacker(Bare)
    with pytest.raises(ValueError, match=r"Bare.hide: expected 'A positive control: ...', got 'Hi"):
        make_reference.control(Bare)


def test_marked_parts_are_those_that_are_made() -> None:
    with pytest.raises(ValueError, match="nothing is made for the parts weather"):
        rewritten(f"{TEXT}<!-- weather -->\n<!-- /weather -->\n")
    with pytest.raises(ValueError, match="expected one part marked 'methods', found 0"):
        rewritten(TEXT.replace("<!-- methods -->", ""))
    for entry in catalog.entries("attack"):
        assert f"(docs/attacks.md#{entry.attribute.lower()})" in TEXT


def test_a_stale_table_is_noticed() -> None:
    stale = TEXT.replace("`npo`", "`old-name`")
    assert stale != TEXT
    assert rewritten(stale) == TEXT


def test_the_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in blocks("python"):
        exec(compile(example, "README.md", "exec"), names)
    assert (tmp_path / "first-edit" / "edit.json").is_file()
    assert (tmp_path / "circuit.png").is_file()
    assert names["mask"].count() > 0
    assert "before" in capsys.readouterr().out


def test_both_commands_set_themselves_up() -> None:
    main_job, tests = (block.strip() for block in blocks("bash")[:2])
    for command in (main_job, tests):
        assert "\n" not in command
        assert command.startswith(
            "python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 && .venv/bin/pip install "
        )
    assert main_job.endswith("&& .venv/bin/locate-edit demo")
    assert "pytest" in tests


def test_the_commands_of_the_command_line_exist() -> None:
    from typer.main import get_command

    from locate_edit.cli import app

    group: Any = get_command(app)
    for name, arguments in re.findall(
        r"^(?:\.venv/bin/)?locate-edit ([\w-]+)((?:[^\n\\]|\\\n)*)", "\n".join(blocks("bash")), re.M
    ):
        found = group.commands[name]
        if subcommands := getattr(found, "commands", None):
            found = subcommands[arguments.split()[0]]
        known = {option for parameter in found.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", arguments)) <= known


def test_every_file_that_is_linked_exists() -> None:
    for file in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        targets = [t for t in re.findall(r"\]\(([^)#]+)", text) if not t.startswith("https://")]
        for target in targets:
            assert (ROOT / target).exists(), f"{file} links to {target}"


def test_the_version_is_the_same_everywhere() -> None:
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
