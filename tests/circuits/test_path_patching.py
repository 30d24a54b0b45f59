from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits import Site, SiteError, describe
from circuits.errors import LocateEditError
from circuits.forward import labelled_logits
from circuits.measures import log_prob
from circuits.patching import Direction, patch
from circuits.path_patching import LOGITS, HeadInput, Mlps, Receiver, path_patch
from locate_edit.prompts import Batch
from tests.contrasts import make, pairs
from tests.tiny import MASKED, tiny

Shared = Callable[[str], Any]
FAMILIES = ["gpt2", "llama", "gpt_neox", "gemma2", "bert"]
ROUNDING = 1e-5
"""Runs of batches of other shapes differ by this much at most; which bits differ depends on the processor."""
MLP_INPUT = {"bert": "intermediate"}
ATTENTION = {
    "gpt2": lambda layer: dict.fromkeys("qkv", layer.attn.c_attn),
    "gpt_neox": lambda layer: dict.fromkeys("qkv", layer.attention.query_key_value),
    "bert": lambda layer: {
        "q": layer.attention.self.query,
        "k": layer.attention.self.key,
        "v": layer.attention.self.value,
    },
}


def entries(name: str, role: str, head: int, d_head: int) -> slice:
    """Where a head's query, key or value is in what its projection puts out, worked out by hand."""
    n = "qkv".index(role)
    start = {"gpt2": n * 24 + head * 6, "gpt_neox": head * 18 + n * 6}.get(name, head * d_head)
    return slice(start, start + d_head)


class ByHand:
    """Path patching with hooks made by hand, one sender and one copy at a time."""

    def __init__(self, name: str, model: Any, base: Batch, other: Batch) -> None:
        self.name, self.model, self.map = name, model, describe(model)
        self.base, self.other = base, other
        self.handles: list[Any] = []
        self.clean = self._record(base)
        self.there = self._record(other)

    def _sites(self) -> list[Site]:
        kinds = ("neuron", "head", "mlp", "attn", "layer")
        return [Site(n, kind) for n in range(self.map.n_layers) for kind in kinds]

    def _hook(self, site: Site, change: Callable[[Tensor], Tensor | None]) -> None:
        point = self.map.read_point(site)
        if point.where == "input":

            def before(_m: nn.Module, args: Any) -> Any:
                new = change(args[0])
                return None if new is None else (new, *args[1:])

            self.handles.append(point.module.register_forward_pre_hook(before))
            return

        def after(_m: nn.Module, _a: Any, out: Any) -> Any:
            new = change(out[0] if isinstance(out, tuple) else out)
            if new is None:
                return None
            return (new, *out[1:]) if isinstance(out, tuple) else new

        self.handles.append(point.module.register_forward_hook(after))

    def _run(self, batch: Batch) -> float:
        try:
            with torch.no_grad():
                return float(log_prob(labelled_logits(self.model, batch), batch))
        finally:
            for handle in self.handles:
                handle.remove()
            self.handles.clear()

    def _record(self, batch: Batch) -> dict[Site, Tensor]:
        found: dict[Site, Tensor] = {}
        for site in self._sites():

            def keep(x: Tensor, site: Site = site) -> None:
                found[site] = x.clone()

            self._hook(site, keep)
        self._run(batch)
        return found

    def _receiver(self, receiver: Any) -> tuple[nn.Module, str, Any]:
        """The module where a receiver reads, which side of it, and which entries of that."""
        layer = self.model.get_submodule(self.map.layer_prefix(receiver.layer)[:-1])
        if isinstance(receiver, HeadInput):
            attention = getattr(layer, "self_attn", None)
            modules = (
                ATTENTION[self.name](layer)
                if self.name in ATTENTION
                else {role: getattr(attention, f"{role}_proj") for role in "qkv"}
            )
            wanted = [
                entries(self.name, receiver.role, head, self.map.d_head) for head in receiver.heads
            ]
            return modules[receiver.role], "output", wanted
        if receiver.kind == "mlp":
            return layer.get_submodule(MLP_INPUT.get(self.name, "mlp")), "input", None
        return layer, "output", None

    def value(self, site: Site, unit: int, receiver: Receiver, mlps: Mlps) -> float:
        neuron_layer = site.layer if site.kind == "neuron" else None
        for layer in range(self.map.n_layers):
            for kind in ("head", "mlp", "neuron"):
                here = Site(layer, kind)
                held = kind == "head" or (
                    mlps == "freeze" and (kind == "neuron") == (layer == neuron_layer)
                )
                if held:

                    def hold(_x: Tensor, here: Site = here) -> Tensor:
                        return self.clean[here]

                    self._hook(here, hold)

        def send(x: Tensor) -> Tensor:
            new, there = x.clone(), self.there[site]
            if site.kind == "head":
                part = slice(unit * self.map.d_head, (unit + 1) * self.map.d_head)
                new[..., part] = there[..., part]
            elif site.kind == "neuron":
                new[..., unit] = there[..., unit]
            else:
                new = there
            return new

        self._hook(site, send)
        if receiver == LOGITS:
            return self._run(self.base)
        module, side, wanted = self._receiver(receiver)
        seen: list[Tensor] = []
        if side == "input":
            self.handles.append(
                module.register_forward_pre_hook(lambda _m, a: seen.append(a[0].clone()))
            )
        else:
            self.handles.append(
                module.register_forward_hook(
                    lambda _m, _a, out: seen.append(
                        (out[0] if isinstance(out, tuple) else out).clone()
                    )
                )
            )
        self._run(self.base)

        def give(x: Tensor) -> Tensor:
            new = x.clone() if wanted else seen[0]
            for part in wanted or []:
                new[..., part] = seen[0][..., part]
            return new

        if side == "input":
            self.handles.append(
                module.register_forward_pre_hook(lambda _m, a: (give(a[0]), *a[1:]))
            )
        else:

            def after(_m: nn.Module, _a: Any, out: Any) -> Any:
                return (give(out[0]), *out[1:]) if isinstance(out, tuple) else give(out)

            self.handles.append(module.register_forward_hook(after))
        return self._run(self.base)


