"""Plain fine-tuning inside a mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from locate_edit.engine import Run, Step
from locate_edit.methods._terms import check_retain_term, retain_term
from locate_edit.optim import Optim


@dataclass(frozen=True)
class FineTune:
    """Teach the model the targets of the prompts it is given as ``forget``, by ordinary cross-entropy.

    To overwrite a fact, give its prompts new targets. With an empty or absent retain set and a full
    mask this is ordinary fine-tuning (weight decay aside, which pulls towards the base). A strong
    baseline for knowledge editing.

    Loss: mean token cross-entropy ``+ alpha * R`` with the retain term of `GradientDifference`.

    Cost a step: one forward and backward (two with retain prompts).

    Attributes:
        steps: number of optimizer steps.
        lr: learning rate.
        alpha: weight of the retain term.
        retain: "ce" or "kl".
        optim: optimizer settings.
    """

    steps: int = 100
    lr: float = 1e-5
    alpha: float = 1.0
    retain: Literal["ce", "kl"] = "ce"
    optim: Optim = field(default_factory=Optim)

    def __post_init__(self) -> None:
        check_retain_term(self.retain)

    def __call__(self, run: Run) -> None:
        """Train the slices of ``run``."""

        def loss(step: Step) -> dict[str, Tensor]:
            terms = {"forget": run.score(step.forget).cross_entropy()}
            if step.retain is not None and self.alpha:
                terms["retain"] = self.alpha * retain_term(run, step, self.retain)
            return terms

        run.fit(loss, steps=self.steps, lr=self.lr, optim=self.optim)
