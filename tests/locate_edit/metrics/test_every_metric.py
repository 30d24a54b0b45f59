"""What holds for every metric of the catalogue, whatever it measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from locate_edit import catalog
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet
from tests.tiny import byte_tokenizer, tiny

BARE: list[Any] = [("Ann Lee plays", " golf"), ("x", " 12")]
FULL: list[Any] = [
    {
        "prompt": prompt,
        "target": target,
        "wrong": [" tennis", " z"],  # the span of the target does not fit into the second
        "paraphrases": ["She likes"],
        "neighbours": ["Bo plays"],
        "content": [" golf"],
        "spans": [[len(prompt), len(prompt) + 3]],
    }
    for prompt, target in BARE
]
# These ask for a reward, for a model that uses the words, and for longer targets.
ELSEWHERE = ("any-below", "worst-reward", "pair-preference", "extraction-likelihood")
ENTRIES = catalog.entries("metric")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_number_or_a_reason_and_the_model_as_it_was(
    entry: catalog.Entry, family: str, untouched: Callable[[nn.Module], Any]
) -> None:
    metric = entry.load()
    model, other = untouched(tiny(family).train()), untouched(tiny(family, seed=2))
    tokenizer = byte_tokenizer(mask=family == "bert")
    kinds = set()
    for rows in (BARE, FULL):
        prompts = PromptSet(rows, tokenizer)
        compared = Predictions(model, prompts, reference=other)
        for values in (metric(model, prompts), metric(compared)):
            assert isinstance(values, Values)
            kinds.add((values.unit, values.direction))
            if values.withheld:
                assert values.withheld.startswith("needs: ")
                assert values.estimate is None
            else:
                assert math.isfinite(values.estimate or 0.0)
    if family == "llama" and entry.name not in ELSEWHERE:
        assert not values.withheld, "everything a causal metric asks for is there"
    assert len(kinds) == 1, "a withheld number has the unit and direction of one that is not"
    assert next(iter(kinds))[0]
