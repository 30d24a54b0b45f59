"""Probing: planted and absent directions, the layer chosen on retain alone, the model's own choice written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits import Site
from circuits.probes import ridge_predictions
from locate_edit import EditError, PromptSet, organism
from locate_edit.attacks import probing
from locate_edit.attacks.probing import Probing, _relations, _unread
from locate_edit.errors import PromptError
from tests.locate_edit.engine_setting import model
from tests.tiny import byte_tokenizer

ANSWERS = (" tea", " rum", " ale")
MARKS = {" tea": "A", " rum": "B", " ale": "C", " gin": "D"}
"""What tells an answer in a prompt that gives it away."""
SITES = [Site(layer, "layer") for layer in range(3)]
"""Of the tiny models."""


def asked(
    n: int, first: int = 0, answers: Sequence[str] = ANSWERS, told: bool = False, **fields: Any
) -> list[dict[str, Any]]:
    """Rows about different people, with the answers in turn; ``told`` ends the prompt with the answer's mark."""
    rows = []
    for i in range(n):
        answer = answers[i % len(answers)]
        end = MARKS[answer] if told else ""
        rows.append({"prompt": f"P{first + i} likes{end}", "target": answer, **fields})
    return rows


def sets(
    forget: list[dict[str, Any]], retain: list[dict[str, Any]], mask: bool = False
) -> tuple[PromptSet, PromptSet]:
    tokenizer = byte_tokenizer(mask=mask)
    return PromptSet(forget, tokenizer, name="forget"), PromptSet(retain, tokenizer, name="retain")


def planted(prompts: PromptSet, strength: Sequence[float], seed: int) -> dict[Site, Tensor]:
    """Noise in every layer, plus so much of a direction of each answer."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(ANSWERS), 12, generator=torch.Generator().manual_seed(7))
    labels = [ANSWERS.index(row["target"]) for row in prompts.rows]
    return {
        site: torch.randn(len(prompts), 12, generator=generator) + much * directions[labels]
        for site, much in zip(SITES, strength, strict=True)
    }


def read_planted(
    monkeypatch: pytest.MonkeyPatch, forget: Sequence[float], retain: Sequence[float]
) -> Any:
    """The attack on 60 forget and 90 retain prompts whose streams are planted."""
    one, other = sets(asked(60), asked(90, first=60))
    states = {90: planted(other, retain, 0), 60: planted(one, forget, 1)}

    def streams(_map: Any, batches: Any, _sites: Any) -> Mapping[Site, Tensor]:
        return states[sum(len(batch.items) for batch in batches)]

    monkeypatch.setattr(probing, "read_states", streams)
    return Probing()(model("llama-tied"), one, retain=other, seed=2)


def test_a_planted_direction_is_read_and_its_absence_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = read_planted(monkeypatch, forget=(0, 0, 2), retain=(0, 0, 2))
    assert found.notes["layer"] == 2
    assert found.forget.estimate > 0.95
    assert found.retain.estimate > 0.95
    assert found.notes["majority"] == pytest.approx(1 / 3)
    assert found.notes["shuffled labels"] == pytest.approx(1 / 3, abs=0.1)
    assert max(found.notes["forget by layer"][:2]) < 0.55
    without = read_planted(monkeypatch, forget=(0, 0, 0), retain=(0, 0, 2))
    assert without.forget.estimate == pytest.approx(1 / 3, abs=0.15)
    assert without.retain.estimate > 0.95


def test_the_layer_is_chosen_on_retain_prompts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forgotten answers are plainest in the last layer, the retained ones in the middle."""
    found = read_planted(monkeypatch, forget=(0, 0.4, 2), retain=(0, 2, 0.8))
    by_layer = found.notes["forget by layer"]
    assert by_layer[2] > by_layer[1] + 0.1
    assert found.notes["layer"] == 1
    assert found.forget.estimate == by_layer[1]
    same = read_planted(monkeypatch, forget=(0, 2, 2), retain=(0, 9, 9))
    assert same.notes["retain by layer"][1:] == [1.0, 1.0]
    assert same.notes["layer"] == 1, "the earliest of equals"


