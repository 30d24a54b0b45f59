"""Sequential ascent: one chunk is plain ascent, several are several edits on top of each other."""

from __future__ import annotations

import pytest
from torch import nn

from locate_edit import EditError, edit
from locate_edit.engine import StopWhen
from locate_edit.methods.gradient_ascent import GradientAscent
from locate_edit.methods.sequential_ascent import SequentialAscent
from locate_edit.metrics.memorization import exact_memorization, extraction_likelihood
from locate_edit.never_seen import mean_nll
from tests.locate_edit.engine_setting import differing, state
from tests.locate_edit.methods.memorised import memorised


@pytest.mark.parametrize("never_seen", [None, 2.0])
def test_one_chunk_is_gradient_ascent(never_seen: float | None) -> None:
    net, forget, _, mask = memorised()
    first = edit(net, GradientAscent(steps=40, lr=3e-3), mask, forget=forget, never_seen=never_seen)
    got = state(net)
    net, *_ = memorised()
    made = edit(
        net, SequentialAscent(steps=40, lr=3e-3), mask, forget=forget, never_seen=never_seen
    )
    assert not differing(net, got)
    assert [record["loss"] for record in made.log] == [record["loss"] for record in first.log]
    assert made.provenance.get("never_seen") == first.provenance.get("never_seen")


def test_chunks_are_edits_on_top_of_each_other() -> None:
    net, forget, _, mask = memorised()
    for part in (slice(0, 3), slice(3, 4)):
        edit(net, GradientAscent(steps=7, lr=1e-3), mask, forget=forget[part], never_seen=None)
    got = state(net)
    net, *_ = memorised()
    method = SequentialAscent(steps=7, lr=1e-3, chunk=3)
    made = edit(net, method, mask, forget=forget, never_seen=None)
    assert not differing(net, got)
    assert [record["chunk"] for record in made.log] == [0] * 7 + [1] * 7
    made.undo()
    assert not differing(net, state(memorised()[0]))


def test_chunk_after_chunk_reaches_its_levels() -> None:
    net, forget, _, mask = memorised()
    seen = []

    def watch(model: nn.Module) -> float:
        seen.append(mean_nll(model, forget, 8))
        return 0.0

    method = SequentialAscent(steps=200, lr=1e-3, chunk=1)
    made = edit(net, method, mask, forget=forget, never_seen=2.0, stop=StopWhen(watch, above=1.0))
    ends = [max(i for i, r in enumerate(made.log) if r["chunk"] == n) for n in range(4)]
    for number, end in enumerate(ends):
        assert float(seen[end][number]) == pytest.approx(2.0, abs=0.251)
    assert made.provenance["stopped"].count("every forget prompt is at its never-seen level") == 4
    assert made.provenance["never_seen"]["prompts"] == 4
    assert len(made.log) < 800


def test_rules_end_a_chunk_not_the_run() -> None:
    net, forget, _, mask = memorised()
    rule = StopWhen("lr", above=0.0, every=2)
    method = SequentialAscent(steps=9, lr=1e-3, chunk=2)
    made = edit(net, method, mask, forget=forget, never_seen=None, stop=rule)
    assert [record["chunk"] for record in made.log] == [0, 0, 1, 1]
    assert made.provenance["stopped"].count("rose above 0") == 2


def test_bad_settings() -> None:
    with pytest.raises(EditError, match="chunk must be positive, got 0"):
        SequentialAscent(chunk=0)


def test_a_chunk_ends_where_its_own_means_are_those_of_unseen_text() -> None:
    net, forget, _, mask = memorised()
    seen: list[list[float]] = []

    def watch(model: nn.Module) -> float:
        seen.append([float(v) for v in exact_memorization(model, forget).values])
        return 0.0

    method = SequentialAscent(
        steps=300, lr=2e-3, chunk=2, rule="forgotten", thresholds=(0.5, 1.0), n=1
    )
    made = edit(net, method, mask, forget=forget, stop=StopWhen(watch, above=1.0))
    assert made.provenance["stopped"].count("above_unseen_text 0 fell below") == 2
    assert "never_seen" not in made.provenance
    first = [r["chunk"] for r in made.log].index(1)
    for own, looks in ((slice(0, 2), seen[:first]), (slice(2, 4), seen[first:])):
        means = [sum(look[own]) / 2 for look in looks]
        assert means[-1] <= 0.5
        assert all(mean > 0.5 for mean in means[:-1])


def test_el_counts_once_ma_is_met() -> None:
    _, forget, _, mask = memorised()
    loose, strict = (
        edit(
            memorised()[0],
            GradientAscent(steps=300, lr=2e-3, rule="forgotten", thresholds=(1.0, el), n=1),
            mask,
            forget=forget,
        )
        for el in (1.0, 0.4)
    )
    assert len(loose.log) == 1 < len(strict.log) < 300
    assert strict.model is not None
    assert (extraction_likelihood(strict.model, forget, n=1).estimate or 0.0) <= 0.4


def test_the_rule_needs_thresholds() -> None:
    with pytest.raises(EditError, match="needs thresholds"):
        SequentialAscent(rule="forgotten")
