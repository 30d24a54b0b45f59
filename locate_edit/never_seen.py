"""The never-seen level: how well a model that never met a prompt would still do on it.

Forgetting past this level is damage, and betrays that something was removed. Ascent-type methods
therefore stop *per prompt* here. The level of a prompt is a mean negative log-likelihood in nats a
token and comes from one of four sources:

- a hold-out `PromptSet` of comparable prompts the model never saw: its mean under the model before the edit;
- an oracle model, retrained without the forget set: its value on each prompt;
- a number;
- ``"auto"`` (a guess, for want of anything better): the base rate of such answers. Every target is
  scored by the token frequencies of the *other* targets of the forget and retain sets (Witten-Bell
  smoothing over the vocabulary), as by a model that knows what answers look like but not this one.
  With no other targets it is ``log(vocab)``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from circuits.forward import labelled_logits, output_projection, token_log_probs
from locate_edit.errors import EditError
from locate_edit.losses import per_item_mean
from locate_edit.prompts import PromptSet

BASE_RATE = "base rate of the other targets' tokens"
NeverSeen = PromptSet | nn.Module | float | Literal["auto"] | None


@dataclass
class Levels:
    """Never-seen level of every forget prompt and which of them have been seen there.

    Attributes:
        target: level `item`, nats a token; infinite for prompts without a level, which are always pushed.
        source: where the levels come from, in words.
        margin: distance from the level, in nats a token, over which the push fades, and within which a prompt counts as
            there.
    """

    target: Tensor
    source: str
    margin: float = 0.25
    _seen_there: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._seen_there = torch.zeros_like(self.target, dtype=torch.bool)

    def start_from(self, nll: Tensor) -> None:
        """Settle prompts whose ``nll`` `item` before the edit is already beyond their level.

        A level that was measured or given stands: such a prompt is to stay where it is, neither pushed nor taught. The
        base rate is only a guess that the prompt has just refuted, so there it goes without a level.
        """
        nll = nll.to(self.target.dtype)
        unknown = nll > self.target
        stay = torch.full_like(nll, math.inf) if self.source == BASE_RATE else nll
        self.target = torch.where(unknown, stay, self.target)

    def push(self, items: Sequence[int], nll: Tensor) -> Tensor:
        """Push `item` in [-1, 1]: the distance of each ``nll`` to its level over the margin."""
        at = torch.as_tensor(items).to(self.target.device, non_blocking=True)
        gap = self.target[at] - nll.to(self.target.dtype)
        self._seen_there[at] = gap.abs() <= self.margin
        return (gap / self.margin).clamp(-1.0, 1.0).to(nll.dtype)

    def all_seen_there(self) -> bool:
        """Whether every prompt was at its level when it was last scored."""
        return bool(self._seen_there.all())

    def all_there(self, nll: Tensor) -> bool:
        """Whether every prompt of ``nll`` `item` is within the margin of its level."""
        return bool(((self.target - nll).abs() <= self.margin).all())

    def summary(self, nll: Tensor) -> dict[str, Any]:
        """How many prompts reached their level, how many are beyond it, and the levels' mean (nats a token)."""
        has_level = torch.isfinite(self.target)
        gap = (nll - self.target)[has_level]
        return {
            "source": self.source,
            "prompts": len(self.target),
            "without_level": int((~has_level).sum()),
            "reached": int((gap >= -self.margin).sum()),
            "beyond": int((gap > self.margin).sum()),
            "level": float(self.target[has_level].mean()) if bool(has_level.any()) else None,
            "nll": float(nll.mean()),
            "margin": self.margin,
        }


def levels(
    source: NeverSeen,
    model: nn.Module,
    forget: PromptSet,
    retain: PromptSet | None,
    batch_size: int,
) -> Levels | None:
    """Levels of every forget prompt from ``source``, or None when ``source`` is None.

    Args:
        source: hold-out prompts, an oracle model, a number of nats a token, "auto", or None.
        model: the model before the edit.
        forget: the prompts to forget.
        retain: retain prompts, which "auto" counts too.
        batch_size: prompts a forward pass.

    Raises:
        EditError: the source is none of these.
    """
    if source is None:
        return None
    device = next(model.parameters()).device
    if isinstance(source, PromptSet):
        mean = float(mean_nll(model, source, batch_size).double().mean())
        return Levels(
            torch.full((len(forget),), mean, device=device),
            f"mean of {len(source)} hold-out prompts",
        )
    if isinstance(source, nn.Module):
        return Levels(
            mean_nll(source, forget, batch_size).to(device), "oracle model, prompt by prompt"
        )
    if isinstance(source, int | float) and not isinstance(source, bool):
        if not math.isfinite(source) or source < 0:
            raise EditError(
                f"a never-seen level is a non-negative number of nats a token, got {source}"
            )
        return Levels(torch.full((len(forget),), float(source), device=device), "given number")
    if isinstance(source, str) and source == "auto":
        vocab = len(cast("Tensor", output_projection(model).weight))
        return Levels(base_rate(forget, retain, vocab).to(device), BASE_RATE)
    raise EditError(
        "never_seen must be a hold-out PromptSet, an oracle model, a number, 'auto' or None, "
        f"got {source!r} ({type(source).__name__})"
    )


@torch.no_grad()
def mean_nll(model: nn.Module, prompts: PromptSet, batch_size: int) -> Tensor:
    """Mean negative log-likelihood a labelled token of every prompt under ``model``: `item`, in nats a token."""
    device = next(model.parameters()).device
    found = torch.zeros(len(prompts), device=device)
    for batch in prompts.batches(batch_size):
        there = batch.to(device)
        log_prob = token_log_probs(labelled_logits(model, there), there.label)
        found[list(batch.items)] = per_item_mean(
            -log_prob, there.item, len(batch.items), there.weight
        )
    return found


def base_rate(forget: PromptSet, retain: PromptSet | None, vocab: int) -> Tensor:
    """Negative log-likelihood `item` (nats a token) of every forget target under the other targets' token frequencies.

    Witten-Bell: ``p(t) = (c(t) + T/vocab) / (N + T)`` with counts ``c``, their sum ``N`` and number of distinct tokens
    ``T``, over the targets of ``forget`` and ``retain`` without the one that is scored; ``1/vocab`` when none is left.
    """
    targets = [forget.target_ids(i) for i in range(len(forget))]
    pool: Counter[int] = Counter(token for target in targets for token in target)
    if retain is not None:
        pool.update(token for i in range(len(retain)) for token in retain.target_ids(i))
    found = []
    for target in targets:
        others = pool - Counter(target)
        total, kinds = others.total(), len(others)
        probabilities = [
            (others[token] + kinds / vocab) / (total + kinds) if total else 1.0 / vocab
            for token in target
        ]
        found.append(-sum(math.log(p) for p in probabilities) / len(target))
    return torch.tensor(found, dtype=torch.float32)
