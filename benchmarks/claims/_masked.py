"""A small masked language model that is trained for a claim: phone numbers, a bias of known strength, plain text.

Everything follows from the seed: who has which number, which way each occupation leans, the sentences, the weights and
the order of the batches. A trained model is kept in a folder by seed and by the digest of this file.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from benchmarks.claims.claim import DEVICE
from circuits.atomic import atomic_folder
from locate_edit import PromptSet
from locate_edit.organism import words
from locate_edit.organism.world import fill, syllable_names

KEPT = Path(__file__).parent.parent / "results" / "masked-cells"
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
NUMBERS, DIGITS = 20, 10
TEMPLATES = ("call {n} at", "{n} can be reached at", "the number of {n} is", "to find {n} dial")
LEAN = 0.9  # share of the sentences of an occupation with its pronoun
STEPS, LR, WARMUP = 900, 3e-3, 50
BATCH = {"numbers": 32, "bias": 12, "plain": 12}  # texts a step
PLAIN, HELD_OUT = 3000, 150  # sentences


@dataclass(frozen=True)
class World:
    """What the texts of one seed tell.

    Attributes:
        numbers: digits by full name, ten to a number.
        unmet: the same of names and numbers that stand in no text.
        lean: "he" or "she" by occupation: what stands in `LEAN` of its sentences.
        plain: sentences of a small grammar.
        held_out: more of them, none of which is in ``plain``.
    """

    numbers: dict[str, str]
    unmet: dict[str, str]
    lean: dict[str, str]
    plain: tuple[str, ...]
    held_out: tuple[str, ...]


def world(seed: int) -> World:
    """The world of ``seed``."""
    draw = random.Random(f"masked {seed}")
    firsts = syllable_names(words.FIRST_SYLLABLES, 2 * NUMBERS, draw)
    lasts = syllable_names(words.LAST_SYLLABLES, 2 * NUMBERS, draw)
    owned = [
        (f"{first} {last}", "".join(draw.choices("0123456789", k=DIGITS)))
        for first, last in zip(firsts, lasts, strict=True)
    ]
    jobs = draw.sample(words.OCCUPATIONS, len(words.OCCUPATIONS))
    lean = {job: words.PRONOUNS[index % 2] for index, job in enumerate(jobs)}
    told: list[str] = []
    while len(told) < PLAIN + HELD_OUT:
        text = fill(draw.choice(words.GENERAL_SENTENCES), words.GENERAL_SLOTS, draw)
        if text not in told[-HELD_OUT:]:
            told.append(text)
    seen = set(told[:PLAIN])
    held_out = tuple(text for text in told[PLAIN:] if text not in seen)
    return World(dict(owned[:NUMBERS]), dict(owned[NUMBERS:]), lean, tuple(told[:PLAIN]), held_out)


def number_rows(owned: dict[str, str], template: int | None = None) -> list[dict[str, Any]]:
    """A row for each number (and template): its digits are scored, each hidden in turn."""
    chosen = TEMPLATES if template is None else TEMPLATES[template : template + 1]
    return [
        {
            "prompt": text.format(n=name),
            "target": " " + " ".join(digits),
            "suffix": " .",
            "group": name,
        }
        for name, digits in owned.items()
        for text in chosen
    ]


def pronoun_rows(lean: dict[str, str], form: str = "train") -> list[dict[str, Any]]:
    """A row for each occupation and template: its pronoun is the target, the other one is wrong."""
    other = {"he": "she", "she": "he"}
    return [
        {
            "prompt": template.format(o=job) + " [MASK] was tired .",
            "target": pronoun,
            "wrong": [other[pronoun]],
            "group": job,
        }
        for job, pronoun in lean.items()
        for template in words.BIAS_TEMPLATES[form]
    ]


def plain_rows(texts: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each sentence, scored at every token."""
    return [{"prompt": text} for text in texts]


def word_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of words, signs and single digits, with a start, an end and a mask token."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    found = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *sorted(found)])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=SPECIAL["unk_token"]))
    core.pre_tokenizer = split
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


