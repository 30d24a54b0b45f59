"""The public surface: every exported name loads, and importing the package loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import circuits
import locate_edit
import locate_edit.draw

HEAVY = ("torch", "transformers", "transformer_lens", "nnsight", "matplotlib", "scipy", "numpy")


def loaded_after(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after running `code`."""
    script = (
        f"import json, sys\n{code}\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "package", [circuits, locate_edit, locate_edit.draw], ids=lambda package: package.__name__
)
def test_every_exported_name_loads_and_is_listed(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert len(names) == len(set(names))
    for name in names:
        assert getattr(package, name).__name__ == name
        assert name in dir(package)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'locate_edit' has no attribute 'erase'"):
        locate_edit.erase  # noqa: B018


@pytest.mark.parametrize(
    "package",
    ["locate_edit", "locate_edit.cli", "locate_edit.catalog", "locate_edit.draw", "circuits"],
)
def test_importing_loads_nothing_heavy(package: str) -> None:
    assert loaded_after(f"import {package}") == set()


def test_using_the_library_loads_neither_lens_nor_figures() -> None:
    code = "from locate_edit import PromptSet, edit, evaluate\nfrom circuits import describe, ComponentMask"
    loaded = loaded_after(code)
    assert "torch" in loaded
    assert loaded.isdisjoint({"transformer_lens", "nnsight", "matplotlib"})
