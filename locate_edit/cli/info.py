"""`locate-edit info`: what a model, an edit or a mask is, and what there is to choose from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from locate_edit import catalog
from locate_edit.cli.options import (
    Json,
    option,
)
from locate_edit.cli.program import command
from locate_edit.cli.saying import (
    about_edit,
    about_mask,
    print_json,
    say,
    terminal,
)

if TYPE_CHECKING:
    from circuits import ModelMap


@command("info my-edit")
def info(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|EDIT|MASK]",
            help="A model, an edit folder or a mask file.",
            show_default=False,
        ),
    ] = None,
    schema: Annotated[
        bool, option("--schema", help="Print the JSON schema of a row of prompts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a model, an edit or a mask is; without one, list localizers, methods, metrics and model families."""
    if schema:
        from locate_edit.rows import ROW_SCHEMA

        print_json(ROW_SCHEMA)
        return
    if target is None:
        _say_catalogue(as_json)
    elif (Path(target) / "edit.json").is_file():
        say({"edit": target, **about_edit(Path(target))}, as_json)
    elif Path(target).is_file():
        from circuits import ComponentMask

        mask = ComponentMask.load(target)
        say({**about_mask(mask), "made by": dict(mask.provenance)}, as_json)
    else:
        from circuits import describe
        from locate_edit.checkpoints import load

        loaded, _ = load(target, device="cpu")
        say(_about_model(describe(loaded)), as_json)


def _about_model(model_map: ModelMap) -> dict[str, Any]:
    sizes = (
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "d_head",
        "d_model",
        "d_mlp",
        "n_experts",
        "vocab",
    )
    about: dict[str, Any] = {
        "class": type(model_map.model).__name__,
        "family": model_map.config.model_type,
        "predicts": "the next token" if model_map.causal else "masked tokens",
        "parameters": model_map.n_parameters,
        **{name: getattr(model_map, name) for name in sizes if getattr(model_map, name)},
    }
    for kind in model_map.kinds:
        sites = model_map.sites(kind)
        units = sum(model_map.n_units(site) for site in sites)
        if sites:
            about[f"{kind} units"] = f"{units:,} in {len(sites)} sites, such as {sites[0]}"
    return about | {"architecture": model_map.architecture}


def _say_catalogue(as_json: bool) -> None:
    from circuits.families import supported

    kinds: tuple[catalog.Kind, ...] = ("localizer", "method", "metric", "statistic", "attack")
    listed = {kind: catalog.entries(kind) for kind in kinds if catalog.entries(kind)}
    if as_json:
        found: dict[str, Any] = {
            kind: [
                {"name": e.name, "path": e.path, "summary": e.summary, "paper": e.paper}
                for e in entries
            ]
            for kind, entries in listed.items()
        }
        print_json({**found, "families": supported()})
        return
    table = Table.grid(padding=(0, 2))
    for kind, entries in listed.items():
        table.add_row(f"[bold]{kind}s[/bold]")
        for entry in entries:
            table.add_row(f"  {entry.name}", escape(entry.summary))
    table.add_row("[bold]families[/bold]", ", ".join(supported()))
    terminal().print(table)
