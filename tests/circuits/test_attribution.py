from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients as Captum
from torch import Tensor, nn

from circuits import LocateEditError, ModelMap, Site, SiteError, describe
from circuits import attribution as module
from circuits.attribution import (
    Attribution,
    IntegratedGradients,
    Plan,
    Rule,
    ScoredRow,
    path_points,
)
from tests.tiny import CONFIGS, MASKED, tiny, token_ids

DENSE = [name for name in CONFIGS if name not in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")]
# Local attention with a mask of its own orders rows by position; where tokens see what follows, no prefix is shared.
PLANS = dict.fromkeys(["gpt_neo", "gemma3_text-bidirectional", *MASKED], "rows")
DOUBLE = torch.float64


# ---- the definition, written down without any of the shortcuts -------------------------------------------------------


@contextmanager
def fed(model_map: ModelMap, replacement: dict[int, Tensor], pos: int) -> Iterator[None]:
    """Activations `row neuron` of some layers put in place of the model's own at one position of every row."""

    def feed(activations: Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            given = args[0].reshape(len(activations), -1, activations.shape[-1])
            before, after = given[:, :pos], given[:, pos + 1 :]
            return (torch.cat([before, activations[:, None], after], 1).reshape(args[0].shape),)

        return hook

    with ExitStack() as stack:
        for layer, activations in replacement.items():
            down = model_map.read_point(Site(layer, "neuron")).module
            stack.callback(down.register_forward_pre_hook(feed(activations)).remove)
        yield


def own(model_map: ModelMap, ids: Tensor, pos: int, layers: Sequence[int] = ()) -> list[Tensor]:
    """The model's own activations `neuron` at one position, for each layer (or those given)."""
    found: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].reshape(len(ids), -1)[pos])

    with ExitStack() as stack, torch.no_grad():
        for layer in layers or range(model_map.n_layers):
            down = model_map.read_point(Site(layer, "neuron")).module
            stack.callback(down.register_forward_pre_hook(keep).remove)
        model_map.model(input_ids=ids[None])
    return found


def chances(
    model_map: ModelMap, ids: Tensor, pos: int, label: int, replacement: dict[int, Tensor]
) -> Tensor:
    """Probability `row` of the label with replaced activations."""
    rows = len(next(iter(replacement.values()))) if replacement else 1
    with fed(model_map, replacement, pos):
        logits: Tensor = model_map.model(input_ids=ids.expand(rows, -1)).logits
    return logits[:, pos].softmax(-1)[:, label]


@torch.no_grad()
def silent(
    model_map: ModelMap, ids: Tensor, pos: int, label: int, activations: dict[int, Tensor]
) -> float:
    """Probability of the label with these layers' activations at zero."""
    zeros = {layer: torch.zeros_like(active)[None] for layer, active in activations.items()}
    return float(chances(model_map, ids, pos, label, zeros)[0])


ALPHAS = {"midpoint": 0.5, "left": 0.0, "right": 1.0}


def literal(
    model_map: ModelMap,
    row: ScoredRow,
    steps: int,
    rule: str = "midpoint",
    layers: Sequence[int] = (),
) -> tuple[list[Tensor], list[float]]:
    """Attribution `neuron` and effect of silencing, for each layer: layer by layer, the whole text at every point."""
    total = [torch.zeros(1, dtype=DOUBLE)] * model_map.n_layers
    effect = [0.0] * model_map.n_layers
    alphas = (torch.arange(steps, dtype=DOUBLE) + ALPHAS[rule]) / steps
    for pos, label, weight in zip(row.pos, row.label, row.weight, strict=True):
        ids = row.ids[: pos + 1] if model_map.causal else row.ids
        activations = own(model_map, ids, pos, layers)
        here = silent(model_map, ids, pos, label, {})
        for layer, active in enumerate(activations):
            scaled = (alphas[:, None] * active).requires_grad_()
            probability = chances(model_map, ids, pos, label, {layer: scaled})
            (gradient,) = torch.autograd.grad(probability.sum(), scaled)
            total[layer] = total[layer] + weight * active * gradient.mean(0)
            effect[layer] += weight * (here - silent(model_map, ids, pos, label, {layer: active}))
    return total, effect


