"""Adapters and extra tokens against literal versions, in training, in edits, in files, and gone again."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from circuits import ComponentMask, Site, capture, describe
from locate_edit import Edit, EditError, edit
from locate_edit.additions import (
    Adapter,
    Added,
    Addition,
    ExtraTokens,
    install,
    installed,
    made,
    parse,
)
from locate_edit.checkpoints import take_out
from locate_edit.editing import _digest, _sha256
from locate_edit.engine import Run, Settings, Step, StopWhen, Train
from locate_edit.ensembles.sisa import Sisa
from locate_edit.fingerprint import fingerprint as identity
from locate_edit.ledger import Ledger
from locate_edit.methods.fine_tune import FineTune
from locate_edit.prompts import Batch
from locate_edit.reports.evaluation import evaluate
from locate_edit.slots import slots_for
from tests.conftest import fingerprint
from tests.locate_edit.engine_setting import differing, model, prompts, some_units, state
from tests.tiny import CONFIGS, VOCAB, tiny, token_ids

MLP, LAYER = Site(1, "mlp"), Site(2, "layer")


def logits(net: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(token_ids(2, 9) if ids is None else ids).logits
        return found


def noisy(net: Any, *additions: Addition, seed: int = 0) -> list[Added]:
    """Additions with random values everywhere, so that each of them counts."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Added(
            each,
            {
                name: 0.5 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
                for name, value in made(each, describe(net), seed=0).values.items()
            },
        )
        for each in additions
    ]


@dataclass(frozen=True)
class Teach:
    """Learns the forget prompts with additions; the first token of a prompt is replaced by an extra one."""

    additions: tuple[Addition, ...] = (Adapter(MLP, 4), Adapter(LAYER, 3), ExtraTokens(2))
    train: Train = "additions"
    steps: int = 3
    lr: float = 1e-2

    def __call__(self, run: Run) -> None:
        run.add(self.additions)

        def loss(step: Step) -> dict[str, Tensor]:
            batch = prompted(step.forget, run.extra_ids) if run.extra_ids else step.forget
            return {"forget": run.score(batch).cross_entropy()}

        run.fit(loss, steps=self.steps, lr=self.lr, train=self.train)


def prompted(batch: Batch, ids: Sequence[int]) -> Batch:
    changed = batch.input_ids.clone()
    changed[:, 0] = ids[-1]
    return replace(batch, input_ids=changed)


def taught(name: str = "llama-tied", method: Any = None, **options: Any) -> tuple[Any, Edit]:
    net, (forget, retain) = model(name), prompts(name)
    mask = options.pop("mask", some_units(net))
    made_edit = edit(net, method or Teach(), mask, forget=forget, retain=retain, **options)
    return net, made_edit


# -- what they compute ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert", "mixtral", "gemma2"])
def test_an_adapter_adds_what_its_formula_says(name: str) -> None:
    net = model(name)
    the_map = describe(net)
    site = Site(2, "mlp")
    with torch.no_grad(), capture(the_map, [site]) as plain:
        net(token_ids(1, 5))
    (adapter,) = noisy(net, Adapter(site, 3))
    v = adapter.values
    expected = plain[site].clone()
    for pos, out in enumerate(plain[site][0]):
        neurons = [max(0.0, float(v["down"][n] @ out + v["b1"][n])) for n in range(3)]
        for d in range(len(out)):
            expected[0, pos, d] += sum(neurons[n] * float(v["up"][d, n]) for n in range(3))
            expected[0, pos, d] += float(v["b2"][d])
    placed = install(the_map, [adapter])
    with torch.no_grad(), capture(the_map, [site]) as found:
        net(token_ids(1, 5))
    torch.testing.assert_close(found[site], expected)
    placed.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "mixtral", "gemma3_text", "falcon"])
