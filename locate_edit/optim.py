"""How packed slices are stepped: optimizer, schedule, clipping, decay towards the base."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from locate_edit.errors import EditError


@dataclass(frozen=True)
class Optim:
    """Settings of the optimizer; learning rate and number of steps belong to the method.

    Attributes:
        name: "adamw" or "sgd".
        betas: Adam's decay rates of the first and second moment.
        eps: Adam's denominator offset.
        momentum: SGD's momentum.
        weight_decay: decoupled decay per step and unit of learning rate, towards the *unedited* values (not zero).
        clip: largest gradient norm over all packed slices; None for no clipping.
        schedule: "constant", "linear" or "cosine" decay to zero after the warm-up.
        warmup: steps of linear warm-up.
        accumulate: batches whose gradients are averaged in one step.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd"):
            raise EditError(f"unknown optimizer {self.name!r}: expected 'adamw' or 'sgd'")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise EditError(
                f"unknown schedule {self.schedule!r}: expected 'constant', 'linear' or 'cosine'"
            )
        if self.accumulate < 1 or self.warmup < 0 or self.weight_decay < 0:
            raise EditError(
                "accumulate must be at least 1, warmup and weight_decay at least 0; "
                f"got {self.accumulate}, {self.warmup}, {self.weight_decay}"
            )
        if self.clip is not None and self.clip <= 0:
            raise EditError(f"clip must be a positive norm or None, got {self.clip}")

    def factor(self, step: int, steps: int) -> float:
        """Share of the full learning rate at ``step`` (0-based) of ``steps``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        if self.schedule == "linear":
            return 1.0 - done
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0

    def build(self, leaves: list[Tensor], lr: float) -> torch.optim.Optimizer:
        """The torch optimizer over the packed leaves, as one fused kernel where torch has it."""
        fused = bool(leaves) and all(leaf.device.type in ("cpu", "cuda") for leaf in leaves)
        if self.name == "sgd":
            return torch.optim.SGD(leaves, lr=lr, momentum=self.momentum, fused=fused or None)
        return torch.optim.AdamW(
            leaves, lr=lr, betas=self.betas, eps=self.eps, weight_decay=0.0, fused=fused or None
        )