def text(model_map: ModelMap, length: int = 14, seed: int = 3) -> ScoredRow:
    """Some labels of a random text, longer than the windows of local attention, the first token included."""
    ids = token_ids(length, seed=seed)
    if not model_map.causal:
        return ScoredRow(ids, [4], [int(token_ids(1, seed=seed + 1))], [1.0])
    pos = [0, 6, length - 2]
    return ScoredRow(ids, pos, [int(ids[p + 1]) for p in pos], [1.0, 0.5, 2.0])


def close(found: Attribution, expected: Sequence[Tensor], rtol: float = 1e-5) -> None:
    for layer, (site, value) in enumerate(found.values.items()):
        assert site == Site(layer, "neuron")
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[layer], rtol=rtol, atol=1e-9)


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_equals_the_definition_in_every_family(name: str) -> None:
    model_map = describe(tiny(name, dtype=DOUBLE))
    row = text(model_map)
    expected, effect = literal(model_map, row, steps=4)
    found = IntegratedGradients(model_map, steps=4, batch_size=2)([row])
    close(found, expected)
    totals = [float(value.detach().sum()) for value in expected]
    gap = [total - lost for total, lost in zip(totals, effect, strict=True)]
    assert found.gap == pytest.approx(gap, abs=1e-8)
    assert found.plans == {PLANS.get(name, "queries"): len(row.pos)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon-alibi", "gemma2", "bert"])
@pytest.mark.parametrize("plan", ["rows", "full"])
def test_every_plan_gives_the_same(name: str, plan: Plan) -> None:
    model_map = describe(tiny(name, dtype=DOUBLE))
    row = text(model_map)
    expected, _ = literal(model_map, row, steps=4)
    found = IntegratedGradients(model_map, steps=4, plan=plan)([row])
    close(found, expected)
    assert found.plans == {plan: len(row.pos)}


@pytest.mark.parametrize("rule", ["left", "right"])
def test_rules_of_the_paper(rule: Rule) -> None:
    model_map = describe(tiny("gpt_neox", dtype=DOUBLE))
    row = text(model_map)
    close(IntegratedGradients(model_map, 5, rule)([row]), literal(model_map, row, 5, rule)[0])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon-alibi", "gpt2"])
def test_sdpa_attention_gives_the_same(name: str) -> None:
    model = tiny(name, dtype=DOUBLE)
    model_map = describe(model)
    expected, _ = literal(model_map, text(model_map), steps=4)
    model.set_attn_implementation("sdpa")
    found = IntegratedGradients(model_map, steps=4)([text(model_map)])
    close(found, expected)
    assert found.plans == {"queries": 3}


@pytest.mark.parametrize("method", ["riemann_middle", "riemann_left"])
def test_agrees_with_captum_on_a_function_of_the_activations(method: str) -> None:
    model_map = describe(tiny("llama", dtype=DOUBLE))
    row = text(model_map)
    row = ScoredRow(row.ids, row.pos[2:], row.label[2:], [1.0])
    pos, label = row.pos[0], row.label[0]
    ids = row.ids[: pos + 1]
    rule: Rule = "midpoint" if method == "riemann_middle" else "left"
    found = IntegratedGradients(model_map, 20, rule)([row])
    for layer, active in enumerate(own(model_map, ids, pos)):

        def of_activations(given: Tensor, layer: int = layer) -> Tensor:
            return chances(model_map, ids, pos, label, {layer: given})

        captum = Captum(of_activations).attribute(active[None], n_steps=20, method=method)
        value = found.values[Site(layer, "neuron")]
        torch.testing.assert_close(value.double(), captum[0], rtol=1e-5, atol=1e-9)


def test_equals_a_closed_form() -> None:
    # One layer, two tokens, no final norm: the logit difference is d0 + alpha d, with d the sum of all a_i w_i, so
    # P = sigmoid(d0 + alpha d) and each neuron's share of its change is a_i w_i / d.
    model = tiny(
        "opt",
        dtype=DOUBLE,
        num_hidden_layers=1,
        vocab_size=2,
        _remove_final_layer_norm=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model_map = describe(model)
    ids = torch.tensor([1, 0, 1, 1, 0])
    active = own(model_map, ids, 4)[0]
    unembed = model.get_output_embeddings().weight
    weight = (unembed[1] - unembed[0]) @ model_map.view(0, "down")
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, 4]
        change = active @ weight
        without = (logits[1] - logits[0]) - change
        expected = active * weight / change * ((without + change).sigmoid() - without.sigmoid())
    found = IntegratedGradients(model_map, steps=400)([ScoredRow(ids, [4], [1], [1.0])])
    torch.testing.assert_close(
        found.values[Site(0, "neuron")].double(), expected, rtol=1e-4, atol=1e-7
    )
    assert float(expected.abs().max()) > 0.01


def test_attributions_of_a_layer_add_up_to_the_effect_of_silencing_it() -> None:
    model_map = describe(tiny("phi3", dtype=DOUBLE))
    row = text(model_map)
    _, effect = literal(model_map, row, steps=1)
    found = IntegratedGradients(model_map, steps=300)([row])
    totals = [float(value.double().sum()) for value in found.values.values()]
    assert totals == pytest.approx(effect, abs=1e-6)
    assert min(map(abs, effect)) > 1e-4
    assert max(map(abs, found.gap)) < 1e-6


# ---- the approximations, which are other quantities ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_joint_path_scales_all_layers_and_is_not_the_same(name: str) -> None:
    model_map = describe(tiny(name, dtype=DOUBLE))
    row = text(model_map)
    row = ScoredRow(row.ids, row.pos[-1:], row.label[-1:], [1.0])
    pos, label = row.pos[0], row.label[0]
    ids = row.ids[: pos + 1] if model_map.causal else row.ids
    activations = own(model_map, ids, pos)
    alphas = (torch.arange(7, dtype=DOUBLE) + 0.5)[:, None] / 7
    scaled = {layer: (alphas * a).requires_grad_() for layer, a in enumerate(activations)}
    probability = chances(model_map, ids, pos, label, scaled)
    gradients = torch.autograd.grad(probability.sum(), list(scaled.values()))
    expected = [a * g.mean(0) for a, g in zip(activations, gradients, strict=True)]
    found = IntegratedGradients(model_map, 7, path="joint")([row])
    close(found, expected)
    all_layers = dict(enumerate(activations))
    lost = found.probability[0] - silent(model_map, ids, pos, label, all_layers)
    total = sum(float(value.sum()) for value in expected)
    assert found.gap == pytest.approx([total - lost], abs=1e-7)
    exact, _ = literal(model_map, row, steps=7)
    assert float((exact[0] - expected[0]).abs().max()) > 0.05 * float(exact[0].abs().max())


def test_gradient_times_activation() -> None:
    model_map = describe(tiny("gpt_neox", dtype=DOUBLE))
    row = text(model_map)
    row = ScoredRow(row.ids, [6], [9], [1.0])
    found = IntegratedGradients(model_map, path="gradient")([row])
    # At alpha = 1 every layer sees the model as it is: the right rule with one step is the gradient.
    close(found, literal(model_map, row, 1, "right")[0])
    assert found.gap == ()


# ---- what must not matter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "roberta"])
@pytest.mark.parametrize("batch_size", [1, 3, 500])
def test_batch_size_does_not_matter(name: str, batch_size: int) -> None:
    model_map = describe(tiny(name, dtype=DOUBLE))
    row = text(model_map, length=9)
    one = IntegratedGradients(model_map, steps=9, batch_size=7)([row])
    two = IntegratedGradients(model_map, steps=9, batch_size=batch_size)([row])
    for site, value in one.values.items():
        torch.testing.assert_close(two.values[site], value, rtol=1e-5, atol=1e-10)
    assert two.gap == pytest.approx(one.gap, abs=1e-8)


def test_rows_are_summed_and_labels_without_weight_skipped() -> None:
    model_map = describe(tiny("bert", dtype=DOUBLE))
    ids = token_ids(2, 7)
    rows = [ScoredRow(ids[0], [2], [9], [1.0]), ScoredRow(ids[1], [3, 4], [8, 7], [0.25, 0.0])]
    first, second = (literal(model_map, row, 4)[0] for row in rows)
    found = IntegratedGradients(model_map, steps=4)(rows)
    close(found, [a + b for a, b in zip(first, second, strict=True)])
    assert found.plans == {"rows": 2}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_of_the_caller_does_not_matter(mode: Any) -> None:
    model_map = describe(tiny("phi", dtype=DOUBLE))
    row = text(model_map)
    expected, _ = literal(model_map, row, 3)
    with mode():
        close(IntegratedGradients(model_map, steps=3)([row]), expected)


def test_repeated_calls_give_the_same_bits() -> None:
    model_map = describe(tiny("qwen3"))
    attribute = IntegratedGradients(model_map)
    one, two = attribute([text(model_map)]), attribute([text(model_map)])
    assert all(torch.equal(value, two.values[site]) for site, value in one.values.items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_half_precision_is_close(name: str) -> None:
    model = tiny(name)
    row = text(describe(model))
    exact = IntegratedGradients(describe(model))([row])
    half = IntegratedGradients(describe(model.to(torch.bfloat16)))([row])
    assert half.plans == exact.plans
    for site, value in exact.values.items():
        assert float(torch.cosine_similarity(half.values[site], value, dim=0)) > 0.99


# ---- the model stays as it was ---------------------------------------------------------------------------------------


def state(model: nn.Module) -> tuple[Any, ...]:
    modules = list(model.modules())
    return (
        [m.training for m in modules],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
    )


def prepared(name: str) -> Any:
    """A model with mixed modes and flags, as a user may have left it."""
    model = tiny(name)
    model.train()
    next(model.children()).eval()
    for parameter in itertools.islice(model.parameters(), 0, None, 3):
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", ["gpt2", "olmo2", "distilbert"])
def test_leaves_no_trace(name: str) -> None:
    model = prepared(name)
    before, weights = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    cache = model.config.use_cache if hasattr(model.config, "use_cache") else None
    IntegratedGradients(describe(model), steps=3)([text(describe(model))])
    assert state(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert getattr(model.config, "use_cache", None) == cache


@pytest.mark.parametrize("call", [0, 1])
def test_leaves_no_trace_after_an_exception(call: int) -> None:
    model = prepared("llama")
    calls = itertools.count()

    def interrupt(*_: Any) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt

    handle = model.get_output_embeddings().register_forward_hook(interrupt)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        IntegratedGradients(describe(model), steps=3)([text(describe(model))])
    assert state(model) == before
    handle.remove()


# ---- cost ------------------------------------------------------------------------------------------------------------


def tokens_through_layers(
    model_map: ModelMap, attribute: IntegratedGradients, row: ScoredRow
) -> int:
    """Passes of one token through the down projection of one layer."""
    total = 0

    def count(_: nn.Module, args: tuple[Tensor, ...], __: Any) -> None:
        nonlocal total
        total += args[0].numel() // args[0].shape[-1]

    with ExitStack() as stack:
        for layer in range(model_map.n_layers):
            down = model_map.read_point(Site(layer, "neuron")).module
            stack.callback(down.register_forward_hook(count).remove)
        attribute([row])
    return total


def test_cost_is_what_the_docstring_says() -> None:
    model_map = describe(tiny("llama", num_hidden_layers=4))
    layers, steps, tokens = 4, 5, 12
    row = ScoredRow(token_ids(tokens + 1), [tokens - 1], [9], [1.0])
    rows = (steps + 1) * layers * (
        layers + 1
    ) // 2 + layers  # the unscaled row passes every layer too
    attribute = IntegratedGradients(model_map, steps)
    assert tokens_through_layers(model_map, attribute, row) == tokens * layers + rows
    left = IntegratedGradients(model_map, steps, "left")
    fewer = rows - layers * (layers + 1) // 2
    assert tokens_through_layers(model_map, left, row) == tokens * layers + fewer
    joint = IntegratedGradients(model_map, steps, path="joint")
    assert tokens_through_layers(model_map, joint, row) == (tokens + steps + 2) * layers
    gradient = IntegratedGradients(model_map, path="gradient")
    assert tokens_through_layers(model_map, gradient, row) == (tokens + 1) * layers


# ---- where the fast way is wrong -------------------------------------------------------------------------------------


def test_a_plan_that_disagrees_with_an_ordinary_forward_pass_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model_map = describe(tiny("llama", dtype=DOUBLE))
    row = text(model_map)
    expected, _ = literal(model_map, row, 4)

    def leak(self: Any, arguments: dict[str, Any], hidden: Tensor) -> None:
        arguments["attention_mask"] = hidden.new_zeros(1, 1, 1, self.prefix + self.n_rows)

    monkeypatch.setattr(module._RowPass, "_fit_masks", leak)
    with caplog.at_level(logging.INFO, "circuits.attribution"):
        found = IntegratedGradients(model_map, steps=4)([row])
    close(found, expected)
    assert found.plans == {"rows": 3}
    assert "plan 'queries' gives a probability of" in caplog.text
    wrong = IntegratedGradients(model_map, steps=4, plan="queries")([row])
    assert float((wrong.values[Site(0, "neuron")] - expected[0]).abs().max()) > 1e-5


def test_experts_are_refused_and_dense_layers_beside_them_attributed() -> None:
    with pytest.raises(SiteError, match=r"L0.neuron: .* 4 experts.*use another kind of unit"):
        IntegratedGradients(describe(tiny("mixtral")))
    model_map = describe(tiny("qwen3_moe", dtype=DOUBLE))
    with pytest.raises(SiteError, match=r"L1.neuron: .*pass layers=\(0,\)"):
        IntegratedGradients(model_map)
    row = text(model_map)
    expected, _ = literal(model_map, row, 4, layers=(0,))
    found = IntegratedGradients(model_map, steps=4, layers=(0,))([row])
    assert found.plans == {"queries": 3}
    close(found, expected)


def test_some_layers_only() -> None:
    model_map = describe(tiny("gpt2", dtype=DOUBLE, n_layer=4))
    row = text(model_map)
    expected, _ = literal(model_map, row, 4)
    found = IntegratedGradients(model_map, 4, layers=(3, 1))([row])
    assert list(found.values) == [Site(1, "neuron"), Site(3, "neuron")]
    for site, value in found.values.items():
        torch.testing.assert_close(value.double(), expected[site.layer or 0], rtol=1e-5, atol=1e-9)
    assert len(found.gap) == 2


# ---- sampling of the path --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["midpoint", "left", "right", "near_zero"])
def test_points_integrate(rule: Rule) -> None:
    points = path_points(2000, rule)
    assert len(points) == 2000
    assert sum(weight * alpha**2 for alpha, weight in points) == pytest.approx(1 / 3, abs=1e-3)
    assert points == sorted(points)


def test_points_of_the_rules() -> None:
    assert [alpha for alpha, _ in path_points(4, "left")] == [0.0, 0.25, 0.5, 0.75]
    assert [alpha for alpha, _ in path_points(4, "right")] == [0.25, 0.5, 0.75, 1.0]
    assert [alpha for alpha, _ in path_points(4, "midpoint")] == [0.125, 0.375, 0.625, 0.875]


def test_normalised_mlp_outputs_need_points_near_zero() -> None:
    model = tiny("olmo2", dtype=DOUBLE)
    model_map = describe(model)
    for layer in range(2):  # a loud MLP, as trained ones are: its norm is flat until alpha is tiny
        model_map.view(layer, "down").mul_(30)
    row = text(model_map)
    effect = sum(map(abs, literal(model_map, row, 1)[1]))
    even = IntegratedGradients(model_map, 20)([row]).gap
    near = IntegratedGradients(model_map, 20, "near_zero")([row]).gap
    assert sum(map(abs, even)) > 0.5 * effect
    assert sum(map(abs, near)) < 0.1 * effect


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rule": "simpson"}, "unknown rule 'simpson'"),
        ({"path": "all"}, "unknown path 'all'"),
        ({"plan": "magic"}, "unknown plan 'magic'"),
        ({"layers": ()}, "layers is empty"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntegratedGradients(describe(tiny("gpt2")), **options)


def test_a_layer_that_does_not_exist() -> None:
    with pytest.raises(SiteError, match=r"layer 9 of .*expected 0 to 1"):
        IntegratedGradients(describe(tiny("gpt2")), layers=(0, 9))


def test_probabilities_that_are_not_numbers() -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        next(iter(model.transformer.h[1].parameters())).fill_(float("nan"))
    with pytest.raises(LocateEditError, match=r"expected numbers\. Look for NaN in its weights"):
        IntegratedGradients(describe(model))([text(describe(model))])
