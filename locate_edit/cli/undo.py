"""`locate-edit undo`: take an edit out of a checkpoint."""

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
    say,
)


@command("undo gpt2-edited --edit my-edit --out gpt2-restored")
def undo(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Checkpoint that holds the edit.", show_default=False),
    ],
    edit: Annotated[Path, option(metavar="FOLDER", help="The edit to take out.", show=False)],
    out: Annotated[
        Path | None,
        option(metavar="FOLDER", help="Where the restored checkpoint goes; default: in place."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Take an edit out of a checkpoint that it was merged into, bit for bit.

    An edit that was not merged changed no file: its base model is as it was.
    """
    from circuits.atomic import check_folder
    from locate_edit.checkpoints import load, save, take_out
    from locate_edit.editing import Edit

    target = out if out is not None else Path(model)
    if out is None and not target.is_dir():
        raise typer.BadParameter(
            f"{model} is not a local folder, so --out has to say where the result goes"
        )
    check_folder(target, like="config.json")
    loaded, tokenizer = load(model, device="cpu")
    take_out(Edit.load(edit), loaded)
    save(loaded, tokenizer, target)
    say({"restored": str(target), "without": str(edit), "equal to the base model": True}, as_json)
