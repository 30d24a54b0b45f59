"""Pairs of prompts that differ in one thing: what patching, path patching and gradient attribution compare.

A corrupted set is parallel to its clean set: item by item as many tokens, the same tokens scored at the same positions.
What differs is what the answer depends on, so restoring (or breaking) a component at a position means the same thing in
both runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from circuits.measures import LogitDifference
from locate_edit.errors import PromptError
from locate_edit.prompts import PromptSet

Corruption = Literal["auto", "written", "swap", "random"]
"""Where corrupted prompts come from: the rows' ``corrupt`` field; another row's subject; random tokens as subject;
or "auto", the first of these that the rows allow."""


def corrupted(prompts: PromptSet, how: Corruption = "auto", *, seed: int = 0) -> PromptSet:
    """A set parallel to ``prompts`` whose prompts do not lead to the targets.

    Args:
        prompts: the clean set.
        how: where the corrupted prompts come from. "auto" takes the rows' own where every row has one, else another
            row's subject where every row has one that fits, else random tokens for the subject.
        seed: which subject or tokens, where there is a choice.

    Raises:
        PromptError: rows without what is needed, or whose corrupted prompt has another number of tokens.
    """
    if how not in get_args(Corruption):
        raise PromptError(f"how must be one of {', '.join(get_args(Corruption))}, got {how!r}")
    if how == "auto":
        return _first_possible(prompts, seed)
    if how == "written":
        return written(prompts)
    if how == "swap":
        return swapped_subjects(prompts, seed=seed)
    return random_subjects(prompts, seed=seed)


def _first_possible(prompts: PromptSet, seed: int) -> PromptSet:
    if all(row.get("corrupt") for row in prompts.rows):
        return written(prompts)
    if not all(row.get("subject") for row in prompts.rows):
        raise PromptError(
            f"{prompts!r} has no contrast pairs: expected rows with 'corrupt' (a prompt of as many tokens that does "
            "not lead to the target) or with 'subject' (which is then replaced). Add one of the two fields"
        )
    try:
        return swapped_subjects(prompts, seed=seed)
    except PromptError:
        return random_subjects(prompts, seed=seed)


def written(prompts: PromptSet) -> PromptSet:
    """The corrupted prompts that the rows bring along in ``corrupt``.

    Raises:
        PromptError: a row without one, or one with another number of tokens, or whose target is tokenised otherwise.
    """
    rows = []
    for index, row in enumerate(prompts.rows):
        if not row.get("corrupt"):
            raise PromptError(
                f"{prompts!r}, item {index}: expected a contrast pair, but the row has no 'corrupt' prompt"
            )
        rows.append({**row, "prompt": row["corrupt"], "spans": None, "subject": None})
    found = prompts.reread(rows, _named(prompts))
    for index in range(len(prompts)):
        clean, other = prompts.ids(index), found.ids(index)
        if len(clean) != len(other) or prompts.scored(index) != found.scored(index):
            raise PromptError(
                f"{prompts!r}, item {index}: the prompt {prompts[index]['prompt']!r} and its 'corrupt' "
                f"{prompts[index]['corrupt']!r} do not line up: {len(clean)} and {len(other)} tokens, scored at "
                f"{prompts.scored(index)} and {found.scored(index)}. Write one with as many tokens"
            )
        if prompts.target_ids(index) != found.target_ids(index):
            raise PromptError(
                f"{prompts!r}, item {index}: the target is tokenised otherwise after 'corrupt' "
                f"{prompts[index]['corrupt']!r}. Let both prompts end alike"
            )
    # Weights of the tokens are part of the question, so they stay.
    return prompts.with_ids([found.ids(i) for i in range(len(prompts))], _named(prompts))


def swapped_subjects(prompts: PromptSet, *, seed: int = 0) -> PromptSet:
    """Each subject replaced by that of another row, which has as many tokens and another target.

    Raises:
        PromptError: a row without a subject, or without a partner; the message lists the subjects' lengths.
    """
    places = [prompts.subject(index) for index in range(len(prompts))]
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for index, place in enumerate(places):
        own = _at(prompts.ids(index), place)
        partners = [
            other
            for other, there in enumerate(places)
            if len(there) == len(place)
            and prompts[other].get("target") != prompts[index].get("target")
            and _at(prompts.ids(other), there) != own
        ]
        if not partners:
            lengths = sorted({len(p) for p in places})
            raise PromptError(
                f"{prompts!r}, item {index}: no other row has a subject of {len(place)} tokens, like "
                f"{prompts[index]['subject']!r}, and another target (subjects here have {lengths} tokens). "
                "Add such rows, write 'corrupt' prompts, or use random subjects"
            )
        chosen = partners[int(torch.randint(len(partners), (1,), generator=generator))]
        ids.append(_with(prompts.ids(index), place, _at(prompts.ids(chosen), places[chosen])))
    return prompts.with_ids(ids, _named(prompts))


def random_subjects(prompts: PromptSet, *, seed: int = 0) -> PromptSet:
    """Each subject replaced by as many random tokens: no special ones, and none of its own.

    Raises:
        PromptError: a row without a subject.
    """
    special = set(prompts.tokenizer.all_special_ids)
    vocabulary = sorted(set(prompts.tokenizer.get_vocab().values()) - special)
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for index in range(len(prompts)):
        place = prompts.subject(index)
        own = set(_at(prompts.ids(index), place))
        others = [token for token in vocabulary if token not in own]
        drawn = torch.randint(len(others), (len(place),), generator=generator)
        ids.append(_with(prompts.ids(index), place, [others[i] for i in drawn.tolist()]))
    return prompts.with_ids(ids, _named(prompts))


def logit_difference(
    prompts: PromptSet, *, at: Literal["first", "first_difference"] = "first"
) -> LogitDifference:
    """The logit of each target's token minus that of the row's first ``wrong`` answer.

    Args:
        prompts: rows with ``wrong`` answers.
        at: compare the answers' "first" tokens, or those at the "first_difference" of the two answers; the tokens
            before it are the same in both, so the model has then seen them.

    Raises:
        PromptError: a row without a wrong answer, or answers that share the token to compare.
    """
    if at not in ("first", "first_difference"):
        raise PromptError(f"at must be 'first' or 'first_difference', got {at!r}")
    rows = []
    for index, row in enumerate(prompts.rows):
        if not row.get("wrong") or row.get("target") is None:
            raise PromptError(
                f"{prompts!r}, item {index}: a logit difference needs a 'target' and a 'wrong' answer, the row has "
                f"{sorted(row)}. Write the answer to compare with into the row: 'wrong': [\" ...\"]"
            )
        rows.append({**row, "target": row["wrong"][0], "spans": None})
    wrong = prompts.reread(rows)
    pairs = [(prompts.target_ids(i), wrong.target_ids(i)) for i in range(len(prompts))]
    offsets = [_difference(right, other) if at != "first" else 0 for right, other in pairs]
    for index, ((right, other), offset) in enumerate(zip(pairs, offsets, strict=True)):
        if offset >= min(len(right), len(other)) or right[offset] == other[offset]:
            row = prompts[index]
            shared = "their first token" if at == "first" else "all tokens of the shorter one"
            raise PromptError(
                f"{prompts!r}, item {index}: the answers {row['target']!r} and {row['wrong'][0]!r} share {shared}, "
                "so no logit tells them apart there. "
                + ("Use at='first_difference'" if at == "first" else "Give another wrong answer")
            )
    chosen = [(right[k], other[k]) for (right, other), k in zip(pairs, offsets, strict=True)]
    return LogitDifference(
        tuple(right for right, _ in chosen), tuple(other for _, other in chosen), tuple(offsets)
    )


def _difference(one: Sequence[int], two: Sequence[int]) -> int:
    """How many leading tokens two answers share."""
    shared = 0
    while shared < min(len(one), len(two)) and one[shared] == two[shared]:
        shared += 1
    return shared


def _at(ids: Sequence[int], place: Sequence[int]) -> list[int]:
    return [ids[position] for position in place]


def _with(ids: Sequence[int], place: Sequence[int], new: Sequence[int]) -> list[int]:
    changed = list(ids)
    for position, token in zip(place, new, strict=True):
        changed[position] = token
    return changed


def _named(prompts: PromptSet) -> str:
    return f"{prompts.name} corrupted".strip()
