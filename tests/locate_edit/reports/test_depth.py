from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from locate_edit.draw.depth import layer_lines, lens_map
from locate_edit.errors import LocateEditError
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.unlearning_depth import from_costs
from locate_edit.prompts import PromptSet, TokenMask
from locate_edit.reports.depth import LensDepth, lens_depth
from tests.tiny import byte_tokenizer, tiny

ROWS: list[Any] = [("Ann", " golf"), ("x", "y"), ("a longer prompt", " and target")]


def models() -> tuple[Any, Any]:
    original = tiny("llama", seed=1).eval()
    edited = copy.deepcopy(original)
    edited.model.layers[1].load_state_dict(tiny("llama", seed=2).model.layers[1].state_dict())
    return edited, original


def test_the_lens_layer_by_layer() -> None:
    edited, original = models()
    prompts = PromptSet(ROWS, byte_tokenizer())
    weights = [[1 / (k + 1) for k, _ in enumerate(prompts.target_ids(i))] for i in range(3)]
    prompts = prompts.with_token_mask(TokenMask(tuple(map(tuple, weights))))

    def literal(model: Any, item: int, depth: int) -> float:
        ids = prompts.ids(item)
        with torch.no_grad():
            # The last of the hidden states went through the final norm already.
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            hidden = states[depth] if depth == 2 else model.model.norm(states[depth])
            log_p = model.lm_head(hidden).double().log_softmax(-1)[0]
        places = prompts.scored(item)
        mean = sum(
            w * float(log_p[p - 1, ids[p]]) for w, p in zip(weights[item], places, strict=True)
        )
        return float(np.exp(mean / sum(weights[item])))

    for batch_size in (1, 16):
        found = lens_depth(edited, original, prompts, batch_size=batch_size)
        assert found.layers == (-1, 0, 1)
        for values, model in ((found.before, original), (found.after, edited)):
            wanted = [[literal(model, i, k) for k in range(3)] for i in range(3)]
            assert values == pytest.approx(np.array(wanted), rel=1e-4)
    assert found.before[:, -1] == pytest.approx(likelihood(original, prompts).values, rel=1e-4)
    assert found.before[:, :2] == pytest.approx(found.after[:, :2])
    assert found.before[:, 2] != pytest.approx(found.after[:, 2], rel=1e-2)
    assert len(found.rows()) == 9
    assert found.rows()[1]["layer"] == 0


def test_what_cannot_be_compared_is_refused() -> None:
    edited, original = models()
    prompts = PromptSet(ROWS, byte_tokenizer())
    with pytest.raises(LocateEditError, match="one object as both"):
        lens_depth(original, original, prompts)
    deeper = tiny("llama", num_hidden_layers=3)
    with pytest.raises(LocateEditError, match="got 3 before and 2 after"):
        lens_depth(edited, deeper, prompts)


def test_the_map_shows_both_sides_on_one_scale() -> None:
    before, after = np.array([[0.1, 0.9], [0.2, np.nan]]), np.array([[0.1, 0.3], [0.2, 0.5]])
    figure = lens_map(LensDepth((-1, 0), before, after, ("a → b", "c$ → d$"), "tiny"))
    left, right = figure.axes[:2]
    shown: Any
    for axes, values in ((left, before), (right, after)):
        image = axes.images[0]
        shown = image.get_array()
        assert np.ma.filled(shown, np.nan) == pytest.approx(values, nan_ok=True)
        assert image.get_clim() == (0, 1)
    assert [label.get_text() for label in left.get_yticklabels()] == ["a → b", "c$ → d$"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["embed", "0"]
    figure.canvas.draw()
    many = LensDepth((-1, 0), np.zeros((100, 2)), np.zeros((100, 2)), tuple("abcde" * 20))
    assert "n = 100" in lens_map(many).axes[0].get_ylabel()


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
