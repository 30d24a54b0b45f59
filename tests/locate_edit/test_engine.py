"""The engine against ordinary training, and each of its settings against what it promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits import ComponentMask, Site, describe
from circuits.forward import labelled_logits, token_log_probs
from locate_edit import EditError, PromptSet, edit
from locate_edit.engine import StopWhen
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.gradient_ascent import GradientAscent
from locate_edit.methods.gradient_difference import GradientDifference
from locate_edit.methods.npo import NPO
from locate_edit.never_seen import base_rate
from locate_edit.optim import Optim
from tests.locate_edit.engine_setting import (
    differing,
    model,
    prompts,
    selected,
    some_units,
    state,
)


def cross_entropy(net: nn.Module, forget: PromptSet, items: range | list[int]) -> Tensor:
    batch = forget.batch(items)
    return -token_log_probs(labelled_logits(net, batch), batch.label).mean()


def train_ordinarily(
    net: nn.Module, forget: PromptSet, optimizer: torch.optim.Optimizer, steps: int
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(net, forget, range(len(forget))).backward()
        optimizer.step()


# -- equality with ordinary training --------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_full_mask_is_ordinary_fine_tuning(name: str, optimizer: str) -> None:
    ours, theirs = model(name), model(name)
    forget, _ = prompts(name)
    optim = Optim(name=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0)  # type: ignore[arg-type]
    edit(ours, FineTune(steps=5, lr=1e-2, optim=optim), None, forget=forget)
    if optimizer == "adamw":
        reference: Any = torch.optim.AdamW(
            theirs.parameters(), lr=1e-2, weight_decay=0.0, fused=True
        )
    else:
        reference = torch.optim.SGD(theirs.parameters(), lr=1e-2, momentum=0.9, fused=True)
    train_ordinarily(theirs, forget, reference, 5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_a_mask_trains_its_entries_as_ordinary_training_with_the_rest_put_back_would() -> None:
    ours, theirs = model("llama-tied"), model("llama-tied")
    forget, _ = prompts("llama-tied")
    mask = some_units(ours)
    inside, base = selected(ours, mask), state(theirs)
    edit(ours, FineTune(steps=4, lr=1e-2), mask, forget=forget)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(4):
        train_ordinarily(theirs, forget, optimizer, 1)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                keep = inside.get(name, torch.zeros_like(parameter, dtype=torch.bool))
                parameter.copy_(torch.where(keep, parameter, base[name]))
    for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_naive_masking_leaks_and_the_engine_does_not() -> None:
    """AdamW (lr 7e-6, decay 0.1, 500 steps) after two free steps: masked gradients still move every frozen weight."""
    naive, ours = nn.Linear(48, 32), model("llama-tied")
    keep = torch.rand(32, 48, generator=torch.Generator().manual_seed(0)) < 0.05
    x = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(naive.parameters(), lr=7e-6, weight_decay=0.1)
    for _ in range(2):  # momentum from before the mask was switched on
        optimizer.zero_grad()
        naive(x).square().mean().backward()
        optimizer.step()
    frozen = naive.weight.detach().clone()
    for _ in range(500):
        optimizer.zero_grad()
        naive(x).square().mean().backward()
        assert naive.weight.grad is not None
        naive.weight.grad *= keep
        optimizer.step()
    leaked = (naive.weight.detach() != frozen)[~keep].float().mean()
    assert float(leaked) > 0.99, "the naive way does not leak here, so this test shows nothing"

    forget, _ = prompts("llama-tied")
    mask = some_units(ours)
    inside, before = selected(ours, mask), state(ours)
    method = FineTune(steps=500, lr=7e-6, optim=Optim(weight_decay=0.1))
    made = edit(ours, method, mask, forget=forget[:1])
    assert len(made.log) == 500
    for name, flags in differing(ours, before).items():
        tied = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        assert not bool((flags & ~inside[tied]).any())
    assert all(bool(change.difference().ne(0).float().mean() > 0.9) for _, change in made.delta)


def test_bfloat16_slices_keep_what_single_steps_would_round_away() -> None:
    """Updates far below bfloat16's resolution add up in the float32 masters."""
    net = model("llama-tied", torch.bfloat16)
    forget, _ = prompts("llama-tied")
    few = edit(net, FineTune(steps=1, lr=1e-5), some_units(net), forget=forget)
    moved_by_one = sum(float(c.difference().ne(0).sum()) for _, c in few.delta) / few.delta.count()
    few.undo()
    many = edit(net, FineTune(steps=200, lr=1e-5), some_units(net), forget=forget)
    moved_by_many = (
        sum(float(c.difference().ne(0).sum()) for _, c in many.delta) / many.delta.count()
    )
    assert moved_by_one < 0.2
    assert moved_by_many > 0.6


