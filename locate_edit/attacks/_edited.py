"""Positive controls by training: models that hide some prompts' answers and still give them to others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from circuits import ComponentMask
from locate_edit.attacked import measure
from locate_edit.editing import edit
from locate_edit.errors import EditError
from locate_edit.methods.npo import NPO
from locate_edit.prompts import PromptSet

LEVEL = 4.0
"""Where the hidden answers are driven to: negative log-likelihood in nats a token, a likelihood of 0.02."""
HIDDEN = 0.2
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
    steps: int = 10,
    lr: float = 1e-3,
) -> Iterator[nn.Module]:
    """The model edited to fail on ``gone`` and to answer ``kept``, while the context is open.

    Negative preference optimisation in rounds of ``steps`` until the answers of ``gone`` are below `HIDDEN`; five
    rounds at most.

    Args:
        model: the model, which is restored afterwards.
        gone: prompts whose answers are hidden.
        kept: prompts whose answers stay; None for none.
        batch_size: rows a forward pass.
        seed: of the order of the data.
        mask: where the model may change; None for everywhere.
        steps: optimizer steps a round.
        lr: learning rate.

    Raises:
        EditError: the answers could not be hidden.
    """
    made = []
    try:
        for turn in range(5):
            made.append(
                edit(model, NPO(steps=steps, lr=lr), mask, forget=gone, retain=kept, batch_size=batch_size,
                     seed=seed + turn, never_seen=LEVEL)
            )  # fmt: skip
            left = measure(model, gone, batch_size).estimate
            if left is not None and left < HIDDEN:
                break
        else:
            raise EditError(
                f"no positive control: {5 * steps} steps left the answers it should hide at a likelihood of "
                f"{left:.2f}, where below {HIDDEN} is needed"
            )
        yield model
    finally:
        for each in reversed(made):
            each.undo()
