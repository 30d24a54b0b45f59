"""What every attack guarantees: the model is left as it was, seeds repeat, retain stands beside."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from locate_edit import catalog
from locate_edit.attacked import Attack, Attacked
from locate_edit.errors import EditError, LocateEditError, PromptError
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


def random_state() -> str:
    """The state of every global generator of random numbers."""
    old = np.random.get_state(legacy=False)  # noqa: NPY002 - what it looks after is the generator that others may use
    with np.printoptions(threshold=10**6):
        return repr((torch.get_rng_state().tolist(), random.getstate(), old))


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
    drawn = random_state()
    first = attack(net, forget, retain=retain, batch_size=2, seed=3)
    assert random_state() == drawn, "generators that others share are left as they were"
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


@by_name
def test_what_no_attack_can_use_is_refused_with_the_reason(attack: Attack) -> None:
    net, (forget, retain) = model("llama-tied"), given(attack, "llama-tied")

    def both(net: Any, asked: Any, batch_size: Any) -> list[Callable[[], Any]]:
        return [
            lambda: attack(net, asked, retain=retain, batch_size=batch_size),
            lambda: attack.hide(net, asked, batch_size=batch_size).__enter__(),
        ]

    for size in (0, -1, 2.5, True):
        for use in both(net, forget, size):
            with pytest.raises(
                EditError, match=f"batch_size must be a whole number of at least 1, got {size}"
            ):
                use()
    for other in (nn.Linear(2, 2), net.model, "gpt2"):
        name = type(other).__name__
        for use in both(other, forget, 2):
            with pytest.raises(
                EditError, match=f"an attack takes a language model: {name} has no output"
            ):
                use()
    for use in both(net, ["some text"], 2):
        with pytest.raises(PromptError, match="takes PromptSets, got list"):
            use()


BAD: dict[str, Any] = {
    "steps": (0, 2.5, "3", True, float("inf")),
    "length": (0, 2.5), "candidates": (0, 1.5), "top": (0, 1.5), "restarts": (0, 1.5),
    "samples": (0, 2.0), "shots": (0, 1.5), "folds": (1, 2.5), "paraphrases": (-1, 1.5), "choices": (-1, 1.5),
    "layer": (-1, 1.5, "last"), "bits": (1, 9, 4.5, "4"), "group": (0, 1.5),
    "lr": (0.0, -1.0, "a", float("nan"), float("inf")),
    "temperature": (0.0, "a", float("inf")), "budget": (-0.1, "a", float("inf"), float("nan")),
    "step": (0.0, "a", float("inf")), "share": (1.0, -0.1, "a", float("nan")),
    "scales": (1.0, (), (0.0,), ("a",), (float("inf"),), "12"),
}  # fmt: skip
"""Values that no hyperparameter of that name may have."""


@pytest.mark.parametrize("field", BAD)
def test_bad_settings_are_refused_by_name(field: str) -> None:
    found = 0
    for attack in map(type, ATTACKS):
        if field in {each.name for each in dataclasses.fields(attack)}:
            found += 1
            for value in BAD[field]:
                with pytest.raises(
                    EditError, match=rf"{attack.__name__}: .*\b{field}\b.* (must be|is a)"
                ):
                    attack(**{field: value})
    assert found, f"no attack has a {field}"
