"""`locate-edit attack`: try to bring back what an edit took away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from locate_edit.cli.options import (
    Attacks,
    BatchSize,
    Chat,
    Device,
    Dtype,
    Eos,
    Gone,
    Json,
    Kept,
    Model,
    MostSteps,
    NamedSetting,
    Oracle,
    Random,
    Seconds,
    Seed,
    option,
)
from locate_edit.cli.program import command, interrupted
from locate_edit.cli.reading import how_many_random, name_values, read_edit, read_prompts
from locate_edit.cli.saying import (
    print_json,
    terminal,
    wants_progress,
)
from locate_edit.errors import Interrupted


@command(
    "attack gpt2 --edit my-edit --forget forget.jsonl --retain retain.jsonl --oracle retrained --attack relearning "
    "--attack quantisation --set relearning.steps=20 --out attacks"
)
def attack(
    model: Model,
    forget: Gone,
    retain: Kept,
    out: Annotated[
        Path,
        option(metavar="FOLDER", help="Where table, numbers and figure go.", show=False),
    ],
    edit: Annotated[
        Path | None, option(metavar="FOLDER", help="Attack MODEL with this edit applied.")
    ] = None,
    original: Annotated[
        str | None, option(metavar="MODEL", help="What MODEL was before it was edited.")
    ] = None,
    oracle: Oracle = None,
    random: Random = None,
    attacks: Attacks = None,
    settings: NamedSetting = None,
    steps: MostSteps = None,
    seconds: Seconds = None,
    margin: Annotated[
        float,
        option(
            min=0, help="What an attack must bring back in its positive control to be believed."
        ),
    ] = 0.3,
    controls: Annotated[
        bool,
        option("--controls/--no-controls", help="Try each attack on its positive control first."),
    ] = True,
    chat: Chat = False,
    eos: Eos = False,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Try to bring back what an edit took away, beside the model before it and one that never knew.

    MODEL with --edit, or an edited MODEL with --original, the model before. Nothing is changed on disk. An attack that
    does not find what its positive control hides has no number but a reason.
    """
    from circuits import describe
    from locate_edit.checkpoints import load
    from locate_edit.cli import _attack
    from locate_edit.reports.robustness import robustness

    if edit is not None and original is not None:
        raise typer.BadParameter("give --edit or --original: with --edit, MODEL is the original")
    if controls and edit is None and original is None:
        raise typer.BadParameter(
            "the positive controls are made of the model before the edit: give --edit, --original or --no-controls"
        )
    chosen = _attack.build(attacks, name_values(settings, "--set"))
    _attack.steps_fit(chosen, steps)
    _attack.check_out(out)
    target: Any
    target, tokenizer = load(model, dtype=dtype, device=device)
    reading = {"chat": chat, "eos": eos}
    model_map = describe(target)
    gone, kept = (read_prompts(file, model_map, tokenizer, **reading) for file in (forget, retain))
    reason = "random masks need the edit itself: give --edit"
    if edit is not None:
        target, reason = read_edit(edit, target, gone, kept)
    masks = how_many_random(random, reason, usual=0) or 0
    before, never_knew = (
        None if text is None else load(text, dtype=dtype, device=device)[0]
        for text in (original, oracle)
    )
    try:
        found = robustness(
            target, chosen, gone, kept, original=before, oracle=never_knew, random=masks, controls=controls,
            margin=margin, steps=steps, seconds=seconds, batch_size=batch_size, seed=seed,
            progress=wants_progress(as_json),
        )  # fmt: skip
    except Interrupted as stopped:
        _attack.save(stopped.found, out)
        interrupted(f"What the attacks found by then is in {out}.")
    written = _attack.save(found, out)
    if as_json:
        print_json(_attack.as_json(found, written))
        return
    header, rows = _attack.shown(found)
    console = terminal()
    if rows:
        table = Table(*header, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for line in _attack.withheld(found):
        console.print(escape(line), highlight=False, soft_wrap=True)
    for file in written:
        console.print(f"Written: {file}", soft_wrap=True)
