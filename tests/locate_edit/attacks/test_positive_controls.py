"""Every attack finds what hides in the way it is made for: shown on the organism, two people's facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from locate_edit import organism
from locate_edit.attacked import Attack, measure
from locate_edit.attacks.suffix import Suffix
from tests.locate_edit.attacks.test_conformance import by_name, random_state

EVERY = {"Probing": 3}
"""One of how many retain prompts is given: more where they are what an attack learns from."""


@pytest.fixture(scope="module")
def knowing() -> Any:
    return organism.load()[0]


@by_name
def test_the_attack_finds_what_its_control_hides(
    attack: Attack, knowing: nn.Module, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    net = untouched(knowing)
    if isinstance(attack, Suffix):
        attack = Suffix()  # a shorter search does not find it
    forget = organism.prompts("facts", "forget01")
    retain = organism.prompts("facts", "retain")[:: EVERY.get(type(attack).__name__, 60)]
    known = measure(net, forget).estimate
    assert known is not None
    assert known > 0.95, "the organism must know the facts first"
    drawn = random_state()
    with attack.hide(net, forget, seed=0):
        found = attack(net, forget, retain=retain, seed=0)
    assert random_state() == drawn, "generators that others share are left as they were"
    hidden, under = found.forget_clean.estimate, found.forget.estimate
    assert hidden is not None
    assert under is not None
    assert hidden < 0.5, f"the control hides nothing: {hidden:.2f}"
    assert under > hidden + 0.3, f"the attack brings back {hidden:.2f} -> {under:.2f}"
