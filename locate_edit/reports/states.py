"""The states of a model that every report sets side by side, and how to get at each of them.

*before* the edit, *after* it, the same method on a *random* mask of equal size and kind, and the *oracle* that never
learned what was to be forgotten. An edit holds the first two in one model, which is switched between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from circuits.forward import output_projection
from locate_edit.editing import Edit
from locate_edit.errors import EditError
from locate_edit.reports.controls import Control, made, opened, wanted

__all__ = ["COLUMNS", "TITLES", "Opened", "called", "check_oracle", "states"]

COLUMNS = ("before", "after", "random", "oracle")
"""Every state a model is measured in, in the order of the tables."""

TITLES: Mapping[str, str] = {
    "before": "before",
    "after": "after",
    "random": "random mask",
    "oracle": "oracle",
}
"""What the columns are called in tables and figures."""

Opened: TypeAlias = Callable[[], AbstractContextManager[nn.Module]]
"""Gives the model in one state while a context is open."""


def states(
    target: Edit | nn.Module,
    *,
    original: nn.Module | None = None,
    oracle: nn.Module | None = None,
    random: bool | int | Sequence[Control] | None = 0,
    seed: int = 0,
) -> dict[str, list[Opened]]:
    """How to open each state, by its name in the order of `COLUMNS`; several for the random control.

    Edits on random masks are made here, once.

    Args:
        target: an applied edit, or the edited model.
        original: the model before the edit, where ``target`` is no edit.
        oracle: a model trained without what was to be forgotten.
        random: the random control, see `locate_edit.reports.controls.wanted`.
        seed: of the random masks.

    Raises:
        EditError: the edit is not applied, an original beside an edit, random masks of something that is no edit, or a
            model in two roles.
    """
    found: dict[str, list[Opened]] = {}
    if isinstance(target, Edit):
        model = target.model
        if model is None:
            raise EditError("the edit is not applied to a model; call .apply(model) first")
        if original is not None:
            raise EditError(
                "an edit brings its original model along: leave original= out, or give the edited model instead"
            )
        found["before"], found["after"] = [target.off], [partial(_as_it_is, model)]
        if controls := made(target, wanted(target, random, seed)[0]):
            found["random"] = [partial(opened, target, control) for control in controls]
    else:
        model = target
        if original is target:
            raise EditError("original= is the edited model itself: load the original apart")
        if original is not None:
            found["before"] = [partial(_as_it_is, original)]
        found["after"] = [partial(_as_it_is, model)]
        models = (
            [each for each in random if isinstance(each, nn.Module)]
            if isinstance(random, Sequence)
            else []
        )
        if random and not models:
            raise EditError("random masks need the edit itself: pass it in place of the model")
        if models:
            found["random"] = [partial(_as_it_is, each) for each in models]
    if oracle is not None:
        check_oracle(oracle, model, original)
        found["oracle"] = [partial(_as_it_is, oracle)]
    return found


def check_oracle(oracle: nn.Module, *others: nn.Module | None) -> None:
    """Refuse an oracle that is one of the other models, or reads other tokens than they do.

    Raises:
        EditError: it does.
    """
    for other in others:
        if oracle is other:
            raise EditError("the oracle is one of the other models: load it apart, or leave it out")
        if other is None:
            continue
        mine, theirs = (_vocabulary(each) for each in (oracle, other))
        if mine != theirs:
            raise EditError(
                f"the oracle has another vocabulary: expected {theirs} tokens as in {type(other).__name__}, got "
                f"{mine}. Give a model that reads the same tokens, or leave it out"
            )


def called(model: nn.Module) -> str:
    """What to call a model: a hub name as it is, of a local folder only its own name, since a report travels; or the
    class, without either.
    """
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _vocabulary(model: nn.Module) -> int:
    """Number of tokens that the model gives logits of."""
    weight: Tensor = output_projection(model).weight  # type: ignore[assignment]
    return weight.shape[0]


def _as_it_is(model: nn.Module) -> AbstractContextManager[nn.Module]:
    return nullcontext(model)
