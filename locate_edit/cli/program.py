"""The program: its commands, how one is run, and what a failure looks like.

Exit codes: 0 done, 1 the input could not be used (the message says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.markup import escape

from circuits.errors import LocateEditError
from locate_edit import __version__
from locate_edit.cli.options import option
from locate_edit.cli.saying import error_terminal

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


def interrupted(kept: str) -> NoReturn:
    """End the command after an interruption, saying what was kept.

    Raises:
        Exit: always.
    """
    error_terminal().print(
        f"\n[bold]Interrupted.[/bold] {escape(kept)}", highlight=False, soft_wrap=True
    )
    raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _explained() -> Iterator[None]:
    """Turn expected failures into one message on standard error and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        interrupted("Nothing half-written was left behind.")
    except (LocateEditError, OSError) as error:
        error_terminal().print(
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
    version: Annotated[bool, option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"locate-edit {__version__}")
        raise typer.Exit(DONE)
