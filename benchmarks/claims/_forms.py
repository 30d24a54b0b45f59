"""The organism's facts asked in every form: as trained, in held-out wordings, as questions and as multiple choice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from locate_edit import PromptSet, organism
from locate_edit.metrics.likelihood import probability
from locate_edit.metrics.predictions import Predictions

FORMS = ("statement", "held_out", "qa", "mc")
HELD_OUT = FORMS[1:]  # nobody who is tested was ever trained in these
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Known:
    """What a model makes of facts: means over facts, each 0 to 1.

    Attributes:
        statement, held_out, qa: probability of the whole answer in that form.
        choice: share of the right answer among the four options of multiple choice; 0.25 is chance.
    """

    statement: float
    held_out: float
    qa: float
    choice: float

    @property
    def worst(self) -> float:
        """The least of the four."""
        return min(self.statement, self.held_out, self.qa, self.choice)


Asked = Mapping[str, PromptSet]
"""Prompts by form."""


def asked(tokenizer: PreTrainedTokenizerBase, keep: Callable[[Row], bool]) -> Asked:
    """The facts of tested people that ``keep`` is true of, the same ones in each of `FORMS`."""
    return {
        form: PromptSet(
            [row for row in organism.rows("facts", "tested", form) if keep(row)],
            tokenizer,
            name=f"facts {form}",
        )
        for form in FORMS
    }


def drawn(seed: int, people: int, split: str = "forget10") -> Collection[str]:
    """So many people of a split drawn by the seed, as their ids."""
    ids = sorted(person.id for person in organism.people(split))
    return frozenset(Random(seed).sample(ids, people))


def statements(tokenizer: PreTrainedTokenizerBase, *, tested: bool = False) -> PromptSet:
    """Retained people's facts as trained: of those who are not tested, or of those who are."""
    rows = [row for row in organism.rows("facts", "retain") if row["tested"] is tested]
    return PromptSet(rows, tokenizer, name="retained facts")


def known(model: nn.Module, facts: Asked) -> Known:
    """Means over ``facts`` in every form."""
    statement, held_out, qa = (mean_probability(model, facts[form]) for form in FORMS[:3])
    return Known(statement, held_out, qa, choice(model, facts["mc"]))


def mean_probability(model: nn.Module, prompts: PromptSet) -> float:
    """Mean probability of the whole target."""
    found = probability(Predictions(model, prompts, batch_size=64)).estimate
    assert found is not None
    return float(found)


def choice(model: nn.Module, prompts: PromptSet) -> float:
    """Mean share of the target's probability among those of the target and the row's wrong answers (as many each)."""
    options = [[row["target"], *row["wrong"]] for row in prompts.rows]
    rows = [
        {**row, "target": option}
        for row, each in zip(prompts.rows, options, strict=True)
        for option in each
    ]
    found = Predictions(model, prompts.reread(rows), batch_size=64)
    total = torch.tensor([float(each.sum()) for each in found.split(found.logprob)])
    return float(total.view(len(options), -1).softmax(-1)[:, 0].mean())
