"""What greedy decoding gives back verbatim: MA, exact match, extraction strength and extraction likelihood.

Papers: Jang et al. 2023, "Knowledge unlearning for mitigating privacy risks in language models" (MA eq. 3, EL eq. 1
and 2); Carlini et al. 2023 for extraction strength as used by open-unlearning.

All four are fractions from 0 to 1 and rise with memorisation. x_1..x_T are an item's scored tokens, c what stands
before them (the prompt, the start token, or a plain text's first token), f(p) the greedy continuation of p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from torch import nn

from locate_edit.errors import PromptError
from locate_edit.metrics.compat import check_compat
from locate_edit.metrics.generation import greedy
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet
from locate_edit.sampling import LOST, end_tokens, until_end

__all__ = [
    "continuations",
    "exact_memorization",
    "extraction_likelihood",
    "extraction_strength",
    "verbatim",
]

Compat = Literal["open-unlearning"]


def exact_memorization(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    compat: Compat | None = None,
) -> Values:
    """Memorization accuracy (MA), the fraction of tokens that greedy decoding gets right with the true ones before
    it given.

    MA(x) = 1/T sum_t 1{argmax p(. | c, x_<t) = x_t}, weighted by the token weights, averaged over items. One
    teacher-forced pass is the same as T greedy calls. Masked models: each hidden token's most probable filling.

    Direction: up, better known.
    Needs: a scored token of non-zero weight.
    Cost: shared forward.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        compat: "open-unlearning" leaves out the last token of each item, which is the end token there.

    Raises:
        PromptError: another toolkit.
    """
    check_compat("exact memorization", compat, get_args(Compat))
    predictions = Predictions.of(predictions, prompts)
    values: list[float | None] = []
    for index in range(len(predictions)):
        where = _without_last(predictions.of_item(index), compat)
        weight = predictions.weight[where]
        mass = float(weight.sum())
        values.append(float(weight @ predictions.correct[where]) / mass if mass else None)
    return Values.make(
        "exact_memorization",
        values,
        unit="fraction of tokens",
        direction="up",
        precondition="a scored token of non-zero weight" + (" before the last" if compat else ""),
    )


def verbatim(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """Fraction of items whose whole target is given back verbatim by greedy decoding.

    1 for an item if every scored token is the most probable one after the true tokens before it: greedy decoding of
    the prompt then gives exactly the target, without generating. Masked models: every hidden token is filled right.
    Token weights play no part.

    Direction: up, better known.
    Needs: nothing.
    Cost: shared forward.
    """
    predictions = Predictions.of(predictions, prompts)
    values = [
        float(predictions.correct[predictions.of_item(i)].min()) for i in range(len(predictions))
    ]
    return Values.make("verbatim", values, unit="fraction of items", direction="up")


def extraction_strength(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    compat: Compat | None = None,
) -> Values:
    """Fraction of the target that need not be given for greedy decoding to produce the rest.

    ES(x) = 1 - k/T, with k the least number of leading target tokens after which all others are greedy-correct: 1 if
    the prompt alone gives the whole target, 0 if the last token is wrong. Token weights play no part.

    Direction: up, better known.
    Needs: a causal model.
    Cost: shared forward.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        compat: "open-unlearning" leaves out the last token of each item and never goes below 1/T, so that a wholly
            wrong answer of five tokens scores 0.2.

    Raises:
        PromptError: another toolkit.
    """
    check_compat("extraction strength", compat, get_args(Compat))
    predictions = Predictions.of(predictions, prompts)
    if predictions.masked:
        return Values.none(
            "extraction_strength", "needs: a causal model", unit="fraction of tokens"
        )
    values: list[float | None] = []
    for index in range(len(predictions)):
        correct = predictions.correct[_without_last(predictions.of_item(index), compat)]
        n = len(correct)
        if np.isnan(correct).any():
            values.append(np.nan)
            continue
        wrong = np.flatnonzero(correct == 0)
        given = int(wrong[-1]) + 1 if len(wrong) else 0
        if compat is not None:
            given = min(given, n - 1)
        values.append(1.0 - given / n if n else None)
    return Values.make(
        "extraction_strength",
        values,
        unit="fraction of tokens",
        direction="up",
        precondition="a scored token before the last",
    )


def extraction_likelihood(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    n: int = 10,
    stride: int = 1,
    compat: Literal["knowledge-unlearning"] | None = None,
) -> Values:
    """Extraction likelihood EL_n, the mean overlap of n-grams between greedy continuations of every prefix and the
    true rest.

    EL_n(x) = 1/(T-n) sum_{t=1..T-n} OVERLAP_n(f(c, x_<t), x_>=t), where f gives T-t+1 tokens (an end token does not
    stop it) and OVERLAP_n(a, b) = |{g in ngrams(a) : g in ngrams(b)}| / |ngrams(a)|, a multiset over a. Token
    weights play no part.

    Continuations are not all generated: where the greedy token after a prefix is the true one, its continuation is
    that token followed by the continuation of the next prefix. The value is the same; memorised text costs next to
    nothing.

    Direction: up, better known.
    Needs: a causal model, and more than n scored tokens.
    Cost: shared forward, and greedy generation to the target's end from each wrong token.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        n: length of the n-grams (tokens).
        stride: use every stride-th prefix only (prefixes); the mean is then over those.
        compat: "knowledge-unlearning" does as the published code: the prefix with just n tokens to come counts, too,
            an end token stops a continuation, and overlaps are divided by the number of *true* n-grams. Plain texts
            without a start token, of which the code takes all but the first for the target, give its numbers.

    Raises:
        PromptError: `n` or `stride` is below 1, or another toolkit.
    """
    check_compat("extraction likelihood", compat, ("knowledge-unlearning",))
    if n < 1 or stride < 1:
        raise PromptError(f"n and stride must be at least 1, got n={n} and stride={stride}.")
    predictions = Predictions.of(predictions, prompts)
    name = f"extraction_likelihood_{n}"
    if predictions.masked:
        return Values.none(name, "needs: a causal model", unit="fraction of n-grams")
    texts = [predictions.prompts.target_ids(i) for i in range(len(predictions))]
    least = n if compat is not None else n + 1  # tokens to come
    starts = [list(range(0, len(text) - least + 1, stride)) for text in texts]
    rests = continuations(predictions, starts)
    overlap = _overlap if compat is None else _overlap_to_end(predictions)
    values: list[float | None] = []
    for index, (text, places) in enumerate(zip(texts, starts, strict=True)):
        said = [rests[index, place] for place in places]
        if any(LOST in rest for rest in said):
            values.append(np.nan)
            continue
        overlaps = [
            overlap(rest, text[place:], n) for rest, place in zip(said, places, strict=True)
        ]
        values.append(float(np.mean(overlaps)) if overlaps else None)
    return Values.make(
        name,
        values,
        unit="fraction of n-grams",
        direction="up",
        precondition=f"more than {least - 1} scored tokens",
    )


def _without_last(where: slice, compat: Compat | None) -> slice:
    """An item's scored tokens, less the last one where open-unlearning leaves it out."""
    return where if compat is None else slice(where.start, where.stop - 1)


