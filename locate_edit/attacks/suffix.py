"""Search for tokens behind the question that bring the answer back: greedy coordinate gradient.

Paper: Yuan et al. 2024, Towards Robust Knowledge Unlearning (arXiv:2408.10682): the dynamic unlearning attack, which
searches by the greedy coordinate gradient of Zou et al. 2023 (arXiv:2307.15043).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuits import describe
from circuits.forward import labelled_logits, token_log_probs
from circuits.still import frozen
from locate_edit.additions import Added, ExtraTokens, install
from locate_edit.attacked import Attacked, Point, check_prompts, measure
from locate_edit.attacks._checks import check_whole
from locate_edit.attacks._halves import Across, check_across, halves, marks, of_items
from locate_edit.attacks._locked import fed_tokens, locked, target_tokens
from locate_edit.errors import EditError, PromptError
from locate_edit.metrics.values import Values
from locate_edit.prompts import Batch, PromptSet

Suffixes = list[tuple[int, ...]]
"""Token ids of one suffix that serves all prompts, or of one for each prompt."""

KEYS = 3
"""Tokens that open the lock of the positive control."""


@dataclass(frozen=True)
class Suffix:
    """Likelihood of the targets behind a suffix of real tokens that was searched on other forget prompts.

    The attacker knows the answers ``y`` to some forget prompts ``x`` and looks for tokens ``q`` that minimise ``-log
    prod p(y | x; q; y<)`` summed over them. Each step takes the gradient of that loss with respect to every position's
    one-hot token, draws ``candidates`` swaps (a random position, a random one of the ``top`` tokens whose embeddings
    promise the largest fall there), tries each, and keeps the best one that lowers the loss. It starts from random
    tokens. The result is that of the prompts that ``across`` says, and of the retain prompts behind the same suffix.

    Special tokens, and tokens of the forget prompts' targets, are never tried: a suffix may not hold the answer.

    Cost: a step takes one forward and backward, and ``candidates`` forwards, of the prompts that are searched on.

    Deviations: a swap that does not lower the loss is not made; the start is random; the suffix is not read again as
    text, so it may be tokens that no text gives. An attack on a model that pays no heed to tokens between question and
    answer finds nothing and proves nothing.

    Attributes:
        length: of the suffix (tokens).
        steps: of the search.
        candidates: swaps tried a step.
        universal: one suffix for all prompts; otherwise each has its own, searched and measured on it alone, and
            retain prompts get these in turn.
        across: what a universal suffix is measured on: "within" what it was searched on (within query), "query" other
            questions about the same groups (cross query), "target" other groups (cross target).
        top: tokens considered at each position.

    Raises:
        EditError: a setting out of range.
        PromptError: too few prompts for two halves, or prompts without room for the suffix.
    """

    length: int = 5
    steps: int = 10
    candidates: int = 32
    universal: bool = True
    across: Across = "query"
    top: int = 64

    def __post_init__(self) -> None:
        check_whole(
            "Suffix", 1, length=self.length, steps=self.steps, candidates=self.candidates, top=self.top
        )  # fmt: skip
        check_across(self.across, "Suffix")

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Search and measure; ``seed`` draws the halves, the start and the candidates."""
        check_prompts(model, forget, retain, batch_size)
        train, test = halves(forget, self.across if self.universal else "within", seed)
        for prompts in (forget, retain):
            if prompts is not None:
                _behind(prompts, [(0,) * self.length]).check_context(model)
        generator = torch.Generator().manual_seed(seed)
        allowed = self.allowed(model, forget)
        searched = [forget.select(train)] if self.universal else [forget[i : i + 1] for i in train]
        with frozen(model):
            paths = [self._search(model, part, allowed, batch_size, generator) for part in searched]
        asked = forget.select(test)

        def both(suffixes: Suffixes) -> tuple[Values, Values | None]:
            under = (
                None if retain is None else measure(model, _behind(retain, suffixes), batch_size)
            )
            return measure(model, _behind(asked, suffixes), batch_size), under

        found = {step: both([path[step][1] for path in paths]) for step in marks(self.steps)}
        last = [path[self.steps] for path in paths]
        tokenizer = forget.tokenizer
        notes: dict[str, Any] = {
            "across": self.across if self.universal else "each its own",
            "searched on": len(train),
            "measured on": len(test),
            "search loss": sum(loss for loss, _ in last),
            "suffix": [tokenizer.decode(list(ids)) for _, ids in last],
            "suffix tokens": [list(ids) for _, ids in last],
        }
        return Attacked(
            of_items(found[self.steps][0], test),
            of_items(measure(model, asked, batch_size), test),
            found[self.steps][1],
            None if retain is None else measure(model, retain, batch_size),
            curve=tuple(
                Point(step, each.estimate or 0.0, None if under is None else under.estimate)
                for step, (each, under) in found.items()
            ),
            strength="steps",
            notes=notes,
        )

    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """A positive control: a lock that opens to a few tokens, and only where they take most of the suffix.

        Random tokens do not open it, and a search with random slopes hardly ever (1 in 100 on the organism): it begins
        to open at 0.6 of the way from what luck finds to keys in every place, and is open at 0.8.
        """
        check_prompts(model, forget, None, batch_size)
        turns = self._keys(model, forget, seed)
        keys = {token for turn in turns for token in turn}
        return locked(
            model, forget, [_behind(forget, turns)], keys, opens_at=self.length, span=(0.6, 0.8),
            chance=self.length, batch_size=batch_size, seed=seed, recall=True,
        )  # fmt: skip

    def _keys(self, model: nn.Module, forget: PromptSet, seed: int) -> Suffixes:
        """Suffixes of the keys in turn; together they have every key in every place."""
        fed = fed_tokens(forget)
        free = torch.tensor([t for t in self.allowed(model, forget).tolist() if t not in fed])
        if not len(free):
            raise EditError("no positive control: the forget prompts use every token there is")
        # Of the longer half: embeddings that training hardly touched are short and all alike.
        lengths = model.get_input_embeddings().weight.detach()[free].float().norm(dim=1)  # type: ignore[operator]
        long = free[(lengths >= lengths.median()).cpu()]
        draw = torch.randperm(len(long), generator=torch.Generator().manual_seed(seed + 1))
        keys = long[draw[:KEYS]].tolist()
        return [
            tuple(keys[(turn + place) % len(keys)] for place in range(self.length))
            for turn in range(len(keys))
        ]

    def allowed(self, model: nn.Module, forget: PromptSet) -> Tensor:
        """Ids of the tokens that a suffix may have, `token`, ascending.

        Raises:
            PromptError: none is left.
        """
        rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        barred = target_tokens(forget) | set(forget.tokenizer.all_special_ids)
        ids = [i for i in range(min(rows, len(forget.tokenizer))) if i not in barred]
        if not ids:
            raise PromptError(
                f"{forget!r}: its targets use every token there is, none is left for a suffix"
            )
        return torch.tensor(ids)

    def _search(
        self,
        model: nn.Module,
        prompts: PromptSet,
        allowed: Tensor,
        batch_size: int,
        generator: torch.Generator,
    ) -> list[tuple[float, tuple[int, ...]]]:
        """Loss and suffix at each step, the start included."""
        picks = torch.randint(len(allowed), (self.length,), generator=generator)
        suffix = tuple(allowed[picks].tolist())

        def tried(suffixes: Suffixes) -> list[tuple[float, tuple[int, ...]]]:
            losses = suffix_losses(model, prompts, suffixes, batch_size)
            return list(zip(losses, suffixes, strict=True))

        path = tried([suffix])
        for _ in range(self.steps):
            slope = token_slopes(model, prompts, suffix, batch_size)[:, allowed]
            best = (-slope).topk(min(self.top, len(allowed)), dim=1).indices  # `position rank`
            swaps = self._swaps(suffix, allowed[best], generator)
            path.append(min([path[-1], *tried(swaps)], key=lambda each: each[0]))
            suffix = path[-1][1]
        return path

    def _swaps(
        self, suffix: tuple[int, ...], promising: Tensor, generator: torch.Generator
    ) -> Suffixes:
        """Suffixes with one token exchanged for one that is ``promising`` in its place, `position rank`."""
        n_places, n_ranks = promising.shape
        order = torch.randperm(n_places * n_ranks, generator=generator).tolist()
        swaps: Suffixes = []
        for drawn in order:
            at, rank = divmod(drawn, n_ranks)
            token = int(promising[at, rank])
            if token != suffix[at]:
                swaps.append((*suffix[:at], token, *suffix[at + 1 :]))
            if len(swaps) == self.candidates:
                break
        return swaps


