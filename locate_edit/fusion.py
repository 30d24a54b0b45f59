"""Merge the adapters of several requests into one, in closed form.

    one, two = ...                       # edits of EUL on one model with one seed, each undone before the next
    both = fuse([one, two], model)
    both.apply(model)

Paper: Chen and Yang 2023, Unlearn What You Want to Forget: Efficient Unlearning for LLMs (arXiv:2310.20150), section
3.3: ``W_m = (sum_i X_i' X_i)^-1 sum_i X_i' X_i W_i`` with ``X_i`` what the layer reads on the forget prompts of request
``i``. Of all matrices it is the one whose outputs are nearest to those of each ``W_i`` on its own inputs.

That holds for linear maps. An adapter is two of them with a nonlinearity between, so it is merged matrix by matrix
(biases are rows that read a constant): the first one, then the second on the neurons that the *merged* first one
gives, since those of the requests' own no longer occur. Layers are merged from the lowest up, each reading what comes
out of the merged ones below it.

Two warnings. The Gram matrices ``X' X`` hold statistics of the forget prompts, enough to recognise them: they are used
here and thrown away, and whoever keeps them keeps data that was to be forgotten. And the knowledge is still in the
weights: without the adapters the model is bit for bit what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuits import ComponentMask, ModelMap, Site, capture, describe
from circuits.forward import model_inputs
from locate_edit.additions import Adapter, Added, install
from locate_edit.delta import Delta
from locate_edit.editing import Edit
from locate_edit.errors import EditError
from locate_edit.fingerprint import difference, fingerprint
from locate_edit.prompts import PromptSet


def fuse(
    edits: Sequence[Edit],
    model: nn.Module,
    *,
    forget: Sequence[PromptSet] | None = None,
    ridge: float = 0.1,
    batch_size: int = 8,
) -> Edit:
    """One edit, not applied, whose adapters come as near as they can to those of each of ``edits`` on its own prompts.

    The adapters must start alike to be merged: make all edits with one seed. Then a neuron means much the same in each.

    Args:
        edits: edits that hold adapters of the same widths at the same sites, and nothing else.
        model: the base model they were made on, with none of them applied.
        forget: the forget prompts of each edit; None takes those the edits were made with.
        ridge: pull towards the plain mean of the matrices, relative to the mean square of the inputs. Near 0 it is
            the paper's formula: exact on the forget prompts, and without bounds in directions that their few tokens
            hardly show, where other texts may lie. The default holds the inputs' correlations back about as much as is
            usual for such merges.
        batch_size: prompts a forward pass.

    Raises:
        EditError: nothing to fuse, edits that differ in their adapters or hold more than adapters, prompts that are not
            at hand, a negative ridge, or another model. The model is as before.
    """
    requests = _prompts(edits, forget)
    adapters = _alike(edits)
    if not ridge >= 0:
        raise EditError(f"ridge must be at least 0, got {ridge}")
    now = fingerprint(model)
    for place, each in enumerate(edits):
        if (reason := difference(each.made_on, now)) is not None:
            raise EditError(
                f"the model is not the base model of edit {place}: {reason}. Fuse on the model without any of the "
                "edits (undo them first)"
            )
    the_map = describe(model)
    merged: list[Added] = []
    with _evaluating(model), torch.no_grad():
        for place, adapter in sorted(adapters, key=lambda pair: _depth(pair[1])):
            inputs = _inputs(the_map, merged, adapter.site, requests, batch_size)
            values = [dict(each.additions[place].values) for each in edits]
            merged.append(Added(adapter, _merged(inputs, values, ridge)))
    masks = [each.mask for each in edits]
    mask: ComponentMask | None = masks[0]
    for other in masks[1:]:
        mask = None if mask is None or other is None else mask | other
    return Edit(
        Delta({}),
        additions=merged,
        mask=mask,
        provenance={
            "method": {"name": "fuse", "module": __name__, "ridge": ridge},
            "parts": [each.provenance for each in edits],
        },
        made_on=edits[0].made_on,
    )


def merged_matrix(inputs: Sequence[Tensor], matrices: Sequence[Tensor], ridge: float) -> Tensor:
    """The matrix `input output` (float64) whose outputs are nearest to those of each matrix on its own inputs.

    ``(sum X_i' X_i + r)^-1 (sum X_i' X_i W_i + r mean W)`` with ``r`` = ridge times the mean diagonal entry of the Gram
    matrices' sum. Merging equal matrices gives them back, whatever the ridge.

    Args:
        inputs: for each request `token input`.
        matrices: for each request `input output`.
        ridge: relative pull towards the plain mean.
    """
    grams = [x.double().T @ x.double() for x in inputs]
    wide = [matrix.to(gram) for gram, matrix in zip(grams, matrices, strict=True)]
    total = torch.stack(grams).sum(0)
    mean = torch.stack(wide).mean(0)
    # Against the mean, so that what all matrices share is kept to the bit whatever the conditioning.
    away = torch.stack([gram @ (w - mean) for gram, w in zip(grams, wide, strict=True)]).sum(0)
    pull = ridge * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype).to(total)
    inverse: Tensor = torch.linalg.pinv(total + pull, hermitian=True)
    return mean + inverse @ away


def _merged(
    inputs: Sequence[Tensor], values: Sequence[dict[str, Tensor]], ridge: float
) -> dict[str, Tensor]:
    """Values of the merged adapter from the inputs of each request, `token d_model`."""
    like = values[0]["down"]
    ones = [_with_ones(x.double()) for x in inputs]
    first = merged_matrix(ones, [_matrix(v["down"], v["b1"]) for v in values], ridge)
    neurons = [_with_ones(F.relu(x @ first)) for x in ones]
    second = merged_matrix(neurons, [_matrix(v["up"], v["b2"]) for v in values], ridge)
    found = {"down": first[:-1].T, "b1": first[-1], "up": second[:-1].T, "b2": second[-1]}
    return {
        name: value.to(like.dtype).contiguous().to(like.device) for name, value in found.items()
    }


def _with_ones(inputs: Tensor) -> Tensor:
    return F.pad(inputs, (0, 1), value=1.0)


def _matrix(weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map as one matrix `input+1 output` whose last row is the bias."""
    return torch.cat([weight.T, bias[None]]).double()