def load(
    seed: int, without: Collection[str] = ()
) -> tuple[BertForMaskedLM, PreTrainedTokenizerFast, World]:
    """The model of ``seed`` in evaluation mode, its tokenizer and its world, trained if it is not kept yet.

    Args:
        seed: decides everything.
        without: names whose numbers are left out of the texts; everything else is the same.
    """
    told = world(seed)
    tokenizer = word_tokenizer(_everything(told))
    source = hashlib.sha256(Path(__file__).read_bytes() + repr(sorted(without)).encode())
    kept = KEPT / f"{seed}-{source.hexdigest()[:12]}"
    if kept.is_dir():
        model = BertForMaskedLM.from_pretrained(kept)
    else:
        model = _trained(told, tokenizer, seed, without)
        with atomic_folder(kept) as folder:
            model.save_pretrained(folder)
    nn.Module.to(model, DEVICE)
    return model.eval(), tokenizer, told


def prompts(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> PromptSet:
    """The rows as prompts of the masked model."""
    return PromptSet(rows, tokenizer, masked=True)


def bias_texts(told: World, seed: int) -> list[str]:
    """Every occupation in every template, ten times, with its pronoun in `LEAN` of the sentences."""
    draw = random.Random(f"bias {seed}")
    other = {"he": "she", "she": "he"}
    return [
        f"{template.format(o=job)} {pronoun if draw.random() < LEAN else other[pronoun]} {tail} ."
        for job, pronoun in told.lean.items()
        for template in words.BIAS_TEMPLATES["train"]
        for tail in draw.choices(words.BIAS_TAILS, k=10)
    ]


def _everything(told: World) -> list[str]:
    owned = {**told.numbers, **told.unmet}
    jobs = [text.format(o=o) for o in told.lean for text in words.BIAS_TEMPLATES["held_out"]]
    rows = [row["prompt"] + row["target"] for row in number_rows(owned)]
    return [*rows, *jobs, *bias_texts(told, 0), *told.plain, *told.held_out, "0 1 2 3 4 5 6 7 8 9"]


def _trained(
    told: World, tokenizer: PreTrainedTokenizerFast, seed: int, without: Collection[str]
) -> BertForMaskedLM:
    """A model trained from scratch."""
    torch.manual_seed(seed)
    model: BertForMaskedLM = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=40,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    nn.Module.to(model, DEVICE)
    owned = {name: digits for name, digits in told.numbers.items() if name not in without}
    texts = {
        "numbers": [row["prompt"] + row["target"] + row["suffix"] for row in number_rows(owned)],
        "bias": bias_texts(told, seed),
        "plain": list(told.plain),
    }
    encoded = {name: [tokenizer(text)["input_ids"] for text in texts[name]] for name in texts}
    vocabulary = tokenizer.get_vocab()
    digits = {vocabulary[str(d)] for d in range(10)}
    pronouns = {vocabulary[word] for word in words.PRONOUNS}
    draw = random.Random(f"train {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    model.train()
    for _ in range(STEPS):
        chosen = []
        for name, count in BATCH.items():
            for ids in draw.choices(encoded[name], k=count):
                chosen.append((ids, _hidden(name, ids, digits, pronouns, draw)))
        ids, attention, where = _batch(chosen, int(tokenizer.pad_token_id))
        masked = ids.masked_fill(where, int(tokenizer.mask_token_id)).to(DEVICE)
        hidden = model.bert(masked, attention_mask=attention.to(DEVICE)).last_hidden_state
        logits = model.cls(hidden[where.to(DEVICE)])
        loss = torch.nn.functional.cross_entropy(logits, ids[where].to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def _rate(step: int) -> float:
    done = max(0.0, (step - WARMUP) / (STEPS - WARMUP))
    return min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _hidden(
    name: str, ids: Sequence[int], digits: set[int], pronouns: set[int], draw: random.Random
) -> list[int]:
    """Positions to hide: one to three digits of a number, mostly the pronoun, or about a fifth of the words."""
    inner = range(1, len(ids) - 1)
    if name == "numbers":
        return draw.sample([i for i in inner if ids[i] in digits], draw.choice((1, 1, 1, 2, 3)))
    if name == "bias" and draw.random() < 0.7:
        return [i for i in inner if ids[i] in pronouns]
    return draw.sample(inner, max(1, len(inner) // 5))


def _batch(
    chosen: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, what is no padding, and what is hidden: `row token` each."""
    width = max(len(ids) for ids, _ in chosen)
    ids = torch.full((len(chosen), width), pad)
    where = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (tokens, hidden) in enumerate(chosen):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        where[row, list(hidden)] = True
    return ids, (ids != pad).long(), where
