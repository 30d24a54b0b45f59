"""The command line: `locate-edit demo | locate | edit | evaluate | compare | attack | ensemble | plot | compare-masks |
undo | info`.

Every command is a thin layer over the library: read names and files, call the verb, write the result, say what was
done.
Torch is imported inside the commands, so that `--help` answers at once. What a command has to say goes to standard
output; with `--json` that is one JSON object and nothing else. Progress and errors go to standard error.

Exit codes: 0 done, 1 the input could not be used (the message says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from circuits.errors import LocateEditError
from locate_edit import __version__, catalog

if TYPE_CHECKING:
    from collections.abc import Iterator

    from circuits import ComponentMask, ModelMap
    from locate_edit.prompts import PromptSet

Side = Literal["both", "read", "write"]
Select = Literal["vote", "top"]
F = TypeVar("F", bound=Callable[..., None])

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="locate-edit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Find where a language model keeps something, change exactly those weights, and measure what changed.\n\n"
        "Start with [bold]locate-edit demo[/bold]: it needs no files, no network and no GPU."
    ),
    epilog=(
        "MODEL is a folder written by save_pretrained, a name on the Hugging Face hub, or organism, oracle, oracle2 "
        "for the models that come with the package. Prompts are JSONL files: see locate-edit info --schema."
    ),
)


ensembles = typer.Typer(
    name="ensemble",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Models trained on disjoint shards: delete rows exactly, let the shards vote, or forget with teachers that "
        "never saw a text."
    ),
    epilog="Example: [bold]locate-edit ensemble train gpt2 --data data.jsonl --out ensemble[/bold]",
)
app.add_typer(ensembles)


# ---- options that several commands share ---------------------------------------------------------------------------


def _option(*names: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    return typer.Option(
        *names, help=help, metavar=metavar, show_default=more.pop("show", True), **more
    )


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, hub name, or organism.", show_default=False)
]
Setting = Annotated[
    list[str] | None,
    _option(
        "--set", metavar="NAME=VALUE", help="Set a hyperparameter of the method; repeat for more."
    ),
]
Steps = Annotated[int | None, _option(min=1, help="Same as --set steps=N.")]
Also = Annotated[
    list[str] | None,
    _option(
        "--also",
        metavar="NAME=FILE",
        help="JSONL file of further prompts to measure; repeat for more.",
    ),
]
Metrics = Annotated[
    list[str] | None,
    _option("--metric", metavar="NAME", help="A metric of locate-edit info; repeat for more."),
]
Oracle = Annotated[
    str | None,
    _option(metavar="MODEL", help="A model retrained without what was to be forgotten."),
]
Retain = Annotated[
    Path | None, _option(metavar="FILE", help="JSONL file of what should stay as it is.")
]
BatchSize = Annotated[
    int, _option(min=1, help="Prompts in one forward pass.", rich_help_panel="Running")
]
Seed = Annotated[int, _option(help="Seed of everything random.", rich_help_panel="Running")]
Device = Annotated[str, _option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel="Running")]
Dtype = Annotated[
    str, _option(help="auto (as stored), float32, bfloat16 or float16.", rich_help_panel="Running")
]
Json = Annotated[
    bool,
    _option("--json", help="Print one JSON object and nothing else.", rich_help_panel="Running"),
]


# ---- running -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line and exit with its code."""
    # A polite kill is an interruption too: it unwinds the stack, so half-written output is removed.
    signal.signal(signal.SIGTERM, _interrupt)
    # The libraries' own progress bars and advice would end up between our lines.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    app(prog_name="locate-edit")


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _explained() -> Iterator[None]:
    """Turn expected failures into one message on standard error and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        _errors().print("\n[bold]Interrupted.[/bold] Nothing half-written was left behind.")
        raise typer.Exit(INTERRUPTED) from None
    except (LocateEditError, OSError) as error:
        _errors().print(
            f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(FAILED) from None


def command(example: str, group: typer.Typer = app) -> Callable[[F], F]:
    """Register a command with an example for its help, and explain its failures."""

    def register(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            with _explained():
                function(*args, **kwargs)

        group.command(epilog=f"Example: [bold]locate-edit {example}[/bold]")(run)
        return function

    return register


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, _option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"locate-edit {__version__}")
        raise typer.Exit(DONE)


# ---- commands ------------------------------------------------------------------------------------------------------


@command("demo --out my-first-edit")
def demo(
    out: Annotated[
        Path, _option(metavar="FOLDER", help="Where the report and the edit go.")
    ] = Path("locate-edit-demo"),
    person: Annotated[int, _option(min=0, max=9, help="Whose number: one of ten people.")] = 0,
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
    summary = run_demo(out, person=person, seed=seed, console=_console(as_json))
    if as_json:
        _print_json(summary)


@command(
    "locate gpt2 --prompts forget.jsonl --method privacy-neurons --steps 20 --keep 200 --out mask.safetensors"
)
def locate(
    model: Model,
    prompts: Annotated[
        Path, _option(metavar="FILE", help="JSONL file of what to look for.", show=False)
    ],
    out: Annotated[
        Path | None,
        _option(metavar="FILE", help="Mask to write (.safetensors).", show=False),
    ] = None,
    method: Annotated[
        str, _option(help="A localizer of locate-edit info, or package.module:Name.")
    ] = "privacy-neurons",
    steps: Steps = None,
    settings: Setting = None,
    retain: Retain = None,
    contrast: Annotated[
        Path | None,
        _option(
            metavar="FILE",
            help="JSONL file of similar prompts to stay clear of: their scores are subtracted.",
        ),
    ] = None,
    contrast_weight: Annotated[float, _option(min=0, help="How much the contrast counts.")] = 3.0,
    select: Annotated[
        Select,
        _option(help="vote: units that prompts agree on; top: the --keep highest mean scores."),
    ] = "vote",
    keep: Annotated[int | None, _option(min=1, help="Keep at most this many units.")] = None,
    above: Annotated[
        float, _option(min=0, max=1, help="A prompt votes for units above this share of its best.")
    ] = 0.1,
    share: Annotated[
        float, _option(min=0, max=1, help="Keep what this share of the prompts votes for.")
    ] = 0.5,
    scores_out: Annotated[
        Path | None,
        _option("--scores", metavar="FILE", help="Also write every unit's score (.safetensors)."),
    ] = None,
    figure: Annotated[
        Path | None, _option(metavar="FILE", help="Also draw the mask (.png).")
    ] = None,
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
    localizer = catalog.build("localizer", method, _settings(settings, steps=steps))
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "progress": _progress(as_json),
    }
    if retain is not None:
        options["retain"] = _prompts(retain, model_map, tokenizer)
    try:
        scores = localizer(loaded, _prompts(prompts, model_map, tokenizer), **options)
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
            others = localizer(loaded, _prompts(contrast, model_map, tokenizer), **options)
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
        about |= _about_mask(mask, model_map)
        if figure is not None:
            _quiet_canvas()
            _draw(mask.plot(), figure)
    written = [str(file) for file in (out, scores_out, figure) if file is not None]
    _say({**about, "written": written}, as_json)


@command(
    "edit gpt2 --method npo --mask mask.safetensors --forget forget.jsonl --retain retain.jsonl --steps 100 --lr 1e-4 "
    "--set beta=0.1 --out my-edit --merge gpt2-edited"
)
def edit(
    model: Model,
    method: Annotated[
        str, _option(help="A method of locate-edit info, or package.module:Name.", show=False)
    ],
    forget: Annotated[
        Path, _option(metavar="FILE", help="JSONL file of what to change.", show=False)
    ],
    out: Annotated[Path, _option(metavar="FOLDER", help="Where to save the edit.", show=False)],
    mask: Annotated[
        str | None,
        _option(
            metavar="FILE|UNITS",
            help="A mask file, or units such as 'L4.neuron[3 17-20]'; default: all weights.",
        ),
    ] = None,
    retain: Retain = None,
    never_seen: Annotated[
        str,
        _option(
            metavar="auto|none|NATS|FILE|MODEL",
            help="Where forgetting stops, prompt by prompt: a number of nats a token, a JSONL file of comparable text "
            "the model never saw, or a model that never saw it.",
        ),
    ] = "auto",
    steps: Steps = None,
    lr: Annotated[float | None, _option(min=0, help="Same as --set lr=X.")] = None,
    settings: Setting = None,
    side: Annotated[
        Side | None, _option(help="both, read or write: which weights of a unit may change.")
    ] = None,
    merge: Annotated[
        Path | None, _option(metavar="FOLDER", help="Also write the edited model as a checkpoint.")
    ] = None,
    report: Annotated[
        Path | None,
        _option(
            metavar="FOLDER",
            help="Also measure it, beside the same edit on a random mask of equal size.",
        ),
    ] = None,
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

    chosen = catalog.build("method", method, _settings(settings, steps=steps, lr=lr))
    check_folder(out, like="edit.json")
    if merge is not None:
        check_folder(merge, like="config.json")
    if report is not None:
        check_folder(report, like="report.json")
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    done = editing.edit(
        loaded,
        chosen,
        _mask(mask, model_map),
        forget=_prompts(forget, model_map, tokenizer),
        retain=None if retain is None else _prompts(retain, model_map, tokenizer),
        batch_size=batch_size,
        seed=seed,
        side=side,
        never_seen=_never_seen(never_seen, model_map, tokenizer),
        progress=_progress(as_json),
    )
    done.save(out)
    if merge is not None:
        done.without_additions(f"--merge (the edit is in {out})")
        save(loaded, tokenizer, merge)
    summary: dict[str, Any] = {"edit": str(out), **_about_edit(out)}
    if merge is not None:
        summary["merged"] = str(merge)
    measured = None if report is None else _report(done, report, as_json, seed=seed)
    if measured is not None:
        summary["report"] = measured if as_json else str(report)
    _say(summary, as_json)


@command("evaluate gpt2 --edit my-edit --forget forget.jsonl --retain retain.jsonl --out report")
def evaluate(
    model: Model,
    edit: Annotated[
        Path | None, _option(metavar="FOLDER", help="Measure MODEL before and after this edit.")
    ] = None,
    forget: Annotated[
        Path | None, _option(metavar="FILE", help="JSONL file of what should be forgotten.")
    ] = None,
    retain: Retain = None,
    also: Also = None,
    metrics: Metrics = None,
    oracle: Oracle = None,
    other_oracle: Annotated[
        str | None,
        _option(metavar="MODEL", help="The same with another seed: the unit of the distance."),
    ] = None,
    out: Annotated[
        Path | None,
        _option(metavar="FOLDER", help="Where the report goes: HTML, JSON, Markdown and figures."),
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
    from locate_edit.editing import Edit

    if out is not None:
        check_folder(out, like="report.json")
    target: Any
    target, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(target)
    if edit is not None:
        target = Edit.load(edit).apply(target)
    sets = {
        name: None if file is None else _prompts(file, model_map, tokenizer)
        for name, file in {"forget": forget, "retain": retain}.items()
    }
    others = {
        name: _prompts(Path(file), model_map, tokenizer)
        for name, file in _pairs(also, "--also").items()
    }
    oracles = {
        name: None if text is None else load(text, dtype=dtype, device=device)[0]
        for name, text in {"oracle": oracle, "other_oracle": other_oracle}.items()
    }
    options = {"batch_size": batch_size, "seed": seed, "others": others, **sets, **oracles}
    summary = _report(target, out, as_json, metrics=metrics, **options)
    if as_json:
        _print_json(summary)


@command(
    "compare gpt2 --localizer privacy-neurons --localizer activation-contrast --method npo --method undial --budget 50 "
    "--budget 200 --set npo.beta=0.1 --forget forget.jsonl --retain retain.jsonl --also others=others.jsonl "
    "--out comparison"
)
def compare(
    model: Model,
    localizers: Annotated[
        list[str],
        _option(
            "--localizer",
            metavar="NAME",
            help="A localizer of locate-edit info, or package.module:Name; repeat for more.",
            show=False,
        ),
    ],
    methods: Annotated[
        list[str],
        _option(
            "--method",
            metavar="NAME",
            help="A method of locate-edit info, or package.module:Name; repeat for more.",
            show=False,
        ),
    ],
    budgets: Annotated[
        list[int],
        _option("--budget", min=1, help="How many units a mask has; repeat for more.", show=False),
    ],
    forget: Annotated[
        Path, _option(metavar="FILE", help="JSONL file of what to change.", show=False)
    ],
    retain: Annotated[
        Path, _option(metavar="FILE", help="JSONL file of what should stay as it is.", show=False)
    ],
    out: Annotated[
        Path,
        _option(metavar="FOLDER", help="Where table, numbers and figures go.", show=False),
    ],
    folder: Annotated[
        Path | None,
        _option(
            metavar="FOLDER",
            help="Where finished cells are kept and taken up again; default: cells inside --out.",
        ),
    ] = None,
    also: Also = None,
    metrics: Metrics = None,
    oracle: Oracle = None,
    settings: Annotated[
        list[str] | None,
        _option(
            "--set",
            metavar="NAME.KEY=VALUE",
            help="Set a hyperparameter of one localizer or method, such as npo.beta=0.1; repeat for more.",
        ),
    ] = None,
    steps: Annotated[
        int | None, _option(min=1, help="Steps of every method that has them.")
    ] = None,
    lr: Annotated[
        float | None, _option(min=0, help="Learning rate of every method that has one.")
    ] = None,
    seeds: Annotated[int, _option(min=1, help="Repeat everything with this many seeds.")] = 1,
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
    from locate_edit import cli_compare
    from locate_edit.checkpoints import load
    from locate_edit.compare import RANDOM
    from locate_edit.compare import compare as compare_all

    own = cli_compare.by_name(_pairs(settings, "--set"), [*localizers, *methods])
    where = cli_compare.build("localizer", localizers, own, {})
    how = cli_compare.build("method", methods, own, {"steps": steps, "lr": lr})
    measures = [catalog.resolve("metric", name) for name in metrics or ("likelihood",)]
    further = _pairs(also, "--also")
    cli_compare.check_out(out)
    cells = folder if folder is not None else out / cli_compare.CELLS
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    kept = set(cells.glob("cell-*.json"))
    try:
        found = compare_all(
            loaded,
            localizers=where,
            methods=how,
            budgets=budgets,
            forget=_prompts(forget, model_map, tokenizer),
            retain=_prompts(retain, model_map, tokenizer),
            others={
                name: _prompts(Path(file), model_map, tokenizer) for name, file in further.items()
            },
            metrics=measures,
            oracle=None if oracle is None else load(oracle, dtype=dtype, device=device)[0],
            folder=cells,
            seeds=range(seed, seed + seeds),
            batch_size=batch_size,
            progress=_progress(as_json),
        )
    except KeyboardInterrupt:
        new = len(set(cells.glob("cell-*.json")) - kept)
        total = (len(where) + 1) * len(how) * len(budgets) * seeds
        _errors().print(
            f"\n[bold]Interrupted.[/bold] {new} cells of {total} were done now and are kept in {escape(str(cells))}. "
            "The same command goes on from there.",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    written = cli_compare.write(found, out, next(iter(further), "retain"))
    if as_json:
        _print_json({**found.to_json(), "random": RANDOM, "written": written})
    else:
        header, *rows = found.table()
        table = Table(*header, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row))
        _console().print(table)
        for file in written:
            _console().print(f"Written: {file}", soft_wrap=True)
    if found.failures:
        raise LocateEditError(cli_compare.failures(found))


@command(
    "attack gpt2 --edit my-edit --forget forget.jsonl --retain retain.jsonl --oracle retrained --attack relearning "
    "--attack quantisation --set relearning.steps=20 --out attacks"
)
def attack(
    model: Model,
    forget: Annotated[
        Path, _option(metavar="FILE", help="JSONL file of what should be forgotten.", show=False)
    ],
    retain: Annotated[
        Path, _option(metavar="FILE", help="JSONL file of what it should know anyway.", show=False)
    ],
    out: Annotated[
        Path,
        _option(metavar="FOLDER", help="Where table, numbers and figure go.", show=False),
    ],
    edit: Annotated[
        Path | None, _option(metavar="FOLDER", help="Attack MODEL with this edit applied.")
    ] = None,
    original: Annotated[
        str | None, _option(metavar="MODEL", help="What MODEL was before it was edited.")
    ] = None,
    oracle: Oracle = None,
    attacks: Annotated[
        list[str] | None,
        _option(
            "--attack",
            metavar="NAME",
            help="An attack of locate-edit info, or package.module:Name; repeat for more. Default: all.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        _option(
            "--set",
            metavar="NAME.KEY=VALUE",
            help="Set a hyperparameter of one attack, such as relearning.steps=20; repeat for more.",
        ),
    ] = None,
    steps: Annotated[int | None, _option(min=1, help="No attack takes more steps.")] = None,
    seconds: Annotated[
        float | None, _option(min=0, help="No attack is begun after this time.")
    ] = None,
    margin: Annotated[
        float,
        _option(
            min=0, help="What an attack must bring back in its positive control to be believed."
        ),
    ] = 0.3,
    controls: Annotated[
        bool,
        _option("--controls/--no-controls", help="Try each attack on its positive control first."),
    ] = True,
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
    from locate_edit import cli_attack
    from locate_edit.checkpoints import load
    from locate_edit.editing import Edit
    from locate_edit.robustness import robustness

    if edit is not None and original is not None:
        raise typer.BadParameter("give --edit or --original: with --edit, MODEL is the original")
    if controls and edit is None and original is None:
        raise typer.BadParameter(
            "the positive controls are made of the model before the edit: give --edit, --original or --no-controls"
        )
    chosen = cli_attack.build(attacks, _pairs(settings, "--set"))
    cli_attack.steps_fit(chosen, steps)
    cli_attack.check_out(out)
    target: Any
    target, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(target)
    if edit is not None:
        target = Edit.load(edit).apply(target)
    before, never_knew = (
        None if text is None else load(text, dtype=dtype, device=device)[0]
        for text in (original, oracle)
    )
    found = robustness(
        target, chosen, _prompts(forget, model_map, tokenizer), _prompts(retain, model_map, tokenizer),
        original=before, oracle=never_knew, controls=controls, margin=margin, steps=steps, seconds=seconds,
        batch_size=batch_size, seed=seed, progress=_progress(as_json),
    )  # fmt: skip
    written = found.save(out)
    if as_json:
        _print_json(cli_attack.as_json(found, written))
        return
    header, rows = cli_attack.shown(found)
    console = _console()
    if rows:
        table = Table(*header, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for line in cli_attack.withheld(found):
        console.print(escape(line), highlight=False, soft_wrap=True)
    for file in written:
        console.print(f"Written: {file}", soft_wrap=True)


Ensemble = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A saved ensemble.", show_default=False)
]
Base = Annotated[
    str, typer.Argument(metavar="MODEL", help="The base of the ensemble.", show_default=False)
]
Data = Annotated[
    Path,
    _option(
        metavar="FILE",
        help="JSONL file of the rows that the ensemble knows, without deleted ones.",
        show=False,
    ),
]


@command("ensemble train gpt2 --data data.jsonl --shards 5 --steps 100 --out ensemble", ensembles)
def train(
    model: Model,
    data: Annotated[Path, _option(metavar="FILE", help="JSONL file of what to learn.", show=False)],
    out: Annotated[Path, _option(metavar="FOLDER", help="Where to save the ensemble.", show=False)],
    mask: Annotated[
        str | None,
        _option(
            metavar="FILE|UNITS",
            help="A mask file, or units such as 'L4.neuron[3 17-20]'; default: all weights.",
        ),
    ] = None,
    shards: Annotated[int, _option(min=1, help="Models, each trained on its own rows.")] = 3,
    slices: Annotated[
        int, _option(min=1, help="Checkpoints a shard: more make deletions cheaper.")
    ] = 2,
    by: Annotated[
        Literal["text", "group"], _option(help="group keeps rows of one group in one shard.")
    ] = "text",
    steps: Annotated[int | None, _option(min=1, help="Training steps a slice.")] = None,
    lr: Annotated[float | None, _option(min=0, help="Learning rate.")] = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Train one small change of MODEL a shard of the rows, slice by slice, so that rows can be deleted exactly."""
    from circuits import describe
    from locate_edit import cli_ensemble
    from locate_edit.checkpoints import load
    from locate_edit.ensembles.sisa import Sisa

    method = catalog.build("method", "fine-tune", _settings(None, steps=steps, lr=lr))
    sisa = Sisa(method, shards, slices, by, seed, {"batch_size": batch_size})
    cli_ensemble.check_out(out)
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    rows = _prompts(data, model_map, tokenizer)
    found = sisa.train(loaded, rows, _mask(mask, model_map))
    found.save(out)
    _say(cli_ensemble.about(found, out), as_json)


