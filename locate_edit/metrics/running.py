"""How metrics run models: in evaluation mode, on batches whose logits fit in memory, and side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from circuits.forward import output_projection
from locate_edit.errors import PromptError
from locate_edit.prompts import Batch, PromptSet

__all__ = [
    "compare_labels",
    "evaluating",
    "label_kl",
    "normalised",
    "row_blocks",
    "scored_batches",
]

# Logits of one batch are kept below this many numbers (512 MB in float32); a larger batch is split.
_MOST_LOGITS = 2**27
# Numbers of logits worked on at once. A few tensors of this size are needed: on a CPU they stay in its cache, where a
# pass over them costs a quarter of one over main memory, and on a GPU they keep it busy.
_CHUNK = {"cpu": 2**18, "gpu": 2**24}


def scored_batches(model: nn.Module, prompts: PromptSet, batch_size: int) -> Iterator[Batch]:
    """Batches of all items on the model's device, split where their logits would be too large to hold."""
    head = dict(output_projection(model).named_parameters())
    vocab = head["weight"].shape[0] if "weight" in head else 1
    device = next(model.parameters()).device
    waiting = prompts.batches(batch_size)[::-1]
    while waiting:
        batch = waiting.pop()
        n_items = len(batch.items)
        if n_items > 1 and len(batch.label) * vocab > _MOST_LOGITS:
            halves = (batch.items[: n_items // 2], batch.items[n_items // 2 :])
            waiting += [prompts.batch(half) for half in reversed(halves)]
            continue
        yield batch.to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) while the context is open; each module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def normalised(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax `row vocab`, place of the first largest logit `row 1`, and log sum exp `row 1` (float64), of logits."""
    if logits.device.type == "cpu":  # several times as fast as torch's
        top = torch.from_numpy(logits.numpy().argmax(axis=-1))[:, None]
    else:
        top = logits.argmax(-1, keepdim=True)
    probability = torch.softmax(logits, dim=-1)
    # The largest share is 1 / sum exp(logit - largest logit), accurate also where other shares vanish.
    share = probability.gather(-1, top).double()
    return probability, top, logits.gather(-1, top).double() - share.log()


def label_kl(wanted: Tensor, got: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(got)) at each label: `label` (nats), from two sets of logits `label vocab`.

    Raises:
        PromptError: the vocabularies differ in size.
    """
    _check_vocabularies(wanted, got)
    blocks = zip(row_blocks(wanted), row_blocks(got), strict=True)
    return torch.cat([_kl(*_compared(mine, theirs)[:2]) for mine, theirs in blocks])


def compare_labels(wanted: Tensor, got: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How two sets of logits `label vocab` differ at each label: three tensors of `label` (nats).

    KL(softmax(wanted) || softmax(got)), as `label_kl`; the Jensen-Shannon divergence KL(wanted || m) / 2 + KL(got || m)
    / 2 with m the mean of the two distributions, at most log 2; and the log-probability of ``label`` under `wanted`.

    Raises:
        PromptError: the vocabularies differ in size.
    """
    _check_vocabularies(wanted, got)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    labels = row_blocks(label, wanted.shape[-1])
    for p_logits, q_logits, own in zip(row_blocks(wanted), row_blocks(got), labels, strict=True):
        p, ratio, q, normaliser = _compared(p_logits, q_logits)
        # log(p / m) = log 2 - log(1 + q / p), and log(q / m) is that and log(q / p).
        above = math.log(2) - torch.nn.functional.softplus(ratio)
        kl = _kl(p, ratio)
        js = torch.linalg.vecdot(p, above) + torch.linalg.vecdot(q, above.add_(ratio))
        chosen = p_logits.gather(-1, own[:, None]).double() - normaliser
        found.append((kl, (js / 2).clamp(min=0.0), chosen[:, 0]))
    divergence, shannon, logprob = (torch.cat(parts) for parts in zip(*found, strict=True))
    return divergence, shannon, logprob


def _compared(wanted: Tensor, got: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, log(q / p), q, each `row vocab`, and log sum exp of `wanted` `row 1`, for the softmaxes p and q of the two."""
    p, _, above = normalised(wanted)
    q, _, below = normalised(got)
    return p, (got - wanted).add_((above - below).to(got.dtype)), q, above


def _kl(p: Tensor, ratio: Tensor) -> Tensor:
    """KL(p || q) of each row, from p and log(q / p)."""
    divergence: Tensor = 0.0 - torch.linalg.vecdot(p, ratio)
    # Rounding can leave a divergence of nothing slightly below zero.
    return divergence.clamp(min=0.0)


def row_blocks(tensor: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    """Blocks of the rows of a tensor, such that as many rows of `width` numbers fit into what is worked on at once.

    Args:
        tensor: what is split along its first axis.
        width: numbers a row; None takes the tensor's last axis.
    """
    numbers = _CHUNK["cpu" if tensor.device.type == "cpu" else "gpu"]
    rows = max(1, numbers // (tensor.shape[-1] if width is None else width))
    return tuple(tensor.split(rows))


def _check_vocabularies(wanted: Tensor, got: Tensor) -> None:
    if wanted.shape != got.shape:
        raise PromptError(
            f"cannot compare models with vocabularies of {wanted.shape[-1]} and {got.shape[-1]} tokens. "
            "Oracle and edited model must be the same kind of model."
        )
