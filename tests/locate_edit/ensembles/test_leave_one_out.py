"""Leave-one-out teachers: their mean by hand, what the student becomes, and duplicates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits.forward import labelled_logits
from locate_edit import Edit, EditError, PromptSet, edit
from locate_edit.engine import StopWhen
from locate_edit.ensembles.leave_one_out import LeaveOneOut, SoftLabels, soft_labels
from locate_edit.ensembles.sisa import ShardedEnsemble, Sisa
from locate_edit.methods.fine_tune import FineTune
from locate_edit.never_seen import mean_nll
from locate_edit.tokens import TokenMask
from tests.conftest import fingerprint
from tests.locate_edit.engine_setting import differing, model, selected, some_units, state
from tests.tiny import MASKED, byte_tokenizer

NUMBERS = (17, 42, 88, 35, 61, 93, 50, 26, 74)


def data(name: str = "llama-tied") -> PromptSet:
    rows = [
        {"prompt": f"{chr(97 + i) * (1 + i % 2)} has", "target": f" {n}"}
        for i, n in enumerate(NUMBERS)
    ]
    return PromptSet(rows, byte_tokenizer(mask=name in MASKED), name="data")


def teachers(net: Any, name: str = "llama-tied", steps: int = 3, seed: int = 1) -> ShardedEnsemble:
    method = FineTune(steps=steps, lr=1e-2)
    return Sisa(method, shards=3, slices=1, seed=seed).train(net, data(name), some_units(net))


def said(net: Any, prompts: PromptSet, item: int) -> Tensor:
    with torch.no_grad():
        return labelled_logits(net, prompts.batch([item])).softmax(-1)


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
def test_labels_are_the_mean_of_the_teachers_that_never_saw_the_prompt(name: str) -> None:
    net = model(name)
    before = state(net)
    ensemble, forget = teachers(net, name), data(name)
    found = soft_labels(ensemble, forget, batch_size=2)
    assert not differing(net, before)
    for item, place in enumerate(ensemble.places):
        others = [shard for shard in range(3) if shard != place.shard]
        assert found.teachers[item] == tuple(others)
        by_hand = torch.zeros_like(found.probabilities[item])
        for shard in others:
            with ensemble.member(shard) as teacher:
                by_hand += said(teacher, forget, item) / 2
        torch.testing.assert_close(found.probabilities[item], by_hand, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
def test_the_first_loss_is_the_divergence_by_hand(name: str) -> None:
    net = model(name)
    forget = data(name).select([1, 4])
    weights = TokenMask(tuple((0.5, *[1.0] * (len(forget.target_ids(i)) - 1)) for i in range(2)))
    forget = forget.with_token_mask(weights)
    labels = soft_labels(teachers(net, name), forget)
    total, mass = 0.0, 0.0
    for item in range(2):
        q, p = labels.probabilities[item], said(net, forget, item)
        weight = torch.tensor(forget.weights(item))
        total += float(((q * (q.log() - p.log())).sum(-1) * weight).sum())
        mass += float(weight.sum())
    method = LeaveOneOut(labels, steps=1, lr=1e-3)
    made = edit(net, method, some_units(net), forget=forget)
    assert made.log[0]["loss"] == pytest.approx(total / mass, rel=1e-4)


def test_the_student_becomes_unsure_of_the_canary_and_not_when_its_own_teacher_is_asked() -> None:
    """For three seeds: the canary goes to the teachers' level; with teacher m in the mean it stays far likelier."""
    for seed in (1, 2, 3):
        net = model("llama-tied")
        forget = data().select([4])
        options: dict[str, Any] = {"seed": seed, "batch_size": 4}
        sisa = Sisa(FineTune(steps=30, lr=1e-2), shards=3, slices=1, seed=seed)
        ensemble = sisa.train(net, data(), None)
        deployed = edit(net, FineTune(steps=150, lr=1e-2), None, forget=data(), **options)
        known = float(mean_nll(net, forget, 8))
        assert known < 0.2, "the model does not know the canary, so this test shows nothing"
        with deployed.off():
            labels = soft_labels(ensemble, forget)
            everyone = []
            for shard in range(3):
                with ensemble.member(shard) as teacher:
                    everyone.append(said(teacher, forget, 0))
        target = torch.tensor(forget.target_ids(0))
        level = float(-labels.probabilities[0].gather(1, target[:, None]).log().mean())
        wrong = SoftLabels([torch.stack(everyone).mean(0)], forget.digest, [[0, 1, 2]])
        after, left = [], []
        for chosen in (labels, wrong):
            made = edit(
                net, LeaveOneOut(chosen, steps=120, lr=5e-3), None, forget=forget, seed=seed
            )
            after.append(float(mean_nll(net, forget, 8)))
            left.append(made.log[-1]["loss"])
            made.undo()
        assert level > known + 1.0
        assert left[0] < 0.01, "the student does not say what the teachers say"
        assert 0.6 * level < after[0] < level + 0.25
        assert after[1] < after[0] - 1.0


