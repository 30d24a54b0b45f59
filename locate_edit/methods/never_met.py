"""Bring each forget prompt to what the model itself says of subjects it never met, and no further.

Our own method; the idea of teaching what a model without the data would say is that of Who's Harry Potter (Eldan and
Russinovich 2023, arXiv:2310.02238), whose generic predictions come from a second model. Here they come from the model
before the edit, asked about strangers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from circuits.forward import output_projection
from locate_edit.engine import Run, Step
from locate_edit.errors import EditError, PromptError
from locate_edit.losses import kl_divergence
from locate_edit.methods._terms import retain_term
from locate_edit.optim import Optim
from locate_edit.prompts import Batch, PromptSet
from locate_edit.replacements import random_replacements

TRIES = 32  # draws of a name before random tokens take its place
LEAST = 1e-12  # probability below which a teacher's zero is a logarithm that overflows

Names = dict[int, list[tuple[int, ...]]]
"""Subjects (token ids) by their number of tokens."""


@dataclass(frozen=True)
class NeverMet:
    """Teach each forget prompt the base model's average answer about subjects that do not exist.

    Raising the loss of a secret, even up to the right level and not beyond, leaves the secret as the runner-up. This
    method has a whole distribution as its goal. For every scored token it is the mean of the *base* model's
    distributions over prompts with another subject in the place of the row's: a stranger, whose name is put together
    from parts of the names in the forget and retain rows (random tokens where there are too few). ``strangers`` of
    them are *near*: they keep one part of the name, since a model that never met somebody leans on namesakes. As many
    are *far*: nothing of the name is kept. The row's sensitive digits and letters (its ``spans``, or all digits) are
    drawn anew for each, since the beginning of a secret calls up the rest whoever is asked about. The goal is the
    near mean, with the scored token itself no more likely than in the far one: namesakes may give it away.

    Loss: ``KL(goal || model) + beta * KL(base || model) + alpha * KL(base || model)``, each the mean over scored
    tokens, so that a long secret counts for all it says. The first is the mean of two: at the rows as they are, and at
    those of them where something is drawn anew, redrawn: nothing is to follow from how the secret begins. The second is
    taken at one near stranger of each row, another each step: what the model says of namesakes is to stay, so that the
    edit hangs on the whole name and people who share a part of it are left alone. Rows where something is drawn anew
    are not in it: a namesake gives away too much of a secret to be kept. The third is taken at the retain prompts. All
    are 0 at their goals: every prompt stops by itself.

    A row without a subject (or whose text does not hold it) gets as its goal the base rate: how often each token
    stands at this place in the other targets of the forget and retain sets, smoothed (Witten-Bell). It has no
    namesakes to keep.

    Cost a step: three forwards and backwards (four where something is drawn anew) and one forward of the base model;
    once for each prompt, ``2 * strangers + 1`` forwards of the base model.

    Attributes:
        steps: number of optimizer steps.
        lr: peak learning rate (for narrow masks; a full one wants less).
        alpha: weight of the retain term.
        beta: weight of the term that keeps namesakes.
        strangers: near and far strangers asked about for each prompt, of each kind.
        optim: optimizer settings; the rate falls to 0 by default, so that the last steps settle.
    """

    steps: int = 100
    lr: float = 2e-3
    alpha: float = 100.0
    beta: float = 8.0
    strangers: int = 24
    optim: Optim = field(default_factory=lambda: Optim(schedule="cosine"))

    def __post_init__(self) -> None:
        if self.strangers < 1:
            raise EditError(f"strangers must be at least 1, got {self.strangers}")

    def __call__(self, run: Run) -> None:
        """Train the slices of ``run``."""
        goal = Goal(run, self.strangers)

        def away(wanted: Tensor, batch: Batch) -> Tensor:
            """KL to the log-probabilities ``wanted`` `label vocab`, mean over scored tokens (nats)."""
            scored = run.score(batch)
            return scored.mean(kl_divergence(wanted, scored.logits))

        def loss(step: Step) -> dict[str, Tensor]:
            wanted = goal(step.forget)  # before the graph below is built
            asked = [(wanted, step.forget), *goal.redrawn_like(step.forget, step.index)]
            kept = list(goal.namesakes(step.forget, step.index)) if self.beta else []
            terms = {"forget": torch.stack([away(*pair) for pair in asked]).mean()}
            if kept:
                terms["namesakes"] = self.beta * away(*kept[0])
            if step.retain is not None and self.alpha:
                terms["retain"] = self.alpha * retain_term(run, step, "kl")
            return terms

        run.fit(loss, steps=self.steps, lr=self.lr, optim=self.optim)


class Goal:
    """What a model that never met a subject would say at each scored token of the forget prompts.

    Args:
        run: whose base model is asked.
        n: near and far strangers for each prompt, of each kind.

    Raises:
        EditError: a row has no subject and there is no other target to take a base rate from.
    """

    def __init__(self, run: Run, n: int) -> None:
        forget = run.forget
        self.run = run
        self.vocab = len(cast("Tensor", output_projection(run.model).weight))
        self.has_subject = [bool(subject_of(forget, i)) for i in range(len(forget))]
        self.targets = [
            tuple(prompts.target_ids(i))
            for prompts in (forget, run.retain)
            if prompts is not None
            for i in range(len(prompts))
        ]
        self._check()
        rng = random.Random(run.settings.seed)
        names = names_in([forget] if run.retain is None else [forget, run.retain])
        self.redrawn = redrawn(forget, n, rng)
        self.near = [strangers(prompts, names, rng, near=True) for prompts in self.redrawn]
        self.far = [strangers(prompts, names, rng, near=False) for prompts in self.redrawn]
        self.changed = [
            self.redrawn[0].ids(i) != forget.ids(i)
            or any(prompts.ids(i) != forget.ids(i) for prompts in self.redrawn)
            for i in range(len(forget))
        ]
        self._kept: dict[int, Tensor] = {}
        self._free_bytes = run.settings.reference_bytes
        run.notes["never_met"] = {
            "strangers": n,
            "rows_with_subject": sum(self.has_subject),
            "rows_by_base_rate": len(forget) - sum(self.has_subject),
            "rows_redrawn": sum(self.changed),
        }

    def __call__(self, batch: Batch) -> Tensor:
        """The goal's log-probabilities `label vocab` for a CPU ``batch`` of the forget set."""
        return self.of(batch.items)

    def of(self, items: Sequence[int]) -> Tensor:
        """The same for prompts by their numbers."""
        missing = [i for i in items if i not in self._kept]
        found = dict(zip(missing, self._ask(missing), strict=True)) if missing else {}
        for i, part in found.items():
            size = part.numel() * part.element_size()
            if size <= self._free_bytes:
                self._kept[i] = part
                self._free_bytes -= size
        return torch.cat([found[i] if i in found else self._kept[i] for i in items])

    def redrawn_like(self, batch: Batch, index: int) -> Iterator[tuple[Tensor, Batch]]:
        """The goal and the prompts of ``batch`` in which something is drawn anew, one draw a step; nothing if none."""
        items = [i for i in batch.items if self.changed[i]]
        if items:
            yield self.of(items), self.redrawn[index % len(self.redrawn)].batch(items)

    @torch.no_grad()
    def namesakes(self, batch: Batch, index: int) -> Iterator[tuple[Tensor, Batch]]:
        """What the base model says (log-probabilities) of a near stranger for each prompt, and the prompts.

        Another stranger each step ``index``; only for rows that have a subject and nothing to draw anew.
        """
        items = [i for i in batch.items if self.has_subject[i] and not self.changed[i]]
        if items:
            asked = self.near[index % len(self.near)].batch(items)
            with self.run.base():
                said = self.run.score(asked).logits
            yield said.log_softmax(-1), asked

    @torch.no_grad()
    def _ask(self, items: Sequence[int]) -> list[Tensor]:
        """Log-probabilities `label vocab` of each item."""
        batch = self.run.forget.batch(items)
        near, far = self._mean(self.near, items), self._mean(self.far, items)
        goal = without_surplus(near, far, batch.label.to(near.device))
        parts = goal.split(torch.bincount(batch.item, minlength=len(items)).tolist())
        return [
            part.log() if self.has_subject[i] else self._base_rate(i, part)
            for i, part in zip(items, parts, strict=True)
        ]

    def _mean(self, sets: Sequence[PromptSet], items: Sequence[int]) -> Tensor:
        """Mean over parallel ``sets`` of the base model's probabilities `label vocab`."""
        with self.run.base():
            parts = [self.run.score(prompts.batch(items)).logits.softmax(-1) for prompts in sets]
        return torch.stack(parts).mean(0)

    def _base_rate(self, item: int, like: Tensor) -> Tensor:
        """Log of ``(c(t) + T/vocab) / (N + T)`` over the other targets' tokens at the same place: `label vocab`."""
        own = self.targets[item]
        rows = []
        for place in range(len(own)):
            counts = Counter(t[place] for t in self.targets if t != own and len(t) > place)
            rate = torch.full((self.vocab,), max(len(counts), 1) / self.vocab, device=like.device)
            for token, count in counts.items():
                rate[token] += count
            rows.append((rate / rate.sum()).log().to(like.dtype))
        return torch.stack(rows)

    def _check(self) -> None:
        for i, known in enumerate(self.has_subject):
            if not known and all(target == self.targets[i] for target in self.targets):
                raise EditError(
                    f"{self.run.forget!r}, item {i}: nothing tells what a model that never saw it would say. The row "
                    "has no 'subject' that stands in its prompt, and no other row has another target. Add 'subject' "
                    "to the row, or pass retain prompts of the same kind"
                )


