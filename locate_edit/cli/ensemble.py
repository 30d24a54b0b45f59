"""`locate-edit ensemble`: models trained on shards; delete rows exactly, vote, forget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from locate_edit import catalog
from locate_edit.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Json,
    Mask,
    Model,
    Retain,
    Seed,
    option,
)
from locate_edit.cli.program import command, ensembles
from locate_edit.cli.reading import (
    hyperparameters,
    read_mask,
    read_prompts,
)
from locate_edit.cli.saying import (
    about_edit,
    say,
    wants_progress,
)

Ensemble = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A saved ensemble.", show_default=False)
]
Base = Annotated[
    str, typer.Argument(metavar="MODEL", help="The base of the ensemble.", show_default=False)
]
Data = Annotated[
    Path,
    option(
        metavar="FILE",
        help="JSONL file of the rows that the ensemble knows, without deleted ones.",
        show=False,
    ),
]


@command("ensemble train gpt2 --data data.jsonl --shards 5 --steps 100 --out ensemble", ensembles)
def train(
    model: Model,
    data: Annotated[Path, option(metavar="FILE", help="JSONL file of what to learn.", show=False)],
    out: Annotated[Path, option(metavar="FOLDER", help="Where to save the ensemble.", show=False)],
    mask: Mask = None,
    shards: Annotated[int, option(min=1, help="Models, each trained on its own rows.")] = 3,
    slices: Annotated[
        int, option(min=1, help="Checkpoints a shard: more make deletions cheaper.")
    ] = 2,
    by: Annotated[
        Literal["text", "group"], option(help="group keeps rows of one group in one shard.")
    ] = "text",
    steps: Annotated[int | None, option(min=1, help="Training steps a slice.")] = None,
    lr: Annotated[float | None, option(min=0, help="Learning rate.")] = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Train one small change of MODEL a shard of the rows, slice by slice, so that rows can be deleted exactly."""
    from circuits import describe
    from locate_edit.checkpoints import load
    from locate_edit.cli import _ensemble
    from locate_edit.ensembles.sisa import Sisa

    method = catalog.build("method", "fine-tune", hyperparameters(None, steps=steps, lr=lr))
    sisa = Sisa(method, shards, slices, by, seed, {"batch_size": batch_size})
    _ensemble.check_out(out)
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    rows = read_prompts(data, model_map, tokenizer)
    found = sisa.train(loaded, rows, read_mask(mask, model_map))
    found.save(out)
    say(_ensemble.about(found, out), as_json)


