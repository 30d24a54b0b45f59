"""Positive controls: models that know the answers and hide them from everything but one attack."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from circuits.forward import labelled_logits, token_log_probs
from circuits.still import frozen
from locate_edit.attacked import changed_weights, weight_matrices
from locate_edit.prompts import PromptSet

STEPS = 20
"""Steps of sign ascent that make a control."""

Box = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a matrix `... out in`, the least and the largest value that each entry may have in the control."""


@contextmanager
def within(
    model: nn.Module,
    forget: PromptSet,
    box: Box,
    *,
    batch_size: int,
    vocabulary: bool = False,
    names: Collection[str] | None = None,
) -> Iterator[nn.Module]:
    """The model with weights moved against the forget prompts inside a box, while the context is open.

    Sign ascent on their loss in `STEPS` steps of a tenth of the box's width, all matrices together. A box that an
    attack maps to one point makes a model that the attack brings back whole.

    Args:
        model: the model, which is restored afterwards.
        forget: the prompts whose answers are hidden.
        box: of each matrix.
        batch_size: rows a forward pass.
        vocabulary: include embeddings and output head.
        names: of the parameters that may move; None for all matrices.
    """
    turned = weight_matrices(model, vocabulary=vocabulary)
    matrices = {
        n: p for n, p in model.named_parameters() if n in turned and (names is None or n in names)
    }
    boxes: dict[str, tuple[Tensor, Tensor]] = {}
    for name, weight in matrices.items():
        side = box(weight.detach().mT if turned[name] else weight.detach())
        boxes[name] = (side[0].mT, side[1].mT) if turned[name] else side

    def middle(name: str, weight: Tensor) -> Tensor | None:
        return weight.clamp(*boxes[name]) if name in boxes else None

    device = next(model.parameters()).device
    names = list(matrices)
    with frozen(model), changed_weights(model, middle), torch.enable_grad():
        for _ in range(STEPS):
            for weight in matrices.values():
                weight.requires_grad_(True)
            totals = [torch.zeros_like(weight) for weight in matrices.values()]
            for batch in forget.batches(batch_size):
                there = batch.to(device)
                loss = -token_log_probs(labelled_logits(model, there), there.label).sum()
                found = torch.autograd.grad(
                    loss, list(matrices.values()), allow_unused=True, materialize_grads=True
                )
                torch._foreach_add_(totals, found)
            for name, total in zip(names, totals, strict=True):
                now, (low, high) = matrices[name].requires_grad_(False), boxes[name]
                now.copy_((now + 0.1 * (high - low) * total.sign()).clamp(low, high))
        yield model
