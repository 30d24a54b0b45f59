"""The README keeps its promises: its tables, its example, its commands and its links."""

from __future__ import annotations

import re
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
