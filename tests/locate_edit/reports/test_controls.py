"""Random controls: where their units are drawn, and when there is nothing to draw."""

from __future__ import annotations

import pytest
import torch

from circuits import ComponentMask, Site, describe
from locate_edit import EditError
from locate_edit.editing import Edit, edit
from locate_edit.methods.fine_tune import FineTune
from locate_edit.reports.controls import wanted
from tests.locate_edit.engine_setting import model, prompts


def neurons(on: dict[int, int]) -> Edit:
    """An edit of the first neurons of some layers: how many, by layer."""
    net = model("llama")
    about = describe(net)
    sites = {}
    for layer, count in on.items():
        units = torch.zeros(about.shape(Site(layer, "neuron")), dtype=torch.bool)
        units[:count] = True
        sites[Site(layer, "neuron")] = units
    forget, retain = prompts("llama")
    return edit(net, FineTune(steps=1), ComponentMask(sites), forget=forget, retain=retain)


def drawn(of: Edit, random: int | None = None) -> ComponentMask:
    (mask,), reason = wanted(of, random, seed=0)
    assert not reason
    assert isinstance(mask, ComponentMask)
    return mask


def test_few_units_are_drawn_in_their_own_layers() -> None:
    made = neurons({0: 3, 2: 5})
    assert {site.layer: n for site, n in drawn(made).counts().items() if n} == {0: 3, 2: 5}


def test_a_whole_layer_is_drawn_from_all_layers() -> None:
    about = describe(model("llama"))
    width = about.shape(Site(0, "neuron"))[0]
    made = neurons({2: width})
    mask = drawn(made)
    assert mask.count() == width
    assert {site.layer for site, n in mask.counts().items() if n} == {0, 1, 2}
    assert mask != made.mask


def test_all_there_are_leave_nothing_to_draw() -> None:
    width = describe(model("llama")).shape(Site(0, "neuron"))[0]
    made = neurons(dict.fromkeys(range(3), width))
    masks, reason = wanted(made, None, seed=0)
    assert masks == []
    assert (
        reason == "the mask holds every unit of its kind, so there are no others to draw at random"
    )
    with pytest.raises(EditError, match="was asked for, but the mask holds every unit"):
        wanted(made, 1, seed=0)
    assert wanted(made, 0, seed=0) == ([], "")
