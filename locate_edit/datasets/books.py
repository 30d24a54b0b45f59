"""Plain text, such as a book, as passages to be continued."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locate_edit.errors import PromptError
from locate_edit.prompts import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["passages", "prompts"]


def passages(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = 128,
    given: int = 0,
    stride: int | None = None,
) -> list[dict[str, Any]]:
    """Stretches of ``length`` tokens of a text file, cut where a token ends, with their place in it.

    Args:
        source: a UTF-8 text file.
        tokenizer: a fast tokenizer (it knows which characters a token covers).
        length: of a passage (tokens). The last one, if shorter, is left out.
        given: tokens at its beginning that are the prompt; the rest is the target. 0: plain text, all of it scored.
        stride: from one passage's beginning to the next (tokens); None takes ``length``.

    Raises:
        PromptError: no such file, a tokenizer without offsets, lengths that do not fit, or a text that is too short.
    """
    path = Path(source)
    step = length if stride is None else stride
    if not 0 <= given < length or step < 1 or length < 2:
        raise PromptError(
            f"passages need 0 <= given < length, length >= 2 and stride >= 1; got given={given}, length={length}, "
            f"stride={step}."
        )
    if not tokenizer.is_fast:
        raise PromptError(f"passages need a fast tokenizer, and {type(tokenizer).__name__} is none.")  # fmt: skip
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    text = re.sub(r"[ \t]*\r?\n", "\n", text)
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, truncation=False
    )
    ends = encoded["offset_mapping"]
    made = []
    for number, start in enumerate(range(0, len(ends) - length + 1, step)):
        first = ends[start][0]
        middle, last = ends[start + given][0], ends[start + length - 1][1]
        row = {"group": path.stem, "id": f"{path.stem}-{number}", "start": first, "end": last}
        if given:
            row |= {"prompt": text[first:middle], "target": text[middle:last]}
        else:
            row |= {"prompt": text[first:last]}
        made.append(row)
    if not made:
        raise PromptError(
            f"{path}: {len(ends)} tokens are fewer than one passage of {length}; lower length."
        )
    return made


def prompts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = 128,
    given: int = 0,
    stride: int | None = None,
    **reading: Any,
) -> PromptSet:
    """The passages as prompts, see `passages`; ``reading`` says how `PromptSet` reads them.

    Cut out of its surroundings a passage may be read as a few tokens more or less than ``length``.
    """
    made = passages(source, tokenizer, length=length, given=given, stride=stride)
    return PromptSet(made, tokenizer, **{"name": Path(source).stem, **reading})
