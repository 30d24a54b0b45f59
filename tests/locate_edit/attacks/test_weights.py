"""Attacks on the weights: rounding and pruning, by hand and on edits that hide behind small changes."""

from __future__ import annotations

import pytest
import torch

from locate_edit import EditError, organism
from locate_edit.attacked import changed_weights
from locate_edit.attacks.pruning import Pruning
from locate_edit.attacks.quantisation import Quantisation
from tests.locate_edit.engine_setting import model, prompts


def test_rounding_by_hand() -> None:
    weight = torch.tensor([[1.4, -0.4, 0.6, -0.25], [0.0, 0.0, 0.0, 0.0]])
    # three bits: levels of max/3
    scale = 1.4 / 3
    wanted = torch.tensor([[3, -1, 1, -1], [0, 0, 0, 0]]) * scale
    assert torch.allclose(Quantisation(bits=3).rounded(weight), wanted)
    grouped = Quantisation(bits=2, group=2).rounded(weight)
    assert torch.allclose(grouped, torch.tensor([[1.4, 0.0, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_eight_bits_change_little_and_two_much() -> None:
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    errors = [
        float((Quantisation(bits=b).rounded(weight) - weight).norm() / weight.norm()) for b in (8, 4, 2)
    ]  # fmt: skip
    assert errors[0] < 0.02 < errors[1] < 0.3 < errors[2]


def test_pruning_by_hand() -> None:
    weight = torch.tensor([[3.0, -0.5, 0.5], [-2.0, 0.1, 1.0]])
    assert Pruning(share=0.5).pruned(weight).tolist() == [[3.0, 0.0, 0.0], [-2.0, 0.0, 1.0]]
    assert torch.equal(Pruning(share=0.0).pruned(weight), weight)


def test_conv1d_is_rounded_by_output() -> None:
    """GPT-2 stores `in out`; the levels must be those of an output all the same."""
    net = model("gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    before = dict(net.named_parameters())[name].detach().clone()
    seen = {}

    def look(*_: object) -> None:
        seen[name] = dict(net.named_parameters())[name].detach().clone()

    handle = net.register_forward_pre_hook(look)
    Quantisation(bits=3)(net, prompts("gpt2")[0])
    handle.remove()
    assert torch.allclose(seen[name], Quantisation(bits=3).rounded(before.T).T)
    assert len(seen[name][:, 0].unique()) <= 7


def test_the_control_of_groups_is_found() -> None:
    """The largest weight of each group sets its scale: a control that moved it would round to something else."""
    net, forget = organism.load()[0], organism.prompts("facts", "forget01")
    attack = Quantisation(group=64)
    with attack.hide(net, forget):
        found = attack(net, forget)
    assert found.forget_clean.estimate == pytest.approx(0.0, abs=0.1)
    assert found.forget.estimate == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Quantisation(bits=1), "bits must be 2 to 8"),
        (lambda: Quantisation(group=0), "group must be at least 1"),
        (lambda: Pruning(share=1.0), "below 1"),
    ],
)
def test_bad_settings(make: object, says: str) -> None:
    with pytest.raises(EditError, match=says):
        make()  # type: ignore[operator]


def test_a_new_value_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    net = model("llama-tied")
    before = {n: p.clone() for n, p in net.named_parameters()}
    with (
        pytest.raises(EditError, match="the model was restored"),
        changed_weights(net, lambda name, w: w * (float("nan") if "layers.1" in name else 2.0)),
    ):
        pass
    assert all(torch.equal(before[n], p) for n, p in net.named_parameters())
