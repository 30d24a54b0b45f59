"""Tensors that are not part of a model, put in place by hooks while an edit is applied: adapters and extra tokens.

    placed = install(describe(model), [made(Adapter(Site(4, "mlp"), 16), describe(model), seed=0)])
    ...                                                    # the model runs with it
    placed.remove()                                        # no hook, attribute or module stays behind

An edit method asks a run for them with `Run.add` and trains them with `Run.fit`; the `Edit` then holds them. Nothing
of the model is written: its parameters, buffers and the keys of its state are the same with and without. Values are
float32 (float64 for float64 models) whatever the model's dtype, and follow the model to its device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuits import ModelMap, Site
from circuits.errors import SiteError
from locate_edit.errors import EditError


@dataclass(frozen=True)
class Adapter:
    """A small nonlinear map beside what a block or a layer has computed: ``out + relu(out down' + b1) up' + b2``.

    Values: ``down`` `width d_model`, ``b1`` `width`, ``up`` `d_model width`, ``b2`` `d_model`. At the start ``up`` and
    ``b2`` are zero, so that it changes nothing; ``down`` is normal with variance 1/d_model, from a seed.

    Attributes:
        site: an mlp site (the output of the block's last projection, before any norm or residual sum) or a layer site
            (the residual stream after the layer).
        width: number of its neurons.

    Raises:
        EditError: another kind of site, or a width below 1.
    """

    site: Site
    width: int

    def __post_init__(self) -> None:
        given: Any = self.site
        if not isinstance(given, Site) or given.kind not in ("mlp", "layer"):
            raise EditError(
                f"an adapter stands at the output of an mlp or a layer: expected a site like L3.mlp, got {given}"
            )
        _check_size("the width of an adapter", self.width)

    def __str__(self) -> str:
        return f"adapter of {self.width} at {self.site}"

    def about(self) -> dict[str, Any]:
        """What JSON can hold of it; `parse` reads it."""
        return {"kind": "adapter", "site": str(self.site), "width": self.width}

    def start(self, model_map: ModelMap, generator: torch.Generator) -> dict[str, Tensor]:
        """Values to begin with, on the CPU: it changes nothing yet.

        Raises:
            SiteError: the model has no such site.
        """
        model_map.read_point(self.site)
        d_model, wide = model_map.d_model, _wide(model_map.model)
        down = torch.randn(self.width, d_model, generator=generator, dtype=wide)
        return {
            "down": down / math.sqrt(d_model),
            "b1": torch.zeros(self.width, dtype=wide),
            "up": torch.zeros(d_model, self.width, dtype=wide),
            "b2": torch.zeros(d_model, dtype=wide),
        }

    def shapes(self, d: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the values for a residual stream of width ``d``."""
        return {"down": (self.width, d), "b1": (self.width,), "up": (d, self.width), "b2": (d,)}


@dataclass(frozen=True)
class ExtraTokens:
    """More rows of the input embedding: ids from its number of rows on become valid inputs.

    Values: ``rows`` `token d_embedding`, in the scale of the embedding's own rows (a family's factor on the embedding
    applies to them too). They start as normal draws with the mean and standard deviation of each column of the
    embedding, from a seed. The output does not grow: no model can say them. They work inside ``generate``, but options
    of it that look up the logits of every input token (a repetition penalty) cannot be used with them.

    Attributes:
        n: how many. Tokens added later have the ids after those of earlier ones.

    Raises:
        EditError: fewer than 1.
    """

    n: int

    def __post_init__(self) -> None:
        _check_size("the number of extra tokens", self.n)

    def __str__(self) -> str:
        return f"{self.n} extra token{'s' if self.n > 1 else ''}"

    def about(self) -> dict[str, Any]:
        """What JSON can hold of it; `parse` reads it."""
        return {"kind": "extra_tokens", "n": self.n}

    def start(self, model_map: ModelMap, generator: torch.Generator) -> dict[str, Tensor]:
        """Values to begin with, on the CPU."""
        weight = _embedding(model_map.model).weight.detach().double()
        noise = torch.randn(self.n, weight.shape[1], generator=generator, dtype=torch.float64)
        rows = weight.mean(0).cpu() + weight.std(0).cpu() * noise
        return {"rows": rows.to(_wide(model_map.model))}

    def shapes(self, d: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the values for an embedding of width ``d``."""
        return {"rows": (self.n, d)}


Addition = Adapter | ExtraTokens


@dataclass(frozen=True, eq=False)
class Added:
    """An addition with its values by name.

    Raises:
        EditError: the values do not have the names and shapes that the addition says, or are not finite numbers.
    """

    what: Addition
    values: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        width = next((int(v.shape[-1]) for n, v in self.values.items() if n in ("b2", "rows")), 0)
        expected = self.what.shapes(width)
        found = {name: tuple(value.shape) for name, value in self.values.items()}
        if found != expected:
            raise EditError(
                f"values of an {self.what}: expected tensors of shapes {expected}, got {found}"
            )
        for name, value in self.values.items():
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                raise EditError(
                    f"values of an {self.what}: {name} holds something else than finite numbers"
                )


def made(addition: Addition, model_map: ModelMap, *, seed: int) -> Added:
    """An addition with the values it starts from; the same seed gives the same bits."""
    generator = torch.Generator().manual_seed(seed)
    return Added(addition, addition.start(model_map, generator))


def parse(about: Mapping[str, Any]) -> Addition:
    """Inverse of `Adapter.about` and `ExtraTokens.about`.

    Raises:
        EditError: it describes neither.
    """
    try:
        if about["kind"] == "adapter":
            return Adapter(Site.parse(about["site"]), about["width"])
        if about["kind"] == "extra_tokens":
            return ExtraTokens(about["n"])
    except (KeyError, TypeError, AttributeError, SiteError) as problem:
        raise EditError(f"cannot read the description of an addition: {problem!r}") from problem
    raise EditError(f"unknown addition {about['kind']!r}: expected 'adapter' or 'extra_tokens'")


# -- in place -------------------------------------------------------------------------------------


class Placed:
    """Additions that hooks hold in place on one model. Made by `install`.

    Attributes:
        model: the model.
        what: the additions, in order.
        values: for each of them its tensors by name. Whoever trains them puts other tensors in.
        on: whether forward passes see them.
        ids: ids of the extra tokens among them; empty without any.
    """

    def __init__(self, model: nn.Module, added: Sequence[Added]) -> None:
        self.model, self.on = model, True
        self.what = [each.what for each in added]
        self.values: list[dict[str, Tensor]] = [dict(each.values) for each in added]
        self.ids = range(0)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def added(self) -> tuple[Added, ...]:
        """The additions with the values they have now."""
        return tuple(
            Added(what, {name: value.detach() for name, value in values.items()})
            for what, values in zip(self.what, self.values, strict=True)
        )

    def remove(self) -> None:
        """Take all of them out; nothing stays behind on the model. Again is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def install(model_map: ModelMap, added: Sequence[Added]) -> Placed:
    """Put additions in place on a model, after those that are there already.

    Raises:
        EditError: they do not fit the model. Nothing is in place then.
        SiteError: the model has no such site.
    """
    model = model_map.model
    placed = Placed(model, added)
    device = next(model.parameters()).device
    try:
        for each, values in zip(added, placed.values, strict=True):
            values |= {name: value.to(device) for name, value in values.items()}
            if isinstance(each.what, Adapter):
                _install_adapter(placed, model_map, each.what, values)
            else:
                _install_tokens(placed, each.what, values)
    except BaseException:
        placed.remove()
        raise
    return placed


def installed(model: nn.Module) -> list[Placed]:
    """What is in place on ``model``, in the order it was put there."""
    found: dict[int, Placed] = {}
    for module in model.modules():
        hooks: dict[int, Any] = {**module._forward_pre_hooks, **module._forward_hooks}
        found |= {at: hook.place for at, hook in hooks.items() if isinstance(hook, _Hook)}
    return list(dict.fromkeys(found[at] for at in sorted(found)))


@dataclass(eq=False)
class _Hook:
    """A hook of an addition: where it belongs, and its live values."""

    place: Placed
    values: dict[str, Tensor]

    def value(self, name: str, like: Tensor) -> Tensor:
        """A value on the device of ``like``, to which it moves for good."""
        if self.values[name].device != like.device:
            self.values[name] = self.values[name].to(like.device)
        return self.values[name]


@dataclass(eq=False)
class _Beside(_Hook):
    """Forward hook that adds an adapter's output."""

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if not self.place.on:
            return None
        if isinstance(output, tuple):
            return (self._changed(output[0]), *output[1:])
        return self._changed(output)

    def _changed(self, out: Tensor) -> Tensor:
        down, b1, up, b2 = (self.value(name, out) for name in ("down", "b1", "up", "b2"))
        neurons = F.relu(F.linear(out.to(down.dtype), down, b1))
        return out + F.linear(neurons, up, b2).to(out.dtype)


@dataclass(eq=False)
class _BeforeLookup(_Hook):
    """Pre-hook of the embedding: hides its extra ids from the lookup, and remembers where they were."""

    ids: range
    where: Tensor | None = field(default=None)
    row: Tensor | None = field(default=None)

    def __call__(self, module: nn.Embedding, args: tuple[Any, ...]) -> Any:
        ids = args[0]
        self.where = self.row = None
        if not self.place.on:
            if ids.numel() and int(ids.max()) >= _rows(module):
                raise EditError(
                    f"token {int(ids.max())} is an extra token that is switched off: the base model has no input of "
                    "that id. Leave extra tokens out of what the base model reads"
                )
            return None
        self.where = (ids >= self.ids.start) & (ids < self.ids.stop)
        self.row = (ids - self.ids.start).clamp(0, len(self.ids) - 1)
        return (ids.masked_fill(self.where, 0), *args[1:])


@dataclass(eq=False)
class _AfterLookup(_Hook):
    """Forward hook of the embedding: puts the rows of the extra ids where they were."""

    before: _BeforeLookup

    def __call__(self, module: nn.Embedding, _args: Any, output: Tensor) -> Any:
        where, row = self.before.where, self.before.row
        self.before.where = self.before.row = None
        if where is None or row is None:
            return None
        rows = self.value("rows", output).to(module.weight.dtype)
        return torch.where(where[..., None], _scaled(module, rows[row]).to(output.dtype), output)


def _install_adapter(
    placed: Placed, model_map: ModelMap, adapter: Adapter, values: dict[str, Tensor]
) -> None:
    _check_width(adapter, values["b2"], model_map.d_model)
    module = model_map.read_point(adapter.site).module
    placed._handles.append(module.register_forward_hook(_Beside(placed, values)))


def _install_tokens(placed: Placed, tokens: ExtraTokens, values: dict[str, Tensor]) -> None:
    module = _embedding(placed.model)
    _check_width(tokens, values["rows"], module.weight.shape[1])
    start = _rows(module)
    placed.ids = range(placed.ids.start if placed.ids else start, start + tokens.n)
    before = _BeforeLookup(placed, values, range(start, start + tokens.n))
    placed._handles.append(module.register_forward_pre_hook(before))
    placed._handles.append(module.register_forward_hook(_AfterLookup(placed, values, before)))


def _check_width(what: Addition, value: Tensor, expected: int) -> None:
    if value.shape[-1] != expected:
        raise EditError(
            f"{what} was made for a model of width {value.shape[-1]}, this one has {expected}"
        )


def _rows(module: nn.Embedding) -> int:
    """How many ids the embedding takes now: its rows, and the extra tokens that are on."""
    extra = [hook for hook in _hooks_of(module) if isinstance(hook, _BeforeLookup)]
    return max([module.num_embeddings, *(hook.ids.stop for hook in extra if hook.place.on)])


def _hooks_of(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def _embedding(model: nn.Module) -> nn.Embedding:
    """The input embedding, of which every row times one factor is what the model reads.

    Raises:
        EditError: the model embeds its tokens otherwise.
    """
    getter: Any = getattr(model, "get_input_embeddings", None)
    module = getter() if callable(getter) else None
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise EditError(
            f"extra tokens need an ordinary input embedding, {type(model).__name__} has {type(module).__name__}"
        )
    with torch.no_grad():
        row = module.weight[:1].detach()
        first = torch.zeros(1, dtype=torch.long, device=row.device)
        if not torch.equal(module.forward(first), _scaled(module, row)):  # without its hooks
            raise EditError(
                f"extra tokens need an embedding that looks rows up, {type(module).__name__} does more than that"
            )
    return module


def _scaled(module: nn.Embedding, rows: Tensor) -> Tensor:
    """Rows as the embedding hands them out: some families' embeddings multiply them by a factor of their own."""
    scale = getattr(module, "embed_scale", None)
    return (
        rows if scale is None else rows * torch.as_tensor(scale, device=rows.device).to(rows.dtype)
    )


def _wide(model: nn.Module) -> torch.dtype:
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


def _check_size(what: str, n: Any) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise EditError(f"{what} must be a whole number of at least 1, got {n!r}")
