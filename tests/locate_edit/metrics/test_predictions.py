"""Predictions against the literal definition: one unpadded forward pass an item, softmax over the vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from locate_edit.errors import PromptError
from locate_edit.metrics import running
from locate_edit.metrics.exposure import digit_accuracy, exposure
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.memorization import exact_memorization, extraction_strength, verbatim
from locate_edit.metrics.perplexity import perplexity
from locate_edit.metrics.predictions import Predictions, digit_tokens
from locate_edit.prompts import PromptSet
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.locate_edit.vocabularies import sentencepiece, word_piece
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

ROWS: list[Any] = [
    {"prompt": "Ann Lee plays", "target": " golf"},
    {"prompt": "Call", "target": " 555-0123"},
    "A much longer plain text that makes its neighbours wait in padding.",
    {"prompt": "x", "target": "y"},
    {"prompt": "Bo", "target": " 7", "suffix": " times"},
]
FIELDS = ("logprob", "entropy", "variance", "rank", "top")


def literal(model: Any, prompts: PromptSet) -> dict[str, list[float]]:
    """The fields of `Predictions`, label by label, from unpadded single rows."""
    found: dict[str, list[float]] = {field: [] for field in FIELDS}
    for index in range(len(prompts)):
        ids, targets = prompts.ids(index), prompts.target_ids(index)
        first = len(prompts.prompt_ids(index))
        for k, target in enumerate(targets):
            row = list(ids)
            if prompts.masked:
                row[first + k] = prompts.tokenizer.mask_token_id
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row])).logits[0].double()
            at = logits[first + k if prompts.masked else first + k - 1]
            logprob = at.log_softmax(-1)
            found["logprob"].append(float(logprob[target]))
            found["entropy"].append(float(-(logprob.exp() * logprob).sum()))
            mean = (logprob.exp() * logprob).sum()
            found["variance"].append(float((logprob.exp() * logprob**2).sum() - mean**2))
            found["rank"].append(int((at > at[target]).sum()))
            found["top"].append(int(at.argmax()))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert", "roberta"])
@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_equal_to_the_literal_definition_for_any_batch_size(family: str, pad: str | None) -> None:
    masked = family in ("bert", "roberta")
    model = tiny(family)
    prompts = PromptSet(ROWS, byte_tokenizer(pad=pad, mask=masked))
    assert prompts.masked == masked
    expected = literal(model, prompts)
    for batch_size in (1, 3, 64):
        predictions = Predictions(model, prompts, batch_size=batch_size)
        for field in FIELDS:
            got = getattr(predictions, field)
            assert got == pytest.approx(expected[field], rel=5e-6, abs=2e-6), field
        digits = predictions.digits
        assert len(digits.label) > 5
        own = digits.logprob[np.arange(len(digits.value)), digits.value]
        assert own == pytest.approx(predictions.logprob[digits.label], abs=1e-9)


def test_the_order_of_the_items_and_the_padding_side_do_not_matter() -> None:
    model = tiny("llama")
    tokenizer = byte_tokenizer(prefix=True)
    prompts = PromptSet(ROWS, tokenizer)
    order = [3, 0, 4, 2, 1]
    tokenizer_left = byte_tokenizer(prefix=True)
    tokenizer_left.padding_side = "left"
    shuffled = PromptSet([ROWS[i] for i in order], tokenizer_left)
    metrics = [likelihood, perplexity, exact_memorization, extraction_strength, verbatim]
    for metric in [*metrics, exposure, digit_accuracy]:
        straight = metric(Predictions(model, prompts, batch_size=2))
        mixed = metric(Predictions(model, shuffled, batch_size=5))
        assert straight.estimate == pytest.approx(mixed.estimate, rel=1e-6, abs=1e-6)
        back = {order[item]: value for item, value in zip(mixed.items, mixed.values, strict=True)}
        forth = dict(zip(straight.items, straight.values, strict=True))
        assert back.keys() == forth.keys()
        for item, value in forth.items():
            assert back[item] == pytest.approx(value, rel=1e-6, abs=1e-6)


def test_one_forward_pass_serves_every_likelihood_metric() -> None:
    tokenizer = word_tokenizer(["a", "b", *"0123456789"])
    model = Bigram(len(tokenizer), {})
    prompts = PromptSet([("a", " b 7"), ("b", " a"), "a b a", ("a", " 1 2")], tokenizer)
    predictions = Predictions(model, prompts, batch_size=2)
    assert model.n_calls == 0  # nothing is run before it is asked for
    for metric in (likelihood, perplexity, exact_memorization, extraction_strength, exposure):
        metric(predictions)
    assert model.n_calls == 2
    assert (
        model.n_tokens == 3 * 2 + 3 * 2
    )  # every item once: a row of three or two, in batches of two


def test_batches_whose_logits_do_not_fit_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer(["a", "b"])
    model = Bigram(len(tokenizer), {})
    prompts = PromptSet(["a b a b", "a b a b", "a b a", "a b"], tokenizer)
    whole = Predictions(model, prompts, batch_size=4).logprob
    monkeypatch.setattr(running, "_MOST_LOGITS", 3 * len(tokenizer))  # three labels at a time
    model.n_calls = 0
    split = Predictions(model, prompts, batch_size=4)
    assert split.logprob == pytest.approx(whole, abs=1e-12)
    assert model.n_calls == 3  # items 0, 1, and 2 with 3


def test_what_vanishes_and_what_ties() -> None:
    tokenizer = word_tokenizer(["a", "b", "c", "d"])
    a, b, c, d = (token_id(tokenizer, word) for word in "abcd")
    model = Bigram(len(tokenizer), {})
    logits = torch.full((len(tokenizer),), -300.0)
    logits[[b, c, d]] = torch.tensor([-200.0, 0.0, 0.0])  # exp(-200) is zero in float32
    model.head.weight.data[:, a] = logits
    found = Predictions(model, PromptSet([("a", " b"), ("a", " c"), ("a", " d")], tokenizer))
    assert found.logprob == pytest.approx([-200 - np.log(2), -np.log(2), -np.log(2)], rel=1e-7)
    assert found.entropy == pytest.approx([np.log(2)] * 3, rel=1e-6)
    assert found.variance == pytest.approx([0.0] * 3, abs=1e-12)
    assert found.rank.tolist() == [2, 0, 0]  # those that tie have the best of their ranks
    assert found.top.tolist() == [min(c, d)] * 3


def test_half_precision_models_are_scored_in_float32() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    prompts = PromptSet(["some plain text"], byte_tokenizer())
    batch = prompts.batch([0])
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits[batch.row, batch.pos]
    assert logits.dtype == torch.bfloat16
    chosen = logits.double().log_softmax(-1).gather(-1, batch.label[:, None])[:, 0].numpy()
    coarse = logits.log_softmax(-1).double().gather(-1, batch.label[:, None])[:, 0].numpy()
    found = Predictions(model, prompts).logprob
    assert found == pytest.approx(chosen, abs=1e-5)
    assert np.abs(coarse - chosen).max() > 1e-3  # what scoring in the model's own dtype would give


def test_modes_and_weights_are_left_as_they_were(untouched: Any) -> None:
    model = tiny("llama")
    model.train()
    model.model.layers[0].eval()  # a mixture of modes comes back as the same mixture
    untouched(model)
    prompts = PromptSet([("Ann", " golf")], byte_tokenizer())
    predictions = Predictions(model, prompts)
    assert np.isfinite(predictions.logprob).all()
    assert len(predictions.generated[0]) <= 5


def test_modes_come_back_after_an_error() -> None:
    model = tiny("llama").train()

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        _ = Predictions(model, PromptSet(["some text"], byte_tokenizer())).logprob
    handle.remove()
    assert all(module.training for module in model.modules())
    assert not model.lm_head._forward_pre_hooks


def test_prompts_longer_than_the_context_are_refused() -> None:
    prompts = PromptSet(["x" * 200], byte_tokenizer())
    with pytest.raises(
        PromptError, match="has 200 tokens, more than the 128 of the model's context"
    ):
        Predictions(tiny("llama"), prompts)


@pytest.mark.parametrize(
    ("tokenizer", "spellings"),
    [
        (byte_tokenizer(), [list("0123456789")]),
        (
            sentencepiece([f" {d}" for d in range(10)]),
            [list("0123456789"), [f"\u2581{d}" for d in range(10)]],
        ),
        (word_piece([*"0123456789", "##1"]), [list("0123456789")]),  # one joined digit is not ten
        (word_piece(["ann"]), []),
    ],
)
def test_digit_tokens_are_found_in_every_spelling(
    tokenizer: PreTrainedTokenizerBase, spellings: list[list[str]]
) -> None:
    found = [tokenizer.convert_ids_to_tokens(ids) for ids in digit_tokens(tokenizer)]
    assert found == spellings


def test_digit_distributions_use_the_spelling_of_the_true_digit() -> None:
    tokenizer = sentencepiece([" a", *(f" {d}" for d in range(10))])
    bare = [token_id(tokenizer, str(d)) for d in range(10)]
    spaced = [token_id(tokenizer, f"\u2581{d}") for d in range(10)]
    a = token_id(tokenizer, "\u2581a")
    table = {a: {spaced[7]: 0.5, bare[7]: 0.2}, spaced[7]: {bare[3]: 0.6, spaced[3]: 0.1}}
    model = Bigram(len(tokenizer), table)
    digits = Predictions(model, PromptSet([("a", " 73 a")], tokenizer)).digits
    assert digits.label.tolist() == [0, 1]
    assert digits.value.tolist() == [7, 3]
    assert np.exp(digits.logprob[0, 7]) == pytest.approx(0.5, rel=1e-6)
    assert np.exp(digits.logprob[1, 3]) == pytest.approx(0.6, rel=1e-6)