def literal_ridge(x: Any, y: Any, new: Any, classes: int) -> list[int]:
    """Least squares with an intercept and an unpenalised mean; the penalty by leaving every example out."""
    mean, spread = x.mean(0), x.std(0, ddof=1)
    z, zn = (x - mean) / spread, (new - mean) / spread
    onehot = np.eye(classes)[y]
    unit = np.mean(np.linalg.svd(z, compute_uv=False) ** 2)

    def fit(rows: list[int], penalty: float) -> Any:
        width = z.shape[1]
        a = np.hstack([z[rows], np.ones((len(rows), 1))])
        wall = np.hstack([np.sqrt(penalty * unit) * np.eye(width), np.zeros((width, 1))])
        b = np.vstack([onehot[rows], np.zeros((width, classes))])
        return np.linalg.lstsq(np.vstack([a, wall]), b, rcond=None)[0]

    everyone = list(range(len(z)))
    errors = {}
    for penalty in (10.0**k for k in range(-4, 4)):
        errors[penalty] = sum(
            np.square(
                onehot[i] - np.append(z[i], 1) @ fit([j for j in everyone if j != i], penalty)
            ).sum()
            for i in everyone
        )
    best = min(errors, key=lambda penalty: errors[penalty])
    return [int(each) for each in (np.hstack([zn, np.ones((len(zn), 1))]) @ fit(everyone, best)).argmax(1)]  # fmt: skip


def test_probes_of_each_relation_are_least_squares_written_out() -> None:
    """Two relations with classes of their own; the streams are those of the position before the target."""
    net = model("llama-tied").eval()
    kept = asked(10, attribute="drink") + asked(8, 30, (" dog", " cat"), attribute="pet")
    gone = asked(3, 60, attribute="drink") + asked(3, 70, (" cat", " dog"), attribute="pet")
    forget, retain = sets(gone, kept)
    found = Probing()(net, forget, retain=retain, batch_size=4)

    def streams(prompts: PromptSet) -> Any:
        """`layer item d_model`."""
        each = []
        for item in range(len(prompts)):
            inside: list[Tensor] = []
            blocks = [
                block.register_forward_hook(lambda _m, _a, out, kept=inside: kept.append(out))
                for block in net.model.layers
            ]
            with torch.no_grad():
                net(torch.tensor([prompts.ids(item)]))
            for block in blocks:
                block.remove()
            at = prompts.scored(item)[0] - 1
            each.append(torch.stack([out[0, at] for out in inside]).double().numpy())
        return np.stack(each, axis=1)

    known, new = streams(retain), streams(forget)
    for layer in range(3):
        right = []
        for rows, test, classes in (
            (slice(0, 10), slice(0, 3), [" tea", " rum", " ale"]),
            (slice(10, 18), slice(3, 6), [" dog", " cat"]),
        ):
            y = [classes.index(row["target"]) for row in retain.rows[rows]]
            said = literal_ridge(known[layer][rows], y, new[layer][test], len(classes))
            right += [
                classes[n] == row["target"] for n, row in zip(said, forget.rows[test], strict=True)
            ]
        assert found.notes["forget by layer"][layer] == pytest.approx(np.mean(right))
        assert 0 < np.mean(right) < 1
    assert found.notes["classes"] == {"drink": 3, "pet": 2}
    assert found.notes["trained on"] == "18 of 18 retain prompts"


def test_a_retain_prompt_is_read_by_probes_that_have_not_seen_its_group() -> None:
    """Each person is asked often and is alike every time: a probe that has seen one prompt knows the others."""
    people = torch.arange(12).repeat_interleave(4)
    generator = torch.Generator().manual_seed(0)
    states = {SITES[0]: 5 * torch.randn(12, 40, generator=generator)[people]}
    kept = [
        {"prompt": f"P{p} {verb}", "target": ANSWERS[p % 2], "group": p}
        for p in range(12)
        for verb in ("likes", "asks for", "drinks", "buys")
    ]
    forget, retain = sets(asked(2), kept)
    (relation,) = _relations(forget, retain)
    assert relation.held_out(states, 5, 0).mean() < 0.8
    loose = sets(asked(2), [{k: v for k, v in row.items() if k != "group"} for row in kept])
    (relation,) = _relations(*loose)
    assert relation.held_out(states, 5, 0).mean() > 0.95


