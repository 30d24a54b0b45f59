"""Attacks on the weights: rounding and pruning, by hand and on edits that hide behind small changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from locate_edit import EditError, PromptSet, organism
from locate_edit.attacked import Attack, changed_weights
from locate_edit.attacks.pruning import Pruning
from locate_edit.attacks.quantisation import Quantisation
from tests.locate_edit.engine_setting import model, prompts
from tests.tiny import tiny


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


def attacked(net: nn.Module, attack: Attack, forget: PromptSet) -> dict[str, Tensor]:
    """The weights that the last forward pass of an attack's changed model runs with."""
    seen: dict[str, Tensor] = {}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    def look(*_: object) -> None:
        now = {name: p.detach().clone() for name, p in net.named_parameters()}
        if not all(torch.equal(now[name], before[name]) for name in now):
            seen.update(now)

    handle = net.register_forward_pre_hook(look)
    attack(net, forget)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformer.h.0.mlp.c_fc.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj"),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj"),
        ("gpt_oss", "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_scales_are_those_of_an_output(family: str, name: str) -> None:
    """GPT-2 stores `in out`, gpt_oss `expert in out`; the levels must be those of an output all the same."""
    net, attack = tiny(family), Quantisation(bits=3)
    before = dict(net.named_parameters())[name].detach().clone()
    found = attacked(net, attack, prompts(family)[0])[name]
    turned = family == "gpt2" or ("experts" in name and family == "gpt_oss")
    by_output = found.mT if turned else found
    assert torch.allclose(by_output, attack.rounded(before.mT if turned else before))
    rows = by_output.reshape(-1, by_output.shape[-1])
    assert all(len(row.unique()) <= 7 for row in rows), "an output has three bits of levels"


@pytest.mark.parametrize("attack", [Quantisation(bits=3), Pruning()], ids=["rounded", "pruned"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "distilbert", "gpt_oss"])
def test_embeddings_of_any_kind_head_and_vectors_stay(family: str, attack: Attack) -> None:
    net = tiny(family)
    stay = {id(p) for m in net.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    stay.add(id(net.get_output_embeddings().weight))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    found = attacked(net, attack, prompts(family)[0])
    for name, parameter in net.named_parameters():
        kept = id(parameter) in stay or parameter.ndim < 2 or name.endswith("bias")
        assert torch.equal(found[name], before[name]) == kept, name
    if family != "gpt_oss":  # which has rotary positions
        assert (
            sum(before[name].ndim == 2 and id(p) in stay for name, p in net.named_parameters()) > 1
        )


def test_each_matrix_of_a_stack_is_pruned_by_its_own_share() -> None:
    matrix = torch.tensor([[3.0, -0.5, 0.5], [-2.0, 0.1, 1.0]])
    stack = torch.stack([matrix, 100 * matrix])
    once = Pruning(share=0.5).pruned(matrix)
    assert torch.equal(Pruning(share=0.5).pruned(stack), torch.stack([once, 100 * once]))
    # The largest entry that may stand in the place of a pruned one is that of its own matrix.
    net, forget = tiny("gpt_oss"), prompts("gpt_oss")[0]
    name = "model.layers.0.mlp.experts.down_proj"
    before = dict(net.named_parameters())[name].detach().clone()
    with Pruning().hide(net, forget):
        hidden = dict(net.named_parameters())[name].detach().clone()
    for mine, was in zip(hidden, before, strict=True):
        assert torch.allclose(Pruning().pruned(mine.mT), Pruning().pruned(was.mT))


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
        (lambda: Quantisation(group=0), "group must be a whole number of at least 1"),
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
