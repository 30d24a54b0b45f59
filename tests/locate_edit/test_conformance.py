"""What every edit method guarantees, on several families and dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits import ComponentMask, Site, describe
from circuits.model_map import Side
from locate_edit import Edit, EditError, edit
from locate_edit.engine import StopWhen
from tests.conftest import fingerprint
from tests.locate_edit.engine_setting import (
    differing,
    entries,
    methods,
    model,
    prompts,
    selected,
    some_units,
    state,
)
from tests.tiny import MASKED, token_ids

FAMILIES = ("llama-tied", "gpt2", "gpt_neox", "bert", "phi3", "mixtral", "gemma2", "falcon")
DTYPES = (torch.float32, torch.bfloat16)
METHODS = methods()


def by_name(value: Any) -> str:
    return (
        str(value).removeprefix("torch.")
        if isinstance(value, torch.dtype)
        else type(value).__name__
    )


def side_of(method: Any) -> Side:
    side: Side = getattr(method, "side", "both")
    return side


_DOWN_PROJECTIONS = {
    "vocabulary rows",
    "a column",
    "a row and a column",
    "an attention",
    "a key-value head",
}
# Masks that hold nothing a method could change, by what it changes: it says so, and nothing happens.
CANNOT_CHANGE = {
    "DirectionalAblation": {
        "a column",
        "a row and a column",
        "a key-value head",
    },  # what is written
    "EUL": {"vocabulary rows"},  # no layer
    "MEMIT": {"experts", *_DOWN_PROJECTIONS},
    "ROME": {"experts", *_DOWN_PROJECTIONS},
}


def says(net: Any) -> Tensor:
    """What the model computes on some tokens, with whatever an edit holds beside its weights."""
    with torch.no_grad():
        found: Tensor = net(token_ids(2, 9)).logits
        return found


def acts(net: Any, made: Edit, changed: dict[str, Tensor]) -> bool:
    """Whether an edit does anything: weights changed, or what it adds beside them makes a difference."""
    edited = says(net)
    with made.off():
        return bool(changed) or not torch.equal(says(net), edited)


def refused(method: Any, name: str) -> bool:
    """Whether the method does not work on such models; then it says so and changes nothing."""
    if name in MASKED and getattr(method, "causal_only", False):
        refuses(method, name, some_units(model(name)), "causal")
        return True
    if name == "mixtral" and "experts" in CANNOT_CHANGE.get(by_name(method), ()):
        refuses(method, name, some_units(model(name)), "experts")
        return True
    return False


def refuses(
    method: Any, name: str, mask: ComponentMask, reason: str, side: Side | None = None
) -> None:
    """The edit is refused for a reason, and the model stays as it was."""
    net, (forget, retain) = model(name), prompts(name)
    before, as_was = state(net), fingerprint(net)
    with pytest.raises(EditError, match=reason):
        edit(net, method, mask, forget=forget, retain=retain, side=side)
    assert not differing(net, before)
    assert fingerprint(net) == as_was


@pytest.mark.parametrize("method", METHODS, ids=by_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_mask_changes_and_undo_is_exact(
    name: str, dtype: torch.dtype, method: Any
) -> None:
    if refused(method, name):
        return
    net = model(name, dtype)
    forget, retain = prompts(name)
    mask = some_units(net, "neuron") | some_units(net, "head", 0.5)
    inside = selected(net, mask, side_of(method))
    before, as_was, said = state(net), fingerprint(net), says(net)

    made = edit(net, method, mask, forget=forget, retain=retain, batch_size=2)

    changed = differing(net, before)
    assert acts(net, made, changed), "the method changed nothing"
    for parameter, flags in changed.items():
        tied = "model.embed_tokens.weight" if parameter == "lm_head.weight" else parameter
        assert not bool((flags & ~inside[tied]).any()), f"{parameter} changed outside the mask"
    made.undo()
    assert not differing(net, before)
    assert torch.equal(says(net), said)
    assert fingerprint(net) == as_was, "gradients, flags, modes or hooks were left behind"


@pytest.mark.parametrize("method", METHODS, ids=by_name)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "mixtral"])
def test_same_seed_same_bits_and_files_keep_them(name: str, method: Any, tmp_path: Path) -> None:
    if refused(method, name):
        return
    forget, retain = prompts(name)
    nets = [model(name), model(name), model(name)]
    first, second = (
        edit(net, method, some_units(net), forget=forget, retain=retain, batch_size=2)
        for net in nets[:2]
    )
    assert not differing(nets[0], state(nets[1]))
    assert torch.equal(says(nets[0]), says(nets[1]))

    loaded = Edit.load(first.save(tmp_path / "edit"))
    loaded.apply(nets[2])
    assert not differing(nets[2], state(nets[0]))
    assert torch.equal(says(nets[2]), says(nets[0]))
    assert loaded.provenance == json.loads(json.dumps(first.provenance))
    assert loaded.mask == first.mask
    loaded.undo()
    assert not differing(nets[2], state(model(name)))
    second.undo()


@pytest.mark.parametrize("method", METHODS, ids=by_name)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_an_empty_mask_changes_nothing(name: str, method: Any) -> None:
    net = model(name)
    forget, retain = prompts(name)
    before, as_was = state(net), fingerprint(net)
    empty = ComponentMask(
        {Site(1, "neuron"): torch.zeros(describe(net).shape(Site(1, "neuron")), dtype=torch.bool)}
    )
    made = edit(net, method, empty, forget=forget, retain=retain)
    assert not differing(net, before)
    assert fingerprint(net) == as_was
    assert made.delta.count() == 0
    assert not made.additions


TRAINED = [method for method in METHODS if hasattr(method, "steps")]


@pytest.mark.parametrize("method", TRAINED, ids=by_name)
@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_model_as_it_was(
    method: Any, problem: type[BaseException]
) -> None:
    net = model("llama-tied")
    forget, retain = prompts("llama-tied")
    net.train()
    net.model.layers[0].eval()
    before, as_was, said = state(net), fingerprint(net), says(net)
    moved = []

    def break_down(_: nn.Module) -> float:
        moved.append(bool(differing(net, before)) or not torch.equal(says(net), said))
        raise problem

    with pytest.raises(problem):
        edit(
            net,
            method,
            some_units(net),
            forget=forget,
            retain=retain,
            batch_size=2,
            stop=StopWhen(break_down, every=2),
        )
    assert moved == [True], (
        "the interruption came before anything had changed, so the test shows nothing"
    )
    assert not differing(net, before)
    assert fingerprint(net) == as_was


@pytest.mark.parametrize("method", TRAINED, ids=by_name)
def test_not_a_number_stops_says_when_and_restores(method: Any) -> None:
    net = model("gpt2")
    forget, retain = prompts("gpt2")
    before, as_was = state(net), fingerprint(net)
    broken = type(method)(steps=5, lr=1e30)
    with pytest.raises(EditError, match=r"became (nan|inf|-inf) at step \d|not finite"):
        edit(net, broken, some_units(net), forget=forget, retain=retain, never_seen=None)
    assert not differing(net, before)
    assert fingerprint(net) == as_was


@pytest.mark.parametrize("method", METHODS, ids=by_name)
@pytest.mark.parametrize("share", [0.02, 0.5], ids=("sparse", "dense"))
def test_single_entries(share: float, method: Any) -> None:
    net = model("llama-tied")
    forget, retain = prompts("llama-tied")
    mask = entries(net, share)
    inside, before = selected(net, mask), state(net)
    made = edit(net, method, mask, forget=forget, retain=retain, batch_size=2)
    changed = differing(net, before)
    assert acts(net, made, changed)
    for parameter, flags in changed.items():
        assert not bool((flags & ~inside[parameter]).any())
    kinds = {type(change.selection).__name__ for _, change in made.delta}
    if made.delta or not made.additions:
        assert kinds == ({"Entries"} if share < 0.125 else {"Dense"})
    made.undo()
    assert not differing(net, before)


WHOLE = {
    "vocabulary rows": ComponentMask({Site(None, "vocab", "embed"): torch.arange(300) % 7 == 0}),
    "a row": ComponentMask(
        {Site(None, "row", "model.layers.1.mlp.down_proj.weight"): torch.arange(24) == 5}
    ),
    "a column": ComponentMask(
        {Site(None, "col", "model.layers.1.self_attn.q_proj.weight"): torch.arange(24) == 5}
    ),
    "a row and a column": ComponentMask(
        {
            Site(None, "row", "model.layers.1.self_attn.q_proj.weight"): torch.arange(24) == 3,
            Site(None, "col", "model.layers.1.self_attn.q_proj.weight"): torch.arange(24) == 5,
        }
    ),
    "an mlp": ComponentMask({Site(1, "mlp"): torch.ones(1, dtype=torch.bool)}),
    "an attention": ComponentMask({Site(1, "attn"): torch.ones(1, dtype=torch.bool)}),
    "a layer": ComponentMask({Site(2, "layer"): torch.ones(1, dtype=torch.bool)}),
    "a key-value head": ComponentMask({Site(2, "kv_head"): torch.tensor([False, True])}),
}


@pytest.mark.parametrize("what", WHOLE)
@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_every_kind_of_site(what: str, method: Any) -> None:
    net = model("llama-tied")
    forget, retain = prompts("llama-tied")
    mask = WHOLE[what]
    side = side_of(method) if what != "a key-value head" else "both"
    if what in CANNOT_CHANGE.get(by_name(method), ()):
        refuses(method, "llama-tied", mask, "mask", side)
        return
    inside, before = selected(net, mask, side), state(net)
    made = edit(net, method, mask, forget=forget, retain=retain, batch_size=2, side=side)
    changed = differing(net, before)
    assert acts(net, made, changed)
    for parameter, flags in changed.items():
        tied = "model.embed_tokens.weight" if parameter == "lm_head.weight" else parameter
        assert not bool((flags & ~inside[tied]).any())
    made.undo()
    assert not differing(net, before)


def test_experts_change_alone() -> None:
    net = model("mixtral")
    forget, retain = prompts("mixtral")
    mask = ComponentMask({Site(1, "expert"): torch.tensor([False, True, False, True])})
    inside, before = selected(net, mask), state(net)
    made = edit(net, METHODS[0], mask, forget=forget, retain=retain)
    changed = differing(net, before)
    assert changed
    assert all(not bool((flags & ~inside[name]).any()) for name, flags in changed.items())
    made.undo()
    assert not differing(net, before)
