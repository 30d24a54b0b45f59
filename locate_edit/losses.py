"""Losses over labelled tokens, on float32 logits `label vocab` or log-probabilities `label`.

Every function is differentiable and says how it averages. ``item`` (`label` int64) tells which
prompt a label belongs to; ``n`` is the number of prompts of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def per_item_sum(values: Tensor, item: Tensor, n: int) -> Tensor:
    """Sum of per-label ``values`` `label` over each prompt: `item`."""
    return torch.zeros(n, dtype=values.dtype, device=values.device).index_add(0, item, values)


def per_item_mean(values: Tensor, item: Tensor, n: int, weight: Tensor | None = None) -> Tensor:
    """(Weighted) mean of per-label ``values`` `label` over each prompt: `item`; 0 for a prompt of zero weight."""
    weight = torch.ones_like(values) if weight is None else weight.to(values.dtype)
    total, mass = per_item_sum(values * weight, item, n), per_item_sum(weight, item, n)
    return total / torch.where(mass > 0, mass, torch.ones_like(mass))


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) in nats at each label: `label`, from two sets of logits `label vocab`."""
    log_p, log_q = F.log_softmax(reference, dim=-1), F.log_softmax(logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def npo(log_prob: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation loss of each prompt: `item`, in nats.

    ``2/beta * log(1 + (p / p_ref)^beta)`` of whole-target log-probabilities, i.e. ``-2/beta * log
    sigmoid(-beta * (log p
    - log p_ref))`` (Zhang et al. 2024, eq. 3). Its gradient is that of gradient ascent as beta goes to 0.
    """
    return -2.0 / beta * F.logsigmoid(-beta * (log_prob - reference))
