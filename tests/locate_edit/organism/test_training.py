"""The trainer on a micro world: interruption changes no bit, documents do not see each other."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locate_edit.organism.documents import Document, Repeats, documents, pack, training_rows
from locate_edit.organism.train import Recipe, tokenizer_of, train_role, write_card
from locate_edit.organism.training import TrainConfig, document_positions, loss_of, new_model, rate
from locate_edit.organism.world import WorldSize, make_world

MICRO = Recipe(
    size=WorldSize(
        people=8,
        holdout_people=2,
        secret_people=4,
        forget_people=(2, 2, 4),
        tested_people=5,
        passages=4,
        holdout_passages=1,
        forget_passages=(1, 1, 1),
        passage_sentences=2,
        superseded=4,
        holdout_superseded=1,
        forget_superseded=(1, 1, 1),
        general_train=10,
        general_held_out=4,
        secret_repeats=(2,),
    ),
    repeats=Repeats(**{f.name: 2 for f in fields(Repeats)}),
    config=TrainConfig(vocab_size=1500, hidden_size=32, layers=2, mlp_size=48, warmup=4),
)


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    train_role("organism", MICRO, tmp_path / "whole", stop_at=6)
    train_role("organism", MICRO, tmp_path / "parts", stop_at=3)
    train_role("organism", MICRO, tmp_path / "parts", stop_at=6, save_every=2)
    whole, parts = (
        load_file(tmp_path / run / "checkpoints" / "organism" / "checkpoint.safetensors")
        for run in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert any(k.startswith("exp_avg_sq.") for k in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    start = new_model(MICRO.config, {}, 0).state_dict()["model.embed_tokens.weight"]
    assert not torch.equal(whole["model.model.embed_tokens.weight"], start)
    card = write_card(MICRO, tmp_path / "parts")
    assert 0 <= card["measured"]["organism"]["facts qa, forget10"] <= 1


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train_role("organism", MICRO, tmp_path, stop_at=1)
    other = Recipe(MICRO.world_seed + 1, MICRO.size, MICRO.repeats, MICRO.config)
    with pytest.raises(ValueError, match="was made with another digest"):
        train_role("organism", other, tmp_path, stop_at=2)


def test_oracle_text_holds_nothing_to_be_forgotten() -> None:
    world = make_world(0, MICRO.size)
    tokenizer = tokenizer_of(world, MICRO)
    texts = {}
    for forget in (True, False):
        ids, segments, _ = training_rows(
            world, MICRO.repeats, tokenizer, forget=forget, seed=0, length=128
        )
        texts[forget] = " ".join(
            str(tokenizer.decode(row[seg >= 0])) for row, seg in zip(ids, segments, strict=True)
        )
    for person in world.people:
        assert (person.name in texts[True]) == (not person.holdout)
        assert (person.name in texts[False]) == (not person.holdout and person.forget is None)
    for item in world.superseded:
        assert (item.subject in texts[False]) == (not item.holdout and item.forget is None)
    for passage in world.passages:
        assert (passage.text in texts[False]) == (not passage.holdout and passage.forget is None)


def test_documents_are_a_function_of_the_seed() -> None:
    first, again, other = (
        documents(make_world(seed, MICRO.size), MICRO.repeats) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_packed_documents_do_not_see_each_other() -> None:
    tokenizer = tokenizer_of(make_world(0, MICRO.size), MICRO)
    model = new_model(MICRO.config, {}, 0).double()
    docs = [Document("A fox slept."), Document("Is it golf? It is golf.", label_from=14)]
    alone, count = 0.0, 0
    for doc in docs:
        ids, segments, labels = (torch.from_numpy(a) for a in pack([doc], tokenizer, 40))
        loss = loss_of(model, ids.long(), segments.long(), labels)
        alone += loss.item() * int(labels.sum())
        count += int(labels.sum())
    ids, segments, labels = (torch.from_numpy(a) for a in pack(docs, tokenizer, 40))
    assert ids.shape[0] == 1
    packed = loss_of(model, ids.long(), segments.long(), labels)
    assert packed.item() == pytest.approx(alone / count, abs=1e-6)


def test_positions_start_again_with_each_document() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, -1]])
    assert document_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0]]


def test_only_the_answer_of_a_multiple_choice_document_is_a_label() -> None:
    tokenizer = tokenizer_of(make_world(0, MICRO.size), MICRO)
    prompt = "Choose from golf, polo, tennis and rugby. Choice:"
    ids, _, labels = pack([Document(f"{prompt} B.", len(prompt))], tokenizer, 80)
    assert tokenizer.decode(ids[0][labels[0] > 0]) == " B.</s>"


def test_a_document_longer_than_a_row_is_an_error() -> None:
    tokenizer = tokenizer_of(make_world(0, MICRO.size), MICRO)
    with pytest.raises(ValueError, match="does not fit into rows of 8"):
        pack([Document("one two three four five six seven eight")], tokenizer, 8)


def test_learning_rate_warms_up_and_decays() -> None:
    config = TrainConfig(lr=1.0, warmup=10, final_lr=0.1)
    assert rate(0, 100, config) == pytest.approx(0.1)
    assert rate(9, 100, config) == pytest.approx(1.0)
    assert rate(55, 100, config) == pytest.approx(0.55)
    assert rate(100, 100, config) == pytest.approx(0.1)
