"""`locate-edit audit`: which tokens of a file of prompts are scored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locate_edit.cli.options import Chat, Eos, Json, option
from locate_edit.cli.program import command
from locate_edit.cli.reading import read_file
from locate_edit.cli.saying import print_json
from locate_edit.errors import LocateEditError

if TYPE_CHECKING:
    from locate_edit.prompts import PromptSet


@command("audit gpt2 forget.jsonl --item 0 --eos")
def audit(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder, hub name, or organism; the tokenizer alone will do.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL file of prompts.", show_default=False)
    ],
    items: Annotated[
        list[int] | None,
        option(
            "--item",
            metavar="N",
            min=0,
            help="Show this item, from 0; repeat for more. Default: the --first.",
        ),
    ] = None,
    first: Annotated[int, option(min=1, help="Show so many items from the beginning.")] = 5,
    chat: Chat = False,
    eos: Eos = False,
    as_json: Json = False,
) -> None:
    """Print exactly which tokens of the prompts in FILE are scored, as the tokenizer of MODEL reads them.

    The other commands read prompts in the same way, with the same --chat and --eos.
    """
    from locate_edit.checkpoints import load_tokenizer

    tokenizer, masked = load_tokenizer(model)
    read = read_file(prompts, tokenizer, masked=masked, chat=chat, eos=eos)
    if beyond := [item for item in items or () if item >= len(read)]:
        raise LocateEditError(
            f"--item {beyond[0]}: {prompts} has {len(read)} items, 0 to {len(read) - 1}"
        )
    shown = list(items) if items else list(range(min(first, len(read))))
    if as_json:
        print_json(_as_json(read, shown))
        return
    for item in shown:
        typer.echo(read.audit(item) + "\n")
    typer.echo(
        f"{len(shown)} of {len(read)} items shown; {read.n_scored} tokens scored in all, the longest item has "
        f"{read.longest} tokens."
    )


def _as_json(prompts: PromptSet, shown: list[int]) -> dict[str, Any]:
    """The whole set in numbers, and the tokens of the items to show."""
    return {
        "kind": "masked" if prompts.masked else "causal",
        "items": len(prompts),
        "scored_tokens": prompts.n_scored,
        "longest": prompts.longest,
        "digest": prompts.digest,
        "shown": [_item(prompts, item) for item in shown],
    }


def _item(prompts: PromptSet, item: int) -> dict[str, Any]:
    weights = dict(zip(prompts.scored(item), prompts.weights(item), strict=True))
    row = prompts[item]
    return {
        "item": item,
        **({"id": row["id"]} if "id" in row else {}),
        "tokens": [
            {
                "id": token,
                "text": prompts.tokenizer.decode([token]),
                "scored": position in weights,
                "weight": weights.get(position, 0.0),
            }
            for position, token in enumerate(prompts.ids(item))
        ],
    }