def literal_choice(net: Any, prompts: PromptSet, item: int, classes: Sequence[str]) -> str:
    """First by the first token of each class, then by likelihood."""
    first: dict[str, float] = {}
    whole: dict[str, float] = {}
    for answer in classes:
        each = prompts.reread([{"prompt": prompts[item]["prompt"], "target": answer}])
        ids = torch.tensor([each.ids(0)])
        with torch.no_grad():
            log_p = net(ids).logits[0].log_softmax(-1)
        token = [float(log_p[at - 1, ids[0, at]]) for at in each.scored(0)]
        first[answer], whole[answer] = token[0], sum(token) / len(token)
    likely = [a for a in classes if first[a] > max(first.values()) - 1e-6]
    return max(likely, key=lambda a: whole[a])


@pytest.mark.parametrize(
    "answers",
    [("a", "b", "c"), ("ax", "ay", "bz", "b"), (" tea", " rum", " ale")],
    ids=["first tokens differ", "some are shared", "all are shared"],
)
def test_what_the_model_itself_chooses(answers: tuple[str, ...]) -> None:
    net = model("llama-tied").eval()
    forget, retain = sets(asked(24, 50, answers), asked(16, 0, answers))
    (relation,) = _relations(forget, retain)
    found = relation.chosen_by(net, forget, relation.forget, batch_size=5)
    said = [literal_choice(net, forget, item, answers) for item in range(24)]
    assert found.tolist() == [a == row["target"] for a, row in zip(said, forget.rows, strict=True)]
    assert 0 < found.mean() < 1
    both = Probing()(net, forget, retain=retain, batch_size=5)
    np.testing.assert_array_equal(both.forget_clean.values, found)


def test_an_answer_is_a_class_where_two_groups_give_it_to_the_same_question() -> None:
    kept = [
        *asked(6, 0, (" tea",), True, relation="drink"),
        *asked(6, 6, (" rum",), True, relation="drink"),
        *asked(1, 12, (" ale",), True, relation="drink"),  # once
        *asked(2, 13, (" gin",), True, relation="drink", group="one person"),
        *asked(2, 15, (" ale",), True, relation="brew"),  # another question, of one class only
        {"prompt": "No question"},
    ]
    gone = [
        *asked(1, 20, (" rum",), True, relation="drink"),
        *asked(1, 21, (" ale",), True, relation="drink"),
        *asked(1, 22, (" gin",), True, relation="drink"),
        *asked(1, 23, (" tea",), True, relation="brew"),
        *asked(1, 24, (" tea",), True),
        *asked(1, 25, (" tea",), True, relation="drink"),
    ]
    forget, retain = sets(gone, kept)
    (relation,) = _relations(forget, retain)
    assert (relation.name, list(relation.classes)) == ("drink", [" tea", " rum"])
    assert (relation.retain, relation.forget) == (list(range(12)), [0, 5])
    found = Probing()(model("llama-tied"), forget, retain=retain)
    assert found.forget.items.tolist() == found.forget_clean.items.tolist() == [0, 5]
    assert found.retain is not None
    assert found.retain.items.tolist() == list(range(12))
    assert found.forget.values.tolist() == [1, 1]
    assert (found.notes["trained on"], found.notes["tested"]) == (
        "12 of 18 retain prompts",
        "2 of 6 forget prompts",
    )
    assert "4 of 6 items left out" in found.forget.note
    assert "retain prompts of two groups give to the same question" in found.forget.note


def test_the_attribute_comes_before_the_relation() -> None:
    rows = asked(12, attribute="drink", relation="P1")
    (relation,) = _relations(*sets(rows, rows))
    assert relation.name == "drink"


def test_batches_do_not_matter() -> None:
    net = model("gpt2")
    forget, retain = sets(asked(9, 40), asked(20))
    one, all_ = (Probing()(net, forget, retain=retain, batch_size=n) for n in (1, 16))
    for part in ("forget by layer", "retain by layer"):
        assert one.notes[part] == all_.notes[part]
    np.testing.assert_array_equal(one.forget_clean.values, all_.forget_clean.values)


