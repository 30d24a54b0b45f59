"""Train a prefix of embeddings on some forget prompts, and put it before the others.

Paper: Schwinn et al. 2024, Soft Prompt Threats: Attacking Safety Alignment and Unlearning in Open-Source LLMs through
the Embedding Space (arXiv:2402.09063): the universal attack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from circuits import describe
from circuits.forward import labelled_logits, token_log_probs
from circuits.still import frozen
from locate_edit.additions import ExtraTokens, Placed, install, made
from locate_edit.attacked import Attacked, Point, check_prompts, measure
from locate_edit.attacks._checks import check_positive, check_whole
from locate_edit.attacks._halves import Across, check_across, halves, marks, of_items
from locate_edit.attacks._locked import fed_tokens, locked
from locate_edit.losses import per_item_mean
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet

KEYS = 20
"""Tokens in whose mean direction the prefix must lean to open the positive control."""


@dataclass(frozen=True)
class SoftPrompt:
    """Likelihood of the targets behind a trained prefix of embeddings that was trained on other forget prompts.

    The attacker knows the answers to half of the forget prompts and may put ``length`` vectors before every prompt in
    the place of token embeddings, the same for all. Adam on the mean negative log-likelihood of the known half's
    targets, from random vectors like the model's own embeddings; the restart of least training loss counts. The result
    is that of the *other* half, so ``forget`` holds no prompt that was trained on, and of the retain prompts behind
    the same prefix.

    Cost: ``restarts * steps`` forwards and backwards of half of the prompts, down to the embedding; a forward of the
    rest for each point of the curve.

    Deviations: vectors need not stay within a distance of anything.

    Attributes:
        length: of the prefix (tokens).
        steps: of Adam.
        lr: learning rate (in standard deviations of the model's embeddings).
        restarts: prefixes trained from different random vectors.
        across: "query" measures other questions about the same groups, "target" other groups, "within" what was
            trained on (see `locate_edit.attacks._halves.halves`).

    Raises:
        EditError: a setting out of range, or a model whose embedding cannot be extended.
        PromptError: too few prompts for two halves, or prompts without room for the prefix.
    """

    length: int = 5
    steps: int = 30
    lr: float = 0.3
    restarts: int = 1
    across: Across = "query"

    def __post_init__(self) -> None:
        check_whole(
            "SoftPrompt", 1, length=self.length, steps=self.steps, restarts=self.restarts
        )  # fmt: skip
        check_positive("SoftPrompt", lr=self.lr)
        check_across(self.across, "SoftPrompt")

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Train a prefix and measure behind it; ``seed`` draws the halves and the first vectors."""
        check_prompts(model, forget, retain, batch_size)
        train, test = halves(forget, self.across, seed)
        asked = forget.select(test)
        clean = measure(model, asked, batch_size)
        retain_clean = None if retain is None else measure(model, retain, batch_size)
        with self._placed(model, seed) as placed:
            behind = partial(_behind, placed)
            known, hidden = behind(forget.select(train)), behind(asked)
            kept = None if retain is None else behind(retain)
            for prompts in (known, hidden, kept):
                if prompts is not None:
                    prompts.check_context(model)
            loss, rows = self._trained(model, placed, known, batch_size, seed)
            found: list[tuple[int, Values, Values | None]] = []
            for step, value in rows.items():
                placed.values[0]["rows"] = value
                under = None if kept is None else measure(model, kept, batch_size)
                found.append((step, measure(model, hidden, batch_size), under))
        return Attacked(
            of_items(found[-1][1], test),
            of_items(clean, test),
            found[-1][2],
            retain_clean,
            curve=tuple(
                Point(step, each.estimate or 0.0, None if under is None else under.estimate)
                for step, each, under in found
            ),
            strength="steps",
            notes={
                "across": self.across,
                "trained on": len(train),
                "measured on": len(test),
                "training loss": loss,
            },
        )

    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """A positive control: a lock that opens to more of some tokens than the vocabulary has in one."""
        check_prompts(model, forget, None, batch_size)
        shut = fed_tokens(forget)
        draw = torch.randperm(
            len(forget.tokenizer), generator=torch.Generator().manual_seed(seed + 1)
        ).tolist()
        keys = [token for token in draw if token not in shut][:KEYS]
        shown = [
            [keys[(item * self.length + place) % len(keys)] for place in range(self.length)]
            for item in range(len(forget))
        ]
        return locked(
            model, forget, [forget.preceded(shown)], keys, opens_at=8.0, batch_size=batch_size, seed=seed
        )  # fmt: skip

    @contextmanager
    def _placed(self, model: nn.Module, seed: int) -> Iterator[Placed]:
        """The prefix's vectors as extra inputs of a model whose parameters hold still."""
        model_map = describe(model)
        with frozen(model):
            placed = install(model_map, [made(ExtraTokens(self.length), model_map, seed=seed)])
            try:
                yield placed
            finally:
                placed.remove()

    def _trained(
        self, model: nn.Module, placed: Placed, known: PromptSet, batch_size: int, seed: int
    ) -> tuple[float, dict[int, Tensor]]:
        """Training loss of the best restart, and its vectors `token d_embedding` at the marks of the curve."""
        best: tuple[float, dict[int, Tensor]] | None = None
        kept_at = set(marks(self.steps))
        for restart in range(self.restarts):
            start = made(ExtraTokens(self.length), describe(model), seed=seed + 1000 * restart)
            rows = start.values["rows"].to(next(model.parameters()).device).requires_grad_()
            placed.values[0]["rows"] = rows
            scale = float(model.get_input_embeddings().weight.detach().float().std())  # type: ignore[operator]
            adam = torch.optim.Adam([rows], lr=self.lr * scale)
            at: dict[int, Tensor] = {}
            for step in range(self.steps):
                if step in kept_at:
                    at[step] = rows.detach().clone()
                adam.zero_grad()
                _backward(model, known, batch_size)
                adam.step()
            at[self.steps] = rows.detach().clone()
            placed.values[0]["rows"] = at[self.steps]
            with torch.no_grad():
                loss = _loss(model, known, batch_size)
            if best is None or loss < best[0]:
                best = loss, at
        assert best is not None
        return best


def _behind(placed: Placed, prompts: PromptSet) -> PromptSet:
    return prompts.preceded([list(placed.ids)] * len(prompts))


def _nll(model: nn.Module, prompts: PromptSet, batch_size: int) -> Iterator[Tensor]:
    """Mean negative log-likelihood of the targets of each batch of prompts, `item`."""
    device = next(model.parameters()).device
    for batch in prompts.batches(batch_size):
        there = batch.to(device)
        log_prob = token_log_probs(labelled_logits(model, there), there.label)
        yield -per_item_mean(log_prob, there.item, len(there.items), there.weight)


def _backward(model: nn.Module, prompts: PromptSet, batch_size: int) -> None:
    """Gradients of the mean over prompts, a batch at a time."""
    with torch.enable_grad():
        for nll in _nll(model, prompts, batch_size):
            (nll.sum() / len(prompts)).backward()


def _loss(model: nn.Module, prompts: PromptSet, batch_size: int) -> float:
    """Mean over prompts."""
    return sum(float(nll.sum()) for nll in _nll(model, prompts, batch_size)) / len(prompts)
