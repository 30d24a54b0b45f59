from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from circuits import Site, SiteError, describe
from circuits.forward import cache_name
from circuits.hooks import capture, replace
from tests.tiny import CONFIGS, tiny, token_ids

Shared = Callable[[str], Any]
IDS = token_ids(2, 6)
N0, N1, H1, M1, A1 = (
    Site(0, "neuron"),
    Site(1, "neuron"),
    Site(1, "head"),
    Site(1, "mlp"),
    Site(1, "attn"),
)


@pytest.mark.parametrize("name", CONFIGS)
def test_axes_of_every_read_point(name: str, shared: Shared) -> None:
    model_map = describe(shared(name))
    sites = [
        s for kind in ("neuron", "head", "mlp", "attn", "layer") for s in model_map.sites(kind)
    ]
    with torch.no_grad(), capture(model_map, sites) as acts:
        model_map.model(IDS)
    for site in sites:
        axes = model_map.read_point(site).axes
        sizes = {"batch": 2, "pos": 6, **model_map.sizes(site.layer or 0)}
        assert tuple(acts[site].shape) == tuple(sizes[axis] for axis in axes)


@pytest.mark.parametrize("name", CONFIGS)
def test_capturing_changes_nothing(name: str, untouched: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny(name)
    model_map = describe(model)
    sites = [
        s for kind in ("neuron", "head", "mlp", "attn", "layer") for s in model_map.sites(kind)
    ]
    untouched(model)
    with torch.no_grad():
        plain = model(IDS).logits
        with capture(model_map, sites):
            watched = model(IDS).logits
    assert torch.equal(plain, watched)


def test_capturing_experts_keeps_the_output_of_other_kernels() -> None:
    """The recomputed experts round differently; without gradients the model's own output is used."""
    model = tiny("mixtral", dtype=torch.bfloat16)
    model.config._experts_implementation = "batched_mm"
    model_map = describe(model)
    with torch.no_grad():
        plain = model(IDS).logits
        with capture(model_map, [N0, N1]):
            watched = model(IDS).logits
        with replace(model_map, {N0: lambda x: x, N1: lambda x: x}):
            recomputed = model(IDS).logits
    assert torch.equal(watched, plain)
    assert not torch.equal(recomputed, plain)  # so the equality above says something
    torch.testing.assert_close(recomputed, plain, rtol=0.05, atol=0.05)


def test_activations_by_hand(shared: Shared) -> None:
    """A GPT-2 layer, computed step by step."""
    model = shared("gpt2")
    block = model.transformer.h[1]
    sites = [Site(0, "layer"), N1, H1, M1, A1, Site(1, "layer")]
    with torch.no_grad(), capture(describe(model), sites) as acts:
        model(IDS)
        before = acts[Site(0, "layer")]
        attention = acts[H1].flatten(-2) @ block.attn.c_proj.weight + block.attn.c_proj.bias
        middle = before + attention
        neurons = block.mlp.act(block.mlp.c_fc(block.ln_2(middle)))
        mlp = neurons @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
    torch.testing.assert_close(acts[A1], attention)
    torch.testing.assert_close(acts[N1], neurons)
    torch.testing.assert_close(acts[M1], mlp)
    torch.testing.assert_close(acts[Site(1, "layer")], middle + mlp)


def test_experts_by_hand(shared: Shared) -> None:
    """The neurons of the experts of Mixtral, from the captured input of the block, one token at a time."""
    model = shared("mixtral")
    layer = model.model.layers[1]
    seen: list[torch.Tensor] = []
    handle = layer.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad(), capture(describe(model), [N1, M1]) as acts:
        model(IDS)
    handle.remove()
    hidden, neurons = seen[0].flatten(0, 1), acts[N1].flatten(0, 1)
    _, weights, chosen = layer.mlp.gate(hidden)
    for token in range(len(hidden)):
        out = torch.zeros(24)
        for expert in range(4):
            if expert not in chosen[token]:
                assert not neurons[token, expert].any()
                continue
            both = layer.mlp.experts.gate_up_proj[expert] @ hidden[token]
            expected = torch.nn.functional.silu(both[:20]) * both[20:]
            torch.testing.assert_close(neurons[token, expert], expected)
            weight = weights[token][chosen[token] == expert]
            out = out + weight * (layer.mlp.experts.down_proj[expert] @ expected)
        torch.testing.assert_close(acts[M1].flatten(0, 1)[token], out)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "bert", "mixtral", "gpt_oss"])
def test_gradients_reach_captured_activations(name: str) -> None:
    """The gradient equals the slope of the output along a small change of one activation."""
    model = tiny(name, dtype=torch.float64).requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    model_map = describe(model)
    for site in (N0, N1, H1, M1, A1, Site(0, "layer")):
        with capture(model_map, [site]) as acts:
            logit = model(IDS).logits[0, -1, 5]
        (gradient,) = torch.autograd.grad(logit, [acts[site]])
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).to(
            gradient
        )
        direction = direction * (acts[site] != 0) if acts[site].dim() == 4 else direction
        step = 1e-3  # large enough for the families that normalise in float32
        ends = []
        for sign in (1.0, -1.0):
            shift = sign * step * direction
            with torch.no_grad(), replace(model_map, {site: lambda x, shift=shift: x + shift}):  # type: ignore[misc]
                ends.append(model(IDS).logits[0, -1, 5])
        slope = float(ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.01, abs=1e-3)
        assert abs(slope) > 0.01


