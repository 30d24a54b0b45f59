"""Membership scores against their formulas spelled out, and the area under the curve against counting pairs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from locate_edit import organism
from locate_edit.errors import PromptError
from locate_edit.metrics.forget_quality import forget_quality
from locate_edit.metrics.likelihood import nll
from locate_edit.metrics.membership import (
    auc,
    gradient_norm,
    incomparable,
    membership,
    min_k,
    min_k_plus_plus,
    privleak,
    reference_loss,
    zlib_loss,
)
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.truth_ratio import truth_ratio
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet, TokenMask
from tests.tiny import byte_tokenizer, tiny

ROWS: list[Any] = [
    ("Ann Lee plays", " golf on Sundays"),
    ("x", "y"),
    ("A much longer prompt that the others wait for", " aaaaaaaaaaaaaaaaaaaa"),
    ("Call", " 555-0123"),
]


def distributions(model: Any, prompts: PromptSet, index: int) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities `label vocab` (float64) and targets of one item, from an unpadded row."""
    ids, first = prompts.ids(index), len(prompts.prompt_ids(index))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    targets = prompts.target_ids(index)
    return logits[first - 1 : first - 1 + len(targets)].log_softmax(-1), targets


def literal(
    model: Any, prompts: PromptSet, name: str, k: float = 0.2, other: Any = None, last: int = 0
) -> list[float]:
    """The scores of all items, without the `last` tokens of each."""
    found = []
    for index in range(len(prompts)):
        log, targets = distributions(model, prompts, index)
        targets = targets[: len(targets) - last]
        own = [float(log[t, x]) for t, x in enumerate(targets)]
        if name == "zlib":
            text = prompts.rows[index]["target"].encode()
            found.append(-sum(own) / len(own) / len(zlib.compress(text)))
        elif name == "min_k":
            found.append(-float(np.mean(sorted(own)[: max(1, math.floor(k * len(own)))])))
        elif name == "min_k++":
            z = []
            for t, value in enumerate(own):
                p = log[t].exp()
                mu = float((p * log[t]).sum())
                z.append((value - mu) / math.sqrt(float((p * log[t] ** 2).sum()) - mu**2))
            found.append(-float(np.mean(sorted(z)[: max(1, math.floor(k * len(z)))])))
        else:
            theirs, _ = distributions(other, prompts, index)
            rest = [float(theirs[t, x]) for t, x in enumerate(targets)]
            found.append(-float(np.mean(own)) + float(np.mean(rest)))
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_equal_to_the_formulas(batch_size: int, untouched: Callable[[nn.Module], Any]) -> None:
    model, other = untouched(tiny("llama")), untouched(tiny("llama", seed=5))
    prompts = PromptSet(ROWS, byte_tokenizer(prefix=True))
    got = Predictions(model, prompts, batch_size=batch_size, reference=other)
    assert zlib_loss(got).values == pytest.approx(literal(model, prompts, "zlib"), rel=1e-5)
    for k in (0.2, 0.5, 1.0):
        want = literal(model, prompts, "min_k", k)
        assert min_k(got, k=k).values == pytest.approx(want, rel=1e-5)
        plus = literal(model, prompts, "min_k++", k)
        assert min_k_plus_plus(got, k=k).values == pytest.approx(plus, rel=1e-4)
    assert min_k(got, k=1.0).values == pytest.approx(nll(got).values, rel=1e-9)
    longer = prompts.filter(lambda row: len(row["target"]) > 1)
    for score, name, rel in ((min_k, "min_k", 1e-5), (min_k_plus_plus, "min_k++", 1e-4)):
        theirs = score(got, k=0.4, compat="open-unlearning")
        assert theirs.items.tolist() == [0, 2, 3]
        assert theirs.note.endswith("of non-zero weight before the last")
        assert theirs.values == pytest.approx(literal(model, longer, name, 0.4, last=1), rel=rel)
    want = literal(model, prompts, "reference", other=other)
    assert reference_loss(got).values == pytest.approx(want, abs=1e-5)
    assert reference_loss(model, prompts).withheld.startswith("needs: a reference model")


def test_the_order_of_items_and_the_padding_side_do_not_matter() -> None:
    model, other = tiny("gpt2"), tiny("gpt2", seed=5)
    left = byte_tokenizer()
    left.padding_side = "left"
    order = [2, 0, 3, 1]
    one = Predictions(model, PromptSet(ROWS, byte_tokenizer()), batch_size=2, reference=other)
    mixed = PromptSet([ROWS[i] for i in order], left)
    two = Predictions(model, mixed, batch_size=4, reference=other)
    for score in (zlib_loss, min_k, min_k_plus_plus, reference_loss, gradient_norm):
        assert score(two).values == pytest.approx(score(one).values[order], rel=2e-4), score


