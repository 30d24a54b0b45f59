"""Positive controls by a cover: models that say one and the same other word where they would answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from circuits.forward import labelled_logits, output_projection
from circuits.still import evaluating
from locate_edit.attacked import measure
from locate_edit.errors import EditError
from locate_edit.prompts import PromptSet

HIDDEN = 0.1
"""Mean likelihood of the answers at which they count as covered."""
HIGHEST = 128
"""How far the word's logit is raised at most."""
RIDGE = 0.1
"""Weight of the ridge in that regression (share of the mean squared length of what the head reads)."""


@contextmanager
def covered(
    model: nn.Module,
    prompts: PromptSet,
    *,
    everywhere: bool,
    batch_size: int,
    seed: int = 0,
) -> Iterator[nn.Module]:
    """The model with the logit of one word raised until it covers the answers, while the context is open.

    Nothing that the model knows is touched: the word lies on top, as a trained refusal does, and once it is off, every
    answer is back. Its logit is raised by ``height * (what the head reads) @ direction``, where ``direction`` is fitted
    by ridge regression so that the product is 1 where the prompts' targets are predicted, and ``height`` is the least
    whole number that covers them. So the word's row of the head, less ``height * direction``, takes it off for all
    prompts at once. ``everywhere`` raises it by ``height`` for whatever is asked.

    Args:
        model: a model with an output head.
        prompts: whose answers are covered.
        everywhere: cover every prediction that the model makes, and not those of the prompts and what is like them.
        batch_size: rows a forward pass.
        seed: of the word, which is none of the targets' tokens.

    Raises:
        EditError: no token is left for the word, or none covers the answers.
    """
    head = output_projection(model)
    word = _word(prompts, seed)
    direction = None if everywhere else cover_direction(model, prompts, batch_size)
    height = 0

    def cover(_module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        raised = logits.clone()
        share = 1.0 if direction is None else (args[0].float() @ direction).to(logits.dtype)
        raised[..., word] += height * share
        return raised

    def hidden_at(given: int) -> bool:
        nonlocal height
        height = given
        left = measure(model, prompts, batch_size).estimate
        return left is not None and left <= HIDDEN

    handle = head.register_forward_hook(cover)
    try:
        # The lowest that covers: a higher one would take longer to train off, and hide nothing more.
        height = bisect_left(range(HIGHEST), True, key=hidden_at)
        if height == HIGHEST:
            raise EditError(
                f"no positive control: with the logit of a word raised by {HIGHEST} the answers that it should cover "
                f"still have a mean likelihood above {HIDDEN}"
            )
        yield model
    finally:
        handle.remove()


def cover_direction(model: nn.Module, prompts: PromptSet, batch_size: int) -> Tensor:
    """The direction of what the head reads whose product is about 1 where the targets are predicted, `d_head_input`."""
    states: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Any, ...], _logits: Tensor) -> None:
        states.append(args[0].detach().flatten(0, -2).double())

    device = next(model.parameters()).device
    handle = output_projection(model).register_forward_hook(look)
    try:
        with torch.no_grad(), evaluating(model):
            for batch in prompts.batches(batch_size):
                labelled_logits(model, batch.to(device))
    finally:
        handle.remove()
    read = torch.cat(states)  # `label d_head_input`
    ridge = RIDGE * read.square().sum(dim=1).mean()
    moment = read.T @ read + ridge * torch.eye(read.shape[1], dtype=read.dtype, device=device)
    direction = torch.linalg.solve(moment, read.sum(dim=0))
    found: Tensor = (direction / (read @ direction).mean()).float()
    return found


def _word(prompts: PromptSet, seed: int) -> int:
    """A token, drawn by the seed, that is neither special nor in any target."""
    tokenizer = prompts.tokenizer
    barred = set(tokenizer.all_special_ids)
    barred |= {token for item in range(len(prompts)) for token in prompts.target_ids(item)}
    left = [token for token in range(len(tokenizer)) if token not in barred]
    if not left:
        raise EditError("no positive control: the targets use every token there is")
    draw = torch.randint(len(left), (1,), generator=torch.Generator().manual_seed(seed))
    return left[int(draw)]
