"""Round the weights to a few bits: a small change made by unlearning may vanish in the rounding.

Paper: Zhang et al. 2024, Catastrophic Failure of LLM Unlearning via Quantization (arXiv:2410.16454), section 4:
round to nearest. Their published code loads models with `load_in_8bit` and `load_in_4bit` of bitsandbytes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from locate_edit.attacked import Attacked, check_prompts, measure, through_matrices
from locate_edit.attacks._checks import check_whole, is_whole
from locate_edit.attacks._hiding import within
from locate_edit.attacks._low_bit import Format, linear_layers, low_bit, same_level
from locate_edit.errors import EditError
from locate_edit.prompts import PromptSet

Backend = Literal["rounding", "bitsandbytes", "bitsandbytes-nf4"]
"""What rounds: this package, or a library in the formats that its users get."""
FORMATS: dict[tuple[int, str], Format] = {
    (8, "bitsandbytes"): "int8",
    (4, "bitsandbytes"): "fp4",
    (4, "bitsandbytes-nf4"): "nf4",
}
INSIDE = 0.7
"""How much of the way to the next level the control of a library goes, which rounds in 16 bits first."""


@dataclass(frozen=True)
class Quantisation:
    """Likelihood of the targets after every weight matrix is rounded to nearest.

    The attacker holds the weights and nothing else. Those of each output (a row `in`), or each run of ``group`` of
    them, get a scale ``max |w| / (2^(bits-1) - 1)``, and every weight becomes a whole multiple of it. Embeddings (of
    positions and token types too) and head stay unless ``embeddings``; vectors (biases, norms) always do. Simulated:
    values are rounded, arithmetic stays as it is.

    ``backend="bitsandbytes"`` runs a real library on a copy of the model, with what `load_in_8bit` (LLM.int8(), which
    rounds the layers' inputs too) or `load_in_4bit` (fp4) of transformers would give; "bitsandbytes-nf4" takes the
    other 4-bit format. Linear layers but the output head are held in few bits, GPT-2's as well; ``notes["matrices"]``
    says how many. LLM.int8() leaves to 16 bits the inputs that are large anywhere in a batch, so its numbers depend on
    ``batch_size`` a little.

    Cost: two measurements, before and after, and a copy of the matrices (of the model, with a library).

    Attributes:
        bits: bits a weight, 2 to 8; 8 or 4 with a library.
        group: entries that share a scale; None for whole rows. Only for "rounding".
        embeddings: round embeddings and an untied output head too. Only for "rounding".
        backend: what rounds.

    Raises:
        EditError: a setting out of range, a library that is not installed, or weights that it cannot hold, such as
            stacked experts.
    """

    bits: int = 4
    group: int | None = None
    embeddings: bool = False
    backend: Backend = "rounding"

    def __post_init__(self) -> None:
        if not is_whole(self.bits, 2) or self.bits > 8:
            raise EditError(f"Quantisation: bits must be 2 to 8 and whole, got {self.bits!r}")
        if self.group is not None:
            check_whole("Quantisation", 1, group=self.group)
        if self.backend not in get_args(Backend):
            raise EditError(
                f"Quantisation: backend must be one of {', '.join(get_args(Backend))}, got {self.backend!r}"
            )
        if self.backend != "rounding" and (
            (self.bits, self.backend) not in FORMATS or self.group is not None or self.embeddings
        ):
            raise EditError(
                f"Quantisation: {self.backend} has groups of its own, leaves embeddings, and knows "
                f"{' and '.join(str(bits) for bits, name in FORMATS if name == self.backend)} bits; got "
                f"bits={self.bits}, group={self.group} and embeddings={self.embeddings}"
            )

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
        if self.backend != "rounding":
            return self._in_few_bits(model, forget, retain, batch_size)
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
        """A positive control: the rounded model moved against the forget prompts by less than half a level.

        At 8 bits that is too little to hide much: larger sets stay known, and their numbers withheld.
        """
        check_prompts(model, forget, None, batch_size)
        layers = None if self.backend == "rounding" else linear_layers(model)
        names = None if layers is None else {f"{name}.weight" for name in layers}
        return within(
            model, forget, self._box, batch_size=batch_size, vocabulary=self.embeddings, names=names
        )

    def _box(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest values of each entry that are well within what is rounded to the same as it."""
        if self.backend == "rounding":
            level, scale = self.rounded(weight), self._scale(weight)
            # The largest of a row or group stays: it sets the scale of the others.
            largest = level.abs() >= (self._levels_a_side - 0.5) * scale
            room = torch.where(largest, 0.0, 0.45 * scale)
            ends = level - room, level + room
        else:
            level, low, high = same_level(weight, FORMATS[self.bits, self.backend])
            ends = level + INSIDE * (low - level), level + INSIDE * (high - level)
        return ends[0].to(weight.dtype), ends[1].to(weight.dtype)

    def _in_few_bits(
        self, model: nn.Module, forget: PromptSet, retain: PromptSet | None, batch_size: int
    ) -> Attacked:
        """What a copy gives away whose linear layers the library holds."""
        check_prompts(model, forget, retain, batch_size)
        form = FORMATS[self.bits, self.backend]
        with low_bit(model, form) as small:
            return Attacked(
                measure(small, forget, batch_size),
                measure(model, forget, batch_size),
                None if retain is None else measure(small, retain, batch_size),
                None if retain is None else measure(model, retain, batch_size),
                notes={"bits": self.bits, "format": form, "matrices": len(linear_layers(model))},
            )

    @property
    def _levels_a_side(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    def _scale(self, weight: Tensor) -> Tensor:
        """The distance between levels at every entry of ``weight``."""
        rows = weight.float().reshape(-1, weight.shape[-1])
        most = [
            part.abs().amax(dim=1, keepdim=True).expand_as(part)
            for part in rows.split(self.group or rows.shape[1], dim=1)
        ]
        return torch.cat(most, dim=1).reshape(weight.shape) / self._levels_a_side
