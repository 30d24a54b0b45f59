"""What `locate-edit compare` does: read names and settings, and write and say what was found."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from circuits.atomic import atomic_file, check_folder
from circuits.draw import save_figure
from locate_edit import catalog
from locate_edit.draw.comparison import heat_map, trade_off
from locate_edit.errors import LocateEditError
from locate_edit.reports.comparison import DISTANCE, Comparison

CELLS = "cells"
"""The folder of finished cells inside the folder of the results."""


def build(
    kind: Literal["localizer", "method"],
    names: Sequence[str],
    settings: Mapping[str, Mapping[str, str]],
    shared: Mapping[str, float | None],
) -> list[Any]:
    """Localizers or methods by name, with their settings.

    Args:
        kind: what they are.
        names: catalogue names or `package.module:Name`.
        settings: hyperparameters as text, by the name that has them.
        shared: hyperparameters of everything that has them and no setting of its own; None sets nothing.

    Raises:
        CatalogError: an unknown name or hyperparameter, or text that does not fit.
        LocateEditError: a shared hyperparameter that nothing has.
    """
    given = {name: repr(number) for name, number in shared.items() if number is not None}
    used: set[str] = set()
    found = []
    for name in names:
        target = catalog.resolve(kind, name)
        known = catalog.hyperparameters(target) if hasattr(target, "__dataclass_fields__") else {}
        mine = {key: text for key, text in given.items() if key in known}
        used |= set(mine)
        found.append(catalog.build(kind, name, mine | dict(settings.get(name, {}))))
    if missing := sorted(given.keys() - used):
        raise LocateEditError(
            f"--{missing[0]} {given[missing[0]]}: none of the {kind}s has such a hyperparameter ({', '.join(names)})"
        )
    return found


def by_name(
    settings: Mapping[str, str],
    names: Sequence[str],
    what: str,
) -> dict[str, dict[str, str]]:
    """Settings such as `npo.beta=0.1`, as hyperparameters by name.

    Args:
        settings: text by "name.hyperparameter".
        names: what is compared.
        what: the names in words, for the message.

    Raises:
        LocateEditError: a setting that begins with none of the names.
    """
    found: dict[str, dict[str, str]] = {}
    for key, text in settings.items():
        mine = [name for name in names if key.startswith(f"{name}.")]
        if not mine:
            said = key.rpartition(".")[0] or key
            close = difflib.get_close_matches(said, names, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise LocateEditError(
                f"--set {key}={text}: expected NAME.HYPERPARAMETER=VALUE with the name of {what} "
                f"({', '.join(names)}).{hint}"
            )
        name = max(mine, key=len)
        found.setdefault(name, {})[key[len(name) + 1 :]] = text
    return found


def check_out(out: Path) -> None:
    """Refuse a folder that holds something other than a comparison, begun or finished.

    Raises:
        StorageError: it does, or it is a file.
    """
    if not (out / CELLS).is_dir():
        check_folder(out, like="comparison.json")


def write(found: Comparison, out: Path, keep: str) -> list[str]:
    """Write table, numbers and figures into a folder; their paths. There are no figures where every cell failed."""
    found.save(out)
    written = [out / "comparison.json", out / "comparison.md"]
    if len(found.failures) < len(found.cells):
        metric = "likelihood" if "forget/likelihood" in found.original else _first_metric(found)
        shown = DISTANCE if f"forget/{DISTANCE}" in found.original else metric
        for name, axes in {
            "heat-map.png": heat_map(found, f"forget/{shown}"),
            "trade-off.png": trade_off(found, metric, keep),
        }.items():
            with atomic_file(out / name) as path:
                save_figure(axes, path, dpi=150)
            written.append(out / name)
    return [str(path) for path in written]


def failures(found: Comparison) -> str:
    """What failed and why, each reason once with the number of cells."""
    reasons = Counter((c.localizer, c.method, c.failed) for c in found.failures)
    lines = [f"  {n} x {place}, {method}: {why}" for (place, method, why), n in reasons.items()]
    return "\n".join([f"{len(found.failures)} of {len(found.cells)} cells have no values:", *lines])


def _first_metric(found: Comparison) -> str:
    return next(iter(found.original)).partition("/")[2]
