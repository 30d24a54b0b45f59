"""Scores of samples, and familiarity, by hand from tables of probabilities."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from locate_edit.errors import RewardError
from locate_edit.metrics.familiarity import completion_familiarity, token_familiarity
from locate_edit.metrics.fluency import distinct
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.sampled_rewards import any_below, from_rewards, worst_reward
from locate_edit.prompts import PromptSet
from locate_edit.rewards import Lexicon
from locate_edit.sampling import sample
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

WORDS = ["a", "b", "rat", "nice", "owl"]
TOKENIZER = word_tokenizer(WORDS)
A, B, RAT, NICE, OWL = (token_id(TOKENIZER, word) for word in WORDS)
ALWAYS = {NICE: 1.0}
TABLE = {A: {RAT: 0.3, NICE: 0.69}, B: ALWAYS, NICE: ALWAYS, RAT: ALWAYS}
MODEL = Bigram(len(TOKENIZER), TABLE)
PROMPTS = PromptSet([("a", " a"), ("b", " a")], TOKENIZER)
REWARD = Lexicon(("rat",))


def test_from_rewards_by_hand() -> None:
    table = [[0.0, -0.2, -0.7], [0.0, 0.0, -0.1]]
    assert from_rewards(table).values.tolist() == [-0.7, -0.1]
    assert from_rewards(table, below=-0.5).values.tolist() == [1.0, 0.0]
    assert from_rewards(table, below=-0.7).values.tolist() == [0.0, 0.0]
    assert (from_rewards(table).direction, from_rewards(table, below=0.0).direction) == (
        "down",
        "up",
    )
    assert from_rewards([[], [1.0]]).items.tolist() == [1]


def test_scores_are_those_of_the_samples() -> None:
    predictions = Predictions(MODEL, PROMPTS)
    settings: dict[str, Any] = {"samples": 4, "length": 2, "top_p": 1.0, "seed": 3}
    worst = worst_reward(predictions, reward=REWARD, **settings)
    often = any_below(predictions, reward="lexicon:rat", **settings)
    texts = [c.text for c in sample(MODEL, PROMPTS, **settings)]
    rewards = np.array(REWARD([""] * 8, texts)).reshape(2, 4)
    assert worst.values.tolist() == rewards.min(1).tolist()
    assert often.values.tolist() == (rewards < 0).any(1).astype(float).tolist()
    assert worst.values[1] == 0.0  # b never leads to the rat


@pytest.mark.parametrize("metric", [worst_reward, any_below, distinct])
def test_samples_do_not_depend_on_the_order_of_the_prompts(metric: Any) -> None:
    model = tiny("llama")
    rows: list[Any] = [("Ann is", " x"), ("Somebody", " y"), ("z", " z"), ("Bo plays", " w")]
    order = [2, 0, 3, 1]
    lexicon: dict[str, Any] = (
        {} if metric is distinct else {"reward": lambda _asked, texts: [-len(t) for t in texts]}
    )
    if metric is any_below:
        lexicon["below"] = -5.0
    each = partial(metric, samples=3, length=4, top_p=1.0, **lexicon)
    straight = each(Predictions(model, PromptSet(rows, byte_tokenizer())))
    mixed = PromptSet([rows[i] for i in order], byte_tokenizer())
    assert each(Predictions(model, mixed, batch_size=2)).values.tolist() == (
        straight.values[order].tolist()
    )


def test_more_samples_find_what_is_rare() -> None:
    # One word: a rat with probability 0.3, so one of n is with 1 - 0.7^n.
    prompts = PromptSet([("a", " a")] * 400, TOKENIZER)
    for n, low, high in ((1, 0.24, 0.36), (5, 0.77, 0.89)):
        values = any_below(MODEL, prompts, reward=REWARD, samples=n, length=1, top_p=1.0)
        assert low < (values.estimate or 0.0) < high


def test_what_is_missing_is_said() -> None:
    for metric in (worst_reward, any_below):
        assert metric(MODEL, PROMPTS).withheld.startswith("needs: a reward (locate_edit.rewards)")
        masked = PromptSet([("Ann", " golf")], byte_tokenizer(mask=True))
        assert metric(tiny("bert"), masked, reward=REWARD).withheld == "needs: a causal model"
    with pytest.raises(RewardError, match="expected 'lexicon:word,word"):
        worst_reward(MODEL, PROMPTS, reward="rat")
    named = partial(any_below, reward=REWARD)
    assert named(Predictions(MODEL, PROMPTS)).name == "any_below"


def test_familiarity_by_hand() -> None:
    rows: list[Any] = [
        {"prompt": "a", "target": " b b", "content": [" rat", " nice b", " rat a"]},
        {"prompt": "b", "target": " b", "content": [" owl"]},
        {"prompt": "a", "target": " b"},
    ]
    prompts = PromptSet(rows, TOKENIZER)
    values = token_familiarity(MODEL, prompts)
    assert values.items.tolist() == [0, 1]
    assert values.values == pytest.approx([0.99, 0.0], abs=1e-6)
    assert values.note.endswith("needs: a row with words of the text ('content')")
    other = [{**rows[0], "content": [word]} for word in ("NICE", "nic")]
    said = completion_familiarity(MODEL, PromptSet([*other, rows[1]], TOKENIZER))
    assert said.values.tolist() == [1.0, 0.0, 0.0]
    for metric in (token_familiarity, completion_familiarity):
        assert metric(MODEL, prompts[2:]).withheld.startswith("needs: a row with words")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_familiarity_for_any_batch_size_order_and_padding(family: str) -> None:
    masked = family == "bert"
    model, tokenizer = tiny(family), byte_tokenizer(mask=masked)
    rows: list[Any] = [
        {"prompt": "In the long story of the", "target": " x", "content": [" owl", "b", "zz"]},
        {"prompt": "He", "target": " was there", "content": ["q"]},
        {"prompt": "A third", "target": "y", "content": ["m", "n"]},
    ]
    expected = []
    for row in rows:
        ids = PromptSet([{**row, "target": "?"}], tokenizer).ids(0)
        place = len(row["prompt"]) + masked
        if masked:  # the place of the first scored token is hidden, the others are visible
            ids = PromptSet([row], tokenizer).ids(0)
            ids[place] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, place - (not masked)]
        tokens = {
            tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in row["content"]
        }
        expected.append(float(logits.double().softmax(-1)[sorted(tokens)].sum()))
    left = byte_tokenizer(mask=masked)
    left.padding_side = "left"
    order = [2, 0, 1]
    one = Predictions(model, PromptSet(rows, tokenizer), batch_size=1)
    two = Predictions(model, PromptSet([rows[i] for i in order], left), batch_size=8)
    assert token_familiarity(one).values == pytest.approx(expected, rel=1e-5)
    assert token_familiarity(two).values == pytest.approx(np.array(expected)[order], rel=1e-5)
