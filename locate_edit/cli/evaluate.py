"""`locate-edit evaluate`: measure a model, or an edit of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from locate_edit.cli.options import (
    Also,
    BatchSize,
    Device,
    Dtype,
    Json,
    Metrics,
    Model,
    Oracle,
    Retain,
    Seed,
    option,
)
from locate_edit.cli.program import command
from locate_edit.cli.reading import (
    name_values,
    read_prompts,
)
from locate_edit.cli.saying import (
    print_json,
)


@command("evaluate gpt2 --edit my-edit --forget forget.jsonl --retain retain.jsonl --out report")
def evaluate(
    model: Model,
    edit: Annotated[
        Path | None, option(metavar="FOLDER", help="Measure MODEL before and after this edit.")
    ] = None,
    forget: Annotated[
        Path | None, option(metavar="FILE", help="JSONL file of what should be forgotten.")
    ] = None,
    retain: Retain = None,
    also: Also = None,
    metrics: Metrics = None,
    oracle: Oracle = None,
    other_oracle: Annotated[
        str | None,
        option(metavar="MODEL", help="The same with another seed: the unit of the distance."),
    ] = None,
    out: Annotated[
        Path | None,
        option(metavar="FOLDER", help="Where the report goes: HTML, JSON, Markdown and figures."),
    ] = None,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure MODEL, or an edit of it: before, after, and beside a model that never saw the text.

    A control with a random mask needs the edit to be made again: locate-edit edit --report does that.
    """
    from circuits import describe
    from circuits.atomic import check_folder
    from locate_edit.checkpoints import load
    from locate_edit.cli._evaluate import measure_and_write
    from locate_edit.editing import Edit

    if out is not None:
        check_folder(out, like="report.json")
    target: Any
    target, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(target)
    if edit is not None:
        target = Edit.load(edit).apply(target)
    sets = {
        name: None if file is None else read_prompts(file, model_map, tokenizer)
        for name, file in {"forget": forget, "retain": retain}.items()
    }
    others = {
        name: read_prompts(Path(file), model_map, tokenizer)
        for name, file in name_values(also, "--also").items()
    }
    oracles = {
        name: None if text is None else load(text, dtype=dtype, device=device)[0]
        for name, text in {"oracle": oracle, "other_oracle": other_oracle}.items()
    }
    options = {"batch_size": batch_size, "seed": seed, "others": others, **sets, **oracles}
    summary = measure_and_write(target, out, as_json, metrics=metrics, **options)
    if as_json:
        print_json(summary)