# -- settings -------------------------------------------------------------------------------------


def test_weight_decay_pulls_towards_the_base_not_towards_zero() -> None:
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")
    free = edit(net, FineTune(steps=60, lr=1e-2), some_units(net), forget=forget)
    free.undo()
    held = edit(
        net,
        FineTune(steps=60, lr=1e-2, optim=Optim(weight_decay=20.0)),
        some_units(net),
        forget=forget,
    )
    assert held.delta.norm() < 0.6 * free.delta.norm()
    held.undo()
    # lr 0 for the loss but not for the decay is impossible; a decay of 1/lr returns all the way to the base each step.
    pinned = edit(
        net,
        FineTune(steps=3, lr=1e-2, optim=Optim(name="sgd", weight_decay=100.0)),
        some_units(net),
        forget=forget,
    )
    one_step = 1e-2 * max(record["grad_norm"] for record in _with_norm(net, forget).log)
    assert pinned.delta.norm() <= 2 * one_step


def _with_norm(net: nn.Module, forget: PromptSet) -> Any:
    with copy_of(net) as other:
        return edit(
            other,
            FineTune(steps=3, lr=1e-2, optim=Optim(name="sgd", clip=1e9)),
            some_units(other),
            forget=forget,
        )


class copy_of:
    def __init__(self, net: nn.Module) -> None:
        self.net = copy.deepcopy(net)

    def __enter__(self) -> nn.Module:
        return self.net

    def __exit__(self, *_: object) -> None:
        return None


def test_clipping_bounds_the_step_by_the_norm_over_the_slices() -> None:
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")
    mask = some_units(net)
    clipped = edit(
        net, FineTune(steps=1, lr=1.0, optim=Optim(name="sgd", clip=1e-3)), mask, forget=forget
    )
    assert clipped.log[0]["grad_norm"] > 1e-3
    assert clipped.delta.norm() == pytest.approx(1e-3, rel=1e-2)
    clipped.undo()
    free = edit(net, FineTune(steps=1, lr=1.0, optim=Optim(name="sgd")), mask, forget=forget)
    assert free.delta.norm() == pytest.approx(clipped.log[0]["grad_norm"], rel=1e-3)