def receivers_of(name: str) -> list[Receiver]:
    group = 1 if name in ("llama", "gemma2") else 3
    return [
        LOGITS,
        Site(2, "layer"),
        Site(1, "layer"),
        Site(2, "mlp"),
        HeadInput(2, "q", (1, 3)),
        HeadInput(2, "k", (group,)),
        HeadInput(1, "v", (0,)),
    ]


def three_layers(name: str) -> Any:
    return tiny(name, n_layer=3) if name == "gpt2" else tiny(name, num_hidden_layers=3)


@pytest.mark.parametrize("mlps", ["freeze", "recompute"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_path_is_that_of_runs_by_hand(name: str, mlps: Mlps) -> None:
    model = three_layers(name)
    model_map = describe(model)
    masked = name in MASKED
    clean, other = make(masked)
    direction: Direction = "noise" if mlps == "freeze" else "denoise"
    senders = [Site(n, kind) for n in (0, 1) for kind in ("neuron", "head", "mlp", "attn", "layer")]
    largest = dict.fromkeys(map(str, receivers_of(name)), 0.0)
    both = [(clean.batch([1]), other.batch([1]))]
    runs = both[0] if direction == "noise" else both[0][::-1]
    oracle = ByHand(name, model, *runs)
    for receiver in receivers_of(name):
        found = path_patch(
            model_map, both, senders, [receiver], direction=direction, mlps=mlps, batch_size=50
        )
        for site in senders:
            for unit in range(0, model_map.n_units(site), 17 if site.kind == "neuron" else 2):
                expected = oracle.value(site, unit, receiver, mlps)
                got = float(found.patched()[site][0, unit])
                assert got == pytest.approx(expected, abs=5e-5), (receiver, site, unit)
                effect = abs(float(found.effect[site][0, unit]))
                largest[str(receiver)] = max(largest[str(receiver)], effect)
    assert min(largest.values()) > 5e-4, largest


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert"])
def test_batches_make_no_difference(name: str, shared: Shared) -> None:
    model_map = describe(shared(name))
    masked = name in MASKED
    senders = [Site(0, "head"), Site(0, "mlp"), Site(1, "neuron")]
    for receiver in (LOGITS, Site(1, "mlp")):
        one, two = (
            path_patch(model_map, pairs(masked, size), senders, [receiver], batch_size=4 * size)
            for size in (1, 8)
        )
        for site in senders:
            torch.testing.assert_close(one.effect[site], two.effect[site], rtol=1e-3, atol=2e-5)


def test_positions_one_at_a_time(shared: Shared) -> None:
    """A sender at the last scored position reaches the logits there; together the positions are not a sum."""
    model_map = describe(shared("llama"))
    site = Site(1, "head")
    each = path_patch(model_map, pairs(), [site], [LOGITS], each_position=True)
    assert each.by_position
    clean, _ = make(False)
    for item in range(2):
        first = clean.scored(item)[0] - 1
        before = each.effect[site][item, :first]  # no head carries it to where it is read
        assert float(before.abs().max()) < ROUNDING
        assert bool((each.effect[site][item, first].abs() > 1e-4).any())


# ---- what the definition implies


def test_all_of_a_layer_sending_to_its_own_stream_is_activation_patching(shared: Shared) -> None:
    """What the last layer's blocks send to the logits passes nothing in between."""
    model_map = describe(shared("gpt2"))
    senders = [Site(1, "head"), Site(1, "mlp")]
    direct = path_patch(model_map, pairs(), [Site(1, "mlp")], [LOGITS])
    plain = patch(model_map, pairs(), senders, direction="noise")
    mlp = Site(1, "mlp")
    torch.testing.assert_close(direct.effect[mlp], plain.effect[mlp], rtol=1e-4, atol=1e-5)
    through = path_patch(model_map, pairs(), [Site(1, "head")], [LOGITS], mlps="recompute")
    head = Site(1, "head")
    torch.testing.assert_close(through.effect[head], plain.effect[head], rtol=1e-4, atol=1e-5)
    held = path_patch(model_map, pairs(), [head], [LOGITS])
    assert not torch.allclose(held.effect[head], plain.effect[head], atol=1e-3)


def test_blocks_in_parallel_do_not_hear_each_other(shared: Shared) -> None:
    """In GPT-NeoX the MLP of a layer reads what its attention reads; in Llama it reads what attention wrote."""
    for name, silent in (("gpt_neox", True), ("gpt_neox-sequential", False), ("llama", False)):
        model_map = describe(shared(name))
        found = path_patch(model_map, pairs(), [Site(0, "head")], [Site(0, "mlp")])
        if silent:
            assert float(found.effect[Site(0, "head")].abs().max()) < ROUNDING
        else:
            assert float(found.effect[Site(0, "head")].abs().max()) > 1e-3


def test_nothing_goes_backwards(shared: Shared) -> None:
    """A receiver that does not come after the sender hears nothing, also where the sender is inside of it."""
    model_map = describe(shared("llama"))
    senders = [Site(1, kind) for kind in ("neuron", "head", "mlp", "attn", "layer")]
    for receiver in (Site(0, "layer"), HeadInput(1, "q", (0,)), Site(0, "mlp")):
        found = path_patch(model_map, pairs(), senders, [receiver])
        assert all(float(e.abs().max()) < 1e-5 for e in found.effect.values())
    for mlps in ("freeze", "recompute"):
        inside = path_patch(model_map, pairs(), [Site(1, "neuron")], [Site(1, "mlp")], mlps=mlps)
        assert float(inside.effect[Site(1, "neuron")].abs().max()) < 1e-5


def test_receivers_together(shared: Shared) -> None:
    """All inputs of the last layer's blocks and the skip connection past them make up the whole effect."""
    model_map = describe(shared("llama"))
    mlp = Site(0, "mlp")
    everything: list[Receiver] = [
        HeadInput(1, "q", (0, 1, 2, 3)),
        HeadInput(1, "k", (0, 1)),
        HeadInput(1, "v", (0, 1)),
        Site(1, "mlp"),
    ]
    alone = [path_patch(model_map, pairs(), [mlp], [r]).effect[mlp] for r in everything]
    together = path_patch(model_map, pairs(), [mlp], everything).effect[mlp]
    assert all(not torch.allclose(together, one, atol=1e-4) for one in alone)


def test_passes_are_as_documented(shared: Shared) -> None:
    model_map = describe(shared("llama"))
    rows: list[int] = []

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(len(args[0]))

    handle = shared("llama").model.embed_tokens.register_forward_pre_hook(count)
    try:
        path_patch(model_map, pairs(), [Site(0, "head")], [LOGITS])
        assert sum(rows) == 2 * (4 + 4)
        rows.clear()
        path_patch(model_map, pairs(), [Site(0, "head")], [Site(1, "mlp")], batch_size=3)
        assert sum(rows) == 2 * (4 + 2 * 4)
        assert max(rows) == 3
    finally:
        handle.remove()


# ---- mistakes


def test_receivers_that_cannot_receive(shared: Shared) -> None:
    model_map = describe(shared("llama"))
    sender = [Site(0, "head")]
    cases: list[tuple[Any, str]] = [
        ([], r"expected the logits alone or at least one other receiver, got \[\]"),
        ([LOGITS, Site(1, "mlp")], r"expected the logits alone or at least one other"),
        ([Site(1, "attn")], r"L1.attn cannot receive: expected the logits, an mlp site"),
        ([Site(9, "mlp")], r"layer 9 of LlamaForCausalLM: expected 0 to 1"),
        ([HeadInput(1, "k", (2,))], r"role='k', heads=\(2,\)\): expected heads from 0 to 1"),
        ([HeadInput(9, "q", (0,))], r"layer 9 of LlamaForCausalLM"),
        (["end"], r"expected a receiver, got 'end'"),
        ([HeadInput(1, "q", (0,)), HeadInput(1, "q", (1,))], r"name every place once, all heads"),
    ]
    for receivers, message in cases:
        with pytest.raises(SiteError, match=message):
            path_patch(model_map, pairs(), sender, receivers)
    role: Any = "o"
    with pytest.raises(
        SiteError, match=r"role q, k or v and at least one head, got 'o' and \(1,\)"
    ):
        HeadInput(0, role, (1,))
    with pytest.raises(SiteError, match=r"at least one head, got 'q' and \(\)"):
        HeadInput(0, "q", ())


def test_other_arguments_that_mean_nothing(shared: Shared) -> None:
    model_map = describe(shared("llama"))
    wrong: Any = "skip"
    with pytest.raises(ValueError, match="mlps must be 'freeze' or 'recompute', got 'skip'"):
        path_patch(model_map, pairs(), [Site(0, "head")], [LOGITS], mlps=wrong)
    with pytest.raises(SiteError, match=r"L0.kv_head has no activation of its own"):
        path_patch(model_map, pairs(), [Site(0, "kv_head")], [LOGITS])
    with pytest.raises(LocateEditError, match="nothing to patch"):
        path_patch(model_map, [], [Site(0, "head")], [LOGITS])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_model_stays_as_it_was(name: str, untouched: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny(name)
    model.train()
    untouched(model)
    model_map = describe(model)
    receivers: list[Receiver] = [Site(1, "mlp"), HeadInput(1, "v", (0,))]
    path_patch(model_map, pairs(), [Site(0, "head"), Site(0, "neuron")], receivers)

    def interrupted(logits: Tensor, batch: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        path_patch(model_map, pairs(), [Site(0, "head")], receivers, interrupted)
