"""Which layers still carry the answers: against literal loops, on edits of known depth, and as figures."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from circuits import ComponentMask, Site
from locate_edit.draw.layers import carried_map, layer_lines, lens_map
from locate_edit.editing import Edit, edit
from locate_edit.errors import EditError
from locate_edit.methods.fine_tune import FineTune
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.unlearning_depth import from_costs, unlearning_depth
from locate_edit.prompts import PromptSet, TokenMask
from locate_edit.reports.layers import Layers, layers, lens_readings
from tests.locate_edit.engine_setting import differing, state
from tests.tiny import byte_tokenizer, tiny

ROWS: list[Any] = [("Ann", " golf"), ("x", "y"), ("a longer prompt", " and target")]
KEPT: list[Any] = [("Bo", " tea"), ("Cy likes", " rum")]
FORGET, RETAIN = PromptSet(ROWS, byte_tokenizer()), PromptSet(KEPT, byte_tokenizer())


def models() -> tuple[Any, Any]:
    """An edited model of which only the second layer is another one, and the original."""
    original = tiny("llama", seed=1).eval()
    edited = copy.deepcopy(original)
    edited.model.layers[1].load_state_dict(tiny("llama", seed=2).model.layers[1].state_dict())
    return edited, original


def whole(layer: int) -> ComponentMask:
    return ComponentMask({Site(layer, "mlp"): torch.ones(1, dtype=torch.bool)})


def learned(net: Any, layer: int) -> Edit:
    """A short training of one layer of a model."""
    mask = whole(layer)
    return edit(net, FineTune(steps=4, lr=0.05), mask, forget=FORGET, retain=RETAIN)


def weighted() -> PromptSet:
    weights = [[1 / (k + 1) for k, _ in enumerate(FORGET.target_ids(i))] for i in range(3)]
    return FORGET.with_token_mask(TokenMask(tuple(map(tuple, weights))))


def test_the_lens_layer_by_layer() -> None:
    edited, _ = models()
    prompts = weighted()

    def literal(model: Any, item: int, depth: int) -> float:
        ids = prompts.ids(item)
        with torch.no_grad():
            # The last of the hidden states went through the final norm already.
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            hidden = states[depth] if depth == 2 else model.model.norm(states[depth])
            log_p = model.lm_head(hidden).double().log_softmax(-1)[0]
        places, weights = prompts.scored(item), prompts.weights(item)
        mean = sum(w * float(log_p[p - 1, ids[p]]) for w, p in zip(weights, places, strict=True))
        return float(np.exp(mean / sum(weights)))

    wanted = np.array([[literal(edited, i, k) for k in range(3)] for i in range(3)])
    for batch_size in (1, 16):
        found = lens_readings(edited, prompts, batch_size=batch_size)
        assert found == pytest.approx(wanted, rel=1e-4)
    assert found[:, -1] == pytest.approx(likelihood(edited, prompts).values, rel=1e-4)


def test_every_state_on_the_way_out_of_the_original() -> None:
    edited, original = models()
    found = layers(edited, forget=weighted(), retain=RETAIN, original=original)
    assert list(found.lens) == list(found.carried) == ["before", "after"]
    # Its own stream changes nothing; after the first layer, which both share, nor does the edited model's.
    own = likelihood(original, weighted()).values
    assert found.carried["before"] == pytest.approx(np.stack([own, own], axis=1), rel=1e-4)
    assert found.carried["after"][:, 0] == pytest.approx(own, rel=1e-4)
    # Behind the last layer stand only the norm and the head, which both share.
    assert found.carried["after"][:, 1] == pytest.approx(
        likelihood(edited, weighted()).values, rel=1e-4
    )
    assert found.carried["after"][:, 1] != pytest.approx(own, rel=0.05)
    assert found.own[0] == pytest.approx(own.mean())
    assert found.own[1] == pytest.approx(likelihood(original, RETAIN).values.mean())
    assert found.kept["after"][:, 1] == pytest.approx(likelihood(edited, RETAIN).values, rel=1e-4)
    assert found.names[0] == "Ann → golf"
    assert len(found.rows()) == 4


def test_an_edit_is_read_in_both_states_of_one_model() -> None:
    net = tiny("llama", seed=1).eval()
    made = learned(net, 1)
    after = state(net)
    two = copy.deepcopy(net)
    found = layers(made)
    assert not differing(net, after)
    made.undo()
    apart = layers(two, forget=FORGET, retain=RETAIN, original=net)
    for state_ in ("before", "after"):
        assert found.lens[state_] == pytest.approx(apart.lens[state_], rel=1e-5)
        assert found.carried[state_] == pytest.approx(apart.carried[state_], rel=1e-5)
        assert found.kept[state_] == pytest.approx(apart.kept[state_], rel=1e-5)


def test_random_masks_are_averaged_and_the_oracle_gives_a_depth() -> None:
    net = tiny("llama", seed=1).eval()
    oracle = copy.deepcopy(net)
    learned(oracle, 0)
    made = learned(net, 1)
    one, other = (layers(made, oracle=oracle, random=[whole(layer)]) for layer in (0, 1))
    both = layers(made, oracle=oracle, random=[whole(0), whole(1)])
    assert list(both.lens) == ["before", "after", "random", "oracle"]
    mean = (one.lens["random"] + other.lens["random"]) / 2
    assert both.lens["random"] == pytest.approx(mean)
    assert both.depth is not None
    edited = copy.deepcopy(net)
    made.undo()
    wanted = unlearning_depth(edited, net, oracle, FORGET, retain=RETAIN)
    assert both.depth.s1 == pytest.approx(wanted.s1, abs=1e-5)
    assert both.depth.s2 == pytest.approx(wanted.s2, abs=1e-5)
    assert both.depth.control == pytest.approx(wanted.control, abs=1e-5)


def made_up(carried: list[float], kept: list[float], *, depth: Any = None) -> Layers:
    """Two forgotten prompts and one retained one, alike in the original, with given means after three layers."""
    full = np.ones((2, 3))
    return Layers(
        {"before": np.ones((2, 4)), "after": np.full((2, 4), 0.25)},
        {"before": full, "after": np.array([carried, carried])},
        {"before": full[:1], "after": np.array([kept])},
        (1.0, 1.0),
        ("a → b", "c$ → d$"),
        depth,
        "tiny",
    )


def test_what_carries_is_told_only_where_the_stream_fits() -> None:
    found = made_up([0.9, 0.6, 0.1], [1.0, 0.4, 0.9])
    assert found.carries("after") == [True, None, False]
    assert found.in_words() == (
        "After the edit 1 of 3 layers still carry the answers (after layer 0), and the stream does not fit after "
        "layer 1."
    )
    assert made_up([0.1] * 3, [1.0] * 3).in_words() == (
        "After the edit none of 3 layers still carry the answers."
    )
    assert "no layer's stream fits" in made_up([0.9] * 3, [0.1] * 3).in_words()
    rows = {(row["state"], row["layer"]): row for row in found.rows()}
    assert rows["after", 1] == {
        "state": "after", "layer": 1, "lens": 0.25, "carried": 0.6, "kept": 0.4, "carries": None,
    }  # fmt: skip
    said = made_up(
        [0.1] * 3,
        [1.0] * 3,
        depth=from_costs(np.ones((1, 3)), np.ones((1, 3)) / 2, np.zeros((1, 3))),
    )
    assert said.in_words().endswith("Unlearning depth: 0.50.")
    assert "Unlearning depth is 0.50: 0 is an edit" in said.depth_in_words()
    costs = np.ones((1, 3))
    withheld = made_up([0.1] * 3, [1.0] * 3, depth=from_costs(costs, costs, costs))
    assert "Unlearning depth" not in withheld.in_words()
    assert withheld.depth_in_words().startswith("Unlearning depth has no number: needs: models")
    assert found.depth_in_words() == ""
    assert said.to_json()["unlearning_depth"]["score"] == pytest.approx(0.5)


def test_json_holds_every_value() -> None:
    layered = made_up([0.9, 0.5, 0.1], [1.0, 0.4, 0.9])
    layered.carried["after"][1] = np.nan
    found = layered.to_json()
    assert found["carried"]["after"] == [[0.9, 0.5, 0.1], [None] * 3]
    assert found["carries"]["after"] == [True, None, False]
    assert found["own"] == {"forget": 1.0, "retain": 1.0}
    assert found["unlearning_depth"] is None


def test_of_many_prompts_some_are_looked_at() -> None:
    edited, original = models()
    many = PromptSet([(f"x{i}", "y") for i in range(9)], byte_tokenizer())
    found = layers(edited, forget=many, retain=many, original=original, most=3)
    assert found.names == ("x0 → y", "x4 → y", "x8 → y")
    assert found.kept["after"].shape == (3, 2)


def test_what_cannot_be_looked_at_is_refused() -> None:
    edited, original = models()
    options: dict[str, Any] = {"forget": FORGET, "retain": RETAIN}
    with pytest.raises(EditError, match="original= is the edited model itself"):
        layers(original, original=original, **options)
    with pytest.raises(EditError, match="needs the model before the edit"):
        layers(edited, **options)
    with pytest.raises(EditError, match="needs forget and retain prompts"):
        layers(edited, original=original, forget=FORGET)
    with pytest.raises(EditError, match="at least 1, got 0"):
        layers(edited, original=original, most=0, **options)
    nothing = FORGET.with_token_mask(
        TokenMask(tuple((0.0,) * len(FORGET.target_ids(i)) for i in range(3)))
    )
    with pytest.raises(EditError, match="no prompt scores a token"):
        layers(edited, original=original, forget=nothing, retain=RETAIN)
    deeper = tiny("llama", num_hidden_layers=3)
    with pytest.raises(EditError, match=r"another kind: expected .*got .* 2, .* and .* 3, "):
        layers(edited, original=deeper, **options)


def test_the_lens_map_shows_all_states_on_one_scale() -> None:
    found = made_up([0.9, 0.6, 0.1], [1.0, 0.4, 0.9])
    figure = lens_map(found)
    left, right = figure.axes[:2]
    for axes, name in ((left, "before"), (right, "after")):
        image: Any = axes.images[0]
        assert np.asarray(image.get_array()) == pytest.approx(found.lens[name])
        assert image.get_clim() == (0, 1)
    assert [label.get_text() for label in left.get_yticklabels()] == ["a → b", "c$ → d$"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["embed", "0", "1", "2"]
    figure.canvas.draw()
    many = Layers({"after": np.zeros((100, 2))}, {}, {}, (1.0, 1.0), tuple("abcde" * 20))
    assert "n = 100" in lens_map(many).axes[0].get_ylabel()


def test_the_carried_map_shows_means_and_hatches_what_does_not_fit() -> None:
    figure = carried_map(made_up([0.9, 0.6, 0.1], [1.0, 0.4, 0.9]))
    left, right = figure.axes[:2]
    for axes, values in ((left, [0.9, 0.6, 0.1]), (right, [1.0, 0.4, 0.9])):
        image: Any = axes.images[0]
        assert np.asarray(image.get_array()) == pytest.approx(np.array([[1, 1, 1], values]))
        hatched: list[Any] = [patch for patch in axes.patches if patch.get_hatch()]
        assert [(p.get_x(), p.get_y()) for p in hatched] == [(0.5, 0.5)]
    assert [label.get_text() for label in left.get_yticklabels()] == ["before", "after"]
    assert [text.get_text() for text in left.texts][3:] == ["0.90", "0.60", "0.10"]
    figure.canvas.draw()


def test_the_lines_are_the_means() -> None:
    s1, s2 = np.array([[2.0, 4.0], [4.0, 8.0]]), np.array([[1.0, 2.0], [2.0, 4.0]])
    axes = layer_lines(from_costs(s1, s2, np.zeros((3, 2))))
    lines = [
        np.asarray(line.get_ydata()).tolist() for line in axes.lines if line.get_marker() == "o"
    ]
    assert lines == [[3.0, 6.0], [1.5, 3.0], [0.0, 0.0]]
    assert "0.50 (damage 0%)" in axes.get_title(loc="left")
    withheld = layer_lines(from_costs(s1, s2, s1, s1))
    assert "withheld" in withheld.get_title(loc="left")
    withheld.figure.canvas.draw()
