"""Which prompts an attack is trained on, and which it is measured on."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from typing import Literal

import numpy as np

from locate_edit.errors import EditError, PromptError
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet

Across = Literal["within", "query", "target"]
"""What an attack must generalise to: nothing, other questions about the same groups, or other groups."""


def check_across(across: Across, attack: str) -> None:
    """Refuse anything but an `Across`.

    Raises:
        EditError: something else.
    """
    if across not in ("within", "query", "target"):
        raise EditError(f"{attack}: across must be 'within', 'query' or 'target', got {across!r}")


def halves(prompts: PromptSet, across: Across, seed: int) -> tuple[list[int], list[int]]:
    """Items to train on and items to measure on, each in ascending order.

    Args:
        prompts: the prompts; their rows' `group` says what belongs together.
        across: "within" takes all of them for both; "query" splits every group in two, so that other questions about
            the same groups are measured (without groups, the whole set); "target" takes half of the groups (without
            groups, of the rows).
        seed: of the draw.

    Raises:
        PromptError: too few prompts or groups for two parts.
    """
    everything = list(range(len(prompts)))
    if across == "within":
        return everything, everything
    draw = random.Random(seed)
    groups: dict[str, list[int]] = defaultdict(list)
    for item, row in enumerate(prompts.rows):
        own = f"row {item}" if across == "target" else "all"
        groups[f"group {row['group']}" if row.get("group") is not None else own].append(item)
    names = list(groups)
    draw.shuffle(names)
    train: list[int] = []
    if across == "target":
        for name in names[: len(names) // 2]:
            train += groups[name]
    else:
        # Groups in a random order are dealt as one hand, so that odd sizes even out.
        dealt = [item for name in names for item in draw.sample(groups[name], len(groups[name]))]
        train = dealt[::2]
    test = [item for item in everything if item not in set(train)]
    if not train or not test:
        what = "two groups" if across == "target" else "two prompts"
        raise PromptError(
            f"{prompts!r}: across={across!r} trains an attack on one part and measures it on the other, which needs "
            f"{what} at least; across='within' measures what it was trained on"
        )
    return sorted(train), sorted(test)


def of_items(values: Values, items: list[int]) -> Values:
    """Values of a part of a set, numbered as in the whole set."""
    return replace(values, items=np.array(items, dtype=np.int64)[values.items])


def marks(steps: int, most: int = 5) -> list[int]:
    """Steps at which a curve is measured: 0, ``steps`` and up to ``most`` in all, evenly spread."""
    points = np.linspace(0, steps, min(most, steps + 1)).round().astype(int)
    return sorted({int(point) for point in points})
