"""Show other facts before the question: examples may bring back what the bare question no longer does.

Paper: Shumailov et al. 2024, UnUnlearning: Unlearning is not sufficient for content regulation in advanced generative
AI (arXiv:2407.00106), which names the danger; what is shown here is never the answer itself.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from locate_edit.attacked import Attacked, check_prompts, measure
from locate_edit.attacks._checks import check_whole
from locate_edit.attacks._locked import locked, target_tokens
from locate_edit.attacks._rewritten import need_targets, rewritten
from locate_edit.errors import EditError, PromptError
from locate_edit.prompts import PromptSet


@dataclass(frozen=True)
class Reminders:
    """Likelihood of the targets behind a few examples of other prompts with their answers.

    The attacker knows other facts: others about the asked row's own group, or retain prompts. Each prompt is asked
    once behind ``shots`` of them, drawn by the seed: "prompt target. prompt target. ... prompt". Neither the asked row
    nor one whose text contains the asked target is ever an example, so what comes back is not copied from there.

    Models that are not used to several facts in a row lose answers behind examples: the shipped organism, which knows
    its facts with likelihood 0.99, gives 0.80 behind facts of the same person, and 0.12 behind those of others.

    Cost: one forward a prompt, of ``shots + 1`` times the length.

    Attributes:
        shots: examples before each prompt (fewer where there are not as many).
        source: "group" takes examples from the other rows of the asked one's own set, those of its group where there
            are any; "retain" takes them from the retain prompts (without these as "group").
        between: what stands between an example and what follows.

    Raises:
        EditError: shots below 1, or another source.
        PromptError: a row without target, or one for which there is no example.
    """

    shots: int = 3
    source: Literal["group", "retain"] = "group"
    between: str = ".\n"

    def __post_init__(self) -> None:
        check_whole("Reminders", 1, shots=self.shots)
        if self.source not in ("retain", "group"):
            raise EditError(f"Reminders: source must be 'retain' or 'group', got {self.source!r}")

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Ask behind examples; ``seed`` draws them. Retain prompts come behind others of their own."""
        check_prompts(model, forget, retain, batch_size)
        need_targets(forget, retain, attack="Reminders")
        given = retain if retain is not None and self.source == "retain" else None
        asked = self.reminded(forget, given, seed)
        kept = None
        if retain is not None:
            kept = self.reminded(retain, given, seed)
        return Attacked(
            measure(model, asked, batch_size),
            measure(model, forget, batch_size),
            None if kept is None else measure(model, kept, batch_size),
            None if retain is None else measure(model, retain, batch_size),
            notes={
                "shots": self.shots,
                "examples": "retain prompts" if given is not None else "other forget prompts",
                "fewest examples": min(row["shots"] for row in asked.rows),
            },
        )

    def reminded(self, prompts: PromptSet, given: PromptSet | None, seed: int) -> PromptSet:
        """The prompts behind examples; rows say in `shots` how many.

        Args:
            prompts: what is asked.
            given: where examples come from; None for others of ``prompts``, of the same group where there are any.
            seed: of the draw.

        Raises:
            PromptError: a row for which there is no example.
        """
        draw = random.Random(seed)
        texts, shots = {}, []
        for item, row in enumerate(prompts.rows):
            pool = self._pool(prompts, given, item)
            if not pool:
                raise PromptError(
                    f"{prompts!r}, item {item}: no example to show before it, as every other row gives its target "
                    f"{row['target']!r} away or is the same. Give retain prompts with other targets."
                )
            chosen = draw.sample(pool, min(self.shots, len(pool)))
            shots.append(len(chosen))
            texts[item] = "".join(chosen) + row["prompt"]
        made = rewritten(prompts, texts, "reminded")
        return made.reread(
            [{**row, "shots": n} for row, n in zip(made.rows, shots, strict=True)], name=made.name
        )

    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """A positive control: a lock that a sight of other prompts' targets opens."""
        check_prompts(model, forget, None, batch_size)
        longest = max(len(forget.target_ids(item)) for item in range(len(forget)))
        return locked(
            model, forget, [self.reminded(forget, None, seed)], target_tokens(forget), opens_at=1.0,
            behind=longest, batch_size=batch_size, seed=seed,
        )  # fmt: skip

    def _pool(self, prompts: PromptSet, given: PromptSet | None, item: int) -> list[str]:
        """Texts of the rows that may stand before an item."""
        row = prompts[item]
        answer = row["target"].strip().casefold()
        mask = prompts.tokenizer.mask_token if prompts.masked else None
        pool: dict[bool, list[str]] = {True: [], False: []}  # by whether of the same group
        for other in (prompts if given is None else given).rows:
            text = _told(other, mask)
            if other["prompt"] != row["prompt"] and answer not in text.casefold():
                pool[given is None and other.get("group") == row.get("group")].append(
                    text + self.between
                )
        return pool[True] or pool[False]


def _told(row: Mapping[str, Any], mask: str | None) -> str:
    """A row with its answer as text."""
    prompt, target = row["prompt"], row["target"]
    if mask is not None and mask in prompt:
        once = prompt.replace(mask, target.strip(), 1)
        told: str = once.replace(mask, "")
    else:
        told = prompt + target
    return told + (row.get("suffix", "") if mask is not None else "")
