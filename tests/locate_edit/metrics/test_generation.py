from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from locate_edit.errors import PromptError
from locate_edit.metrics.generation import generate, greedy, written
from locate_edit.metrics.predictions import Predictions
from locate_edit.prompts import PromptSet
from locate_edit.sampling import LOST, sample
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

ROWS: Any = [
    ("Ann Lee plays", " golf on Sundays"),
    ("x", "y"),
    ("A much longer prompt that the others have to be padded for", " and a long answer as well"),
    ("Call", " 555-0123"),
]


def one_at_a_time(model: Any, start: list[int], length: int) -> list[int]:
    """Greedy decoding spelled out: the whole text again for every token, no cache, no padding."""
    ids = list(start)
    for _ in range(length):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(start) :]


# One family for each way of telling positions: rotary, learned (two kinds), linear biases, sliding windows.
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gemma2", "falcon"])
def test_equal_to_one_prompt_at_a_time_without_cache(family: str) -> None:
    model = tiny(family)
    prompts = PromptSet(ROWS, byte_tokenizer())
    starts = [prompts.prompt_ids(i) for i in range(len(prompts))]
    lengths = [len(prompts.target_ids(i)) for i in range(len(prompts))]
    expected = [one_at_a_time(model, s, n) for s, n in zip(starts, lengths, strict=True)]
    assert greedy(model, starts, lengths, batch_size=4) == expected
    assert greedy(model, starts, lengths, batch_size=3) == expected
    assert len({tuple(row) for row in expected}) == 4  # the prompts do matter


def test_a_row_stops_at_its_end_token_and_the_batch_when_all_rows_have() -> None:
    tokenizer = word_tokenizer(["a", "b", "c"])
    a, b, c, end = (token_id(tokenizer, word) for word in ("a", "b", "c", "</s>"))
    # a -> b -> end; c goes on for ever.
    model = Bigram(len(tokenizer), {a: {b: 0.9}, b: {end: 0.9}, end: {c: 0.9}, c: {c: 0.9}})
    prompts = PromptSet([("a", " c c c c c c c c"), ("c b", " c c c c")], tokenizer)
    assert generate(model, prompts) == [[b, end], [end]]
    assert model.n_calls == 2
    assert generate(model, PromptSet([("a", " c"), ("c", " c c c")], tokenizer)) == [[b], [c, c, c]]
    assert model.n_calls == 2 + 3
    assert generate(model, prompts, max_new_tokens=1) == [[b], [end]]


def test_end_tokens_of_the_generation_settings_count_and_the_rest_of_them_does_not() -> None:
    model = tiny("llama")
    prompts = PromptSet(ROWS, byte_tokenizer())
    plain = generate(model, prompts)
    third = plain[2][2]
    model.generation_config = GenerationConfig(
        eos_token_id=[2, third], do_sample=True, repetition_penalty=5.0, max_new_tokens=1
    )
    stopped = generate(model, prompts)
    for with_stop, without in zip(stopped, plain, strict=True):
        end = without.index(third) + 1 if third in without else len(without)
        assert with_stop == without[:end]
    assert len(stopped[2]) <= 3 < len(plain[2])


def test_generation_that_makes_no_sense_is_refused() -> None:
    tokenizer = byte_tokenizer()
    prompts = PromptSet([("Ann", " golf")], tokenizer)
    with pytest.raises(PromptError, match="max_new_tokens must be at least 1, got 0"):
        generate(tiny("llama"), prompts, max_new_tokens=0)
    with pytest.raises(PromptError, match="3 tokens and 126 new ones are more than the 128"):
        generate(tiny("llama"), prompts, max_new_tokens=126)
    with pytest.raises(PromptError, match="is for a masked model, which does not continue text"):
        generate(tiny("bert"), PromptSet([("Ann", " golf")], byte_tokenizer(mask=True)))
    with pytest.raises(PromptError, match="row 0 has no token to continue"):
        greedy(tiny("llama"), [[]], [1])


def test_a_row_ends_where_the_model_gives_no_number() -> None:
    words = word_tokenizer(["a", "b", "c", "d"])
    a, b, c, d = (token_id(words, word) for word in "abcd")
    model = Bigram(len(words), {a: {b: 1.0}, b: {c: 1.0}, c: {d: 1.0}, d: {d: 1.0}})
    model.states.weight.data[c] = float("nan")  # "c" can be said, and nothing after it
    prompts = PromptSet([("a", " b c d"), ("d", " d d"), ("c", " d")], words)
    assert generate(model, prompts) == [[b, c], [d, d], []]
    assert Predictions(model, prompts).generated == [[b, c, LOST], [d, d], [LOST]]
    assert written(model, prompts) == [None, "d d", None]
    drawn = sample(model, prompts, length=3)
    assert [each.ids for each in drawn] == [(b, c), (d, d, d), ()]
    assert [each.finite for each in drawn] == [False, True, False]
    assert [each.text for each in drawn] == ["b c", "d d d", ""]
