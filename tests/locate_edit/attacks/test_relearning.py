"""Relearning: the literal training loop, what is trained and what is tested, and who never knew."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from locate_edit import EditError, PromptSet, organism
from locate_edit.attacked import measure
from locate_edit.attacks import relearning
from locate_edit.attacks.relearning import Relearning
from locate_edit.editing import edit
from locate_edit.errors import PromptError
from tests.locate_edit.engine_setting import model, prompts, some_units


def test_it_is_plain_training_on_one_half_measured_on_the_other() -> None:
    net, (forget, retain) = model("llama-tied").eval(), prompts("llama-tied")
    attack = Relearning(steps=3, lr=1e-2)
    found = attack(net, forget, retain=retain, seed=1)
    taught, asked, kept = attack.parts(forget, retain, 1)
    assert {r["prompt"] for r in taught.rows} | {forget[i]["prompt"] for i in asked} == {
        r["prompt"] for r in forget.rows
    }
    assert len(taught) == len(asked) == 2
    assert kept == [0, 1, 2, 3]

    other = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    wanted = [measure(other, forget.select(asked)).values]
    for _ in range(3):
        losses = []
        for item in range(len(taught)):
            ids = torch.tensor([taught.ids(item)])
            logits = other(ids).logits[0].log_softmax(-1)
            losses += [-logits[at - 1, ids[0, at]] for at in taught.scored(item)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        wanted.append(measure(other, forget.select(asked)).values)
    assert [point.strength for point in found.curve] == [0, 1, 2, 3]
    assert [point.forget for point in found.curve] == pytest.approx(
        [float(each.mean()) for each in wanted], rel=1e-3
    )
    np.testing.assert_allclose(found.forget.values, wanted[-1], rtol=1e-3)
    assert found.forget.items.tolist() == asked
    assert found.retain is not None
    assert found.retain.estimate == pytest.approx(measure(other, retain).estimate, rel=1e-3)
    assert wanted[-1].mean() > 1.2 * wanted[0].mean(), "the training must do something"


def grouped() -> Any:
    forget = prompts("llama-tied")[0]
    return forget.reread(
        [
            {**{k: v for k, v in row.items() if k != "spans"}, "group": "ab"[item // 3]}
            for item, row in enumerate(forget.rows)
        ]
    )


@pytest.mark.parametrize("seed", range(4))
def test_groups_stay_on_one_side(seed: int) -> None:
    forget = grouped()
    taught, asked, _ = Relearning().parts(forget, None, seed)
    assert {row["group"] for row in taught.rows}.isdisjoint(forget[i]["group"] for i in asked)
    split, others, _ = Relearning(across="query").parts(forget, None, seed)
    assert "a" in {row["group"] for row in split.rows} & {forget[i]["group"] for i in others}


def test_one_group_has_no_other_half() -> None:
    forget = grouped()[:3]
    with pytest.raises(PromptError, match="two groups at least"):
        Relearning()(model("llama-tied"), forget)


def test_unrelated_trains_on_half_of_retain_and_measures_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget, retain = prompts("llama-tied")
    seen: list[str] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.extend(row["prompt"] for row in kwargs["forget"].rows)
        assert kwargs.get("retain") is None
        return edit(*args, **kwargs)

    monkeypatch.setattr(relearning, "edit", watched)
    found = Relearning(on="unrelated", steps=2)(model("llama-tied"), forget, retain=retain)
    assert len(found.forget) == 4
    assert found.retain is not None
    tested = {retain[int(i)]["prompt"] for i in found.retain.items}
    assert len(seen) == 2
    assert tested.isdisjoint(seen)
    assert tested | set(seen) == {row["prompt"] for row in retain.rows}
    with pytest.raises(PromptError, match="pass retain="):
        Relearning(on="unrelated")(model("llama-tied"), forget)


def test_unrelated_text_is_trained_on_and_all_prompts_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, (forget, retain) = model("llama-tied"), prompts("llama-tied")
    text = PromptSet(["Tea is drunk hot.", "Rain fell all day.", "Ice is cold."], forget.tokenizer)
    taught: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        taught.append(kwargs["forget"])
        return edit(*args, **kwargs)

    monkeypatch.setattr(relearning, "edit", watched)
    attack = Relearning(on="unrelated", steps=2, text=text)
    found = attack(net, forget, retain=retain)
    assert taught == [text]
    assert found.retain is not None
    assert len(found.forget) == len(forget)
    assert len(found.retain) == len(retain)
    assert found.notes["trained on"] == "3 other prompts"
    assert found.gain != pytest.approx(0.0, abs=1e-9)
    assert attack(net, forget).retain is None, "it takes no retain prompts"
    with pytest.raises(EditError, match=r"text is what on='unrelated' trains on.*one or the other"):
        Relearning(text=text)
    with pytest.raises(EditError, match="text must be a PromptSet, got list"):
        Relearning(on="unrelated", text=["Tea"])  # type: ignore[arg-type]
    long = PromptSet(["a" * 200], forget.tokenizer)
    with pytest.raises(PromptError, match="context"):
        Relearning(on="unrelated", text=long)(net, forget)


def test_forget_is_measured_at_every_step_and_retain_at_three() -> None:
    net, (forget, retain) = model("llama-tied"), prompts("llama-tied")
    curve = Relearning(steps=10)(net, forget, retain=retain).curve
    assert [point.strength for point in curve] == list(range(11))
    assert [p.strength for p in curve if p.retain is not None] == [0, 5, 10]
    longer = Relearning(steps=25)(net, forget).curve
    assert len(longer) == 11
    assert longer[-1].strength == 25


def test_a_mask_is_where_the_attacker_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    net, forget = model("llama-tied"), prompts("llama-tied")[0]
    mask = some_units(net)
    made: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        made.append(edit(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(relearning, "edit", watched)
    Relearning(steps=2, mask=mask)(net, forget)
    assert made[0].mask is mask
    assert made[0].model is None, "it must be undone"


def test_steps_to_recover_is_the_first_measured_step_at_half_the_level() -> None:
    net, forget = model("llama-tied"), prompts("llama-tied")[0]
    found = Relearning(steps=4, lr=1e-2)(net, forget)
    (start, *_, last) = [point.forget for point in found.curve]
    level = start + last
    first = next(p.strength for p in found.curve if p.forget >= level / 2)
    assert found.recovered(level) == first > 0
    assert found.recovered(1.0) is None
    assert replace(found, strength="bits").recovered(level) is None


def test_who_never_knew_learns_the_form_at_most() -> None:
    forget = organism.prompts("facts", "forget01")
    found = Relearning()(organism.load("oracle")[0], forget)
    assert found.gain is not None
    assert found.gain < 0.3


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"lr": 0.0}, {"on": "all"}, {"across": "within"}],
    ids=lambda s: next(iter(s)),
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(EditError, match="Relearning: "):
        Relearning(**settings)