@command("ensemble delete ensemble gpt2 --data data.jsonl --row 17 --left left.jsonl", ensembles)
def delete(
    folder: Ensemble,
    model: Base,
    data: Data,
    rows: Annotated[
        list[str],
        option(
            "--row",
            metavar="ID|NUMBER",
            help="What to delete: the id of a row, or its number from 0 if rows have no ids; repeat for more.",
            show=False,
        ),
    ],
    left: Annotated[
        Path,
        option(
            metavar="FILE",
            help="JSONL file to write the remaining rows to: the --data of the ensemble from now on.",
            show=False,
        ),
    ],
    out: Annotated[
        Path | None,
        option(metavar="FOLDER", help="Where the new ensemble goes; default: in place."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Delete rows exactly: train again what they touched, from the checkpoint before them, and nothing else.

    Rows are deleted, not texts: copies of the same text that stay are listed. --data itself is not changed.
    """
    from circuits import describe
    from locate_edit.checkpoints import load
    from locate_edit.cli import _ensemble

    target = folder if out is None else out
    _ensemble.check_left(left, data, target)
    if out is not None:
        _ensemble.check_out(out)
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    found = _ensemble.load(folder, loaded, read_prompts(data, describe(loaded), tokenizer))
    say(_ensemble.delete(found, rows, target, left), as_json)


@command(
    "ensemble predict ensemble gpt2 --data data.jsonl --prompts test.jsonl --choice ' no' --choice ' yes' "
    "--out votes.json",
    ensembles,
)
def predict(
    folder: Ensemble,
    model: Base,
    data: Data,
    prompts: Annotated[Path, option(metavar="FILE", help="JSONL file to answer.", show=False)],
    out: Annotated[Path, option(metavar="FILE", help="Votes to write (.json).", show=False)],
    choices: Annotated[
        list[str] | None,
        option(
            "--choice",
            metavar="TEXT",
            help="An answer to choose from; repeat for more. Default: the likeliest next token.",
        ),
    ] = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Let the shards vote on the answer to each prompt."""
    from circuits import describe
    from locate_edit.checkpoints import load
    from locate_edit.cli import _ensemble

    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    found = _ensemble.load(folder, loaded, read_prompts(data, model_map, tokenizer))
    asked = read_prompts(prompts, model_map, tokenizer)
    said = _ensemble.votes(found, asked, choices or (), batch_size)
    _ensemble.write_json(out, said)
    unanimous = sum(each["share"] == 1 for each in said["answers"])
    summary = {"prompts": len(asked), "voters": len(said["shards"]), "unanimous": unanimous}
    say({**(said if as_json else summary), "written": [str(out)]}, as_json)


@command(
    "ensemble fair ensemble gpt2 --data data.jsonl --fit dev.jsonl --test test.jsonl --choice ' no' --choice ' yes' "
    "--out fair.json",
    ensembles,
)
def fair(
    folder: Ensemble,
    model: Base,
    data: Data,
    fit: Annotated[
        Path, option(metavar="FILE", help="JSONL file to fit the rules on.", show=False)
    ],
    test: Annotated[Path, option(metavar="FILE", help="JSONL file to measure on.", show=False)],
    choices: Annotated[
        list[str],
        option(
            "--choice",
            metavar="TEXT",
            help="One of the two answers; give it twice, the one that counts as 1 last.",
            show=False,
        ),
    ],
    out: Annotated[
        Path, option(metavar="FILE", help="Rules' answers to write (.json).", show=False)
    ],
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Give the votes equal odds in every group of people, without training: on each shard, on the vote, and jointly.

    A row's target is the right answer and its group the sensitive group. Rules are fitted on --fit and measured on
    --test, where sampling error reopens part of the gap.
    """
    from circuits import describe
    from locate_edit.checkpoints import load
    from locate_edit.cli import _ensemble

    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    found = _ensemble.load(folder, loaded, read_prompts(data, model_map, tokenizer))
    sets = [read_prompts(file, model_map, tokenizer) for file in (fit, test)]
    said = _ensemble.fairness_of(found, sets[0], sets[1], choices, batch_size)
    _ensemble.write_json(out, said)
    summary = {
        f"{name}: accuracy, equalised-odds gap": f"{each['accuracy']:.3f}, {each['gap']:.3f}"
        for name, each in said["placements"].items()
    }
    say({**(said if as_json else summary), "written": [str(out)]}, as_json)


@command(
    "ensemble forget ensemble gpt2 --data data.jsonl --forget forget.jsonl --student gpt2-tuned --steps 50 --lr 1e-4 "
    "--out my-edit",
    ensembles,
)
def forget(
    folder: Ensemble,
    model: Base,
    data: Data,
    forget: Annotated[
        Path,
        option(
            metavar="FILE", help="JSONL file of what to forget, as it stood in --data.", show=False
        ),
    ],
    out: Annotated[Path, option(metavar="FOLDER", help="Where to save the edit.", show=False)],
    student: Annotated[
        str | None,
        option(
            metavar="MODEL",
            help="The model that is to forget, trained on all rows; default: MODEL.",
        ),
    ] = None,
    mask: Annotated[
        str | None,
        option(
            metavar="FILE|UNITS", help="Where the edit may act; default: where the ensemble does."
        ),
    ] = None,
    retain: Retain = None,
    steps: Annotated[int, option(min=1, help="Training steps.")] = 100,
    lr: Annotated[float, option(min=0, help="Learning rate.")] = 1e-5,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Teach a model what the shards that never saw a text would say about it, and save the edit of it.

    The shard that saw the text keeps it: delete it there with locate-edit ensemble delete.
    """
    from circuits import describe
    from circuits.atomic import check_folder
    from locate_edit import editing
    from locate_edit.checkpoints import load
    from locate_edit.cli import _ensemble
    from locate_edit.ensembles.leave_one_out import LeaveOneOut, soft_labels

    check_folder(out, like="edit.json")
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    found = _ensemble.load(folder, loaded, read_prompts(data, model_map, tokenizer))
    texts = read_prompts(forget, model_map, tokenizer)
    target = loaded if student is None else load(student, dtype=dtype, device=device)[0]
    _ensemble.same_vocabulary(loaded, target)
    labels = soft_labels(found, texts, batch_size=batch_size)
    done = editing.edit(
        target,
        LeaveOneOut(labels, steps=steps, lr=lr),
        found.mask if mask is None else read_mask(mask, describe(target)),
        forget=texts,
        retain=None if retain is None else read_prompts(retain, model_map, tokenizer),
        batch_size=batch_size,
        seed=seed,
        progress=wants_progress(as_json),
    )
    done.save(out)
    teachers = [list(shards) for shards in labels.teachers]
    about = {"edit": str(out), "of": student or model, "teachers of each prompt": teachers}
    say({**about, **about_edit(out)}, as_json)
