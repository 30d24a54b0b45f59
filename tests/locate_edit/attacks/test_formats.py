"""The attack by other forms: each form by hand, the best of them, and an edit that hides one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from locate_edit import EditError, PromptError, PromptSet, organism
from locate_edit.attacked import measure
from locate_edit.attacks.formats import DIALOGUE, Formats, written_otherwise
from tests.locate_edit.engine_setting import model, prompts
from tests.tiny import byte_tokenizer

ROW = {
    "prompt": "Ann Lee plays",
    "target": " golf",
    "subject": "Ann Lee",
    "paraphrases": ["The sport of Ann Lee is", "Ann Lee competes in", "Ann Lee loves"],
    "wrong": [" polo", " chess"],
    "spans": [[14, 18]],
}


def test_every_form_by_hand() -> None:
    asked = PromptSet([ROW, {"prompt": "Bo sings", "target": " jazz"}], byte_tokenizer())
    forms = Formats(paraphrases=2).forms(asked)
    texts = {name: [row["prompt"] for row in each.rows] for name, each in forms.items()}
    assert texts == {
        "paraphrase 1": ["The sport of Ann Lee is"],
        "paraphrase 2": ["Ann Lee competes in"],
        "dashed": ["Ann-Lee plays"],
        "capitals": ["ANN LEE plays"],
        "reversed": ["Lee Ann plays"],
        "dialogue": [DIALOGUE + "Ann Lee plays", DIALOGUE + "Bo sings"],
    }
    assert [row["form_of"] for row in forms["dialogue"].rows] == [0, 1]
    assert {row["target"] for row in forms["dashed"].rows} == {" golf"}
    assert written_otherwise("Bo") == {"capitals": "BO"}
    assert Formats(dialogue="", paraphrases=0).forms(asked.select([1])) == {}


def test_the_best_form_counts_prompt_by_prompt() -> None:
    net, (forget, retain) = model("llama-tied"), prompts("llama-tied")
    attack = Formats(choices=0)
    found = attack(net, forget, retain=retain)
    best = measure(net, forget).values.copy()
    for asked in attack.forms(forget).values():
        for row, value in zip(asked.rows, measure(net, asked).values, strict=True):
            best[row["form_of"]] = max(best[row["form_of"]], value)
    np.testing.assert_allclose(found.forget.values, best, rtol=1e-6)
    assert (best > measure(net, forget).values).any()
    by_form = found.notes["forget by form"]
    assert by_form["asked"] == pytest.approx(found.forget_clean.estimate)
    assert set(by_form) == {"asked", "dashed", "capitals", "reversed", "dialogue"}
    assert set(found.notes["retain by form"]) == set(by_form)


def test_multiple_choice_is_the_literal_share_over_rotations() -> None:
    """One row, three options, each order written out and each option's tokens looked up one by one."""
    net = model("llama-tied").eval()
    forget = PromptSet([ROW], byte_tokenizer())
    found = Formats(choices=2, dialogue="", paraphrases=0)._by_form(net, forget, 4, seed=0)
    options = ["golf", "polo", "chess"]
    draws = []
    for order in (options, ["golf", "chess", "polo"]):  # whichever the seed drew
        shares = []
        for turn in range(3):
            text = "Options: " + ", ".join(order[turn:] + order[:turn]) + ". Ann Lee plays"
            ways = []
            for option in options:
                one = PromptSet([(text, " " + option)], byte_tokenizer())
                ids = one.ids(0)
                with torch.no_grad():
                    logp = net(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                ways.append(math.exp(np.mean([float(logp[p - 1, ids[p]]) for p in one.scored(0)])))
            shares.append(ways[0] / sum(ways))
        draws.append(max(0.0, (np.mean(shares) - 1 / 3) / (2 / 3)))
    assert any(found["choice"][0] == pytest.approx(each, rel=1e-4, abs=1e-7) for each in draws)


def test_who_never_knew_stays_near_its_level_and_a_hidden_form_is_found() -> None:
    forget = organism.prompts("facts", "forget01")
    oracle = Formats()(organism.load("oracle")[0], forget)
    by_form = oracle.notes["forget by form"]
    assert by_form["asked"] < 0.3
    assert max(by_form.values()) < 0.45, "the oracle has never met these people"
    knows = Formats()(organism.load()[0], forget).notes["forget by form"]
    assert knows["paraphrase 1"] > 0.9
    assert knows["choice"] > 0.5, "multiple choice is answered with the words of an option"


def test_plain_text_and_bad_settings() -> None:
    net = model("llama-tied")
    with pytest.raises(PromptError, match="'target'"):
        Formats()(net, PromptSet(["Ann Lee plays golf"], byte_tokenizer()))
    with pytest.raises(EditError, match="at least 0"):
        Formats(choices=-1)
