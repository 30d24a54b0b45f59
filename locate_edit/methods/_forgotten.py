"""The rule that ends unlearning where text is as little memorised as text the model never saw.

Paper: Jang et al. 2023, Knowledge Unlearning for Mitigating Privacy Risks in Language Models (arXiv:2210.01504),
section 3.2: a sequence is forgotten when its memorisation accuracy and its extraction likelihood are at most their
means over unseen sequences.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from locate_edit.engine import Run, StopWhen
from locate_edit.errors import EditError


def check_rule(rule: str, thresholds: tuple[float, float] | None) -> None:
    """Refuse an unknown rule, or "forgotten" without thresholds.

    Raises:
        EditError: one of them.
    """
    if rule not in ("level", "forgotten"):
        raise EditError(f"rule must be 'level' or 'forgotten', got {rule!r}")
    if rule == "forgotten" and thresholds is None:
        raise EditError(
            "rule='forgotten' needs thresholds=(MA, EL_n), measured on text the model never saw "
            "(locate_edit.metrics.memorization)"
        )


def until_forgotten(
    run: Run, thresholds: tuple[float, float] | None, n: int, every: int
) -> StopWhen:
    """The rule for the prompts that ``run`` is on when it is asked: stop when both means are at most ``thresholds``."""
    return StopWhen(_excess(run, thresholds or (0.0, 0.0), n), below=1e-12, every=every)


def _excess(run: Run, most: tuple[float, float], n: int) -> Callable[[nn.Module], float]:
    """How far a mean is above its threshold (0 when both are met); EL_n is looked at once MA is met, it costs more."""
    from locate_edit.metrics.memorization import exact_memorization, extraction_likelihood
    from locate_edit.metrics.predictions import Predictions

    def above_unseen_text(model: nn.Module) -> float:
        seen = Predictions(model, run.forget, batch_size=run.settings.batch_size)
        for metric, bound in zip(
            (exact_memorization, lambda found: extraction_likelihood(found, n=n)), most, strict=True
        ):
            values = metric(seen)
            if values.estimate is None:
                raise EditError(
                    f"rule='forgotten' cannot be used on these prompts: {values.name} {values.withheld}; "
                    "use longer targets, a smaller n, or rule='level'"
                )
            if values.estimate > bound:
                return values.estimate - bound
        return 0.0

    return above_unseen_text