def test_schedule_and_warm_up() -> None:
    linear = Optim(schedule="linear", warmup=2)
    assert [linear.factor(i, 6) for i in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = Optim(schedule="cosine")
    assert [round(cosine.factor(i, 4), 6) for i in range(4)] == [
        1.0,
        round(0.5 + 0.5 * math.cos(math.pi / 4), 6),
        0.5,
        round(0.5 - 0.5 * math.cos(math.pi / 4), 6),
    ]
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")
    made = edit(net, FineTune(steps=6, lr=1e-3, optim=linear), some_units(net), forget=forget)
    assert [record["lr"] for record in made.log] == pytest.approx(
        [5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4]
    )


def test_accumulated_batches_equal_one_large_batch() -> None:
    rows = [{"prompt": f"{who} calls", "target": " 555"} for who in ("Ann", "Bob", "Cyd", "Dee")]
    forget = PromptSet(rows, prompts("llama-tied")[0].tokenizer)
    large, small = model("llama-tied"), model("llama-tied")
    mask = some_units(large)
    edit(
        large, FineTune(steps=3, lr=1.0, optim=Optim(name="sgd")), mask, forget=forget, batch_size=4
    )
    edit(
        small,
        FineTune(steps=3, lr=1.0, optim=Optim(name="sgd", accumulate=2)),
        mask,
        forget=forget,
        batch_size=2,
    )
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "gemma2", "mixtral"])
def test_gradient_checkpointing_changes_nothing_but_memory(name: str) -> None:
    plain, checkpointed = model(name), model(name)
    forget, retain = prompts(name)
    method = GradientDifference(steps=3, lr=1e-2)
    mask = some_units(plain)
    edit(plain, method, mask, forget=forget, retain=retain)
    edit(checkpointed, method, mask, forget=forget, retain=retain, gradient_checkpointing=True)
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_stop_when_a_logged_term_or_a_metric_crosses_a_bound() -> None:
    forget, retain = prompts("llama-tied")
    net = model("llama-tied")
    method = GradientDifference(steps=50, lr=1e-2)
    budget = StopWhen("retain", below=5.0)
    made = edit(
        net,
        method,
        some_units(net, share=1.0),
        forget=forget,
        retain=retain,
        never_seen=None,
        stop=budget,
    )
    assert len(made.log) < 50
    assert made.log[-1]["retain"] < 5.0
    assert all(record["retain"] >= 5.0 for record in made.log[:-1])
    assert "retain" in made.provenance["stopped"]
    made.undo()

    looks = []

    def drift(now: nn.Module) -> float:
        looks.append(1)
        return len(looks)

    made = edit(
        net,
        method,
        some_units(net),
        forget=forget,
        retain=retain,
        never_seen=None,
        stop=StopWhen(drift, above=1.5, every=4),
    )
    assert len(made.log) == 8  # looked at after steps 4 and 8
    made.undo()
    with pytest.raises(EditError, match="cannot stop on 'typo'"):
        edit(
            net,
            method,
            some_units(net),
            forget=forget,
            retain=retain,
            stop=StopWhen("typo", above=1.0),
        )


def test_the_base_model_is_the_unedited_one_and_no_second_model_is_made() -> None:
    """NPO's reference and the KL term's logits come from the same weights with the slices swapped back."""
    net = model("llama-tied")
    forget, retain = prompts("llama-tied")
    with torch.no_grad():
        batch = retain.batch(range(4))
        base_logits = labelled_logits(net, batch)
        forget_batch = forget.batch(range(4))
        base_log_probs = token_log_probs(labelled_logits(net, forget_batch), forget_batch.label)
    seen: list[tuple[Tensor, Tensor]] = []

    class Probe:
        def __call__(self, run: Any) -> None:
            run.write(lambda _slot, now: now + 1.0)  # far away from the base
            seen.append(
                (run.reference_logits(run.retain, batch), run.reference(run.forget, forget_batch))
            )
            seen.append(
                (run.reference_logits(run.retain, batch), run.reference(run.forget, forget_batch))
            )  # kept

    edit(net, Probe(), some_units(net), forget=forget, retain=retain)
    for logits, log_probs in seen:
        torch.testing.assert_close(logits, base_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_probs, base_log_probs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(labelled_logits(net, batch), base_logits, atol=1e-2)


# -- never-seen levels ----------------------------------------------------------------------------


@cache
def _learned_by_heart() -> dict[str, Tensor]:
    net = model("llama-tied")
    forget, retain = prompts("llama-tied")
    edit(net, FineTune(steps=80, lr=1e-2), None, forget=forget + retain)
    with torch.no_grad():
        assert float(cross_entropy(net, forget, range(4))) < 0.1
    return state(net)


def trained() -> tuple[Any, PromptSet, PromptSet]:
    """A tiny model that knows its forget and retain prompts by heart."""
    net = model("llama-tied")
    net.load_state_dict(_learned_by_heart())
    return net, *prompts("llama-tied")


def mean_nll(net: nn.Module, forget: PromptSet) -> Tensor:
    with torch.no_grad():
        return torch.stack([cross_entropy(net, forget, [i]) for i in range(len(forget))])


MakeMethod = Callable[[], Any]


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientAscent(steps=300, lr=3e-3),
        lambda: GradientDifference(steps=300, lr=3e-3),
        lambda: NPO(steps=300, lr=3e-3, beta=0.5),
    ],
    ids=("ascent", "difference", "npo"),
)
def test_every_prompt_ends_at_its_level_and_none_beyond(make: MakeMethod) -> None:
    net, forget, retain = trained()
    made = edit(
        net,
        make(),
        some_units(net, share=0.5, layers=(0, 1, 2)),
        forget=forget,
        retain=retain,
        never_seen=2.0,
    )
    nll = mean_nll(net, forget)
    assert bool(((nll - 2.0).abs() <= 0.25 + 1e-3).all()), nll
    assert made.provenance["never_seen"]["reached"] == 4
    assert made.provenance["never_seen"]["beyond"] == 0
    assert "never-seen level" in made.provenance["stopped"]
    assert len(made.log) < 300


