"""`locate-edit demo`: the whole job on the model that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from locate_edit.cli.options import (
    Json,
    Seed,
    option,
)
from locate_edit.cli.program import command
from locate_edit.cli.saying import (
    print_json,
    terminal,
)


@command("demo --out my-first-edit")
def demo(
    out: Annotated[Path, option(metavar="FOLDER", help="Where the report and the edit go.")] = Path(
        "locate-edit-demo"
    ),
    person: Annotated[int, option(min=0, max=9, help="Whose number: one of ten people.")] = 0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Remove one invented person's phone number from the model that comes with the package.

    Locates the neurons that hold the number, changes only those, measures what else changed (beside a random mask of
    equal size and a model that never saw the number), and writes a report, figures and the edit, which can be undone.
    """
    import torch

    from locate_edit.demo import run_demo

    torch.set_num_threads(1)  # the model is so small that threads would mostly wait for each other
    summary = run_demo(out, person=person, seed=seed, console=terminal(as_json))
    if as_json:
        print_json(summary)
