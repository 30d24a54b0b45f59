"""Reused activations below an edit change nothing: losses and gradients of every family, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits import ComponentMask, Site, describe
from locate_edit import PromptSet, edit
from locate_edit.editing import Edit
from locate_edit.engine import Run, Step
from locate_edit.methods.fine_tune import FineTune
from locate_edit.optim import Optim
from locate_edit.prefix import PrefixCache
from tests.tiny import CONFIGS, MASKED, byte_tokenizer, tiny

START = 2
ROWS = [
    {"prompt": "Ann Lee plays", "target": " golf"},
    {"prompt": "It is said in the village that Bo", "target": " sings"},
    {"prompt": "Cy", "target": " 555-0101"},
    {"prompt": "Di Okoro works as a", "target": " cook"},
]


def deep(name: str, **overrides: Any) -> Any:
    """A tiny model of four layers."""
    layers: dict[str, Any] = {"num_hidden_layers": 4}
    if name in ("gpt2", "gptj", "bloom"):
        layers = {"n_layer": 4}
    elif name == "distilbert":
        layers = {"n_layers": 4}
    elif name == "gpt_neo":
        layers = {"num_layers": 4, "attention_types": [[["global", "local"], 2]]}
    return tiny(name, **{**layers, **overrides})


def prompts(name: str) -> PromptSet:
    return PromptSet(ROWS, byte_tokenizer(mask=name in MASKED or "bidirectional" in name))


def a_mask(
    model: nn.Module, kind: str = "neuron", layers: tuple[int, ...] = (2, 3)
) -> ComponentMask:
    """Every third unit of ``kind`` in ``layers``."""
    the_map = describe(model)
    return ComponentMask(
        {
            Site(n, kind): (torch.arange(the_map.n_units(Site(n, kind))) % 3 == 0).reshape(
                the_map.shape(Site(n, kind))
            )
            for n in layers
        }
    )


def train(model: nn.Module, mask: ComponentMask, forget: PromptSet, **options: Any) -> Edit:
    """Four plain SGD steps of rate 1, undone: what had changed is the sum of four gradients."""
    method = FineTune(steps=4, lr=1.0, optim=Optim(name="sgd", clip=0.1))
    made = edit(model, method, mask, forget=forget, batch_size=3, **options)
    made.undo()
    return made


def compare(one: Edit, other: Edit) -> None:
    assert [a["loss"] for a in one.log] == pytest.approx([b["loss"] for b in other.log], abs=1e-5)
    assert one.delta.norm() > 0.1
    for name, change in one.delta:
        theirs = other.delta.changes[name]
        torch.testing.assert_close(change.new, theirs.new, rtol=1e-5, atol=1e-5)


def count_runs(module: nn.Module, runs: list[int]) -> Any:
    return module.register_forward_hook(lambda *_: runs.append(1))


@pytest.mark.parametrize("kind", ["neuron", "head"])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_without_reuse(
    name: str, kind: str, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    model = untouched(deep(name))
    forget, mask = prompts(name), a_mask(model, kind)
    without = train(model, mask, forget, reuse_prefix_bytes=0)
    compare(train(model, mask, forget), without)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "bloom", "bert"])
@pytest.mark.parametrize("kind", ["neuron", "head"])
def test_frozen_modules_run_only_for_rows_not_seen_before(name: str, kind: str) -> None:
    model = deep(name)
    the_map = describe(model)
    forget = prompts(name)
    projections = {
        "first": the_map.find(0, "down")[1],
        "below": the_map.find(START - 1, "down")[1],
        "attention": the_map.find(START, "v")[1],
        "edited": the_map.find(START, "down")[1],
    }
    runs: dict[str, list[int]] = {place: [] for place in projections}
    handles = [count_runs(module, runs[place]) for place, module in projections.items()]
    train(model, a_mask(model, kind), forget, reuse_prefix_bytes=2**20)
    for handle in handles:
        handle.remove()
    # Two batches hold all four prompts, so the first two steps fill the cache and the next two run nothing below.
    assert len(runs["edited"]) == 4
    assert len(runs["first"]) == len(runs["below"]) == 2
    assert len(runs["attention"]) == (2 if kind == "neuron" else 4)


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral"])
def test_gradient_checkpointing_and_reuse_together(name: str) -> None:
    model = deep(name)
    forget, mask = prompts(name), a_mask(model)
    plain = train(model, mask, forget, reuse_prefix_bytes=0)
    compare(train(model, mask, forget, gradient_checkpointing=True), plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("room", [0, 1, 2, 100])
def test_kept_rows_fill_the_memory_given_and_no_more(name: str, room: int) -> None:
    model = deep(name)
    the_map = describe(model)
    layers = [the_map.layer_module(i) for i in range(the_map.n_layers)]
    batch = prompts(name).batch(range(4))
    row_bytes = batch.input_ids.shape[1] * the_map.d_model * 4  # of the longest row
    cache = PrefixCache(model, layers, START, max_bytes=room * row_bytes)
    lengths = batch.attention_mask.sum(1).tolist()
    for _ in range(2):
        (hidden,) = cache.hidden(batch)
        assert hidden.shape == (4, max(lengths), the_map.d_model)
        for row, length in enumerate(lengths):
            alone = model(batch.input_ids[row : row + 1, :length], output_hidden_states=True)
            expected = alone.hidden_states[START][0]
            torch.testing.assert_close(hidden[row, :length], expected, rtol=1e-5, atol=1e-5)
            assert not hidden[row, length:].any()
    kept = sum(state.numel() * 4 for row in cache._kept.values() for state in row)
    assert kept == room * row_bytes - cache.free_bytes
    assert 0 <= cache.free_bytes
    assert (len(cache._kept) == 4) == (room == 100)


def test_forwards_come_back_after_a_failure(untouched: Callable[[nn.Module], nn.Module]) -> None:
    model = untouched(deep("gpt2"))

    def fails_in_the_second_step(run: Run) -> None:
        def loss(step: Step) -> dict[str, Tensor]:
            if step.index == 1:
                handle = run.model.get_output_embeddings().register_forward_pre_hook(  # type: ignore[operator]
                    lambda *_: 1 / 0
                )
                try:
                    run.score(step.forget)
                finally:
                    handle.remove()
            return {"forget": run.score(step.forget).cross_entropy()}

        run.fit(loss, steps=3, lr=0.1)

    with pytest.raises(ZeroDivisionError):
        edit(model, fails_in_the_second_step, a_mask(model), forget=prompts("gpt2"))
    assert not any("forward" in module.__dict__ for module in model.modules())
