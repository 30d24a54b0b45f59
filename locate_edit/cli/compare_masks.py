"""`locate-edit compare-masks`: how far masks agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from locate_edit.cli.options import (
    Json,
    option,
)
from locate_edit.cli.program import command
from locate_edit.cli.saying import (
    as_text,
    draw_to,
    print_json,
    quiet_canvas,
    terminal,
)


@command("compare-masks mine.safetensors theirs.safetensors --truth planted.safetensors")
def compare_masks(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="MASK MASK...", help="Mask files.", show_default=False),
    ],
    truth: Annotated[
        Path | None, option(metavar="FILE", help="Mask of the units that are known to matter.")
    ] = None,
    out: Annotated[
        Path | None, option(metavar="FILE", help="Also draw the agreement (.png, .pdf or .svg).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how far masks agree: Jaccard overlap, beside what random masks of the same sizes would share."""
    quiet_canvas()
    from circuits import ComponentMask, draw
    from locate_edit.cli._figures import compare, named

    if len(files) < 2 and truth is None:
        raise typer.BadParameter("give two masks at least, or one and --truth")
    masks = {name: ComponentMask.load(file) for name, file in named(files).items()}
    known = None if truth is None else ComponentMask.load(truth)
    about = compare(masks, known)
    if out is not None:
        shown = masks if len(masks) > 1 else {**masks, "truth": known or next(iter(masks.values()))}
        draw_to(draw.agreement_map(shown, known), out)
        about["written"] = [str(out)]
    if as_json:
        print_json(about)
    else:
        _say_comparison(about)


def _say_comparison(about: Mapping[str, Any]) -> None:
    """Print what `compare` found as tables."""
    console = terminal()
    sizes = Table("mask", "units", "of", "layers", "made by", box=None, pad_edge=False)
    for name, mask in about["masks"].items():
        layers = as_text(mask["layers"]) or "none"
        sizes.add_row(
            escape(name), f"{mask['units']:,}", f"{mask['of']:,}", layers, escape(str(mask["made by"]))
        )  # fmt: skip
    console.print(sizes)
    if about["pairs"]:
        pairs = Table(
            "masks", "Jaccard", "at random", "shared units", "shared layers", box=None, pad_edge=False
        )  # fmt: skip
        for pair in about["pairs"]:
            pairs.add_row(
                escape(f"{pair['first']} and {pair['second']}"), f"{pair['jaccard']:.3f}",
                f"{pair['expected at random']:.3f}", f"{pair['shared units']:,}",
                as_text(pair["shared layers"]) or "none",
            )  # fmt: skip
        console.print()
        console.print(pairs)
    if "truth" in about:
        truth = Table(
            "mask", "recall", "precision", "Jaccard", "at random", box=None, pad_edge=False
        )
        for name, row in about["truth"].items():
            precision = "none" if row["precision"] is None else f"{row['precision']:.3f}"
            truth.add_row(
                escape(name), f"{row['recall']:.3f}", precision, f"{row['jaccard']:.3f}",
                f"{row['expected at random']:.3f}",
            )  # fmt: skip
        console.print()
        console.print(truth)
    for file in about.get("written", ()):
        console.print(f"Written: {file}", soft_wrap=True)
