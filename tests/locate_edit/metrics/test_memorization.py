from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from circuits.forward import labelled_logits, token_log_probs
from locate_edit.errors import PromptError
from locate_edit.metrics.memorization import (
    exact_memorization,
    extraction_likelihood,
    extraction_strength,
    verbatim,
)
from locate_edit.metrics.predictions import Predictions
from locate_edit.prompts import PromptSet, TokenMask
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.locate_edit.metrics.test_generation import one_at_a_time
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

WORDS = list("abcdefgh")
TOKENIZER = word_tokenizer(WORDS)
IDS = {word: token_id(TOKENIZER, word) for word in WORDS}
# Greedy decoding goes round: a b c d e a b c ...
ROUND = {IDS[last]: {IDS[after]: 0.9} for last, after in zip("abcde", "bcdea", strict=True)}
MODEL = Bigram(len(TOKENIZER), ROUND)


def items(*texts: str) -> PromptSet:
    """Each text's first word is the prompt, the rest is scored."""
    return PromptSet([(text[0], " " + " ".join(text[1:])) for text in texts], TOKENIZER)


def test_hand_derived_memorization() -> None:
    #            all right   last wrong   first wrong   only the last right   all wrong
    prompts = items("abcde", "abcdf", "afgde", "affab", "affgh")
    # "afgde": f and g wrong, d after g wrong, e right. "affab": f, f, a wrong, b right.
    assert exact_memorization(MODEL, prompts).values.tolist() == [1.0, 0.75, 0.25, 0.25, 0.0]
    assert verbatim(MODEL, prompts).values.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    # Given k = 0, 4, 3, 3, 4 of 4 tokens, greedy decoding does the rest.
    assert extraction_strength(MODEL, prompts).values.tolist() == [1.0, 0.0, 0.25, 0.25, 0.0]


def test_extraction_strength_of_a_wholly_wrong_answer_is_zero_but_for_the_compatible_one() -> None:
    prompts = items("affghff")  # six tokens, all wrong
    assert extraction_strength(MODEL, prompts).estimate == 0.0
    # Five tokens count there: 1 - 4/5.
    floored = extraction_strength(MODEL, prompts, compat="open-unlearning")
    assert floored.estimate == pytest.approx(0.2)


def test_the_compatible_variants_leave_out_the_last_token() -> None:
    prompts = items("abcdf", "ab")
    accuracy = exact_memorization(MODEL, prompts, compat="open-unlearning")
    assert accuracy.values.tolist() == [1.0]
    assert accuracy.note.endswith("needs: a scored token of non-zero weight before the last")
    assert extraction_strength(MODEL, prompts, compat="open-unlearning").values.tolist() == [1.0]
    # Right from the start on: the loop that looks for the first place from which all is right finds place 0.
    assert extraction_strength(MODEL, items("abcde"), compat="open-unlearning").estimate == 1.0


def test_token_weights_enter_memorization_accuracy() -> None:
    prompts = items("abcdf").with_token_mask(TokenMask(((1.0, 0.0, 0.0, 0.5),)))
    assert exact_memorization(MODEL, prompts).estimate == pytest.approx(1.0 / 1.5)
    assert extraction_strength(MODEL, prompts).estimate == 0.0


def test_masked_models_have_accuracy_but_no_extraction() -> None:
    prompts = PromptSet([("Ann", " golf")], byte_tokenizer(mask=True))
    model = tiny("bert")
    top = Predictions(model, prompts).top
    filled = PromptSet([("Ann", " golf")], byte_tokenizer(mask=True))
    expected = np.mean(top == np.array(filled.target_ids(0)))
    assert exact_memorization(model, prompts).estimate == pytest.approx(expected)
    assert extraction_strength(model, prompts).withheld == "needs: a causal model"
    assert extraction_likelihood(model, prompts).withheld == "needs: a causal model"


# ---- extraction likelihood -----------------------------------------------------------------------


def literal_el(model: Any, prompts: PromptSet, index: int, n: int, stride: int = 1) -> float:
    """EL_n as printed: one generation a prefix, multiset of generated n-grams against the set of true ones."""
    prompt, text = prompts.prompt_ids(index), prompts.target_ids(index)
    length = len(text)
    overlaps = []
    for t in range(1, length - n + 1, stride):
        rest = text[t - 1 :]
        generated = one_at_a_time(model, prompt + text[: t - 1], len(rest))
        grams = Counter(tuple(generated[i : i + n]) for i in range(len(generated) - n + 1))
        known = {tuple(rest[i : i + n]) for i in range(len(rest) - n + 1)}
        overlaps.append(sum(c for g, c in grams.items() if g in known) / sum(grams.values()))
    return sum(overlaps) / len(overlaps)


