"""What `locate-edit attack` does: read names and settings, attack, write and say what came back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from circuits.atomic import atomic_folder, check_folder
from locate_edit import catalog
from locate_edit.cli import _compare
from locate_edit.errors import LocateEditError
from locate_edit.reports.robustness import Robustness, every_attack


def build(names: Sequence[str] | None, settings: Mapping[str, str]) -> list[Any]:
    """Attacks by name, with their settings; all there are without names.

    Args:
        names: catalogue names or `package.module:Name`; None for the whole catalogue.
        settings: text by "name.hyperparameter", such as `relearning.steps`.

    Raises:
        CatalogError: an unknown name or hyperparameter, or text that does not fit.
        LocateEditError: a setting that begins with none of the names, or two attacks that print alike.
    """
    chosen = list(names) if names else [entry.name for entry in catalog.entries("attack")]
    own = _compare.by_name(settings, chosen, "an attack of this run")
    if not names:
        return every_attack(own)
    found = [catalog.build("attack", name, own.get(name, {})) for name in chosen]
    if twice := [name for name in chosen if chosen.count(name) > 1]:
        raise LocateEditError(f"--attack {twice[0]} is given twice: give each once")
    return found


FILES = ("robustness.json", "robustness.md", "robustness.png")
"""What the command writes."""


def check_out(out: Path) -> None:
    """Refuse a folder that holds something other than what this command writes.

    Raises:
        StorageError: it does, or it is a file.
    """
    check_folder(out, like="robustness.json", ours=FILES)


def save(found: Robustness, out: Path) -> list[Path]:
    """Write everything in the place of what an earlier run wrote, and say where it is."""
    with atomic_folder(out, like="robustness.json", ours=FILES) as place:
        names = [path.name for path in found.save(place)]
    return [out / name for name in names]


def shown(found: Robustness) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a terminal: without intervals, empty columns and withheld attacks (see `withheld`)."""
    header, *rows = found.table()
    short: list[list[str]] = []
    before = ""
    for row in rows:
        if found[row[0]].withheld:
            continue
        numbers = [cell.partition(" (")[0] for cell in row[2:-1]]
        short.append(["" if row[0] == before else row[0], row[1], *numbers, row[-1]])
        before = row[0]
    kept = [at for at in range(len(header)) if any(row[at] for row in short)]
    return [header[at] for at in kept], [[row[at] for at in kept] for row in short]


def withheld(found: Robustness) -> list[str]:
    """A line for each attack without numbers, and why."""
    return [f"{trial.name} withheld: {trial.withheld}" for trial in found.trials if trial.withheld]


def as_json(found: Robustness, written: Sequence[Path]) -> dict[str, Any]:
    """Everything, with the files that were written."""
    return {**found.to_json(), "written": [str(path) for path in written]}


def steps_fit(attacks: Sequence[Any], steps: int | None) -> None:
    """Refuse a cap on steps where nothing has any.

    Raises:
        LocateEditError: none of the attacks has steps.
    """
    has = any(
        field.name == "steps"
        for attack in attacks
        if dataclasses.is_dataclass(attack)
        for field in dataclasses.fields(attack)
    )
    if steps is not None and not has:
        raise LocateEditError(
            f"--steps {steps}: none of the attacks has steps ({', '.join(type(a).__name__ for a in attacks)})"
        )
