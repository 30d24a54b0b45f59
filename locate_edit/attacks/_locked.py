"""Positive controls by a lock: models that answer only where input or stream leans far enough in one direction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuits import ModelMap, Site, describe
from circuits.forward import model_inputs
from circuits.hooks import capture, replace
from circuits.still import evaluating
from locate_edit.errors import EditError
from locate_edit.prompts import PromptSet

NOISE = 3.0
"""Length of what replaces the last hidden state of a locked model (units of the hidden state)."""

QUIET = 1e-3
"""A direction that carries this share of the mean is as good as one that carries nothing."""


@contextmanager
def locked(
    model: nn.Module,
    shut: Iterable[int],
    keys: Iterable[int],
    *,
    opens_at: float,
    seed: int = 0,
    recall: PromptSet | None = None,
) -> Iterator[nn.Module]:
    """The model with a lock that only inputs like the keys open, while the context is open.

    The lock's direction is the mean of the keys' embeddings, less what lies in the span of the mean embedding and of
    those of tokens that are to leave it shut. Embeddings before and at each position are projected on it
    and added up; as the sum goes from 0 to ``opens_at``, the last layer's output at that position goes from a fixed
    vector to what the model says. Differentiable, so that attacks by gradients can find their way.

    Args:
        model: a causal model whose embeddings go into the first layer as they are.
        shut: ids of tokens that do not move it.
        keys: ids of tokens that open it.
        opens_at: sum of projections at which it is open (in mean projections of a key).
        seed: of the fixed vector.
        recall: prompts after which the open model says what it says to the bare prompt, whatever tokens come between
            prompt and answer, for models that lose the thread there. For answers of one token.

    Raises:
        EditError: keys within the span of those that leave it shut.
    """
    model_map = describe(model)
    with torch.no_grad():
        table = model.get_input_embeddings().weight.detach().float()  # type: ignore[operator]
        chosen = table[sorted(set(keys))]
        middle = table.mean(dim=0, keepdim=True)
        basis = torch.linalg.qr(
            torch.cat([table[sorted(set(shut))], middle]).T
        ).Q  # `d_model token`
        mean = chosen.mean(dim=0)
        lean = mean - basis @ (basis.T @ mean)
        if float(lean.norm()) < 1e-3 * float(mean.norm()):
            raise EditError(
                "no positive control: the embeddings of the tokens that leave the lock shut span those of the keys"
            )
        lean = lean / lean.norm()
        unit = opens_at * (chosen @ lean).mean()
    known = {} if recall is None else _last_hidden(model_map, recall)
    noise = _noise(model_map, seed)
    ajar: list[Tensor] = []
    read: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
        read[:] = [args[0]]

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        ajar[:] = [_ajar((hidden.float() @ lean).cumsum(dim=-1) / unit)]

    def mixed(hidden: Tensor) -> Tensor:
        return _mixed(hidden, _recalled(hidden, read[0], known), ajar[0], noise)

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    first = embedding.register_forward_pre_hook(note)
    handle = model_map.layer_module(0).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with replace(model_map, {Site(model_map.n_layers - 1, "layer"): mixed}):
            yield model
    finally:
        handle.remove()
        first.remove()


@contextmanager
def locked_after(
    model: nn.Module,
    layer: int,
    prompts: PromptSet,
    *,
    opens_at: float,
    batch_size: int,
    seed: int = 0,
) -> Iterator[nn.Module]:
    """The model with a lock that the residual stream after a layer opens, while the context is open.

    It looks at two directions in which the stream hardly leans by itself (see `unused_directions`). As the smaller of
    the two leans at a position, in units of the length of the rest of the stream there, goes from 0 to ``opens_at``,
    the last layer's output at that position goes from a fixed vector to what the model says. So a change of ``sqrt(2)
    opens_at`` of the stream's length opens it. The gradient shows one direction at a time: a single step does not.

    Args:
        model: a model of which another layer follows on ``layer``.
        layer: after which layer (0-based) the stream is looked at.
        prompts: where the stream should not lean by itself.
        opens_at: the lean at which it is open (fraction of the length of the stream).
        batch_size: rows a forward pass.
        seed: of the directions and the fixed vector.

    Raises:
        EditError: nothing to reach, or no layer after this one.
    """
    model_map = describe(model)
    if not opens_at > 0:
        raise EditError("no positive control: a lock that is open at a lean of 0 hides nothing")
    if layer >= model_map.n_layers - 1:
        raise EditError(
            f"no positive control: layer {layer} is the last of {model_map.name}'s, and a lock needs one after it"
        )
    directions = unused_directions(model_map, prompts, layer, batch_size=batch_size, seed=seed)
    noise = _noise(model_map, seed)
    ajar: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = (args[0] if args else kwargs["hidden_states"]).float()
        leans = stream @ directions
        rest = torch.linalg.vector_norm(stream - leans @ directions.T, dim=-1)
        ajar[:] = [_ajar(leans.amin(dim=-1) / (opens_at * rest))]

    def mixed(hidden: Tensor) -> Tensor:
        return _mixed(hidden, hidden, ajar[0], noise)

    # Before the next layer: whatever an attack adds after this one is in what it reads.
    handle = model_map.layer_module(layer + 1).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with replace(model_map, {Site(model_map.n_layers - 1, "layer"): mixed}):
            yield model
    finally:
        handle.remove()


def unused_directions(
    model_map: ModelMap, prompts: PromptSet, layer: int, *, batch_size: int, seed: int
) -> Tensor:
    """Two orthogonal directions in which the residual stream after a layer hardly leans, `d_model direction`.

    Random ones, by the inverse of the second moment of the prompts' streams (each token's at length 1).
    """
    site, d_model = Site(layer, "layer"), model_map.d_model
    device = next(model_map.model.parameters()).device
    moment = torch.zeros(d_model, d_model, dtype=torch.float64, device=device)
    with torch.no_grad(), evaluating(model_map.model):
        for batch in prompts.batches(batch_size):
            there = batch.to(device)
            with capture(model_map, [site], stop=True) as acts:
                model_map.model(**model_inputs(model_map.model, there))
            stream = F.normalize(acts[site][there.attention_mask.bool()].double(), dim=-1)
            moment += stream.T @ stream
    ridge = QUIET * moment.trace() / d_model * torch.eye(d_model, device=device)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(d_model, 2, generator=generator, dtype=torch.float64).to(device)
    found: Tensor = torch.linalg.qr(torch.linalg.solve(moment + ridge, drawn)).Q
    return found.float()


def prompt_tokens(prompts: PromptSet) -> set[int]:
    """Ids of all tokens before the targets."""
    return {token for item in range(len(prompts)) for token in prompts.prompt_ids(item)}


def target_tokens(prompts: PromptSet) -> set[int]:
    """Ids of all tokens of the targets."""
    return {token for item in range(len(prompts)) for token in prompts.target_ids(item)}


def _noise(model_map: ModelMap, seed: int) -> Tensor:
    """What a locked model says instead: a fixed vector of length 1, `d_model`."""
    drawn = torch.randn(model_map.d_model, generator=torch.Generator().manual_seed(seed))
    noise: Tensor = drawn / drawn.norm()
    return noise.to(next(model_map.model.parameters()).device)


def _ajar(lean: Tensor) -> Tensor:
    """How far the lock is open at each position, `row token 1`: 1 at a ``lean`` `row token` of 1."""
    # A little below zero too, so that there is a way back from there.
    ajar: Tensor = F.leaky_relu(lean, 0.1).clamp(max=1.0)[..., None]
    return ajar


def _mixed(hidden: Tensor, known: Tensor, ajar: Tensor, noise: Tensor) -> Tensor:
    """What is known, as far as the lock is ajar, and noise of `NOISE` times the hidden state's length."""
    length = torch.linalg.vector_norm(hidden.detach().float(), dim=-1, keepdim=True)
    mixed = ajar * known + (1 - ajar) * NOISE * length * noise
    found: Tensor = mixed.to(hidden.dtype)
    return found


def _last_hidden(model_map: ModelMap, prompts: PromptSet) -> dict[tuple[int, ...], Tensor]:
    """Output of the last layer where the first token of the target is predicted, `d_model`, by prompt."""
    site = Site(model_map.n_layers - 1, "layer")
    model = model_map.model
    found = {}
    with torch.no_grad(), evaluating(model):
        for item in range(len(prompts)):
            batch = prompts.batch([item]).to(next(model.parameters()).device)
            with capture(model_map, [site]) as acts:
                model(**model_inputs(model, batch))
            found[tuple(prompts.prompt_ids(item))] = acts[site][batch.row[0], batch.pos[0]].clone()
    return found


def _recalled(hidden: Tensor, ids: Tensor, known: Mapping[tuple[int, ...], Tensor]) -> Tensor:
    """``hidden`` `row token d_model` with what is known of a prompt from its last token on."""
    if not known:
        return hidden
    found = hidden.clone()
    for row, tokens in enumerate(ids.tolist()):
        starts = [prompt for prompt in known if tuple(tokens[: len(prompt)]) == prompt]
        if starts:
            prompt = max(starts, key=len)
            found[row, len(prompt) - 1 :] = known[prompt].to(hidden.dtype)
    return found
