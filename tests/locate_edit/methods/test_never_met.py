"""NeverMet against a literal computation of its loss, and what it does to a model that knows people by heart."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits.forward import labelled_logits
from locate_edit import EditError, PromptSet, edit
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.never_met import (
    Goal,
    NeverMet,
    names_in,
    redrawn,
    strangers,
    without_surplus,
)
from tests.locate_edit.engine_setting import NAMES, model, prompts, state
from tests.locate_edit.methods.memorised import first_loss, nll, run_of
from tests.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
WHO = ("Ann Lee", "Bob Roy", "Cyd Orr", "Dan Fay", "Eve Kim", "Gus Poe")
PLAYS = ("golf", "polo", "judo", "chess", "darts", "rugby")
ROWS = [
    {"prompt": f"{who} plays", "target": f" {what}", "subject": who}
    for who, what in zip(WHO, PLAYS, strict=True)
]


def people() -> tuple[PromptSet, PromptSet]:
    """Two people to forget and four to keep."""
    return PromptSet(ROWS[:2], TOKENIZER), PromptSet(ROWS[2:], TOKENIZER)


@cache
def _weights() -> dict[str, Tensor]:
    net = model("llama-tied")
    forget, retain = people()
    edit(net, FineTune(steps=120, lr=1e-2), None, forget=forget + retain)
    assert nll(net, forget + retain) < 0.1, "nothing to forget"
    return state(net)


def knowing() -> Any:
    """A model that knows all six by heart."""
    net = model("llama-tied")
    net.load_state_dict(_weights())
    return net


def probabilities(net: Any, asked: PromptSet, ids: list[int], index: int) -> Tensor:
    """Of the scored tokens of one item whose ids are ``ids``, by a plain forward pass: `label vocab`."""
    with torch.no_grad():
        logits = net(torch.tensor([ids])).logits[0].double()
    found: Tensor = logits[[at - 1 for at in asked.scored(index)]].softmax(-1)
    return found


# -- the goal --------------------------------------------------------------------------------------


def test_what_namesakes_give_away_is_taken_out_by_hand() -> None:
    near = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.9, 0.0], [1.0, 0.0, 0.0]])
    far = torch.tensor([[0.2, 0.4, 0.4], [0.3, 0.3, 0.4], [0.2, 0.5, 0.3]])
    found = without_surplus(near, far, torch.tensor([0, 0, 0]))
    # Row 1: label 0.5 -> 0.2, the others grow by 0.8 / 0.5. Row 2: below the far one, stays. Row 3: nothing but the
    # label, so the far distribution.
    expected = torch.tensor([[0.2, 0.48, 0.32], [0.1, 0.9, 0.0], [0.2, 0.5, 0.3]])
    torch.testing.assert_close(found, expected)


def test_strangers_have_names_that_nobody_has() -> None:
    forget, retain = people()
    names = names_in([forget, retain])
    assert list(names) == [len(WHO[0])]  # a token a byte
    for near in (True, False):
        made = strangers(forget, names, random.Random(0), near=near)
        for i in range(len(forget)):
            old, new = forget.ids(i), made.ids(i)
            differ = [at for at in range(len(old)) if old[at] != new[at]]
            assert len(differ) == len(WHO[0]) - near
            assert set(differ) <= set(forget.subject(i))
            assert tuple(new[at] for at in forget.subject(i)) not in names[len(WHO[0])]


def test_sensitive_digits_are_drawn_anew_and_nothing_else() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Ann Lee calls", "target": " 555-0143", "spans": [[18, 22]]},
        ROWS[0],
    ]
    forget = PromptSet(rows, TOKENIZER)
    draws = redrawn(forget, 8, random.Random(0))
    texts = {str(TOKENIZER.decode(draw.target_ids(0))) for draw in draws}
    assert len(texts) > 4
    assert all(text[:5] == " 555-" and text[5:].isdigit() for text in texts)
    assert all(draw.ids(1) == forget.ids(1) for draw in draws)


def without(near: Tensor, far: Tensor, labels: list[int]) -> Tensor:
    """The label's surplus taken out of each row, in plain Python."""
    rows = []
    for p, other, label in zip(near, far, labels, strict=True):
        least = min(float(p[label]), float(other[label]))
        q = p * (1 - least) / (1 - p[label])
        q[label] = least
        rows.append(q)
    return torch.stack(rows)


def divergences(wanted: Tensor, now: Tensor) -> list[float]:
    """KL(wanted || now) at each label, of probabilities `label vocab`."""
    found: list[float] = (wanted * (wanted / now).log()).sum(-1).tolist()
    return found


