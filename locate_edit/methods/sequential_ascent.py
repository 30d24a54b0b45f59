"""Sequential gradient ascent: the forget prompts a chunk at a time.

Paper: Jang et al. 2023, Knowledge Unlearning for Mitigating Privacy Risks in Language Models (arXiv:2210.01504),
section 4: sequential unlearning of chunks instead of all sequences at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from locate_edit.engine import Run, Step
from locate_edit.methods._forgotten import check_rule, until_forgotten
from locate_edit.methods._terms import check_positive
from locate_edit.never_seen import Levels
from locate_edit.optim import Optim
from locate_edit.prompts import PromptSet


@dataclass(frozen=True)
class SequentialAscent:
    """Gradient ascent on one chunk of the forget prompts after another, each until it is at its never-seen level.

    Loss: that of `GradientAscent`, on the prompts of the chunk alone; every chunk starts with a fresh optimizer from
    where the one before left the weights. The paper finds that chunks of 8 cost less of the rest of the model than all
    at once.

    Use it in the place of `GradientAscent` for many forget prompts. What is later learnt about the retain prompts is
    not held: with retain prompts at hand prefer `GradientDifference` or `NPO`. A later chunk may carry an earlier one
    past its level; what the run notes about levels is measured at the end, over all prompts.

    Cost a step: one forward and one backward; at most ``steps`` of them for each chunk.

    Deviations: with rule "level" each prompt is pushed only as far as its level, and a chunk ends when all of its
    prompts are there; "forgotten" is the paper's. Rules that end training early end the chunk they fire in, and the
    next one begins. Each record of the log names its ``chunk``.

    Attributes:
        steps: largest number of optimizer steps for each chunk.
        lr: learning rate (paper: 5e-5 with Adam betas 0.9, 0.98 on all weights; narrow masks want more).
        chunk: prompts a chunk, in the order of the set (paper: 8).
        rule, thresholds, n, every: when a chunk ends, as in `GradientAscent`; with "forgotten" the means are those of
            the chunk.
        optim: optimizer settings.
    """

    steps: int = 100
    lr: float = 5e-5
    chunk: int = 8
    rule: Literal["level", "forgotten"] = "level"
    thresholds: tuple[float, float] | None = None
    n: int = 10
    every: int = 1
    optim: Optim = field(default_factory=lambda: Optim(betas=(0.9, 0.98)))

    ascends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(chunk=self.chunk)
        check_rule(self.rule, self.thresholds)

    def __call__(self, run: Run) -> None:
        """Train the slices of ``run``."""
        if self.rule == "forgotten":
            run.levels = None
            run.add_stop(until_forgotten(run, self.thresholds, self.n, self.every))

        def loss(step: Step) -> dict[str, Tensor]:
            nll = run.score(step.forget).nll()
            return {"forget": -(run.towards_level(step.forget, nll) * nll).mean()}

        log: list[dict[str, Any]] = []
        stopped: dict[str, str] = {}
        for number, (prompts, levels) in enumerate(self._chunks(run)):
            with run.on(prompts, run.retain):
                run.levels = levels
                run.fit(loss, steps=self.steps, lr=self.lr, optim=self.optim)
            log += [{**record, "chunk": number} for record in run.log]
            run.log.clear()
            if "stopped" in run.notes:
                stopped[str(number)] = run.notes.pop("stopped")
        run.log[:] = log
        if stopped:
            run.notes["stopped"] = "; ".join(f"chunk {n} {why}" for n, why in stopped.items())
        if run.levels is not None:
            run.notes["never_seen"] = run.levels.summary(run.forget_nll())

    def _chunks(self, run: Run) -> Iterator[tuple[PromptSet, Levels | None]]:
        """Parts of the forget set, each with its levels."""
        for start in range(0, len(run.forget), self.chunk):
            part = slice(start, start + self.chunk)
            levels = run.levels and replace(run.levels, target=run.levels.target[part])
            yield run.forget[part], levels
