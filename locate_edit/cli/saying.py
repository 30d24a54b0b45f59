"""Saying what was done: JSON or a table on standard output, errors and progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from circuits.errors import LocateEditError

if TYPE_CHECKING:
    from circuits import ComponentMask, ModelMap


def terminal(as_json: bool = False) -> Console:
    """Where a command talks to people: standard output, unless that is kept for JSON."""
    return Console(stderr=as_json)


def error_terminal() -> Console:
    """Where a command says what went wrong."""
    return Console(stderr=True)


def wants_progress(as_json: bool) -> bool:
    """Show progress only where somebody looks at it."""
    return sys.stdout.isatty() and not as_json


def print_json(value: object) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps(value, indent=2, default=str))


def say(summary: Mapping[str, Any], as_json: bool) -> None:
    """Print a summary as JSON or as two columns."""
    if as_json:
        print_json(summary)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in summary.items():
        table.add_row(f"[bold]{escape(name)}[/bold]", escape(as_text(value)))
    terminal().print(table)


def as_text(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {as_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(as_text(inner) for inner in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def about_mask(mask: ComponentMask, model_map: ModelMap | None = None) -> dict[str, Any]:
    """Size and place of a mask."""
    about: dict[str, Any] = {"units": len(mask), "of": mask.total()}
    if model_map is not None:
        about["fraction of parameters"] = mask.fraction(model_map)
    about["sites"] = {str(site): count for site, count in mask.counts().items() if count}
    return about


def about_edit(folder: Path) -> dict[str, Any]:
    """Size and origin of a saved edit."""
    from locate_edit.editing import Edit

    made = Edit.load(folder)
    about: dict[str, Any] = {"changed entries": made.delta.count(), "parameters": len(made.delta)}
    if made.additions:
        about["additions"] = [str(each.what) for each in made.additions]
    if made.mask is not None:
        about["units"] = len(made.mask)
    if made.log:
        about |= {"steps": len(made.log), "last loss": made.log[-1]["loss"]}
    return about | made.provenance


def quiet_canvas() -> None:
    """Draw into files only, wherever this runs."""
    import matplotlib as mpl

    mpl.use("Agg")


def draw_to(drawn: Any, file: Path, dpi: int = 150) -> None:
    """Write the figure of some axes to a file, whole or not at all."""
    from matplotlib import pyplot as plt
    from matplotlib.backend_bases import FigureCanvasBase

    from circuits.atomic import atomic_file
    from circuits.draw import save_figure

    if file.suffix.lstrip(".").lower() not in FigureCanvasBase.get_supported_filetypes():
        raise LocateEditError(
            f"Cannot write {file}: expected a name that ends in .png, .pdf or .svg."
        )
    with atomic_file(file) as temporary:
        save_figure(drawn, temporary, dpi=dpi)
    plt.close("all")
