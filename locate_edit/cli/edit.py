"""`locate-edit edit`: change a model inside a mask, and save the change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from locate_edit import catalog
from locate_edit.cli.options import (
    BatchSize,
    Chat,
    Device,
    Dtype,
    Eos,
    Json,
    Mask,
    Model,
    Retain,
    Seed,
    Setting,
    Steps,
    option,
)
from locate_edit.cli.program import command
from locate_edit.cli.reading import (
    hyperparameters,
    read_mask,
    read_never_seen,
    read_prompts,
)
from locate_edit.cli.saying import (
    about_edit,
    say,
    wants_progress,
)


@command(
    "edit gpt2 --method npo --mask mask.safetensors --forget forget.jsonl --retain retain.jsonl --steps 100 --lr 1e-4 "
    "--set beta=0.1 --out my-edit --merge gpt2-edited"
)
def edit(
    model: Model,
    method: Annotated[
        str, option(help="A method of locate-edit info, or package.module:Name.", show=False)
    ],
    forget: Annotated[
        Path, option(metavar="FILE", help="JSONL file of what to change.", show=False)
    ],
    out: Annotated[Path, option(metavar="FOLDER", help="Where to save the edit.", show=False)],
    mask: Mask = None,
    retain: Retain = None,
    never_seen: Annotated[
        str,
        option(
            metavar="auto|none|NATS|FILE|MODEL",
            help="Where forgetting stops, prompt by prompt: a number of nats a token, a JSONL file of comparable text "
            "the model never saw, or a model that never saw it.",
        ),
    ] = "auto",
    steps: Steps = None,
    lr: Annotated[float | None, option(min=0, help="Same as --set lr=X.")] = None,
    settings: Setting = None,
    side: Annotated[
        Literal["both", "read", "write"] | None,
        option(help="both, read or write: which weights of a unit may change."),
    ] = None,
    merge: Annotated[
        Path | None, option(metavar="FOLDER", help="Also write the edited model as a checkpoint.")
    ] = None,
    report: Annotated[
        Path | None,
        option(
            metavar="FOLDER",
            help="Also measure it, beside the same edit on a random mask of equal size.",
        ),
    ] = None,
    chat: Chat = False,
    eos: Eos = False,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Change MODEL with an edit method, inside a mask only, and save the change."""
    from circuits import describe
    from circuits.atomic import check_folder
    from locate_edit import editing
    from locate_edit.checkpoints import load, save
    from locate_edit.reports.report import MEASURED

    chosen = catalog.build("method", method, hyperparameters(settings, steps=steps, lr=lr))
    check_folder(out, like="edit.json")
    if merge is not None:
        check_folder(merge, like="config.json")
    if report is not None:
        check_folder(report, like="report.json", ours=MEASURED)
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    reading = {"chat": chat, "eos": eos}
    done = editing.edit(
        loaded,
        chosen,
        read_mask(mask, model_map),
        forget=read_prompts(forget, model_map, tokenizer, **reading),
        retain=None if retain is None else read_prompts(retain, model_map, tokenizer, **reading),
        batch_size=batch_size,
        seed=seed,
        side=side,
        never_seen=read_never_seen(never_seen, model_map, tokenizer, **reading),
        progress=wants_progress(as_json),
    )
    done.save(out)
    if merge is not None:
        done.without_additions(f"--merge (the edit is in {out})")
        save(loaded, tokenizer, merge)
    summary: dict[str, Any] = {"edit": str(out), **about_edit(out)}
    if merge is not None:
        summary["merged"] = str(merge)
    if report is not None:
        from locate_edit.cli._evaluate import measure_and_write

        measured = measure_and_write(done, report, as_json, seed=seed)
        summary["report"] = measured if as_json else str(report)
    say(summary, as_json)
