"""Greedy continuation of many prompts at once, with a key-value cache and an early stop."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from locate_edit.errors import PromptError
from locate_edit.metrics.running import evaluating
from locate_edit.prompts import PromptSet

__all__ = ["generate", "greedy"]


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
    return greedy(model, starts, lengths, ends=_end_tokens(model, prompts), batch_size=batch_size)


def greedy(
    model: nn.Module,
    starts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    ends: frozenset[int] = frozenset(),
    batch_size: int = 16,
) -> list[list[int]]:
    """Greedy continuations of token sequences, each of its own length.

    Args:
        model: a causal language model.
        starts: token ids to continue, at least one each.
        lengths: how many tokens to add to each.
        ends: tokens after which a row stops.
        batch_size: rows decoded together.

    Raises:
        PromptError: an empty start, or a continuation that would not fit the model's context.
    """
    _check_lengths(model, starts, lengths)
    # Rows that stop together and have similar lengths share a batch: the least padding and idle work.
    order = sorted(range(len(starts)), key=lambda i: (-lengths[i], -len(starts[i]), i))
    results: list[list[int]] = [[] for _ in starts]
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            rows = _decode(model, [starts[i] for i in chosen], [lengths[i] for i in chosen], ends)
            for index, row in zip(chosen, rows, strict=True):
                results[index] = row
    return results


@torch.no_grad()
def _decode(
    model: nn.Module,
    starts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    ends: frozenset[int],
) -> list[list[int]]:
    """One left-padded batch, decoded until every row has ended or reached its length."""
    device = next(model.parameters()).device
    width = max(len(start) for start in starts)
    ids = torch.zeros((len(starts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, start in enumerate(starts):
        ids[index, width - len(start) :] = torch.tensor(start, dtype=torch.long)
        mask[index, width - len(start) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    takes = inspect.signature(model.forward).parameters
    stop = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    budget = torch.tensor(list(lengths), dtype=torch.long, device=device)
    done = budget <= 0
    added: list[Tensor] = []
    cache: Any = None
    while not bool(done.all()):
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
        if "position_ids" in takes:
            # Counted from the first real token, so that padding on the left shifts nothing.
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in takes:
            inputs["logits_to_keep"] = 1
        if cache is not None:
            inputs["past_key_values"] = cache
        output = model(**inputs)
        cache = output.past_key_values
        ids = output.logits[:, -1].float().argmax(-1, keepdim=True)
        added.append(ids[:, 0])
        mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
        done = done | (len(added) >= budget) | torch.isin(ids[:, 0], stop)
    if not added:
        return [[] for _ in starts]
    table = torch.stack(added, dim=1).tolist()
    return [_cut(row[:length], ends) for row, length in zip(table, lengths, strict=True)]


def _cut(row: list[int], ends: frozenset[int]) -> list[int]:
    """A row up to its first end token, that included."""
    for position, token in enumerate(row):
        if token in ends:
            return row[: position + 1]
    return row


def _end_tokens(model: nn.Module, prompts: PromptSet) -> frozenset[int]:
    """The end tokens that tokenizer and model name."""
    settings = getattr(model, "generation_config", None)
    named: list[Any] = [prompts.tokenizer.eos_token_id]
    own = getattr(settings, "eos_token_id", None)
    named += own if isinstance(own, list) else [own]
    return frozenset(int(token) for token in named if token is not None)


def _check_lengths(
    model: nn.Module, starts: Sequence[Sequence[int]], lengths: Sequence[int]
) -> None:
    """Raise for a start without tokens or a continuation longer than the context."""
    limit = None
    if (config := getattr(model, "config", None)) is not None:
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if not start:
            raise PromptError(
                f"row {index} has no token to continue. Write a prompt, or use a tokenizer with a start token."
            )
        if isinstance(limit, int) and 0 < limit < len(start) + length:
            raise PromptError(
                f"row {index}: {len(start)} tokens and {length} new ones are more than the {limit} of the model's "
                "context. Lower max_new_tokens or shorten the prompt."
            )
