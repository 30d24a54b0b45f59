from __future__ import annotations

from typing import Any

import pytest

from locate_edit.errors import PromptError
from locate_edit.metrics.memorization import exact_memorization
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.reciprocal_rank import reciprocal_rank
from locate_edit.metrics.sensitive import sensitive_extraction_likelihood, sensitive_memorization
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


def item(text: str, *spans: tuple[int, int]) -> dict[str, Any]:
    """The first letter is the prompt, the rest is scored; spans count letters of the whole."""
    return {
        "prompt": text[0],
        "target": " " + " ".join(text[1:]),
        "spans": [[2 * a, 2 * b - 1] for a, b in spans],
    }


def test_sensitive_memorization_by_hand() -> None:
    # "abcfgde": b c right, f g d wrong, e right.
    rows = [item("abcfgde", (1, 4)), item("abcfgde", (5, 7)), item("abcfgde", (1, 2), (3, 4))]
    prompts = PromptSet([*rows, item("abc")], TOKENIZER)
    assert prompts.sensitive(2) == [True, False, True, False, False, False]
    values = sensitive_memorization(MODEL, prompts)
    assert values.items.tolist() == [0, 1, 2]
    assert values.values == pytest.approx([2 / 3, 1 / 2, 1 / 2])
    assert values.note.endswith("needs: a scored token inside a span ('spans')")
    # The same as ordinary memorisation under a token mask.
    mask = TokenMask(tuple(tuple(map(float, prompts.sensitive(i))) for i in range(3)))
    masked = exact_memorization(MODEL, prompts[:3].with_token_mask(mask))
    assert values.values == pytest.approx(masked.values)


def literal(model: Any, prompts: PromptSet, index: int, n: int, stride: int = 1) -> float:
    prompt, text = prompts.prompt_ids(index), prompts.target_ids(index)
    inside, shares = prompts.sensitive(index), []
    for start in range(0, len(text), stride):
        said = one_at_a_time(model, prompt + text[:start], len(text) - start)
        grams = [said[i : i + n] for i in range(len(said) - n + 1)]
        wanted = [
            text[j : j + n]
            for j in range(start, len(text) - n + 1)
            if inside[j : j + n] == [True] * n
        ]
        if wanted:
            shares.append(sum(gram in grams for gram in wanted) / len(wanted))
    return sum(shares) / len(shares)


def test_sensitive_extraction_by_hand() -> None:
    # Scored: b f c d. Sensitive bigram: "c d". The prompt gives "b c d e": there. "a b" gives "c d e": there.
    # "a b f" gives, f being a uniform row, the first token again and again: not there.
    prompts = PromptSet([item("abfcd", (3, 5)), item("abcde", (4, 5))], TOKENIZER)
    values = sensitive_extraction_likelihood(MODEL, prompts, n=2)
    assert values.items.tolist() == [0]
    assert values.estimate == pytest.approx(2 / 3)
    assert values.note.endswith("needs: 2 scored tokens in a row inside spans ('spans')")
    assert sensitive_extraction_likelihood(MODEL, prompts, n=1).values[1] == 1.0
    with pytest.raises(PromptError, match="got n=2 and stride=0"):
        sensitive_extraction_likelihood(MODEL, prompts, stride=0)


@pytest.mark.parametrize(("n", "stride"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_sensitive_extraction_equals_its_literal_definition(n: int, stride: int) -> None:
    rows = [
        item("abcdeabcdf", (2, 6)),
        item("abcfabcde", (1, 4), (6, 9)),
        item("aabbccddee", (0, 10)),
        item("affgabcdeab", (3, 9)),
    ]
    prompts = PromptSet(rows, TOKENIZER)
    expected = [literal(MODEL, prompts, i, n, stride) for i in range(len(prompts))]
    assert len(set(expected)) > 1
    for batch_size in (1, 8):
        predictions = Predictions(MODEL, prompts, batch_size=batch_size)
        values = sensitive_extraction_likelihood(predictions, n=n, stride=stride)
        assert values.values == pytest.approx(expected, abs=1e-12)


def test_masked_models_have_sensitive_memorization_but_no_extraction() -> None:
    row = {"prompt": "Ann", "target": " golf", "spans": [[4, 6]]}
    prompts = PromptSet([row], byte_tokenizer(mask=True))
    model = tiny("bert")
    right = Predictions(model, prompts).correct
    assert sensitive_memorization(model, prompts).estimate == right[[1, 2]].mean()
    assert sensitive_extraction_likelihood(model, prompts).withheld == "needs: a causal model"


def test_reciprocal_rank_by_hand() -> None:
    table = {IDS["a"]: {IDS["b"]: 0.5, IDS["c"]: 0.2, IDS["d"]: 0.1}, IDS["c"]: {IDS["a"]: 0.9}}
    model = Bigram(len(TOKENIZER), table)
    # After a: b is first, c second, d third. After c all but a share the second place.
    rows = [item("ab"), item("ad"), item("aca", (1, 2)), item("acf")]
    prompts = PromptSet(rows, TOKENIZER)
    values = reciprocal_rank(model, prompts)
    assert values.values == pytest.approx([1, 1 / 3, (1 / 2 + 1) / 2, (1 / 2 + 1 / 2) / 2])
    inside = reciprocal_rank(model, prompts, sensitive=True)
    assert inside.items.tolist() == [2]
    assert inside.values == pytest.approx([1 / 2])
    weighted = prompts[2:3].with_token_mask(TokenMask(((0.25, 0.75),)))
    assert reciprocal_rank(model, weighted).estimate == pytest.approx((1 / 2 + 3) / 4)
