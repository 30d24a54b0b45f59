"""Tokenizers small enough to work out by hand: every token of a list below is one merge chain, nothing else merges."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPACE = "\u0120"  # what byte-level BPE writes for a space
BAR = "\u2581"  # what sentencepiece writes for one


def _chains(words: Sequence[str], alphabet: Sequence[str]) -> models.BPE:
    """A BPE model that builds exactly `words`, each left to right from single characters."""
    vocab = {token: index for index, token in enumerate(dict.fromkeys(alphabet))}
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(1, len(word)):
            left, right, whole = word[:end], word[end], word[: end + 1]
            vocab.setdefault(whole, len(vocab))
            if (left, right) not in merges:
                merges.append((left, right))
    return models.BPE(vocab=vocab, merges=merges)


def byte_bpe(
    words: Sequence[str], *, bos: bool = False, eos: bool = False, pad: str | None = None
) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer over bytes; `bos` and `eos` are put around a text where asked for."""
    specials = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|end|>"]
    core = Tokenizer(
        _chains([w.replace(" ", SPACE) for w in words], sorted(pre_tokenizers.ByteLevel.alphabet()))
    )
    core.add_special_tokens(specials)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    ids = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
    shape = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=shape, special_tokens=ids),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token=pad
    )


def sentencepiece(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A Llama-2-like tokenizer: a bar before every word, the first included, and a start token."""
    spelled = [w.replace(" ", BAR) for w in words]
    letters = sorted({letter for word in spelled for letter in word} | {BAR} | set("0123456789."))
    core = Tokenizer(_chains(spelled, letters))
    core.add_special_tokens(["<s>", "</s>"])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def word_piece(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer: `[CLS] text [SEP]`, with a mask token."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: index for index, token in enumerate([*specials, *words])}
    core = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    core.add_special_tokens(specials)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def roberta(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A RoBERTa-like tokenizer: bytes, `<s> text </s>`, and a mask token that swallows the space before it."""
    core = Tokenizer(
        _chains([w.replace(" ", SPACE) for w in words], sorted(pre_tokenizers.ByteLevel.alphabet()))
    )
    core.add_special_tokens(
        ["<s>", "</s>", "<pad>", AddedToken("<mask>", lstrip=True, special=True)]
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    vocabulary = core.get_vocab()
    core.post_processor = processors.RobertaProcessing(
        ("</s>", vocabulary["</s>"]), ("<s>", vocabulary["<s>"]), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def spelled(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """Token ids as the vocabulary spells them, with plain spaces."""
    return [
        token.replace(SPACE, " ").replace(BAR, " ")
        for token in tokenizer.convert_ids_to_tokens(list(ids))
    ]
