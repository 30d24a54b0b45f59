"""TokenMask: which scored tokens of a prompt set count, and how much."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locate_edit.errors import PromptError

if TYPE_CHECKING:
    from locate_edit.prompts import PromptSet

__all__ = ["TokenMask"]


@dataclass(frozen=True)
class TokenMask:
    """A weight from 0 to 1 for each scored token of each item of a prompt set.

    Attributes:
        weights: one tuple an item, one weight a scored token (fraction: 0 leaves the token out).
    """

    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for index, item in enumerate(self.weights):
            if not all(0.0 <= weight <= 1.0 for weight in item):
                raise PromptError(
                    f"item {index}: token weights must lie between 0 and 1, got {item}."
                )

    @classmethod
    def full(cls, prompts: PromptSet) -> TokenMask:
        """Every scored token with weight 1."""
        return cls(tuple((1.0,) * len(prompts.target_ids(i)) for i in range(len(prompts))))

    @classmethod
    def from_spans(cls, prompts: PromptSet) -> TokenMask:
        """Weight 1 for the scored tokens that a span of their row touches, 0 for the others.

        Raises:
            PromptError: no row has spans.
        """
        if not any(row.get("spans") for row in prompts.rows):
            raise PromptError(
                "no row has 'spans'. Give [start, end) characters of prompt + target in the rows."
            )
        return cls(
            tuple(tuple(float(flag) for flag in prompts.sensitive(i)) for i in range(len(prompts)))
        )

    @classmethod
    def from_texts(cls, prompts: PromptSet, keep: Callable[[str], bool]) -> TokenMask:
        """Weight 1 for the scored tokens whose text satisfies `keep`, 0 for the others."""
        return cls(
            tuple(
                tuple(
                    float(keep(str(prompts.tokenizer.decode([token]))))
                    for token in prompts.target_ids(i)
                )
                for i in range(len(prompts))
            )
        )

    def __len__(self) -> int:
        return len(self.weights)

    def __and__(self, other: TokenMask) -> TokenMask:
        """The smaller weight of each token."""
        return self._join(other, min)

    def __or__(self, other: TokenMask) -> TokenMask:
        """The larger weight of each token."""
        return self._join(other, max)

    def __invert__(self) -> TokenMask:
        """One minus the weight of each token."""
        return TokenMask(tuple(tuple(1.0 - weight for weight in item) for item in self.weights))

    @property
    def fraction(self) -> float:
        """The mean weight over all scored tokens (fraction)."""
        flat = [weight for item in self.weights for weight in item]
        return sum(flat) / len(flat) if flat else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        return {"weights": [list(item) for item in self.weights]}

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[Sequence[float]]]) -> TokenMask:
        """The mask that `to_json` wrote."""
        return cls(tuple(tuple(float(weight) for weight in item) for item in data["weights"]))

    def __repr__(self) -> str:
        n_tokens = sum(len(item) for item in self.weights)
        return f"TokenMask({len(self)} items, {n_tokens} tokens, {self.fraction:.1%} of the weight)"

    def _join(self, other: TokenMask, choose: Callable[[float, float], float]) -> TokenMask:
        if [len(item) for item in self.weights] != [len(item) for item in other.weights]:
            raise PromptError(
                f"token masks of different prompt sets cannot be joined: {self!r} and {other!r}."
            )
        return TokenMask(
            tuple(
                tuple(choose(a, b) for a, b in zip(left, right, strict=True))
                for left, right in zip(self.weights, other.weights, strict=True)
            )
        )