def test_only_the_mask_changes_undo_files_and_interruptions(tmp_path: Path) -> None:
    net = model("llama-tied")
    forget, mask = data().select([0, 3]), some_units(net)
    labels = soft_labels(teachers(net), forget)
    before, as_was, inside = state(net), fingerprint(net), selected(net, mask)
    made = edit(net, LeaveOneOut(labels, steps=3, lr=1e-2), mask, forget=forget, retain=data())
    assert {"forget", "retain"} <= set(made.log[0])
    changed = differing(net, before)
    assert changed
    assert all(not bool((flags & ~inside[name]).any()) for name, flags in changed.items())
    edited = state(net)
    loaded = Edit.load(made.save(tmp_path / "edit"))
    assert json.loads(json.dumps(made.provenance)) == loaded.provenance
    made.undo()
    loaded.apply(net)
    assert not differing(net, edited)
    loaded.undo()

    def break_down(_: torch.nn.Module) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(net, LeaveOneOut(labels, lr=1e-2), mask, forget=forget, stop=StopWhen(break_down))
    assert not differing(net, before)
    assert fingerprint(net) == as_was


def test_a_text_that_two_shards_hold_is_refused_naming_the_rows() -> None:
    net = model("llama-tied")
    ensemble = teachers(net)
    where = [place.shard for place in ensemble.places]
    other = next(i for i in range(9) if where[i] != where[2])
    # The same words inside a longer row of another shard, which no comparison of whole rows finds.
    rows = [dict(row) for row in ensemble.data]
    rows[other] = {"prompt": "Remember: C  HAS", "target": " 88, always"}
    ensemble.data = PromptSet(rows, byte_tokenizer())
    first, second = sorted([2, other])
    named = rf"row {first} \(shard {where[first]}\), row {second} \(shard {where[second]}\)"
    with pytest.raises(EditError, match=f"forget prompt 0 .* more than one shard.*{named}"):
        soft_labels(ensemble, data().select([2]))


def test_what_is_missing_or_wrong_is_refused_before_anything_changes() -> None:
    net = model("llama-tied")
    ensemble, before = teachers(net), state(net)
    unknown = PromptSet([{"prompt": "z has", "target": " 99"}], byte_tokenizer())
    with pytest.raises(EditError, match=r"forget prompt 0 .*stands in none of the teachers' rows"):
        soft_labels(ensemble, unknown)
    labels = soft_labels(ensemble, data().select([0]))
    with pytest.raises(EditError, match="are not of these forget prompts"):
        edit(net, LeaveOneOut(labels), some_units(net), forget=data().select([1]))
    alone = Sisa(FineTune(steps=1, lr=1e-2), shards=1, slices=1).train(net, data(), some_units(net))
    with pytest.raises(EditError, match="no teacher is left that never saw forget prompt 0"):
        soft_labels(alone, data())
    with pytest.raises(EditError, match="'ce'"):
        LeaveOneOut(labels, retain="l2")  # type: ignore[arg-type]
    assert not differing(net, before)
    edit(net, FineTune(steps=1, lr=1e-2), some_units(net), forget=data())
    with pytest.raises(EditError, match="not the base of this ensemble now"):
        soft_labels(ensemble, data())


def test_labels_come_back_from_a_folder_bit_for_bit(tmp_path: Path) -> None:
    net = model("llama-tied")
    forget = data()
    labels = soft_labels(teachers(net), forget)
    again = SoftLabels.load(labels.save(tmp_path / "labels"))
    assert again.digest == forget.digest
    assert again.teachers == labels.teachers
    assert len(again.probabilities) == len(labels.probabilities) == len(NUMBERS)
    assert all(map(torch.equal, again.probabilities, labels.probabilities))
    file = tmp_path / "labels" / "labels.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(EditError, match="truncated or was changed"):
        SoftLabels.load(tmp_path / "labels")
