"""The logit lens as an attack: every layer by hand, padding, and what it reads in who never knew."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits import describe
from locate_edit import organism
from locate_edit.attacks.logit_lens import LogitLens, _by_layer
from tests.locate_edit.engine_setting import model, prompts


def test_it_is_the_models_own_head_on_every_layer() -> None:
    net, (forget, retain) = model("llama-tied").eval(), prompts("llama-tied")
    wanted = np.zeros((4, len(forget)))
    for item in range(len(forget)):
        ids = forget.ids(item)
        first = forget.scored(item)[0]
        with torch.no_grad():
            inside = net.model(
                torch.tensor([ids]), output_hidden_states=True
            ).hidden_states  # the last one is normed already
            for layer, stream in enumerate(inside):
                at = stream[0, first - 1]
                at = at if layer == 3 else net.model.norm(at)
                wanted[layer, item] = float(net.lm_head(at).softmax(-1)[ids[first]])
    found = LogitLens()(net, forget, retain=retain, batch_size=3)
    np.testing.assert_allclose(_by_layer(describe(net), forget, 3), wanted, rtol=1e-4)
    np.testing.assert_allclose(found.forget.values, wanted.max(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.forget_clean.values, wanted[-1], rtol=1e-4)
    assert found.notes["forget by layer"] == pytest.approx(wanted.mean(axis=1).tolist(), rel=1e-4)
    assert len(found.notes["retain by layer"]) == 4
    assert (wanted.argmax(axis=0) < 3).any(), (
        "some earlier layer must say more, or nothing is tested"
    )


def test_batches_do_not_matter() -> None:
    net, forget = model("gpt2"), prompts("gpt2")[0]
    one, all_ = (LogitLens()(net, forget, batch_size=n).forget.values for n in (1, 16))
    np.testing.assert_allclose(one, all_, rtol=1e-4)


def test_an_edit_of_the_last_layer_is_read_before_it_and_who_never_knew_says_little() -> None:
    forget = organism.prompts("facts", "forget01")
    net, oracle = organism.load()[0], organism.load("oracle")[0]
    attack = LogitLens()
    before = attack(net, forget).notes["forget by layer"]
    with attack.hide(net, forget):
        hidden = attack(net, forget)
    assert hidden.notes["forget by layer"][:-1] == pytest.approx(before[:-1])
    assert hidden.gain is not None
    assert hidden.gain > 0.5
    never = attack(oracle, forget)
    assert never.gain is not None
    assert never.gain < 0.2
