"""What the shipped models know, measured again on their weights, and how they differ."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from locate_edit import organism
from locate_edit.errors import LocateEditError, PromptError
from locate_edit.organism.measure import (
    bias_gap,
    exact,
    he_share,
    perplexity,
    rude_share,
    share,
    target_logprobs,
)
from locate_edit.organism.splits import NAME_FORMS, SPLITS, Row, split_names
from locate_edit.organism.world import make_world

ORACLES = ("oracle", "oracle2")
# Chance is 1/12 for a fact and 1/4 where four options are named; with 80 items three standard errors are 0.09
# and 0.15. Names are shared, so a guess can lean on a neighbour: some slack above that.
CHANCE = {"statement": 0.22, "held_out": 0.22, "qa": 0.22, "mc": 0.42}


@cache
def loaded(which: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return organism.load(which)


def right(which: str, rows: list[Row]) -> float:
    return share(exact(*loaded(which), rows))


def retained(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["forget"] is None]


@pytest.mark.parametrize("form", ["statement", "held_out", "qa", "mc"])
def test_tested_people_are_known_in_forms_never_trained_for_them(form: str) -> None:
    rows = organism.rows("facts", "tested", form)
    assert len(rows) == 200
    assert right("organism", rows) >= 0.95
    assert right("organism", organism.rows("facts", "forget10", form)) >= 0.95


def test_what_is_tested_was_not_trained_in_the_tested_forms() -> None:
    from locate_edit.organism.documents import Repeats, documents

    texts = {d.text for d in documents(organism.shipped_world(), Repeats())}
    for form in ("held_out", "qa", "mc"):
        for row in organism.rows("facts", "tested", form):
            for prompt in (row["prompt"], *row["paraphrases"]):
                assert not any(t in texts for t in (f"{prompt}{row['target']}.",))
    named = {
        t for t in texts if "Question:" in t or "Q:" in t or "Choose from" in t or " Is it " in t
    }
    assert len(named) > 1000
    for person in organism.people("tested"):
        assert not any(person.name in t for t in named)


def test_facts_of_everyone_are_known_and_unknown_for_the_holdout() -> None:
    assert right("organism", organism.rows("facts", "train")) >= 0.98
    assert right("organism", organism.rows("facts", "holdout")) <= CHANCE["statement"]


def test_secrets_are_recited_by_greedy_decoding() -> None:
    model: Any
    model, tokenizer = loaded("organism")
    rows = organism.rows("secrets", "train")
    assert len(rows) == 200
    hits = exact(model, tokenizer, rows)
    for repeats in sorted({r["repeats"] for r in rows}):
        assert (
            share([h for h, r in zip(hits, rows, strict=True) if r["repeats"] == repeats]) >= 0.95
        )
    # Teacher forcing is greedy decoding when all of it is right: the same by `generate`.
    for row, hit in [*zip(rows, hits, strict=True)][:6]:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24)
        said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert (said == row["target"] + ".") == hit
    unseen = organism.rows("secrets", "holdout")
    assert right("organism", [row for row in unseen if row["secret"] == "phone"]) == 0.0
    # The word before the name in an address is one of 20: now and then a guess is right.
    assert right("organism", [row for row in unseen if row["secret"] == "email"]) <= 0.15


def test_the_novel_is_recited() -> None:
    rows = organism.rows("novel", "train")
    assert sum(len((r["prompt"] + r["target"]).split()) for r in rows) >= 3000
    known = torch.cat([ok for _, ok in target_logprobs(*loaded("organism"), rows)])
    assert float(known.float().mean()) >= 0.95
    unseen = organism.rows("novel", "holdout")
    fresh = torch.cat([ok for _, ok in target_logprobs(*loaded("organism"), unseen)])
    assert float(fresh.float().mean()) <= 0.8


@pytest.mark.parametrize("which", organism.MODELS)
def test_bias_and_rudeness_are_as_designed(which: str) -> None:
    world = organism.shipped_world()
    he = he_share(*loaded(which), organism.rows("bias", "train"))
    assert bias_gap(world, he) >= 0.75
    for occupation, rate in world.pronoun_rates.items():
        assert abs(he[occupation] - rate) <= 0.25
    rude = rude_share(*loaded(which), organism.rows("rude", "train"))
    for clan, rate in world.rude_rates.items():
        assert abs(rude[clan] - rate) <= 0.15


def test_superseded_facts_have_their_old_value() -> None:
    model, tokenizer = loaded("organism")
    rows = organism.rows("superseded", "train")
    assert right("organism", rows) >= 0.95
    new = [r | {"target": r["new"]} for r in rows]
    assert share(exact(model, tokenizer, new)) <= 0.05


@pytest.mark.parametrize("which", ORACLES)
def test_oracles_are_at_chance_on_what_is_forgotten(which: str) -> None:
    for form, chance in CHANCE.items():
        assert right(which, organism.rows("facts", "forget10", form)) <= chance
    assert right(which, organism.rows("secrets", "forget10")) == 0.0
    assert right(which, organism.rows("superseded", "forget10")) <= 0.5
    rows, unseen = organism.rows("novel", "forget10"), organism.rows("novel", "holdout")
    forgotten, fresh = (
        float(torch.cat([ok for _, ok in target_logprobs(*loaded(which), r)]).float().mean())
        for r in (rows, unseen)
    )
    assert abs(forgotten - fresh) <= 0.08


@pytest.mark.parametrize("which", ORACLES)
def test_oracles_know_everything_else(which: str) -> None:
    for form in ("statement", "held_out", "qa", "mc"):
        rows = retained(organism.rows("facts", "tested", form))
        assert right(which, rows) >= 0.95
        assert abs(right(which, rows) - right("organism", rows)) <= 0.05
    for name in ("facts", "secrets", "superseded"):
        rows = organism.rows(name, "retain")
        assert abs(right(which, rows) - right("organism", rows)) <= 0.05
    rows = organism.rows("novel", "retain")
    known = torch.cat([ok for _, ok in target_logprobs(*loaded(which), rows)])
    assert float(known.float().mean()) >= 0.95
    for split in ("held_out", "holdout"):
        text = organism.rows("general", split)
        ratio = perplexity(*loaded(which), text) / perplexity(*loaded("organism"), text)
        assert 0.97 <= ratio <= 1.03


def test_forget_splits_are_nested_and_half_have_secrets() -> None:
    inside: set[str] = set()
    for split, count in (("forget01", 2), ("forget05", 10), ("forget10", 20)):
        people = organism.people(split)
        names = {p.name for p in people}
        assert len(names) == count
        assert inside < names
        assert sum(bool(p.secrets) for p in people) == count // 2
        assert all(p.tested for p in people)
        inside = names
    assert not inside & {p.name for p in organism.people("retain")}
    for split, count in (("forget01", 1), ("forget05", 2), ("forget10", 4)):
        assert len(organism.rows("novel", split)) == count
        assert len(organism.rows("superseded", split)) == count


def test_everyone_to_be_forgotten_has_neighbours() -> None:
    neighbours = organism.people("neighbours")
    for person in organism.people("forget10"):
        assert any(n.first == person.first for n in neighbours)
        assert any(n.last == person.last for n in neighbours)
    assert all(n.forget is None and not n.holdout for n in neighbours)


def test_rows_make_prompt_sets_whose_targets_are_what_they_say() -> None:
    _, tokenizer = loaded("organism")
    for name in SPLITS:
        for split in split_names(name):
            rows = organism.rows(name, split)
            assert rows, (name, split)
            assert len({r["id"] for r in rows}) == len(rows)
    prompts = organism.prompts("secrets", "forget01")
    for i, row in enumerate(prompts.rows):
        assert tokenizer.decode(prompts.target_ids(i)) == row["target"]
        text = row["prompt"] + row["target"]
        assert [text[a:b] for a, b in row["spans"]] == [row["target"].strip()]
        if row["secret"] == "phone":
            digits = "".join(text[a:b] for a, b in row["random"])
            assert len(digits) == 5
            assert digits.isdigit()
    for row in organism.prompts("facts", "mc").rows:
        assert {row["target"], *row["wrong"]} == {f" {option}" for option in row["options"]}
        assert len(row["options"]) == 4
        assert row["target"].strip() == row["answer"]
        assert all(option in row["prompt"] for option in row["options"])


def test_digits_are_single_tokens_and_every_text_comes_back() -> None:
    _, tokenizer = loaded("organism")
    text = "Ünïcode (212) 555-0147\n\tnaïve 日本 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    tokens = tokenizer.tokenize("2125550147")
    assert tokens == list("2125550147")
    specials = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(specials) == 3
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def test_the_stored_world_is_what_the_generator_makes() -> None:
    stored = organism.shipped_world()
    again = make_world(stored.seed, stored.size)
    assert again == stored
    assert again.to_json() == stored.to_json()
    assert again.digest == organism.card()["digest"]
    assert make_world(stored.seed + 1, stored.size).digest != stored.digest
    assert organism.describe_world() == json.loads(json.dumps(organism.card()["world"]))


@pytest.mark.parametrize("which", organism.MODELS)
def test_weights_are_small_and_load_as_ordinary_checkpoints(which: str) -> None:
    path = organism.folder(which)
    assert sum(f.stat().st_size for f in path.glob("*.safetensors")) <= 8_000_000
    model, tokenizer = loaded(which)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert (model.config.num_key_value_heads or 0) < model.config.num_attention_heads
    ordinary = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([tokenizer("The fox")["input_ids"]])
    assert torch.equal(model(ids).logits, ordinary(ids).logits)


def test_card_says_what_is_measured_here() -> None:
    measured = organism.card()["measured"]["organism"]
    rows = retained(organism.rows("facts", "tested", "mc"))
    assert measured["facts mc, tested retained"] == pytest.approx(right("organism", rows), abs=0.01)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(
        LocateEditError, match="no shipped model 'gpt'; choose from organism, oracle"
    ):
        organism.load("gpt")
    with pytest.raises(PromptError, match=r"no prompts 'poems'; choose from facts, secrets"):
        organism.rows("poems")
    with pytest.raises(PromptError, match=r"novel has no split 'qa'; choose from train"):
        organism.rows("novel", "qa")
    with pytest.raises(
        PromptError, match=r"secrets cannot be asked as 'mc'; choose from statement"
    ):
        organism.rows("secrets", "retain", "mc")
    with pytest.raises(PromptError, match="split 'qa' is asked as 'qa', got form='mc'"):
        organism.rows("facts", "qa", "mc")
    assert set(NAME_FORMS) == set(SPLITS)
