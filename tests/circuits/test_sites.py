from __future__ import annotations

import pytest

from circuits import Site, SiteError, Unit

SITES = {
    "L4.neuron": Site(4, "neuron"),
    "L0.kv_head": Site(0, "kv_head"),
    "L12.layer": Site(12, "layer"),
    "embed.vocab": Site(None, "vocab", "embed"),
    "model.layers.0.mlp.down_proj.weight:row": Site(
        None, "row", "model.layers.0.mlp.down_proj.weight"
    ),
    "lm_head.weight:weight": Site(None, "weight", "lm_head.weight"),
}


@pytest.mark.parametrize("text", SITES)
def test_sites_print_and_parse(text: str) -> None:
    assert str(SITES[text]) == text
    assert Site.parse(text) == SITES[text]
    assert Site.parse(f" {text} ") == SITES[text]


def test_units_print_and_parse() -> None:
    assert str(Site(4, "neuron")[17]) == "L4.neuron[17]"
    assert Unit.parse("L4.neuron[17]") == Site(4, "neuron")[17]
    assert str(Site(4, "neuron")[3, 17]) == "L4.neuron[3,17]"
    assert Unit.parse("L4.neuron[3, 17]") == Site(4, "neuron")[3, 17]
    assert Unit.parse("a.b.weight:row[7]") == Unit(Site(None, "row", "a.b.weight"), (7,))


def test_sites_sort_by_layer_then_kind_and_those_without_layer_last() -> None:
    ordered = [
        Site(0, "neuron"),
        Site(0, "head"),
        Site(2, "neuron"),
        Site(10, "neuron"),
        Site(None, "row", "a"),
        Site(None, "row", "b"),
        Site(None, "vocab", "embed"),
    ]
    shuffled = [ordered[i] for i in (4, 2, 6, 0, 3, 5, 1)]
    assert sorted(shuffled) == ordered
    assert sorted([Site(1, "neuron")[2], Site(1, "neuron")[1], Site(0, "layer")[9]]) == [
        Site(0, "layer")[9],
        Site(1, "neuron")[1],
        Site(1, "neuron")[2],
    ]


@pytest.mark.parametrize(
    ("layer", "kind", "name", "message"),
    [
        (0, "nueron", "", "unknown kind of site 'nueron': expected one of neuron, head"),
        (None, "head", "", "a head site needs a layer number of at least 0, got None"),
        (-1, "head", "", "needs a layer number of at least 0, got -1"),
        (True, "head", "", "needs a layer number of at least 0, got True"),
        (0, "head", "x", "a head site has no name, got 'x'"),
        (3, "row", "x", "a row site has no layer, got 3"),
        (None, "row", "", "a row site needs the name of a parameter"),
        (None, "vocab", "head", "a vocab site is named 'embed' or 'unembed', got 'head'"),
    ],
)
def test_sites_that_mean_nothing(layer: int | None, kind: str, name: str, message: str) -> None:
    with pytest.raises(SiteError, match=message.replace("[", r"\[")):
        Site(layer, kind, name)


@pytest.mark.parametrize(
    "text", ["", "L.neuron", "L4", "4.neuron", "L4.neuron[1]", "x:y:z", "L4 neuron"]
)
def test_texts_that_are_no_site(text: str) -> None:
    with pytest.raises(SiteError, match=r"is not a site|unknown kind"):
        Site.parse(text)


@pytest.mark.parametrize(
    "text", ["L4.neuron", "L4.neuron[]", "L4.neuron[-1]", "L4.neuron[1 2]", "L4.neuron[1,]"]
)
def test_texts_that_are_no_unit(text: str) -> None:
    with pytest.raises(SiteError, match="is not a unit: expected something like"):
        Unit.parse(text)


@pytest.mark.parametrize("index", [(), (-1,), (1.0,), (True,)])
def test_indices_that_are_no_unit(index: tuple[int, ...]) -> None:
    with pytest.raises(SiteError, match="needs indices of at least 0"):
        Unit(Site(0, "neuron"), index)


def test_a_site_is_not_iterated_over_by_mistake() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        list(Site(0, "neuron"))  # type: ignore[call-overload]
