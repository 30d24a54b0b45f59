"""`locate-edit report`: everything about an edit on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locate_edit.cli.options import (
    Also,
    Attacks,
    BatchSize,
    Chat,
    Device,
    Dtype,
    Eos,
    Gone,
    Json,
    Kept,
    Metrics,
    Model,
    MostSteps,
    NamedSetting,
    Oracle,
    OtherOracle,
    Random,
    Seconds,
    Seed,
    option,
)
from locate_edit.cli.program import command, interrupted
from locate_edit.cli.reading import how_many_random, name_values, read_edit, read_prompts
from locate_edit.cli.saying import print_json, terminal, wants_progress
from locate_edit.errors import Interrupted


@command(
    "report gpt2 --edit my-edit --forget forget.jsonl --retain retain.jsonl --oracle retrained --seconds 600 "
    "--out report"
)
def report(
    model: Model,
    edit: Annotated[Path, option(metavar="FOLDER", help="The edit of MODEL.", show=False)],
    forget: Gone,
    retain: Kept,
    out: Annotated[
        Path,
        option(metavar="FOLDER", help="Where page, numbers and figures go.", show=False),
    ],
    also: Also = None,
    metrics: Metrics = None,
    oracle: Oracle = None,
    other_oracle: OtherOracle = None,
    random: Random = None,
    attacks: Attacks = None,
    settings: NamedSetting = None,
    steps: MostSteps = None,
    seconds: Seconds = None,
    chat: Chat = False,
    eos: Eos = False,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Say on one page what an edit did: numbers, what attacks bring back, where it still is, and what else changed.

    Before and after the edit, beside a model that never saw the text (--oracle) and a random mask of equal size, for
    which the edit is made again: that takes the --forget and --retain it was made with.
    """
    from circuits import describe
    from circuits.atomic import atomic_folder, check_folder
    from locate_edit.checkpoints import load
    from locate_edit.cli import _attack, _evaluate
    from locate_edit.reports.examination import examine
    from locate_edit.reports.report import FILES

    none = list(attacks or ()) == ["none"]
    own = name_values(settings, "--set")
    named = metrics or _evaluate.USUAL
    of_metrics = {key: own.pop(key) for key in list(own) if key.rpartition(".")[0] in named}
    measures = _evaluate.build(metrics, of_metrics)
    if none and own:
        raise typer.BadParameter(
            f"{next(iter(own))}: there is no attack that it could be for", param_hint="--set"
        )
    chosen = [] if none else _attack.build(attacks, own)
    if chosen:
        _attack.steps_fit(chosen, steps)
    further = name_values(also, "--also")
    check_folder(out, like="report.json", ours=FILES)
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    reading = {"chat": chat, "eos": eos}
    model_map = describe(loaded)
    gone, kept = (read_prompts(file, model_map, tokenizer, **reading) for file in (forget, retain))
    made, reason = read_edit(edit, loaded, gone, kept)
    masks = how_many_random(random, reason, usual=None)
    oracles = [
        None if text is None else load(text, dtype=dtype, device=device)[0]
        for text in (oracle, other_oracle)
    ]
    stop = False
    try:
        found = examine(
            made, measures, forget=gone, retain=kept,
            others={name: read_prompts(Path(file), model_map, tokenizer, **reading) for name, file in further.items()},
            oracle=oracles[0], other_oracle=oracles[1], attacks=chosen, random=masks, seconds=seconds,
            steps=steps, batch_size=batch_size, seed=seed, progress=wants_progress(as_json),
        )  # fmt: skip
    except Interrupted as stopped:
        found, stop = stopped.found, True
    if reason:
        found = found.noted(f"No random control: {reason}")
    with atomic_folder(out, like="report.json", ours=FILES) as place:
        found.save(place)
    if stop:
        interrupted(f"What was found by then is in {out / 'report.html'}.")
    if as_json:
        print_json(found.to_json())
        return
    console = terminal()
    console.print(found.report.table(width=console.width))
    for question, said in found.answers.items():
        console.print(f"[bold]{question}[/bold]", end=" ")
        console.print(said, highlight=False, markup=False)
    for note in found.notes:
        console.print(f"Note: {note}", highlight=False, markup=False)
    console.print(f"Written: {out / 'report.html'}", soft_wrap=True)
