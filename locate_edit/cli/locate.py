"""`locate-edit locate`: score every unit, write a mask of the best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from locate_edit import catalog
from locate_edit.cli.options import (
    BatchSize,
    Chat,
    Device,
    Dtype,
    Eos,
    Json,
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
    read_prompts,
)
from locate_edit.cli.saying import (
    about_mask,
    draw_to,
    quiet_canvas,
    say,
    wants_progress,
)
from locate_edit.errors import LocateEditError


@command(
    "locate gpt2 --prompts forget.jsonl --method privacy-neurons --steps 20 --keep 200 --out mask.safetensors"
)
def locate(
    model: Model,
    prompts: Annotated[
        Path, option(metavar="FILE", help="JSONL file of what to look for.", show=False)
    ],
    out: Annotated[
        Path | None,
        option(metavar="FILE", help="Mask to write (.safetensors).", show=False),
    ] = None,
    method: Annotated[
        str, option(help="A localizer of locate-edit info, or package.module:Name.")
    ] = "privacy-neurons",
    steps: Steps = None,
    settings: Setting = None,
    retain: Retain = None,
    contrast: Annotated[
        Path | None,
        option(
            metavar="FILE",
            help="JSONL file of similar prompts to stay clear of: their scores are subtracted.",
        ),
    ] = None,
    contrast_weight: Annotated[float, option(min=0, help="How much the contrast counts.")] = 3.0,
    select: Annotated[
        Literal["vote", "top"],
        option(help="vote: units that prompts agree on; top: the --keep highest mean scores."),
    ] = "vote",
    keep: Annotated[int | None, option(min=1, help="Keep at most this many units.")] = None,
    above: Annotated[
        float, option(min=0, max=1, help="A prompt votes for units above this share of its best.")
    ] = 0.1,
    share: Annotated[
        float, option(min=0, max=1, help="Keep what this share of the prompts votes for.")
    ] = 0.5,
    scores_out: Annotated[
        Path | None,
        option("--scores", metavar="FILE", help="Also write every unit's score (.safetensors)."),
    ] = None,
    figure: Annotated[
        Path | None, option(metavar="FILE", help="Also draw the mask (.png).")
    ] = None,
    chat: Chat = False,
    eos: Eos = False,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Score every unit of MODEL on the prompts and write a mask of the best ones.

    Each prompt votes for units (--above, --share) and the --keep with most votes stay. With --contrast the --keep units
    stay that stand out most against the other prompts. Some localizers compare with what should stay (--retain), or
    need fields of the rows such as wrong, subject, corrupt or paraphrases: see locate-edit info --schema.
    """
    from circuits import describe
    from locate_edit.checkpoints import load

    if out is None and scores_out is None:
        raise typer.BadParameter("give --out for the mask, --scores for the scores, or both")
    if out is None and figure is not None:
        raise typer.BadParameter("--figure draws the mask, so it also needs --out")
    if keep is None and (contrast is not None or select == "top"):
        needs = "--select top" if contrast is None else "--contrast"
        raise typer.BadParameter(f"{needs} also needs --keep: how many units the mask should have")
    localizer = catalog.build("localizer", method, hyperparameters(settings, steps=steps))
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    reading = {"chat": chat, "eos": eos}
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "progress": wants_progress(as_json),
    }
    if retain is not None:
        options["retain"] = read_prompts(retain, model_map, tokenizer, **reading)
    try:
        scores = localizer(
            loaded, read_prompts(prompts, model_map, tokenizer, **reading), **options
        )
    except LocateEditError as error:
        # The library speaks of its argument, the command line has an option for it.
        if retain is None and "retain" in str(error):
            raise type(error)(f"{error}; on the command line: --retain FILE") from None
        raise
    if scores_out is not None:
        scores.save(scores_out)
    about: dict[str, Any] = {
        "scored units": scores.n_units,
        "rows of scores": scores.n_prompts,
    }
    if out is not None:
        if contrast is not None:
            others = localizer(
                loaded, read_prompts(contrast, model_map, tokenizer, **reading), **options
            )
            scores = scores.contrast(others, weight=contrast_weight)
        if keep is not None and keep > scores.n_units:
            raise LocateEditError(
                f"--keep {keep}: {method} scores only {scores.n_units} units of {model_map.name}."
            )
        if contrast is not None or select == "top":
            mask = scores.top(keep or 0)
        else:
            mask = scores.vote(above=above, share=share, keep=keep)
        mask.save(out)
        about |= about_mask(mask, model_map)
        if figure is not None:
            quiet_canvas()
            draw_to(mask.plot(), figure)
    written = [str(file) for file in (out, scores_out, figure) if file is not None]
    say({**about, "written": written}, as_json)
