"""Loss terms that several methods share."""

from __future__ import annotations

from torch import Tensor

from locate_edit.engine import Run, Step
from locate_edit.errors import EditError
from locate_edit.losses import kl_divergence


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
