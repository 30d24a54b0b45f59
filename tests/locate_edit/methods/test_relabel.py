"""Relabelling: nothing to relabel changes nothing, labels are those of the localizer, and what training does."""

from __future__ import annotations

import pytest

from locate_edit import EditError, edit
from locate_edit.engine import StopWhen
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.relabel import Relabel
from locate_edit.relabelled import relabelled
from locate_edit.token_identification import identify_tokens
from tests.locate_edit.engine_setting import differing, model, prompts, some_units, state
from tests.locate_edit.methods.memorised import memorised, nll


def test_without_strength_and_anchors_nothing_changes() -> None:
    net, forget, retain, mask = memorised()
    before = state(net)
    made = edit(net, Relabel(steps=20, lr=1e-2, strength=0.0), mask, forget=forget, retain=retain)
    assert not differing(net, before)
    assert made.log == []
    assert made.provenance["relabelled"] == {"changed": 0.0}


def test_it_is_reinforcing_identifying_and_fine_tuning_in_a_row() -> None:
    net, forget, retain, mask = memorised()
    method = Relabel(
        steps=15, lr=3e-3, anchors={"Ann": ["Bob"]}, reinforce_steps=20, reinforce_lr=1e-2
    )
    edit(net, method, mask, forget=forget, retain=retain)
    got = state(net)

    net, *_ = memorised()
    with_optim = FineTune(steps=20, lr=1e-2, optim=method.optim)
    reinforced = edit(net, with_optim, mask, forget=forget)
    reinforced.undo()
    found = identify_tokens(net, forget, reinforced, anchors={"Ann": ["Bob"]}, batch_size=8)
    assert found.aligned == 1.0
    second = FineTune(steps=15, lr=3e-3, optim=method.optim)
    edit(net, second, mask, forget=found.relabelled(), retain=retain)
    assert not differing(net, got)


def test_prompts_relabelled_before_are_taken_as_they_are() -> None:
    net, forget, _, mask = memorised()
    labels = [[forget.target_ids(0)[0]] * 4] * 4
    taught = relabelled(forget, labels)
    before = nll(net, taught)
    made = edit(net, Relabel(steps=100, lr=1e-2), mask, forget=taught)
    assert nll(net, taught) < 0.1 < before
    assert "relabelled" not in made.provenance


def test_the_text_becomes_less_likely_and_the_rest_stays() -> None:
    net, forget, retain, mask = memorised()
    method = Relabel(steps=120, lr=5e-3, strength=20.0, reinforce_steps=40, reinforce_lr=5e-3)
    before = nll(net, forget)
    made = edit(net, method, mask, forget=forget, retain=retain)
    # How many of the 16 labels change, and so how far the loss rises, differs with a processor's rounding.
    assert made.provenance["relabelled"]["changed"] > 0.1
    assert before < 0.01
    assert nll(net, forget) > 0.5
    assert nll(net, retain) < 0.1


def test_rules_to_stop_belong_to_the_second_training() -> None:
    net, forget, retain, mask = memorised()
    method = Relabel(steps=30, lr=5e-3, strength=20.0, reinforce_steps=40, reinforce_lr=5e-3)
    rule = StopWhen("lr", above=0.0)  # at the first step it sees
    made = edit(net, method, mask, forget=forget, retain=retain, stop=rule)
    assert len(made.log) == 1
    assert made.provenance["relabelled"]["norm"] > 1.0


def test_masked_models_are_refused_before_anything_changes() -> None:
    net, (forget, retain) = model("bert"), prompts("bert")
    before = state(net)
    with pytest.raises(EditError, match="needs a causal model"):
        edit(net, Relabel(), some_units(net), forget=forget, retain=retain)
    assert not differing(net, before)
    with pytest.raises(EditError, match="strength must not be negative"):
        Relabel(strength=-1.0)
