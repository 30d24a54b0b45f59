"""The random control of an edit: the same method, with the same data, on as many units drawn at random.

What an edit does by its size alone shows there. Making it takes as long as the edit itself, so an edit made once can be
handed to everything that measures it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import nn

from circuits import ComponentMask, describe
from circuits.errors import UnknownFamily
from locate_edit.editing import Edit
from locate_edit.errors import EditError

__all__ = ["Control", "Editable", "made", "opened", "wanted"]


@runtime_checkable
class Editable(Protocol):
    """What is asked of an edit that is measured; `locate_edit.Edit` has it.

    Attributes:
        model: the edited model, or None while the edit is not applied.
        mask: the component mask of the edit, or None.
        forget: the prompts it was made to forget, or None.
        retain: the prompts it was made to keep, or None.
        provenance: how it was made.
    """

    model: Any
    mask: Any
    forget: Any
    retain: Any
    provenance: Any

    def off(self) -> AbstractContextManager[Any]:
        """The base model while the context is open; the edited one afterwards."""

    def rerun(self, mask: Any) -> AbstractContextManager[Any]:
        """An edit like this one on another mask, applied to the base model while the context is open."""


Control: TypeAlias = ComponentMask | nn.Module | Edit
"""A mask on which the edit is made again, an edit of the same base made elsewhere, or an edited model."""


def wanted(
    target: Editable, random: bool | int | Sequence[Control] | None, seed: int
) -> tuple[list[Control], str]:
    """The controls that ``random`` asks for, and why there are none where they were not declined.

    Args:
        target: the edit.
        random: True or a number of random masks of the edit's size and kind; controls; False or 0 for none. None takes
            one random mask where the edit can be made again. They are drawn in the edit's own sites, or, where it holds
            more than half of these, in all of its kinds.
        seed: of the first mask; each further one has the next seed.

    Raises:
        EditError: they were asked for and cannot be had.
    """
    if random is False or (isinstance(random, int) and random == 0 and random is not True):
        return [], ""
    if isinstance(random, Sequence):
        return list(random), ""
    if isinstance(random, int) and random < 0:
        raise EditError(f"random is a number of masks of at least 0, got {random}")
    reason = ""
    if target.mask is None:
        reason = "the edit has no mask, so there is nothing to draw at random"
    elif getattr(target, "method", target) is None:
        reason = (
            "the edit was loaded from a folder and does not have its prompts: give it these with recall(forget=..., "
            "retain=...), or pass random=[...] with edits or models made on random masks"
        )
    place, within = _place(target)
    if not reason and isinstance(place, ComponentMask) and place.count() == place.total():
        reason = "the mask holds every unit of its kind, so there are no others to draw at random"
    if reason and random is not None:
        raise EditError(f"a random control was asked for, but {reason}.")
    if reason:
        return [], reason
    n_masks = 1 if random is None or random is True else random
    # Offset: the seed itself may have drawn the mask that is being controlled.
    return [place.random_like(seed=seed + 1 + k, **within) for k in range(n_masks)], ""


def _place(target: Editable) -> tuple[Any, dict[str, Any]]:
    """The mask to draw others like, and how.

    They are drawn in the same sites, which keeps all else equal, such as the layer. Where the mask holds more than half
    of these (a whole layer, say), most of what is drawn would be the same units: then from all sites of their kinds.
    """
    mask = target.mask
    if not isinstance(mask, ComponentMask) or 2 * mask.count() <= mask.total():
        return mask, {}
    try:
        model_map = describe(target.model)
    except UnknownFamily:
        return mask, {}
    kinds = sorted({site.kind for site in mask.sites})
    every = ComponentMask.empty(model_map, kinds)
    return ComponentMask({**every.on, **mask.on}, mask.provenance), {"within": "kind"}


def made(target: Editable, controls: Sequence[Control]) -> list[Control]:
    """The controls with masks replaced by the edit on them, made once and not applied."""
    found: list[Control] = []
    for control in controls:
        if isinstance(control, nn.Module | Edit):
            found.append(control)
        else:
            with target.rerun(control) as other:
                found.append(other)
    return found


@contextmanager
def opened(target: Editable, control: Control) -> Iterator[nn.Module]:
    """The model of a control while the context is open; the edited model is as before afterwards."""
    if isinstance(control, nn.Module):
        yield control
    elif isinstance(control, Edit):
        with target.off() as base, control.applied(base) as model:
            yield model
    else:
        with target.rerun(control) as other:
            yield other.model