def continuations(
    of: Predictions, starts: Sequence[Sequence[int]]
) -> dict[tuple[int, int], list[int]]:
    """Greedy continuation of each item from each of its `starts`, to the end of the target: item and start -> tokens.

    Only prefixes whose next greedy token is wrong are generated from; the others follow from the next such prefix.
    `LOST` is the last token where the model gives NaN or infinity.
    """
    prompts = of.prompts
    texts = [prompts.target_ids(i) for i in range(len(of))]
    needed: dict[tuple[int, int], list[int]] = {}
    first_wrong: dict[tuple[int, int], int] = {}
    for index, places in enumerate(starts):
        wrong = np.flatnonzero(of.correct[of.of_item(index)] != 1)
        for place in places:
            later = wrong[np.searchsorted(wrong, place) :]
            branch = int(later[0]) if len(later) else len(texts[index])
            first_wrong[index, place] = branch
            if branch < len(texts[index]):
                needed[index, branch] = []
    keys = list(needed)
    made = greedy(
        of.model,
        [prompts.prompt_ids(i) + texts[i][:branch] for i, branch in keys],
        [len(texts[i]) - branch for i, branch in keys],
        batch_size=of.batch_size,
    )
    needed.update(zip(keys, made, strict=True))
    return {
        (i, place): texts[i][place:branch] + needed.get((i, branch), [])
        for (i, place), branch in first_wrong.items()
    }


def _overlap(generated: Sequence[int], reference: Sequence[int], n: int) -> float:
    """The fraction of the n-grams of `generated` that occur among those of `reference`."""
    grams, known = _grams(generated, n), set(_grams(reference, n))
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def _overlap_to_end(of: Predictions) -> Callable[[Sequence[int], Sequence[int], int], float]:
    """`_overlap` of continuations up to their first end token, divided by the number of n-grams of the reference."""
    ends = end_tokens(of.model, of.prompts)

    def overlap(generated: Sequence[int], reference: Sequence[int], n: int) -> float:
        known = _grams(reference, n)
        said = _grams(until_end(generated, ends), n)
        return sum(gram in set(known) for gram in said) / len(known)

    return overlap


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
