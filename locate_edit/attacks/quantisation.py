"""Round the weights to a few bits: a small change made by unlearning may vanish in the rounding.

Paper: Zhang et al. 2024, Catastrophic Failure of LLM Unlearning via Quantization (arXiv:2410.16454), section 4:
round to nearest.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locate_edit.attacked import Attacked, through_matrices
from locate_edit.attacks._hiding import within
from locate_edit.errors import EditError
from locate_edit.prompts import PromptSet


@dataclass(frozen=True)
class Quantisation:
    """Likelihood of the targets after every weight matrix is rounded to nearest.

    The weights of each output (a row `in`), or each run of ``group`` of them, get a scale ``max |w| / (2^(bits-1) -
    1)``, and every weight becomes a whole multiple of it. Embeddings and head stay unless ``embeddings``; vectors
    (biases, norms) always do. Simulated: values are rounded, arithmetic stays as it is.

    Attributes:
        bits: bits a weight, 2 to 8.
        group: entries that share a scale; None for whole rows.
        embeddings: round input embeddings and an untied output head too.

    Raises:
        EditError: bits or group out of range.
    """

    bits: int = 4
    group: int | None = None
    embeddings: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise EditError(f"Quantisation: bits must be 2 to 8, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise EditError(f"Quantisation: group must be at least 1 entry, got {self.group}")

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Round, measure, and put the weights back; ``seed`` changes nothing."""
        return through_matrices(
            model, self.rounded, forget, retain, batch_size=batch_size, vocabulary=self.embeddings,
            notes={"bits": self.bits, "group": self.group},
        )  # fmt: skip

    def rounded(self, weight: Tensor) -> Tensor:
        """``weight`` `... out in` with every entry at the nearest level of its row or group, in its own dtype."""
        scale = self._scale(weight)
        levels = torch.where(scale > 0, (weight.float() / scale).round() * scale, 0.0)
        return levels.to(weight.dtype)

    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """A positive control: the rounded model moved against the forget prompts by less than half a level."""

        def box(weight: Tensor) -> tuple[Tensor, Tensor]:
            levels = self.rounded(weight)
            room = 0.45 * self._scale(weight)
            room = torch.where(levels.abs() >= levels.abs().amax(-1, keepdim=True), 0.0, room)
            return (levels - room).to(weight.dtype), (levels + room).to(weight.dtype)

        return within(model, forget, box, batch_size=batch_size, vocabulary=self.embeddings)

    def _scale(self, weight: Tensor) -> Tensor:
        """The distance between levels at every entry of ``weight``."""
        rows = weight.float().reshape(-1, weight.shape[-1])
        most = [
            part.abs().amax(dim=1, keepdim=True).expand_as(part)
            for part in rows.split(self.group or rows.shape[1], dim=1)
        ]
        levels_a_side = int(2 ** (self.bits - 1)) - 1
        return torch.cat(most, dim=1).reshape(weight.shape) / levels_a_side
