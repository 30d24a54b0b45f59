"""From a component mask to packed slots: which entries of which parameter may change.

A *slot* is one parameter together with a `Selection` of its entries. The selected entries are handled as one packed
tensor: gathered from the parameter, trained, and scattered back. Three shapes of selection cover every mask:

- `Lines`: whole rows or columns (or expert slices) addressed by indices along some dimensions.
  Neurons, heads, vocabulary rows and whole modules are lines, so their gradients are thin matrix
  products.
- `Entries`: scattered single entries addressed by flat index, for sparse masks.
- `Dense`: scattered entries addressed by a boolean tensor, for masks that keep more than one entry in eight, where a
  boolean costs less memory than 64-bit indices.

Which shape a parameter gets is decided here from the mask alone; callers see only `gather` and `scatter_`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from circuits import ComponentMask, MaskError, ModelMap
from circuits.model_map import KeyValues, Side

ENTRY_BYTES, FLAG_BYTES = 8, 1  # an int64 index against a boolean


@dataclass(frozen=True, eq=False)
class Lines:
    """Every entry whose coordinates along ``dims`` are one of the columns of ``index``.

    ``dims = (0,)`` selects rows, ``(1,)`` columns, ``(0, 2)`` columns of single experts in a stacked weight, and ``()``
    the whole parameter. ``index`` is `dim line` int64, sorted and without duplicates. The packed tensor keeps the
    parameter's layout with the selected dimension shortened (several dimensions merge into a leading `line` axis).
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    index: Tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The selected entries of ``tensor`` as a new packed tensor."""
        if not self.dims:
            return tensor.clone()
        if len(self.dims) == 1:
            return tensor.index_select(self.dims[0], self.index[0])
        return tensor[self._key()]

    def scatter_(self, tensor: Tensor, packed: Tensor) -> None:
        """Write ``packed`` into the selected entries of ``tensor``, in place."""
        if not self.dims:
            tensor.copy_(packed)
        elif len(self.dims) == 1:
            tensor.index_copy_(self.dims[0], self.index[0], packed)
        else:
            tensor[self._key()] = packed

    def mask(self) -> Tensor:
        """The selection as a boolean tensor of the parameter's shape, on the CPU."""
        flags = torch.zeros(self.shape, dtype=torch.bool)
        if not self.dims:
            return ~flags
        flags[tuple(k.cpu() if isinstance(k, Tensor) else k for k in self._key())] = True
        return flags

    def to(self, device: torch.device) -> Lines:
        """The same selection with its tensor on ``device``."""
        return Lines(self.shape, self.dims, self.index.to(device))

    def count(self) -> int:
        """Number of selected entries."""
        lines = self.index.shape[1] if self.dims else 1
        rest = [n for dim, n in enumerate(self.shape) if dim not in self.dims]
        return lines * int(torch.tensor(rest).prod()) if rest else lines

    def _key(self) -> tuple[Tensor | slice, ...]:
        at = {dim: self.index[i] for i, dim in enumerate(self.dims)}
        return tuple(at.get(dim, slice(None)) for dim in range(len(self.shape)))


@dataclass(frozen=True, eq=False)
class Entries:
    """Single entries by flat index `entry` int64, sorted and without duplicates; packed as a vector."""

    shape: tuple[int, ...]
    index: Tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The selected entries of ``tensor`` as a new packed tensor."""
        return tensor.reshape(-1).index_select(0, self.index)

    def scatter_(self, tensor: Tensor, packed: Tensor) -> None:
        """Write ``packed`` into the selected entries of ``tensor``, in place."""
        tensor.view(-1).index_copy_(0, self.index, packed)

    def mask(self) -> Tensor:
        """The selection as a boolean tensor of the parameter's shape, on the CPU."""
        flags = torch.zeros(self.shape, dtype=torch.bool)
        flags.view(-1)[self.index.cpu()] = True
        return flags

    def to(self, device: torch.device) -> Entries:
        """The same selection with its tensor on ``device``."""
        return Entries(self.shape, self.index.to(device))

    def count(self) -> int:
        """Number of selected entries."""
        return len(self.index)


