"""The switch `compat=`: a metric as another toolkit defines it."""

from __future__ import annotations

from collections.abc import Sequence

from locate_edit.errors import PromptError

__all__ = ["check_compat"]


def check_compat(metric: str, compat: str | None, known: Sequence[str]) -> None:
    """Refuse a toolkit that does not have the metric.

    Args:
        metric: the metric's name, for the message.
        compat: what was asked for; None is the definition of this library.
        known: the toolkits whose definition the metric can follow.

    Raises:
        PromptError: ``compat`` is not among them.
    """
    if compat is not None and compat not in known:
        raise PromptError(
            f"{metric}: expected compat to be {' or '.join(map(repr, known))}, got {compat!r}. What gives the numbers "
            "of other toolkits is in docs/metrics.md, 'As published elsewhere'."
        )
