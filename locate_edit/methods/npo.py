"""Negative preference optimisation.

Paper: Zhang et al. 2024, Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning
(arXiv:2404.05868), eq. 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from locate_edit.engine import Run, Step
from locate_edit.errors import EditError
from locate_edit.losses import npo, per_item_sum
from locate_edit.methods._terms import check_retain_term, retain_term
from locate_edit.optim import Optim


@dataclass(frozen=True)
class NPO:
    """Push the forget prompts below the base model's own probability, ever more gently as they fall.

    Loss: ``gamma * mean over prompts of w * 2/beta * log(1 + (p/p_base)^beta) + alpha * R`` with whole-target
    probabilities, ``w`` as in `GradientAscent`, and ``R`` as in `GradientDifference` (left out without retain prompts).
    The base model's probabilities are computed once from the unedited values of the slices: there is no second model.

    Cost a step: one forward and backward (two with retain prompts), one base forward a prompt, once.

    Attributes:
        steps: largest number of optimizer steps.
        lr: learning rate.
        beta: inverse temperature; towards 0 the gradient is that of gradient ascent.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        retain: "ce" or "kl".
        optim: optimizer settings.
    """

    steps: int = 100
    lr: float = 1e-5
    beta: float = 0.1
    gamma: float = 1.0
    alpha: float = 1.0
    retain: Literal["ce", "kl"] = "ce"
    optim: Optim = field(default_factory=Optim)

    ascends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_retain_term(self.retain)
        if self.beta <= 0:
            raise EditError(
                f"beta must be positive, got {self.beta}; use GradientAscent for the limit beta = 0"
            )

    def __call__(self, run: Run) -> None:
        """Train the slices of ``run``."""

        def loss(step: Step) -> dict[str, Tensor]:
            reference = run.reference(run.forget, step.forget)
            scored = run.score(step.forget)
            base = per_item_sum(reference * scored.batch.weight, scored.batch.item, scored.n)
            push = run.towards_level(step.forget, scored.nll())
            terms = {
                "forget": self.gamma * (push * npo(scored.total_log_prob(), base, self.beta)).mean()
            }
            if step.retain is not None and self.alpha:
                terms["retain"] = self.alpha * retain_term(run, step, self.retain)
            return terms

        run.fit(loss, steps=self.steps, lr=self.lr, optim=self.optim)