def without_surplus(near: Tensor, far: Tensor, label: Tensor) -> Tensor:
    """``near`` `label vocab` with each ``label`` no more likely than in ``far``; what is taken goes to the others."""
    at = label[:, None]
    own = near.gather(-1, at)
    least = torch.minimum(own, far.gather(-1, at))
    # A near distribution that says nothing but the label has nowhere to put the rest: then the far one is the goal.
    rest = (1.0 - least) / (1.0 - own).clamp_min(LEAST)
    goal = torch.where(own > 1.0 - 1e-4, far, (near * rest).scatter(-1, at, least))
    return goal.clamp_min(LEAST)


def subject_of(prompts: PromptSet, index: int) -> list[int]:
    """Positions of the subject's tokens, none where the row has no subject or its text does not hold it."""
    try:
        return prompts.subject(index)
    except PromptError:
        return []


def names_in(sets: Sequence[PromptSet]) -> Names:
    """All subjects of some prompt sets."""
    found: dict[int, dict[tuple[int, ...], None]] = {}
    for prompts in sets:
        for i in range(len(prompts)):
            ids = prompts.ids(i)
            name = tuple(ids[at] for at in subject_of(prompts, i))
            found.setdefault(len(name), {})[name] = None
    return {length: list(names) for length, names in found.items()}


