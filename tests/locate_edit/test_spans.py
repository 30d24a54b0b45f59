"""Sensitive spans: rules on texts marked by hand, annotators joined, and what a model finds unlikely."""

from __future__ import annotations

import doctest
import logging
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from locate_edit import PromptError, PromptSet, organism, spans
from locate_edit.prompts import TokenMask
from locate_edit.spans import (
    KINDS,
    Annotator,
    external,
    intersection,
    merged,
    patterns,
    texts,
    unlikely,
    with_spans,
)
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.locate_edit.vocabularies import byte_bpe, roberta, sentencepiece, word_piece
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

Watch = Callable[[nn.Module], nn.Module]

# In {braces}: what each kind of pattern has to find, and nothing else.
MARKED: dict[str, list[str]] = {
    "email": [
        "Write to {ann.lee+x@mail.example.com}, or to {bo@example.org}.",
        "Nothing @ here, nor in a@b.",
        "Jörg: {jörg.müller@exämple.com}",
    ],
    "url": [
        "See {https://example.com/a?b=c#d}, and (at {www.example.org/x}).",
        "The file example.com is no address here.",
    ],
    "phone": [
        "Call {555-0142} or {(365) 555-0162}, abroad {+49 30 5550 1234}.",
        "In 1999 there were 12 of 365 left; on 2024-05-17 none, 3.14 of 2.71.",
        "Arabic digits: {٠١٢-٣٤٥٦٧}",
    ],
    "card": [
        "Card {4000 0000 0000 0002} and {4000-0000-0000-0010}; {4000000000000028}.",
        "Short 4000 0000 0000 is none, nor is 12345678901234567890.",
    ],
    "iban": ["Pay to {XX00 1234 5678 9012 34}, or {ZZ9912345678901}.", "XX001 is too short."],
    "date": [
        "Born {1990-05-17}, or {17.05.1990}, or {5/17/90}, on {May 17, 1990} or {17 May 1990}.",
        "Chapter 3.14 of 12.",
    ],
    "digits": ["Pin {12345} and {0042}, not 123.", "Room {4711}b"],
    "name": [
        "Yesterday she met {Ann Lee} and {Bo}.",
        "The {Lantern} was lit. He saw {Élodie O'Brien-Ünal}. It rained.",
        '"{Ann B. Lee}," he said. {Cy Dow} left.',
        "Nobody came. Rain fell.",
    ],
}