def test_in_place_they_change_no_bit_and_leave_nothing_behind(
    name: str, dtype: torch.dtype
) -> None:
    net = model(name, dtype)
    before, keys, plain = fingerprint(net), list(net.state_dict()), logits(net)
    attributes = [sorted(module.__dict__) for module in net.modules()]
    the_map = describe(net)
    start = [
        made(each, the_map, seed=3) for each in (Adapter(MLP, 4), Adapter(LAYER, 2), ExtraTokens(3))
    ]
    placed = install(the_map, start)
    assert list(placed.ids) == [VOCAB, VOCAB + 1, VOCAB + 2]
    assert torch.equal(logits(net), plain)
    assert list(net.state_dict()) == keys
    extra = token_ids(2, 9)
    extra[0, 3], extra[1, 0] = VOCAB, VOCAB + 2
    assert logits(net, extra).shape == plain.shape, "the output grew"
    assert bool(torch.isfinite(logits(net, extra)).all())
    placed.remove()
    placed.remove()
    assert fingerprint(net) == before
    assert [sorted(module.__dict__) for module in net.modules()] == attributes
    assert installed(net) == []
    with pytest.raises(IndexError):
        logits(net, extra)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_an_extra_token_with_the_row_of_a_token_reads_as_that_token(name: str) -> None:
    """In every family, so also where the embedding scales its rows, projects them, or shares them with the head."""
    net = tiny(name)
    rows = net.get_input_embeddings().weight.detach()[[40, 77]].clone()
    placed = install(describe(net), [Added(ExtraTokens(2), {"rows": rows})])
    plain = token_ids(2, 9)
    plain[0, 2], plain[1, 8] = 40, 77
    extra = plain.clone()
    extra[0, 2], extra[1, 8] = VOCAB, VOCAB + 1
    assert torch.equal(logits(net, extra), logits(net, plain))
    placed.remove()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3_text", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_with_the_cache_reads_extra_tokens_too(name: str, side: str) -> None:
    net = model(name)
    row = net.get_input_embeddings().weight.detach()[[40]].clone()
    placed = install(
        describe(net), [*noisy(net, Adapter(MLP, 4)), Added(ExtraTokens(1), {"rows": row})]
    )
    plain, seen = token_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    padding = slice(0, 2) if side == "left" else slice(4, 6)
    plain[1, padding], seen[1, padding] = 0, 0
    plain[:, 3] = 40
    extra = plain.clone()
    extra[:, 3] = VOCAB
    said = [
        net.generate(
            ids, attention_mask=seen, max_new_tokens=5, do_sample=False, use_cache=cache,
            eos_token_id=None,
        )[:, 6:]
        for ids in (plain, extra)
        for cache in (True, False)
    ]  # fmt: skip
    assert all(torch.equal(said[0], other) for other in said[1:])
    placed.remove()


