"""Hyperparameters that attacks refuse, each with what was expected and what was given."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from locate_edit.errors import EditError


def is_whole(value: Any, least: int) -> bool:
    """Whether it is an integer of at least so much."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def is_finite(value: Any) -> bool:
    """Whether it is a finite number."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def check_whole(attack: str, least: int, **given: Any) -> None:
    """Refuse what is no integer of at least so much.

    Raises:
        EditError: one of them is not.
    """
    for name, value in given.items():
        if not is_whole(value, least):
            raise EditError(
                f"{attack}: {name} must be a whole number of at least {least}, got {value!r}"
            )


def check_positive(attack: str, **given: Any) -> None:
    """Refuse what is no finite number above 0.

    Raises:
        EditError: one of them is not.
    """
    for name, value in given.items():
        if not is_finite(value) or value <= 0:
            raise EditError(f"{attack}: {name} must be a finite number above 0, got {value!r}")
