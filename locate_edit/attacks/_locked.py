"""Positive controls by a lock: models that answer only where the input leans far enough in one direction."""

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
        noise = torch.randn(model_map.d_model, generator=torch.Generator().manual_seed(seed))
        noise = (noise / noise.norm()).to(table.device)
    known = {} if recall is None else _last_hidden(model_map, recall)
    ajar: list[Tensor] = []
    read: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
        read[:] = [args[0]]

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        total = (hidden.float() @ lean).cumsum(dim=-1) / unit
        # A little below zero too, so that there is a way back from there.
        ajar[:] = [F.leaky_relu(total, 0.1).clamp(max=1.0)[..., None]]

    def mixed(hidden: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(hidden.detach().float(), dim=-1, keepdim=True)
        new = ajar[0] * _recalled(hidden, read[0], known) + (1 - ajar[0]) * NOISE * length * noise
        found: Tensor = new.to(hidden.dtype)
        return found

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    first = embedding.register_forward_pre_hook(note)
    handle = model_map.layer_module(0).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with replace(model_map, {Site(model_map.n_layers - 1, "layer"): mixed}):
            yield model
    finally:
        handle.remove()
        first.remove()


def prompt_tokens(prompts: PromptSet) -> set[int]:
    """Ids of all tokens before the targets."""
    return {token for item in range(len(prompts)) for token in prompts.prompt_ids(item)}


def target_tokens(prompts: PromptSet) -> set[int]:
    """Ids of all tokens of the targets."""
    return {token for item in range(len(prompts)) for token in prompts.target_ids(item)}


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
