"""Set small weights to zero: an edit that added a small suppressor loses it.

Paper: Wei et al. 2024, Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank Modifications
(arXiv:2402.05162), with magnitude in place of its scores.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locate_edit.attacked import Attacked, check_prompts, through_matrices
from locate_edit.attacks._checks import is_finite
from locate_edit.attacks._hiding import within
from locate_edit.errors import EditError
from locate_edit.prompts import PromptSet


@dataclass(frozen=True)
class Pruning:
    """Likelihood of the targets after the smallest weights of every matrix are set to zero.

    The attacker holds the weights and nothing else. The ``share`` of smallest magnitude of each matrix goes (ties: the
    earlier entry), of each expert's where they are stacked. Embeddings (of positions and token types too), head, biases
    and norms stay.

    Cost: two measurements, before and after, and a copy of the matrices.

    Attributes:
        share: of the entries of each matrix (fraction).

    Raises:
        EditError: share is not between 0 and 1.
    """

    share: float = 0.3

    def __post_init__(self) -> None:
        if not is_finite(self.share) or not 0 <= self.share < 1:
            raise EditError(f"Pruning: share must be at least 0 and below 1, got {self.share!r}")

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Prune, measure, and put the weights back; ``seed`` changes nothing."""
        return through_matrices(
            model, self.pruned, forget, retain, batch_size=batch_size, notes={"share": self.share}
        )

    def pruned(self, weight: Tensor) -> Tensor:
        """``weight`` with the smallest ``share`` of its entries at zero."""
        return weight.masked_fill(self._small(weight), 0.0)

    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """A positive control: the pruned model with small weights, moved against the forget prompts, back in place."""
        check_prompts(model, forget, None, batch_size)

        def box(weight: Tensor) -> tuple[Tensor, Tensor]:
            small = self._small(weight)
            left = weight.abs().masked_fill(small, torch.inf)
            largest = left.amin(dim=(-2, -1), keepdim=True) * 0.99
            return weight.where(~small, -largest), weight.where(~small, largest)

        return within(model, forget, box, batch_size=batch_size)

    def _small(self, weight: Tensor) -> Tensor:
        """Which entries of a matrix, or of each of a stack, are the smallest share of it."""
        sizes = weight.flatten(-2).abs()
        order = sizes.argsort(dim=-1, stable=True)[..., : int(self.share * sizes.shape[-1])]
        small = torch.zeros_like(sizes, dtype=torch.bool).scatter(-1, order, True)
        return small.reshape(weight.shape)
