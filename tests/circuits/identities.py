"""Output equalities that a correct description of a model must satisfy, whatever its weights.

Each returns `Gap`s: how far two changes that must have the same effect differ in the model's output, and how large that
effect is. They need no reference model, and see what shape checks cannot: square matrices read the wrong way round,
interleaved for concatenated, keys for values, gate for up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from circuits.families import CONTRACTED
from circuits.hooks import capture, replace
from circuits.layout import Layout, unfold
from circuits.model_map import ModelMap, Slice
from circuits.sites import Site
from tests.tiny import token_ids

IDS = token_ids(2, 7)


@dataclass(frozen=True)
class Gap:
    """Largest difference between two outputs that must agree, and largest effect of the change on the output."""

    what: str
    difference: float
    effect: float

    @property
    def holds(self) -> bool:
        """Whether the two agree. Models run in float64, but several families normalise in float32."""
        return self.difference <= 1e-5 * max(1.0, self.effect)


def output(model: Any) -> Tensor:
    """Logits of the fixed tokens, or hidden states of a model without a head."""
    with torch.no_grad():
        out = model(IDS)
    shown: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return shown


@contextmanager
def restored(model: Any) -> Iterator[None]:
    """Put every parameter back afterwards."""
    saved = [(p, p.detach().clone()) for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in saved:
                p.copy_(value)


def fill(slices: Sequence[Slice], units: Tensor) -> None:
    """Set all weights of some units to zero."""
    rescale(slices, units, 0.0)


def rescale(slices: Sequence[Slice], units: Tensor, factor: float, offset: float = 0.0) -> None:
    """Multiply what some units compute by a factor, given that ``offset`` is added to it afterwards.

    ``factor (w x + b + offset) = (factor w) x + (factor (b + offset) - offset) + offset``
    """
    for piece in slices:
        chosen = units.reshape(piece.unit_shape)
        is_bias = piece.view.dim() == piece.unit_ndim
        added = (factor - 1) * offset if is_bias else 0.0
        piece.view[chosen] = factor * piece.view[chosen] + added


def compare(
    model_map: ModelMap, what: str, one: Callable[[], None], other: Callable[[], None]
) -> Gap:
    """The gap between the outputs after two changes of the weights."""
    model = model_map.model
    base = output(model)
    results = []
    for change in (one, other):
        with restored(model):
            change()
            results.append(output(model))
    a, b = results
    return Gap(what, float((a - b).abs().max()), float((b - base).abs().max()))


def some(model_map: ModelMap, site: Site) -> Tensor:
    """A random half of a site's units."""
    generator = torch.Generator().manual_seed(site.layer or 0)
    return torch.rand(model_map.shape(site), generator=generator) < 0.5


def roles(model_map: ModelMap, site: Site, *names: str) -> list[Slice]:
    """The slices of a site that belong to the given roles."""
    return [piece for piece in model_map.slices(site) if piece.role in names]


def mlp_layers(model_map: ModelMap) -> list[tuple[Site, Tensor]]:
    """The neuron sites with a random half of their units."""
    return [(site, some(model_map, site)) for site in model_map.sites("neuron")]


def neurons_read_is_write(model_map: ModelMap) -> Iterator[Gap]:
    """(1) Without its gate rows and bias, or without its up rows and bias, a neuron writes nothing: act(0) = 0.

    Where the activation adds an offset to up, "without" is the row that makes the sum vanish.
    """
    for site, units in mlp_layers(model_map):
        down = roles(model_map, site, "down")
        for role in ("gate", "up"):
            pieces = roles(model_map, site, role)
            if not pieces:
                continue
            silence = partial(
                rescale, pieces, units, 0.0, model_map.family.up_offset if role == "up" else 0.0
            )
            yield compare(model_map, f"{site} {role}", silence, partial(fill, down, units))


def values_are_output_columns(model_map: ModelMap) -> Iterator[Gap]:
    """(2) Without value rows and bias, the heads of a group write nothing."""
    for site in model_map.sites("kv_head"):
        values = roles(model_map, site, "v")
        columns = roles(model_map, Site(site.layer, "head"), "o")
        for kv in torch.eye(model_map.n_kv_heads, dtype=torch.bool):
            heads = model_map.heads_of(kv)
            yield compare(
                model_map,
                f"{site} {kv.tolist()}",
                partial(fill, values, kv),
                partial(fill, columns, heads),
            )


