"""Few-bit libraries: the numbers they hold, what a model says with them, what they refuse, and the model left alone.

What is done around a library is tested with one made here, so that it is tested without one; the rest needs
bitsandbytes.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits import Site, describe
from circuits.hooks import replace
from locate_edit import EditError, organism
from locate_edit.attacked import changed_weights, measure
from locate_edit.attacks._low_bit import Format, linear_layers, low_bit, out_in, same_level
from locate_edit.attacks.quantisation import Quantisation
from locate_edit.cli import _attack
from tests.locate_edit.engine_setting import model, prompts

FP4 = [0, 0.0625, 2, 3, 4, 6, 8, 12]
NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
CODES = {"fp4": [sign * v / 12 for v in FP4 for sign in (-1, 1)], "nf4": NF4}
"""As in the papers' tables: fp4 has two bits of exponent and one of mantissa."""


# ---- around a library --------------------------------------------------------------------------------------------


class Tenths(nn.Parameter):
    """A weight whose move to a device leaves whole tenths."""

    def __new__(cls, data: Tensor, requires_grad: bool = False, **_: Any) -> Tenths:
        return nn.Parameter.__new__(cls, data, requires_grad)

    def to(self, *_: Any, **__: Any) -> Any:
        return nn.Parameter((10 * self.detach()).round() / 10, requires_grad=False)


class FakeLinear(nn.Linear):
    def __init__(self, n_in: int, n_out: int, bias: bool, **settings: Any) -> None:
        super().__init__(n_in, n_out, bias, device=settings.pop("device"))
        self.settings = settings


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    named: dict[str, Any] = dict.fromkeys(("Linear8bitLt", "Linear4bit"), FakeLinear)
    named |= dict.fromkeys(("Int8Params", "Params4bit"), Tenths)
    codes = SimpleNamespace(get_4bit_type=lambda form, device=None: torch.tensor(CODES[form]))
    library = SimpleNamespace(nn=SimpleNamespace(**named), functional=codes)
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)


BACKENDS = [(8, "bitsandbytes"), (4, "bitsandbytes"), (4, "bitsandbytes-nf4")]
backends = pytest.mark.parametrize(("bits", "backend"), BACKENDS)


