from __future__ import annotations

import itertools
import math

import pytest

from locate_edit.metrics.exposure import digit_accuracy, exposure
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Floats
from locate_edit.prompts import PromptSet, TokenMask
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

TOKENIZER = word_tokenizer(["call", "-", *"0123456789"])
CALL, DASH = token_id(TOKENIZER, "call"), token_id(TOKENIZER, "-")
DIGIT = [token_id(TOKENIZER, str(digit)) for digit in range(10)]


def model_of(*rows: tuple[int, dict[int, float]]) -> Bigram:
    return Bigram(len(TOKENIZER), dict(rows))


def brute_force_rank(true: list[int], logprob: Floats) -> int:
    """1 + the number of digit strings with a larger product of probabilities, string by string."""
    own = float(sum(logprob[i, d] for i, d in enumerate(true)))
    strings = itertools.product(*(row.tolist() for row in logprob))
    return 1 + sum(1 for string in strings if sum(string) > own + 1e-9)


def test_hand_derived_exposure() -> None:
    # After "call": 4 is second among the digits (rank 1); after 4: 7 is first (rank 0).
    model = model_of((CALL, {DIGIT[9]: 0.5, DIGIT[4]: 0.3}), (DIGIT[4], {DIGIT[7]: 0.9}))
    prompts = PromptSet([("call", " 4 7")], TOKENIZER)
    # 1 * 10 + 0 + 1 = 11 of 100.
    depn = exposure(model, prompts, estimator="depn")
    assert depn.estimate == pytest.approx(math.log2(100 / 11))
    # Only "97" has a larger product (0.5 * 0.9 against 0.3 * 0.9): rank 2.
    assert exposure(model, prompts).estimate == pytest.approx(math.log2(100 / 2))
    assert digit_accuracy(model, prompts).estimate == 0.5


def test_the_depn_estimator_is_decided_by_the_leading_digit() -> None:
    unsure_first = model_of((CALL, {DIGIT[9]: 0.5, DIGIT[4]: 0.4}), (DIGIT[4], {DIGIT[7]: 0.9}))
    unsure_last = model_of((CALL, {DIGIT[4]: 0.9}), (DIGIT[4], {DIGIT[9]: 0.5, DIGIT[7]: 0.4}))
    prompts = PromptSet([("call", " 4 7")], TOKENIZER)
    first, last = (
        exposure(m, prompts, estimator="depn").estimate for m in (unsure_first, unsure_last)
    )
    assert first == pytest.approx(math.log2(100 / 11))
    assert last == pytest.approx(math.log2(100 / 2))
    for model in (unsure_first, unsure_last):
        assert exposure(model, prompts).estimate == pytest.approx(math.log2(100 / 2))
        assert digit_accuracy(model, prompts).estimate == 0.5


def test_full_and_no_exposure() -> None:
    sure = model_of(
        (CALL, {DIGIT[4]: 0.9}), (DIGIT[4], {DIGIT[7]: 0.9}), (DIGIT[7], {DIGIT[1]: 0.9})
    )
    prompts = PromptSet([("call", " 4 7 1")], TOKENIZER)
    everything = pytest.approx(3 * math.log2(10))
    assert exposure(sure, prompts).estimate == everything
    assert exposure(sure, prompts, estimator="depn").estimate == everything
    last = model_of(
        *(
            (at, {DIGIT[d]: 0.1 for d in range(10) if d != to})
            for at, to in [(CALL, 4), (DIGIT[4], 7)]
        )
    )
    pair = PromptSet([("call", " 4 7")], TOKENIZER)
    assert exposure(last, pair).estimate == pytest.approx(0.0, abs=1e-12)
    assert exposure(last, pair, estimator="depn").estimate == pytest.approx(0.0, abs=1e-12)
    assert digit_accuracy(last, pair).estimate == 0.0


@pytest.mark.parametrize("masked", [False, True])
def test_the_rank_equals_counting_every_string(masked: bool) -> None:
    model = tiny("bert" if masked else "llama")
    prompts = PromptSet(
        [("Call", " 555"), ("Call her on", " 5-73"), ("x", "9")], byte_tokenizer(mask=masked)
    )
    predictions = Predictions(model, prompts)
    digits = predictions.digits
    expected = []
    for index in range(3):
        where = predictions.of_item(index)
        pick = (digits.label >= where.start) & (digits.label < where.stop)
        true = digits.value[pick].tolist()
        rank = brute_force_rank(true, digits.logprob[pick])
        expected.append(len(true) * math.log2(10) - math.log2(rank))
    assert exposure(predictions).values == pytest.approx(expected, abs=1e-12)


def test_equal_strings_share_the_better_rank() -> None:
    # A uniform model: every string ties with the true one, and none is larger.
    prompts = PromptSet([("call", " 4 7 1 1 0 3 9 2 5 5")], TOKENIZER)
    assert exposure(model_of(), prompts).estimate == pytest.approx(10 * math.log2(10))


def test_separators_and_tokens_of_no_weight_do_not_count() -> None:
    model = model_of((CALL, {DIGIT[4]: 0.9}), (DASH, {DIGIT[9]: 0.5, DIGIT[7]: 0.4}))
    prompts = PromptSet([("call", " 4 - 7")], TOKENIZER)
    assert digit_accuracy(model, prompts).estimate == 0.5
    assert exposure(model, prompts).estimate == pytest.approx(math.log2(100 / 2))
    last = prompts.with_token_mask(TokenMask(((0.0, 1.0, 1.0),)))
    assert digit_accuracy(model, last).estimate == 0.0
    assert exposure(model, last).estimate == pytest.approx(math.log2(10 / 2))


def test_digits_in_longer_tokens_are_not_passed_over() -> None:
    words = word_tokenizer(["call", "123", *"0123456789"])
    call, four, long = (token_id(words, word) for word in ("call", "4", "123"))
    model = Bigram(len(words), {call: {four: 0.9}, long: {four: 0.9}})
    prompts = PromptSet([("call", " 123 4"), ("call", " 4"), ("call", " 123")], words)
    for metric in (exposure, digit_accuracy):
        values = metric(model, prompts)
        assert values.items.tolist() == [1]
        assert (
            "2 of 3 items left out; needs: digits among the scored tokens, one token" in values.note
        )
    rest = prompts.with_token_mask(TokenMask(((0.0, 1.0), (1.0,), (1.0,))))
    assert digit_accuracy(model, rest).items.tolist() == [0, 1]


def test_without_digits_there_is_no_exposure() -> None:
    values = exposure(model_of(), PromptSet([("call", " -"), ("call", " 4")], TOKENIZER))
    assert values.items.tolist() == [1]
    assert values.note.startswith("1 of 2 items left out; needs: digits among the scored tokens")
    wordy = word_tokenizer(["call", "47"])
    bare = PromptSet([("call", " 47")], wordy)
    for metric in (exposure, digit_accuracy):
        values = metric(Bigram(len(wordy), {}), bare)
        assert values.estimate is None
        assert "one token a digit" in values.withheld
    long = PromptSet([("call", " 1" * 13)], TOKENIZER)
    assert exposure(model_of(), long).withheld.endswith("at most 12 of them")
    assert exposure(model_of(), long, estimator="depn").estimate == pytest.approx(
        13 * math.log2(10)
    )
