"""Every tokenisation below is worked out by hand: the expected tokens stand in the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from locate_edit.errors import LocateEditError, PromptError
from locate_edit.prompts import ROW_SCHEMA, Batch, PromptSet, TokenMask
from tests.locate_edit.vocabularies import byte_bpe, roberta, sentencepiece, spelled, word_piece

WORDS = ["Ann", " Lee", " plays", " golf", "golf", "50", " is", "is"]


def parts(prompts: PromptSet, index: int) -> tuple[list[str], list[str]]:
    """What stands before the first scored token, and what is scored, as spelled."""
    tokenizer: Any = prompts.tokenizer
    return (
        spelled(tokenizer, prompts.prompt_ids(index)),
        spelled(tokenizer, prompts.target_ids(index)),
    )


def rows_of(batch: Batch, tokenizer: Any) -> list[list[str]]:
    """The unpadded rows of a batch as spelled."""
    return [
        spelled(tokenizer, ids[: int(mask.sum())].tolist())
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


# ---- where the target begins ---------------------------------------------------------------------


def test_a_target_that_starts_with_its_space() -> None:
    prompts = PromptSet([{"prompt": "Ann plays", "target": " golf"}], byte_bpe(WORDS))
    assert parts(prompts, 0) == (["Ann", " plays"], [" golf"])


def test_a_token_that_straddles_the_boundary_belongs_to_the_target() -> None:
    tokenizer = byte_bpe(WORDS)
    # The space is the prompt's, but " golf" is one token: predicting it predicts the target.
    prompts = PromptSet(
        [{"prompt": "Ann plays ", "target": "golf"}, {"prompt": "Ann 5", "target": "0"}], tokenizer
    )
    assert parts(prompts, 0) == (["Ann", " plays"], [" golf"])
    assert parts(prompts, 1) == (["Ann", " "], ["50"])


def test_without_the_joint_tokenisation_the_target_would_differ() -> None:
    # "golf" alone is another token than " golf": tokenising the parts separately scores a text nobody meets.
    tokenizer = byte_bpe(WORDS)
    joint = PromptSet([("Ann plays ", "golf")], tokenizer).target_ids(0)
    assert joint != tokenizer("golf")["input_ids"]


def test_sentencepiece_with_its_space_before_the_first_word() -> None:
    tokenizer = sentencepiece([" Ann", " plays", " 5", " golf"])
    prompts = PromptSet(
        [
            {"prompt": "Ann plays", "target": " golf"},
            {"prompt": "Ann plays ", "target": "golf"},
            {"prompt": "", "target": "Ann plays"},
        ],
        tokenizer,
    )
    assert parts(prompts, 0) == (["<s>", " Ann", " plays"], [" golf"])
    assert parts(prompts, 1) == (["<s>", " Ann", " plays"], [" golf"])
    assert parts(prompts, 2) == (["<s>"], [" Ann", " plays"])


def test_characters_of_several_tokens_are_scored_whole() -> None:
    prompts = PromptSet([("Ann ", "\u00e9")], byte_bpe(WORDS))
    assert len(prompts.target_ids(0)) == 2  # the two bytes of the letter
    assert prompts.tokenizer.decode(prompts.target_ids(0)) == "\u00e9"
    assert parts(prompts, 0)[0] == ["Ann", " "]


def test_a_target_of_white_space_only_has_tokens_in_byte_level_vocabularies() -> None:
    # Such tokenizers trim spaces off their offsets, which leaves the token an empty stretch.
    prompts = PromptSet([("Ann", " "), ("Ann", "  golf"), ("Ann ", "golf is")], byte_bpe(WORDS))
    assert parts(prompts, 0) == (["Ann"], [" "])
    assert parts(prompts, 1) == (["Ann"], [" ", " golf"])
    assert parts(prompts, 2) == (["Ann"], [" golf", " is"])


def test_a_tokenizer_without_offsets_gives_the_same_split() -> None:
    tokenizer = ByT5Tokenizer()  # bytes, an end token after every text, and no fast version
    assert not tokenizer.is_fast
    prompts = PromptSet([{"prompt": "ab", "target": "cd"}, "xyz"], tokenizer, masked=False)
    assert prompts.prompt_ids(0) == [97 + 3, 98 + 3]
    assert prompts.target_ids(0) == [99 + 3, 100 + 3]
    assert prompts.ids(0) == [100, 101, 102, 103]
    assert prompts.target_ids(1) == [121 + 3, 122 + 3]
    with pytest.raises(PromptError, match=r"row 0: 'spans' need a tokenizer that knows character"):
        PromptSet([{"prompt": "ab", "target": "cd", "spans": [[2, 3]]}], tokenizer)


# ---- special tokens ------------------------------------------------------------------------------


def test_the_start_token_stays_and_an_automatic_end_token_goes() -> None:
    tokenizer = byte_bpe(WORDS, bos=True, eos=True)
    prompts = PromptSet([("Ann plays", " golf")], tokenizer)
    assert spelled(tokenizer, prompts.ids(0)) == ["<s>", "Ann", " plays", " golf"]


def test_the_end_token_is_scored_when_asked_for() -> None:
    for tokenizer in (byte_bpe(WORDS), byte_bpe(WORDS, eos=True)):
        prompts = PromptSet([("Ann plays", " golf")], tokenizer, append_eos=True)
        assert parts(prompts, 0) == (["Ann", " plays"], [" golf", "</s>"])
        assert len(prompts.ids(0)) == 4


def test_an_end_token_written_in_the_text_is_text() -> None:
    prompts = PromptSet([("Ann</s> plays", " golf</s>")], byte_bpe(WORDS))
    assert parts(prompts, 0) == (["Ann", "</s>", " plays"], [" golf", "</s>"])


def test_plain_text_scores_every_token_that_something_predicts() -> None:
    with_start = PromptSet(["Ann plays golf"], byte_bpe(WORDS, bos=True))
    assert parts(with_start, 0) == (["<s>"], ["Ann", " plays", " golf"])
    without = PromptSet(["Ann plays golf"], byte_bpe(WORDS))
    assert parts(without, 0) == (["Ann"], [" plays", " golf"])


# ---- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, "</s>", "<pad>"])
def test_padding_never_hides_a_token(pad: str | None) -> None:
    tokenizer = byte_bpe(WORDS, pad=pad)
    prompts = PromptSet([("Ann</s> Lee plays", " golf</s>"), ("Ann", " golf")], tokenizer)
    batch = prompts.batch([0, 1])
    # With pad = eos, "input_ids != pad" would hide the two end tokens of the first text.
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]
    assert rows_of(batch, tokenizer) == [
        ["Ann", "</s>", " Lee", " plays", " golf", "</s>"],
        ["Ann", " golf"],
    ]


def test_the_padding_side_of_the_tokenizer_does_not_matter() -> None:
    tokenizer = byte_bpe(WORDS, pad="<pad>")
    rows = [("Ann Lee plays", " golf"), ("Ann", " golf")]
    batches = []
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batches.append(PromptSet(rows, tokenizer).batch([0, 1]))
    for field in ("input_ids", "attention_mask", "row", "pos", "label", "item", "weight"):
        assert torch.equal(getattr(batches[0], field), getattr(batches[1], field)), field


# ---- batches -------------------------------------------------------------------------------------


def test_labels_point_at_the_hidden_state_that_predicts_them() -> None:
    tokenizer = byte_bpe(WORDS)
    prompts = PromptSet([("Ann", " golf"), ("Ann Lee", " plays golf"), "Ann golf is"], tokenizer)
    batch = prompts.batch([1, 2])
    assert batch.items == (1, 2)
    assert batch.item.tolist() == [0, 0, 1, 1]
    assert batch.row.tolist() == [0, 0, 1, 1]
    assert batch.pos.tolist() == [1, 2, 0, 1]
    assert spelled(tokenizer, batch.label.tolist()) == [" plays", " golf", " golf", " is"]
    # The label stands one place after the state that predicts it.
    assert torch.equal(batch.input_ids[batch.row, batch.pos + 1], batch.label)
    assert batch.weight.tolist() == [1.0] * 4
    assert batch.weight.dtype == torch.float32


def test_batches_hold_every_item_once_longest_first_within_the_size() -> None:
    prompts = PromptSet(["Ann golf" + " is" * n for n in (1, 5, 3, 5, 2)], byte_bpe(WORDS))
    batches = prompts.batches(2)
    assert [batch.items for batch in batches] == [(1, 3), (2, 4), (0,)]
    assert [batch.input_ids.shape[1] for batch in batches] == [7, 5, 3]
    with pytest.raises(PromptError, match="batch_size must be at least 1, got 0"):
        prompts.batches(0)


# ---- masked models -------------------------------------------------------------------------------

PIECES = ["ann", "plays", "go", "##lf", "well", ".", "##s"]


def test_masked_items_hide_one_scored_token_a_row() -> None:
    tokenizer = word_piece(PIECES)
    prompts = PromptSet([{"prompt": "ann plays", "target": " golf", "suffix": " well"}], tokenizer)
    assert prompts.masked
    batch = prompts.batch([0])
    assert rows_of(batch, tokenizer) == [
        ["[CLS]", "ann", "plays", "[MASK]", "##lf", "well", "[SEP]"],
        ["[CLS]", "ann", "plays", "go", "[MASK]", "well", "[SEP]"],
    ]
    assert batch.row.tolist() == [0, 1]
    assert batch.pos.tolist() == [3, 4]
    assert spelled(tokenizer, batch.label.tolist()) == ["go", "##lf"]
    assert batch.item.tolist() == [0, 0]


@pytest.mark.parametrize("n_masks", [1, 2])
def test_the_target_fills_a_mask_token_in_the_prompt(n_masks: int) -> None:
    tokenizer = word_piece(PIECES)
    prompt = "ann plays " + "[MASK]" * n_masks + " ."
    prompts = PromptSet([{"prompt": prompt, "target": " golf", "suffix": " well"}], tokenizer)
    batch = prompts.batch([0])
    assert rows_of(batch, tokenizer) == [
        ["[CLS]", "ann", "plays", "[MASK]", "[MASK]", ".", "well", "[SEP]"]
    ]
    assert batch.row.tolist() == [0, 0]
    assert batch.pos.tolist() == [3, 4]
    assert spelled(tokenizer, batch.label.tolist()) == ["go", "##lf"]


def test_a_mask_token_that_swallows_its_space_leaves_one_space() -> None:
    tokenizer = roberta(["Ann", " plays", " golf", " ."])
    written = PromptSet([("Ann plays <mask>.", " golf")], tokenizer)
    assert rows_of(written.batch([0]), tokenizer) == [
        ["<s>", "Ann", " plays", "<mask>", ".", "</s>"]
    ]
    assert parts(written, 0)[1] == [" golf"]
    # What the tokenizer makes of the prompt by itself is the same row.
    assert written.batch([0]).input_ids[0].tolist() == tokenizer("Ann plays <mask>.")["input_ids"]


def test_masked_plain_text_scores_every_ordinary_token() -> None:
    tokenizer = word_piece(PIECES)
    prompts = PromptSet(["ann plays golf ."], tokenizer)
    assert spelled(tokenizer, prompts.target_ids(0)) == ["ann", "plays", "go", "##lf", "."]
    assert prompts.batch([0]).input_ids.shape == (5, 7)


def test_masked_batches_count_rows_and_never_split_an_item() -> None:
    tokenizer = word_piece(PIECES)
    prompts = PromptSet([("ann plays", " golf"), ("ann", " plays"), ("ann", " golf")], tokenizer)
    assert [batch.items for batch in prompts.batches(3)] == [(0,), (2, 1)]
    assert [batch.items for batch in prompts.batches(1)] == [(0,), (2,), (1,)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "ann [MASK]"}, r"row 0: the prompt holds \[MASK\] but the row has no 'target'"),
        ({"prompt": "[MASK] plays [MASK]", "target": "ann"}, r"got 2 separate \[MASK\]"),
        ({"prompt": "[MASK][MASK]", "target": "ann"}, "holds 2 mask tokens but the target has 1"),
    ],
)
def test_mask_tokens_without_one_clear_reading_are_refused(
    row: dict[str, str], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        PromptSet([row], word_piece(PIECES))


def test_settings_that_a_tokenizer_cannot_serve_are_refused() -> None:
    with pytest.raises(PromptError, match="masked=True needs a tokenizer with a mask token"):
        PromptSet(["Ann golf"], byte_bpe(WORDS), masked=True)
    with pytest.raises(PromptError, match="append_eos and chat_template are for causal models"):
        PromptSet(["ann plays"], word_piece(PIECES), append_eos=True)
    with pytest.raises(PromptError, match="chat_template=True needs a chat template, and"):
        PromptSet([("Ann", " golf")], byte_bpe(WORDS), chat_template=True)
    bare = byte_bpe(WORDS)
    bare.eos_token = None
    with pytest.raises(PromptError, match="append_eos=True needs an end-of-sequence token"):
        PromptSet([("Ann", " golf")], bare, append_eos=True)


# ---- chat ----------------------------------------------------------------------------------------

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_chat_template_scores_the_answer_alone() -> None:
    # The tokenizer would add a start token of its own: the template has written one already.
    tokenizer = byte_bpe(WORDS, bos=True)
    tokenizer.chat_template = CHAT
    prompts = PromptSet(
        [{"prompt": "Ann plays", "target": " golf", "spans": [[10, 14]], "id": "ann"}],
        tokenizer,
        chat_template=True,
        append_eos=True,
    )
    assert parts(prompts, 0) == (
        ["<s>", "<|user|>", "Ann", " plays", "<|end|>", "<|assistant|>"],
        ["golf", "<|end|>"],
    )
    assert prompts.sensitive(0) == [True, False]
    assert prompts.audit(0).splitlines() == [
        "item 0 (id 'ann'): 8 tokens, 2 scored",
        "causal: each scored token is predicted from everything before it",
        *(
            f"{position:5d} {token:8d}  {text!r:<24}{mark}".rstrip()
            for position, (token, text, mark) in enumerate(
                zip(
                    prompts.ids(0),
                    [
                        "<s>",
                        "<|user|>",
                        "Ann",
                        " plays",
                        "<|end|>",
                        "<|assistant|>",
                        "golf",
                        "<|end|>",
                    ],
                    [""] * 6 + ["scored, weight 1"] * 2,
                    strict=True,
                )
            )
        ),
    ]
    with pytest.raises(PromptError, match="row 0: chat_template=True needs a 'target'"):
        PromptSet(["Ann plays"], tokenizer, chat_template=True)


LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + {'assistant': 'model'}.get(m['role'], m['role']) + '\n' + (m['content'] | trim) }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatty(template: str, *special: str) -> Any:
    """Words as they stand, each with its space, and a chat template with its special tokens."""
    tokenizer: Any = byte_bpe([" A", "A", " writer", "writer"], bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


TURNS = ("<start_of_turn>", "<end_of_turn>")
IM = ("<|im_start|>", "<|im_end|>")
IM_BEFORE = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "special", "before", "answer", "end"),
    [
        (LLAMA_2, (), "<s>[INST] Who? [/INST]", " A writer.", " </s>"),
        (
            *(GEMMA, TURNS),
            "<s><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n",
            *("A writer.", "<end_of_turn>"),
        ),
        (CHATML, IM, IM_BEFORE, "A writer.", "<|im_end|>"),
        (THINKING, IM, IM_BEFORE + "<think>\n\n</think>\n\n", "A writer.", "<|im_end|>"),
    ],
)
def test_a_chat_is_scored_as_its_template_writes_it(
    template: str, special: tuple[str, ...], before: str, answer: str, end: str
) -> None:
    tokenizer = chatty(template, *special)
    row = {"prompt": "Who?", "target": " A writer.", "spans": [[4, 14]]}
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "A writer."},
    ]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    for append_eos, said in ((False, answer), (True, answer + end)):
        prompts = PromptSet([row], tokenizer, chat_template=True, append_eos=append_eos)
        assert tokenizer.decode(prompts.prompt_ids(0)) == before
        assert tokenizer.decode(prompts.target_ids(0)) == said
        assert whole.removesuffix("\n").startswith(tokenizer.decode(prompts.ids(0)))
        n_answer = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        n_end = len(prompts.target_ids(0)) - n_answer
        assert prompts.sensitive(0) == [True] * n_answer + [False] * n_end
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert before.startswith(asked)
    ids = tokenizer(whole.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    assert prompts.ids(0) == ids
    other = prompts.reread([{**row, "prompt": "Who else?", "target": " writer"}])
    assert tokenizer.decode(other.target_ids(0)) == answer.replace("A writer.", "writer") + end


def test_the_end_of_a_turn_that_is_no_special_token() -> None:
    tokenizer = chatty(GEMMA)  # of which "<end_of_turn>" is so many letters
    prompts = PromptSet([("Who?", " A")], tokenizer, chat_template=True, append_eos=True)
    assert tokenizer.decode(prompts.target_ids(0)) == "A<end_of_turn>"
    tokenizer.eos_token = None  # the template does without
    assert prompts.reread(prompts.rows).digest == prompts.digest
    open_end = chatty("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    prompts = PromptSet([("Who?", " A")], open_end, chat_template=True, append_eos=True)
    assert parts(prompts, 0)[1] == ["A", "</s>"]


def test_what_a_chat_template_strips_is_not_scored() -> None:
    row = {"prompt": "Who?", "target": " A writer \n", "spans": [[6, 15]]}
    stripped = PromptSet([row], chatty(GEMMA, "<end_of_turn>"), chat_template=True, append_eos=True)
    assert parts(stripped, 0)[1] == ["A", " writer", "<end_of_turn>"]
    assert stripped.sensitive(0) == [False, True, False]
    kept = PromptSet([row], chatty(CHATML, "<|im_end|>"), chat_template=True, append_eos=True)
    assert kept.tokenizer.decode(kept.target_ids(0)) == "A writer \n<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            r"does not write the answer 'A writer' as it is: it ends with 'WHO\?A WRITER'",
        ),
        ("{{ messages[0]['content'] }}", "leaves out the assistant's turn"),
        (
            "{{ raise_exception('only one turn') }}",
            "refuses a user's and an assistant's turn: only one turn",
        ),
    ],
)
def test_answers_that_a_chat_template_does_not_write(template: str, message: str) -> None:
    with pytest.raises(PromptError, match=f"row 0: the chat template {message}"):
        PromptSet([("Who?", " A writer")], chatty(template), chat_template=True)


def test_the_audit_says_how_masked_tokens_are_hidden() -> None:
    tokenizer = word_piece(PIECES)
    prompts = PromptSet([("ann", " golf"), ("ann [MASK]", " golf")], tokenizer)
    assert "each scored token is hidden in turn" in prompts.audit(0)
    assert "all scored tokens are hidden together" in prompts.audit(1)


# ---- token masks ---------------------------------------------------------------------------------


def test_spans_become_token_weights() -> None:
    tokenizer = byte_bpe(["Ann", " plays", " golf", " is"])
    rows: list[dict[str, Any]] = [
        {"prompt": "Ann", "target": " plays golf is", "spans": [[10, 14]]},  # "golf"
        {"prompt": "Ann", "target": " plays golf is", "spans": [[0, 4], [9, 10]]},
        {"prompt": "Ann is"},
    ]
    prompts = PromptSet(rows, tokenizer)
    mask = TokenMask.from_spans(prompts)
    # The space of a token of a byte-level vocabulary is outside its offsets: only letters count.
    assert mask.weights == ((0.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.0,))
    assert mask.fraction == pytest.approx(1 / 7)
    batch = prompts.with_token_mask(mask).batch([2, 0])
    assert batch.weight.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert "scored, weight 0" in prompts.with_token_mask(mask).audit(0)


def test_token_masks_are_values_with_an_algebra() -> None:
    prompts = PromptSet([("Ann", " plays golf"), ("Ann", " is")], byte_bpe(WORDS))
    golf = TokenMask.from_texts(prompts, lambda text: "golf" in text)
    soft = TokenMask(((0.25, 0.5), (0.75,)))
    assert golf.weights == ((0.0, 1.0), (0.0,))
    assert (golf & soft).weights == ((0.0, 0.5), (0.0,))
    assert (golf | soft).weights == ((0.25, 1.0), (0.75,))
    assert (~soft).weights == ((0.75, 0.5), (0.25,))
    assert TokenMask.from_json(json.loads(json.dumps(soft.to_json()))) == soft
    assert TokenMask.full(prompts).fraction == 1.0
    assert prompts.with_token_mask(soft)[1:].batch([0]).weight.tolist() == [0.75]
    joined = prompts.with_token_mask(soft) + prompts
    assert [joined.weights(i) for i in range(4)] == [[0.25, 0.5], [0.75], [1.0, 1.0], [1.0]]


def test_token_masks_refuse_what_does_not_fit() -> None:
    prompts = PromptSet([("Ann", " plays golf")], byte_bpe(WORDS))
    with pytest.raises(PromptError, match="token weights must lie between 0 and 1"):
        TokenMask(((1.5,),))
    with pytest.raises(PromptError, match="scored tokens per item differ"):
        prompts.with_token_mask(TokenMask(((1.0,),)))
    with pytest.raises(PromptError, match="of different prompt sets cannot be joined"):
        _ = TokenMask(((1.0,),)) & TokenMask.full(prompts)
    with pytest.raises(PromptError, match="no row has 'spans'"):
        TokenMask.from_spans(prompts)


# ---- sets from sets ------------------------------------------------------------------------------


def test_slices_selections_filters_and_sums_keep_items_together() -> None:
    tokenizer = byte_bpe(WORDS)
    rows = [{"prompt": "Ann", "target": target, "id": i} for i, target in enumerate(WORDS[1:5])]
    prompts = PromptSet(rows, tokenizer, name="ann")
    assert len(prompts) == 4
    assert prompts[2]["target"] == " golf"
    assert [row["id"] for row in prompts[1:3]] == [1, 2]
    chosen = prompts.select([3, 0])
    assert [row["id"] for row in chosen] == [3, 0]
    assert chosen.target_ids(1) == prompts.target_ids(0)
    assert [row["id"] for row in prompts.filter(lambda row: row["id"] % 2)] == [1, 3]
    both = chosen + prompts[1:2]
    assert [row["id"] for row in both] == [3, 0, 1]
    assert both.name == "ann"
    assert prompts.named("x").name == "x"
    assert repr(prompts) == "PromptSet('ann': 4 rows, 4 scored tokens, causal)"
    with pytest.raises(PromptError, match="has no item 4; items are 0 to 3"):
        prompts.select([4])
    with pytest.raises(PromptError, match="nothing selected from PromptSet"):
        prompts.filter(lambda row: False)
    with pytest.raises(PromptError, match="their tokenizers differ"):
        _ = prompts + PromptSet(["Ann is"], byte_bpe(["Ann"]))
    with pytest.raises(PromptError, match="one masked, one causal"):
        _ = prompts + PromptSet(["ann plays"], word_piece(PIECES))


def test_paraphrases_become_rows_of_their_own() -> None:
    tokenizer = byte_bpe(WORDS)
    row = {"prompt": "Ann", "target": " golf", "paraphrases": ["Ann plays", "Ann Lee is"], "id": 7}
    prompts = PromptSet([("Ann", " is"), {**row, "spans": [[4, 8]]}], tokenizer)
    assert prompts.paraphrased() == [
        {"prompt": "Ann plays", "target": " golf", "id": 7, "paraphrase_of": 1},
        {"prompt": "Ann Lee is", "target": " golf", "id": 7, "paraphrase_of": 1},
    ]
    assert parts(PromptSet(prompts.paraphrased(), tokenizer), 1) == (
        ["Ann", " Lee", " is"],
        [" golf"],
    )


def test_the_digest_tells_different_sets_apart() -> None:
    tokenizer = byte_bpe(WORDS)
    base = PromptSet([("Ann", " golf")], tokenizer)
    assert base.digest == PromptSet([("Ann", " golf")], byte_bpe(WORDS), name="other").digest
    others = [
        PromptSet([("Ann", " plays")], tokenizer),
        PromptSet([("Ann", " golf")], tokenizer, append_eos=True),
        PromptSet([{"prompt": "Ann", "target": " golf", "id": 1}], tokenizer),
        base.with_token_mask(TokenMask(((0.5,),))),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the prompt set 'p' is empty"),
        ([("Ann", "")], r"p row 0: nothing to score in ''"),
        (["Ann"], "p row 0: nothing to score in 'Ann'"),
        ([("Ann", " golf"), ("", "golf")], "p row 1: nothing to score in 'golf'"),
        ([{"prompt": "Ann", "target": " golf", "spans": [[3, 9]]}], r"\[3, 9\) is not a stretch"),
        ([{"prompt": "Ann", "target": " golf", "spans": [[3, 3]]}], r"\[3, 3\) is not a stretch"),
        ([{"prompt": "Ann", "target": " golf", "spans": [[3]]}], r"'spans'\[0\]: expected 2 val"),
        ([{"target": "golf"}], "p row 0: the field 'prompt' is missing"),
        ([{"text": "golf"}], r"missing \(fields found: 'text'\)"),
        ([{"prompt": "Ann", "target": 5}], "field 'target': expected string, got integer 5"),
        ([{"prompt": "Ann", "id": True}], "'id': expected string or integer, got boolean True"),
        ([{"prompt": "Ann", "wrong": ["a", 1]}], r"'wrong'\[1\]: expected string, got integer 1"),
        ([["Ann", "golf"]], "p row 0: expected an object with the field 'prompt', got array"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows: list[Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        PromptSet(rows, byte_bpe(WORDS), name="p")
    assert issubclass(PromptError, LocateEditError)


def test_a_target_of_a_word_piece_vocabulary_can_have_no_tokens() -> None:
    with pytest.raises(PromptError, match="nothing to score in ' '"):
        PromptSet([("ann", " ")], word_piece(PIECES))


def test_rows_longer_than_the_limit_are_refused() -> None:
    tokenizer = byte_bpe(WORDS)
    rows = [("Ann", " golf" * 3)]
    PromptSet(rows, tokenizer, max_length=4)
    with pytest.raises(
        PromptError, match=r"row 0: 4 tokens \(3 of them scored\) are more than .* 3"
    ):
        PromptSet(rows, tokenizer, max_length=3)
    tokenizer.model_max_length = 3
    with pytest.raises(PromptError, match="more than the limit of 3"):
        PromptSet(rows, tokenizer)
    PromptSet(rows, tokenizer, max_length=4)


def test_rows_longer_than_the_models_context_are_refused() -> None:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=4,
    )
    model = LlamaForCausalLM(config)
    tokenizer = byte_bpe(WORDS)
    PromptSet([("Ann", " golf" * 3)], tokenizer).check_context(model)
    long = PromptSet([("Ann", " is"), ("Ann", " golf" * 4)], tokenizer)
    with pytest.raises(
        PromptError, match=r"row 1 of .* has 5 tokens, more than the 4 of the model"
    ):
        long.check_context(model)


# ---- files and tables ----------------------------------------------------------------------------


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_jsonl_rows_are_read_with_their_unknown_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path / "people.jsonl",
        '{"prompt": "Ann plays", "target": " golf", "age": 41, "subject": null}',
        "",
        # A line separator inside a string is text, not the end of the line.
        '{"prompt": "Ann\u2028", "target": " is"}',
    )
    prompts = PromptSet.from_jsonl(path, byte_bpe(WORDS))
    assert prompts.name == "people"
    assert prompts.rows[0] == {"prompt": "Ann plays", "target": " golf", "age": 41}
    assert prompts.rows[1]["prompt"] == "Ann\u2028"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "Ann", "target": " golf"', r"people.jsonl:3: not valid JSON at column \d+"),
        ('"Ann"', "people.jsonl:3: expected an object with the field 'prompt', got string 'Ann'"),
        ('{"target": " golf"}', "people.jsonl:3: the field 'prompt' is missing"),
        ('{"prompt": 7}', "people.jsonl:3: field 'prompt': expected string, got integer 7"),
        (
            '{"prompt": "Ann", "paraphrases": "x"}',
            "field 'paraphrases': expected array, got string",
        ),
        ('{"prompt": "Ann", "spans": [[0, "1"]]}', r"field 'spans'\[0\]\[1\]: expected integer"),
        ('{"prompt": "Ann", "target": ""}', "people.jsonl:3: nothing to score"),
    ],
)
def test_a_malformed_line_is_named_with_file_line_and_field(
    tmp_path: Path, line: str, message: str
) -> None:
    path = write(tmp_path / "people.jsonl", '{"prompt": "Ann", "target": " golf"}', "", line)
    with pytest.raises(PromptError, match=message):
        PromptSet.from_jsonl(path, byte_bpe(WORDS))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"none\.jsonl: no such file"):
        PromptSet.from_jsonl(tmp_path / "none.jsonl", byte_bpe(WORDS))
    with pytest.raises(PromptError, match=r"empty\.jsonl: the file holds no rows"):
        PromptSet.from_jsonl(write(tmp_path / "empty.jsonl", "", ""), byte_bpe(WORDS))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(PromptError, match=r"latin\.jsonl: cannot be read as UTF-8"):
        PromptSet.from_jsonl(tmp_path / "latin.jsonl", byte_bpe(WORDS))


def test_tables_and_datasets_give_the_same_set() -> None:
    pandas = pytest.importorskip("pandas")
    tokenizer = byte_bpe(WORDS)
    rows: list[dict[str, Any]] = [
        {"prompt": "Ann plays", "target": " golf", "id": "a"},
        {"prompt": "Ann is"},
    ]
    expected = PromptSet(rows, tokenizer)
    assert PromptSet.from_list(rows, tokenizer).digest == expected.digest
    assert PromptSet.from_pandas(pandas.DataFrame(rows), tokenizer).digest == expected.digest
    # A datasets.Dataset yields mappings with None for what a row lacks.
    padded = ({"target": None, "id": None, **row} for row in rows)
    assert PromptSet.from_dataset(padded, tokenizer).digest == expected.digest


def test_the_schema_is_plain_json_and_names_every_field() -> None:
    schema = json.loads(json.dumps(ROW_SCHEMA))
    assert schema["required"] == ["prompt"]
    assert set(schema["properties"]) == {
        "prompt",
        "target",
        "suffix",
        "paraphrases",
        "spans",
        "subject",
        "group",
        "wrong",
        "corrupt",
        "kind",
        "id",
    }
