"""Un-ablation: the vector and its arithmetic by hand, who is trained on, how the scale is chosen, who never knew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from locate_edit import EditError, organism
from locate_edit.attacked import measure
from locate_edit.attacks import un_ablation
from locate_edit.attacks.un_ablation import UnAblation, chosen, moved
from locate_edit.editing import edit
from locate_edit.errors import PromptError
from locate_edit.prompts import PromptSet
from tests.locate_edit.engine_setting import differing, model, prompts, state


def trained(net: Any, taught: PromptSet, steps: int, lr: float) -> Any:
    """A copy of the model after plain AdamW on the mean loss of all target tokens, written out."""
    other = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(other.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        losses = []
        for item in range(len(taught)):
            ids = torch.tensor([taught.ids(item)])
            logits = other(ids).logits[0].log_softmax(-1)
            losses += [-logits[at - 1, ids[0, at]] for at in taught.scored(item)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return other


def extrapolated(net: Any, tuned: Any, scale: float) -> Any:
    """``theta + scale * (tuned - theta)`` of every parameter, written out."""
    other = copy.deepcopy(net)
    after = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter += scale * (after[name] - parameter)
    return other


def test_scale_one_is_the_fine_tuned_model_and_scale_zero_the_attacked_one() -> None:
    net, forget = model("llama-tied").eval(), prompts("llama-tied")[0]
    before = state(net)
    vector = UnAblation(steps=3, lr=1e-2).vector(net, forget, 16, 0)
    assert not differing(net, before)
    tuned = trained(net, forget, 3, 1e-2)
    with moved(net, vector.scaled(1.0)):
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(
                parameter, dict(tuned.named_parameters())[name], rtol=1e-3, atol=1e-4
            )
        assert differing(net, before)
    with moved(net, vector.scaled(0.0)):
        assert not differing(net, before)
    assert not differing(net, before)


def test_it_measures_the_extrapolated_model_at_every_scale() -> None:
    net, (forget, retain) = model("llama-tied").eval(), prompts("llama-tied")
    attack = UnAblation(steps=2, lr=5e-3, scales=(3.0, 0.5, 1.0))
    found = attack(net, forget, retain=retain, seed=1)
    asked = found.forget.items.tolist()
    taught = [item for item in range(4) if item not in asked]
    known, tested = forget.select(taught), forget.select(asked)
    assert len(taught) == len(asked) == 2
    tuned = trained(net, known, 2, 5e-3)
    for scale in (0.0, 0.5, 1.0, 3.0):
        other = extrapolated(net, tuned, scale)
        for name, part in (("known", known), ("forget", tested), ("retain", retain)):
            assert found.notes[f"{name} by scale"][scale] == pytest.approx(
                measure(other, part).estimate, rel=1e-2
            ), (name, scale)
    halves = [trained(net, known.select([k]), 2, 5e-3) for k in (0, 1)]
    for scale, seen in found.notes["held-out known by scale"].items():
        each = [
            measure(extrapolated(net, tuned, scale), known.select([1 - k])).estimate
            for k, tuned in enumerate(halves)
        ]
        assert seen == pytest.approx(np.mean(each), rel=1e-2)  # type: ignore[arg-type]

    scale = found.notes["scale"]
    other = extrapolated(net, tuned, scale)
    np.testing.assert_allclose(found.forget.values, measure(other, tested).values, rtol=1e-2)
    np.testing.assert_allclose(found.forget_clean.values, measure(net, tested).values, rtol=1e-4)
    assert found.retain is not None
    np.testing.assert_allclose(found.retain.values, measure(other, retain).values, rtol=1e-2)
    assert found.notes["known by scale"][3.0] > 1.5 * found.notes["known by scale"][0.0]


def test_the_curve_ends_at_the_chosen_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (forget, retain) = model("llama-tied"), prompts("llama-tied")
    monkeypatch.setattr(un_ablation, "chosen", lambda _: 2.0)
    found = UnAblation(steps=1)(net, forget, retain=retain)
    assert [point.strength for point in found.curve] == [0, 1, 2]
    assert found.curve[-1].forget == found.forget.estimate == found.notes["forget by scale"][2.0]
    assert found.retain is not None
    assert found.curve[-1].retain == found.retain.estimate
    assert list(found.notes["forget by scale"]) == [0, 1, 2, 4, 8]


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        ({1.0: 0.2, 2.0: 0.5, 4.0: 0.7, 8.0: 0.4}, 4.0),
        ({1.0: 0.985, 2.0: 0.991, 4.0: 0.994, 8.0: 0.99}, 1.0),  # ties
        ({1.0: 0.98, 2.0: 0.995, 4.0: 0.999}, 2.0),
        ({1.0: 0.1, 2.0: float("nan"), 4.0: float("nan")}, 1.0),
        ({1.0: float("nan"), 2.0: float("nan")}, 1.0),
    ],
)
def test_the_choice_of_the_scale(seen: dict[float, float], wanted: float) -> None:
    assert chosen(seen) == wanted


def grouped(people: int) -> PromptSet:
    """Two prompts about each person."""
    forget = prompts("llama-tied")[0]
    return forget.reread(
        [
            {"prompt": f"P{p} {verb}", "target": f" {p}{k}", "group": p}
            for p in range(people)
            for k, verb in enumerate(("calls", "owes"))
        ]
    )


def watch(monkeypatch: pytest.MonkeyPatch) -> tuple[list[set[str]], list[set[str]]]:
    """What is trained on, and what is measured, as it comes."""
    taught: list[set[str]] = []
    seen: list[set[str]] = []

    def edited(*args: Any, **kwargs: Any) -> Any:
        assert kwargs.get("retain") is None
        taught.append({row["prompt"] for row in kwargs["forget"].rows})
        return edit(*args, **kwargs)

    def measured(net: nn.Module, asked: PromptSet, batch_size: int) -> Any:
        seen.append({row["prompt"] for row in asked.rows})
        return measure(net, asked, batch_size)

    monkeypatch.setattr(un_ablation, "edit", edited)
    monkeypatch.setattr(un_ablation, "measure", measured)
    return taught, seen


@pytest.mark.parametrize("seed", range(4))
def test_nothing_of_the_measured_half_is_trained_on_or_chosen_by(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget = grouped(6)
    taught, seen = watch(monkeypatch)
    found = UnAblation(steps=1, scales=(1.0, 2.0))(model("llama-tied"), forget, seed=seed)
    tested = {forget[int(item)]["prompt"] for item in found.forget.items}
    one, other, known = taught
    assert tested.isdisjoint(known)
    assert tested | known == {row["prompt"] for row in forget.rows}
    assert one.isdisjoint(other)
    assert one | other == known
    # each part's vector is tried on the other part, at both scales, and only then comes the rest
    assert seen[:4] == [other, other, one, one]
    assert seen[4:] == [known, tested] * 3
    people = [{prompt.split()[0] for prompt in part} for part in (one, other, tested)]
    assert sum(len(part) for part in people) == 6, "a person's prompts stay on one side"


def test_a_single_known_group_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    taught, _ = watch(monkeypatch)
    UnAblation(steps=1)(model("llama-tied"), grouped(2))
    assert [len(part) for part in taught] == [1, 1, 2]


def test_query_splits_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    taught, _ = watch(monkeypatch)
    UnAblation(steps=1, across="query")(model("llama-tied"), grouped(4))
    assert len(taught[-1]) == 4
    assert len({prompt.split()[0] for prompt in taught[-1]}) > 2


def test_the_weights_come_back_whatever_happens(
    untouched: Callable[[nn.Module], nn.Module],
) -> None:
    net = untouched(model("llama-tied"))
    vector = UnAblation(lr=1e-2).vector(net, prompts("llama-tied")[0], 16, 0)
    with pytest.raises(KeyboardInterrupt), moved(net, vector.scaled(3.0)):
        raise KeyboardInterrupt


@pytest.mark.parametrize("seed", [1, 2])
def test_one_direction_that_hides_all_answers_is_undone_with_answers_of_other_people(
    seed: int, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    net = untouched(organism.load()[0])
    forget = organism.prompts("facts", "forget10")[:24]
    attack = UnAblation()
    with attack.hide(net, forget, seed=seed) as hidden:
        assert (measure(hidden, forget).estimate or 1.0) <= 0.2
        found = attack(hidden, forget, seed=seed)
    assert found.gain is not None
    assert found.gain > 0.4
    assert found.notes["scale"] > 1, "extrapolation must do something"
    by_scale = found.notes["forget by scale"]
    assert found.forget.estimate is not None
    assert found.forget.estimate > by_scale[1.0] + 0.2


def test_who_never_knew_learns_the_form_at_most() -> None:
    forget = organism.prompts("facts", "forget10")[:24]
    found = UnAblation()(organism.load("oracle")[0], forget)
    assert found.gain is not None
    assert found.gain < 0.1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"lr": 0.0}, "lr must be a finite number above 0, got 0.0"),
        (
            {"scales": ()},
            r"scales must be a tuple of one positive finite number at least, got \(\)",
        ),
        ({"scales": (1.0, -1.0)}, r"got \(1.0, -1.0\)"),
        ({"scales": (float("inf"),)}, "scales must be"),
        ({"across": "within"}, "would measure what was trained on"),
        ({"across": "all"}, "across must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(EditError, match=f"UnAblation: .*{says}"):
        UnAblation(**settings)


def test_too_few_prompts() -> None:
    net, forget = model("llama-tied"), prompts("llama-tied")[0]
    with pytest.raises(PromptError, match=r"needs two known prompts at least.*is 1\. Give more"):
        UnAblation()(net, forget[:3])
    with pytest.raises(PromptError, match="two groups at least"):
        UnAblation()(net, grouped(1))


def test_a_control_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    forget = organism.prompts("facts", "forget01")
    net = untouched(organism.load()[0])
    monkeypatch.setattr(un_ablation, "MOST", 0.06)
    with (
        pytest.raises(EditError, match=r"a push of 0\.06 times the stream's length leaves"),
        UnAblation().hide(net, forget),
    ):
        pass
    monkeypatch.setattr(un_ablation, "target_tokens", lambda _: set(range(len(forget.tokenizer))))
    with (
        pytest.raises(EditError, match="the answers use every token"),
        UnAblation().hide(net, forget),
    ):
        pass
