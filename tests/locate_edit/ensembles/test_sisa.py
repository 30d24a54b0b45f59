"""Exact deletion against ensembles that never had the row, votes by hand, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits import ComponentMask
from locate_edit import EditError, PromptSet
from locate_edit.engine import StopWhen
from locate_edit.ensembles.shards import Place, check_disjoint, places, text_of
from locate_edit.ensembles.sisa import ShardedEnsemble, Sisa
from locate_edit.methods.fine_tune import FineTune
from tests.conftest import fingerprint
from tests.locate_edit.engine_setting import differing, model, some_units, state
from tests.tiny import MASKED, byte_tokenizer

LEARN = FineTune(steps=3, lr=2e-2)
RULE = (("sky", "no"), ("red", "yes"))
OPTIONS: dict[str, Any] = {"batch_size": 2}


def rows(n: int = 12) -> list[dict[str, Any]]:
    return [{"prompt": f"Item {i:02d} is", "target": " yes" if i % 2 else " no"} for i in range(n)]


def data(name: str = "llama-tied", n: int = 12) -> PromptSet:
    return PromptSet(rows(n), byte_tokenizer(mask=name in MASKED), name="data")


def bits(ensemble: ShardedEnsemble) -> list[list[dict[str, torch.Tensor] | None]]:
    return [
        [None if d is None else {name: c.new for name, c in d} for d in stages]
        for stages in ensemble.checkpoints
    ]


def same(a: ShardedEnsemble, b: ShardedEnsemble) -> bool:
    for ours, theirs in zip(bits(a), bits(b), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            if (one is None) != (other is None):
                return False
            if one is not None and other is not None:
                if not all(torch.equal(one[name], other[name]) for name in one | other):
                    return False
    return True


# -- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
@pytest.mark.parametrize("gone", [[0], [5, 7], [3, 4, 8, 9]])
def test_deletion_is_never_having_had_the_rows_bit_for_bit(name: str, gone: list[int]) -> None:
    net = model(name)
    base, mask, everything = state(net), some_units(net), data(name)
    sisa = Sisa(LEARN, shards=3, slices=2, seed=1, options=OPTIONS)
    ensemble = sisa.train(net, everything, mask)
    assert not differing(net, base)
    assert same(ensemble, sisa.train(net, everything, mask))
    left = [i for i in range(len(everything)) if i not in gone]
    never = sisa.train(net, everything.select(left), mask)
    assert not same(ensemble, never), "the rows had no influence, so this test shows nothing"
    ensemble.delete(gone)
    assert same(ensemble, never)
    assert ensemble.places == never.places
    assert [row["prompt"] for row in ensemble.data] == [row["prompt"] for row in never.data]
    assert not differing(net, base)


def test_deletions_one_after_the_other_are_deletions_at_once() -> None:
    net = model("llama-tied")
    mask = some_units(net)
    sisa = Sisa(LEARN, shards=2, slices=3, options=OPTIONS)
    one, other = sisa.train(net, data(), mask), sisa.train(net, data(), mask)
    one.delete([2, 9])
    other.delete([9])
    other.delete([2])
    assert same(one, other)


def test_without_a_mask_and_in_bfloat16() -> None:
    net = model("llama-tied", torch.bfloat16)
    sisa = Sisa(LEARN, shards=2, slices=2, options=OPTIONS)
    ensemble = sisa.train(net, data(), None)
    never = sisa.train(net, data().select(range(1, 12)), None)
    ensemble.delete([0])
    assert same(ensemble, never)


def test_only_stages_from_the_rows_slice_on_are_trained_again() -> None:
    net = model("llama-tied")
    sisa = Sisa(LEARN, shards=3, slices=3, options=OPTIONS)
    ensemble = sisa.train(net, data(n=30), some_units(net))
    before = [list(stages) for stages in ensemble.checkpoints]
    item = next(i for i, place in enumerate(ensemble.places) if place.slice == 1)
    place = ensemble.places[item]
    assert ensemble.delete([item]) == [Place(place.shard, 1), Place(place.shard, 2)]
    for shard, stages in enumerate(ensemble.checkpoints):
        kept = [now is was for now, was in zip(stages, before[shard], strict=True)]
        assert kept == ([True, False, False] if shard == place.shard else [True] * 3)


def test_a_stage_trains_on_all_slices_so_far_from_the_checkpoint_before() -> None:
    """One shard, two slices, against two edits by hand."""
    from locate_edit import edit

    net, other = model("llama-tied"), model("llama-tied")
    mask = some_units(net)
    ensemble = Sisa(LEARN, shards=1, slices=2, seed=4, options=OPTIONS).train(net, data(), mask)
    early = [i for i, place in enumerate(ensemble.places) if place.slice == 0]
    assert 0 < len(early) < 12
    edit(other, LEARN, mask, forget=data().select(early), seed=4, batch_size=2)
    edit(other, LEARN, mask, forget=data(), seed=5, batch_size=2)
    with ensemble.member(0) as shard:
        assert not differing(shard, state(other))


def test_a_shard_that_loses_all_rows_no_longer_votes() -> None:
    net = model("llama-tied")
    ensemble = Sisa(LEARN, shards=3, slices=2, options=OPTIONS).train(net, data(), some_units(net))
    ensemble.delete([i for i, place in enumerate(ensemble.places) if place.shard == 1])
    assert ensemble.voters == [0, 2]
    assert ensemble.checkpoints[1] == [None, None]
    assert ensemble.answers(data(), (" yes", " no")).shape == (2, 12)
    with ensemble.member(1) as as_base:
        assert not differing(as_base, state(model("llama-tied")))


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_a_deletion_that_fails_leaves_everything_as_it_was(problem: type[BaseException]) -> None:
    net = model("llama-tied")
    armed = [False]

    def break_down(_: torch.nn.Module) -> float:
        if armed[0]:
            raise problem
        return 0.0

    options = {**OPTIONS, "stop": StopWhen(break_down, every=2)}
    ensemble = Sisa(LEARN, options=options).train(net, data(), some_units(net))
    before, as_was, known = state(net), fingerprint(net), bits(ensemble)
    armed[0] = True
    with pytest.raises(problem):
        ensemble.delete([0, 1, 2, 3])
    assert not differing(net, before)
    assert fingerprint(net) == as_was
    assert len(ensemble.data) == 12
    assert str(bits(ensemble)) == str(known)


# -- places ---------------------------------------------------------------------------------------


def test_places_do_not_depend_on_the_other_rows() -> None:
    whole = places(data(n=60), shards=4, slices=3, by="text", seed=0)
    part = places(data(n=60).select(range(7, 60)), shards=4, slices=3, by="text", seed=0)
    assert part == whole[7:]
    assert {place.shard for place in whole} == {0, 1, 2, 3}
    assert {place.slice for place in whole} == {0, 1, 2}
    assert places(data(n=60), shards=4, slices=3, by="text", seed=1) != whole


def test_groups_stay_together_and_equal_texts_meet() -> None:
    tokenizer = byte_tokenizer()
    grouped = [{**row, "group": f"person {i % 6}"} for i, row in enumerate(rows(36))]
    found = places(PromptSet(grouped, tokenizer), shards=2, slices=2, by="group", seed=0)
    for person in range(6):
        assert len({place.shard for place in found[person::6]}) == 1
    twice = PromptSet([*rows(), *rows()], tokenizer)
    found = places(twice, shards=3, slices=2, by="text", seed=0)
    assert found[:12] == found[12:]


def test_a_text_in_two_shards_is_refused_naming_its_rows() -> None:
    tokenizer = byte_tokenizer()
    people = [{**row, "group": f"person {i}"} for i, row in enumerate(rows())]
    shard = [
        p.shard
        for p in places(PromptSet(people, tokenizer), shards=2, slices=1, by="group", seed=0)
    ]
    other = next(i for i in range(12) if shard[i] != shard[3])
    copy = {"prompt": "ITEM  03 is", "target": " yes", "group": f"person {other}"}
    assert text_of(copy) == text_of(people[3]) == "item 03 is yes"
    torn = PromptSet([*people, copy], tokenizer)
    with pytest.raises(
        EditError,
        match=rf"1 texts stand in more than one shard.*row 3 \(shard {shard[3]}\), row 12 \(shard {shard[other]}\)",
    ):
        Sisa(LEARN, shards=2, slices=1, by="group").train(model("llama-tied"), torn, None)
    check_disjoint(torn, [Place(0, 0)] * 13)


def test_a_text_that_stays_in_another_row_is_named(caplog: pytest.LogCaptureFixture) -> None:
    twice = PromptSet([*rows(), {"prompt": "ITEM  03 is", "target": " yes"}], byte_tokenizer())
    net = model("llama-tied")
    ensemble = Sisa(LEARN, shards=2, slices=1, options=OPTIONS).train(net, twice, some_units(net))
    ensemble.delete([4])
    assert not caplog.messages
    ensemble.delete([3])  # the copy was row 12, and rows 3 and 4 are gone
    (message,) = caplog.messages
    assert (
        "also stands in row 10 (counted after the deletion), which stays: delete it too" in message
    )


# -- votes ----------------------------------------------------------------------------------------


def test_votes_by_hand() -> None:
    ballots = torch.tensor([[0, 1, 2, 1], [0, 1, 1, 0], [1, 1, 0, 2]])
    assert ShardedEnsemble.vote(ballots).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
def test_ballots_are_what_each_member_finds_likeliest(name: str) -> None:
    net = model(name)
    prompts = data(name)
    sisa = Sisa(FineTune(steps=8, lr=2e-2), shards=3, slices=1, seed=1, options=OPTIONS)
    ensemble = sisa.train(net, prompts, some_units(net))
    choices = (" yes", " no", " so")
    found = ensemble.answers(prompts, choices, batch_size=5)
    tokens = ensemble.next_tokens(prompts, batch_size=5)
    from locate_edit.metrics.predictions import Predictions

    for voter, shard in enumerate(ensemble.voters):
        with ensemble.member(shard) as member:
            scores = []
            for choice in choices:
                asked = prompts.reread([{**row, "target": choice} for row in rows()])
                logprob = Predictions(member, asked)._scored.logprob
                lengths = [len(asked.target_ids(i)) for i in range(len(asked))]
                parts = torch.tensor(logprob).split(lengths)
                scores.append(torch.stack([part.sum() for part in parts]))
            assert found[voter].tolist() == torch.stack(scores).argmax(0).tolist()
            seen = Predictions(member, prompts)._scored.top
            starts = [sum(len(prompts.target_ids(j)) for j in range(i)) for i in range(12)]
            assert tokens[voter].tolist() == [int(seen[start]) for start in starts]


def test_an_ensemble_learns_what_its_shards_saw() -> None:
    """A rule in every row is learnt by the vote, for three seeds."""
    for seed in (0, 1, 2):
        net = model("llama-tied")
        told = [(f"{word} {i:02d} is", f" {said}") for i in range(6) for word, said in RULE]
        rule = PromptSet(told, byte_tokenizer())
        sisa = Sisa(FineTune(steps=40, lr=1e-2), shards=3, slices=1, seed=seed)
        ensemble = sisa.train(net, rule, None)
        voted = ensemble.vote(ensemble.answers(rule, (" no", " yes")))
        right = (voted == torch.arange(12) % 2).float().mean()
        assert float(right) >= 0.9


# -- refusals -------------------------------------------------------------------------------------


def test_what_is_wrong_is_refused_before_anything_changes() -> None:
    net = model("llama-tied")
    before, mask = state(net), some_units(net)
    with pytest.raises(EditError, match="by='group' needs a 'group' in every row, and row 0"):
        Sisa(by="group").train(net, data(), mask)
    with pytest.raises(EditError, match="2 rows fall into shards of"):
        Sisa(shards=3).train(net, data(n=2), mask)
    with pytest.raises(EditError, match="a shard and a slice"):
        Sisa(shards=0)
    with pytest.raises(EditError, match="by must be"):
        Sisa(by="size")  # type: ignore[arg-type]
    with pytest.raises(EditError, match=r"options may not hold \['seed'\]"):
        Sisa(options={"seed": 1})
    ensemble = Sisa(LEARN, options=OPTIONS).train(net, data(), mask)
    with pytest.raises(EditError, match="no row 12: the ensemble has rows 0 to 11"):
        ensemble.delete([12])
    with pytest.raises(EditError, match="nothing would be left"):
        ensemble.delete(range(12))
    with pytest.raises(EditError, match="two answers"):
        ensemble.answers(data(), (" yes",))
    assert not differing(net, before)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 1e-3
    with pytest.raises(EditError, match="not the base of this ensemble"):
        ensemble.delete([0])
    with pytest.raises(EditError, match="not the base of this ensemble"), ensemble.member(0):
        pass


def test_an_empty_mask_leaves_every_shard_at_the_base() -> None:
    net = model("llama-tied")
    nothing: ComponentMask = some_units(net, share=0.0)
    ensemble = Sisa(LEARN, options=OPTIONS).train(net, data(), nothing)
    assert all(d is None or d.count() == 0 for stages in ensemble.checkpoints for d in stages)


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
def test_a_saved_ensemble_votes_and_deletes_as_the_one_that_was_saved(
    tmp_path: Path, masked: bool
) -> None:
    net, everything = model("llama-tied"), data()
    sisa = Sisa(LEARN, shards=3, slices=3, seed=1, options=OPTIONS)
    ensemble = sisa.train(net, everything, some_units(net) if masked else None)
    base = state(net)
    ensemble.save(tmp_path / "kept")
    again = ShardedEnsemble.load(tmp_path / "kept", sisa, net, data())
    assert not differing(net, base)
    assert same(ensemble, again)
    assert again.places == ensemble.places
    assert again.mask == ensemble.mask
    ballots = [each.answers(everything, (" yes", " no")) for each in (ensemble, again)]
    assert torch.equal(ballots[0], ballots[1])
    assert ensemble.delete([3]) == again.delete([3])
    assert same(ensemble, again)
    ensemble.save(tmp_path / "kept")
    after = ShardedEnsemble.load(tmp_path / "kept", sisa, net, again.data)
    assert same(after, again)
    assert after.places == again.places


def test_empty_slices_and_lost_shards_are_kept_as_such(tmp_path: Path) -> None:
    net = model("llama-tied")
    sisa = Sisa(LEARN, shards=3, slices=4, seed=1, options=OPTIONS)
    ensemble = sisa.train(net, data(n=9), some_units(net))
    ensemble.delete([i for i, place in enumerate(ensemble.places) if place.shard == 0])
    ensemble.save(tmp_path / "kept")
    again = ShardedEnsemble.load(tmp_path / "kept", sisa, net, ensemble.data)
    assert again.voters == ensemble.voters
    assert 0 not in again.voters
    alike = [
        [[a is b for a in stages] for b in stages]
        for each in (ensemble, again)
        for stages in each.checkpoints
    ]
    assert alike[:3] == alike[3:]


def test_what_does_not_belong_to_a_saved_ensemble_is_refused(tmp_path: Path) -> None:
    net = model("llama-tied")
    sisa = Sisa(LEARN, shards=2, slices=1, seed=1, options=OPTIONS)
    ensemble = sisa.train(net, data(), some_units(net))
    folder = ensemble.save(tmp_path / "kept")
    with pytest.raises(EditError, match="same settings"):
        ShardedEnsemble.load(folder, replace(sisa, seed=2), net, data())
    with pytest.raises(EditError, match="are not the rows"):
        ShardedEnsemble.load(folder, sisa, net, data(n=11))
    with pytest.raises(EditError, match="not the base"), ensemble.member(0) as member:
        ShardedEnsemble.load(folder, sisa, member, data())
    with pytest.raises(EditError, match="cannot be read"):
        ShardedEnsemble.load(tmp_path, sisa, net, data())
    index = folder / "ensemble.json"
    text = index.read_text()
    index.write_text(text.replace('"places"', '"place"'))
    with pytest.raises(EditError, match="was changed after"):
        ShardedEnsemble.load(folder, sisa, net, data())
    index.write_text(text)
    file = folder / "shard1-slice0.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(EditError, match="truncated or was changed"):
        ShardedEnsemble.load(folder, sisa, net, data())
    file.unlink()
    with pytest.raises(EditError, match="is missing"):
        ShardedEnsemble.load(folder, sisa, net, data())
