"""The values of an edit: for every touched parameter, which entries, their old values and their new values.

A `Delta` is what an edit *is*, independent of the method that made it. Old values are stored beside new ones, because
``old + difference`` is not exact in floating point: undoing writes the stored values back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locate_edit.errors import EditError
from locate_edit.slots import Dense, Entries, Lines, Selection, union


@dataclass(frozen=True, eq=False)
class Change:
    """Old and new values (packed, in the model's dtype) of the selected entries of one parameter."""

    selection: Selection
    old: Tensor
    new: Tensor

    def difference(self) -> Tensor:
        """New minus old values, packed, in float32 (float64 for float64 models)."""
        wide = torch.float64 if self.old.dtype == torch.float64 else torch.float32
        return self.new.to(wide) - self.old.to(wide)


@dataclass(frozen=True, eq=False)
class Delta:
    """Changes by parameter name; the sizes of all tensors are those of the mask, not of the model."""

    changes: Mapping[str, Change]

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[tuple[str, Change]]:
        return iter(self.changes.items())

    def count(self) -> int:
        """Number of entries that the delta covers."""
        return sum(change.selection.count() for change in self.changes.values())

    def norm(self) -> float:
        """Frobenius norm of the difference over all parameters."""
        squares = [change.difference().double().square().sum() for change in self.changes.values()]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def write(self, model: nn.Module, which: str) -> None:
        """Write the ``"old"`` or ``"new"`` values into ``model``, in place and without touching any other entry."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, change in self:
                selection, values = _on(parameters[name], change, which)
                selection.scatter_(parameters[name].data, values)

    def mismatch(self, model: nn.Module, which: str) -> str | None:
        """The first parameter whose selected entries are not the ``"old"``/``"new"`` values, or None."""
        parameters = dict(model.named_parameters())
        for name, change in self:
            if name not in parameters:
                return name
            if tuple(parameters[name].shape) != change.selection.shape:
                return name
            selection, values = _on(parameters[name], change, which)
            if not torch.equal(_bits(selection.gather(parameters[name].data)), _bits(values)):
                return name
        return None

    def __neg__(self) -> Delta:
        return self.scaled(-1.0)

    def scaled(self, factor: float) -> Delta:
        """The delta whose difference is ``factor`` times this one's, over the same old values."""
        return self._map(
            lambda change: change.old + (factor * change.difference()).to(change.old.dtype)
        )

    def _map(self, new: Callable[[Change], Tensor]) -> Delta:
        return Delta({n: Change(c.selection, c.old, new(c).to(c.old.dtype)) for n, c in self})

    def __add__(self, other: Delta) -> Delta:
        """Sum of two deltas over the same base: differences add, entries outside one of them count as unchanged.

        Raises:
            EditError: the two were made from different old values.
        """
        changes = dict(self.changes)
        for name, change in other:
            changes[name] = _sum(name, changes[name], change) if name in changes else change
        return Delta(changes)

    # -- storage ----------------------------------------------------------------------------------

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, dict[str, object]]]:
        """Flat tensors for safetensors, and the JSON description that turns them back into a delta."""
        tensors: dict[str, Tensor] = {}
        layout: dict[str, dict[str, object]] = {}
        for name, change in self:
            selection = change.selection
            layout[name] = {
                "shape": list(selection.shape),
                "kind": type(selection).__name__.lower(),
            }
            match selection:
                case Lines(dims=dims, index=index):
                    layout[name]["dims"] = list(dims)
                    tensors[f"{name}/index"] = index
                case Entries(index=index):
                    tensors[f"{name}/index"] = index
                case Dense(flags=flags):
                    tensors[f"{name}/flags"] = flags
            tensors[f"{name}/old"], tensors[f"{name}/new"] = change.old, change.new
        return {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, layout

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], layout: Mapping[str, Mapping[str, object]]
    ) -> Delta:
        """Inverse of `tensors`.

        Raises:
            EditError: a tensor is missing, or its size does not fit the description.
        """
        changes = {}
        for name, about in layout.items():
            try:
                changes[name] = _rebuild(name, about, tensors)
            except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as problem:
                raise EditError(
                    f"the edit file does not describe {name!r} consistently: {problem!r}"
                ) from problem
        return cls(changes)


def _on(parameter: Tensor, change: Change, which: str) -> tuple[Selection, Tensor]:
    values = change.old if which == "old" else change.new
    return change.selection.to(parameter.device), values.to(parameter.device)


def _bits(values: Tensor) -> Tensor:
    """The raw bits, so that equality is exact for NaN and signed zero."""
    return values.contiguous().view(
        {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    )


def _sum(name: str, a: Change, b: Change) -> Change:
    if a.selection.shape != b.selection.shape:
        raise EditError(
            f"edits of different models cannot be added: {name} is {a.selection.shape} and {b.selection.shape}"
        )
    both = union([a.selection, b.selection])
    device, cpu = a.old.device, torch.device("cpu")
    in_a, in_b = a.selection.mask(), b.selection.mask()
    (old_a, new_a), (old_b, new_b) = (_unpacked(change) for change in (a, b))
    if not torch.equal(_bits(old_a[in_a & in_b]), _bits(old_b[in_a & in_b])):
        raise EditError(
            f"cannot add edits with different starting values of {name}: both must come from the same base model; "
            "apply them one after the other instead"
        )
    total = (new_a.double() - old_a.double()) + new_b.double()
    new = torch.where(in_a & in_b, total.to(a.old.dtype), torch.where(in_a, new_a, new_b))
    old = torch.where(in_a, old_a, old_b)
    selection = both.to(cpu)
    return Change(
        selection.to(device), selection.gather(old).to(device), selection.gather(new).to(device)
    )


def _unpacked(change: Change) -> tuple[Tensor, Tensor]:
    """Old and new values in tensors of the parameter's shape, zero elsewhere (on the CPU)."""
    selection = change.selection.to(torch.device("cpu"))
    pair = []
    for values in (change.old, change.new):
        full = torch.zeros(selection.shape, dtype=values.dtype)
        selection.scatter_(full, values.cpu())
        pair.append(full)
    return pair[0], pair[1]


def _rebuild(name: str, about: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Change:
    shape = tuple(int(n) for n in about["shape"])  # type: ignore[attr-defined]
    old, new = tensors[f"{name}/old"], tensors[f"{name}/new"]
    selection: Selection
    if about["kind"] == "lines":
        dims = tuple(int(d) for d in about["dims"])  # type: ignore[attr-defined]
        selection = Lines(shape, dims, tensors[f"{name}/index"])
    elif about["kind"] == "entries":
        selection = Entries(shape, tensors[f"{name}/index"])
    elif about["kind"] == "dense":
        flags = tensors[f"{name}/flags"]
        selection = Dense(shape, flags, int(flags.sum()))
    else:
        raise ValueError(f"unknown selection {about['kind']!r}")
    if old.shape != new.shape or old.dtype != new.dtype or old.numel() != selection.count():
        raise ValueError(
            f"expected {selection.count()} old and new values, got {old.numel()} and {new.numel()}"
        )
    if not bool(torch.isfinite(new.float()).all()):
        raise ValueError("values are not finite")
    probe = torch.zeros(shape, dtype=torch.bool)
    selection.scatter_(
        probe, torch.ones_like(old, dtype=torch.bool)
    )  # indices in range, packed layout right
    return Change(selection, old, new)