def test_starting_values() -> None:
    net = model("gemma2")
    the_map = describe(net)
    rows = made(ExtraTokens(4000), the_map, seed=0).values["rows"]
    weight = net.get_input_embeddings().weight.detach()
    torch.testing.assert_close(rows.mean(0), weight.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(rows.std(0), weight.std(0), atol=0.0, rtol=0.06)
    down = made(Adapter(MLP, 2000), the_map, seed=0).values["down"]
    assert float(down.std()) == pytest.approx(1 / math.sqrt(24), rel=0.02)
    again, other = (made(Adapter(MLP, 2000), the_map, seed=n).values["down"] for n in (0, 1))
    assert torch.equal(again, down)
    assert not torch.equal(other, down)
    wide = made(Adapter(MLP, 2), describe(model("gpt2", torch.float64)), seed=0)
    assert wide.values["up"].dtype == torch.float64
    half = made(Adapter(MLP, 2), describe(model("gpt2", torch.bfloat16)), seed=0)
    assert half.values["up"].dtype == torch.float32


def test_descriptions_go_through_json() -> None:
    for each in (Adapter(MLP, 4), Adapter(LAYER, 1), ExtraTokens(7)):
        assert parse(json.loads(json.dumps(each.about()))) == each


def test_a_copy_of_the_model_has_its_own() -> None:
    net = model("gpt2")
    placed = install(describe(net), noisy(net, Adapter(MLP, 4), ExtraTokens(1)))
    twin, changed = copy.deepcopy(net), logits(net)
    placed.remove()
    assert torch.equal(logits(twin), changed)
    (copied,) = installed(twin)
    copied.remove()
    assert torch.equal(logits(twin), logits(net))
    assert not torch.equal(logits(net), changed)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: Adapter(Site(1, "neuron"), 4), "output of an mlp or a layer"),
        (lambda: Adapter(MLP, 0), "width of an adapter must be a whole number"),
        (lambda: ExtraTokens(True), "number of extra tokens"),
        (lambda: made(Adapter(Site(9, "mlp"), 4), describe(model("gpt2")), seed=0), "layer 9"),
        (lambda: parse({"kind": "lora"}), "unknown addition 'lora'"),
        (lambda: parse({"kind": "adapter", "site": "L1.mlp"}), "cannot read the description"),
        (lambda: Added(ExtraTokens(2), {"rows": torch.zeros(3, 24)}), "expected tensors of shapes"),
        (lambda: Added(ExtraTokens(1), {"rows": torch.full((1, 24), math.nan)}), "finite"),
        (lambda: Added(ExtraTokens(1), {"rows": torch.zeros(1, 24).long()}), "finite"),
        (
            lambda: install(describe(model("gpt2")), [Added(ExtraTokens(1), {"rows": torch.zeros(1, 8)})]),
            "model of width 8, this one has 24",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(call: Callable[[], Any], reason: str) -> None:
    with pytest.raises(Exception, match=reason) as caught:
        call()
    assert isinstance(caught.value, EditError) or "layer 9" in str(caught.value)


# -- training -------------------------------------------------------------------------------------


def test_training_equals_ordinary_training_of_modules() -> None:
    """Adapters as modules in a copy of the model, with torch's AdamW, on the same batches."""
    _, made_edit = taught("gpt2", Teach((Adapter(MLP, 4), Adapter(LAYER, 3)), steps=4))
    plain, (forget, _) = model("gpt2"), prompts("gpt2")
    the_map = describe(plain)
    modules: list[nn.Sequential] = []
    for n, each in enumerate((Adapter(MLP, 4), Adapter(LAYER, 3))):
        start = made(each, the_map, seed=n).values
        module = nn.Sequential(nn.Linear(24, each.width), nn.ReLU(), nn.Linear(each.width, 24))
        with torch.no_grad():
            for name, parameter in zip(
                ("down", "b1", "up", "b2"), module.parameters(), strict=True
            ):
                parameter.copy_(start[name])
        modules.append(module)
        the_map.read_point(each.site).module.register_forward_hook(
            lambda _module, _args, out, f=module: (
                (out[0] + f(out[0]), *out[1:]) if isinstance(out, tuple) else out + f(out)
            )
        )
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    batch = forget.batch(range(4))
    for _ in range(4):
        out = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = nn.functional.cross_entropy(out[batch.row, batch.pos], batch.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module, added in zip(modules, made_edit.additions, strict=True):
        for name, parameter in zip(("down", "b1", "up", "b2"), module.parameters(), strict=True):
            torch.testing.assert_close(added.values[name], parameter.detach(), atol=1e-5, rtol=1e-4)
    assert float(made_edit.additions[0].values["up"].abs().max()) > 1e-2
    made_edit.undo()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_reuse_of_lower_layers_changes_nothing(checkpointing: bool) -> None:
    mask = some_units(model("gpt2"), layers=(0, 2))
    runs = []
    for memory in (0, 2**30):
        method = Teach((Adapter(Site(2, "mlp"), 4),), steps=4)
        _, made_edit = taught(
            "gpt2", method, mask=mask, reuse_prefix_bytes=memory, gradient_checkpointing=checkpointing
        )  # fmt: skip
        runs.append(made_edit.additions[0].values)
        made_edit.undo()
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], atol=1e-6, rtol=1e-5)


def run_on(name: str = "gpt2", mask: ComponentMask | None = None) -> Run:
    net, (forget, retain) = model(name), prompts(name)
    net.requires_grad_(False)
    slots = slots_for(describe(net), mask or some_units(net, layers=(0, 2)))
    return Run(describe(net), slots, forget, retain, Settings())


def test_lower_layers_run_only_when_they_have_to() -> None:
    run = run_on()
    lowest = []
    run.model_map.layer_module(0).register_forward_hook(lambda *_: lowest.append(1))
    attention = run.model_map.layer_module(0).get_submodule("attn")
    attention.register_forward_hook(lambda *_: lowest.append(2))

    def loss(step: Step) -> dict[str, Tensor]:
        lowest.append(0)
        return {"forget": run.score(step.forget).cross_entropy()}

    run.add([Adapter(Site(2, "mlp"), 4)])
    run.fit(loss, steps=3, lr=1e-2, train="additions")
    assert lowest.count(2) == 1, (
        "one pass fills the memory; a skipped layer does not run its attention"
    )
    lowest.clear()
    run.fit(loss, steps=3, lr=1e-2, train="both")
    assert lowest.count(2) == 3, "slices of the first layer train, so it runs at every step"
    run.restore()
    lowest.clear()
    run.add([Adapter(Site(2, "mlp"), 4), ExtraTokens(1)])
    run.fit(loss, steps=3, lr=1e-2, train="additions")
    assert lowest.count(2) == 3, "rows of the embedding train, so everything runs"
    run.restore()


