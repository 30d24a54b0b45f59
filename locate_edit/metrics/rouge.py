"""ROUGE: how much of the right answer's wording is in what the model writes.

Paper: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries; TOFU and MUSE use it as set out below.

| as in | kind | part | stemmer | new tokens | stop |
|---|---|---|---|---|---|
| TOFU, open-unlearning's TOFU | rougeL | recall | yes | 200 | |
| open-unlearning's MUSE | rougeL | f1 | yes | 128 (verbatim), 32 (questions) | questions: see `MUSE_STOP` |
| MUSE | rougeL | f1 | no | 128 (verbatim), 32 (questions) | questions: see `MUSE_STOP` |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import nn

from locate_edit.errors import PromptError
from locate_edit.metrics.generation import continued, said
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet

__all__ = ["MUSE_STOP", "from_texts", "rouge"]

MUSE_STOP = ("\n\n", "\nQuestion", "Question:")
"""Where MUSE ends the answer to a question."""

Kind = Literal["rouge1", "rouge2", "rougeL"]
Part = Literal["recall", "precision", "f1"]

_NEEDS = "a reference with a letter or digit (a to z, 0 to 9), which is all that ROUGE sees"


def rouge(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    kind: Kind = "rougeL",
    part: Part = "recall",
    stemmer: bool = True,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> Values:
    """ROUGE of the greedy continuation of the prompt against the target; 1 says that all of its words are there.

    Averaged over items. Recall does not fall when a model writes on and on: compare runs of equal `max_new_tokens`.

    Direction: up, better known.
    Needs: a causal model, and targets with a Latin letter or a digit.
    Cost: greedy generation of as many tokens as the target, or of `max_new_tokens`.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        kind: "rouge1" (words), "rouge2" (pairs of words) or "rougeL" (longest common subsequence of words).
        part: share of the target that is found ("recall"), of the continuation ("precision"), or their harmonic mean.
        stemmer: whether words count as equal that have the same Porter stem.
        max_new_tokens: length of the continuations (tokens); None gives each as many as its target has.
        stop: texts before the first of which a continuation ends.
    """
    predictions = Predictions.of(predictions, prompts)
    if predictions.masked:
        return Values.none(f"{kind}_{part}", "needs: a causal model", unit=_unit(part))
    if max_new_tokens is None:
        rows = predictions.generated
    else:
        rows = continued(
            predictions.model,
            predictions.prompts,
            max_new_tokens,
            batch_size=predictions.batch_size,
        )
    decode = predictions.prompts.tokenizer.decode
    targets = [predictions.prompts.target_ids(index) for index in range(len(predictions))]
    references = [str(decode(ids, skip_special_tokens=True)) for ids in targets]
    texts = [
        None if text is None else _before(text, stop) for text in said(predictions.prompts, rows)
    ]
    return from_texts(texts, references, kind=kind, part=part, stemmer=stemmer)


def from_texts(
    texts: Sequence[str | None],
    references: Sequence[str],
    *,
    kind: Kind = "rougeL",
    part: Part = "recall",
    stemmer: bool = True,
) -> Values:
    """ROUGE of each text against its reference, as `rouge` has it; None is a text that a model failed to write.

    Raises:
        PromptError: not one reference for each text, or an unknown kind or part.
    """
    if len(texts) != len(references):
        raise PromptError(
            f"rouge: expected a reference for each of {len(texts)} texts, got {len(references)}."
        )
    if kind not in ("rouge1", "rouge2", "rougeL") or part not in ("recall", "precision", "f1"):
        raise PromptError(
            "rouge: expected kind 'rouge1', 'rouge2' or 'rougeL' and part 'recall', 'precision' or 'f1', "
            f"got {kind!r} and {part!r}."
        )
    # Imported here: it brings a toolkit of natural-language processing along, which takes a second.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=stemmer)
    field = "fmeasure" if part == "f1" else part
    values = [
        None
        if not any(letter.isascii() and letter.isalnum() for letter in reference)
        else np.nan
        if text is None
        else float(getattr(scorer.score(reference, text)[kind], field))
        for text, reference in zip(texts, references, strict=True)
    ]
    return Values.make(
        f"{kind}_{part}", values, unit=_unit(part), direction="up", precondition=_NEEDS
    )


def _before(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of several texts."""
    for end in stop:
        text = text.split(end)[0]
    return text


def _unit(part: Part) -> str:
    return {"recall": "fraction of the target", "precision": "fraction of the text", "f1": "F1"}[
        part
    ]
