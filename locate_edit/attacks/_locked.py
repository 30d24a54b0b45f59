"""Positive controls by a lock: models that answer only where the input leans far enough in one direction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuits import Site, describe
from circuits.hooks import replace
from locate_edit.errors import EditError
from locate_edit.prompts import PromptSet

NOISE = 3.0
"""Length of what replaces the last hidden state of a locked model (units of the hidden state)."""


@contextmanager
def locked(
    model: nn.Module, shut: Iterable[int], keys: Iterable[int], *, opens_at: float, seed: int = 0
) -> Iterator[nn.Module]:
    """The model with a lock that only inputs like the keys open, while the context is open.

    The lock's direction is the mean of the keys' embeddings, less that of the vocabulary and less what lies in the span
    of the embeddings of tokens that are to leave it shut. Embeddings before and at each position are projected on it
    and added up; as the sum goes from 0 to ``opens_at``, the last layer's output at that position goes from a fixed
    vector to what the model says. Differentiable, so that attacks by gradients can find their way.

    Args:
        model: a causal model whose embeddings go into the first layer as they are.
        shut: ids of tokens that do not move it.
        keys: ids of tokens that open it.
        opens_at: sum of projections at which it is open (in mean projections of a key).
        seed: of the fixed vector.

    Raises:
        EditError: keys within the span of those that leave it shut.
    """
    model_map = describe(model)
    with torch.no_grad():
        table = model.get_input_embeddings().weight.detach().float()  # type: ignore[operator]
        chosen = table[sorted(set(keys))]
        basis = torch.linalg.qr(table[sorted(set(shut))].T).Q  # `d_model token`
        mean = chosen.mean(dim=0) - table.mean(dim=0)
        lean = mean - basis @ (basis.T @ mean)
        if float(lean.norm()) < 1e-3 * float(mean.norm()):
            raise EditError(
                "no positive control: the embeddings of the tokens that leave the lock shut span those of the keys"
            )
        lean = lean / lean.norm()
        unit = opens_at * (chosen @ lean).mean()
        noise = torch.randn(model_map.d_model, generator=torch.Generator().manual_seed(seed))
        noise = (noise / noise.norm()).to(table.device)
    ajar: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        total = (hidden.float() @ lean).cumsum(dim=-1) / unit
        # A little below zero too, so that there is a way back from there.
        ajar[:] = [F.leaky_relu(total, 0.1).clamp(-0.3, 1.0)[..., None]]

    def mixed(hidden: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(hidden.detach().float(), dim=-1, keepdim=True)
        new = ajar[0] * hidden + (1 - ajar[0]) * NOISE * length * noise
        found: Tensor = new.to(hidden.dtype)
        return found

    handle = model_map.layer_module(0).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with replace(model_map, {Site(model_map.n_layers - 1, "layer"): mixed}):
            yield model
    finally:
        handle.remove()


def prompt_tokens(prompts: PromptSet) -> set[int]:
    """Ids of all tokens before the targets."""
    return {token for item in range(len(prompts)) for token in prompts.prompt_ids(item)}


def target_tokens(prompts: PromptSet) -> set[int]:
    """Ids of all tokens of the targets."""
    return {token for item in range(len(prompts)) for token in prompts.target_ids(item)}