def suffix_losses(
    model: nn.Module, prompts: PromptSet, suffixes: Suffixes, batch_size: int = 16
) -> list[float]:
    """``-log prod p(y | x; q; y<)`` summed over the prompts for each suffix, in nats."""
    # All together: rows of one length share a batch, and the last batch of a suffix is not a small one.
    every = [item for _ in suffixes for item in range(len(prompts))]
    behind = prompts.select(every).followed([q for q in suffixes for _ in range(len(prompts))])
    total = torch.zeros(len(suffixes), dtype=torch.float64)
    with torch.no_grad():
        for batch, losses in _losses(model, behind, batch_size):
            of = torch.tensor(batch.items)[batch.item.cpu()] // len(prompts)
            total.index_add_(0, of, losses.double().cpu())
    return total.tolist()


def token_slopes(
    model: nn.Module, prompts: PromptSet, suffix: tuple[int, ...], batch_size: int = 16
) -> Tensor:
    """Gradient of `suffix_losses` with respect to the one-hot token at each position, `position token` (CPU)."""
    model_map = describe(model)
    table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    rows = table[list(suffix)].float()
    # Extra inputs with the same embeddings: their gradients are sums over prompts, position by position.
    placed = install(model_map, [Added(ExtraTokens(len(suffix)), {"rows": rows})])
    try:
        rows = placed.values[0]["rows"].requires_grad_()
        placed.values[0]["rows"] = rows
        total = torch.zeros_like(rows)
        with torch.enable_grad():
            behind = _behind(prompts, [tuple(placed.ids)])
            for _, losses in _losses(model, behind, batch_size):
                total += torch.autograd.grad(losses.sum(), rows)[0]
    finally:
        placed.remove()
    slopes: Tensor = (total @ table.float().T).cpu()
    return slopes


def _losses(
    model: nn.Module, prompts: PromptSet, batch_size: int
) -> Iterator[tuple[Batch, Tensor]]:
    """Weighted negative log-probability of each scored token, `label`, a batch at a time."""
    device = next(model.parameters()).device
    for batch in prompts.batches(batch_size):
        there = batch.to(device)
        log_prob = token_log_probs(labelled_logits(model, there), there.label)
        yield batch, -log_prob * there.weight


def _behind(prompts: PromptSet, suffixes: Suffixes) -> PromptSet:
    """The prompts with a suffix each, in turn, before their targets."""
    return prompts.followed([suffixes[i % len(suffixes)] for i in range(len(prompts))])