@command("ensemble delete ensemble gpt2 --data data.jsonl --row 17 --left left.jsonl", ensembles)
def delete(
    folder: Ensemble,
    model: Base,
    data: Data,
    rows: Annotated[
        list[str],
        _option(
            "--row",
            metavar="ID|NUMBER",
            help="What to delete: the id of a row, or its number from 0 if rows have no ids; repeat for more.",
            show=False,
        ),
    ],
    left: Annotated[
        Path,
        _option(
            metavar="FILE",
            help="JSONL file to write the remaining rows to: the --data of the ensemble from now on.",
            show=False,
        ),
    ],
    out: Annotated[
        Path | None,
        _option(metavar="FOLDER", help="Where the new ensemble goes; default: in place."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Delete rows exactly: train again what they touched, from the checkpoint before them, and nothing else.

    Rows are deleted, not texts: copies of the same text that stay are listed. --data itself is not changed.
    """
    from circuits import describe
    from locate_edit import cli_ensemble
    from locate_edit.checkpoints import load

    target = folder if out is None else out
    cli_ensemble.check_left(left, data, target)
    if out is not None:
        cli_ensemble.check_out(out)
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    found = cli_ensemble.load(folder, loaded, _prompts(data, describe(loaded), tokenizer))
    _say(cli_ensemble.delete(found, rows, target, left), as_json)


@command(
    "ensemble predict ensemble gpt2 --data data.jsonl --prompts test.jsonl --choice ' no' --choice ' yes' "
    "--out votes.json",
    ensembles,
)
def predict(
    folder: Ensemble,
    model: Base,
    data: Data,
    prompts: Annotated[Path, _option(metavar="FILE", help="JSONL file to answer.", show=False)],
    out: Annotated[Path, _option(metavar="FILE", help="Votes to write (.json).", show=False)],
    choices: Annotated[
        list[str] | None,
        _option(
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
    from locate_edit import cli_ensemble
    from locate_edit.checkpoints import load

    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    found = cli_ensemble.load(folder, loaded, _prompts(data, model_map, tokenizer))
    asked = _prompts(prompts, model_map, tokenizer)
    said = cli_ensemble.votes(found, asked, choices or (), batch_size)
    cli_ensemble.write_json(out, said)
    unanimous = sum(each["share"] == 1 for each in said["answers"])
    summary = {"prompts": len(asked), "voters": len(said["shards"]), "unanimous": unanimous}
    _say({**(said if as_json else summary), "written": [str(out)]}, as_json)


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
        Path, _option(metavar="FILE", help="JSONL file to fit the rules on.", show=False)
    ],
    test: Annotated[Path, _option(metavar="FILE", help="JSONL file to measure on.", show=False)],
    choices: Annotated[
        list[str],
        _option(
            "--choice",
            metavar="TEXT",
            help="One of the two answers; give it twice, the one that counts as 1 last.",
            show=False,
        ),
    ],
    out: Annotated[
        Path, _option(metavar="FILE", help="Rules' answers to write (.json).", show=False)
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
    from locate_edit import cli_ensemble
    from locate_edit.checkpoints import load

    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    found = cli_ensemble.load(folder, loaded, _prompts(data, model_map, tokenizer))
    sets = [_prompts(file, model_map, tokenizer) for file in (fit, test)]
    said = cli_ensemble.fairness_of(found, sets[0], sets[1], choices, batch_size)
    cli_ensemble.write_json(out, said)
    summary = {
        f"{name}: accuracy, equalised-odds gap": f"{each['accuracy']:.3f}, {each['gap']:.3f}"
        for name, each in said["placements"].items()
    }
    _say({**(said if as_json else summary), "written": [str(out)]}, as_json)


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
        _option(
            metavar="FILE", help="JSONL file of what to forget, as it stood in --data.", show=False
        ),
    ],
    out: Annotated[Path, _option(metavar="FOLDER", help="Where to save the edit.", show=False)],
    student: Annotated[
        str | None,
        _option(
            metavar="MODEL",
            help="The model that is to forget, trained on all rows; default: MODEL.",
        ),
    ] = None,
    mask: Annotated[
        str | None,
        _option(
            metavar="FILE|UNITS", help="Where the edit may act; default: where the ensemble does."
        ),
    ] = None,
    retain: Retain = None,
    steps: Annotated[int, _option(min=1, help="Training steps.")] = 100,
    lr: Annotated[float, _option(min=0, help="Learning rate.")] = 1e-5,
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
    from locate_edit import cli_ensemble, editing
    from locate_edit.checkpoints import load
    from locate_edit.ensembles.leave_one_out import LeaveOneOut, soft_labels

    check_folder(out, like="edit.json")
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    model_map = describe(loaded)
    found = cli_ensemble.load(folder, loaded, _prompts(data, model_map, tokenizer))
    texts = _prompts(forget, model_map, tokenizer)
    target = loaded if student is None else load(student, dtype=dtype, device=device)[0]
    cli_ensemble.same_vocabulary(loaded, target)
    labels = soft_labels(found, texts, batch_size=batch_size)
    done = editing.edit(
        target,
        LeaveOneOut(labels, steps=steps, lr=lr),
        found.mask if mask is None else _mask(mask, describe(target)),
        forget=texts,
        retain=None if retain is None else _prompts(retain, model_map, tokenizer),
        batch_size=batch_size,
        seed=seed,
        progress=_progress(as_json),
    )
    done.save(out)
    teachers = [list(shards) for shards in labels.teachers]
    about = {"edit": str(out), "of": student or model, "teachers of each prompt": teachers}
    _say({**about, **_about_edit(out)}, as_json)


@command("plot mask.safetensors --out mask.png")
def plot(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Masks, scores, a circuit (.safetensors), or a report.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, _option(metavar="FILE", help="Picture to write (.png, .pdf or .svg).", show=False)
    ],
    figure: Annotated[
        str | None,
        _option(
            metavar="NAME",
            help="mask-map, histogram; score-map, heads, concentration; agreement (several masks or scores); "
            "circuit-graph; before-after, oracle-distance. Default: what suits the file.",
        ),
    ] = None,
    top: Annotated[
        int, _option(min=1, help="How many units or edges to mark, or draw, of the highest.")
    ] = 20,
    dpi: Annotated[int, _option(min=30, help="Dots per inch.")] = 300,
    as_json: Json = False,
) -> None:
    """Draw saved masks, scores, circuits or a report; several masks or scores together show how far they agree."""
    _quiet_canvas()
    from locate_edit.cli_figures import draw_files

    chosen, drawn = draw_files(files, figure, top)
    _draw(drawn, out, dpi)
    _say({"figure": chosen, "written": [str(out)]}, as_json)


@command("compare-masks mine.safetensors theirs.safetensors --truth planted.safetensors")
def compare_masks(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="MASK MASK...", help="Mask files.", show_default=False),
    ],
    truth: Annotated[
        Path | None, _option(metavar="FILE", help="Mask of the units that are known to matter.")
    ] = None,
    out: Annotated[
        Path | None, _option(metavar="FILE", help="Also draw the agreement (.png, .pdf or .svg).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how far masks agree: Jaccard overlap, beside what random masks of the same sizes would share."""
    _quiet_canvas()
    from circuits import ComponentMask, draw
    from locate_edit.cli_figures import compare, named

    if len(files) < 2 and truth is None:
        raise typer.BadParameter("give two masks at least, or one and --truth")
    masks = {name: ComponentMask.load(file) for name, file in named(files).items()}
    known = None if truth is None else ComponentMask.load(truth)
    about = compare(masks, known)
    if out is not None:
        shown = masks if len(masks) > 1 else {**masks, "truth": known or next(iter(masks.values()))}
        _draw(draw.agreement_map(shown, known), out)
        about["written"] = [str(out)]
    if as_json:
        _print_json(about)
    else:
        _say_comparison(about)


@command("undo gpt2-edited --edit my-edit --out gpt2-restored")
def undo(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Checkpoint that holds the edit.", show_default=False),
    ],
    edit: Annotated[Path, _option(metavar="FOLDER", help="The edit to take out.", show=False)],
    out: Annotated[
        Path | None,
        _option(metavar="FOLDER", help="Where the restored checkpoint goes; default: in place."),
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
    _say({"restored": str(target), "without": str(edit), "equal to the base model": True}, as_json)


@command("info my-edit")
def info(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|EDIT|MASK]",
            help="A model, an edit folder or a mask file.",
            show_default=False,
        ),
    ] = None,
    schema: Annotated[
        bool, _option("--schema", help="Print the JSON schema of a row of prompts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a model, an edit or a mask is; without one, list localizers, methods, metrics and model families."""
    if schema:
        from locate_edit.rows import ROW_SCHEMA

        _print_json(ROW_SCHEMA)
        return
    if target is None:
        _say_catalogue(as_json)
    elif (Path(target) / "edit.json").is_file():
        _say({"edit": target, **_about_edit(Path(target))}, as_json)
    elif Path(target).is_file():
        from circuits import ComponentMask

        mask = ComponentMask.load(target)
        _say({**_about_mask(mask), "made by": dict(mask.provenance)}, as_json)
    else:
        from circuits import describe
        from locate_edit.checkpoints import load

        loaded, _ = load(target, device="cpu")
        _say(_about_model(describe(loaded)), as_json)


# ---- reading what the user gave ------------------------------------------------------------------------------------


def _settings(settings: list[str] | None, **shortcuts: float | None) -> dict[str, str]:
    """Join `--set name=value` with the options that are shortcuts for it."""
    result = _pairs(settings, "--set")
    for name, number in shortcuts.items():
        if number is None:
            continue
        if name in result:
            raise typer.BadParameter(f"{name} is also given as --{name}", param_hint="--set")
        result[name] = repr(number)
    return result


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """Read `name=value` texts."""
    result = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"expected NAME=VALUE, got {text!r}", param_hint=option)
        result[name.strip()] = value
    return result


def _prompts(file: Path, model_map: ModelMap, tokenizer: Any) -> PromptSet:
    from locate_edit.prompts import PromptSet

    return PromptSet.from_jsonl(file, tokenizer, masked=not model_map.causal)


def _mask(text: str | None, model_map: ModelMap) -> ComponentMask | None:
    """Read a mask file, or units written out; None stands for all weights."""
    from circuits import ComponentMask

    if text is None:
        return None
    return ComponentMask.parse(text, model_map) if "[" in text else ComponentMask.load(text)


def _never_seen(text: str, model_map: ModelMap, tokenizer: Any) -> Any:
    """Read where forgetting stops: see `locate_edit.never_seen`."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return float(text)
    except ValueError:
        pass
    if Path(text).is_file():
        return _prompts(Path(text), model_map, tokenizer)
    from locate_edit.checkpoints import load

    device = next(model_map.model.parameters()).device
    return load(text, device=str(device))[0]


# ---- saying what was done ------------------------------------------------------------------------------------------


def _console(as_json: bool = False) -> Console:
    """Where a command talks to people: standard output, unless that is kept for JSON."""
    return Console(stderr=as_json)


def _errors() -> Console:
    return Console(stderr=True)


def _progress(as_json: bool) -> bool:
    """Show progress only where somebody looks at it."""
    return sys.stdout.isatty() and not as_json


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def _say(summary: Mapping[str, Any], as_json: bool) -> None:
    """Print a summary as JSON or as two columns."""
    if as_json:
        _print_json(summary)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in summary.items():
        table.add_row(f"[bold]{escape(name)}[/bold]", escape(_text(value)))
    _console().print(table)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(inner) for inner in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _report(target: Any, out: Path | None, as_json: bool, **options: Any) -> dict[str, Any]:
    """Evaluate, print the table and write the report."""
    from circuits.atomic import atomic_folder
    from locate_edit import evaluation

    report = evaluation.evaluate(target, progress=_progress(as_json), **options)
    if out is not None:
        with atomic_folder(out, like="report.json") as place:
            report.save(place)
    if not as_json:
        console = _console()
        console.print(report.table(width=console.width))
        console.print(report.summary, highlight=False)
        if out is not None:
            console.print(f"Written: {out / 'report.html'}", soft_wrap=True)
    return report.to_json()


def _about_mask(mask: ComponentMask, model_map: ModelMap | None = None) -> dict[str, Any]:
    about: dict[str, Any] = {"units": len(mask), "of": mask.total()}
    if model_map is not None:
        about["fraction of parameters"] = mask.fraction(model_map)
    about["sites"] = {str(site): count for site, count in mask.counts().items() if count}
    return about


def _about_edit(folder: Path) -> dict[str, Any]:
    from locate_edit.editing import Edit

    made = Edit.load(folder)
    about: dict[str, Any] = {"changed entries": made.delta.count(), "parameters": len(made.delta)}
    if made.additions:
        about["additions"] = [str(each.what) for each in made.additions]
    if made.mask is not None:
        about["units"] = len(made.mask)
    if made.log:
        about |= {"steps": len(made.log), "last loss": made.log[-1]["loss"]}
    return about | made.provenance


def _about_model(model_map: ModelMap) -> dict[str, Any]:
    sizes = (
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "d_head",
        "d_model",
        "d_mlp",
        "n_experts",
        "vocab",
    )
    about: dict[str, Any] = {
        "class": type(model_map.model).__name__,
        "family": model_map.config.model_type,
        "predicts": "the next token" if model_map.causal else "masked tokens",
        "parameters": model_map.n_parameters,
        **{name: getattr(model_map, name) for name in sizes if getattr(model_map, name)},
    }
    for kind in model_map.kinds:
        sites = model_map.sites(kind)
        units = sum(model_map.n_units(site) for site in sites)
        if sites:
            about[f"{kind} units"] = f"{units:,} in {len(sites)} sites, such as {sites[0]}"
    return about | {"architecture": model_map.architecture}


def _say_catalogue(as_json: bool) -> None:
    from circuits.families import supported

    kinds: tuple[catalog.Kind, ...] = ("localizer", "method", "metric", "attack")
    listed = {kind: catalog.entries(kind) for kind in kinds if catalog.entries(kind)}
    if as_json:
        found: dict[str, Any] = {
            kind: [
                {"name": e.name, "path": e.path, "summary": e.summary, "paper": e.paper}
                for e in entries
            ]
            for kind, entries in listed.items()
        }
        _print_json({**found, "families": supported()})
        return
    table = Table.grid(padding=(0, 2))
    for kind, entries in listed.items():
        table.add_row(f"[bold]{kind}s[/bold]")
        for entry in entries:
            table.add_row(f"  {entry.name}", escape(entry.summary))
    table.add_row("[bold]families[/bold]", ", ".join(supported()))
    _console().print(table)


def _say_comparison(about: Mapping[str, Any]) -> None:
    """Print what `compare` found as tables."""
    console = _console()
    sizes = Table("mask", "units", "of", "layers", "made by", box=None, pad_edge=False)
    for name, mask in about["masks"].items():
        layers = _text(mask["layers"]) or "none"
        sizes.add_row(
            escape(name), f"{mask['units']:,}", f"{mask['of']:,}", layers, escape(str(mask["made by"]))
        )  # fmt: skip
    console.print(sizes)
    if about["pairs"]:
        pairs = Table(
            "masks", "Jaccard", "at random", "shared units", "shared layers", box=None, pad_edge=False
        )  # fmt: skip
        for pair in about["pairs"]:
            pairs.add_row(
                escape(f"{pair['first']} and {pair['second']}"), f"{pair['jaccard']:.3f}",
                f"{pair['expected at random']:.3f}", f"{pair['shared units']:,}",
                _text(pair["shared layers"]) or "none",
            )  # fmt: skip
        console.print()
        console.print(pairs)
    if "truth" in about:
        truth = Table(
            "mask", "recall", "precision", "Jaccard", "at random", box=None, pad_edge=False
        )
        for name, row in about["truth"].items():
            precision = "none" if row["precision"] is None else f"{row['precision']:.3f}"
            truth.add_row(
                escape(name), f"{row['recall']:.3f}", precision, f"{row['jaccard']:.3f}",
                f"{row['expected at random']:.3f}",
            )  # fmt: skip
        console.print()
        console.print(truth)
    for file in about.get("written", ()):
        console.print(f"Written: {file}", soft_wrap=True)


def _quiet_canvas() -> None:
    """Draw into files only, wherever this runs."""
    import matplotlib as mpl

    mpl.use("Agg")


def _draw(drawn: Any, file: Path, dpi: int = 150) -> None:
    """Write the figure of some axes to a file, whole or not at all."""
    from matplotlib import pyplot as plt
    from matplotlib.backend_bases import FigureCanvasBase

    from circuits.atomic import atomic_file
    from circuits.draw import save_figure

    if file.suffix.lstrip(".").lower() not in FigureCanvasBase.get_supported_filetypes():
        raise LocateEditError(
            f"Cannot write {file}: expected a name that ends in .png, .pdf or .svg."
        )
    with atomic_file(file) as temporary:
        save_figure(drawn, temporary, dpi=dpi)
    plt.close("all")
