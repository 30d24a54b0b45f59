"""Fusion of adapters against least squares by another route, and what it does to the edits it is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from circuits import Site, capture, describe
from locate_edit import Edit, EditError, PromptSet, edit
from locate_edit.additions import Adapter, Added, ExtraTokens, install
from locate_edit.delta import Delta
from locate_edit.fingerprint import fingerprint as identity
from locate_edit.fusion import fuse, merged_matrix
from locate_edit.methods.eul import EUL
from locate_edit.methods.fine_tune import FineTune
from tests.conftest import fingerprint
from tests.locate_edit.engine_setting import model, prompts, some_units
from tests.tiny import token_ids

METHOD = EUL(steps=6, lr=2e-2, width=5)


@cache
def requests(name: str = "gpt2") -> tuple[Any, list[Edit], list[PromptSet]]:
    """A model, and edits for the first and the last two of its forget prompts, both undone."""
    net, (forget, retain) = model(name), prompts(name)
    parts = [forget.select([0, 1]), forget.select([2, 3])]
    found = []
    for part in parts:
        made = edit(net, METHOD, some_units(net), forget=part, retain=retain, batch_size=2)
        made.undo()
        found.append(made)
    return net, found, parts


def logits(net: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(token_ids(2, 9)).logits
        return found


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [3, 20], ids=("fewer inputs than rows", "more"))
def test_a_merged_matrix_minimises_the_summed_squared_difference(n: int) -> None:
    inputs = [drawn(n, 6, seed=0), 3 * drawn(2 * n, 6, seed=1)]
    matrices = [drawn(6, 4, seed=2), drawn(6, 4, seed=3)]
    found = merged_matrix(inputs, matrices, 0.0)
    outputs = torch.cat([x @ w for x, w in zip(inputs, matrices, strict=True)])
    best = torch.linalg.lstsq(torch.cat(inputs), outputs, driver="gelsd").solution
    torch.testing.assert_close(torch.cat(inputs) @ found, torch.cat(inputs) @ best)
    if n == 20:
        torch.testing.assert_close(found, best)
    # The formula as it stands, where its inverse exists.
    grams = [x.T @ x for x in inputs]
    if n == 20:
        literal = torch.inverse(grams[0] + grams[1]) @ (grams[0] @ matrices[0] + grams[1] @ matrices[1])  # fmt: skip
        torch.testing.assert_close(found, literal)


def test_the_ridge_pulls_towards_the_mean_where_no_input_looks() -> None:
    inputs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])]
    matrices = [torch.tensor([[1.0], [4.0]]), torch.tensor([[3.0], [8.0]])]
    torch.testing.assert_close(
        merged_matrix(inputs, matrices, 1e-3), torch.tensor([[2.0], [6.0]], dtype=torch.float64)
    )
    # (1 + 3 + r * 2) / (1 + 1 + r) on a single input axis, with r = ridge * mean diagonal = 0.5 * 5
    inputs = [torch.tensor([[1.0]]), torch.tensor([[2.0]])]
    matrices = [torch.tensor([[1.0]]), torch.tensor([[3.0]])]
    expected = (1 * 1 + 4 * 3 + 2.5 * 2) / (1 + 4 + 2.5)
    assert float(merged_matrix(inputs, matrices, 0.5)) == pytest.approx(expected)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_an_edit_fused_with_itself_is_itself(ridge: float) -> None:
    net, (one, _), _ = requests()
    before = fingerprint(net)
    same = fuse([one, one], net, ridge=ridge)
    assert fingerprint(net) == before
    assert [added.what for added in same.additions] == [added.what for added in one.additions]
    for mine, theirs in zip(same.additions, one.additions, strict=True):
        for name, value in theirs.values.items():
            assert float(value.abs().max()) > 0
            assert torch.equal(mine.values[name], value)


def test_layers_are_merged_upwards_and_matrices_in_turn() -> None:
    """The whole procedure once more, by least squares on stacked inputs, layer by layer."""
    net, edits, parts = requests()
    fused = fuse(edits, net, ridge=0.0)
    the_map = describe(net)
    done: list[Added] = []
    for place, added in enumerate(edits[0].additions):
        site = added.what.site  # type: ignore[union-attr]
        inputs = []
        placed = install(the_map, done)
        for part in parts:
            rows = []
            for index in range(len(part)):
                batch = part.batch([index])
                with torch.no_grad(), capture(the_map, [site]) as seen:
                    net(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                rows.append(seen[site][0].double())
            inputs.append(F.pad(torch.cat(rows), (0, 1), value=1.0))
        placed.remove()
        own = [each.additions[place].values for each in edits]
        targets = torch.cat(
            [x[:, :-1] @ v["down"].double().T + v["b1"] for x, v in zip(inputs, own, strict=True)]
        )
        got = done_values = fused.additions[place].values
        stacked = torch.cat(inputs)
        best = torch.linalg.lstsq(stacked, targets, driver="gelsd").solution
        mine = stacked[:, :-1] @ got["down"].double().T + got["b1"]
        torch.testing.assert_close(mine, stacked @ best, atol=1e-4, rtol=1e-4)
        neurons = [F.relu(x[:, :-1] @ got["down"].double().T + got["b1"]) for x in inputs]
        targets = torch.cat(
            [z @ v["up"].double().T + v["b2"] for z, v in zip(neurons, own, strict=True)]
        )
        stacked = F.pad(torch.cat(neurons), (0, 1), value=1.0)
        best = torch.linalg.lstsq(stacked, targets, driver="gelsd").solution
        mine = stacked[:, :-1] @ got["up"].double().T + got["b2"]
        torch.testing.assert_close(mine, stacked @ best, atol=1e-4, rtol=1e-4)
        done.append(Added(added.what, done_values))
    assert len(done) == 2


def test_a_fused_edit_goes_on_off_and_into_files(tmp_path: Path) -> None:
    net, edits, parts = requests()
    before, plain = fingerprint(net), logits(net)
    fused = fuse(edits, net)
    assert fused.mask == edits[0].mask
    assert [part["method"]["name"] for part in fused.provenance["parts"]] == ["EUL", "EUL"]
    with fused.applied(net):
        said = logits(net)
        assert not torch.equal(said, plain)
    assert fingerprint(net) == before
    loaded = Edit.load(fused.save(tmp_path / "fused"))
    with loaded.applied(net):
        assert torch.equal(logits(net), said)
    # Edits from files do not hold their prompts, so these are given; the result is the same.
    stored = [Edit.load(each.save(tmp_path / str(n))) for n, each in enumerate(edits)]
    with pytest.raises(EditError, match="loaded from a folder does not hold its prompts"):
        fuse(stored, net)
    again = fuse(stored, net, forget=parts)
    for mine, theirs in zip(again.additions, fused.additions, strict=True):
        assert all(torch.equal(mine.values[name], value) for name, value in theirs.values.items())


def test_batches_padding_and_modes_make_no_difference() -> None:
    net, edits, _ = requests()
    fused = [fuse(edits, net, batch_size=size).additions for size in (1, 8)]
    for one, other in zip(*fused, strict=True):
        for name, value in one.values.items():
            torch.testing.assert_close(value, other.values[name], atol=1e-4, rtol=1e-3)
    net.train()
    fuse(edits, net)
    assert net.training
    net.eval()


def test_what_cannot_be_fused_is_refused() -> None:
    net, edits, parts = requests()
    forget, _ = prompts("gpt2")
    shapes = Adapter(Site(1, "mlp"), 2).shapes(24)
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    wider = [Added(Adapter(Site(1, "mlp"), 2), zeros)]
    tokens = [Added(ExtraTokens(1), {"rows": torch.zeros(1, 24)})]
    weights = edit(net, FineTune(steps=1), some_units(net), forget=forget)
    weights.undo()
    made_on = identity(net)

    def with_(additions: list[Added]) -> Edit:
        return Edit(Delta({}), additions=additions, made_on=made_on, forget=parts[1])

    refusals: list[tuple[str, Callable[[], Edit]]] = [
        ("nothing to fuse", lambda: fuse([], net)),
        ("forget prompts of 2 edits, got 1", lambda: fuse(edits, net, forget=parts[:1])),
        ("ridge must be at least 0", lambda: fuse(edits, net, ridge=-1.0)),
        ("edit 1 has adapter of 2 at L1.mlp", lambda: fuse([edits[0], with_(wider)], net)),
        ("edit 0 has no adapter", lambda: fuse([with_([])], net)),
        ("more than adapters", lambda: fuse([edits[0], with_(tokens)], net)),
        ("more than adapters", lambda: fuse([edits[0], weights], net)),
        ("base model of edit 0", lambda: fuse(edits, model("bert"))),
    ]
    before = fingerprint(net)
    for reason, refused in refusals:
        with pytest.raises(EditError, match=reason):
            refused()
    with edits[0].applied(net), pytest.raises(EditError, match="without any of the edits"):
        fuse(edits, net)
    assert fingerprint(net) == before
