"""Forward passes that build logits only where something is scored.

A language model's output projection is often its most expensive matrix, and its logits the largest tensor of a
forward pass. Losses and metrics need them at a few labelled positions only, so the positions are gathered *before* the
projection: a pre-hook on the model's own output embedding replaces the hidden states ``batch pos d_model`` by the
selected rows. Everything the model does after the projection (scaling, soft-capping) still happens, so this works for
every family without re-implementing a head.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from circuits.errors import SiteError


class Labelled(Protocol):
    """Inputs of one forward pass with the places where logits are wanted.

    ``input_ids`` and ``attention_mask`` are `row token`; ``row`` and ``pos`` are `label` and name the hidden states
    that predict the labels.
    """

    @property
    def input_ids(self) -> Tensor:
        """See the class."""

    @property
    def attention_mask(self) -> Tensor:
        """See the class."""

    @property
    def row(self) -> Tensor:
        """See the class."""

    @property
    def pos(self) -> Tensor:
        """See the class."""


def output_projection(model: nn.Module) -> nn.Module:
    """The module that maps hidden states to vocabulary logits.

    Raises:
        SiteError: the model has no such module (a bare encoder, a classifier).
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        raise SiteError(
            f"{type(model).__name__} has no output embeddings: expected a causal or masked language model "
            "(AutoModelForCausalLM / AutoModelForMaskedLM), got a model without a vocabulary head"
        )
    return head


def labelled_logits(model: nn.Module, batch: Labelled) -> Tensor:
    """Logits `label vocab` (float32) at the positions of ``batch`` that predict its labels.

    Gradients flow as in an ordinary forward pass. Rows and positions that are not labelled cost no output
    projection. The key-value cache is off.
    """

    def gather(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args  # `row token d_model`
        return (hidden[batch.row, batch.pos].unsqueeze(0), *rest)

    handle = output_projection(model).register_forward_pre_hook(gather)
    try:
        logits: Tensor = model(**model_inputs(model, batch)).logits
    finally:
        handle.remove()
    return logits.squeeze(0).float()


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Natural-log probability `label` of each label under ``logits`` `label vocab`.

    Computed as the label's logit minus the log-sum-exp, a block of rows at a time: the log-probabilities
    of the rest of the vocabulary are never stored, and the backward pass makes one tensor of the size
    of the logits, their gradient. Differentiable once.
    """
    found: Tensor = _TokenLogProbs.apply(logits, labels)
    return found


class _TokenLogProbs(torch.autograd.Function):
    """`token_log_probs` and its gradient, ``grad * (one_hot(label) - softmax(logits))``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        rows = _rows_of_block(logits)
        total = torch.cat([torch.logsumexp(block, dim=-1) for block in logits.split(rows)])
        ctx.save_for_backward(logits, labels, total)
        return logits.gather(-1, labels[:, None])[:, 0] - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels, total = ctx.saved_tensors
        rows = _rows_of_block(logits)
        into = torch.empty_like(logits)
        for there, block, subtract, scale in zip(
            *(tensor.split(rows) for tensor in (into, logits, total, grad)), strict=True
        ):
            torch.sub(block, subtract[:, None], out=there).exp_().mul_(-scale[:, None])
        into.scatter_add_(1, labels[:, None], grad[:, None])
        return into, None


def _rows_of_block(logits: Tensor) -> int:
    """Rows handled at once: on a CPU as many as stay in its cache, on a GPU as many as keep it busy."""
    entries = 2**26 if logits.is_cuda else 2**18
    return max(1, entries // logits.shape[-1])


def model_inputs(model: nn.Module, batch: Labelled) -> dict[str, Any]:
    """Keyword arguments of a forward pass over ``batch`` without a key-value cache."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if (
        getattr(getattr(model, "config", None), "use_cache", None) is not None
    ):  # encoders have no such setting
        inputs["use_cache"] = False
    return inputs


def cache_name(model: nn.Module) -> str:
    """What a causal model's forward pass, and what it returns, call the key-value cache.

    `cache` from transformers 5.24 on, where the older name warns; `past_key_values` before.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