def test_without_a_level_ascent_overshoots() -> None:
    net, forget, _ = trained()
    made = edit(
        net,
        GradientAscent(steps=60, lr=3e-3),
        some_units(net, share=0.5),
        forget=forget,
        never_seen=None,
    )
    assert len(made.log) == 60
    assert "never_seen" not in made.provenance
    assert float(mean_nll(net, forget).min()) > 4.0


def test_levels_come_from_hold_out_prompts_or_an_oracle() -> None:
    net, forget, _retain = trained()
    holdout = PromptSet(
        [{"prompt": "Zed calls", "target": " 999"}, {"prompt": "Yi calls", "target": " 98"}],
        forget.tokenizer,
    )
    expected = float(mean_nll(net, holdout).mean())
    made = edit(
        net, GradientAscent(steps=1, lr=1e-4), some_units(net), forget=forget, never_seen=holdout
    )
    assert made.provenance["never_seen"]["level"] == pytest.approx(expected, rel=1e-4)
    made.undo()
    oracle = model("llama-tied")
    made = edit(
        net, GradientAscent(steps=1, lr=1e-4), some_units(net), forget=forget, never_seen=oracle
    )
    assert made.provenance["never_seen"]["level"] == pytest.approx(
        float(mean_nll(oracle, forget).mean()), rel=1e-4
    )
    made.undo()
    with pytest.raises(EditError, match="never_seen must be"):
        edit(net, GradientAscent(steps=1), some_units(net), forget=forget, never_seen="oracle")  # type: ignore[arg-type]
    with pytest.raises(EditError, match="non-negative"):
        edit(net, GradientAscent(steps=1), some_units(net), forget=forget, never_seen=-1.0)


def test_a_prompt_beyond_a_given_level_is_left_alone() -> None:
    net, forget, _retain = trained()
    unknown = PromptSet([{"prompt": "Quine calls", "target": " 7#7"}], forget.tokenizer)
    before = float(mean_nll(net, unknown)[0])
    assert before > 2.0
    net_mask = some_units(net)
    made = edit(net, GradientAscent(steps=20, lr=1e-3), net_mask, forget=unknown, never_seen=1.0)
    assert float(mean_nll(net, unknown)[0]) == pytest.approx(
        before, abs=0.3
    )  # neither raised nor taught down to 1.0
    assert made.provenance["never_seen"]["reached"] == 1


