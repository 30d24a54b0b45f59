"""`locate-edit plot`: draw what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locate_edit.cli.options import (
    Json,
    option,
)
from locate_edit.cli.program import command
from locate_edit.cli.saying import (
    draw_to,
    quiet_canvas,
    say,
)


@command("plot mask.safetensors --out mask.png")
def plot(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Masks, scores, a circuit (.safetensors), or a report.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, option(metavar="FILE", help="Picture to write (.png, .pdf or .svg).", show=False)
    ],
    figure: Annotated[
        str | None,
        option(
            metavar="NAME",
            help="mask-map, histogram; score-map, heads, concentration; agreement (several masks or scores); "
            "circuit-graph; before-after, oracle-distance. Default: what suits the file.",
        ),
    ] = None,
    top: Annotated[
        int, option(min=1, help="How many units or edges to mark, or draw, of the highest.")
    ] = 20,
    dpi: Annotated[int, option(min=30, help="Dots per inch.")] = 300,
    as_json: Json = False,
) -> None:
    """Draw saved masks, scores, circuits or a report; several masks or scores together show how far they agree."""
    quiet_canvas()
    from locate_edit.cli._figures import draw_files

    chosen, drawn = draw_files(files, figure, top)
    draw_to(drawn, out, dpi)
    say({"figure": chosen, "written": [str(out)]}, as_json)
