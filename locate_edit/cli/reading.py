"""Reading what the user gave: settings, prompts, masks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from locate_edit.errors import EditError, PromptError

if TYPE_CHECKING:
    from circuits import ComponentMask, ModelMap
    from locate_edit.editing import Edit
    from locate_edit.prompts import PromptSet


def hyperparameters(settings: list[str] | None, **shortcuts: float | None) -> dict[str, str]:
    """Join `--set name=value` with the options that are shortcuts for it."""
    result = name_values(settings, "--set")
    for name, number in shortcuts.items():
        if number is None:
            continue
        if name in result:
            raise typer.BadParameter(f"{name} is also given as --{name}", param_hint="--set")
        result[name] = repr(number)
    return result


def name_values(texts: list[str] | None, option: str) -> dict[str, str]:
    """Read `name=value` texts."""
    result = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"expected NAME=VALUE, got {text!r}", param_hint=option)
        result[name.strip()] = value
    return result


def read_prompts(
    file: Path, model_map: ModelMap, tokenizer: Any, *, chat: bool = False, eos: bool = False
) -> PromptSet:
    """Read a JSONL file of prompts for a model; with ``chat`` as turns, with ``eos`` to the end of each target."""
    return read_file(file, tokenizer, masked=not model_map.causal, chat=chat, eos=eos)


def read_file(
    file: Path, tokenizer: Any, *, masked: bool | None, chat: bool, eos: bool
) -> PromptSet:
    """The same for a tokenizer; what the options ask for and cannot be had is said with their names."""
    from locate_edit.prompts import PromptSet

    if masked and (chat or eos):
        raise PromptError("--chat and --eos are for causal models, and this is a masked one")
    try:
        return PromptSet.from_jsonl(
            file, tokenizer, masked=masked, chat_template=chat, append_eos=eos
        )
    except PromptError as error:
        said = (
            str(error).replace("chat_template=True", "--chat").replace("append_eos=True", "--eos")
        )
        raise PromptError(said) from None


def read_mask(text: str | None, model_map: ModelMap) -> ComponentMask | None:
    """Read a mask file, or units written out; None stands for all weights."""
    from circuits import ComponentMask

    if text is None:
        return None
    return ComponentMask.parse(text, model_map) if "[" in text else ComponentMask.load(text)


def read_never_seen(text: str, model_map: ModelMap, tokenizer: Any, **reading: bool) -> Any:
    """Read where forgetting stops: see `locate_edit.never_seen`; ``reading`` as of `read_prompts`."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return float(text)
    except ValueError:
        pass
    if Path(text).is_file():
        return read_prompts(Path(text), model_map, tokenizer, **reading)
    from locate_edit.checkpoints import load

    device = next(model_map.model.parameters()).device
    return load(text, device=str(device))[0]


def read_edit(
    folder: Path, model: Any, forget: PromptSet | None, retain: PromptSet | None
) -> tuple[Edit, str]:
    """Load an edit and apply it to its base; with the prompts it was made with, it can be made again on random masks.

    Returns:
        The edit, and why it cannot be made again; empty if it can.
    """
    from locate_edit.editing import Edit

    made = Edit.load(folder).apply(model)
    try:
        if forget is None:
            raise EditError(
                "making the edit again takes its prompts: give them as --forget (and --retain)"
            )
        made.recall(forget=forget, retain=retain if made.provenance.get("retain") else None)
    except EditError as problem:
        # The library speaks of how prompts are read, the command line has options for it.
        reason = str(problem).replace("tokenised alike", "tokenised alike (--chat and --eos)")
        return made, reason
    return made, ""


def how_many_random(wanted: int | None, reason: str, usual: int | None) -> int | None:
    """How many random masks there are to be, where the edit can be made again or ``reason`` says why not.

    None is for one, if it can be had.

    Raises:
        EditError: some were asked for and cannot be had.
    """
    if wanted and reason:
        raise EditError(f"--random {wanted}: {reason}")
    if wanted is None:
        return 0 if reason else usual
    return wanted