@dataclass(frozen=True, eq=False)
class Dense:
    """Single entries by a boolean tensor of the parameter's shape; packed as a vector in storage order."""

    shape: tuple[int, ...]
    flags: Tensor
    n: int

    def gather(self, tensor: Tensor) -> Tensor:
        """The selected entries of ``tensor`` as a new packed tensor."""
        return tensor.masked_select(self.flags)

    def scatter_(self, tensor: Tensor, packed: Tensor) -> None:
        """Write ``packed`` into the selected entries of ``tensor``, in place."""
        tensor.masked_scatter_(self.flags, packed)

    def mask(self) -> Tensor:
        """The selection as a boolean tensor of the parameter's shape, on the CPU."""
        return self.flags.cpu()

    def to(self, device: torch.device) -> Dense:
        """The same selection with its tensor on ``device``."""
        return Dense(self.shape, self.flags.to(device), self.n)

    def count(self) -> int:
        """Number of selected entries."""
        return self.n


Selection: TypeAlias = Lines | Entries | Dense


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter (by its name in ``model.named_parameters()``) and the entries of it that may change."""

    name: str
    parameter: nn.Parameter
    selection: Selection


def slots_for(
    model_map: ModelMap,
    mask: ComponentMask | None,
    *,
    side: Side = "both",
    kv: KeyValues = "all",
) -> list[Slot]:
    """The slots of ``mask`` on a model, one a touched parameter, in the model's parameter order.

    Args:
        model_map: the model.
        mask: component mask; None selects every parameter whole.
        side: "read" (what a unit reads: gate/up rows, q rows), "write" (what it writes: down/o columns) or "both".
        kv: when key/value rows of a shared group belong to a head mask, see `ModelMap.selected_slices`.

    Raises:
        MaskError: the mask does not fit the model, or selects entries of a parameter that cannot be trained.
    """
    parameters = dict(model_map.model.named_parameters())
    if mask is None:
        return [Slot(n, p, _whole(p)) for n, p in parameters.items() if p.is_floating_point()]
    mask.validate(model_map)
    found: dict[str, list[Selection]] = {}
    for piece, units in model_map.selected_slices(mask, side=side, kv=kv):
        if not bool(units.any()):
            continue
        parameter = parameters[piece.parameter]
        if not parameter.is_floating_point():
            raise MaskError(
                f"{piece.parameter} has dtype {parameter.dtype}: only floating-point parameters can be edited; "
                "load the model without weight quantisation"
            )
        found.setdefault(piece.parameter, []).append(
            _select(parameter, piece.view, units.reshape(piece.unit_shape))
        )
    return [
        Slot(name, parameter, union(found[name]).to(parameter.device))
        for name, parameter in parameters.items()
        if name in found
    ]


def union(selections: Iterable[Selection]) -> Selection:
    """All entries of any of ``selections`` (of one parameter) as one selection of the best-fitting shape.

    Lines along the same dimensions stay lines; anything else becomes entries or a dense mask by density.
    """
    first, *rest = selections
    if not rest:
        return first
    everything = [first, *rest]
    if any(isinstance(s, Lines) and not s.dims for s in everything):
        return next(s for s in everything if isinstance(s, Lines) and not s.dims)
    lines = [s for s in everything if isinstance(s, Lines)]
    if len(lines) == len(everything) and len({s.dims for s in lines}) == 1:
        return _lines(first.shape, lines[0].dims, torch.cat([s.index for s in lines], dim=1))
    flags = first.mask()
    for selection in rest:
        flags |= selection.mask()
    return from_flags(flags)


def from_flags(flags: Tensor) -> Selection:
    """The selection of a boolean tensor of a parameter's shape, whole, dense or sparse by its density."""
    n = int(flags.sum())
    if n == flags.numel():
        return Lines(tuple(flags.shape), (), torch.empty(0, 0, dtype=torch.int64))
    if n * ENTRY_BYTES > flags.numel() * FLAG_BYTES:
        return Dense(tuple(flags.shape), flags, n)
    return Entries(tuple(flags.shape), flags.reshape(-1).nonzero()[:, 0])