@pytest.mark.parametrize(("n", "stride"), [(1, 1), (2, 1), (3, 2), (4, 5)])
def test_extraction_likelihood_equals_its_literal_definition(n: int, stride: int) -> None:
    prompts = items("abcdeabcde", "abcdfabcde", "abgdeabfde", "affffghhhh", "abcfabcfabcf")
    expected = [literal_el(MODEL, prompts, i, n, stride) for i in range(len(prompts))]
    values = extraction_likelihood(MODEL, prompts, n=n, stride=stride)
    assert values.values == pytest.approx(expected, abs=1e-12)
    assert values.name == f"extraction_likelihood_{n}"
    assert values.values[0] == 1.0
    assert values.values[3] == 0.0
    assert 0 < values.values[1] < 1


def published_el(model: Any, prompts: PromptSet, index: int, n: int, end: int) -> float:
    """EL_n as the code of the paper computes it, for a plain text of T tokens."""
    text = prompts.ids(index)
    total = 0.0
    for given in range(1, len(text)):
        rest = text[given:]
        said = one_at_a_time(model, text[:given], len(rest))
        said = said[: said.index(end) + 1] if end in said else said
        true = [tuple(rest[i : i + n]) for i in range(len(rest) - n + 1)]
        grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
        if true:
            total += sum(gram in true for gram in grams) / len(true)
    return total / (len(text) - n)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_extraction_likelihood_as_the_published_code_has_it(n: int) -> None:
    texts = ["a b c d e f b c d", "a b c d f d a b c", "a b g d e a b f d e", "b c d g g g g g g"]
    prompts = PromptSet(texts, TOKENIZER)
    end = TOKENIZER.eos_token_id
    # It says "a b c d e f", ends, and would go on with known words.
    more = {IDS["e"]: {IDS["f"]: 0.9}, IDS["f"]: {end: 0.9}, end: {IDS["a"]: 0.9}}
    model = Bigram(len(TOKENIZER), {**ROUND, **more})
    expected = [published_el(model, prompts, i, n, end) for i in range(len(prompts))]
    values = extraction_likelihood(model, prompts, n=n, compat="knowledge-unlearning")
    assert values.values == pytest.approx(expected, abs=1e-12)
    assert values.values != pytest.approx(extraction_likelihood(model, prompts, n=n).values)
    # With n tokens to come there is still one n-gram.
    short = extraction_likelihood(model, items("abc"), n=2, compat="knowledge-unlearning")
    assert short.estimate == 1.0


ROWS: Any = [
    ("Ann", " plays golf"),
    ("Bo", " plays chess"),
    ("Call", " 555-0123"),
    ("x", " y z y z"),
]


@pytest.fixture(scope="module")
def half_trained() -> Any:
    """A transformer that has learned its texts in part."""
    model = tiny("llama", seed=3)
    batch = PromptSet(ROWS[:3], byte_tokenizer()).batch(range(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(6):
        loss = -token_log_probs(labelled_logits(model, batch), batch.label).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def test_extraction_likelihood_of_a_transformer_equals_its_literal_definition(
    half_trained: Any,
) -> None:
    prompts = PromptSet(ROWS, byte_tokenizer())
    expected = [literal_el(half_trained, prompts, i, 2) for i in range(len(prompts))]
    assert len({*expected}) > 2  # nothing, everything, and something between
    for batch_size in (1, 16):
        predictions = Predictions(half_trained, prompts, batch_size=batch_size)
        assert extraction_likelihood(predictions, n=2).values == pytest.approx(expected, abs=1e-12)


def test_memorised_text_costs_no_generation() -> None:
    model = Bigram(len(TOKENIZER), ROUND)
    predictions = Predictions(model, items("abcdeabcdeabcde"))
    assert extraction_likelihood(predictions, n=2).estimate == 1.0
    assert model.n_calls == 1  # the forward pass that found every token right


def test_extraction_likelihood_needs_more_tokens_than_n() -> None:
    values = extraction_likelihood(MODEL, items("abcdeabcde", "abc"), n=3)
    assert values.items.tolist() == [0]
    assert values.note == "1 of 2 items left out; needs: more than 3 scored tokens"
    assert (
        extraction_likelihood(MODEL, items("abc"), n=2).withheld
        == "needs: more than 2 scored tokens"
    )
    with pytest.raises(PromptError, match="n and stride must be at least 1, got n=0"):
        extraction_likelihood(MODEL, items("abc"), n=0)


def test_verbatim_is_what_decoding_gives(half_trained: Any) -> None:
    rows = [
        (text[:k], text[k:]) for text in ("Ann plays golf", "Call 555-0123") for k in (4, 9, 11)
    ]
    prompts = PromptSet(rows, byte_tokenizer())
    predictions = Predictions(half_trained, prompts)
    decoded = [predictions.generated[i] == prompts.target_ids(i) for i in range(len(prompts))]
    assert verbatim(predictions).values.tolist() == decoded
    assert 0 < sum(decoded) < len(decoded)