def test_stop_ends_the_pass_after_the_last_needed_module(shared: Shared) -> None:
    model = shared("llama")
    model_map = describe(model)
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, _o, i=i: ran.append(i))
        for i, layer in enumerate(model.model.layers)
    ]
    try:
        with torch.no_grad():
            with capture(model_map, [Site(0, "head"), N0], stop=True) as acts:
                model(IDS)
                ran.append(-1)  # never: the rest of the block is skipped
            assert ran == []  # stopped inside layer 0, at the input of its down projection
            with capture(model_map, [Site(0, "head"), N0]) as whole:
                model(IDS)
            assert ran == [0, 1]
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(acts[N0], whole[N0])
    assert torch.equal(acts[Site(0, "head")], whole[Site(0, "head")])


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "gpt_oss", "bert"])
def test_replacing_by_the_same_changes_nothing(name: str, shared: Shared) -> None:
    model = shared(name)
    model_map = describe(model)
    changes = {
        site: lambda x: x
        for kind in ("neuron", "head", "mlp", "attn", "layer")
        for site in model_map.sites(kind)
    }
    with torch.no_grad():
        plain = model(IDS).logits
        with replace(model_map, changes):
            same = model(IDS).logits
        with replace(model_map, {M1: lambda x: 2 * x}):
            other = model(IDS).logits
        assert torch.equal(model(IDS).logits, plain)
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
    assert float((other - plain).abs().max()) > 1e-3


def test_an_inner_capture_sees_what_an_outer_replace_sets(shared: Shared) -> None:
    model_map = describe(shared("llama"))
    with (
        torch.no_grad(),
        replace(model_map, {H1: torch.zeros_like}),
        capture(model_map, [H1, A1]) as acts,
    ):
        model_map.model(IDS)
    assert not acts[H1].any()
    assert not acts[A1].any()  # llama's output projection has no bias


def test_a_second_pass_overwrites_the_first(shared: Shared) -> None:
    model_map = describe(shared("llama"))
    with torch.no_grad(), capture(model_map, [N1]) as acts:
        model_map.model(IDS)
        model_map.model(IDS[:1])
    assert len(acts[N1]) == 1


def test_one_token_at_a_time_with_a_cache(shared: Shared) -> None:
    model = shared("llama")
    model_map = describe(model)
    with torch.no_grad():
        with capture(model_map, [N1]) as whole:
            model(IDS)
        kept_as = cache_name(model)
        past = getattr(model(IDS[:, :-1], use_cache=True), kept_as)
        with capture(model_map, [N1]) as last:
            model(IDS[:, -1:], **{kept_as: past})
    torch.testing.assert_close(last[N1], whole[N1][:, -1:], rtol=1e-4, atol=1e-5)


def test_the_cache_is_called_as_the_model_calls_it() -> None:
    class Older(nn.Module):
        def forward(self, input_ids: torch.Tensor, past_key_values: object = None) -> None: ...

    class Newer(nn.Module):
        def forward(self, input_ids: torch.Tensor, cache: object = None) -> None: ...

    assert [cache_name(model) for model in (Older(), Newer())] == ["past_key_values", "cache"]


# ---- mistakes


def test_sites_without_activation(shared: Shared) -> None:
    model_map = describe(shared("mixtral"))
    for site in (Site(0, "kv_head"), Site(0, "expert"), Site(None, "vocab", "embed")):
        with pytest.raises(
            SiteError, match="has no read point: expected a neuron, head, mlp, attn or layer site"
        ):
            capture(model_map, [site]).__enter__()
    with pytest.raises(SiteError, match="layer 5 of MixtralForCausalLM: expected 0 to 1"):
        capture(model_map, [Site(5, "neuron")]).__enter__()


def test_reading_what_was_not_captured(shared: Shared) -> None:
    model_map = describe(shared("llama"))
    with (
        capture(model_map, [N0]) as acts,
        pytest.raises(SiteError, match=r"no activation of L0.neuron: run the model"),
    ):
        acts[N0]


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: x[:1], r"torch.float32 \(1, 6, 40\)"),
        (lambda x: x.double(), r"torch.float64 \(2, 6, 40\)"),
        (lambda x: None, "None"),
    ],
)
def test_replacements_of_another_form(
    function: Any, got: str, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    model = untouched(tiny("llama"))
    expected = rf"replacement of L0.neuron: expected .* torch.float32 \(2, 6, 40\), got {got}"
    with pytest.raises(SiteError, match=expected), replace(describe(model), {N0: function}):
        model(IDS)


def test_hooks_are_removed_after_an_exception(untouched: Callable[[nn.Module], nn.Module]) -> None:
    for name in ("llama", "mixtral"):
        model = untouched(tiny(name))
        model_map = describe(model)
        with (
            pytest.raises(KeyboardInterrupt),
            capture(model_map, [N0, H1]),
            replace(model_map, {M1: lambda x: x}),
        ):
            raise KeyboardInterrupt
        with (
            pytest.raises(SiteError, match="unknown kind"),
            capture(model_map, [N0, H1, Site(0, "brain")]),
        ):
            pass


def test_experts_that_work_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mixtral")
    model_map = describe(model)
    experts = model.model.layers[1].mlp.experts
    monkeypatch.setattr(experts, "_apply_gate", lambda both: both.chunk(2, dim=-1)[0])
    with pytest.raises(
        SiteError, match=r"L1.neuron of MixtralForCausalLM: the experts recomputed .* differ .* by"
    ):
        with torch.no_grad(), capture(model_map, [N1]):
            model(IDS)
    monkeypatch.setattr(experts, "_apply_gate", None)
    with pytest.raises(
        SiteError, match="expected MixtralExperts to have a function that applies its gate"
    ):
        with torch.no_grad(), capture(model_map, [N1]):
            model(IDS)
    with pytest.raises(
        SiteError, match="expected the experts to be called with hidden states, expert numbers and"
    ):
        from circuits.hooks import _routing

        _routing(1, (torch.zeros(2, 3), torch.zeros(2, 2)), {})
