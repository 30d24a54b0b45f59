"""Ask often: an answer that is no longer the most likely one still comes up among several samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from circuits.forward import cache_name, output_projection
from locate_edit.attacked import Attacked, Point, check_prompts
from locate_edit.attacks._checks import check_positive, check_whole
from locate_edit.attacks._rewritten import need_targets
from locate_edit.errors import PromptError
from locate_edit.metrics.values import Floats, Values
from locate_edit.metrics.words import holds_word
from locate_edit.prompts import PromptSet
from locate_edit.sampling import sample

BEHIND = 0.1
"""How far below the second most likely token the positive control puts the most likely one (logits)."""


@dataclass(frozen=True)
class Sampling:
    """Share of prompts whose answer appears in any of several samples; without the attack, in the greedy continuation.

    The attacker may ask again and again, and can tell the right answer when it comes. An answer appears where its
    words stand in the continuation as whole words, with case and white space left aside. Answers that are easily
    guessed (one of a dozen) come up by chance: so they do in a model that never knew, which says how much.

    Cost: ``samples`` continuations of ``length`` tokens a prompt, with a key-value cache. Causal models only.

    Attributes:
        samples: continuations of each prompt.
        temperature: what logits are divided by.
        length: tokens of a continuation; None for those of the longest answer and four more.

    Raises:
        EditError: a setting out of range.
        PromptError: prompts of a masked model, or rows without a target.
    """

    samples: int = 20
    temperature: float = 1.0
    length: int | None = None

    def __post_init__(self) -> None:
        check_whole("Sampling", 1, samples=self.samples)
        check_positive("Sampling", temperature=self.temperature)
        if self.length is not None:
            check_whole("Sampling", 1, length=self.length)

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Sample each prompt's continuations, drawn by the seed."""
        check_prompts(model, forget, retain, batch_size)
        for prompts in (forget, retain):
            if prompts is not None and prompts.masked:
                raise PromptError(
                    f"{prompts!r} is for a masked model: Sampling continues text, which takes a causal one"
                )
        need_targets(forget, retain, attack="Sampling")
        found = self._found(model, forget, batch_size, seed)
        kept = None if retain is None else self._found(model, retain, batch_size, seed)
        asked = sorted({1, *(self.samples * n // 4 for n in (1, 2, 3, 4) if self.samples * n // 4)})
        return Attacked(
            _values(found),
            _values(self._greedy(model, forget, batch_size)),
            None if kept is None else _values(kept),
            None if retain is None else _values(self._greedy(model, retain, batch_size)),
            curve=tuple(
                Point(n, _share(found[:, :n]), None if kept is None else _share(kept[:, :n]))
                for n in asked
            ),
            strength="samples",
            notes={"measure": "share of prompts whose answer appears in any sample"},
        )

    @contextmanager
    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> Iterator[nn.Module]:
        """A positive control: the token that an answer begins with is always just behind the second most likely one.

        Only where a continuation begins: an answer of many tokens would else need luck at every one of them.
        """
        check_prompts(model, forget, None, batch_size)
        begins = True

        def note(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal begins
            cache = kwargs.get(cache_name(model))
            begins = cache is None or cache.get_seq_length() == 0

        def behind(_module: nn.Module, _args: tuple[Any, ...], logits: Tensor) -> Tensor:
            if not begins:
                return logits
            best = logits.topk(2, dim=-1)
            return logits.scatter(-1, best.indices[..., :1], best.values[..., 1:] - BEHIND)

        first = model.register_forward_pre_hook(note, with_kwargs=True)
        handle = output_projection(model).register_forward_hook(behind)
        try:
            yield model
        finally:
            handle.remove()
            first.remove()

    def _found(self, model: nn.Module, prompts: PromptSet, batch_size: int, seed: int) -> Floats:
        """Whether the answer appears, `item sample`, 0 or 1."""
        written = sample(
            model, prompts, length=self._length(prompts), samples=self.samples, temperature=self.temperature,
            seed=seed, batch_size=batch_size,
        )  # fmt: skip
        return _appears(prompts, [each.text for each in written], self.samples)

    def _greedy(self, model: nn.Module, prompts: PromptSet, batch_size: int) -> Floats:
        """Whether the answer appears in the greedy continuation, `item 1`, 0 or 1."""
        written = sample(
            model, prompts, length=self._length(prompts), temperature=0.0, batch_size=batch_size
        )
        return _appears(prompts, [each.text for each in written], 1)

    def _length(self, prompts: PromptSet) -> int:
        if self.length is not None:
            return self.length
        return 4 + max(len(prompts.target_ids(item)) for item in range(len(prompts)))


def appears(answer: str, text: str) -> bool:
    """Whether the words of ``answer`` stand in ``text`` as whole words, without regard to case and white space."""
    wanted = answer.strip().casefold()
    return bool(wanted) and holds_word(text.casefold(), wanted)


def _appears(prompts: PromptSet, texts: Sequence[str], samples: int) -> Floats:
    answers = [row["target"] for row in prompts.rows for _ in range(samples)]
    said = [appears(answer, text) for answer, text in zip(answers, texts, strict=True)]
    return np.array(said, dtype=np.float64).reshape(len(prompts), samples)


def _share(found: Floats) -> float:
    return float(found.max(axis=1).mean())


def _values(found: Floats) -> Values:
    return Values.make(
        "answers among the samples", found.max(axis=1), unit="share of prompts", direction="up"
    )
