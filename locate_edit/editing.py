"""`edit` changes a model inside a mask; the `Edit` it returns can undo, save, combine and export the change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from circuits import ComponentMask, ModelMap, describe
from circuits.atomic import atomic_folder
from circuits.model_map import KeyValues, Side
from locate_edit import catalog
from locate_edit.additions import Added, Placed, install, installed, parse
from locate_edit.delta import Change, Delta
from locate_edit.engine import Run, Settings, StopWhen
from locate_edit.errors import EditError, PromptError
from locate_edit.fingerprint import difference, fingerprint
from locate_edit.never_seen import NeverSeen, levels
from locate_edit.prompts import PromptSet
from locate_edit.slots import slots_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
WITH_ADDITIONS = (
    2  # the format of edits that hold additions, so that no older program applies half of one
)


@runtime_checkable
class Method(Protocol):
    """An edit method: hyperparameters with a call that changes a `Run` through `fit` or `write`.

    Attributes a method may define as class variables: ``needs_retain`` (True when it has no meaning without retain
    prompts), ``ascends`` (True when it raises the loss of forget prompts, so that the never-seen level stops it), and
    ``side`` ("read", "write" or "both": which weights of a unit it changes unless the caller says otherwise).
    """

    def __call__(self, run: Run) -> None:
        """Change the slices of ``run``."""


def edit(
    model: PreTrainedModel | nn.Module,
    method: Method,
    mask: ComponentMask | None,
    *,
    forget: PromptSet,
    retain: PromptSet | None = None,
    batch_size: int = 8,
    seed: int = 0,
    side: Side | None = None,
    kv: KeyValues = "all",
    never_seen: NeverSeen = "auto",
    stop: StopWhen | tuple[StopWhen, ...] = (),
    gradient_checkpointing: bool = False,
    reuse_prefix_bytes: int = 2**30,
    reference_bytes: int = 2**28,
    progress: bool = False,
) -> Edit:
    """Change ``model`` in place with ``method``, only inside ``mask``, and return the change as an `Edit`.

    Entries outside the mask stay bit-identical. If anything goes wrong, an interruption included, the model is restored
    to what it was, bit for bit, with its modes, hooks and gradient flags.

    Args:
        model: a causal or masked language model in memory.
        method: how to change it, e.g. ``NPO(steps=100, lr=1e-3)``.
        mask: where it may change; None allows every parameter.
        forget: the prompts the edit is about.
        retain: prompts whose behaviour should stay, for methods with a retain term.
        batch_size: prompts a batch, of each set.
        seed: seed of the order of the data; the same seed gives the same bits on a CPU.
        side: which weights of a unit change: "read", "write" or "both". Default: the method's own, usually "both".
        kv: whether key/value rows shared by a group of heads change when all its heads are selected ("all") or not
            ("never").
        never_seen: where ascent-type methods stop, prompt by prompt: hold-out prompts, an oracle
            model, a number of nats a token, "auto" (base rate of the other targets), or None for no
            such stop. See `locate_edit.never_seen`.
        stop: further rules that end training early.
        gradient_checkpointing: trade a second forward of each block for the memory of its activations.
        reuse_prefix_bytes: memory for hidden states below the lowest edited block, kept between steps; 0 for none.
        reference_bytes: memory for kept base-model logits (KL terms).
        progress: show a progress bar.

    Raises:
        UnknownFamily, MaskError, PromptError: the model, the mask or the prompts cannot be used.
        EditError: the method lacks data it needs, the loss stops being finite, or memory runs out.
    """
    model_map = describe(model)
    _check(model_map, method, forget, retain)
    wanted: Side = side if side is not None else getattr(method, "side", "both")
    slots = slots_for(model_map, mask, side=wanted, kv=kv)
    if not slots and mask is not None and len(mask.units()):
        raise EditError(
            f"the mask selects {len(mask.units())} units but nothing of them that "
            f"{type(method).__name__} can change with side={wanted!r}; try side='both'"
        )
    options = {
        "batch_size": batch_size, "seed": seed, "side": side, "kv": kv, "never_seen": _plain_level(never_seen),
        "stop": 1 if isinstance(stop, StopWhen) else len(stop),
    }  # fmt: skip
    made_on = fingerprint(model)
    steps = getattr(method, "steps", None)
    with ExitStack() as stack:
        on_step = (
            stack.enter_context(_progress_bar(type(method).__name__, steps))
            if progress and steps
            else None
        )
        settings = Settings(
            batch_size=batch_size,
            seed=seed,
            reuse_prefix_bytes=reuse_prefix_bytes,
            reference_bytes=reference_bytes,
            gradient_checkpointing=gradient_checkpointing,
            stop=stop if isinstance(stop, tuple) else (stop,),
            on_step=on_step,
        )
        stack.enter_context(_quiet(model))
        run = Run(model_map, slots, forget, retain, settings)
        try:
            if slots:
                if getattr(method, "ascends", False):
                    run.levels = levels(never_seen, model, forget, retain, batch_size)
                if run.levels is not None:
                    run.levels.start_from(run.forget_nll())
                method(run)
        except BaseException as problem:
            run.restore()
            if (advice := _memory_advice(problem)) is not None:
                raise EditError(advice) from problem
            raise
    provenance = {
        "method": _describe_method(method),
        "options": options,
        "forget": {"name": forget.name, "prompts": len(forget), "digest": forget.digest},
        "retain": None
        if retain is None
        else {"name": retain.name, "prompts": len(retain), "digest": retain.digest},
        "model": {"class": type(model).__name__, "architecture": model_map.architecture},
        **run.notes,
    }
    again = _again(
        method, forget=forget, retain=retain, batch_size=batch_size, seed=seed, side=side, kv=kv,
        never_seen=never_seen, stop=stop, gradient_checkpointing=gradient_checkpointing,
        reuse_prefix_bytes=reuse_prefix_bytes, reference_bytes=reference_bytes,
    )  # fmt: skip
    # Slices that were only selected, because additions were trained in their place, are no part of the edit.
    delta = run.delta() if run.wrote or run.placed is None else Delta({})
    return Edit(
        delta, additions=run.added(), mask=mask, provenance=provenance, log=run.log, made_on=made_on, model=model,
        method=method, forget=forget, retain=retain, again=again, placed=run.placed,
    )  # fmt: skip


class Edit:
    """A reversible change of a model's weights, and what it adds beside them, with how it was made.

    Attributes:
        delta: which entries changed, with their old and new values.
        additions: adapters and extra tokens that are in place while the edit is applied, with their values.
        mask: the component mask it was restricted to, or None.
        provenance: method, options, data digests, model, and what the run noted (why it stopped, who got there).
        log: one record a training step.
        made_on: fingerprint of the model it was made on.
        model: the model it is applied to, or None.
        method, forget, retain: what it was made with; None after loading from a folder, until `recall`.
    """

    def __init__(
        self,
        delta: Delta,
        *,
        mask: ComponentMask | None = None,
        provenance: Mapping[str, Any] | None = None,
        log: list[dict[str, Any]] | None = None,
        made_on: Mapping[str, str] | None = None,
        model: nn.Module | None = None,
        method: Method | None = None,
        forget: PromptSet | None = None,
        retain: PromptSet | None = None,
        again: Again | None = None,
        additions: Sequence[Added] = (),
        placed: Placed | None = None,
    ) -> None:
        self.delta, self.mask, self.model = delta, mask, model
        self.additions, self._placed = tuple(additions), placed
        self.provenance, self.log, self.made_on = (
            dict(provenance or {}),
            log or [],
            dict(made_on or {}),
        )
        self.method, self.forget, self.retain, self._again = method, forget, retain, again

    def __repr__(self) -> str:
        method = self.provenance.get("method", {}).get("name", "combination")
        state = "applied" if self.model is not None else "not applied"
        beside = "".join(f", {each.what}" for each in self.additions)
        changed = f"{self.delta.count():,} entries in {len(self.delta)} parameters"
        return f"Edit({method}: {changed}{beside}, {state})"

    # -- on and off -------------------------------------------------------------------------------

    def apply(self, model: nn.Module, *, strict: bool = True) -> Edit:
        """Write the new values into ``model``, put the additions in place, and return this edit.

        Args:
            model: a model equal to the one the edit was made on.
            strict: also refuse when parameters outside the edit differ; False stacks the edit on another one.

        Raises:
            EditError: already applied, or the model is not the one it was made for (with what
            differs). Nothing changed.
        """
        if self.model is not None:
            raise EditError(
                "this edit is applied already; undo it first, or load it again for a second model"
            )
        if self.delta and (at := self.delta.mismatch(model, "old")) is not None:
            reason = (
                difference(self.made_on, fingerprint(model)) or f"the edited entries of {at} differ"
            )
            raise EditError(
                f"this edit was made for another base model: {reason}. Apply it to the model it was "
                "made on"
            )
        other = difference(self.made_on, fingerprint(model)) if strict and self.made_on else None
        if other is not None:
            raise EditError(
                f"this edit was made for another base model: {other}. The edited entries themselves "
                "match; pass strict=False to apply it on top of other changes"
            )
        if self.additions:
            self._placed = install(describe(model), self.additions)
        self.delta.write(model, "new")
        self.model = model
        return self

    def undo(self) -> None:
        """Write the old values back, bit for bit, and take the additions out.

        Raises:
            EditError: the edit is not applied, its entries were changed since, or other additions were put in place
                after its own.
        """
        model = self._applied()
        if (at := self.delta.mismatch(model, "new")) is not None:
            raise EditError(
                f"cannot undo: {at} was changed after this edit was applied; undo the later edit first "
                "(last in, first out)"
            )
        if self._placed is not None:
            places = installed(model)
            if self._placed not in places or not self._placed.on:
                raise EditError(
                    f"cannot undo: {self.additions[0].what} is switched off, or its hooks were taken out of the model "
                    "by something else"
                )
            if later := places[places.index(self._placed) + 1 :]:
                raise EditError(
                    f"cannot undo: {later[0].what[0]} was put in place after this edit was applied; undo the later "
                    "edit first (last in, first out)"
                )
            self._placed.remove()
            self._placed = None
        self.delta.write(model, "old")
        self.model = None

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The edited model while the context is open; the base model again afterwards."""
        self.apply(model)
        try:
            yield model
        finally:
            self.undo()

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        """The base model while the context is open; the edited model again afterwards."""
        model = self._applied()
        self._switch(model, on=False)
        try:
            yield model
        finally:
            self._switch(model, on=True)

    @contextmanager
    def rerun(self, mask: ComponentMask | None, *, seed: int | None = None) -> Iterator[Edit]:
        """The same method with the same data on another mask, for controls; this edit again afterwards.

        Raises:
            EditError: the edit was loaded from a folder and has not been given its prompts (`recall`).
        """
        if self._again is None:
            raise EditError(
                "an edit that was loaded from a folder can be run again on another mask once it has its prompts: call "
                "recall(forget=..., retain=...) first"
            )
        with self.off() as model:
            seed = self.provenance["options"]["seed"] if seed is None else seed
            other = self._again(model, mask, seed)
            try:
                yield other
            finally:
                if other.model is not None:
                    other.undo()

    def recall(self, *, forget: PromptSet, retain: PromptSet | None = None) -> Edit:
        """Give an edit that was loaded from a folder the prompts it was made with, so that `rerun` can make it again.

        Its method is made from what `edit.json` says of it; only methods of `locate_edit.methods` are, as a file may
        not name code to be run.

        Args:
            forget: the prompts it was made to forget.
            retain: the prompts it was made to keep; None if there were none.

        Raises:
            EditError: other prompts than those it was made with, or something that `edit.json` does not hold: a method
                of your own, never-seen prompts or model, rules to stop.
        """
        about = self.provenance
        if "options" not in about:
            raise EditError(
                "a combination of edits was not made by a method, so it cannot be made again"
            )
        for role, prompts in (("forget", forget), ("retain", retain)):
            made = (about.get(role) or {}).get("digest")
            given = None if prompts is None else prompts.digest
            if made != given:
                raise EditError(
                    f"these are not the {role} prompts that the edit was made with: expected "
                    f"{_short(made)}, got {_short(given)}. Give the same rows in the same order, tokenised alike"
                )
        options = dict(about["options"])
        if options.get("never_seen", _GIVEN) == _GIVEN or options.pop("stop", 0):
            raise EditError(
                "the edit was made with never-seen prompts, a never-seen model or rules to stop, which edit.json does "
                "not hold; make it again with edit()"
            )
        try:
            method = catalog.rebuild("method", about["method"])
        except catalog.CatalogError as problem:
            raise EditError(f"the method of this edit cannot be made again: {problem}") from problem
        self.method, self.forget, self.retain = method, forget, retain
        self._again = _again(method, forget=forget, retain=retain, **options)
        return self

    def _applied(self) -> nn.Module:
        if self.model is None:
            raise EditError("this edit is not applied to a model; call .apply(model) first")
        return self.model

    def _switch(self, model: nn.Module, *, on: bool) -> None:
        self.delta.write(model, "new" if on else "old")
        if self._placed is not None:
            self._placed.on = on

    def without_additions(self, what: str) -> None:
        """Refuse to do ``what`` with an edit that is more than a change of weights.

        Raises:
            EditError: it holds additions.
        """
        if self.additions:
            names = ", ".join(str(each.what) for each in self.additions[:3])
            more = len(self.additions) - 3
            raise EditError(
                f"{what} takes changes of weights only, and this edit holds {names}"
                f"{f' and {more} more' if more > 0 else ''}: a nonlinear adapter or an extra input row is no part of "
                "the model's weights. Save the edit with save() and apply() it to the base model where it is needed"
            )

    # -- arithmetic -------------------------------------------------------------------------------

    def __add__(self, other: Edit) -> Edit:
        """Both changes together, as a new edit that is not applied. Both must come from the same base model."""
        for part in (self, other):
            part.without_additions("arithmetic of edits (fuse() merges adapters)")
        if (reason := difference(self.made_on, other.made_on)) is not None:
            raise EditError(f"cannot combine edits of different base models: {reason}")
        both = (
            self.mask
            if other.mask is None
            else other.mask
            if self.mask is None
            else self.mask | other.mask
        )
        return self._combined(self.delta + other.delta, "sum", [self, other], both)

    def __neg__(self) -> Edit:
        """The opposite change (a task vector subtracted instead of added), not applied."""
        self.without_additions("arithmetic of edits")
        return self._combined(-self.delta, "negation", [self], self.mask)

    def __sub__(self, other: Edit) -> Edit:
        """This change with the opposite of the other."""
        return self + (-other)

    def __mul__(self, factor: float) -> Edit:
        """This change scaled by ``factor``, not applied."""
        self.without_additions("arithmetic of edits")
        return self._combined(
            self.delta.scaled(float(factor)), f"scaled by {factor:g}", [self], self.mask
        )

    __rmul__ = __mul__

    def _combined(
        self, delta: Delta, name: str, parts: list[Edit], mask: ComponentMask | None
    ) -> Edit:
        provenance = {"method": {"name": name}, "parts": [part.provenance for part in parts]}
        return Edit(delta, mask=mask, provenance=provenance, made_on=self.made_on)

    # -- files ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``delta.safetensors``, ``edit.json`` and ``mask.safetensors`` into ``folder``, all or nothing.

        Additions go to ``additions.safetensors``, their description to ``edit.json``.
        The forget and retain texts are *not* saved, only their digests.
        """
        tensors, layout = self.delta.tensors()
        with atomic_folder(folder, like="edit.json") as place:
            save_file(tensors, place / "delta.safetensors")
            if self.mask is not None:
                self.mask.save(place / "mask.safetensors")
            if self.additions:
                save_file(_named(self.additions), place / "additions.safetensors")
            about: dict[str, Any] = {
                "format": WITH_ADDITIONS if self.additions else FORMAT,
                "provenance": self.provenance,
                "layout": layout,
                "made_on": self.made_on,
                "log": self.log,
                "files": {
                    file.name: _sha256(file.read_bytes())
                    for file in sorted(place.glob("*.safetensors"))
                },
            }
            if self.additions:
                about["additions"] = [each.what.about() for each in self.additions]
            about["digest"] = _digest(about)
            (place / "edit.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Edit:
        """Read an edit; call `apply` to use it.

        Raises:
            EditError: there is no edit there, or its files are truncated or were changed.
        """
        folder = Path(folder)
        about = _read_json(folder / "edit.json")
        for name, digest in about["files"].items():
            file = folder / name
            if not file.is_file():
                raise EditError(f"{folder} is not a whole edit: {name} is missing")
            if _sha256(file.read_bytes()) != digest:
                raise EditError(
                    f"{file} is truncated or was changed: its checksum is not the one in edit.json"
                )
        if "delta.safetensors" not in about["files"]:
            raise EditError(f"{folder / 'edit.json'} names no delta.safetensors")
        tensors = _read_tensors(folder / "delta.safetensors")
        mask = (
            ComponentMask.load(folder / "mask.safetensors")
            if "mask.safetensors" in about["files"]
            else None
        )
        delta = Delta.from_tensors(tensors, about["layout"])
        return cls(
            delta,
            mask=mask,
            provenance=about["provenance"],
            log=about["log"],
            made_on=about["made_on"],
            additions=_read_additions(folder, about),
        )

    def merge_to(self, folder: str | Path) -> Path:
        """Save the edited model as an ordinary checkpoint (``save_pretrained``), all or nothing.

        Raises:
            EditError: the edit is not applied, or holds additions, for which a checkpoint has no place.
        """
        model: Any = self._applied()
        self.without_additions("a merged checkpoint")
        with atomic_folder(folder, like="config.json") as place:
            model.save_pretrained(place)
        return Path(folder)

    def to_peft(self, folder: str | Path) -> Path:
        """Save the change as a PEFT LoRA adapter of the same effect, see `locate_edit.lora`.

        Raises:
            EditError: the edit is not applied, or holds what a LoRA adapter cannot.
        """
        from locate_edit.lora import save_lora

        self.without_additions("a LoRA adapter")
        return save_lora(self._applied(), self.delta, folder)


# -- helpers --------------------------------------------------------------------------------------


def _check(
    model_map: ModelMap, method: Method, forget: PromptSet, retain: PromptSet | None
) -> None:
    name = type(method).__name__
    given: tuple[Any, ...] = (method, forget, retain)
    if not callable(given[0]) or isinstance(given[0], type):
        raise EditError(f"method must be an object like NPO(steps=100, lr=1e-3), got {method!r}")
    if not isinstance(given[1], PromptSet) or not isinstance(given[2], PromptSet | None):
        raise PromptError(
            "forget and retain must be PromptSets: PromptSet(rows, tokenizer) makes one from a list"
        )
    if getattr(method, "needs_retain", False) and retain is None:
        raise EditError(f"{name} needs retain prompts: pass edit(..., retain=PromptSet(...))")
    for role, prompts in (("forget", forget), ("retain", retain)):
        if prompts is None:
            continue
        if prompts.masked == model_map.causal:
            kind, made = ("causal", "masked") if model_map.causal else ("masked", "causal")
            raise PromptError(
                f"{type(model_map.model).__name__} is a {kind} model, but the {role} prompts were made "
                f"for a {made} one; "
                f"pass PromptSet(..., masked={not model_map.causal})"
            )
        limit = getattr(model_map.config, "max_position_embeddings", None)
        if limit is not None and prompts.longest > limit:
            raise PromptError(
                f"the longest of the {role} prompts has {prompts.longest} tokens, more than the model's "
                f"context of {limit}; "
                "pass PromptSet(..., max_length=...) or shorten it"
            )


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) and no gradients for parameters; both as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _progress_bar(name: str, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(name, total=steps)
        yield lambda _record: bar.advance(task)


Again: TypeAlias = "Callable[[nn.Module, ComponentMask | None, int], Edit]"
"""Makes an edit again: of the base model, on another mask, with another seed."""


def _again(method: Method, **options: Any) -> Again:
    return lambda model, mask, seed: edit(model, method, mask, **{**options, "seed": seed})


_GIVEN = "given"
"""What stands in the provenance for never-seen prompts or a model, which an edit does not keep."""


def _plain_level(never_seen: NeverSeen) -> Any:
    return never_seen if never_seen is None or isinstance(never_seen, str | float | int) else _GIVEN


def _describe_method(method: Any) -> dict[str, Any]:
    kind = method if hasattr(method, "__name__") else type(method)  # a function names itself
    about: dict[str, Any] = {"name": kind.__name__, "module": kind.__module__}
    if is_dataclass(method):
        about |= {field.name: _plain(getattr(method, field.name)) for field in fields(method)}
    return about


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, str | int | float | bool | dict):
        return value
    if hasattr(value, "__qualname__"):  # a function or a class, whose repr holds an address
        return f"{value.__module__}:{value.__qualname__}"
    return repr(value)


def _memory_advice(problem: BaseException) -> str | None:
    text = str(problem)
    if isinstance(problem, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return (
            "out of memory; the model was restored. Lower batch_size, shorten the prompts, pass "
            "gradient_checkpointing=True, "
            "or lower reuse_prefix_bytes and reference_bytes"
        )
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise EditError(f"{path.parent} is not an edit: {path.name} is missing") from problem
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise EditError(f"{path} cannot be read: {problem}") from problem
    if not isinstance(about, dict) or about.get("format") not in (FORMAT, WITH_ADDITIONS):
        found = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise EditError(f"{path}: expected an edit of format {FORMAT}, found {found!r}")
    digest = about.pop("digest", None)
    if digest != _digest(about):
        raise EditError(
            f"{path} was changed after it was written: its digest does not fit its contents"
        )
    return about


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as problem:
        raise EditError(f"{path} cannot be read: {problem}") from problem


def _named(additions: Sequence[Added]) -> dict[str, Tensor]:
    """Values of all additions by place and name, for safetensors."""
    return {
        f"{place}/{name}": value.detach().cpu().contiguous()
        for place, each in enumerate(additions)
        for name, value in each.values.items()
    }


def _read_additions(folder: Path, about: Mapping[str, Any]) -> tuple[Added, ...]:
    """The additions that ``edit.json`` describes, with the values beside it."""
    described, file = about.get("additions", []), "additions.safetensors"
    if bool(described) != (file in about["files"]):
        raise EditError(f"{folder / 'edit.json'} and {file} do not name the same additions")
    if not described:
        return ()
    tensors = _read_tensors(folder / file)
    found = tuple(
        Added(
            parse(each),
            {
                name.split("/", 1)[1]: value
                for name, value in tensors.items()
                if name.split("/", 1)[0] == str(place)
            },
        )
        for place, each in enumerate(described)
    )
    if set(_named(found)) != set(tensors):
        raise EditError(f"{folder / file} holds tensors that edit.json does not describe")
    return found


def _digest(about: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(about, sort_keys=True).encode())


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"prompts with the digest {digest[:12]}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


__all__ = ["Change", "Delta", "Edit", "Method", "edit"]
