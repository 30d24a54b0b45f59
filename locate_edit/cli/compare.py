"""`locate-edit compare`: every localizer with every method and size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from rich.table import Table

from locate_edit import catalog
from locate_edit.cli.options import (
    Also,
    BatchSize,
    Chat,
    Device,
    Dtype,
    Eos,
    Json,
    Metrics,
    Model,
    NamedSetting,
    Oracle,
    Seed,
    option,
)
from locate_edit.cli.program import command, interrupted
from locate_edit.cli.reading import (
    name_values,
    read_prompts,
)
from locate_edit.cli.saying import (
    print_json,
    terminal,
    wants_progress,
)
from locate_edit.errors import LocateEditError


@command(
    "compare gpt2 --localizer privacy-neurons --localizer activation-contrast --method npo --method undial --budget 50 "
    "--budget 200 --set npo.beta=0.1 --forget forget.jsonl --retain retain.jsonl --also others=others.jsonl "
    "--out comparison"
)
def compare(
    model: Model,
    localizers: Annotated[
        list[str],
        option(
            "--localizer",
            metavar="NAME",
            help="A localizer of locate-edit info, or package.module:Name; repeat for more.",
            show=False,
        ),
    ],
    methods: Annotated[
        list[str],
        option(
            "--method",
            metavar="NAME",
            help="A method of locate-edit info, or package.module:Name; repeat for more.",
            show=False,
        ),
    ],
    budgets: Annotated[
        list[int],
        option("--budget", min=1, help="How many units a mask has; repeat for more.", show=False),
    ],
    forget: Annotated[
        Path, option(metavar="FILE", help="JSONL file of what to change.", show=False)
    ],
    retain: Annotated[
        Path, option(metavar="FILE", help="JSONL file of what should stay as it is.", show=False)
    ],
    out: Annotated[
        Path,
        option(metavar="FOLDER", help="Where table, numbers and figures go.", show=False),
    ],
    folder: Annotated[
        Path | None,
        option(
            metavar="FOLDER",
            help="Where finished cells are kept and taken up again; default: cells inside --out.",
        ),
    ] = None,
    also: Also = None,
    metrics: Metrics = None,
    oracle: Oracle = None,
    settings: NamedSetting = None,
    steps: Annotated[int | None, option(min=1, help="Steps of every method that has them.")] = None,
    lr: Annotated[
        float | None, option(min=0, help="Learning rate of every method that has one.")
    ] = None,
    seeds: Annotated[int, option(min=1, help="Repeat everything with this many seeds.")] = 1,
    chat: Chat = False,
    eos: Eos = False,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Edit MODEL with every localizer, method and number of units, beside random masks, and say what each did.

    MODEL is not changed. Interrupted, the same command goes on where it stopped. What an edit costs shows most honestly
    on prompts that no method saw: --also NAME=FILE. Where a combination cannot work, the others go on; what failed is
    said at the end, with exit code 1.
    """
    from circuits import describe
    from locate_edit.checkpoints import load
    from locate_edit.cli import _compare
    from locate_edit.reports.comparison import RANDOM
    from locate_edit.reports.comparison import compare as compare_all

    named = metrics or ["likelihood"]
    what = "a localizer, method or metric of this comparison"
    own = _compare.by_name(name_values(settings, "--set"), [*localizers, *methods, *named], what)
    where = _compare.build("localizer", localizers, own, {})
    how = _compare.build("method", methods, own, {"steps": steps, "lr": lr})
    measures = [catalog.build("metric", name, own.get(name, {})) for name in named]
    further = name_values(also, "--also")
    _compare.check_out(out)
    cells = folder if folder is not None else out / _compare.CELLS
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    reading = {"chat": chat, "eos": eos}
    model_map = describe(loaded)
    kept = set(cells.glob("cell-*.json"))
    try:
        found = compare_all(
            loaded,
            localizers=where,
            methods=how,
            budgets=budgets,
            forget=read_prompts(forget, model_map, tokenizer, **reading),
            retain=read_prompts(retain, model_map, tokenizer, **reading),
            others={
                name: read_prompts(Path(file), model_map, tokenizer, **reading)
                for name, file in further.items()
            },
            metrics=measures,
            oracle=None if oracle is None else load(oracle, dtype=dtype, device=device)[0],
            folder=cells,
            seeds=range(seed, seed + seeds),
            batch_size=batch_size,
            progress=wants_progress(as_json),
        )
    except KeyboardInterrupt:
        new = len(set(cells.glob("cell-*.json")) - kept)
        total = (len(where) + 1) * len(how) * len(budgets) * seeds
        interrupted(
            f"{new} cells of {total} were done now and are kept in {cells}. The same command goes on from there."
        )
    written = _compare.write(found, out, next(iter(further), "retain"))
    if as_json:
        print_json({**found.to_json(), "random": RANDOM, "written": written})
    else:
        header, *rows = found.table()
        table = Table(*header, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row))
        terminal().print(table)
        for file in written:
            terminal().print(f"Written: {file}", soft_wrap=True)
    if found.failures:
        raise LocateEditError(_compare.failures(found))
