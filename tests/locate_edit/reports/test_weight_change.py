"""The change of every weight, against norms worked out on two copies of the model."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.patches import Rectangle

from circuits import ComponentMask, describe
from circuits.draw import figure_data
from locate_edit.delta import Change, Delta
from locate_edit.draw.edits import weight_change
from locate_edit.editing import Edit, edit
from locate_edit.errors import EditError
from locate_edit.methods.fine_tune import FineTune
from locate_edit.prompts import PromptSet
from locate_edit.reports.weight_change import weight_changes
from locate_edit.slots import Lines
from tests.tiny import byte_tokenizer, tiny

FORGET = PromptSet([("Ann Lee plays", " golf"), ("Bo", " 555-0123")], byte_tokenizer(), name="f")


def trained(model: Any, mask: str | None) -> Edit:
    """A gradient step or two inside a mask."""
    chosen = None if mask is None else ComponentMask.parse(mask, describe(model))
    return edit(model, FineTune(steps=2, lr=0.01), chosen, forget=FORGET)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "mixtral"])
def test_norms_are_those_of_two_models_side_by_side(family: str) -> None:
    model = tiny(family)
    base = describe(copy.deepcopy(model))
    kind = "neuron" if family != "mixtral" else "expert"
    made = trained(model, f"L1.{kind}[1 3]; L0.head[0-3]")
    after, found = describe(model), weight_changes(made)
    changed = 0
    for layer in found.layers:
        for x, role in enumerate(c for c in found.columns if c != "other"):
            if not base.has(layer, role):
                assert math.isnan(found.relative[layer, x])
                continue
            old, new = base.view(layer, role).double(), after.view(layer, role).double()
            expected = float((new - old).norm() / old.norm())
            assert float(found.relative[layer, x]) == pytest.approx(expected, rel=1e-12)
            inside = float(found.selected[layer, x]) > 0
            assert inside == ((layer, role) in places(base, layer, role))
            assert (expected > 0) == inside
            changed += int((new != old).sum())
    assert not bool((found.outside > 0).any())
    assert found.entries_outside == 0
    extra = sum(
        int((a != b).sum())
        for (name, a), (_, b) in zip(
            base.model.named_parameters(), model.named_parameters(), strict=True
        )
    )
    assert found.entries == extra >= changed > 0


def places(model_map: Any, layer: int, role: str) -> set[tuple[int, str]]:
    """What the mask of the test above covers: heads of layer 0 whole, units of the MLP of layer 1."""
    attention = role in ("q", "k", "v", "o")
    return {(layer, role)} if attention == (layer == 0) else set()


def test_by_hand() -> None:
    model = tiny("llama")
    model_map = describe(model)
    up = model_map.view(0, "up")
    with torch.no_grad():
        up.fill_(0.5)  # norm 0.5 * sqrt(24 * 40)
    name = model_map.parameter_name(0, "up")
    selection = Lines((40, 24), (0,), torch.tensor([[2, 5]]))
    old = torch.full((2, 24), 0.5)
    new = old.clone()
    new[1, :4] = 0.5 + 3.0  # norm of the change 3 * sqrt(4)
    mask = ComponentMask.parse("L0.neuron[2 5]", model_map)
    made = Edit(Delta({name: Change(selection, old, new)}), mask=mask)
    found = weight_changes(made, model_map)
    x = found.columns.index("up")
    assert float(found.relative[0, x]) == pytest.approx(6.0 / (0.5 * math.sqrt(960)), rel=1e-12)
    assert float(found.selected[0, x]) == 2 / 40
    zero = found.relative.clone()
    zero[0, x] = 0.0
    assert bool((zero == 0).all())
    assert (found.entries, found.entries_outside) == (4, 0)
    # The same change under a mask of another neuron: all of it is outside.
    elsewhere = Edit(made.delta, mask=ComponentMask.parse("L0.neuron[2 6]", model_map))
    outside = weight_changes(elsewhere, model_map)
    assert torch.equal(outside.outside, found.relative)
    assert outside.entries_outside == 4
    # From nothing to something is an infinite change, not a division by zero.
    zeros = Edit(
        Delta({name: replace(made.delta.changes[name], old=torch.zeros(2, 24))}), mask=mask
    )
    with torch.no_grad():
        up.zero_()
    assert math.isinf(weight_changes(zeros, model_map).relative[0, x])


def test_biases_norms_and_embeddings_are_not_overlooked() -> None:
    model = tiny("gpt2")
    base = copy.deepcopy(model)
    assert "other" not in weight_changes(trained(tiny("llama"), "L0.head[1]")).columns
    made = trained(model, None)
    found = weight_changes(made)
    assert found.columns[-1] == "other"
    old, new = ({n: p.detach() for n, p in m.named_parameters()} for m in (base, model))
    rest = [n for n in old if n.startswith("transformer.h.1.") and old[n].ndim == 1]
    moved = math.sqrt(sum(float((new[n] - old[n]).double().square().sum()) for n in rest))
    norm = math.sqrt(sum(float(old[n].double().square().sum()) for n in rest))
    assert float(found.relative[1, -1]) == pytest.approx(moved / norm, rel=1e-6)
    assert {"transformer.wte.weight", "transformer.ln_f.weight"} <= found.elsewhere.keys()
    assert not any(".h." in name for name in found.elsewhere)
    table = "transformer.wte.weight"
    expected = float((new[table] - old[table]).double().norm() / old[table].double().norm())
    assert found.elsewhere[table] == pytest.approx(expected, rel=1e-6)
    assert not bool((found.outside > 0).any())


def test_the_side_of_the_edit_is_what_its_mask_allows() -> None:
    model = tiny("llama")
    mask = ComponentMask.parse("L0.neuron[1]", describe(model))
    made = edit(model, FineTune(steps=1, lr=0.01), mask, forget=FORGET, side="write")
    found = weight_changes(made)
    selected = dict(zip(found.columns, found.selected[0].tolist(), strict=True))
    assert selected["down"] > 0
    assert selected["up"] == selected["gate"] == 0
    assert not bool((found.outside > 0).any())


def test_an_edit_from_a_folder_needs_a_model_of_the_right_shape(tmp_path: Path) -> None:
    model = tiny("llama")
    made = trained(model, "L0.neuron[1]")
    loaded = Edit.load(made.save(tmp_path / "edit"))
    with pytest.raises(EditError, match="pass model_map=describe"):
        weight_changes(loaded)
    with pytest.raises(EditError, match="does not fit this model"):
        weight_changes(loaded, describe(tiny("gpt2")))
    found = weight_changes(made)
    made.undo()
    again = weight_changes(loaded, describe(model))  # without the edit in place
    assert torch.equal(again.relative, found.relative)


# ---- the figure -----------------------------------------------------------------------------------


def hatched(ax: Any) -> list[tuple[int, int]]:
    """Layer and column of the hatched cells."""
    boxes = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_hatch()]
    return [(round(box.get_y() + 0.5), round(box.get_x() + 0.5)) for box in boxes]


def test_the_map_says_where_and_how_much_and_hatches_what_left_the_mask() -> None:
    model = tiny("llama")
    made = trained(model, "L0.neuron[1]")
    found = weight_changes(made)
    ax: Any = weight_change(made)
    assert hatched(ax) == []
    assert "none outside the mask" in ax.get_title()
    rows = {(row["layer"], row["of"]): row for row in figure_data(ax)}
    for y, layer in enumerate(found.layers):
        for x, column in enumerate(found.columns):
            assert rows[layer, column]["relative"] == float(found.relative[y, x])
    image = ax.images[0].get_array()
    assert image is not None
    drawn = {(y, found.columns[x]) for y in range(2) for x in range(7) if not image.mask[y, x]}
    assert drawn == {(0, "gate"), (0, "up"), (0, "down")}
    stray = Edit(made.delta, mask=ComponentMask.parse("L1.neuron[1]", describe(model)))
    ax = weight_change(stray, model_map=describe(model))
    assert hatched(ax) == [(0, found.columns.index(c)) for c in ("gate", "up", "down")]
    assert "OUTSIDE" in ax.get_title()


def test_an_edit_that_changed_nothing_can_be_drawn() -> None:
    model = tiny("llama")
    ax: Any = weight_change(Edit(Delta({})), model_map=describe(model))
    assert "0 of" in ax.get_title()
    assert all(row["relative"] == 0 for row in figure_data(ax))
