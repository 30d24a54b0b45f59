"""EUL against its losses written out, and what it does to a model that knows its prompts."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits.forward import labelled_logits
from locate_edit import EditError, edit
from locate_edit.engine import Run
from locate_edit.methods.eul import EUL, _turns
from locate_edit.never_seen import levels
from locate_edit.tokens import TokenMask
from tests.conftest import fingerprint
from tests.locate_edit.engine_setting import model, prompts, some_units
from tests.locate_edit.methods.memorised import memorised, nll, run_of


def shifted(run: Run, method: EUL) -> None:
    """Put the method's adapters in place with random values, so that the model is not the base model."""
    run.add(method.adapters(run))
    assert run.placed is not None
    generator = torch.Generator().manual_seed(5)
    for values in run.placed.values:
        values |= {n: 0.3 * torch.randn(v.shape, generator=generator) for n, v in values.items()}


def items(run: Run, prompts_: Any) -> list[tuple[Tensor, Tensor]]:
    """Divergences and negative log-likelihoods of each prompt's scored tokens, prompt by prompt."""
    found = []
    for index in range(len(prompts_)):
        batch = prompts_.batch([index])
        with torch.no_grad():
            now = labelled_logits(run.model, batch).double()
            with run.base():
                base = labelled_logits(run.model, batch).double()
        p, q = base.log_softmax(-1), now.log_softmax(-1)
        kl = torch.stack([(u.exp() * (u - v)).sum() for u, v in zip(p, q, strict=True)])
        found.append((kl, -q[range(len(q)), batch.label]))
    return found


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_losses_are_the_literal_ones(name: str) -> None:
    net, (forget, retain) = model(name), prompts(name)
    run = run_of(net, forget, retain, some_units(net))
    method = EUL(alpha=0.7, task=0.5, gamma=0.3, most=1e9, width=4)
    shifted(run, method)
    kept, gone = items(run, retain), items(run, forget)
    every = range(4)
    found = method.on_retain(run, retain.batch(every))
    kl, cost = (torch.cat([each[n] for each in kept]).mean() for n in (0, 1))
    assert float(kl) > 0.05
    assert float(found["near"]) == pytest.approx(0.7 * float(kl), rel=1e-4)
    assert float(found["task"]) == pytest.approx(0.5 * float(cost), rel=1e-4)
    found = method.on_forget(run, forget.batch(every))
    away = [float(kl.mean()) for kl, _ in gone]
    unlikely = [float(cost.mean()) for _, cost in gone]
    assert float(found["away"]) == pytest.approx(-0.3 * sum(away) / 4, rel=1e-4)
    assert float(found["unlikely"]) == pytest.approx(-0.3 * sum(unlikely) / 4, rel=1e-4)
    # Cut off at a value between the least and the greatest divergence, prompt by prompt.
    most = sorted(away)[1] + 1e-3
    cut = replace(method, most=most).on_forget(run, forget.batch(every))
    assert float(cut["away"]) == pytest.approx(-0.3 * sum(min(a, most) for a in away) / 4, rel=1e-4)
    run.restore()


