from __future__ import annotations

import pytest
import torch

from circuits.errors import UnknownFamily
from circuits.layout import Weight, unfold

SIZES = {"head": 2, "kv_head": 2, "d_head": 3, "d_model": 5, "neuron": 4, "slot": 4, "expert": 3}


def stored(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


# layout, storage shape, axes of the view, and what an index of the view must be in storage (worked out by hand)
CASES = [
    ("x | neuron d_model", (4, 5), ("neuron", "d_model"), (1, 2), (1, 2)),
    ("x | d_model neuron", (5, 4), ("d_model", "neuron"), (1, 2), (1, 2)),
    ("x | (head d_head) d_model", (6, 5), ("head", "d_head", "d_model"), (1, 2, 4), (5, 4)),
    ("x | d_model (qkv head d_head) @ qkv=1", (5, 18), ("d_model", "head", "d_head"), (3, 1, 2), (3, 6 + 3 + 2)),
    ("x | (head qkv d_head) d_model @ qkv=2", (18, 5), ("head", "d_head", "d_model"), (1, 1, 0), (9 + 6 + 1, 0)),
    ("x | (kv_head slot d_head) d_model @ slot=:-2", (24, 5), ("kv_head", "slot", "d_head", "d_model"), (1, 1, 2, 3),
     (12 + 3 + 2, 3)),
    ("x | (kv_head slot d_head) d_model @ slot=-1", (24, 5), ("kv_head", "d_head", "d_model"), (1, 0, 3), (12 + 9, 3)),
    ("x | (neuron + head d_head + head d_head) d_model @ 2", (16, 5), ("head", "d_head", "d_model"), (1, 1, 1),
     (4 + 6 + 3 + 1, 1)),
    ("x:y | expert (two neuron) d_model @ two=1", (3, 8, 5), ("expert", "neuron", "d_model"), (2, 3, 1), (2, 4 + 3, 1)),
    ("x:y | expert d_model (neuron two) @ two=1", (3, 5, 8), ("expert", "d_model", "neuron"), (2, 1, 3), (2, 1, 7)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shape", "axes", "index", "storage"), CASES)
def test_unfold_by_hand(
    text: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    index: tuple[int, ...],
    storage: tuple[int, ...],
) -> None:
    weight = Weight(text)
    tensor = stored(*shape)
    view = unfold(tensor, weight, SIZES)
    assert weight.layout.axes == axes
    assert view.dim() == len(axes)
    assert view[index] == tensor[storage]
    view[index] = -1  # a view, not a copy
    assert tensor[storage] == -1
    assert int((tensor == -1).sum()) == 1


def test_three_fused_weights_share_out_every_entry_once() -> None:
    for axes in ("(head qkv d_head) d_model", "(qkv head d_head) d_model"):
        tensor = torch.zeros(18, 5)
        for i in range(3):
            unfold(tensor, Weight(f"x | {axes} @ qkv={i}"), SIZES).add_(1)
        assert bool((tensor == 1).all())


def test_unfold_works_on_strided_tensors() -> None:
    tensor = stored(5, 12)[:, ::2]
    view = unfold(tensor, Weight("x | d_model (head d_head)"), SIZES)
    assert view[3, 1, 2] == tensor[3, 5]
    assert view.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    ("text", "contracted", "axes"),
    [
        ("x | (head d_head) d_model", ("d_model",), ("head", "d_head")),
        ("x | d_model (qkv head d_head) @ qkv=0", ("d_model",), ("head", "d_head")),
        ("x | d_model neuron", ("neuron",), ("d_model",)),
        ("x:y | expert d_model (neuron two) @ two=0", ("d_model",), ("expert", "neuron")),
        ("x:y | expert neuron d_model", ("neuron",), ("expert", "d_model")),
    ],
)
def test_a_bias_has_the_axes_that_are_not_summed_over(
    text: str, contracted: tuple[str, ...], axes: tuple[str, ...]
) -> None:
    assert Weight(text).bias_layout(contracted).axes == axes


def test_the_bias_of_a_block_is_in_the_same_block() -> None:
    weight = Weight("x | (neuron + head d_head) d_model @ 1")
    assert unfold(torch.arange(10), weight.bias_layout(("d_model",)), SIZES).tolist() == [
        [4, 5, 6],
        [7, 8, 9],
    ]


def test_where_a_weight_is() -> None:
    plain, stacked = (
        Weight("mlp.down_proj | d_model neuron"),
        Weight("mlp.experts:down_proj | expert neuron d_model"),
    )
    assert (plain.path, plain.parameter, plain.bias_parameter) == (
        "mlp.down_proj",
        "weight",
        "bias",
    )
    assert (stacked.path, stacked.parameter, stacked.bias_parameter) == (
        "mlp.experts",
        "down_proj",
        "down_proj_bias",
    )


def test_a_wrong_shape_names_both() -> None:
    with pytest.raises(UnknownFamily, match=r"expected shape \(6, 5\), got \(5, 6\)"):
        unfold(torch.zeros(5, 6), Weight("x | (head d_head) d_model"), SIZES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "expected 'path | axes'"),
        ("x |", "cannot read the axes ''"),
        ("x | (a b", r"cannot read the axes '\(a b'"),
        ("x | a b @ a=one", "cannot read the index 'a=one'"),
        ("x | a b @ c=1", r"no axis \['c'\] to fix an index of"),
        ("x | (a + b) c @ 2", "there is no block 2"),
    ],
)
def test_malformed_layouts_fail_where_they_are_written(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weight(text)