@pytest.mark.parametrize("family", ["llama-tied", "bert"])
def test_gradient_norm_is_that_of_an_ordinary_backward_pass(
    family: str, untouched: Callable[[nn.Module], Any]
) -> None:
    masked = family == "bert"
    rows = [("Ann", " ab"), ("Bo", " 1")]
    prompts = PromptSet(rows, byte_tokenizer(mask=masked))
    model = untouched(tiny(family).requires_grad_(False))
    plain = tiny(family).eval()
    norms, means = [], []
    for index in range(len(prompts)):
        plain.zero_grad()
        ids, first = prompts.ids(index), len(prompts.prompt_ids(index))
        targets, losses = prompts.target_ids(index), []
        for t, target in enumerate(targets):
            row = list(ids)
            if masked:
                row[first + t] = prompts.tokenizer.mask_token_id
            logits = plain(input_ids=torch.tensor([row])).logits[0]
            losses.append(-logits[first + t - (not masked)].log_softmax(-1)[target])
        torch.stack(losses).mean().backward(retain_graph=True)
        grads = [p.grad.norm() for p in plain.parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(float(g) ** 2 for g in grads)))
        plain.zero_grad()
        torch.stack(losses[:-1]).mean().backward()
        grads = [p.grad.norm() for p in plain.parameters() if p.grad is not None]
        means.append(float(np.mean([float(g) for g in grads])))
    assert gradient_norm(model, prompts).values == pytest.approx(norms, rel=1e-4)
    theirs = gradient_norm(model, prompts, compat="open-unlearning")
    assert theirs.values == pytest.approx(means, rel=1e-4)


def test_tokens_of_no_weight_are_left_out() -> None:
    model = tiny("llama")
    prompts = PromptSet([("a", "bcd"), ("a", "bc")], byte_tokenizer())
    part = prompts.with_token_mask(TokenMask(((1.0, 1.0, 0.0), (0.0, 0.0))))
    for score in (zlib_loss, min_k, min_k_plus_plus, gradient_norm):
        values = score(model, part)
        assert values.items.tolist() == [0]
        assert "of non-zero weight" in values.note
    # The last token has no influence on the others, so the first item is "a" and "bc".
    for score in (min_k, gradient_norm):
        assert score(model, part).values[0] == pytest.approx(
            score(model, prompts).values[1], rel=1e-4
        )
    with pytest.raises(PromptError, match="expected k above 0 and at most 1"):
        min_k(model, prompts, k=20)


def test_the_fraction_is_in_the_name_so_that_unlike_scores_do_not_mix() -> None:
    model, prompts = tiny("llama"), PromptSet([("a", "bcd"), ("a", "bc")], byte_tokenizer())
    assert [min_k(model, prompts, k=k).name for k in (0.2, 0.4, 0.07)] == [
        "min_k_20", "min_k_40", "min_k_7",
    ]  # fmt: skip
    for score in (min_k, min_k_plus_plus):
        assert score(model, prompts).name == score(model, prompts, k=0.2).name
        theirs = score(model, prompts, compat="open-unlearning")
        assert theirs.name == score(model, prompts, k=0.4).name
        with pytest.raises(PromptError, match="expected the same score of both sets"):
            auc(score(model, prompts, k=0.2), score(model, prompts, k=0.9))
    muse = min_k(model, prompts, compat="muse")
    assert muse.values.tolist() == min_k(model, prompts, k=0.4).values.tolist()


# ---- the area under the curve ---------------------------------------------------------------------


def values(*numbers: float, name: str = "loss", up: bool = False) -> Values:
    return Values.make(name, list(numbers), unit="", direction="up" if up else "down")


def counted(members: Any, others: Any) -> float:
    """Members have the smaller values."""
    pairs = [(m < o) + 0.5 * (m == o) for m in members for o in others]
    return float(sum(pairs) / len(pairs))


@pytest.mark.parametrize("seed", range(4))
def test_auc_is_the_share_of_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    members, others = rng.integers(0, 6, size=13), rng.integers(1, 8, size=9)  # many ties
    want = counted(members, others)
    assert auc(values(*members), values(*others)).estimate == pytest.approx(want, abs=1e-12)
    up = auc(values(*-members, up=True), values(*-others, up=True))
    assert up.estimate == pytest.approx(want, abs=1e-12)


def test_the_interval_of_an_auc_covers_it_and_narrows() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (25, 400):
        found = auc(values(*rng.normal(-1, 1, n)), values(*rng.normal(0, 1, n)))
        low, high = found.interval(n_bootstrap=300) or (0.0, 0.0)
        assert low < 0.76 < high  # the normal distribution function at 1 / sqrt(2)
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.4)


def test_auc_needs_a_model_that_told_members_before() -> None:
    told = auc(values(1.0, 1.1, 1.2, 1.3), values(2.0, 2.1, 2.2, 2.3))
    assert told.estimate == 1.0
    members, others = values(1.0, 2.0, 3.0), values(1.5, 2.5, 3.5)
    assert auc(members, others, before=told).estimate == pytest.approx(6 / 9)
    blind = auc(members, others)
    found = auc(members, others, before=blind)
    assert found.estimate is None
    assert found.withheld.startswith("needs: an un-edited model that tells members from hold-out")
    with pytest.raises(PromptError, match="expected the same score of both sets"):
        auc(members, values(1.0, name="zlib"))
    none = Values.none("loss", "needs: x", direction="down")
    assert auc(members, none).withheld == "needs: x"