def test_what_is_known_is_read_also_where_the_head_cannot_and_who_never_knew_gives_guesses() -> (
    None
):
    forget = organism.prompts("facts", "forget10")[:24]
    retain = organism.prompts("facts", "retain")[1::3]
    net, oracle = organism.load()[0], organism.load("oracle")[0]
    attack = Probing()
    known = attack(net, forget, retain=retain)
    assert known.forget.estimate is not None
    assert known.forget.estimate > 0.75
    assert known.retain is not None
    assert known.retain.estimate is not None
    assert known.retain.estimate > 0.85
    with attack.hide(net, forget, seed=1):
        hidden = attack(net, forget, retain=retain)
    assert hidden.forget_clean.estimate is not None
    assert hidden.forget_clean.estimate < 0.2
    # A probe does not mind in which order coordinates come, nor their signs.
    np.testing.assert_array_equal(hidden.forget.values, known.forget.values)
    assert hidden.notes["retain by layer"] == pytest.approx(known.notes["retain by layer"])
    never = attack(oracle, forget, retain=retain)
    assert never.forget.estimate is not None
    assert never.forget.estimate < 0.2
    assert never.retain is not None
    assert never.retain.estimate is not None
    assert never.retain.estimate > 0.85


def test_shuffled_answers_are_other_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def watched(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
        given.append(labels)
        return ridge_predictions(train, labels, test, classes)

    monkeypatch.setattr(probing, "ridge_predictions", watched)
    forget, retain = sets(asked(6, 40), asked(30))
    Probing()(model("llama-tied"), forget, retain=retain)
    first = given[0]
    assert first.shape == (11, 30)
    assert first[0].tolist() == [i % 3 for i in range(30)]
    assert all(row.bincount().tolist() == [10, 10, 10] for row in first)
    assert len({tuple(row.tolist()) for row in first}) == 11


def test_probes_that_cannot_read_what_is_known_give_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = read_planted(monkeypatch, forget=(2, 2, 2), retain=(0, 0, 0))
    assert found.forget.withheld.startswith("needs: probes that read retain prompts")
    assert "of 90" in found.forget.withheld
    assert found.forget_clean.estimate is not None
    assert found.retain.estimate == pytest.approx(1 / 3, abs=0.15)
    assert found.gain is None


@pytest.mark.parametrize(
    ("right", "reads"),
    [([1] * 6 + [0] * 4, False), ([1] * 16 + [0] * 4, True), ([1] * 3 + [0], False)],
)
def test_what_counts_as_read(right: list[int], reads: bool) -> None:
    """6 of 10 is 0.31 to 0.83, 16 of 20 is 0.58 to 0.92, 3 of 4 is 0.30 to 0.95; half of the answers are the same."""
    (relation,) = _relations(*sets(asked(2), asked(len(right), 0, (" tea", " rum"))))
    said = _unread(np.array([*right, np.nan], dtype=np.float64), [relation])
    assert (not said) == reads


@pytest.mark.parametrize("folds", [1, 0])
def test_bad_settings(folds: int) -> None:
    with pytest.raises(
        EditError, match=f"Probing: folds must be a whole number of at least 2, got {folds}"
    ):
        Probing(folds=folds)


def test_prompts_that_probes_cannot_use() -> None:
    net = model("llama-tied")
    forget, retain = sets(asked(4, 40), asked(20))
    with pytest.raises(PromptError, match=r"trains its probes on retain prompts.* pass retain="):
        Probing()(net, forget)
    _, other = sets(asked(4), asked(20, 0, (" gin", " port")))
    with pytest.raises(
        PromptError, match=r"no answer in it can be read.*two groups give to the same"
    ):
        Probing()(net, forget, retain=other)
    with pytest.raises(PromptError, match=r"another such answer to tell it from.*more retain"):
        Probing()(net, forget, retain=retain[:3])
    several, known = sets(asked(4, 40), asked(20), mask=True)
    with pytest.raises(PromptError, match=r"item 0: a masked model sees the other tokens"):
        Probing()(model("bert"), several, retain=known)


def test_a_masked_model_is_probed_on_answers_of_one_token() -> None:
    forget, retain = sets(asked(4, 40, ("x", "y")), asked(20, 0, ("x", "y")), mask=True)
    found = Probing()(model("bert"), forget, retain=retain)
    assert len(found.forget_clean) == 4