def test_token_weights_count() -> None:
    net, (forget, retain) = model("gpt2"), prompts("gpt2")
    weights = TokenMask(tuple((1.0, 0.5, 0.0, 1.0) for _ in range(4)))
    forget = forget.with_token_mask(weights)
    run = run_of(net, forget, retain, some_units(net))
    method = EUL(gamma=0.0, alpha=0.0, most=1e9, width=4)
    shifted(run, method)
    scale = torch.tensor([1.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    expected = [float((kl * scale).sum() / 2.5) for kl, _ in items(run, forget)]
    found = method.on_forget(run, forget.batch(range(4)))["away"]
    assert float(found) == pytest.approx(-sum(expected) / 4, rel=1e-4)
    run.restore()


def test_prompts_at_their_level_are_left_alone_and_beyond_it_pulled_back() -> None:
    net, (forget, retain) = model("gpt2"), prompts("gpt2")
    run = run_of(net, forget, retain, some_units(net))
    method = EUL(width=4, most=1e9)
    shifted(run, method)
    batch = forget.batch(range(4))
    now = run.score(batch).nll().detach()
    free = method.on_forget(run, batch)
    run.levels = levels(1.0, net, forget, retain, 8)
    assert run.levels is not None
    run.levels.target = now + torch.tensor([0.0, 5.0, -5.0, math.inf])
    (_, _), (kl1, two), (_, three), (kl3, four) = items(run, forget)
    found = method.on_forget(run, batch)
    expected = -0.2 * float(two.mean() - three.mean() + four.mean()) / 4
    assert float(found["unlikely"]) == pytest.approx(expected, rel=1e-3)
    assert float(found["away"]) == pytest.approx(
        -0.2 * float(kl1.mean() + kl3.mean()) / 4, rel=1e-3
    )
    assert float(free["away"]) != pytest.approx(float(found["away"]), rel=1e-2)
    run.restore()


def test_epochs_of_both_sets_take_turns() -> None:
    net, (forget, retain) = model("gpt2"), prompts("gpt2")
    run = run_of(net, forget.select([0, 1, 2]), retain, some_units(net), batch_size=2)
    turns = list(itertools.islice(_turns(run), 12))
    assert [role for role, _ in turns] == ["retain", "retain", "forget", "forget"] * 3
    for start in (0, 4, 8):
        assert sorted(turns[start][1] + turns[start + 1][1]) == [0, 1, 2, 3]
        assert sorted(turns[start + 2][1] + turns[start + 3][1]) == [0, 1, 2]
    assert len({str(turns[start][1]) for start in (0, 4, 8)}) > 1, "every epoch in the same order"


def test_adapters_stand_where_the_mask_is_and_have_half_a_percent() -> None:
    net, (forget, retain) = model("llama"), prompts("llama")
    method = EUL()
    some = run_of(net, forget, retain, some_units(net, "head", 0.9, layers=(0, 2)))
    assert [str(a.site) for a in method.adapters(some)] == ["L0.mlp", "L2.mlp"]
    everywhere = run_of(net, forget, retain)
    assert [str(a.site) for a in method.adapters(everywhere)] == ["L0.mlp", "L1.mlp", "L2.mlp"]
    assert {a.width for a in method.adapters(everywhere)} == {4}
    large = model("llama", vocab_size=30000)
    run = run_of(large, forget, retain)
    size = sum(p.numel() for p in large.parameters())
    added = sum(2 * 24 * a.width for a in method.adapters(run))
    assert added / size == pytest.approx(0.005, rel=0.05)
    assert {a.width for a in replace(method, width=7).adapters(run)} == {7}


def test_the_rate_warms_up_over_a_share_of_the_steps() -> None:
    net, (forget, retain) = model("gpt2"), prompts("gpt2")
    made = edit(
        net, EUL(steps=50, lr=1.0e-4), some_units(net), forget=forget, retain=retain, never_seen=None
    )  # fmt: skip
    assert [record["lr"] for record in made.log[:4]] == pytest.approx(
        [1e-4 / 3, 2e-4 / 3, 1e-4, 1e-4]
    )


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
def test_known_prompts_are_forgotten_and_come_back_without_the_adapters(name: str) -> None:
    net, forget, retain, mask = memorised(name)
    before = fingerprint(net)
    start, kept = nll(net, forget), nll(net, retain)
    assert start < 0.2
    made = edit(
        net, EUL(steps=80, lr=1e-2), mask, forget=forget, retain=retain, batch_size=4, never_seen=2.0
    )  # fmt: skip
    assert nll(net, forget) > start + 1.0
    assert nll(net, forget) < 2.8, "forgetting went far beyond the level"
    assert nll(net, retain) < kept + 0.5
    with made.off():
        assert nll(net, forget) == start
    made.undo()
    assert fingerprint(net) == before


def test_divergence_is_zero_where_nothing_was_trained() -> None:
    net, (forget, retain) = model("gpt2"), prompts("gpt2")
    run = run_of(net, forget, retain, some_units(net))
    method = EUL()
    run.add(method.adapters(run))
    batch = retain.batch(range(4))
    assert float(method.on_retain(run, batch)["near"]) == pytest.approx(0.0, abs=1e-6)
    run.restore()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"alpha": 1.5}, "alpha must be between 0 and 1"),
        ({"warmup": -0.1}, "warmup must be between 0 and 1"),
        ({"most": 0.0}, "most must be positive"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], reason: str) -> None:
    with pytest.raises(EditError, match=reason):
        EUL(**settings)  # type: ignore[arg-type]


def test_retain_prompts_are_needed() -> None:
    net, (forget, _) = model("gpt2"), prompts("gpt2")
    with pytest.raises(EditError, match="EUL needs retain prompts"):
        edit(net, EUL(), some_units(net), forget=forget)