def queries_are_keys(model_map: ModelMap) -> Iterator[Gap]:
    """(3) Without the queries of a group, or without its keys, attention is blind to content: all products are 0.

    Not where queries and keys are normalised over all heads together: there a head without rows changes the others.
    Where a norm has a bias, it is taken away first.
    """
    if model_map.qk_norm == "full":
        return
    with restored(model_map.model):
        for name, p in model_map.model.named_parameters():
            if "layernorm" in name and name.endswith("bias") and ("q_" in name or "k_" in name):
                p.data.zero_()
        for site in model_map.sites("kv_head"):
            keys = roles(model_map, site, "k")
            queries = roles(model_map, Site(site.layer, "head"), "q")
            for kv in torch.eye(model_map.n_kv_heads, dtype=torch.bool):
                heads = model_map.heads_of(kv)
                yield compare(
                    model_map,
                    f"{site} {kv.tolist()}",
                    partial(fill, queries, heads),
                    partial(fill, keys, kv),
                )


def up_scales_like_down(model_map: ModelMap) -> Iterator[Gap]:
    """(4) In a gated MLP, twice the up rows and bias is twice the down column; the gate is not linear."""
    for site, units in mlp_layers(model_map):
        up, down = roles(model_map, site, "up"), roles(model_map, site, "down")
        if not roles(model_map, site, "gate"):
            continue
        twice = partial(rescale, up, units, 2.0, model_map.family.up_offset)
        yield compare(model_map, str(site), twice, partial(rescale, down, units, 2.0))


def queries_act_locally(model_map: ModelMap) -> Iterator[Gap]:
    """(5) A changed query changes what its own position reads, and nothing else; a changed key changes the others.

    Tells queries from keys where nothing else does: identity 3 is symmetric in the two.
    """
    where = 2
    for site in model_map.sites("attn"):
        assert site.layer is not None
        layer = site.layer
        weight, module, _ = model_map.find(layer, "q")
        layout = weight.bias_layout(CONTRACTED["q"])

        nudge = partial(_nudge_query, layout=layout, sizes=model_map.sizes(layer), where=where)
        before = _attention(model_map, site)
        handle = module.register_forward_hook(nudge)
        try:
            moved = (_attention(model_map, site) - before).abs()
        finally:
            handle.remove()
        here = float(moved[0, where].max())
        moved[0, where] = 0.0
        yield Gap(str(site), float(moved.max()), here)


def _nudge_query(
    _module: Any, _args: Any, out: Tensor, *, layout: Layout, sizes: dict[str, int], where: int
) -> Tensor:
    changed = out.clone()
    query = unfold(changed[0, where], layout, sizes)
    query += 3 * torch.randn(query.shape, generator=torch.Generator().manual_seed(0)).to(query)
    return changed


def _attention(model_map: ModelMap, site: Site) -> Tensor:
    """What the attention of a layer adds to the residual stream, `batch pos d_model`."""
    with torch.no_grad(), capture(model_map, [site], stop=True) as acts:
        model_map.model(IDS)
    return acts[site]


def read_points_are_activations(model_map: ModelMap) -> Iterator[Gap]:
    """(6) A neuron or head set to zero on its way through the model is one without its output columns."""
    for kind, role in (("neuron", "down"), ("head", "o")):
        for site in model_map.sites(kind):
            units = some(model_map, site)
            columns = roles(model_map, site, role)
            with restored(model_map.model):
                fill(columns, units)
                without = output(model_map.model)
            keep = (~units).to(without.dtype)
            keep = keep[:, None] if kind == "head" else keep
            with replace(model_map, {site: partial(torch.mul, keep)}):
                zeroed = output(model_map.model)
            base = output(model_map.model)
            yield Gap(
                str(site),
                float((zeroed - without).abs().max()),
                float((without - base).abs().max()),
            )


def blocks_are_sums_of_units(model_map: ModelMap) -> Iterator[Gap]:
    """(7) Captured neurons times down columns, plus bias, is the captured MLP output; heads likewise for attention."""
    for layer in range(model_map.n_layers):
        for kind, block, role in (("neuron", "mlp", "down"), ("head", "attn", "o")):
            unit_site, block_site = Site(layer, kind), Site(layer, block)
            if model_map.read_point(unit_site).where == "experts":
                continue
            with torch.no_grad(), capture(model_map, [unit_site, block_site]) as acts:
                model_map.model(IDS)
            (columns,) = roles(model_map, unit_site, role)
            view = columns.view.movedim(columns.axes.index("d_model"), -1)
            total = torch.tensordot(acts[unit_site], view, dims=view.dim() - 1)
            bias = model_map.bias_view(layer, role)
            total = total if bias is None else total + bias
            expected = acts[block_site]
            yield Gap(
                f"{unit_site}", float((total - expected).abs().max()), float(expected.abs().max())
            )


IDENTITIES: dict[str, Callable[[ModelMap], Iterator[Gap]]] = {
    f.__name__: f
    for f in (
        neurons_read_is_write,
        values_are_output_columns,
        queries_are_keys,
        up_scales_like_down,
        queries_act_locally,
        read_points_are_activations,
        blocks_are_sums_of_units,
    )
}
