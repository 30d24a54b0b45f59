"""`locate-edit evaluate`: measure a model, or an edit of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from locate_edit.cli.options import (
    Also,
    BatchSize,
    Chat,
    Device,
    Dtype,
    Eos,
    Json,
    Metrics,
    MetricSetting,
    Model,
    Oracle,
    OtherOracle,
    Random,
    Retain,
    Seed,
    option,
)
from locate_edit.cli.program import command
from locate_edit.cli.reading import (
    how_many_random,
    name_values,
    read_edit,
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
    settings: MetricSetting = None,
    oracle: Oracle = None,
    other_oracle: OtherOracle = None,
    random: Random = None,
    out: Annotated[
        Path | None,
        option(metavar="FOLDER", help="Where the report goes: HTML, JSON, Markdown and figures."),
    ] = None,
    chat: Chat = False,
    eos: Eos = False,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure MODEL, or an edit of it: before, after, and beside a model that never saw the text.

    With the prompts that the edit was made with, it is made again on a random mask of equal size, unless --random 0.
    What attacks bring back, and which layers still carry it: locate-edit report.
    """
    from circuits import describe
    from circuits.atomic import check_folder
    from locate_edit.checkpoints import load
    from locate_edit.cli._evaluate import build, measure_and_write
    from locate_edit.reports.report import MEASURED

    measures = build(metrics, name_values(settings, "--set"))
    if out is not None:
        check_folder(out, like="report.json", ours=MEASURED)
    target: Any
    target, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(target)
    sets = {
        name: None if file is None else read_prompts(file, model_map, tokenizer, chat=chat, eos=eos)
        for name, file in {"forget": forget, "retain": retain}.items()
    }
    reason = "there is no edit"
    if edit is not None:
        target, reason = read_edit(edit, target, **sets)
    masks = how_many_random(random, reason, usual=None)
    notes = () if edit is None or not reason else (f"no random control: {reason}",)
    others = {
        name: read_prompts(Path(file), model_map, tokenizer, chat=chat, eos=eos)
        for name, file in name_values(also, "--also").items()
    }
    oracles = {
        name: None if text is None else load(text, dtype=dtype, device=device)[0]
        for name, text in {"oracle": oracle, "other_oracle": other_oracle}.items()
    }
    options = {"batch_size": batch_size, "seed": seed, "others": others, **sets, **oracles}
    if edit is not None:
        options["random"] = masks
    summary = measure_and_write(target, out, as_json, notes, metrics=measures, **options)
    if as_json:
        print_json(summary)