def test_base_rate_by_hand() -> None:
    tokenizer = prompts("llama-tied")[0].tokenizer
    forget = PromptSet(
        [
            {"prompt": "a", "target": "12"},
            {"prompt": "b", "target": "11"},
            {"prompt": "c", "target": "13"},
        ],
        tokenizer,
    )
    # Target "12" against the others' {1: 3, 3: 1}: N = 4, T = 2, vocabulary 100.
    first = -(math.log((3 + 0.02) / 6) + math.log((0 + 0.02) / 6)) / 2
    # Target "11" against {1: 2, 2: 1, 3: 1}: N = 4, T = 3.
    second = -2 * math.log((2 + 0.03) / 7) / 2
    found = base_rate(forget, None, vocab=100)
    assert found[:2].tolist() == pytest.approx([first, second], rel=1e-5)
    assert base_rate(forget[:1], None, vocab=100).tolist() == pytest.approx([math.log(100)])


# -- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_refused_and_the_model_is_as_it_was() -> None:
    net = model("llama-tied")
    forget, _retain = prompts("llama-tied")
    mask, before = some_units(net), state(net)
    with pytest.raises(EditError, match="needs retain prompts"):
        edit(net, GradientDifference(steps=1), mask, forget=forget)
    with pytest.raises(EditError, match="method must be an object"):
        edit(net, GradientAscent, mask, forget=forget)  # type: ignore[arg-type]
    with pytest.raises(EditError, match="must not be negative"):
        edit(net, GradientAscent(steps=-1), mask, forget=forget)
    with pytest.raises(EditError, match="unknown optimizer"):
        Optim(name="lion")  # type: ignore[arg-type]
    with pytest.raises(EditError, match="beta must be positive"):
        NPO(beta=0.0)
    other = ComponentMask({Site(1, "neuron"): torch.ones(7, dtype=torch.bool)})
    with pytest.raises(Exception, match="7"):
        edit(net, GradientAscent(steps=1), other, forget=forget)
    assert not differing(net, before)


def test_prompts_of_the_wrong_kind_or_too_long_are_refused() -> None:
    causal, masked = model("llama-tied"), model("bert")
    forget, _ = prompts("llama-tied")
    for_masked, _ = prompts("bert")
    with pytest.raises(Exception, match="is a causal model"):
        edit(causal, FineTune(steps=1), None, forget=for_masked)
    with pytest.raises(Exception, match="is a masked model"):
        edit(masked, FineTune(steps=1), None, forget=forget)
    long = PromptSet([{"prompt": "a" * 200, "target": " b"}], forget.tokenizer)
    with pytest.raises(Exception, match="context of 128"):
        edit(causal, FineTune(steps=1), None, forget=long)


def test_a_mask_that_the_loss_cannot_reach_is_reported() -> None:
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")

    class Elsewhere:
        def __call__(self, run: Any) -> None:
            run.fit(lambda _step: {"forget": torch.ones(())}, steps=1, lr=1e-3)

    before = state(net)
    with pytest.raises(EditError, match="does not depend on anything the mask selects"):
        edit(net, Elsewhere(), some_units(net), forget=forget)
    assert not differing(net, before)


def test_running_out_of_memory_restores_and_says_what_to_lower() -> None:
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")

    def exhausted(_: nn.Module) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = state(net)
    with pytest.raises(EditError, match="Lower batch_size"):
        edit(
            net,
            FineTune(steps=3, lr=1e-2),
            some_units(net),
            forget=forget,
            stop=StopWhen(exhausted),
        )
    assert not differing(net, before)


def test_describe_still_works_on_the_edited_model_and_nothing_wraps_it() -> None:
    net = model("gpt2")
    forget, _ = prompts("gpt2")
    modules = [type(m) for m in net.modules()]
    edit(net, FineTune(steps=1, lr=1e-3), some_units(net), forget=forget)
    assert [type(m) for m in net.modules()] == modules
    assert not any("forward" in m.__dict__ for m in net.modules())
    assert describe(net).n_layers == 3
