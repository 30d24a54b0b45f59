"""Trained prefixes: halves that do not overlap, a literal training, and a lock that only training opens."""

from __future__ import annotations

import pytest
import torch

from circuits import describe
from locate_edit import EditError, PromptError, PromptSet, organism
from locate_edit.additions import ExtraTokens, made
from locate_edit.attacked import measure
from locate_edit.attacks._halves import halves, marks
from locate_edit.attacks.soft_prompt import SoftPrompt
from tests.locate_edit.engine_setting import model, prompts
from tests.tiny import byte_tokenizer


def grouped() -> PromptSet:
    rows = [{"prompt": f"{who} {n}", "target": " x", "group": who} for who in "abcd" for n in "123"]
    return PromptSet(rows, byte_tokenizer())


def test_halves_by_question_by_group_and_not_at_all() -> None:
    asked = grouped()
    for seed in range(5):
        train, test = halves(asked, "query", seed)
        assert sorted(train + test) == list(range(12))
        for items in (train, test):
            assert len(items) == 6
            assert {i // 3 for i in items} == {0, 1, 2, 3}, "every group in both"
        train, test = halves(asked, "target", seed)
        assert sorted(train + test) == list(range(12))
        assert len(train) == 6
        assert not {i // 3 for i in train} & {i // 3 for i in test}, "no group in both"
    assert halves(asked, "within", 0) == (list(range(12)), list(range(12)))
    assert len({tuple(halves(asked, "query", seed)[0]) for seed in range(5)}) > 1
    with pytest.raises(PromptError, match="two groups"):
        halves(asked.select([0, 1, 2]), "target", 0)
    with pytest.raises(PromptError, match="two prompts"):
        halves(asked.select([0]), "query", 0)


def test_marks() -> None:
    assert marks(3) == [0, 1, 2, 3]
    assert marks(30) == [0, 8, 15, 22, 30]


def test_training_is_the_literal_one() -> None:
    """One prompt: vectors pasted in by hand before the embedded text, Adam on the target's loss."""
    net, forget = model("llama-tied").eval(), prompts("llama-tied")[0].select([1])
    attack = SoftPrompt(length=2, steps=3, lr=0.5, across="within")
    found = attack(net, forget, seed=5)

    rows = made(ExtraTokens(2), describe(net), seed=5).values["rows"].requires_grad_()
    table = net.get_input_embeddings().weight.detach()
    adam = torch.optim.Adam([rows], lr=0.5 * float(table.std()))
    ids, scored = forget.ids(0), forget.scored(0)
    at = int(ids[0] == forget.tokenizer.bos_token_id)
    likelihoods = []
    for step in range(4):
        read = torch.cat([table[ids[:at]], rows, table[ids[at:]]])[None]
        logp = net(inputs_embeds=read).logits[0].log_softmax(-1)
        loss = -torch.stack([logp[p + 1, ids[p]] for p in scored]).mean()
        likelihoods.append(float((-loss).exp().detach()))
        if step < 3:
            adam.zero_grad()
            loss.backward()
            adam.step()
    assert [point.forget for point in found.curve] == pytest.approx(likelihoods, rel=1e-3)
    assert likelihoods[-1] > 1.1 * likelihoods[0]


def test_the_measured_half_is_not_trained_on() -> None:
    """Other answers there change nothing of the prefix: not the training loss, not what the retain prompts become."""
    net, (forget, retain) = model("llama-tied"), prompts("llama-tied")
    _, test = halves(forget, "query", 1)
    rows = [
        {**row, "target": " zz", "spans": []} if i in test else row
        for i, row in enumerate(forget.rows)
    ]
    both = (forget, forget.reread(rows))
    runs = [SoftPrompt(steps=3)(net, each, retain=retain, seed=1) for each in both]
    assert runs[0].notes["training loss"] == runs[1].notes["training loss"]
    assert runs[0].retain is not None
    assert runs[1].retain is not None
    assert runs[0].retain.values.tolist() == runs[1].retain.values.tolist()
    assert runs[0].forget.values.tolist() != runs[1].forget.values.tolist()


def test_only_the_other_half_is_measured_and_the_best_restart_counts() -> None:
    net, (forget, retain) = model("llama-tied"), prompts("llama-tied")
    found = SoftPrompt(steps=2, restarts=2)(net, forget, retain=retain, seed=1)
    train, test = halves(forget, "query", 1)
    assert found.forget.items.tolist() == test
    assert found.notes["trained on"] == len(train)
    clean = measure(net, forget).values[test]
    assert found.forget_clean.values == pytest.approx(clean, rel=1e-5)
    one = SoftPrompt(steps=2)(net, forget, seed=1)
    assert found.notes["training loss"] <= one.notes["training loss"]


def test_training_finds_the_lock_and_not_what_was_never_known() -> None:
    net = organism.load()[0]
    forget = organism.prompts("facts", "forget01")
    attack = SoftPrompt(steps=3)
    for seed in (0, 1, 2):
        with attack.hide(net, forget, seed=seed):
            found = attack(net, forget, seed=seed)
        assert found.curve[0].forget < 0.6
        assert found.curve[-1].forget > found.curve[0].forget + 0.3
    never = SoftPrompt()(organism.load("oracle")[0], forget)
    assert never.gain is not None
    assert never.gain < 0.15


def test_bad_settings() -> None:
    with pytest.raises(EditError, match="must be a whole number of at least 1"):
        SoftPrompt(length=0)
    with pytest.raises(EditError, match="'within', 'query' or 'target'"):
        SoftPrompt(across="all")  # type: ignore[arg-type]
