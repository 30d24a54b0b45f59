"""Loss terms that several methods share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from locate_edit.engine import Run, Scored, Step
from locate_edit.errors import EditError
from locate_edit.losses import kl_divergence
from locate_edit.prompts import PromptSet


def check_retain_term(kind: str) -> None:
    """Refuse an unknown kind of retain term.

    Raises:
        EditError: ``kind`` is neither "ce" nor "kl".
    """
    if kind not in ("ce", "kl"):
        raise EditError(
            f"retain must be 'ce' (cross-entropy) or 'kl' (to the base model), got {kind!r}"
        )


def retain_term(run: Run, step: Step, kind: str) -> Tensor:
    """The retain batch's cross-entropy ("ce") or KL(base || model) ("kl"), mean over labelled tokens, in nats."""
    if step.retain is None or run.retain is None:
        raise EditError("a retain term needs retain prompts: pass edit(..., retain=PromptSet(...))")
    if kind == "ce":
        return run.score(step.retain).cross_entropy()
    reference = run.reference_logits(run.retain, step.retain)  # before the graph below is built
    scored = run.score(step.retain)
    return scored.mean(kl_divergence(reference, scored.logits))


def check_positive(**values: float) -> None:
    """Refuse hyperparameters that are not positive numbers.

    Raises:
        EditError: one of them is zero, negative or not a number.
    """
    for name, value in values.items():
        if not value > 0:
            raise EditError(f"{name} must be positive, got {value}")


def up_to_level(run: Run, step: Step, scored: Scored, cost: Tensor) -> Tensor:
    """Mean over forget prompts of ``cost`` `item`, each only as far as its never-seen level.

    A prompt below its level contributes ``cost``, one beyond it its own negative log-likelihood, both times its
    distance from the level (1 far away, 0 at the level; always ``cost`` without a level). Turning ``cost`` round
    instead would not do: where its gradient fades as the prompt is forgotten, nothing would pull back.
    """
    nll = scored.nll()
    push = run.towards_level(step.forget, nll)
    return (push.clamp_min(0.0) * cost + (-push).clamp_min(0.0) * nll).mean()


def with_targets(
    run: Run, prompts: PromptSet, targets: Sequence[Sequence[str]], what: str
) -> PromptSet:
    """The rows of ``prompts`` with other targets, as one set: those of row 0 first, then those of row 1.

    Args:
        run: the run whose model is to read them.
        prompts: the set whose prompts are kept; token weights are not, since other tokens are scored.
        targets: texts for each row.
        what: what to call the new set, after the name of the old one.

    Raises:
        PromptError: a row becomes longer than the tokenizer or the model allows, or a target has no tokens.
    """
    rows = [
        {**row, "target": text, "spans": None}
        for row, texts in zip(prompts.rows, targets, strict=True)
        for text in texts
    ]
    made = prompts.reread(rows, f"{prompts.name} {what}".strip())
    made.check_context(run.model)
    return made


def other_answers(run: Run) -> PromptSet:
    """The forget prompts with another answer each: the row's ``alternative`` text, else its first ``wrong`` one.

    Raises:
        EditError: a row that has neither, or no target that it would stand in for.
    """
    found = []
    for index, row in enumerate(run.forget.rows):
        other = row.get("alternative") or next(iter(row.get("wrong", ())), None)
        if not isinstance(other, str) or row.get("target") is None:
            raise EditError(
                f"{run.forget!r}, item {index}: expected a 'target' and another answer to put in its place, "
                f"'alternative' (a text) or 'wrong' (a list of texts), but the row has {sorted(row)}. Write one into "
                "every row; locate_edit.replacements makes texts of the same form as a private one"
            )
        found.append([other])
    return with_targets(run, run.forget, found, "with other answers")


class LastSeen:
    """A number of each forget prompt as it was last scored; its mean is a quantity for `StopWhen`, at no cost."""

    def __init__(self, run: Run, at_first: float) -> None:
        self.values = torch.full((len(run.forget),), at_first, device=run.device)

    def update(self, step: Step, values: Tensor) -> None:
        """Keep ``values`` `item` of the step's forget prompts."""
        self.values[list(step.forget.items)] = values.detach().to(self.values.dtype)

    def mean(self, _model: nn.Module) -> float:
        """The mean over all forget prompts."""
        return float(self.values.mean())
