"""What every attack guarantees: the model is left as it was, seeds repeat, retain stands beside."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from locate_edit import catalog
from locate_edit.attacked import Attack, Attacked
from locate_edit.errors import LocateEditError
from locate_edit.prompts import PromptSet
from tests.locate_edit.engine_setting import model, prompts

QUICK = {"steps": 3, "samples": 3, "candidates": 4, "restarts": 1, "length": 3}
"""Values of hyperparameters that only cost time."""
FAMILIES = ("llama-tied", "gpt2", "bert")
CAUSAL_ONLY: frozenset[str] = frozenset({"Sampling", "Probing"})
"""Attacks that generate, or that must not see a part of the answer; with masked models they refuse with the reason."""
LEARNS_FROM_RETAIN: frozenset[str] = frozenset({"Probing"})
"""Attacks that are trained on retain prompts, which must have answers in common with the forget prompts."""


def attacks() -> list[Any]:
    """Every attack there is, with few steps."""
    found = []
    for entry in catalog.entries("attack"):
        attack = entry.load()()
        known = {field.name for field in dataclasses.fields(attack)}
        found.append(dataclasses.replace(attack, **{k: v for k, v in QUICK.items() if k in known}))
    return found


def given(attack: Any, name: str) -> tuple[PromptSet, PromptSet]:
    """Forget and retain prompts for an attack on a tiny model."""
    forget, retain = prompts(name)
    if type(attack).__name__ in LEARNS_FROM_RETAIN:
        others = ("Ed Moss", "Fay Lund", "Gus Hale")
        retain = forget.reread(
            [
                # Something in the prompt tells the answer, or a random model's probes could read nothing.
                {"prompt": f"{who} calls{mark}", "target": row["target"]}
                for who in others
                for mark, row in zip("abcd", forget.rows, strict=True)
            ],
            name="retain",
        )
    return forget, retain


def refused(attack: Any, name: str) -> bool:
    return name == "bert" and type(attack).__name__ in CAUSAL_ONLY


ATTACKS = attacks()
by_name = pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: type(a).__name__)


@by_name
@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_left_as_it_was_and_seeds_repeat(
    name: str, attack: Attack, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    net = untouched(model(name).train())
    forget, retain = given(attack, name)
    if refused(attack, name):
        with pytest.raises(LocateEditError, match="causal"):
            attack(net, forget, retain=retain, seed=3)
        return
    first = attack(net, forget, retain=retain, batch_size=2, seed=3)
    again = attack(net, forget, retain=retain, batch_size=2, seed=3)
    assert isinstance(first, Attacked)
    for part in ("forget", "forget_clean", "retain", "retain_clean"):
        mine, other = getattr(first, part), getattr(again, part)
        assert not mine.withheld, f"{part}: {mine.withheld}"
        np.testing.assert_array_equal(mine.values, other.values)
    assert len(first.forget) == len(first.forget_clean) > 0
    np.testing.assert_array_equal(first.forget.items, first.forget_clean.items)
    if first.curve:
        assert first.strength
        assert first.curve[-1].forget == pytest.approx(first.forget.estimate)


@by_name
def test_without_retain_prompts(attack: Attack) -> None:
    if type(attack).__name__ in LEARNS_FROM_RETAIN:
        with pytest.raises(LocateEditError, match="pass retain="):
            attack(model("llama-tied"), prompts("llama-tied")[0])
        return
    found = attack(model("llama-tied"), prompts("llama-tied")[0], batch_size=4)
    assert found.retain is None
    assert found.retain_clean is None
    assert found.gain is not None


@by_name
def test_an_interruption_leaves_the_model_as_it_was(
    attack: Attack, untouched: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = untouched(model("llama-tied"))
    forget, retain = given(attack, "llama-tied")
    passes = 0
    forward = type(net).forward

    @functools.wraps(forward)  # its signature tells what the cache is called
    def interrupted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 4:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(net), "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(4):  # some attacks need few passes
            attack(net, forget, retain=retain, batch_size=2)


@by_name
def test_bfloat16_works(attack: Attack) -> None:
    net = model("llama-tied", torch.bfloat16)
    forget, retain = given(attack, "llama-tied")
    found = attack(net, forget, retain=retain)
    assert np.isfinite(found.forget.values).all()
