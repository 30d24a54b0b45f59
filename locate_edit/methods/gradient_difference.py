"""Gradient difference: raise the loss of the forget prompts while holding the retain prompts.

Papers: Liu et al. 2022, Continual Learning and Private Unlearning (arXiv:2203.12817); the form with a choice of retain
terms is TOFU's (Maini et al. 2024, arXiv:2401.06121, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from locate_edit.engine import Run, Step
from locate_edit.methods._terms import check_retain_term, retain_term
from locate_edit.optim import Optim


@dataclass(frozen=True)
class GradientDifference:
    """Gradient ascent on the forget prompts minus descent on the retain prompts.

    Loss: ``-gamma * mean over prompts of w * NLL_forget + alpha * R`` with ``w`` as in `GradientAscent` and ``R`` the
    retain prompts' cross-entropy ("ce") or the KL divergence from the base model at their labelled tokens ("kl"; the
    popular implementation also averages over prompt and padding positions, which says nothing about the answers).

    Cost a step: two forwards and backwards; "kl" adds one forward of the base model for each retain prompt, once.

    Attributes:
        steps: largest number of optimizer steps.
        lr: learning rate.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        retain: "ce" or "kl".
        optim: optimizer settings.
    """

    steps: int = 100
    lr: float = 1e-5
    gamma: float = 1.0
    alpha: float = 1.0
    retain: Literal["ce", "kl"] = "ce"
    optim: Optim = field(default_factory=Optim)

    ascends: ClassVar[bool] = True
    needs_retain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_retain_term(self.retain)

    def __call__(self, run: Run) -> None:
        """Train the slices of ``run``."""

        def loss(step: Step) -> dict[str, Tensor]:
            nll = run.score(step.forget).nll()
            push = run.towards_level(step.forget, nll)
            return {
                "forget": -self.gamma * (push * nll).mean(),
                "retain": self.alpha * retain_term(run, step, self.retain),
            }

        run.fit(loss, steps=self.steps, lr=self.lr, optim=self.optim)
