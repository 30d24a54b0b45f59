"""Models whose linear layers hold and multiply few-bit numbers, by the library bitsandbytes.

These are the formats of `load_in_8bit` and `load_in_4bit` in transformers: LLM.int8() (Dettmers et al. 2022,
arXiv:2208.07339), and blocks of 4-bit numbers, fp4 or nf4 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from circuits.forward import output_projection
from locate_edit.errors import EditError

Format = Literal["int8", "fp4", "nf4"]
"""int8: each row has a scale, and inputs are rounded as well. fp4, nf4: each `BLOCK` of weights has one."""
BLOCK = 64
OUTLIER = 6.0
"""Inputs beyond this are multiplied in 16 bits by LLM.int8()."""
HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip


def bitsandbytes() -> Any:
    """The library.

    Raises:
        EditError: it is not installed.
    """
    try:
        import bitsandbytes as library
    except ImportError as problem:
        raise EditError(
            "Quantisation(backend='bitsandbytes') needs a library that is not installed: pip install bitsandbytes, or "
            "round the weights with backend='rounding'"
        ) from problem
    return library


@contextmanager
def low_bit(model: nn.Module, form: Format) -> Iterator[nn.Module]:
    """A copy of the model with its `linear_layers` in a few-bit format; the model itself is only read.

    The layers are never copied at full size, everything else is. Arithmetic is the library's own: 4-bit weights are
    multiplied in 32 bits, as transformers does unless told otherwise.

    Raises:
        EditError: the library is not installed, or the model has weights it cannot hold.
    """
    library = bitsandbytes()
    layers = linear_layers(model)
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    try:
        # One line a layer and pass otherwise, that inputs are cast to 16 bits.
        logger.setLevel(logging.ERROR)
        with torch.no_grad():
            made = {id(each): _layer(library, each, form) for each in layers.values()}
        yield copy.deepcopy(model, made)
    finally:
        logger.setLevel(level)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the library can hold in few bits, by name: linear layers, GPT-2's too, but the output head.

    Raises:
        EditError: there are none, or the model has matrices elsewhere (such as stacked experts) that would silently
            stay as they are. Embeddings do.
    """
    head = output_projection(model)
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and module is not head
    }
    stay = [head, *(m for m in model.modules() if isinstance(m, nn.Embedding))]
    known = {id(p) for module in (*layers.values(), *stay) for p in module.parameters()}
    others = [n for n, p in model.named_parameters() if p.ndim >= 2 and id(p) not in known]
    if others or not layers:
        what = (
            f"{', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}"
            if others
            else "it has no linear layer but its output head"
        )
        raise EditError(
            f"bitsandbytes holds the weights of linear layers, and {type(model).__name__} keeps weights elsewhere: "
            f"{what}. Quantisation(backend='rounding') rounds every matrix"
        )
    return layers


def out_in(layer: nn.Module) -> Tensor:
    """The weight of a linear layer `out in`, whichever way it is stored."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.mT if isinstance(layer, Conv1D) else weight


def same_level(weight: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    """The value that each weight `... out in` gets in a format, and the least and largest weights that get the same.

    Worked out here, not by the library. The largest of a row or block has no room, as the others are measured by it.
    """
    if form == "int8":
        parts = weight.half().float()
        levels = torch.arange(-127, 128, device=weight.device) / 127
    else:
        flat = weight.float().flatten()
        parts = F.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
        code = bitsandbytes().functional.get_4bit_type(form, device=weight.device)
        levels = code.float().unique()
    most = parts.abs().amax(dim=-1, keepdim=True)
    middles = (levels[1:] + levels[:-1]) / 2
    at = torch.bucketize(parts / most.where(most > 0, 1.0), middles)
    largest = (at == 0) | (at == len(levels) - 1)
    edges = F.pad(middles, (1, 1))

    def weights(values: Tensor) -> Tensor:
        return (values * most).flatten()[: weight.numel()].view_as(weight)

    low, high = (levels[at].where(largest, edges[at + side]) for side in (0, 1))
    return weights(levels[at]), weights(low), weights(high)


def _layer(library: Any, layer: nn.Module, form: Format) -> nn.Module:
    """A layer that does what a linear layer does, with few-bit weights, on the same device."""
    weight = out_in(layer).clone(memory_format=torch.contiguous_format)
    if weight.dtype == torch.float64:
        weight = weight.float()  # the widest that the library reads
    n_out, n_in = weight.shape
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    new: Any
    if form == "int8":
        new = library.nn.Linear8bitLt(
            n_in, n_out, bias is not None, has_fp16_weights=False, threshold=OUTLIER, device="meta"
        )
        held = library.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        new = library.nn.Linear4bit(
            n_in, n_out, bias is not None, compute_dtype=torch.float32, compress_statistics=False,
            quant_type=form, device="meta",
        )  # fmt: skip
        # On some processors the library has a faster way, in 16 bits and for widths in 32s alone.
        new.support_avx512bf16_for_cpu = False
        held = library.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=False, quant_type=form, blocksize=BLOCK, module=new
        )  # fmt: skip
    new.weight = held.to(weight.device)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    for hooks in HOOKS:
        getattr(new, hooks).update(getattr(layer, hooks))
    return new  # type: ignore[no-any-return]
