from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits import Site, SiteError, describe
from circuits.errors import LocateEditError
from circuits.hooks import capture, replace
from circuits.places import Places
from circuits.probes import _folds, probe, read_states, ridge_predictions, wilson
from locate_edit.prompts import PromptSet
from tests.tiny import byte_tokenizer, tiny, token_ids

Shared = Callable[[str], Any]


def planted(n: int = 120, seed: int = 0) -> tuple[dict[Site, Tensor], list[int]]:
    """Noise in three layers; from layer 1 on a direction carries one of three labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    directions = torch.randn(3, 16, generator=generator)
    states = {}
    for layer in range(3):
        noise = torch.randn(n, 16, generator=generator)
        states[Site(layer, "layer")] = noise + (2 * directions[labels] if layer else 0)
    return states, labels.tolist()


def test_accuracy_jumps_where_the_label_was_planted() -> None:
    states, labels = planted()
    found = probe(states, labels)
    zero, one, two = found.probes
    assert zero.accuracy < 0.5
    assert not zero.reads
    assert one.accuracy > 0.95
    assert one.reads
    assert two.reads
    assert found.accuracy == [zero.accuracy, one.accuracy, two.accuracy]
    assert found[Site(1, "layer")] is one
    for each in found.probes:
        assert each.low <= each.accuracy <= each.high
        assert each.shuffled == pytest.approx(1 / 3, abs=0.08)
        assert each.shuffled <= each.shuffled_high < 0.55
        assert (each.examples, each.classes) == (120, 3)


def test_shuffled_labels_are_at_chance_also_with_more_features_than_examples() -> None:
    """An honest probe on noise: 200 features of 60 examples separate any training labels perfectly."""
    accuracies = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        noise = {Site(0, "layer"): torch.randn(60, 200, generator=generator)}
        labels = torch.randint(2, (60,), generator=generator).tolist()
        accuracies.append(probe(noise, labels, seed=seed).accuracy[0])
    assert sum(accuracies) / 8 == pytest.approx(0.5, abs=0.06)


def test_the_majority_baseline() -> None:
    generator = torch.Generator().manual_seed(0)
    states = {Site(0, "layer"): torch.randn(100, 4, generator=generator)}
    found = probe(states, ["a"] * 80 + ["b"] * 20).probes[0]
    assert found.majority == 0.8
    assert not found.reads  # 0.8 is not knowledge


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(14, 5), (12, 30)])
def test_predictions_equal_a_ridge_regression_written_out(
    shape: tuple[int, int], seed: int
) -> None:
    """Normal equations with an intercept, and leave-one-out by leaving every example out."""
    generator = torch.Generator().manual_seed(seed)
    n, d = shape
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * 3 + 1
    new = torch.randn(200, d, generator=generator, dtype=torch.float64) * 3 + 1
    y = torch.randint(3, (n,), generator=generator)
    onehot = nn.functional.one_hot(y, 3).double()
    z, zn = ((t - x.mean(0)) / x.std(0) for t in (x, new))
    unit = torch.linalg.svdvals(z).square().mean()

    def fit(rows: Tensor, penalty: float) -> Tensor:
        """Weights of [z, 1]; the intercept is not penalised."""
        a = torch.cat([z[rows], torch.ones(len(rows), 1)], 1).double()
        ridge = torch.eye(d + 1, dtype=torch.float64) * penalty * unit
        ridge[-1, -1] = 0
        weights: Tensor = torch.linalg.solve(a.T @ a + ridge, a.T @ onehot[rows])
        return weights

    penalties = (0.001, 0.03, 0.3, 1.0, 3.0, 30.0)
    errors = []
    for penalty in penalties:
        error = 0.0
        for i in range(n):
            rest = torch.tensor([j for j in range(n) if j != i])
            row = torch.cat([z[i], torch.ones(1).double()])
            error += float((onehot[i] - row @ fit(rest, penalty)).square().sum())
        errors.append(error)
    best = penalties[errors.index(min(errors))]
    slow = torch.cat([zn, torch.ones(200, 1).double()], 1) @ fit(torch.arange(n), best)
    both = torch.stack([y, y.flip(0)])
    assert ridge_predictions(x, both, new, 3, penalties)[0].tolist() == slow.argmax(1).tolist()
    assert len({round(e, 6) for e in errors}) == 6


def test_held_out_classes_are_those_of_probes_without_the_example() -> None:
    """As many folds as examples: each is left out in turn, by hand. The classes come out as they were given."""
    states, labels = planted(24)
    names = ["abc"[label] for label in labels]
    site = Site(1, "layer")
    noisy = states[site] + 2 * states[Site(0, "layer")]
    found = probe({site: noisy}, names, folds=24)[site]
    wanted = []
    for i in range(24):
        rest = [j for j in range(24) if j != i]
        y = torch.tensor([labels[j] for j in rest])[None]
        x = noisy.double()
        wanted.append("abc"[int(ridge_predictions(x[rest], y, x[[i]], 3))])
    assert list(found.held_out) == wanted
    right = [a == b for a, b in zip(wanted, names, strict=True)]
    assert found.accuracy == pytest.approx(sum(right) / 24)
    assert 0.4 < found.accuracy < 1
    assert "held_out" not in probe(states, labels).rows()[0]


def test_wilson_interval_by_hand() -> None:
    """8 of 10: the textbook value."""
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)
    assert wilson(0.0, 10)[0] == pytest.approx(0.0)
    assert wilson(0.5, 50, 0.5) > wilson(0.5, 50, 0.95)


def test_groups_stay_together() -> None:
    """A label that only the group tells cannot be read from other groups; ungrouped folds would claim it can."""
    generator = torch.Generator().manual_seed(3)
    group = torch.arange(20).repeat_interleave(6)
    identity = 4 * torch.randn(20, 40, generator=generator)[group]
    states = {Site(0, "layer"): identity + torch.randn(120, 40, generator=generator)}
    labels = torch.randint(2, (20,), generator=generator)[group].tolist()
    assert probe(states, labels).accuracy[0] > 0.95
    assert probe(states, labels, groups=group.tolist()).accuracy[0] < 0.75
    fold = _folds(torch.tensor(labels), group.tolist(), 5, generator)
    assert all(len(set(fold[group == g].tolist())) == 1 for g in range(20))
    assert fold.bincount().tolist() == [24] * 5


def test_states_of_a_prompt_set(shared: Shared) -> None:
    """In the order of the set, at the position that predicts the token, whatever the batches."""
    model_map = describe(shared("llama"))
    prompts = PromptSet([("ab", "cde"), ("a longer prompt", "xyz"), ("e", "fgh")], byte_tokenizer())
    sites = [Site(0, "layer"), Site(1, "head")]
    for size in (1, 3):
        states = read_states(model_map, prompts.batches(size), sites, offset=1)
        for i in range(3):
            with torch.no_grad(), capture(model_map, sites) as acts:
                model_map.model(torch.tensor([prompts.ids(i)]))
            at = prompts.scored(i)[1] - 1
            for site in sites:
                torch.testing.assert_close(
                    states[site][i], acts[site][0, at].flatten(), rtol=1e-4, atol=1e-5
                )


def test_only_attention_brings_the_label_to_the_last_position() -> None:
    """The first token tells the label; the probe at the last position needs attention to see it."""
    model_map = describe(tiny("llama"))
    labels = torch.arange(80) % 2
    ids = torch.cat([10 + labels[:, None], token_ids(80, 2, seed=1)], 1)
    places, sites = Places.last(ids), model_map.sites("layer")
    states = read_states(model_map, places, sites)
    with replace(model_map, dict.fromkeys(model_map.sites("attn"), torch.zeros_like)):
        without = read_states(model_map, places, sites)
    assert probe(states, labels.tolist()).probes[0].reads
    assert not any(found.reads for found in probe(without, labels.tolist()).probes)


def test_rows_and_frame() -> None:
    pandas = pytest.importorskip("pandas")
    found = probe(*planted())
    assert found.rows()[1]["site"] == "L1.layer"
    frame = found.frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["accuracy"].tolist() == found.accuracy
    assert frame["layer"].tolist() == [0, 1, 2]


def test_same_seed_same_numbers(untouched: Callable[[nn.Module], nn.Module]) -> None:
    model_map = describe(untouched(tiny("gpt2").train()))
    states = read_states(model_map, Places.last(token_ids(20, 4)), [Site(0, "mlp")])
    labels = [i % 2 for i in range(20)]
    assert probe(states, labels, seed=3) == probe(states, labels, seed=3)
    assert probe(states, labels, seed=3) != probe(states, labels, seed=4)


def test_mistakes(shared: Shared) -> None:
    states, labels = planted()
    with pytest.raises(LocateEditError, match="at least two classes, the labels have 1"):
        probe(states, [1] * 120)
    with pytest.raises(LocateEditError, match="`example feature` of 119 examples, one per label"):
        probe(states, labels[:-1])
    with pytest.raises(LocateEditError, match="folds: expected 2 to 120"):
        probe(states, labels, folds=1)
    with pytest.raises(LocateEditError, match="5 folds need as many groups, got 2"):
        probe(states, labels, groups=[i % 2 for i in range(120)])
    with pytest.raises(LocateEditError, match="groups: expected 120"):
        probe(states, labels, groups=[1])
    with pytest.raises(LocateEditError, match="at least one shuffle"):
        probe(states, labels, shuffles=0)
    with pytest.raises(LocateEditError, match=r"L0.layer: expected finite"):
        probe({Site(0, "layer"): torch.full((120, 2), torch.nan)}, labels)
    with pytest.raises(LocateEditError, match=r"no probe at L7.layer: expected one of L0.layer"):
        probe(states, labels)[Site(7, "layer")]
    model_map = describe(shared("llama"))
    with pytest.raises(SiteError, match="has no read point"):
        read_states(model_map, Places.last(token_ids(2, 3)), [Site(0, "kv_head")])
    with pytest.raises(LocateEditError, match="every prompt of a set once"):
        read_states(model_map, [], [Site(0, "layer")])
