"""Whether a model still writes text, and not the same words over and over.

Papers: Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv:2202.05262), for the n-gram entropy;
Lu et al. 2022, Quark: Controllable Text Generation with Reinforced Unlearning (arXiv:2205.13636), for distinct-n over
the samples of a prompt.

Words are runs of letters and digits, and single other characters; case counts. In scripts without spaces between words
(Chinese, Japanese, Thai and their like) every character is one, so compare such texts among themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import nn

from locate_edit.errors import PromptError
from locate_edit.metrics.generation import written
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Values
from locate_edit.metrics.words import words
from locate_edit.prompts import PromptSet

__all__ = ["distinct", "distinct_share", "generation_entropy", "ngram_entropy"]


def ngram_entropy(text: str) -> float:
    """Entropy of a text's bigrams (weight 1/3) and trigrams (weight 2/3) in bits; 0 for one repeated word.

    Of a text of n words it is at most about log2 n: compare texts of equal length. 0 for fewer than two words.
    """
    said = words(text)
    return (_entropy(said, 2) + 2 * _entropy(said, 3)) / 3


def generation_entropy(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    max_new_tokens: int = 50,
) -> Values:
    """N-gram entropy of what the model writes, greedily; low if it repeats itself.

    Of continuations of the row's `generation` prompts, or of the prompt where it has none, averaged over a row's
    texts, then over rows. ROME's score takes sampled texts of 100 tokens with their prompts instead, so its numbers are
    higher. Compare with the model before the edit, not between lengths.

    Direction: up, more varied.
    Needs: a causal model.
    Cost: greedy generation of `max_new_tokens` tokens.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        max_new_tokens: length of the continuations (tokens).
    """
    predictions = Predictions.of(predictions, prompts)
    if predictions.masked:
        return Values.none("generation_entropy", "needs: a causal model", unit="bits")
    rows, of = [], []
    for index, row in enumerate(predictions.prompts.rows):
        for text in row.get("generation") or [row["prompt"]]:
            rows.append({"prompt": text, "target": row.get("target", " .")})
            of.append(index)
    asked = predictions.reread(rows)
    said = written(asked.model, asked.prompts, max_new_tokens, batch_size=predictions.batch_size)
    entropies = np.array([np.nan if text is None else ngram_entropy(text) for text in said])
    values = [float(entropies[np.array(of) == i].mean()) for i in range(len(predictions))]
    return Values.make("generation_entropy", values, unit="bits", direction="up")


def distinct_share(texts: Sequence[str], n: int = 2) -> float | None:
    """Number of different n-grams of several texts over that of their words; None if they have no words.

    Raises:
        PromptError: `n` is below 1.
    """
    if n < 1:
        raise PromptError(f"distinct: n must be at least 1, got {n}.")
    split = [words(text) for text in texts]
    grams = {gram for said in split for gram in _grams(said, n)}
    total = sum(map(len, split))
    return len(grams) / total if total else None


def distinct(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    n: int = 2,
    samples: int = 25,
    length: int = 20,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: int = 0,
) -> Values:
    """Distinct-n, the number of different n-grams over the number of words in several samples of the same prompt.

    Averaged over prompts. It falls with the number and length of the samples.

    Direction: up, more varied.
    Needs: a causal model that writes words.
    Cost: shared sampling of `samples` times `length` tokens.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        n: length of the n-grams (words).
        samples: continuations of each prompt.
        length: largest length of each (tokens).
        temperature: of the sampling.
        top_p: of the sampling.
        seed: of the sampling.

    Raises:
        PromptError: a setting out of range.
    """
    predictions = Predictions.of(predictions, prompts)
    name, unit = f"distinct_{n}", "n-grams a word"
    if predictions.masked:
        return Values.none(name, "needs: a causal model", unit=unit)
    samples_of = predictions.sampled(
        length=length, samples=samples, temperature=temperature, top_p=top_p, seed=seed
    )
    values = [
        distinct_share([text.text for text in texts], n)
        if all(text.finite for text in texts)
        else np.nan
        for texts in samples_of
    ]
    return Values.make(name, values, unit=unit, direction="up", precondition="samples with words")


def _grams(said: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]


def _entropy(said: Sequence[str], n: int) -> float:
    """Entropy of the frequencies of n-grams (bits)."""
    counts = np.array(list(Counter(_grams(said, n)).values()), dtype=np.float64)
    if not len(counts):
        return 0.0
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0