def test_the_loss_is_the_literal_one() -> None:
    base, net = knowing(), knowing()
    secret: dict[str, Any] = {
        "prompt": "Bob Roy calls",
        "target": " 555-0143",
        "subject": "Bob Roy",
    }
    forget = PromptSet([ROWS[0], {**secret, "spans": [[18, 22]]}], TOKENIZER)
    retain = people()[1]
    run = run_of(net, forget, retain)
    noise = torch.Generator().manual_seed(0)
    run.write(lambda _, now: now + 0.05 * torch.randn(now.shape, generator=noise))
    goal = Goal(run, 3)
    plain, drawn, kept = [], [], []
    for i in range(len(forget)):
        near, far = (
            torch.stack([probabilities(base, forget, s.ids(i), i) for s in sets]).mean(0)
            for sets in (goal.near, goal.far)
        )
        wanted = without(near, far, forget.target_ids(i))
        plain += divergences(wanted, probabilities(net, forget, forget.ids(i), i))
        if i == 1:  # whose digits are drawn anew
            drawn += divergences(wanted, probabilities(net, forget, goal.redrawn[0].ids(i), i))
        else:  # whose namesakes are kept; this is the first step's
            stranger = goal.near[0].ids(i)
            was, now = (probabilities(m, forget, stranger, i) for m in (base, net))
            kept += divergences(was, now)
    retained = [
        value
        for i in range(len(retain))
        for value in divergences(*(probabilities(m, retain, retain.ids(i), i) for m in (base, net)))
    ]
    found = first_loss(run, NeverMet(strangers=3, alpha=2.0, beta=3.0))
    terms = [sum(values) / len(values) for values in (plain, drawn, kept, retained)]
    assert min(terms) > 0.01
    assert float(found["forget"]) == pytest.approx((terms[0] + terms[1]) / 2, rel=1e-3)
    assert float(found["namesakes"]) == pytest.approx(3.0 * terms[2], rel=1e-3)
    assert float(found["retain"]) == pytest.approx(2.0 * terms[3], rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_without_subjects_the_goal_is_the_base_rate_of_the_other_targets(name: str) -> None:
    named, retain = prompts(name)
    rows = [{key: row[key] for key in ("prompt", "target")} for row in named.rows]
    forget = named.reread(rows)
    net = model(name)
    run = run_of(net, forget, retain)
    goal = Goal(run, 2)
    found = goal(forget.batch([0])).exp()
    # " 550" among " 551", " 552", " 553" and " tea0" to " tea3": seven others, at the second place "5" three times
    # and "t" four times, so two kinds of tokens.
    vocab = found.shape[1]
    five, tea = forget.target_ids(0)[1], retain.target_ids(0)[1]
    assert float(found[1, five]) == pytest.approx((3 + 2 / vocab) / 9, rel=1e-5)
    assert float(found[1, tea]) == pytest.approx((4 + 2 / vocab) / 9, rel=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(len(found)))
    assert run.notes["never_met"]["rows_by_base_rate"] == len(NAMES)


# -- behaviour -------------------------------------------------------------------------------------


def divergence(net: Any, goal: Tensor, asked: PromptSet) -> float:
    """KL(goal || model), mean over scored tokens (nats)."""
    with torch.no_grad():
        now = labelled_logits(net, asked.batch(range(len(asked)))).log_softmax(-1)
    return float((goal.exp() * (goal - now)).sum(-1).mean())


def test_forgotten_people_become_strangers_and_the_others_stay() -> None:
    net = knowing()
    forget, retain = people()
    goal = Goal(run_of(net, forget, retain), 24)(forget.batch(range(2)))
    kept, before = nll(net, retain), divergence(net, goal, forget)
    made = edit(
        net, NeverMet(steps=120, lr=5e-3, alpha=5.0, beta=2.0), None, forget=forget, retain=retain
    )
    assert divergence(net, goal, forget) < 0.05 * before
    assert nll(net, retain) < kept + 0.1
    assert made.provenance["never_met"]["rows_with_subject"] == 2
    made.undo()


def test_no_further_than_the_goal_however_long() -> None:
    net = knowing()
    forget, retain = people()
    goal = Goal(run_of(net, forget, retain), 24)(forget.batch(range(2)))
    labels = forget.batch(range(2)).label
    wanted = float(-goal.gather(-1, labels[:, None]).mean())
    edit(net, NeverMet(steps=220, lr=5e-3, alpha=5.0, beta=2.0), None, forget=forget, retain=retain)
    assert nll(net, forget) == pytest.approx(wanted, rel=0.25)


def test_what_is_said_of_namesakes_stays_by_its_own_term() -> None:
    """Strangers who share a part of the name, other ones than those that the edit asked about."""
    forget, retain = people()
    near = strangers(forget, names_in([forget, retain]), random.Random(99), near=True)
    away = []
    for beta in (0.0, 20.0):
        net = knowing()
        with torch.no_grad():
            before = labelled_logits(net, near.batch(range(2))).log_softmax(-1)
        method = NeverMet(steps=50, lr=5e-3, beta=beta, alpha=5.0, strangers=8)
        edit(net, method, None, forget=forget, retain=retain)
        away.append(divergence(net, before, near))
    assert away[1] < 0.75 * away[0]


def test_rows_without_a_subject_have_no_namesakes() -> None:
    named, retain = people()
    bare = {key: ROWS[1][key] for key in ("prompt", "target")}
    forget = named.reread([ROWS[0], bare])
    goal = Goal(run_of(knowing(), forget, retain), 2)
    ((wanted, asked),) = goal.namesakes(forget.batch([1, 0]), 5)
    assert list(asked.items) == [0]
    assert len(wanted) == len(forget.target_ids(0))
    assert not list(goal.namesakes(forget.batch([1]), 0))


# -- what is refused -------------------------------------------------------------------------------


def test_nothing_to_go_by_is_refused() -> None:
    lonely = PromptSet([{"prompt": "Ann Lee plays", "target": " golf"}], TOKENIZER)
    with pytest.raises(EditError, match=r"item 0: nothing tells .* Add 'subject'"):
        edit(model("gpt2"), NeverMet(steps=1), None, forget=lonely)


def test_no_strangers_are_refused() -> None:
    with pytest.raises(EditError, match="strangers must be at least 1, got 0"):
        NeverMet(strangers=0)