def _whole(parameter: Tensor) -> Lines:
    return Lines(tuple(parameter.shape), (), torch.empty(0, 0, dtype=torch.int64))


def _lines(shape: tuple[int, ...], dims: tuple[int, ...], index: Tensor) -> Lines:
    """Lines with sorted, unique indices; a single dimension that is fully covered becomes the whole parameter."""
    index = torch.unique(index, dim=1)
    total = int(torch.tensor([shape[d] for d in dims]).prod())
    if index.shape[1] == total:
        return Lines(shape, (), torch.empty(0, 0, dtype=torch.int64))
    return Lines(shape, dims, index)


def _select(parameter: Tensor, view: Tensor, units: Tensor) -> Selection:
    """The entries of ``parameter`` that ``view`` shows at the True ``units`` (the view's leading axes).

    Only strides are used: a view made of splits, permutes and slices is an arithmetic progression along every axis, so
    its rows and columns in the stored tensor follow from its strides and offset without touching a weight.
    """
    if not parameter.is_contiguous():
        raise MaskError(
            "a parameter with a non-contiguous layout cannot be edited; call .contiguous() on it first"
        )
    units = units.cpu()
    shape = tuple(parameter.shape)
    offset = int(view.storage_offset()) - int(parameter.storage_offset())
    steps = [
        _step(shape, size, stride) for size, stride in zip(view.shape, view.stride(), strict=True)
    ]
    start = _coordinates(shape, offset)
    n_unit_axes = units.dim()
    chosen = units.nonzero()  # `unit axis`
    by_unit: dict[int, Tensor] = {}
    for axis in range(n_unit_axes):
        dim, step = steps[axis]
        if view.shape[axis] > 1:
            by_unit[dim] = (
                by_unit.get(dim, torch.zeros(len(chosen), dtype=torch.int64))
                + chosen[:, axis] * step
            )
    by_rest: dict[int, Tensor] = {}
    for axis in range(n_unit_axes, view.dim()):
        dim, step = steps[axis]
        offsets = torch.arange(view.shape[axis]) * step
        known = by_rest.get(dim, torch.zeros(1, dtype=torch.int64))
        by_rest[dim] = (known[:, None] + offsets).reshape(-1)
    dims, columns = [], []
    for dim, size in enumerate(shape):
        rest = by_rest.get(dim, torch.zeros(1, dtype=torch.int64)) + start[dim]
        if dim not in by_unit and len(rest) == size:
            continue  # every coordinate along this dimension
        unit = by_unit.get(dim, torch.zeros(len(chosen), dtype=torch.int64))
        dims.append(dim)
        columns.append((unit, rest))
    if not dims:
        return _whole(parameter)
    lines = _lines(shape, tuple(dims), _combine(columns))
    if 1 < len(lines.dims) == len(shape):  # single entries, not lines
        return from_flags(lines.mask())
    return lines


def _combine(columns: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Index `dim line`: for every unit, the product over dimensions of its remaining coordinates."""
    index = [columns[0][0][:, None] + columns[0][1]]  # `unit rest`
    for unit, rest in columns[1:]:
        index = [known[:, :, None].expand(-1, -1, len(rest)).flatten(1) for known in index]
        repeats = index[0].shape[1] // len(rest)
        index.append((unit[:, None] + rest).repeat(1, repeats))
    return torch.stack([part.reshape(-1) for part in index])


def _step(shape: tuple[int, ...], size: int, stride: int) -> tuple[int, int]:
    """The stored dimension an axis runs along and how many coordinates it moves a step."""
    inner = 1
    for dim in reversed(range(len(shape))):
        if size > 1 and stride < inner * shape[dim]:
            return dim, stride // inner
        inner *= shape[dim]
    return 0, 0


def _coordinates(shape: tuple[int, ...], offset: int) -> list[int]:
    """Coordinates of the flat ``offset``."""
    found = []
    for size in reversed(shape):
        found.append(offset % size)
        offset //= size
    return found[::-1]
