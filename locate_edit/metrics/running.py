"""How metrics run a model: in evaluation mode, on batches whose logits fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from circuits.forward import output_projection
from locate_edit.prompts import Batch, PromptSet

__all__ = ["evaluating", "scored_batches"]

# Logits of one batch are kept below this many numbers (512 MB in float32); a larger batch is split.
_MOST_LOGITS = 2**27


def scored_batches(model: nn.Module, prompts: PromptSet, batch_size: int) -> Iterator[Batch]:
    """Batches of all items on the model's device, split where their logits would be too large to hold."""
    head = dict(output_projection(model).named_parameters())
    vocab = head["weight"].shape[0] if "weight" in head else 1
    device = next(model.parameters()).device
    waiting = prompts.batches(batch_size)[::-1]
    while waiting:
        batch = waiting.pop()
        n_items = len(batch.items)
        if n_items > 1 and len(batch.label) * vocab > _MOST_LOGITS:
            halves = (batch.items[: n_items // 2], batch.items[n_items // 2 :])
            waiting += [prompts.batch(half) for half in reversed(halves)]
            continue
        yield batch.to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) while the context is open; each module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
