"""Leave-one-out ensemble: forget a text by learning what teachers that never saw it would have said.

Paper: Liu and Kalinli 2023, Forgetting Private Textual Sequences in Language Models via Leave-One-Out Ensemble
(arXiv:2309.16082): with ``M`` teachers on disjoint shards and a text ``x`` of shard ``m``, ``qbar = 1/(M-1) * sum over
j != m of q_j(. | x_<t)`` and the student minimises ``sum_t CE(qbar, p)(x_<t)`` on the target only.

    teachers = Sisa(method, shards=5, slices=1).train(model, data, mask)   # the model is the base
    deployed = edit(model, method, mask, forget=data)                      # trained on everything
    with deployed.off():
        labels = soft_labels(teachers, forget)                             # computed once
    edit(model, LeaveOneOut(labels, steps=50, lr=1e-3), mask, forget=forget)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from circuits.forward import labelled_logits
from locate_edit.engine import Run, Step
from locate_edit.ensembles._files import read, write
from locate_edit.ensembles.shards import text_of
from locate_edit.ensembles.sisa import ShardedEnsemble
from locate_edit.errors import EditError
from locate_edit.methods._terms import check_retain_term, retain_term
from locate_edit.metrics.running import evaluating
from locate_edit.optim import Optim
from locate_edit.prompts import Batch, PromptSet

INDEX, FILE, FORMAT = "labels.json", "labels.safetensors", "soft-labels/1"


class SoftLabels:
    """What the teachers say at every scored position of a prompt set; made by `soft_labels`.

    Attributes:
        probabilities: one tensor `label vocab` (float32, on the CPU) an item.
        digest: that of the prompt set.
        teachers: the shards whose mean each item's labels are.
    """

    def __init__(
        self, probabilities: Sequence[Tensor], digest: str, teachers: Sequence[Sequence[int]]
    ) -> None:
        self.probabilities = tuple(probabilities)
        self.digest = digest
        self.teachers = tuple(tuple(shards) for shards in teachers)

    def __repr__(self) -> str:
        return f"SoftLabels({len(self.probabilities)} items, prompts {self.digest[:12]})"

    def of(self, batch: Batch) -> Tensor:
        """The labels of a batch: `label vocab`."""
        return torch.cat([self.probabilities[i] for i in batch.items])

    def save(self, folder: str | Path) -> Path:
        """Write ``labels.safetensors`` and ``labels.json`` into ``folder``, all or nothing, without the prompts."""
        tensors = {str(item): each for item, each in enumerate(self.probabilities)}
        about = {"prompts": self.digest, "teachers": [list(shards) for shards in self.teachers]}
        return write(folder, INDEX, FORMAT, about, {FILE: tensors})

    @classmethod
    def load(cls, folder: str | Path) -> SoftLabels:
        """Read what `save` wrote. The teachers may be gone by then.

        Raises:
            EditError: there are no labels there, or its files are truncated or were changed.
        """
        about, files = read(folder, INDEX, FORMAT)
        tensors = files[FILE]
        probabilities = [tensors[str(item)] for item in range(len(tensors))]
        return cls(probabilities, about["prompts"], about["teachers"])


def soft_labels(
    ensemble: ShardedEnsemble, forget: PromptSet, *, batch_size: int = 16
) -> SoftLabels:
    """Mean next-token probabilities of the teachers that never saw each forget prompt, at its scored positions.

    A teacher saw a prompt if the prompt's text stands in a row of its shard (without regard to case and spacing).
    Teachers are switched in as deltas one by one; cost: one forward a teacher and prompt, and ``labels * vocab * 4``
    bytes for the result.

    Args:
        ensemble: the teachers, e.g. of `Sisa` with one slice; its model must be the base now.
        forget: the prompts to forget, as they stand in the teachers' data.
        batch_size: prompts a forward pass.

    Raises:
        EditError: a prompt that no teacher saw or that two shards hold (named with their rows), no teacher left to
            ask, or a model that is not the base now.
    """
    seen = _shards_that_saw(ensemble, forget)
    asked = [[s for s in ensemble.voters if s != shard] for shard in seen]
    if missing := [i for i, teachers in enumerate(asked) if not teachers]:
        raise EditError(
            f"no teacher is left that never saw forget prompt {missing[0]}: the ensemble has "
            f"{len(ensemble.voters)} shards with rows, and two at least are needed"
        )
    total: list[Tensor | None] = [None] * len(forget)
    for shard in ensemble.voters:
        items = [i for i, teachers in enumerate(asked) if shard in teachers]
        with ensemble.member(shard) as teacher:
            for item, said in _said(teacher, forget, items, batch_size):
                before = total[item]
                total[item] = said if before is None else before + said
    means = [t / len(n) for t, n in zip(total, asked, strict=True) if t is not None]
    return SoftLabels(means, forget.digest, asked)


@dataclass(frozen=True)
class LeaveOneOut:
    """Distil the student inside the mask into what the left-in teachers say about the forget prompts.

    Loss: ``mean over scored tokens of KL(qbar || p) + alpha * R``, whose gradient is that of the paper's cross-entropy
    and which is 0 at the teachers' mean; ``R`` is the retain term of `GradientDifference`, left out without retain
    prompts (the paper has none). The never-seen level is built in: the teachers' own uncertainty is the target.

    Use it where texts come from many sources that can be kept apart beforehand. Not where the same text may stand in
    several shards in other words: those teachers still know it. Teachers that know their own shard by heart are too
    sure of themselves and put the text *below* what a model of little knowledge gives it. The
    teacher of the text's own shard keeps the text; delete it there with `ShardedEnsemble.delete`.

    Cost a step: one forward and one backward (two with retain prompts); no teacher runs.

    Attributes:
        labels: from `soft_labels`, of the very prompts that are to be forgotten.
        steps: largest number of optimizer steps.
        lr: learning rate.
        alpha: weight of the retain term.
        retain: "ce" or "kl".
        optim: optimizer settings.
    """

    labels: SoftLabels
    steps: int = 100
    lr: float = 1e-5
    alpha: float = 1.0
    retain: Literal["ce", "kl"] = "ce"
    optim: Optim = field(default_factory=Optim)

    def __post_init__(self) -> None:
        check_retain_term(self.retain)

    def __call__(self, run: Run) -> None:
        """Train the slices of ``run``."""
        if run.forget.digest != self.labels.digest:
            raise EditError(
                f"{self.labels!r} are not of these forget prompts ({run.forget.digest[:12]}): call soft_labels with "
                "the prompt set that edit() gets"
            )

        def loss(step: Step) -> dict[str, Tensor]:
            scored = run.score(step.forget)
            wanted = self.labels.of(step.forget).to(scored.logits.device)
            log_p = scored.logits.log_softmax(-1)
            divergence = (torch.xlogy(wanted, wanted) - wanted * log_p).sum(-1)
            terms = {"forget": scored.mean(divergence)}
            if step.retain is not None and self.alpha:
                terms["retain"] = self.alpha * retain_term(run, step, self.retain)
            return terms

        run.fit(loss, steps=self.steps, lr=self.lr, optim=self.optim)


def _shards_that_saw(ensemble: ShardedEnsemble, forget: PromptSet) -> list[int]:
    """The one shard whose rows hold each forget prompt's text."""
    known = [text_of(row) for row in ensemble.data]
    found = []
    for index, row in enumerate(forget):
        text = text_of(row)
        rows = [i for i, other in enumerate(known) if text in other]
        shards = {ensemble.places[i].shard for i in rows}
        if not rows:
            raise EditError(
                f"forget prompt {index} ({text[:60]!r}) stands in none of the teachers' rows, so it is unknown which "
                "teacher to leave out: give it as it stood in the training data"
            )
        if len(shards) > 1:
            named = ", ".join(f"row {i} (shard {ensemble.places[i].shard})" for i in rows)
            raise EditError(
                f"forget prompt {index} ({text[:60]!r}) stands in more than one shard, so more than one teacher saw "
                f"it: {named}. Remove the duplicates or keep them in one shard (by='group')"
            )
        found.append(shards.pop())
    return found


@torch.no_grad()
def _said(
    model: nn.Module, prompts: PromptSet, items: Sequence[int], batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """Items and their next-token probabilities `label vocab` (float32, on the CPU)."""
    device = next(model.parameters()).device
    with evaluating(model):
        for at in range(0, len(items), batch_size):
            batch = prompts.batch(items[at : at + batch_size])
            said = labelled_logits(model, batch.to(device)).softmax(-1).cpu()
            counts = torch.bincount(batch.item, minlength=len(batch.items)).tolist()
            yield from zip(batch.items, said.split(counts), strict=True)
