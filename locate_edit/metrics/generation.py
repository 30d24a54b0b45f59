"""Greedy continuation of many prompts at once, with a key-value cache and an early stop."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from locate_edit.errors import PromptError
from locate_edit.metrics.running import evaluating
from locate_edit.prompts import PromptSet
from locate_edit.sampling import LOST, check_lengths, decode, drop_lost, end_tokens

__all__ = ["continued", "generate", "greedy", "said", "written"]


def generate(
    model: nn.Module,
    prompts: PromptSet,
    max_new_tokens: int | None = None,
    *,
    batch_size: int = 16,
) -> list[list[int]]:
    """The greedy continuation of each prompt as token ids, the end token included where the model gives one.

    Equal to decoding one prompt at a time. Sampling, penalties and forced tokens of the model's own
    generation settings play no part.

    Args:
        model: a causal language model.
        prompts: the prompts; what stands before the first scored token is continued.
        max_new_tokens: length of each continuation (tokens); None continues each prompt to the length of its
            target.
        batch_size: prompts decoded together.

    Raises:
        PromptError: the prompts are for a masked model, a length is below 1, or the continuation would not
            fit the context.
    """
    rows = continued(model, prompts, max_new_tokens, batch_size=batch_size)
    return [drop_lost(row) for row in rows]


def written(
    model: nn.Module,
    prompts: PromptSet,
    max_new_tokens: int | None = None,
    *,
    batch_size: int = 16,
) -> list[str | None]:
    """The text of `generate`, special tokens left out; None where the model gives NaN or infinity on the way.

    Raises:
        PromptError: as `generate`.
    """
    return said(prompts, continued(model, prompts, max_new_tokens, batch_size=batch_size))


def said(prompts: PromptSet, rows: Sequence[Sequence[int]]) -> list[str | None]:
    """The text of each row of tokens, special ones left out; None for a row with `LOST`."""
    decode_ids = prompts.tokenizer.decode
    return [
        None if LOST in row else str(decode_ids(list(row), skip_special_tokens=True))
        for row in rows
    ]


def continued(
    model: nn.Module,
    prompts: PromptSet,
    max_new_tokens: int | None = None,
    *,
    batch_size: int = 16,
) -> list[list[int]]:
    """`generate`, where `LOST` is the last token of a row on which the model gave NaN or infinity.

    Raises:
        PromptError: as `generate`.
    """
    if prompts.masked:
        raise PromptError(
            f"{prompts!r} is for a masked model, which does not continue text. Use the top predictions instead."
        )
    if max_new_tokens is not None and max_new_tokens < 1:
        raise PromptError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    starts = [prompts.prompt_ids(i) for i in range(len(prompts))]
    lengths = [
        len(prompts.target_ids(i)) if max_new_tokens is None else max_new_tokens
        for i in range(len(prompts))
    ]
    return greedy(model, starts, lengths, ends=end_tokens(model, prompts), batch_size=batch_size)


def greedy(
    model: nn.Module,
    starts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    ends: frozenset[int] = frozenset(),
    batch_size: int = 16,
) -> list[list[int]]:
    """Greedy continuations of token sequences, each of its own length; `LOST` is last where the model gave NaN.

    Args:
        model: a causal language model.
        starts: token ids to continue, at least one each.
        lengths: how many tokens to add to each.
        ends: tokens after which a row stops.
        batch_size: rows decoded together.

    Raises:
        PromptError: an empty start, or a continuation that would not fit the model's context.
    """
    check_lengths(model, starts, lengths)
    # Rows that stop together and have similar lengths share a batch: the least padding and idle work.
    order = sorted(range(len(starts)), key=lambda i: (-lengths[i], -len(starts[i]), i))
    results: list[list[int]] = [[] for _ in starts]
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            rows = decode(model, [starts[i] for i in chosen], [lengths[i] for i in chosen], ends)
            for index, row in zip(chosen, rows, strict=True):
                results[index] = row
    return results
