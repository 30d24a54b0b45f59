"""Familiarity: how much a model is drawn to the names and words of a text that it should no longer know.

Paper: Eldan and Russinovich 2023, Who's Harry Potter? Approximate Unlearning in LLMs (arXiv:2310.02238), section 4.

Rows have prompts that hint at the text without giving it away, and in `content` its own words, spelled as a target is
(with the leading space). The paper has its completions graded by another model; here a completion counts as familiar if
it holds one of the words, which misses what is told in others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from circuits.forward import labelled_logits
from locate_edit.metrics.generation import written
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.running import evaluating, scored_batches
from locate_edit.metrics.values import Values
from locate_edit.metrics.words import holds_word
from locate_edit.prompts import PromptSet

__all__ = ["completion_familiarity", "token_familiarity"]

_NEEDS = "a row with words of the text ('content')"


def token_familiarity(
    predictions: Predictions | nn.Module, prompts: PromptSet | None = None
) -> Values:
    """Probability that the next token begins one of the text's own words, all of the row's words together.

    The sum over the different first tokens of the row's `content` of p(token | prompt), at the first scored place,
    averaged over rows. A first token that other words share counts for them, too: give words that begin like few
    others. The paper sums over prompts instead of averaging.

    Direction: up, better known.
    Needs: rows with words of the text (`content`).
    Cost: one forward a row.
    """
    predictions = Predictions.of(predictions, prompts)
    first = _first_tokens(predictions)
    mass: list[float | None] = [None] * len(predictions)
    asked = [index for index, tokens in enumerate(first) if tokens]
    if asked:
        chosen = predictions.prompts.select(asked)
        with evaluating(predictions.model), torch.no_grad():
            for batch in scored_batches(predictions.model, chosen, predictions.batch_size):
                logprob = torch.log_softmax(labelled_logits(predictions.model, batch), dim=-1)
                owner = batch.item.tolist()
                for place, item in enumerate(batch.items):
                    index = asked[item]
                    row = logprob[owner.index(place)]
                    mass[index] = float(row[sorted(first[index])].double().exp().sum())
    return Values.make(
        "token_familiarity", mass, unit="probability", direction="up", precondition=_NEEDS
    )


def completion_familiarity(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    max_new_tokens: int = 30,
) -> Values:
    """Fraction of prompts whose greedy continuation holds one of the text's own words.

    Whole words, whatever their case; in scripts without spaces between words, anywhere.

    Direction: up, better known.
    Needs: a causal model, and rows with words of the text (`content`).
    Cost: greedy generation of `max_new_tokens` tokens.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        max_new_tokens: length of the continuations (tokens).
    """
    predictions = Predictions.of(predictions, prompts)
    name, unit = "completion_familiarity", "fraction of prompts"
    if predictions.masked:
        return Values.none(name, "needs: a causal model", unit=unit)
    words = [_words(row) for row in predictions.prompts.rows]
    asked = [index for index, own in enumerate(words) if own]
    values: list[float | None] = [None] * len(words)
    if asked:
        chosen = predictions.prompts.select(asked)
        said = written(predictions.model, chosen, max_new_tokens, batch_size=predictions.batch_size)
        for index, text in zip(asked, said, strict=True):
            if text is None:
                values[index] = np.nan
                continue
            values[index] = float(any(holds_word(text, word) for word in words[index]))
    return Values.make(name, values, unit=unit, direction="up", precondition=_NEEDS)


def _words(row: Any) -> list[str]:
    return [str(word).strip() for word in row.get("content", ()) if str(word).strip()]


def _first_tokens(predictions: Predictions) -> list[set[int]]:
    """The different first tokens of each row's words, as they are read behind its prompt."""
    rows, of = [], []
    for index, row in enumerate(predictions.prompts.rows):
        for word in row.get("content", ()):
            if str(word).strip():
                kept = {key: row[key] for key in ("prompt", "suffix") if key in row}
                rows.append({**kept, "target": str(word)})
                of.append(index)
    found: list[set[int]] = [set() for _ in range(len(predictions))]
    if rows:
        read = predictions.reread(rows).prompts
        tokens = np.array([read.target_ids(i)[0] for i in range(len(read))])
        for index, token in zip(of, tokens.tolist(), strict=True):
            found[index].add(token)
    return found