def test_privleak_by_hand() -> None:
    # Edited: 1 of 4 pairs has the member less known, oracle: 2 of 4.
    edited = values(1.0, 2.5), values(2.0, 3.0)
    oracle = values(1.0, 3.5), values(2.0, 3.0)
    assert counted((1.0, 2.5), (2.0, 3.0)) == 0.75
    assert privleak(*edited, *oracle).estimate == pytest.approx(-50)
    assert privleak(*oracle, *edited).estimate == pytest.approx(100)
    assert privleak(*oracle, *oracle).estimate == 0
    known = values(0.0, 0.0), values(1.0, 1.0)
    assert privleak(*known, *oracle).estimate == pytest.approx(-100)
    reason = privleak(*oracle, *known).withheld
    assert reason.startswith("needs: an oracle that does not tell all members")
    with pytest.raises(PromptError, match="belong to different items"):
        privleak(*edited, values(1.0), values(2.0, 3.0))


def test_privleak_without_an_oracle() -> None:
    # 1 of 4 pairs has the member less known: B = 1/4 against 1/2.
    edited = values(1.0, 2.5), values(2.0, 3.0)
    assert privleak(*edited).withheld == "needs: an oracle, a model retrained without the members"
    found = privleak(*edited, compat="open-unlearning")
    assert found.estimate == pytest.approx(100 * (0.25 - 0.5) / 0.5)
    assert found.note == "no oracle; its AUC is taken for 0.5"
    oracle = values(1.0, 3.5), values(2.0, 3.0)  # one whose AUC is 0.5
    assert found.estimate == privleak(*edited, *oracle, compat="open-unlearning").estimate
    none = Values.none("loss", "needs: x", direction="down")
    assert privleak(edited[0], none, compat="open-unlearning").withheld == "needs: x"
    with pytest.raises(PromptError, match="the oracle's scores of both sets or of neither"):
        privleak(*edited, oracle[0])


def test_sets_that_differ_in_more_than_membership_are_refused() -> None:
    tokenizer = byte_tokenizer()
    rng = np.random.default_rng(0)

    def words(n: int, length: int, letters: str) -> PromptSet:
        def text(size: int) -> str:
            return "".join(rng.choice(list(letters), size))

        return PromptSet([(text(3), text(length + i % 4)) for i in range(n)], tokenizer)

    members = words(40, 10, "abcdefgh")
    assert incomparable(members, words(40, 10, "abcdefgh")) == ""
    assert "number of scored tokens differs" in incomparable(members, words(40, 13, "abcdefgh"))
    dull = PromptSet([(f"{i:03}", "a" * (10 + i % 4)) for i in range(40)], tokenizer)
    assert "compressed size of a character differs" in incomparable(members, dull)
    assert incomparable(members, members[:1] + words(9, 10, "abc")) == (
        "needs: sets without a text in common; 1 texts are in both"
    )
    model = tiny("llama")
    predictions = Predictions(model, members)
    withheld = membership(predictions, Predictions(model, dull), nll)
    assert withheld.withheld.startswith("needs: members and hold-out items that differ in nothing")
    others = Predictions(model, words(40, 10, "abcdefgh"))
    found = membership(predictions, others, partial(min_k, k=0.4))
    want = counted(min_k(predictions, k=0.4).values, min_k(others, k=0.4).values)
    assert found.estimate == pytest.approx(want, abs=1e-12)
    with pytest.raises(PromptError, match="got predictions of two models"):
        membership(predictions, Predictions(tiny("llama"), members))


def test_the_organism_gives_its_secrets_away_and_the_oracles_do_not() -> None:
    # The positive control: a model that was trained on the members, and two that were not.
    forget, holdout = (
        organism.prompts("secrets", "forget10"),
        organism.prompts("secrets", "holdout")[:20],
    )
    score = partial(min_k, k=0.4)
    found = {}
    for name in organism.MODELS:
        model = organism.load(name)[0]
        found[name] = Predictions(model, forget), Predictions(model, holdout)
    known = membership(*found["organism"], score)
    assert (known.estimate or 0.0) > 0.99
    scores = {name: (score(m), score(o)) for name, (m, o) in found.items()}
    for name in ("oracle", "oracle2"):
        low, high = auc(*scores[name], before=known).interval() or (1.0, 0.0)
        assert low < 0.5 < high
    leaks = {name: privleak(*scores[name], *scores["oracle"]).estimate or 0.0 for name in scores}
    assert leaks["organism"] < -95
    assert abs(leaks["oracle2"]) < 30  # so much is chance, with 20 members
    # Where nothing was known there is nothing to hide.
    unseen = membership(*found["oracle"], score)
    assert "needs: an un-edited model" in auc(*scores["oracle2"], before=unseen).withheld
    ratios = {name: truth_ratio(m) for name, (m, _) in found.items()}
    assert (forget_quality(ratios["organism"], ratios["oracle"]).estimate or 0.0) < 1e-6
    other = forget_quality(ratios["oracle2"], ratios["oracle"], before=ratios["organism"])
    assert (other.estimate or 0.0) > 0.1