def test_base_reference_and_other_models_are_without_them() -> None:
    run = run_on()
    batch = run.forget.batch(range(4))
    plain = run.score(batch).logits.detach()
    changed_slices = run.delta()
    changed_slices = type(changed_slices)(
        {n: replace(c, new=c.new + 0.5) for n, c in changed_slices}
    )
    with run.swapped(changed_slices):
        other = run.score(batch).logits.detach()
    assert not torch.equal(other, plain)
    run.add([Adapter(Site(2, "mlp"), 4)])
    seen: list[Tensor] = []

    def loss(step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            with run.base():
                assert torch.equal(run.score(batch).logits, plain)
            assert torch.equal(run.reference_logits(run.forget, batch), plain)
            with run.swapped(changed_slices):
                torch.testing.assert_close(run.score(batch).logits, other, atol=1e-5, rtol=1e-5)
                with run.base():
                    assert torch.equal(run.score(batch).logits, plain)
        scored = run.score(step.forget)
        seen.append(scored.logits.detach())
        return {"forget": scored.cross_entropy()}

    run.fit(loss, steps=3, lr=5e-2, train="additions")
    assert torch.equal(seen[0], plain)
    assert not torch.equal(seen[2], plain), "the adapter was off in training"
    assert not run.wrote
    run.restore()
    assert torch.equal(run.score(batch).logits, plain)
    assert installed(run.model) == []


def test_extra_tokens_that_are_off_are_refused_by_name() -> None:
    run = run_on()
    run.add([ExtraTokens(2)])
    batch = prompted(run.forget.batch([0]), run.extra_ids)
    run.score(batch)
    with (
        run.base(),
        pytest.raises(EditError, match="token 301 is an extra token that is switched off"),
    ):
        run.score(batch)
    run.restore()


@pytest.mark.parametrize("train", ["both", "slices", "additions"])
def test_what_is_trained_is_what_was_asked_for(train: Train) -> None:
    net, made_edit = taught(method=Teach((Adapter(MLP, 4),), train=train))
    slices = {"both": True, "slices": True, "additions": False}[train]
    assert bool(differing(net, state(model("llama-tied")))) is slices
    start = made(Adapter(MLP, 4), describe(net), seed=0).values["up"]
    assert (not torch.equal(made_edit.additions[0].values["up"], start)) is (train != "slices")
    assert (made_edit.delta.count() > 0) is slices
    made_edit.undo()
    assert not differing(net, state(model("llama-tied")))
    assert torch.equal(logits(net), logits(model("llama-tied")))


def test_misuse_of_a_run_is_refused() -> None:
    run = run_on()
    with pytest.raises(EditError, match=r"call run.add"):
        run.fit(lambda _: {}, steps=1, lr=1.0, train="additions")
    with pytest.raises(EditError, match="no additions were given"):
        run.add([])
    with pytest.raises(EditError, match="'both', 'slices' or 'additions'"):
        run.fit(lambda _: {}, steps=1, lr=1.0, train="all")  # type: ignore[arg-type]
    run.add([Adapter(MLP, 2)])
    with pytest.raises(EditError, match="has additions already"):
        run.add([ExtraTokens(1)])
    run.restore()
    run.add([ExtraTokens(1)])
    run.restore()


def test_additions_train_where_no_slice_is_selected() -> None:
    net, (forget, _) = model("gpt2"), prompts("gpt2")
    net.requires_grad_(False)
    run = Run(describe(net), [], forget, None, Settings())
    Teach((Adapter(LAYER, 4),))(run)
    assert [record["step"] for record in run.log] == [0, 1, 2]
    assert float(run.added()[0].values["up"].abs().max()) > 0
    run.restore()


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_takes_them_out(problem: type[BaseException]) -> None:
    net, (forget, _) = model("gpt2"), prompts("gpt2")
    before, plain = fingerprint(net), logits(net)
    seen = []

    def break_down(now: nn.Module) -> float:
        seen.append(torch.equal(logits(now), plain))
        raise problem

    with pytest.raises(problem):
        edit(net, Teach(steps=5), None, forget=forget, stop=StopWhen(break_down, every=2))
    assert seen == [False]
    assert fingerprint(net) == before


def test_values_that_stop_being_numbers_are_refused() -> None:
    net, (forget, _) = model("gpt2"), prompts("gpt2")
    before = fingerprint(net)
    with pytest.raises(EditError, match=r"not finite|became"):
        edit(net, Teach((Adapter(MLP, 2),), steps=1, lr=1e39), None, forget=forget)
    assert fingerprint(net) == before


# -- edits ----------------------------------------------------------------------------------------


def test_on_off_undo_and_apply() -> None:
    net, made_edit = taught()
    plain, edited = logits(model("llama-tied")), logits(net)
    extra = token_ids(2, 9)
    extra[:, 0] = VOCAB
    with_extra = logits(net, extra)
    assert not torch.equal(edited, plain)
    assert "adapter of 4 at L1.mlp, adapter of 3 at L2.layer, 2 extra tokens, applied" in repr(
        made_edit
    )
    with made_edit.off():
        assert torch.equal(logits(net), plain)
        with pytest.raises(EditError, match="switched off"):
            made_edit.undo()
    with pytest.raises(ZeroDivisionError), made_edit.off():
        _ = 1 / 0
    assert torch.equal(logits(net), edited)
    with made_edit.rerun(None, seed=1) as again:
        assert again.additions[0].what == Adapter(MLP, 4)
        assert not torch.equal(logits(net), edited)
        logits(net, extra)  # the ids of the edit that is off are free
    assert torch.equal(logits(net), edited)
    made_edit.undo()
    untouched = fingerprint(model("llama-tied"))
    assert fingerprint(net) == untouched
    with made_edit.applied(net):
        assert torch.equal(logits(net), edited)
        assert torch.equal(logits(net, extra), with_extra)
    assert fingerprint(net) == untouched


def test_one_on_another_comes_off_last_in_first_out() -> None:
    net, lower = taught()
    plain, one = logits(model("llama-tied")), logits(net)
    forget, retain = prompts("llama-tied")
    upper = edit(net, Teach(lr=2e-2), None, forget=forget, retain=retain)
    both = logits(net)
    assert installed(net)[1].ids == range(VOCAB + 2, VOCAB + 4)
    with lower.off():
        assert not torch.equal(logits(net), both)
    assert torch.equal(logits(net), both)
    with pytest.raises(EditError, match=r"adapter of 4 at L1.mlp was put in place after"):
        lower.undo()
    assert torch.equal(logits(net), both)
    upper.undo()
    assert torch.equal(logits(net), one)
    lower.undo()
    assert torch.equal(logits(net), plain)
    with pytest.raises(EditError, match=r"made for another base model: .* missing"):
        upper.apply(net)
    upper.apply(net, strict=False).undo()
    lower.apply(net)
    upper.apply(net)
    assert torch.equal(logits(net), both)
    upper.undo()
    lower.undo()


def test_the_identity_of_a_model_counts_additions_that_are_on() -> None:
    net, made_edit = taught()
    plain = identity(model("llama-tied"))
    assert len(identity(net)) == len(plain) + 4 + 4 + 1
    with made_edit.off():
        assert identity(net) == plain
    made_edit.undo()
    assert identity(net) == plain


def test_hooks_that_somebody_else_took_out_are_noticed() -> None:
    net, made_edit = taught("gpt2", Teach((Adapter(MLP, 4),)))
    describe(net).read_point(MLP).module._forward_hooks.clear()
    with pytest.raises(EditError, match="taken out of the model"):
        made_edit.undo()


@pytest.mark.parametrize("train", ["additions", "both"])
def test_files_keep_them(train: Train, tmp_path: Path) -> None:
    net, made_edit = taught(method=Teach(train=train))
    edited = logits(net)
    loaded = Edit.load(made_edit.save(tmp_path / "edit"))
    assert [each.what for each in loaded.additions] == [each.what for each in made_edit.additions]
    fresh = model("llama-tied")
    loaded.apply(fresh)
    assert torch.equal(logits(fresh), edited)
    loaded.undo()
    assert fingerprint(fresh) == fingerprint(model("llama-tied"))
    other = model("gpt2")
    before = fingerprint(other)
    with pytest.raises(EditError, match="another base model"):
        loaded.apply(other)
    assert fingerprint(other) == before


def test_files_of_other_edits_are_as_they_were(tmp_path: Path) -> None:
    _, made_edit = taught(method=FineTune(steps=1, lr=1e-2))
    made_edit.save(tmp_path / "edit")
    about = json.loads((tmp_path / "edit" / "edit.json").read_text())
    assert about["format"] == 1
    assert "additions" not in about
    assert sorted(about["files"]) == ["delta.safetensors", "mask.safetensors"]


def rewritten(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change the description and the additions of an edit, with checksums that fit."""
    about = json.loads((folder / "edit.json").read_text())
    file = folder / "additions.safetensors"
    tensors = load_file(file)
    change(about, tensors)
    save_file(tensors, file)
    if "additions.safetensors" in about["files"]:
        about["files"]["additions.safetensors"] = _sha256(file.read_bytes())
    about.pop("digest")
    about["digest"] = _digest(about)
    (folder / "edit.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a, _: a["additions"][0].update(width=5), "expected tensors of shapes"),
        (lambda a, _: a["additions"][0].update(site="L1.neuron"), "output of an mlp"),
        (lambda a, _: a["additions"][2].update(kind="prompt"), "unknown addition"),
        (lambda a, _: a["additions"].pop(), "does not describe"),
        (lambda a, _: a.pop("additions"), "same additions"),
        (lambda a, _: a["files"].pop("additions.safetensors"), "same additions"),
        (lambda _, t: t.pop("1/up"), "expected tensors of shapes"),
        (lambda _, t: t.update({"9/up": torch.zeros(2)}), "does not describe"),
        (lambda _, t: t["0/b1"].fill_(math.nan), "finite"),
        (lambda a, _: a.update(format=3), "format"),
    ],
)
def test_inconsistent_files_are_refused(
    change: Callable[[dict[str, Any], dict[str, Tensor]], None], reason: str, tmp_path: Path
) -> None:
    _, made_edit = taught("gpt2", Teach(steps=1))
    made_edit.save(tmp_path / "edit")
    made_edit.undo()
    rewritten(tmp_path / "edit", change)
    with pytest.raises(EditError, match=reason):
        Edit.load(tmp_path / "edit")


def test_what_has_no_place_for_them_says_so(tmp_path: Path) -> None:
    net, made_edit = taught()
    _, other = taught(method=FineTune(steps=1, lr=1e-2))
    reason = "takes changes of weights only, and this edit holds adapter of 4 at L1.mlp"
    refusals: list[Callable[[], Any]] = [
        lambda: made_edit.merge_to(tmp_path / "merged"),
        lambda: made_edit.to_peft(tmp_path / "lora"),
        lambda: made_edit + other,
        lambda: other + made_edit,
        lambda: other - made_edit,
        lambda: -made_edit,
        lambda: 0.5 * made_edit,
        lambda: Ledger(net).add(made_edit),
        lambda: take_out(made_edit, net),
    ]
    edited = logits(net)
    for refused in refusals:
        with pytest.raises(EditError, match=reason):
            refused()
    assert torch.equal(logits(net), edited)
    assert not list(tmp_path.iterdir())


def test_a_ledger_and_an_ensemble_leave_the_model_alone() -> None:
    net, (forget, _) = model("gpt2"), prompts("gpt2")
    before, ledger = fingerprint(net), Ledger(net)
    with pytest.raises(EditError, match="a ledger takes changes of weights only"):
        ledger.edit(Teach(), None, forget=forget)
    assert len(ledger) == 0
    with pytest.raises(EditError, match="a sharded ensemble takes changes of weights only"):
        Sisa(Teach(), shards=2).train(net, forget, some_units(net))
    assert fingerprint(net) == before


def test_a_report_names_them() -> None:
    net, made_edit = taught("gpt2", Teach((Adapter(MLP, 4),)))
    forget, retain = prompts("gpt2")
    edited = logits(net)
    report = evaluate(made_edit, forget=forget, retain=retain, n_bootstrap=10, random=1)
    assert report.edit["additions"] == ["adapter of 4 at L1.mlp"]
    assert len(report.undo) == 1, "there is no checkpoint to take it out of"
    assert torch.equal(logits(net), edited)
