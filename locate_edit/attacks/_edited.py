"""Positive controls by training: models that hide some prompts' answers and still give them to others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from circuits import ComponentMask
from locate_edit.attacked import measure
from locate_edit.editing import edit
from locate_edit.errors import EditError
from locate_edit.methods.npo import NPO
from locate_edit.prompts import PromptSet

HIDDEN = 0.5
"""Largest mean likelihood of answers that count as hidden."""


@contextmanager
def edited_away(
    model: nn.Module,
    gone: PromptSet,
    kept: PromptSet | None = None,
    *,
    batch_size: int,
    seed: int,
    mask: ComponentMask | None = None,
    epochs: int = 30,
    lr: float = 2e-3,
    level: float = 3.0,
) -> Iterator[nn.Module]:
    """The model edited to fail on ``gone`` and to answer ``kept``, while the context is open.

    Negative preference optimisation until every answer has been at ``level``.

    Args:
        model: the model, which is restored afterwards.
        gone: prompts whose answers are hidden.
        kept: prompts whose answers stay; None for none.
        batch_size: rows a forward pass.
        seed: of the order of the data.
        mask: where the model may change; None for everywhere.
        epochs: passes over ``gone`` at most.
        lr: learning rate.
        level: where the hidden answers are driven to (negative log-likelihood in nats a token).

    Raises:
        EditError: the answers could not be hidden.
    """
    steps = epochs * math.ceil(len(gone) / batch_size)
    made = edit(
        model, NPO(steps=steps, lr=lr, beta=0.5), mask, forget=gone, retain=kept,
        batch_size=batch_size, seed=seed, never_seen=level,
    )  # fmt: skip
    try:
        left = measure(model, gone, batch_size).estimate
        if left is None or left > HIDDEN:
            raise EditError(
                f"no positive control: {steps} steps left the answers that it should hide at a likelihood of {left}, "
                f"where {HIDDEN} at most is needed"
            )
        yield model
    finally:
        made.undo()
