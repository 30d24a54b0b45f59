"""Gradient ascent: raise the language-model loss of the forget prompts.

Paper: Jang et al. 2023, Knowledge Unlearning for Mitigating Privacy Risks in Language Models (arXiv:2210.01504), eq. 1:
``theta <- theta + lr * grad L(theta)`` with ``L`` the mean token cross-entropy of the forget batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from locate_edit.engine import Run, Step
from locate_edit.methods._forgotten import check_rule, until_forgotten
from locate_edit.optim import Optim


@dataclass(frozen=True)
class GradientAscent:
    """Raise the loss of the forget prompts until each is as unlikely as text the model never saw.

    Loss: ``-mean over prompts of w * NLL`` with the mean token negative log-likelihood of each
    prompt and ``w`` in [-1, 1] from the prompt's distance to its never-seen level (1 far below, 0
    at the level; always 1 with ``never_seen=None``). The paper averages over tokens; the two agree
    for prompts of equal length.

    Cost a step: one forward and one backward through the edited blocks. No retain term: expect damage outside the
    forget set; prefer `GradientDifference` or `NPO` when retain prompts are at hand.

    Attributes:
        steps: largest number of optimizer steps. The paper makes one step an epoch: batch_size = number of prompts.
        lr: learning rate (paper: 5e-5 with Adam betas 0.9, 0.98 on all weights; narrow masks want more).
        rule: "level" stops each prompt at its never-seen level. "forgotten" is the paper's rule: stop when the means of
            memorisation accuracy (MA) and extraction likelihood (EL_n) over the forget prompts are both at most
            ``thresholds``; prompts are not treated one by one.
        thresholds: (MA, EL_n) of unseen text, for rule "forgotten" (paper, GPT-Neo 125M: 0.2994, 0.0499).
        n: length of the n-grams of EL_n, in tokens.
        every: steps between two looks of rule "forgotten".
        optim: optimizer settings.
    """

    steps: int = 100
    lr: float = 5e-5
    rule: Literal["level", "forgotten"] = "level"
    thresholds: tuple[float, float] | None = None
    n: int = 10
    every: int = 1
    optim: Optim = field(default_factory=lambda: Optim(betas=(0.9, 0.98)))

    ascends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rule(self.rule, self.thresholds)

    def __call__(self, run: Run) -> None:
        """Train the slices of ``run``."""
        if self.rule == "forgotten":
            run.levels = None
            run.add_stop(until_forgotten(run, self.thresholds, self.n, self.every))

        def loss(step: Step) -> dict[str, Tensor]:
            scored = run.score(step.forget)
            nll = scored.nll()
            return {"forget": -(run.towards_level(step.forget, nll) * nll).mean()}

        run.fit(loss, steps=self.steps, lr=self.lr, optim=self.optim)
