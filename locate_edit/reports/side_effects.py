"""What an edit changed that it was not asked to: the prompts outside the forget set whose likelihood changed most."""

from __future__ import annotations

from collections.abc import Mapping

from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet
from locate_edit.reports.report import SideEffect
from locate_edit.reports.states import COLUMNS

__all__ = ["LEAST", "shown_text", "side_effects"]

# Longer targets are cut: they are there to be looked at.
SHOWN_TOKENS = 40
LEAST = 0.01
"""Changes of likelihood below this are not listed (probability)."""


def side_effects(
    likelihoods: Mapping[str, Mapping[str, Values]],
    sets: Mapping[str, PromptSet],
    *,
    forget: str = "forget",
    top: int = 10,
    least: float = LEAST,
) -> tuple[SideEffect, ...]:
    """The ``top`` prompts outside the forget set whose likelihood changed most from before to after, largest first.

    Rises count like falls: an edit was to do neither.

    A prompt that the forget set asks too is no side effect: one of the same words, or of the same `group` and `target`
    in other words. Rows without a group count, since only whoever made the sets can tell. Ties keep the order of the
    sets.

    Args:
        likelihoods: by state ("before", "after", "random", "oracle") and set, the likelihood of every item.
        sets: the prompt sets by name.
        forget: name of the set that the edit was to change.
        top: how many at most.
        least: how far a likelihood must have moved, up or down (probability).
    """
    if not {"before", "after"} <= likelihoods.keys():
        return ()
    gone = sets.get(forget)
    asked = set().union(*(_asks(gone, item) for item in range(len(gone)))) if gone else set()
    found: list[SideEffect] = []
    for name, prompts in sets.items():
        if name == forget:
            continue
        by_item = {
            column: dict(zip(values.items.tolist(), values.values.tolist(), strict=True))
            for column, of_set in likelihoods.items()
            if (values := of_set.get(name)) is not None
        }
        for item, before in by_item.get("before", {}).items():
            after = by_item.get("after", {}).get(item)
            if after is None or abs(after - before) < least or _asks(prompts, item) & asked:
                continue
            numbers = {c: by_item[c][item] for c in COLUMNS if item in by_item.get(c, {})}
            # The words of most of them are never shown, so they are looked up afterwards.
            found.append(SideEffect(name, item, "", "", numbers))
    found.sort(key=lambda effect: -abs(effect.change))
    return tuple(
        SideEffect(e.prompts, e.item, *shown_text(sets[e.prompts], e.item), e.likelihood)
        for e in found[:top]
    )


def shown_text(prompts: PromptSet, item: int) -> tuple[str, str]:
    """Prompt and target of an item as text, the target cut where it is long."""
    decode = prompts.tokenizer.decode
    before = decode(prompts.prompt_ids(item), skip_special_tokens=True)
    return str(before), str(decode(prompts.target_ids(item)[:SHOWN_TOKENS]))


def _asks(prompts: PromptSet, item: int) -> set[tuple[object, ...]]:
    """What tells whether two items ask the same: all their tokens, or a group and its answer."""
    row = prompts[item]
    found: set[tuple[object, ...]] = {tuple(prompts.ids(item))}
    if row.get("group") and row.get("target"):
        found.add((row["group"], row["target"]))
    return found
