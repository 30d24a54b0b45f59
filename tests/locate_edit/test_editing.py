"""Edits as values: on and off, files, arithmetic, export, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from circuits import ComponentMask, Site
from locate_edit import Edit, EditError, edit
from locate_edit.fingerprint import fingerprint
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.zero_neurons import ZeroNeurons
from tests.locate_edit.engine_setting import differing, entries, model, prompts, some_units, state
from tests.tiny import token_ids

LEARN = FineTune(steps=3, lr=1e-2)


def made_on(
    name: str = "llama-tied", mask: ComponentMask | None = None, **options: Any
) -> tuple[Any, Edit]:
    net = model(name)
    forget, retain = prompts(name)
    mask = mask or some_units(net)
    return net, edit(
        net, options.pop("method", LEARN), mask, forget=forget, retain=retain, **options
    )


def logits(net: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(token_ids(2, 9)).logits
        return found


# -- on and off -----------------------------------------------------------------------------------


def test_context_managers_and_order() -> None:
    net, made = made_on()
    edited, base = state(net), state(model("llama-tied"))
    with made.off() as off:
        assert not differing(off, base)
    assert not differing(net, edited)
    with pytest.raises(ZeroDivisionError), made.off():
        _ = 1 / 0
    assert not differing(net, edited)
    made.undo()
    with made.applied(net) as on:
        assert not differing(on, edited)
    assert not differing(net, base)
    with pytest.raises(EditError, match="not applied"):
        made.undo()
    made.apply(net)
    with pytest.raises(EditError, match="applied already"):
        made.apply(net)


def test_a_later_edit_must_be_undone_first() -> None:
    net, first = made_on()
    forget, _ = prompts("llama-tied")
    after_first = state(net)
    second = edit(net, LEARN, some_units(net), forget=forget)
    with pytest.raises(EditError, match="undo the later edit first"):
        first.undo()
    second.undo()
    assert not differing(net, after_first)
    first.undo()
    assert not differing(net, state(model("llama-tied")))


def test_rerun_on_another_mask_leaves_this_edit_in_place() -> None:
    net, made = made_on()
    edited = state(net)
    other_mask = ComponentMask({Site(0, "neuron"): torch.arange(40) < 5})
    with made.rerun(other_mask) as control:
        assert {name.split(".mlp")[0] for name in differing(net, state(model("llama-tied")))} == {
            "model.layers.0"
        }
        assert control.mask == other_mask
    assert not differing(net, edited)
    with pytest.raises(RuntimeError), made.rerun(other_mask):
        raise RuntimeError
    assert not differing(net, edited)


# -- files ----------------------------------------------------------------------------------------


def test_the_saved_edit_holds_no_text_of_the_prompts(tmp_path: Path) -> None:
    _, made = made_on()
    made.save(tmp_path / "edit")
    assert {p.name for p in (tmp_path / "edit").iterdir()} == {
        "delta.safetensors",
        "edit.json",
        "mask.safetensors",
    }
    about = (tmp_path / "edit" / "edit.json").read_text()
    assert "Ann" not in about
    assert "calls" not in about
    assert json.loads(about)["provenance"]["method"]["lr"] == 1e-2


def test_an_edit_of_another_model_is_refused(tmp_path: Path) -> None:
    _, made = made_on()
    loaded = Edit.load(made.save(tmp_path / "edit"))
    for other, match in (
        (model("llama-tied", seed=1), "values of .* parameters differ"),
        (model("llama-tied", torch.bfloat16), "float32 .*bfloat16"),
        (model("gpt2"), "parameters are missing"),
        (model("llama-tied", intermediate_size=44), "24x44|44x24"),
    ):
        before = state(other)
        with pytest.raises(EditError, match=f"another base model: .*({match})"):
            loaded.apply(other)
        assert not differing(other, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_notices_any_single_changed_entry(dtype: torch.dtype) -> None:
    holder = torch.nn.Linear(
        7, 9, dtype=dtype
    )  # an odd number of entries: some outside whole words
    before = fingerprint(holder)
    for name, parameter in holder.named_parameters():
        for place in (0, 3, parameter.numel() - 1):
            with torch.no_grad():
                flat = parameter.view(-1)
                kept = flat[place].clone()
                flat[place] = kept + kept.abs() * 0.01 + 0.01
            after = fingerprint(holder)
            assert [n for n in before if before[n] != after[n]] == [name]
            with torch.no_grad():
                parameter.view(-1)[place] = kept
    assert fingerprint(holder) == before
    odd = torch.nn.Linear(7, 9, dtype=dtype)
    odd.weight = torch.nn.Parameter(torch.randn(64, dtype=dtype)[1:].view(9, 7))  # not word-aligned
    assert fingerprint(odd)["weight"]


def test_stacking_on_another_edit_is_asked_for(tmp_path: Path) -> None:
    net, made = made_on()
    loaded = Edit.load(made.save(tmp_path / "edit"))
    made.undo()
    with torch.no_grad():
        net.model.norm.weight.add_(1.0)
    with pytest.raises(EditError, match="strict=False"):
        loaded.apply(net)
    loaded.apply(net, strict=False)
    loaded.undo()


@pytest.mark.parametrize("file", ["delta.safetensors", "mask.safetensors", "edit.json"])
def test_truncated_changed_or_missing_files_are_refused(file: str, tmp_path: Path) -> None:
    _, made = made_on()
    folder = made.save(tmp_path / "edit")
    path = folder / file
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(EditError, match=r"truncated|cannot be read"):
        Edit.load(folder)
    path.write_bytes(data.replace(b"1", b"2"))
    with pytest.raises(EditError, match=r"truncated or was changed|was changed after|format"):
        Edit.load(folder)
    path.unlink()
    with pytest.raises(EditError, match="missing"):
        Edit.load(folder)
    with pytest.raises(EditError, match="is not an edit"):
        Edit.load(tmp_path / "nothing")


def test_indices_outside_the_parameter_are_refused(tmp_path: Path) -> None:
    """A file whose checksums fit but whose indices do not, as a forger would write it."""
    from locate_edit.editing import _digest, _sha256

    _, made = made_on()
    folder = made.save(tmp_path / "edit")
    tensors = load_file(folder / "delta.safetensors")
    name = next(key for key in tensors if key.endswith("/index"))
    tensors[name] = tensors[name] + 10_000
    save_file(tensors, folder / "delta.safetensors")
    about = json.loads((folder / "edit.json").read_text())
    about.pop("digest")
    about["files"]["delta.safetensors"] = _sha256((folder / "delta.safetensors").read_bytes())
    about["digest"] = _digest(about)
    (folder / "edit.json").write_text(json.dumps(about))
    with pytest.raises(EditError, match="consistently"):
        Edit.load(folder)


def test_a_full_disk_leaves_the_earlier_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made = made_on()
    folder = made.save(tmp_path / "edit")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("locate_edit.editing.save_file", full)
    with pytest.raises(Exception, match="No space left"):
        made.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["edit"]


# -- arithmetic -----------------------------------------------------------------------------------


def test_sum_negation_and_scale() -> None:
    net, first = made_on(mask=some_units(model("llama-tied"), layers=(1,)))
    first.undo()
    _forget, retain = prompts("llama-tied")
    second = edit(net, LEARN, some_units(net, layers=(1, 2), share=0.4), forget=retain)
    second.undo()
    base = state(net)
    differences = []
    for made in (first, second):
        with made.applied(net):
            differences.append({k: v - base[k] for k, v in state(net).items()})
    for combined, weights in (
        (first + second, (1, 1)),
        (first - second, (1, -1)),
        (-first, (-1, 0)),
        (0.5 * first, (0.5, 0)),
        (first * 2 + second, (2, 1)),
    ):
        with combined.applied(net):
            for name, now in state(net).items():
                expected = base[name] + sum(
                    w * d[name] for w, d in zip(weights, differences, strict=True)
                )
                torch.testing.assert_close(now, expected, rtol=1e-5, atol=1e-6)
        assert not differing(net, base)
    nothing = first - first
    with nothing.applied(net):  # up to one rounding of the negated values
        for name, now in state(net).items():
            torch.testing.assert_close(now, base[name], rtol=0.0, atol=1e-6)


def test_sum_of_line_and_entry_edits() -> None:
    net, lines = made_on()
    lines.undo()
    forget, _ = prompts("llama-tied")
    singles = edit(net, LEARN, entries(net, 0.05), forget=forget)
    singles.undo()
    base = state(net)
    parts = []
    for made in (lines, singles):
        with made.applied(net):
            parts.append({k: v - base[k] for k, v in state(net).items()})
    with (lines + singles).applied(net):
        for name, now in state(net).items():
            torch.testing.assert_close(
                now, base[name] + parts[0][name] + parts[1][name], rtol=1e-5, atol=1e-6
            )


def test_edits_of_different_bases_do_not_add() -> None:
    net, first = made_on()
    forget, _ = prompts("llama-tied")
    second = edit(net, LEARN, some_units(net), forget=forget)  # made on top of the first
    with pytest.raises(EditError, match="different base models"):
        _ = first + second


# -- export ---------------------------------------------------------------------------------------


def test_merge_to_an_ordinary_checkpoint(tmp_path: Path) -> None:
    net, made = made_on()
    made.merge_to(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert torch.equal(logits(again), logits(net))


# PEFT asks the model for a property that transformers has renamed and warns about.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gpt_neox", "phi3"])
def test_peft_adapter_equals_the_edit(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    side = (
        "both" if name in ("llama-tied", "phi3") else "write"
    )  # the others have biases on the read side
    net, made = made_on(name, side=side)
    made.to_peft(tmp_path / "lora")
    edited = logits(net)
    made.undo()
    assert float((edited - logits(net)).abs().max()) > 1e-2
    adapted = peft.PeftModel.from_pretrained(model(name), tmp_path / "lora")
    torch.testing.assert_close(logits(adapted), edited, rtol=1e-4, atol=1e-4)


def test_what_a_lora_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    _, biased = made_on("gpt2")
    with pytest.raises(EditError, match="cannot be part of a LoRA adapter"):
        biased.to_peft(tmp_path / "lora")
    net = model("llama-tied")
    _, scattered = made_on(mask=entries(net, 0.05))
    with pytest.raises(EditError, match="whole rows or columns"):
        scattered.to_peft(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_plain_function_is_a_method_too() -> None:
    def halve(run: Any) -> None:
        run.write(lambda _slot, now: now / 2)

    net = model("llama-tied")
    before = state(net)
    forget, _ = prompts("llama-tied")
    made = edit(net, halve, some_units(net), forget=forget)
    assert made.provenance["method"]["name"] == "halve"
    for name, flags in differing(net, before).items():
        torch.testing.assert_close(net.state_dict()[name][flags], before[name][flags] / 2)
    made.undo()
    assert not differing(net, before)


def test_a_function_among_the_settings_is_named_not_addressed() -> None:
    @dataclass(frozen=True)
    class Scaled:
        by: Callable[[Tensor], Tensor] = torch.Tensor.neg

        def __call__(self, run: Any) -> None:
            run.write(lambda _slot, now: self.by(now))

    net = model("llama-tied")
    made = edit(net, Scaled(by=logits), some_units(net, share=0.0), forget=prompts("llama-tied")[0])
    assert made.provenance["method"]["by"] == f"{__name__}:logits"


# -- neuron zeroing -------------------------------------------------------------------------------


def test_zero_and_scale_act_on_what_a_unit_writes() -> None:
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")
    down = net.model.layers[1].mlp.down_proj
    mask = ComponentMask({Site(1, "neuron"): torch.arange(40) == 7})
    before = down.weight.detach().clone()
    made = edit(net, ZeroNeurons(), mask, forget=forget)
    assert float(down.weight[:, 7].detach().abs().max()) == 0.0
    assert torch.equal(down.weight[:, :7], before[:, :7])
    made.undo()
    edit(net, ZeroNeurons(to="scale", factor=-2.0), mask, forget=forget)
    assert torch.equal(down.weight[:, 7], -2.0 * before[:, 7])
    with pytest.raises(EditError, match="to must be"):
        ZeroNeurons(to="unk")  # type: ignore[arg-type]
    with pytest.raises(EditError, match="means something only"):
        ZeroNeurons(factor=0.5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "bert"])
def test_mean_makes_neurons_constant_at_their_mean(name: str) -> None:
    net = model(name)
    forget, retain = prompts(name)
    mask = some_units(net, layers=(1,))
    chosen = mask.on[Site(1, "neuron")]
    from circuits import describe

    seen: list[Tensor] = []
    down = describe(net).read_point(Site(1, "neuron")).module
    handle = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in retain.batches(1):  # one prompt at a time: no padding
            net(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        expected = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen]).mean(0)[chosen]
        edit(net, ZeroNeurons(to="mean"), mask, forget=forget, retain=retain)
        seen.clear()
        batch = forget.batch([0])
        net(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    now = seen[0].reshape(-1, seen[0].shape[-1])
    torch.testing.assert_close(now[:, chosen], expected.expand(len(now), -1), rtol=1e-4, atol=1e-5)
    assert float(now[:, ~chosen].std(0).median()) > 1e-2


def test_mean_needs_a_bias_before_the_activation() -> None:
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")
    before = state(net)
    with pytest.raises(EditError, match="one bias before the activation"):
        edit(net, ZeroNeurons(to="mean"), some_units(net), forget=forget)
    assert not differing(net, before)
