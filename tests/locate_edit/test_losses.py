"""Losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from circuits.forward import token_log_probs
from locate_edit.losses import kl_divergence, npo, per_item_mean, per_item_sum


def test_sums_and_means_of_each_prompt() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    item = torch.tensor([0, 0, 0, 2])
    assert per_item_sum(values, item, 3).tolist() == [6.0, 0.0, 10.0]
    assert per_item_mean(values, item, 3).tolist() == [2.0, 0.0, 10.0]
    weight = torch.tensor([1.0, 0.0, 3.0, 2.0])  # (1*1 + 3*3) / 4
    assert per_item_mean(values, item, 3, weight).tolist() == [2.5, 0.0, 10.0]


def test_log_probability_of_labels() -> None:
    logits = torch.tensor(
        [[math.log(1.0), math.log(3.0)], [0.0, 0.0]]
    )  # p = (1/4, 3/4), (1/2, 1/2)
    found = token_log_probs(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(found, torch.tensor([math.log(0.75), math.log(0.5)]))


def test_kl_divergence() -> None:
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3); the other way round is another number.
    p, q = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3.0)]])
    assert float(kl_divergence(p, q)) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-7)
    # KL((1/4, 3/4) || (1/2, 1/2)) = 1/4 ln(1/2) + 3/4 ln(3/2)
    assert float(kl_divergence(q, p)) == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7
    )


def test_npo_value_and_gradient() -> None:
    # At the base model the ratio is 1: loss 2/beta * ln 2, gradient with respect to log p exactly 1 (that of ascent).
    log_prob = torch.tensor([-3.0], requires_grad=True)
    loss = npo(log_prob, torch.tensor([-3.0]), beta=0.5)
    assert loss.item() == pytest.approx(4 * math.log(2), abs=1e-6)
    loss.backward()
    assert float(log_prob.grad) == pytest.approx(1.0)  # type: ignore[arg-type]
    # Two nats below the base with beta 0.5: ratio^beta = 1/e, loss 4 ln(1 + 1/e), gradient 2 * sigmoid(-1).
    log_prob = torch.tensor([-5.0], requires_grad=True)
    loss = npo(log_prob, torch.tensor([-3.0]), beta=0.5)
    assert loss.item() == pytest.approx(4 * math.log1p(math.exp(-1)), abs=1e-6)
    loss.backward()
    assert float(log_prob.grad) == pytest.approx(2 / (1 + math.e), abs=1e-6)  # type: ignore[arg-type]
