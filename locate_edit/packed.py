"""Forward passes that learn only the packed slices of a frozen model.

The model's parameters hold the current values and never require a gradient. For the time of a training run the modules
that own a touched parameter get a patched ``forward``: its result is the module's own, its backward computes

- the gradient with respect to the input, as always, and only if something below needs it;
- the gradient of the *selected* rows or columns, a thin matrix product that lands in the packed leaf tensor.

A gradient of a parameter's full size exists only for scattered masks (`Entries`, `Dense`) and
stacked expert weights; it is gathered at once and freed before the next module's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from locate_edit.slots import Lines, Selection, Slot

Forward = Callable[..., Any]


@contextmanager
def packed_forward(
    model: nn.Module, slots: Sequence[Slot], packed: Sequence[Tensor]
) -> Iterator[None]:
    """Let forward passes of ``model`` send gradients into ``packed`` (one leaf tensor a slot) while
    the context is open.

    Every module's ``forward`` is restored on exit, also after an exception.
    """
    by_parameter = {
        id(slot.parameter): (slot, leaf) for slot, leaf in zip(slots, packed, strict=True)
    }
    patched: list[tuple[nn.Module, Forward | None]] = []
    try:
        for module in model.modules():
            owned = {
                name: by_parameter[id(p)]
                for name, p in module._parameters.items()
                if p is not None and id(p) in by_parameter
            }
            if owned:
                patched.append((module, module.__dict__.get("forward")))
                module.forward = _patched(module, owned)
        yield
    finally:
        for module, before in patched:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.forward = before


def _patched(module: nn.Module, owned: dict[str, tuple[Slot, Tensor]]) -> Forward:
    """The forward of ``module`` with gradients for its ``owned`` parameters."""
    if isinstance(module, nn.Linear | Conv1D) and set(owned) <= {"weight", "bias"}:
        return _affine_forward(module, owned)
    if isinstance(module, nn.Embedding) and set(owned) == {"weight"}:
        slot, leaf = owned["weight"]
        if (
            isinstance(slot.selection, Lines)
            and slot.selection.dims in ((), (0,))
            and module.max_norm is None
        ):
            return _embedding_forward(module, slot.selection, leaf)
    return _shadowed_forward(module, owned)


# -- linear maps: rows and columns ----------------------------------------------------------------


class _Affine(torch.autograd.Function):
    """A linear module's own forward, and the gradients of its input, selected weight entries and selected biases."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        forward: Forward,
        weight: Tensor,
        input_dim: int,
        weight_selection: Selection | None,
        bias_selection: Selection | None,
    ) -> Tensor:
        """``input_dim`` is the weight's axis that the input is contracted with: 1 for Linear, 0 for Conv1D."""
        ctx.weight, ctx.input_dim, ctx.x_dtype = weight, input_dim, x.dtype
        ctx.weight_selection, ctx.bias_selection = weight_selection, bias_selection
        ctx.leaf_dtypes = (_dtype(weight_leaf), _dtype(bias_leaf))
        kept = None
        if weight_selection is not None:
            kept = x
            if isinstance(weight_selection, Lines) and weight_selection.dims == (input_dim,):
                kept = x.index_select(
                    -1, weight_selection.index[0]
                )  # only the selected inputs matter
        ctx.save_for_backward(kept)
        y: Tensor = forward(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        weight, input_dim = ctx.weight, ctx.input_dim
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            across = weight if input_dim == 1 else weight.t()
            grad_x = (flat @ across.to(grad.dtype)).to(ctx.x_dtype)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        if ctx.needs_input_grad[1]:
            inputs = kept.reshape(-1, kept.shape[-1]).to(grad.dtype)
            grad_weight = _weight_gradient(inputs, flat, ctx.weight_selection, input_dim).to(
                ctx.leaf_dtypes[0]
            )
        if ctx.needs_input_grad[2]:
            grad_bias = ctx.bias_selection.gather(flat.sum(0, dtype=ctx.leaf_dtypes[1]))
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _weight_gradient(
    inputs: Tensor, outputs: Tensor, selection: Selection, input_dim: int
) -> Tensor:
    """Packed gradient of a weight from its inputs (selected already, where they are) and output gradients."""
    if isinstance(selection, Lines) and len(selection.dims) <= 1:
        if selection.dims == (1 - input_dim,):
            outputs = outputs.index_select(1, selection.index[0])
        return outputs.t() @ inputs if input_dim == 1 else inputs.t() @ outputs
    full = outputs.t() @ inputs if input_dim == 1 else inputs.t() @ outputs
    return selection.gather(full)


def _affine_forward(module: nn.Linear | Conv1D, owned: dict[str, tuple[Slot, Tensor]]) -> Forward:
    forward, weight = module.forward, module.weight.detach()
    weight_selection, weight_leaf = _part(owned, "weight")
    bias_selection, bias_leaf = _part(owned, "bias")
    input_dim = 0 if isinstance(module, Conv1D) else 1

    def patched(x: Tensor) -> Tensor:
        y: Tensor = _Affine.apply(
            x, weight_leaf, bias_leaf, forward, weight, input_dim, weight_selection, bias_selection
        )
        return y

    return patched


# -- embeddings: vocabulary rows ------------------------------------------------------------------


class _Lookup(torch.autograd.Function):
    """An embedding's own forward, and the gradient of its selected rows."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, leaf: Tensor, forward: Forward, place: Tensor) -> Tensor:
        """``place`` is `vocab`: the packed row of every token, or the number of packed rows for tokens left out."""
        ctx.save_for_backward(ids)
        ctx.place, ctx.shape, ctx.dtype = place, leaf.shape, leaf.dtype
        y: Tensor = forward(ids)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        n_rows, width = ctx.shape
        # One row more than needed takes the gradients of tokens left out.
        total = torch.zeros(n_rows + 1, width, dtype=ctx.dtype, device=grad.device)
        rows = ctx.place[ids].reshape(-1)
        total.index_add_(0, rows, grad.reshape(-1, width).to(ctx.dtype))
        return None, total[:n_rows], None, None


def _embedding_forward(module: nn.Embedding, selection: Lines, leaf: Tensor) -> Forward:
    forward, n_rows = module.forward, len(leaf)
    place = torch.full((module.num_embeddings,), n_rows, device=leaf.device)
    index = selection.index[0] if selection.dims else torch.arange(n_rows, device=leaf.device)
    place[index] = torch.arange(n_rows, device=leaf.device)
    if module.padding_idx is not None:
        place[module.padding_idx] = n_rows  # this row never receives a gradient in torch either

    def patched(ids: Tensor) -> Tensor:
        y: Tensor = _Lookup.apply(ids, leaf, forward, place)
        return y

    return patched


# -- anything else: norms, stacked experts, routers -----------------------------------------------


class _Shadow(torch.autograd.Function):
    """A frozen parameter as a graph node: its value now, its gathered gradient later."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, parameter: Tensor, selection: Selection) -> Tensor:
        ctx.selection, ctx.dtype = selection, leaf.dtype
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.selection.gather(grad).to(ctx.dtype), None, None


def _shadowed_forward(module: nn.Module, owned: dict[str, tuple[Slot, Tensor]]) -> Forward:
    forward = module.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        # An instance attribute is found before the registered parameter, so the module's own code sees the graph node.
        for name, (slot, leaf) in owned.items():
            module.__dict__[name] = _Shadow.apply(leaf, slot.parameter.detach(), slot.selection)
        try:
            return forward(*args, **kwargs)
        finally:
            for name in owned:
                del module.__dict__[name]

    return patched


def _part(
    owned: dict[str, tuple[Slot, Tensor]], name: str
) -> tuple[Selection | None, Tensor | None]:
    if name not in owned:
        return None, None
    slot, leaf = owned[name]
    return slot.selection, leaf


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype
