"""A ledger of the edits of one model: what each request changed, what they share, and how to take one back.

    ledger = Ledger(model)
    ledger.edit(NPO(steps=100), mask, forget=anns_rows, name="ann")
    ledger.edit(NPO(steps=100), other, forget=bos_rows, name="bo")
    ledger.drift()[-1].total                         # how far the model has moved, relative to the base
    ledger.rollback("ann")

Taking back a request whose entries no later request touches writes its old values and leaves the others alone, bit for
bit. They are then as they were *trained*, which was in the presence of the request. Where a later request has changed
the same entries, or when asked to, the later ones are made again on the model without it: the same bits as if the
request had never been made (on a CPU; the cost is that of the later edits).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from circuits import ComponentMask, Site, describe
from circuits.atomic import atomic_folder
from locate_edit.delta import Change, Delta
from locate_edit.editing import Edit, Method, edit
from locate_edit.errors import EditError
from locate_edit.fingerprint import difference, fingerprint

if TYPE_CHECKING:
    from locate_edit.prompts import PromptSet

FORMAT = 1
ABOUT, TENSORS = "ledger.json", "edits.safetensors"


@dataclass(frozen=True)
class Request:
    """One edit of a ledger.

    Attributes:
        name: unique in its ledger.
        edit: the edit, applied to the ledger's model.
        again: makes it again on the model as it is; None when its data are not at hand (loaded, or made elsewhere).
    """

    name: str
    edit: Edit
    again: Callable[[], Edit] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Overlap:
    """What two requests share.

    Attributes:
        entries: weight entries that both cover.
        share: those over the entries that either covers (Jaccard index, fraction).
        units: Jaccard index of the component masks; None when one of them was made without a mask.
    """

    entries: int
    share: float
    units: float | None


@dataclass(frozen=True)
class Drift:
    """How far the model has moved from its base after a request.

    Attributes:
        name: the request.
        total: Frobenius norm of the change of all weights over the norm of the base (fraction).
        layers: the same by layer; -1 is what runs before the first layer, ``n_layers`` what runs after the last.
    """

    name: str
    total: float
    layers: Mapping[int, float]


class Ledger:
    """The edits applied to one model, in order.

    Args:
        model: the model; its edits go through the ledger from now on, or are `add`ed to it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(tuple(self._requests))

    def __getitem__(self, which: int | str) -> Request:
        return self._requests[self._index(which)]

    def __repr__(self) -> str:
        names = ", ".join(request.name for request in self._requests)
        return f"Ledger({len(self)} requests{': ' if names else ''}{names})"

    # -- making -----------------------------------------------------------------------------------

    def edit(
        self,
        method: Method,
        mask: ComponentMask | None,
        *,
        forget: PromptSet,
        name: str | None = None,
        **options: Any,
    ) -> Edit:
        """Edit the model as `locate_edit.edit` does (same arguments and errors) and note it as a request.

        Raises:
            EditError: a name that is taken, what `locate_edit.edit` raises, or a method that makes additions, which a
                ledger does not hold. The model and the ledger are as before.
        """
        name = self._new_name(name)

        def make() -> Edit:
            return edit(self.model, method, mask, forget=forget, **options)

        made = make()
        try:
            made.without_additions("a ledger")
        except EditError:
            made.undo()
            raise
        self._requests.append(Request(name, made, make))
        return made

    def add(self, made: Edit, name: str | None = None) -> None:
        """Note an edit that is applied to the model already. It can be taken back, but not made again.

        Raises:
            EditError: a name that is taken, an edit that is not applied to this model, one changed since, or one with
                additions.
        """
        name = self._new_name(name)
        if made.model is not self.model or any(made is request.edit for request in self):
            raise EditError(
                "only an edit that is applied to the ledger's model, once, can be added"
            )
        made.without_additions("a ledger")
        if (at := made.delta.mismatch(self.model, "new")) is not None:
            raise EditError(
                f"{at} was changed after this edit: add edits in the order they were made"
            )
        self._requests.append(Request(name, made))

    # -- looking ----------------------------------------------------------------------------------

    def overlap(self, one: int | str, other: int | str) -> Overlap:
        """What two requests share, in weight entries and in units."""
        a, b = self[one].edit, self[other].edit
        shared = _shared(a.delta, b.delta)
        either = a.delta.count() + b.delta.count() - shared
        masks = a.mask, b.mask
        units = None if masks[0] is None or masks[1] is None else masks[0].overlap(masks[1])
        return Overlap(shared, shared / either if either else 0.0, units)

    @torch.no_grad()
    def drift(self) -> list[Drift]:
        """How far the model is from its base after each request, in order; the last is its state now.

        Cost: one pass over the parameters, and one over the touched ones for each request.
        """
        the_map = describe(self.model)
        base: dict[int, float] = {}
        moved: list[dict[int, float]] = [{} for _ in self._requests]
        for name, parameter in self.model.named_parameters():
            layer = the_map.lowest_layer(name)
            changes = [request.edit.delta.changes.get(name) for request in self._requests]
            value = parameter.detach().clone() if any(changes) else parameter.detach()
            for change in reversed(changes):
                _put(change, "old", value)
            start = value.double()
            base[layer] = base.get(layer, 0.0) + float(start.square().sum())
            for change, squares in zip(changes, moved, strict=True):
                _put(change, "new", value)
                gone = float((value.double() - start).square().sum()) if any(changes) else 0.0
                squares[layer] = squares.get(layer, 0.0) + gone
        return [
            Drift(
                request.name,
                _ratio(sum(squares.values()), sum(base.values())),
                {layer: _ratio(squares[layer], base[layer]) for layer in sorted(base)},
            )
            for request, squares in zip(self._requests, moved, strict=True)
        ]

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """The model without any request while the context is open."""
        done: list[Request] = []
        try:
            for request in reversed(self._requests):
                done.append(request)
                request.edit.delta.write(self.model, "old")
            yield self.model
        finally:
            for request in reversed(done):
                request.edit.delta.write(self.model, "new")

    # -- taking back ------------------------------------------------------------------------------

    def rollback(self, which: int | str, *, replay: bool | None = None) -> None:
        """Take one request back, wherever it stands in the sequence.

        Args:
            which: its name or index.
            replay: make all later requests again on the model without it, so that the result is as if it had never been
                made. None does so only where a later request touches the same entries; True always; False never.

        Raises:
            EditError: there is no such request; a later one would have to be made again but cannot, or may not; or
                making it again fails. The model and the ledger are as before.
        """
        at = self._index(which)
        request, *later = self._requests[at:]
        tied = [r.name for r in later if _shared(request.edit.delta, r.edit.delta)]
        if replay is False and tied:
            raise EditError(
                f"{request.name} cannot be taken back alone: {', '.join(tied)} changed the same entries afterwards; "
                "allow replay, or take those back first"
            )
        again = later if replay or tied else []
        if lost := [r.name for r in again if r.again is None]:
            raise EditError(
                f"taking {request.name} back means making {', '.join(r.name for r in again)} again, but the data of "
                f"{', '.join(lost)} are not at hand: only requests made by Ledger.edit in this process can be. Take "
                "the later requests back first, last in, first out"
            )
        remade = self._remade([request, *again])
        self._requests[at:] = remade if again else later

    def _remade(self, requests: list[Request]) -> list[Request]:
        """Undo ``requests`` and make all but the first again; as before if that fails."""
        undone: list[Request] = []
        remade: list[Request] = []
        try:
            for request in reversed(requests):
                request.edit.undo()
                undone.append(request)
            for request in requests[1:]:
                if request.again is not None:
                    remade.append(replace(request, edit=request.again()))
        except BaseException:
            for request in reversed(remade):
                request.edit.undo()
            for request in reversed(undone):
                request.edit.apply(self.model, strict=False)
            raise
        return remade

    # -- files ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``ledger.json`` and ``edits.safetensors`` into ``folder``, all or nothing; an older ledger is replaced.

        Texts are not saved, only their digests: requests that were loaded can be taken back but not made again.
        """
        tensors: dict[str, Tensor] = {}
        entries = []
        for index, request in enumerate(self._requests):
            own, layout = request.edit.delta.tensors()
            tensors |= {f"{index}/delta/{key}": value.clone() for key, value in own.items()}
            mask = request.edit.mask
            if mask is not None:
                tensors |= {f"{index}/mask/{site}": units for site, units in mask.on.items()}
            entries.append(
                {
                    "name": request.name,
                    "layout": layout,
                    "mask": None if mask is None else mask.provenance,
                    "provenance": request.edit.provenance,
                    "log": request.edit.log,
                    "made_on": request.edit.made_on,
                }
            )
        with self.base() as model:
            about: dict[str, Any] = {
                "format": FORMAT,
                "base": fingerprint(model),
                "requests": entries,
            }
        with atomic_folder(folder, like=ABOUT) as place:
            save_file(tensors, place / TENSORS)
            about["tensors"] = _sha256((place / TENSORS).read_bytes())
            about["digest"] = _digest(about)
            (place / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> Ledger:
        """Read a ledger and apply its requests to ``model``, all or none.

        Args:
            folder: where `save` wrote.
            model: a model equal to the one before the first request.

        Raises:
            EditError: no ledger there, damaged files, or another model. The model is as before.
        """
        about, tensors = _read(Path(folder))
        if (reason := difference(about["base"], fingerprint(model))) is not None:
            raise EditError(f"{folder} was made for another base model: {reason}")
        ledger = cls(model)
        try:
            for index, entry in enumerate(about["requests"]):
                made = _rebuilt(entry, _below(tensors, f"{index}/"))
                ledger._requests.append(Request(entry["name"], made.apply(model, strict=False)))
        except BaseException:
            for request in reversed(ledger._requests):
                request.edit.undo()
            raise
        return ledger

    # -- names ------------------------------------------------------------------------------------

    def _index(self, which: int | str) -> int:
        names = [request.name for request in self._requests]
        if isinstance(which, str) and which in names:
            return names.index(which)
        if isinstance(which, int) and -len(names) <= which < len(names):
            return which % len(names)
        raise EditError(
            f"the ledger has no request {which!r}; it has: {', '.join(names) or 'none'}"
        )

    def _new_name(self, name: str | None) -> str:
        taken = {request.name for request in self._requests}
        if name in taken:
            raise EditError(f"the ledger has a request {name!r} already; choose another name")
        numbered = (f"request {n}" for n in range(1, len(taken) + 2))
        return name if name is not None else next(n for n in numbered if n not in taken)


def _shared(a: Delta, b: Delta) -> int:
    """Entries that both deltas cover."""
    both = [
        (change.selection, b.changes[name].selection) for name, change in a if name in b.changes
    ]
    return sum(int((one.mask() & other.mask()).sum()) for one, other in both)


def _put(change: Change | None, which: str, value: Tensor) -> None:
    if change is not None:
        packed = change.old if which == "old" else change.new
        change.selection.to(value.device).scatter_(value, packed.to(value.device))


def _ratio(moved: float, base: float) -> float:
    if not moved:
        return 0.0
    return math.sqrt(moved / base) if base else math.inf


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def _rebuilt(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    units = {Site.parse(name): flags for name, flags in _below(tensors, "mask/").items()}
    return Edit(
        Delta.from_tensors(_below(tensors, "delta/"), entry["layout"]),
        mask=None if entry["mask"] is None else ComponentMask(units, entry["mask"]),
        provenance=entry["provenance"],
        log=entry["log"],
        made_on=entry["made_on"],
    )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a saved ledger, checked."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        data = (folder / TENSORS).read_bytes()
    except FileNotFoundError as problem:
        raise EditError(
            f"{folder} is not a ledger: {Path(problem.filename).name} is missing"
        ) from problem
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise EditError(f"the ledger in {folder} cannot be read: {problem}") from problem
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise EditError(f"{folder / ABOUT}: expected a ledger of format {FORMAT}")
    digest = about.pop("digest", None)
    if digest != _digest(about) or _sha256(data) != about["tensors"]:
        raise EditError(f"the ledger in {folder} is truncated or was changed after it was written")
    try:
        return about, load_file(folder / TENSORS)
    except SafetensorError as problem:
        raise EditError(f"{folder / TENSORS} cannot be read: {problem}") from problem


def _digest(about: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(about, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
