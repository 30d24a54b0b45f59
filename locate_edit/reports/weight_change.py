"""How far an edit moved each weight of the model, and whether it stayed inside its mask.

Only the edit's own delta and the model's other entries are read: there is no second model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits import ModelMap, describe
from circuits.families import ROLES
from circuits.layout import unfold
from locate_edit.errors import EditError

if TYPE_CHECKING:
    from locate_edit.delta import Change
    from locate_edit.editing import Edit

__all__ = ["WeightChange", "weight_changes"]

OTHER = "other"
"""Column of a layer's biases, norms and routers, taken together; there only where one of them changed."""


@dataclass(frozen=True, eq=False)
class WeightChange:
    """Relative change of every weight: the Frobenius norm of new minus old, over that of the old weight.

    Attributes:
        layers: numbers of the layers.
        columns: roles of weights (q, k, v, o, gate, up, down), and "other" where something else of a layer changed.
        relative: `layer column` float64; exactly 0 where nothing changed, NaN where a layer has no such weight.
        outside: the same, of the entries that the mask does not select alone.
        selected: `layer column` float64, the fraction of the weight's entries that the mask selects.
        elsewhere: relative change by parameter, of changed parameters in no layer (embeddings, output head).
        entries: how many entries have another value than before.
        entries_outside: how many of them the mask does not select.
    """

    layers: tuple[int, ...]
    columns: tuple[str, ...]
    relative: Tensor
    outside: Tensor
    selected: Tensor
    elsewhere: Mapping[str, float]
    entries: int
    entries_outside: int


def weight_changes(edit: Edit, model_map: ModelMap | None = None) -> WeightChange:
    """Relative change of every weight of every layer, from the edit's delta.

    Args:
        edit: the edit, applied or not.
        model_map: the model it was made on, with or without the edit; None takes the one it is applied to.

    Raises:
        EditError: the edit is not applied and no model is given, or it does not fit the model.
        MaskError: its mask does not fit the model.
    """
    if model_map is None:
        if edit.model is None:
            raise EditError(
                "which weights are where is read off the model, and this edit is not applied to one: call "
                ".apply(model) first, or pass model_map=describe(model)"
            )
        model_map = describe(edit.model)
    parameters = dict(model_map.model.named_parameters())
    for name, change in edit.delta:
        found = tuple(parameters[name].shape) if name in parameters else None
        if found != change.selection.shape:
            raise EditError(
                f"the edit does not fit this model: it changes {name} of shape {change.selection.shape}, found "
                f"{'no such parameter' if found is None else found}; pass the model it was made on"
            )
    marks = _marks(edit, model_map)
    names = {id(parameter): name for name, parameter in parameters.items()}
    layers = range(model_map.n_layers)
    roles = [role for role in ROLES if any(model_map.has(layer, role) for layer in layers)]
    shape = (len(layers), len(roles) + 1)
    relative, outside, selected = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in "123")
    in_layers: set[str] = set()
    other_changed = False
    for layer in layers:
        of_roles = set()
        for x, role in enumerate(roles):
            if not model_map.has(layer, role):
                continue
            weight, _, parameter = model_map.find(layer, role)
            name = names[id(parameter)]
            of_roles.add(name)
            parts = [
                unfold(part, weight, model_map.sizes(layer))
                for part in _parts(parameter, edit.delta.changes.get(name), marks.get(name))
            ]
            relative[layer, x], outside[layer, x], selected[layer, x] = _summed([parts])
        rest = {names[id(p)]: p for p in model_map.layer_module(layer).parameters()}
        in_layers |= rest.keys()
        rest = {name: p for name, p in rest.items() if name not in of_roles}
        if rest:
            other_changed |= any(name in edit.delta.changes for name in rest)
            found_parts = [
                _parts(p, edit.delta.changes.get(name), marks.get(name)) for name, p in rest.items()
            ]
            relative[layer, -1], outside[layer, -1], selected[layer, -1] = _summed(found_parts)
    kept = len(roles) + (other_changed and bool((relative[:, -1] > 0).any()))
    counts = [_counts(change, marks.get(name)) for name, change in edit.delta]
    elsewhere = {
        name: _summed([_parts(parameters[name], change, marks.get(name))])[0]
        for name, change in edit.delta
        if name not in in_layers
    }
    return WeightChange(
        tuple(layers),
        (*roles, OTHER)[:kept],
        relative[:, :kept],
        outside[:, :kept],
        selected[:, :kept],
        {name: value for name, value in elsewhere.items() if value > 0},
        sum(n for n, _ in counts),
        sum(n for _, n in counts),
    )


def _marks(edit: Edit, model_map: ModelMap) -> dict[str, Tensor]:
    """What the mask selects of each parameter, as booleans of its shape; everything without a mask."""
    parameters = dict(model_map.model.named_parameters())
    if edit.mask is None:
        return {
            name: torch.ones(parameters[name].shape, dtype=torch.bool)
            for name in edit.delta.changes
        }
    options: Mapping[str, Any] = edit.provenance.get("options", {})
    side: Any = options.get("side") or getattr(edit.method, "side", "both")
    kv: Any = options.get("kv", "all")
    marks: dict[str, Tensor] = {}
    for piece, units in model_map.selected_slices(edit.mask, side, kv):
        if piece.parameter not in marks:
            shape = parameters[piece.parameter].shape
            marks[piece.parameter] = torch.zeros(shape, dtype=torch.bool)
        piece.of(marks[piece.parameter])[units.cpu()] = True
    return marks


def _parts(parameter: Tensor, change: Change | None, mark: Tensor | None) -> list[Tensor]:
    """Old values (where nothing changed as they lie in the model), difference and mark of a parameter."""
    if mark is None:
        mark = torch.zeros(parameter.shape, dtype=torch.bool)
    if change is None:
        nothing = torch.zeros((), dtype=torch.float64).expand(parameter.shape)
        return [parameter.detach(), nothing, mark]
    selection = change.selection.to(torch.device("cpu"))
    old = parameter.detach().cpu().double().clone()
    difference = torch.zeros_like(old)
    selection.scatter_(old, change.old.cpu().double())
    selection.scatter_(difference, change.new.cpu().double() - change.old.cpu().double())
    return [old, difference, mark]


def _summed(parts: list[list[Tensor]]) -> tuple[float, float, float]:
    """Relative change, that outside the mask, and the fraction selected, of several tensors taken together."""
    moved = sum(float(difference.square().sum()) for _, difference, _ in parts) ** 0.5
    norm = sum(float(old.double().square().sum()) for old, _, _ in parts) ** 0.5 if moved else 0.0
    out = sum(float(difference[~mark].square().sum()) for _, difference, mark in parts) ** 0.5
    marked = sum(int(mark.sum()) for _, _, mark in parts)
    total = sum(mark.numel() for _, _, mark in parts)
    return _over(moved, norm), _over(out, norm), marked / total


def _over(moved: float, norm: float) -> float:
    """A weight of zeros that changed has changed infinitely."""
    return 0.0 if moved == 0 else moved / norm if norm else float("inf")


def _counts(change: Change, mark: Tensor | None) -> tuple[int, int]:
    """Entries with another value than before, and those of them outside the mask."""
    flags = torch.zeros(change.selection.shape, dtype=torch.bool)
    selection = change.selection.to(torch.device("cpu"))
    selection.scatter_(flags, (change.old != change.new).cpu())
    outside = flags if mark is None else flags & ~mark
    return int(flags.sum()), int(outside.sum())