def unmarked(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A text without its braces, and where they were."""
    text, found = "", []
    for piece in re.split(r"(\{[^}]*\})", marked):
        if piece.startswith("{"):
            found.append((len(text), len(text) + len(piece) - 2))
            piece = piece[1:-1]
        text += piece
    return text, tuple(found)


@pytest.mark.parametrize(
    ("kind", "marked"), [(kind, marked) for kind in KINDS for marked in MARKED[kind]]
)
def test_each_pattern_finds_what_is_marked_and_nothing_else(kind: str, marked: str) -> None:
    text, expected = unmarked(marked)
    found = patterns(kind)(text)
    assert [text[slice(*span)] for span in found] == [text[slice(*span)] for span in expected]
    assert found == expected


def test_all_patterns_together_cover_every_private_text() -> None:
    everything = patterns()
    for kind, examples in MARKED.items():
        for marked in examples:
            text, expected = unmarked(marked)
            found = everything(text)
            assert intersection(found, expected) == expected, (kind, text)
            assert found == merged(found)
    with pytest.raises(PromptError, match=r"no pattern 'passport'; choose from card, date"):
        patterns("passport")


@pytest.mark.parametrize(
    "text", ["1" * 20000, "A" * 20000, "a." * 10000, "1 " * 10000, "@" * 20000, "A b " * 5000]
)
def test_no_text_makes_the_patterns_slow(text: str) -> None:
    started = time.process_time()
    patterns()(text)
    assert time.process_time() - started < 1.0


def test_rules_find_every_secret_of_the_organism() -> None:
    secrets = organism.prompts("secrets", "forget10")
    bare = secrets.reread([{k: v for k, v in row.items() if k != "spans"} for row in secrets.rows])
    found = patterns("email", "phone").annotate(bare)
    assert [row["spans"] for row in found.rows] == [row["spans"] for row in secrets.rows]
    named = patterns("name").annotate(bare)
    for row in named.rows:
        text = row["prompt"] + row["target"]
        assert row["subject"] in [text[a:b] for a, b in row["spans"]]


def test_spans_are_joined_by_characters() -> None:
    one, two = Annotator(lambda _: [(4, 9), (0, 2), (1, 3)]), Annotator(lambda _: [(2, 5), (9, 10)])
    text = "0123456789"
    assert one(text) == ((0, 3), (4, 9))
    assert (one | two)(text) == ((0, 9), (9, 10))
    assert (one & two)(text) == ((2, 3), (4, 5))
    assert (one & (one | two))(text) == one(text)
    assert merged([]) == intersection([], [(0, 1)]) == ()
    assert merged([(3, 5), (3, 5), (0, 4)]) == ((0, 5),)
    for backwards in ((5, 2), (3, 3), (-1, 2)):
        with pytest.raises(
            PromptError, match=r"is no span: expected \[start, end\) with 0 <= start"
        ):
            merged([(0, 1), backwards])
        with pytest.raises(PromptError, match="is no span"):
            intersection([(0, 9)], [backwards])
    # against sets of characters
    left, right = [(0, 3), (5, 6), (8, 12)], [(1, 2), (2, 9), (11, 30)]
    both = {k for a, b in left for k in range(a, b)} & {k for a, b in right for k in range(a, b)}
    assert {k for a, b in intersection(left, right) for k in range(a, b)} == both
    for wrong in ([(3, 3)], [(-1, 2)], [(0, 11)], [(0, True)], [(0.0, 2.0)], ["ab"], [(0, 1, 2)]):
        with pytest.raises(PromptError, match=r"mine: .* is not a stretch of the 10 characters"):
            Annotator(lambda _, wrong=wrong: wrong, "mine")(text)  # type: ignore[misc]


def test_given_texts_are_found_as_whole_words() -> None:
    assert texts("Ann", "Ann Lee")("Ann Lee, Anna; (Ann)") == ((0, 7), (16, 19))
    assert texts("ö")("Jörg ö") == ((5, 6),)
    assert texts("李雷")("我叫李雷。") == ((2, 4),)
    assert texts("555-01")("call 555-01!") == ((5, 11),)
    for wrong in ((), ("",), ("a", " ")):
        with pytest.raises(PromptError, match="none of them empty"):
            texts(*wrong)


# ---- outside annotators ----------------------------------------------------------------------------------------------


def test_answers_from_outside_are_checked(caplog: pytest.LogCaptureFixture) -> None:
    text = "I met Ann Lee and Ann Lee met Bo."
    assert external(lambda _: ["Ann Lee", (30, 32)])(text) == ((6, 13), (18, 25), (30, 32))
    assert external(lambda _: ["Ann Lee", "met Bo"], verify=lambda _, part: "Bo" in part)(text) == (
        (26, 32),
    )
    for wrong in ("Cy", "", " ", (5, 6), (0, 99), (3, 2), None, 7, ("a", "b")):

        def ask(_: str, wrong: Any = wrong) -> list[Any]:
            return ["Bo", wrong]

        with pytest.raises(PromptError, match=r"model: the answer .* is not a passage"):
            external(ask, name="model")(text)
        with caplog.at_level(logging.WARNING):
            assert external(ask, strict=False)(text) == ((30, 32),)
        assert "left out" in caplog.text
        caplog.clear()
    joined = external(lambda _: ["Ann Lee met Bo"]) & patterns("name")
    assert joined(text) == ((18, 25), (30, 32))


# ---- prompt sets -----------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"prompt": "Ann Lee: ", "target": "call 555-0142 at noon"},
    {"prompt": "Bo has ", "target": "tea", "spans": [[0, 2]]},
    {"prompt": "no one, nothing"},
]
MAKERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: byte_tokenizer(prefix=True),
    "byte pairs": lambda: byte_bpe([" call", " 555", " at", " noon"], bos=True),
    "sentencepiece": lambda: sentencepiece([" call", "555", " at", " noon", ":", "-", ","]),
    "words": lambda: word_tokenizer(["Ann", "Lee", ":", "call", "555", "-", "0142", "at", "noon"]),
    "word piece": lambda: word_piece(["ann", "call", "555", "-", "01", "##42", "at", "noon"]),
    "masked bytes": lambda: roberta([" call", " 555", " at", " noon"]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_prompts_are_annotated_whatever_the_tokenizer(name: str) -> None:
    prompts = PromptSet(ROWS, MAKERS[name](), name="people")
    phone = patterns("phone")
    made = phone.annotate(prompts)
    assert [row.get("spans") for row in made.rows] == [[[14, 22]], [[0, 2]], None]
    assert made.name == "people"
    assert [prompts.ids(i) for i in range(3)] == [made.ids(i) for i in range(3)]
    mask = phone.mask(prompts)
    assert mask.weights[1:] == tuple((0.0,) * len(prompts.target_ids(i)) for i in (1, 2))
    assert 0 < sum(mask.weights[0]) < len(mask.weights[0])
    assert mask | texts("tea").mask(prompts) == (phone | texts("tea")).mask(prompts)
    # and back from tokens to characters: exact where no token reaches over the edge
    back = with_spans(prompts.reread([{**row, "spans": None} for row in ROWS]), mask)
    assert [row.get("spans") for row in back.rows] == [[[14, 22]], None, None]
    assert TokenMask.from_spans(back) == mask


def test_tokens_become_spans_run_by_run() -> None:
    tokenizer = word_tokenizer(["a", "b", "c", "d"], prefix=True)
    prompts = PromptSet([{"prompt": "a  b c d", "spans": [[7, 8]]}], tokenizer)
    assert with_spans(prompts, TokenMask(((0.5, 1.0, 0.0, 0.0),)))[0]["spans"] == [[0, 4], [7, 8]]
    assert with_spans(prompts, TokenMask(((1.0, 0.0, 1.0, 1.0),)))[0]["spans"] == [[0, 1], [5, 8]]
    with pytest.raises(PromptError, match="does not fit"):
        with_spans(prompts, TokenMask(((1.0,),)))
    byte = PromptSet(["né ö"], byte_tokenizer(prefix=True))
    assert with_spans(byte, TokenMask(((0, 0, 1.0, 0, 0, 0),)))[0]["spans"] == [[1, 2]]


# ---- what a model finds unlikely -------------------------------------------------------------------------------------

CHAIN = word_tokenizer(["the", "code", "of", "Ann", "is", "seven"])


def chain(**chances: float) -> Bigram:
    """A model of "the code of Ann is seven": every next word is sure but for those given."""
    tokens = ["the", "code", "of", "Ann", "is", "seven"]
    ids = [token_id(CHAIN, token) for token in tokens]
    table = {
        last: {after: chances.get(word, 0.999)}
        for last, after, word in zip(ids, ids[1:], tokens[1:], strict=False)
    }
    return Bigram(len(CHAIN.get_vocab()), table)


def test_unlikely_tokens_by_rank_bound_and_reference() -> None:
    prompts = PromptSet(["the code of Ann is seven", "the code of"], CHAIN)
    plain = chain(Ann=0.02, seven=0.01)
    assert unlikely(plain, prompts, share=0.4).weights == ((0, 0, 1, 0, 1), (1, 0))
    assert unlikely(plain, prompts, share=0.2) == unlikely(plain, prompts)
    assert unlikely(plain, prompts).weights == ((0, 0, 0, 0, 1), (1, 0))
    assert unlikely(plain, prompts, below=0.015).weights == ((0, 0, 0, 0, 1), (0, 0))
    # The same text memorised: an absolute bound selects nothing, and the rank is noise.
    memorised = chain(code=0.9985)
    assert unlikely(memorised, prompts, below=0.5).fraction == 0.0
    assert unlikely(memorised, prompts).weights == ((1, 0, 0, 0, 0), (1, 0))
    # A reference that never saw it brings the planted tokens back.
    planted = TokenMask(((0, 0, 1, 0, 1), (0, 0)))
    assert unlikely(memorised, prompts, below=0.5, reference=plain) == planted
    found = unlikely(memorised, prompts, share=0.4, reference=plain)
    assert found & TokenMask(((1,) * 5, (0,) * 2)) == planted
    # What the reference finds hard too, but the model as well, is not what the model knows.
    both = unlikely(chain(Ann=0.02), prompts, below=0.5, reference=plain)
    assert both == TokenMask(((0, 0, 0, 0, 1), (0, 0)))


def test_unlikely_tokens_and_rules_meet_in_the_mask() -> None:
    prompts = PromptSet(["the code of Ann is seven"], CHAIN)
    model = chain(Ann=0.02, seven=0.01)
    rare = unlikely(model, prompts, share=0.4)
    assert (rare & texts("seven").mask(prompts)).weights == ((0, 0, 0, 0, 1),)
    assert (rare | texts("code").mask(prompts)).weights == ((1, 0, 1, 0, 1),)
    assert [prompts[0]["prompt"][a:b] for a, b in with_spans(prompts, rare)[0]["spans"]] == [
        "Ann",
        "seven",
    ]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_real_models_are_only_read(family: str, untouched: Watch) -> None:
    model, other = tiny(family), untouched(tiny(family, seed=1))
    model.train()
    untouched(model)
    before = [module.training for module in model.modules()]
    prompts = PromptSet(["a small text", "x yz"], byte_tokenizer(mask=family == "bert"))
    mask = unlikely(model, prompts, share=0.3, reference=other)
    assert unlikely(model, prompts, share=0.3, reference=other, batch_size=1) == mask
    assert [module.training for module in model.modules()] == before
    assert [sum(item) for item in mask.weights] == [
        -(-3 * len(item) // 10) for item in mask.weights
    ]
    batch = prompts.batch([1])
    model.eval()
    with torch.no_grad():
        logits: Any = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    chosen = logits[batch.row, batch.pos].log_softmax(-1)[range(len(batch.label)), batch.label]
    (first,) = unlikely(model, prompts, share=0.01).weights[1:]
    assert first.index(1.0) == int(chosen.argmin())
    model.train()


def test_settings_that_mean_nothing_are_refused() -> None:
    prompts = PromptSet(["the code of"], CHAIN)
    for options, message in [
        ({"share": 0.1, "below": 0.1}, "not both"),
        ({"share": 0.0}, "share must be"),
        ({"share": 1.5}, "share must be"),
        ({"below": 0.0}, "below must be"),
        ({"below": float("nan")}, "below must be"),
    ]:
        with pytest.raises(PromptError, match=message):
            unlikely(chain(), prompts, **options)  # type: ignore[arg-type]
    letters = PromptSet(["ab"], byte_tokenizer())
    with pytest.raises(PromptError, match="vocabularies of 300 and 301"):
        unlikely(tiny("llama"), letters, reference=tiny("llama", vocab_size=301))


def test_a_reference_points_at_the_forgotten_text_of_the_organism() -> None:
    model, _ = organism.load()
    oracle, _ = organism.load("oracle")
    secrets = organism.prompts("secrets", "forget10")
    assert unlikely(model, secrets, below=0.5).fraction < 0.02
    found = unlikely(model, secrets, below=0.5, reference=oracle)
    private = []
    for index, row in enumerate(secrets.rows):
        drawn = secrets.reread([{**row, "spans": row["random"]}])
        private += [found.weights[index][k] for k, flag in enumerate(drawn.sensitive(0)) if flag]
    assert sum(private) / len(private) > 0.8


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_token_masks_show_the_text() -> None:
    tokenizer = byte_tokenizer(prefix=True)
    prompts = PromptSet([("a <b>", " né"), "xyz"], tokenizer)
    mask = TokenMask(((0.0, 1.0, 0.5, 0.0), (0.0, 0.0, 0.0)))
    strip = mask.show(prompts)
    assert str(strip).splitlines() == ["a <b> [né]", "xyz"]
    html = strip._repr_html_()
    assert "&lt;" in html
    assert "<b>" not in html
    assert html.count("background") == 2
    assert 'title="weight 0.5"' in html
    assert str(mask.show(prompts, most=1)).splitlines()[1:] == ["... and 1 more"]
    with pytest.raises(PromptError, match="does not fit"):
        mask.show(prompts.select([0]))
    summary = mask._repr_html_()
    assert "2 items" in summary
    assert "<td>1.5</td>" in summary
    assert "and 2 more" in TokenMask(((1.0,),) * 12)._repr_html_()


@pytest.mark.parametrize("module", [spans, __import__("locate_edit.tokens", fromlist=["tokens"])])
def test_the_examples_in_the_documentation(module: Any) -> None:
    flags = doctest.ELLIPSIS
    result = doctest.testmod(module, optionflags=flags)
    assert result.attempted
    assert result.failed == 0
