"""Prompts in other words, with what is asked for unchanged."""

from __future__ import annotations

from collections.abc import Mapping

from locate_edit.errors import PromptError
from locate_edit.prompts import PromptSet


def need_targets(*sets: PromptSet | None, attack: str) -> None:
    """Refuse plain text, whose every token would be scored, those that an attack adds included.

    Raises:
        PromptError: a row without a target.
    """
    for prompts in sets:
        for item, row in enumerate(prompts.rows if prompts is not None else ()):
            if row.get("target") is None:
                raise PromptError(
                    f"{prompts!r}, item {item}: {attack} puts text before what is asked for, but the row has no "
                    "'target'. Split its text into 'prompt' and 'target'."
                )


def rewritten(prompts: PromptSet, texts: Mapping[int, str], name: str) -> PromptSet:
    """The items that ``texts`` names with another prompt each; rows say in `form_of` which item they come from.

    Spans go, as they count characters of the old prompt; paraphrases too.
    """
    rows = [
        {k: v for k, v in prompts[item].items() if k not in ("spans", "paraphrases")}
        | {"prompt": text, "form_of": item}
        for item, text in texts.items()
    ]
    return prompts.reread(rows, name=name)