def _inputs(
    the_map: ModelMap,
    merged: Sequence[Added],
    site: Site,
    requests: Sequence[PromptSet],
    batch_size: int,
) -> list[Tensor]:
    """What an adapter at ``site`` reads at every token of each request's prompts, `token d_model`, padding left out."""
    device = next(the_map.model.parameters()).device
    placed = install(the_map, merged)
    try:
        found = []
        for prompts in requests:
            parts = []
            for batch in prompts.batches(batch_size):
                there = batch.to(device)
                with capture(the_map, [site], stop=True) as seen:
                    the_map.model(**model_inputs(the_map.model, there))
                parts.append(seen[site][there.attention_mask.bool()].double())
            found.append(torch.cat(parts))
        return found
    finally:
        placed.remove()


def _prompts(edits: Sequence[Edit], forget: Sequence[PromptSet] | None) -> list[PromptSet]:
    if not edits:
        raise EditError("there is nothing to fuse: give the edits of one request or more")
    given = [each.forget for each in edits] if forget is None else list(forget)
    if len(given) != len(edits):
        raise EditError(
            f"expected the forget prompts of {len(edits)} edits, got {len(given)} prompt sets"
        )
    found = [prompts for prompts in given if prompts is not None]
    if len(found) < len(given):
        raise EditError(
            "an edit that was loaded from a folder does not hold its prompts: pass forget=[...], a prompt set for each"
        )
    return found


def _alike(edits: Sequence[Edit]) -> list[tuple[int, Adapter]]:
    """The adapters that all edits have, with their places; checks that there is nothing else."""
    for place, each in enumerate(edits):
        if len(each.delta) or not all(isinstance(a.what, Adapter) for a in each.additions):
            raise EditError(
                f"edit {place} is more than adapters ({each!r}): only adapters can be fused; add edits that are "
                "changes of weights with +"
            )
        what = [added.what for added in each.additions]
        expected = [added.what for added in edits[0].additions]
        if not what or what != expected:
            said = [", ".join(map(str, w)) or "no adapter" for w in (expected, what)]
            raise EditError(
                f"edits to be fused need adapters of the same width at the same sites: edit 0 has {said[0]}, edit "
                f"{place} has {said[1]}"
            )
    found = [(place, added.what) for place, added in enumerate(edits[0].additions)]
    return [(place, what) for place, what in found if isinstance(what, Adapter)]


def _depth(adapter: Adapter) -> tuple[int, bool]:
    """Order in which a forward pass reaches adapters: by layer, and in a layer its MLP before its output."""
    return adapter.site.layer or 0, adapter.site.kind == "layer"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) while the context is open."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