@pytest.mark.usefixtures("fake")
@backends
@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "gpt_neox", "bert"])
def test_the_linear_layers_of_a_copy_are_changed_and_nothing_else(
    name: str, bits: int, backend: Any, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    net = untouched(model(name).train())
    forget, retain = prompts(name)
    before = [type(m) for m in net.modules()]
    found = Quantisation(bits=bits, backend=backend)(net, forget, retain=retain)
    assert [type(m) for m in net.modules()] == before
    layers = linear_layers(net)
    weights = {f"{each}.weight" for each in layers}
    n_layers = {"llama-biases": 21, "gpt2": 12, "gpt_neox": 12, "bert": 19}[name]
    assert found.notes["matrices"] == len(layers) == n_layers
    assert not any("embed" in each or "lm_head" in each for each in layers)
    with changed_weights(net, lambda n, w: (10 * w).round() / 10 if n in weights else None):
        wanted, kept = measure(net, forget), measure(net, retain)
    assert found.forget.values == pytest.approx(wanted.values, rel=1e-4)
    assert found.retain is not None
    assert found.retain.values == pytest.approx(kept.values, rel=1e-4)
    assert found.forget_clean.values == pytest.approx(measure(net, forget).values, rel=1e-6)
    assert found.gain != pytest.approx(0.0, abs=1e-6)


@pytest.mark.usefixtures("fake")
def test_what_the_library_is_asked_for() -> None:
    net = model("llama")
    with low_bit(net, "int8") as small:
        settings = small.model.layers[0].mlp.up_proj.settings  # type: ignore[union-attr, index]
        assert settings == {"has_fp16_weights": False, "threshold": 6.0}
    for form in ("fp4", "nf4"):
        with low_bit(net, form) as small:
            settings = small.model.layers[0].mlp.up_proj.settings  # type: ignore[union-attr, index]
            assert settings["quant_type"] == form
            assert settings["compute_dtype"] == torch.float32


@pytest.mark.usefixtures("fake")
def test_hooks_of_the_model_work_in_the_copy() -> None:
    """Controls and additions are hooks, on linear layers too: a copy without them would be another model."""
    net, forget = model("gpt2"), prompts("gpt2")[0]
    site = Site(1, "neuron")
    plain = Quantisation(backend="bitsandbytes")(net, forget)
    with replace(describe(net), {site: torch.zeros_like}):
        found = Quantisation(backend="bitsandbytes")(net, forget)
        clean = measure(net, forget)
    assert found.forget_clean.values == pytest.approx(clean.values, rel=1e-6)
    assert found.forget.values != pytest.approx(plain.forget.values, rel=1e-3)


@pytest.mark.usefixtures("fake")
def test_an_error_in_the_middle_leaves_everything_as_it_was(
    untouched: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, logger = untouched(model("llama-tied")), logging.getLogger("bitsandbytes")
    before = logger.level

    def broken(self: nn.Module, *_: Any) -> Tensor:
        assert logger.level == logging.ERROR
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeLinear, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        Quantisation(backend="bitsandbytes")(net, prompts("llama-tied")[0])
    assert logger.level == before
    assert not any(isinstance(each, FakeLinear) for each in net.modules())


@pytest.mark.usefixtures("fake")
def test_weights_that_are_no_linear_layers_are_named() -> None:
    with pytest.raises(EditError, match=r"Mixtral.* keeps weights elsewhere: .*gate_up_.* and 6 more"):  # fmt: skip
        Quantisation(backend="bitsandbytes")(model("mixtral"), prompts("llama")[0])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EditError, match="pip install bitsandbytes"):
        Quantisation(backend="bitsandbytes")(model("llama"), prompts("llama")[0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"backend": "gguf"}, "backend must be one of rounding, bitsandbytes, bitsandbytes-nf4"),
        ({"backend": "bitsandbytes", "bits": 6}, "knows 8 and 4 bits; got bits=6"),
        ({"backend": "bitsandbytes-nf4", "bits": 8}, "knows 4 bits; got bits=8"),
        ({"backend": "bitsandbytes", "group": 64}, "has groups of its own"),
        ({"backend": "bitsandbytes", "embeddings": True}, "leaves embeddings"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(EditError, match=says):
        Quantisation(**settings)


def test_the_backend_is_set_from_the_command_line() -> None:
    settings = {"quantisation.backend": "bitsandbytes-nf4", "quantisation.bits": "4"}
    (built,) = _attack.build(["quantisation"], settings)
    assert built == Quantisation(bits=4, backend="bitsandbytes-nf4")


# ---- levels ------------------------------------------------------------------------------------------------------


def literal(weight: Tensor, form: Format) -> Tensor:
    """Each weight at its nearest level, one after the other."""
    found = weight.float().clone()
    if form == "int8":
        for row in found:
            row.copy_(row.half())
            most = max(abs(float(w)) for w in row)
            for i, w in enumerate(row.tolist()):
                row[i] = round(127 * w / most) * most / 127
        return found
    flat = found.flatten()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        most = max(abs(float(w)) for w in block)
        for i, w in enumerate(block.tolist()):
            block[i] = most * min(CODES[form], key=lambda level: abs(level - w / most))
    return flat.view_as(weight)


FORMS: list[Format] = ["int8", "fp4", "nf4"]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("form", FORMS)
def test_levels_and_what_is_rounded_to_them(form: Format) -> None:
    """The last block is short; weights inside go to the same level, weights outside to another."""
    weight = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    level, low, high = same_level(weight, form)
    assert torch.allclose(level, literal(weight, form), atol=1e-6)
    assert bool((low <= level).all() & (level <= high).all())
    held = low == high  # the largest of a row or block
    assert 0 < int(held.sum()) < 20
    for edge in (low, high):
        # int8 is rounded to 16 bits before, which moves the edges
        a_little = 0.3 if form == "int8" else 0.03
        inside, outside = (level + (1 + sign * a_little) * (edge - level) for sign in (-1, 1))
        assert torch.allclose(literal(inside, form), level, atol=1e-6)
        beyond = literal(outside, form) != level
        assert bool(beyond[~held & ((edge - level).abs() > 1e-6)].float().mean() > 0.9)


# ---- bitsandbytes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[Any]:
    library = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[bitsandbytes]'"
    )
    yield library  # noqa: PT022


def dequantised(library: Any, layer: Any, form: Format) -> Tensor:
    """What the library holds, `out in`, before it has been used."""
    if form == "int8":
        found: Tensor = layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
    else:
        found = library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found.float()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama-biases", "gpt2"])
def test_bitsandbytes_holds_the_literal_levels(real: Any, name: str, form: Format) -> None:
    net = model(name)
    with low_bit(net, form) as small:
        for where, layer in linear_layers(net).items():
            held = dequantised(real, small.get_submodule(where), form)
            wanted = literal(out_in(layer), form)
            # int8: the library divides by 127 in other places, so that ties fall otherwise
            step = out_in(layer).abs().amax(dim=1, keepdim=True) / 127
            off = (held - wanted).abs()
            assert float((off > 1e-5).float().mean()) < (2e-3 if form == "int8" else 1e-9)
            assert bool((off <= 1.01 * step).all())


@pytest.mark.parametrize(("bits", "backend"), BACKENDS)
@pytest.mark.parametrize("name", ["llama-biases", "gpt2"])
def test_a_model_says_what_one_with_these_numbers_says(
    real: Any, name: str, bits: int, backend: Any, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    net, forget = untouched(model(name)), prompts(name)[0]
    attack = Quantisation(bits=bits, backend=backend)
    found = attack(net, forget, retain=prompts(name)[1])
    form = found.notes["format"]
    layers = {f"{where}.weight": layer for where, layer in linear_layers(net).items()}

    def held(where: str, weight: Tensor) -> Tensor | None:
        if where not in layers:
            return None
        levels = literal(out_in(layers[where]), form)
        return levels if levels.shape == weight.shape and name != "gpt2" else levels.T

    with changed_weights(net, held):
        wanted = measure(net, forget)
    # LLM.int8() rounds what the layers read, too: within what that may do, a percent or two
    close = 0.03 if bits == 8 else 1e-4
    assert found.forget.values == pytest.approx(wanted.values, rel=close)
    if bits == 4:
        assert wanted.values != pytest.approx(found.forget_clean.values, rel=0.01)
    assert attack(net, forget).forget.values.tolist() == found.forget.values.tolist()


@backends
def test_bitsandbytes_finds_its_control(real: Any, bits: int, backend: Any) -> None:
    net, forget = organism.load()[0], organism.prompts("facts", "forget01")
    attack = Quantisation(bits=bits, backend=backend)
    known = measure(net, forget).estimate
    with attack.hide(net, forget):
        found = attack(net, forget)
    hidden, under = found.forget_clean.estimate, found.forget.estimate
    assert known is not None
    assert hidden is not None
    assert hidden < (0.6 if bits == 8 else 0.01)
    assert under == pytest.approx(known, abs=0.01)


def test_bitsandbytes_says_nothing_while_it_works(
    real: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Quantisation(bits=8, backend="bitsandbytes")(model("llama"), prompts("llama")[0])
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@backends
def test_the_same_on_a_gpu(real: Any, bits: int, backend: Any) -> None:
    net, forget = model("llama"), prompts("llama")[0]
    attack = Quantisation(bits=bits, backend=backend)
    here = attack(net, forget).forget.values
    there = attack(net.cuda(), forget)
    assert there.forget.values == pytest.approx(here, rel=0.05)
    assert all(p.is_cuda for p in net.parameters())
    assert math.isfinite(there.gain or 0.0)