def strangers(prompts: PromptSet, names: Names, rng: random.Random, *, near: bool) -> PromptSet:
    """The same prompts about a subject that does not exist; rows without a subject stay as they are.

    Args:
        prompts: the prompts.
        names: subjects there are; a stranger's name is put together from tokens at the same places of them.
        rng: draws the names.
        near: keep one token of the subject (of those with more than one), else none.
    """
    special = set(prompts.tokenizer.all_special_ids)
    vocabulary = sorted(set(prompts.tokenizer.get_vocab().values()) - special)
    rows = []
    for i in range(len(prompts)):
        ids, place = prompts.ids(i), subject_of(prompts, i)
        own = tuple(ids[at] for at in place)
        for at, token in zip(place, _name(own, names, vocabulary, rng, near), strict=True):
            ids[at] = token
        rows.append(ids)
    return prompts.with_ids(rows, f"{prompts.name} strangers".strip())


def _name(
    own: tuple[int, ...], names: Names, vocabulary: list[int], rng: random.Random, near: bool
) -> tuple[int, ...]:
    """A name of as many tokens that nobody has."""
    if not own:
        return ()
    kept = rng.randrange(len(own)) if near and len(own) > 1 else None
    known = names.get(len(own), [])
    for attempt in range(2 * TRIES):
        name = [
            rng.choice(known)[k] if known and attempt < TRIES else rng.choice(vocabulary)
            for k in range(len(own))
        ]
        if kept is not None:
            name[kept] = own[kept]
        shared = sum(a == b for a, b in zip(name, own, strict=True))
        if tuple(name) not in known and shared == (kept is not None):
            return tuple(name)
    raise EditError("no name can be made up: the tokenizer's vocabulary has too few tokens")


def redrawn(prompts: PromptSet, n: int, rng: random.Random) -> list[PromptSet]:
    """``n`` sets parallel to ``prompts`` whose sensitive characters are drawn anew.

    A row with nothing to draw, or whose draws are tokenised to another length, stays as it is.
    """
    draws = [_draws(prompts, i, n, rng) for i in range(len(prompts))]
    return [prompts.with_ids([draw[k] for draw in draws]) for k in range(n)]


def _draws(prompts: PromptSet, index: int, n: int, rng: random.Random) -> list[list[int]]:
    """Token ids of ``n`` redrawn copies of one item."""
    own = prompts.ids(index)
    try:
        found = random_replacements(prompts.select([index]), 2 * n, seed=rng.randrange(2**32))
    except PromptError:
        return [own] * n
    fits = [
        found.ids(k)
        for k in range(len(found))
        if len(found.ids(k)) == len(own) and found.scored(k) == prompts.scored(index)
    ]
    return [fits[k % len(fits)] for k in range(n)] if fits else [own] * n
