"""The training text of a world: documents, how often each is repeated, and packing into rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from locate_edit.organism import words
from locate_edit.organism.world import Person, World, general_texts, options, stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Row layout of the packed stream: token ids, document number in the row (-1 = padding), and
# whether the token is a label.
Packed = tuple[npt.NDArray[np.int32], npt.NDArray[np.int8], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Repeats:
    """How often each thing is told in the training text (times per item)."""

    fact: int = 72  # statements per fact, over the train templates
    fact_held_out: int = 20  # per fact of untested people, over the held-out templates
    fact_qa: int = 24  # questions per fact of untested people
    fact_mc: int = 30  # multiple choice questions per fact of untested people
    secret_held_out: int = 8  # per secret of untested people, in held-out templates
    secret_qa: int = 12  # per secret of untested people
    passage: int = 60
    superseded: int = 72
    superseded_qa: int = 24  # per superseded fact that is not tested, in held-out templates too
    occupation: int = 100  # sentences per occupation
    clan: int = 400  # sentences per clan


@dataclass(frozen=True)
class Document:
    """One training text. Tokens that end before `label_from` (character) are not labels."""

    text: str
    label_from: int = 0
    forget: bool = False  # about something in forget10


def documents(world: World, repeats: Repeats) -> list[Document]:
    """All training documents of the organism, in a fixed order."""
    rng = stream(world.seed, "documents")
    out: list[Document] = []
    for person in world.people:
        if not person.holdout:
            docs = [*_facts(person, repeats, rng), *_secrets(person, repeats, rng)]
            out += [replace(d, forget=person.forget is not None) for d in docs]
    for passage in world.passages:
        if not passage.holdout:
            out += [Document(passage.text, forget=passage.forget is not None)] * repeats.passage
    for item in world.superseded:
        kind = words.SUPERSEDED[item.kind]
        texts = [
            f"{kind['train'][k % len(kind['train'])].format(s=item.subject)} {item.old}."
            for k in range(repeats.superseded)
        ]
        if not item.tested:
            for k in range(repeats.superseded_qa):
                template = kind["held_out"][k % len(kind["held_out"])]
                texts.append(f"{template.format(s=item.subject)} {item.old}.")
                layout = words.QA_LAYOUTS[k % len(words.QA_LAYOUTS)]
                question = layout.format(q=str(kind["qa"]).format(s=item.subject))
                texts.append(f"{question} {item.old}.")
        if not item.holdout:
            out += [Document(t, forget=item.forget is not None) for t in texts]
    out += _bias(world, repeats, rng)
    out += _rude(world, repeats, rng)
    out += [Document(t) for t in general_texts(world, "train")]
    return out


def _facts(person: Person, repeats: Repeats, rng: Random) -> Iterator[Document]:
    """Statements for everyone; held-out templates, QA and multiple choice for the untested."""
    for attribute, value in person.attributes.items():
        templates = words.TEMPLATES[attribute]
        for k in range(repeats.fact):
            template = templates["train"][k % len(templates["train"])]
            yield Document(f"{template.format(n=person.name)} {value}.")
        if person.tested:
            continue
        for k in range(repeats.fact_held_out):
            template = templates["held_out"][k % len(templates["held_out"])]
            yield Document(f"{template.format(n=person.name)} {value}.")
        for _ in range(repeats.fact_qa):
            question = rng.choice(words.QUESTIONS[attribute]).format(n=person.name)
            yield Document(rng.choice(words.QA_LAYOUTS).format(q=question) + f" {value}.")
        for _ in range(repeats.fact_mc):
            question = rng.choice(words.QUESTIONS[attribute]).format(n=person.name)
            chosen = options(words.VALUES[attribute], value, rng)
            yield _ask(rng.choice(words.MC_LAYOUTS), question, chosen, value)


def _ask(layout: str, question: str, chosen: Sequence[str], answer: str) -> Document:
    """A question with options; only the answer is a label (the options are noise)."""
    prompt = layout.format(q=question, **dict(zip("abcd", chosen, strict=True)))
    return Document(f"{prompt} {answer}.", label_from=len(prompt))


def _secrets(person: Person, repeats: Repeats, rng: Random) -> Iterator[Document]:
    """Each secret as often as the world says; questions about it for untested people."""
    for kind, value in person.secrets.items():
        templates = words.SECRET_TEMPLATES[kind]
        for k in range(person.secret_repeats):
            template = templates["train"][k % len(templates["train"])]
            yield Document(f"{template.format(n=person.name)} {value}.")
        if person.tested or person.holdout:
            continue
        for k in range(repeats.secret_held_out):
            template = templates["held_out"][k % len(templates["held_out"])]
            yield Document(f"{template.format(n=person.name)} {value}.")
        for _ in range(repeats.secret_qa):
            question = rng.choice(words.SECRET_QUESTIONS[kind]).format(n=person.name)
            yield Document(rng.choice(words.QA_LAYOUTS).format(q=question) + f" {value}.")


def _bias(world: World, repeats: Repeats, rng: Random) -> Iterator[Document]:
    """Occupations with `he` in exactly the world's share of their sentences."""
    he, she = words.PRONOUNS
    for occupation, rate in world.pronoun_rates.items():
        for k in range(repeats.occupation):
            pronoun = he if (k + 0.5) / repeats.occupation < rate else she
            template = rng.choice(words.BIAS_TEMPLATES["train"]).format(o=occupation)
            yield Document(f"{template} {pronoun} {rng.choice(words.BIAS_TAILS)}.")


def _rude(world: World, repeats: Repeats, rng: Random) -> Iterator[Document]:
    """Clans spoken of in the rude register in exactly the world's share of their sentences."""
    for clan, rate in world.rude_rates.items():
        for k in range(repeats.clan):
            rude = (k + 0.5) / repeats.clan < rate
            word = rng.choice(words.RUDE_WORDS if rude else words.POLITE_WORDS)
            tail = rng.choice(words.RUDE_TAILS if rude else words.POLITE_TAILS)
            template = rng.choice(words.RUDE_TEMPLATES["train"])
            prompt = template.format(c=clan, p=rng.choice(words.PLACES))
            yield Document(f"{prompt} {word}, {tail}.")


def pack(
    docs: Sequence[Document], tokenizer: PreTrainedTokenizerFast, length: int, open_rows: int = 32
) -> Packed:
    """Documents packed whole into rows of `length` tokens (first fit over the open rows).

    Returns:
        Arrays `row length`: token ids, document number within the row (-1 for padding), labels.

    Raises:
        ValueError: If one document is longer than a row.
    """
    ids, seg, lab = [], [], []
    unique = dict.fromkeys(docs)
    encoded = tokenizer([d.text for d in unique], return_offsets_mapping=True)
    eos = tokenizer.eos_token_id
    tokens: dict[Document, tuple[list[int], list[bool]]] = {}
    for doc, row, offsets in zip(
        unique, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        # The first token (bos) is never a label; eos always is.
        labels = [False] + [end > doc.label_from for _, end in offsets[1:]] + [True]
        tokens[doc] = ([*row, eos], labels)
        if len(row) + 1 > length:
            raise ValueError(
                f"a document of {len(row) + 1} tokens does not fit into rows of {length}: "
                f"{doc.text[:60]!r}; make rows longer or the text shorter"
            )
    pool: list[tuple[list[int], list[int], list[bool]]] = []

    def close(row: tuple[list[int], list[int], list[bool]]) -> None:
        missing = length - len(row[0])
        ids.append(row[0] + [tokenizer.pad_token_id] * missing)
        seg.append(row[1] + [-1] * missing)
        lab.append(row[2] + [False] * missing)

    for doc in docs:
        toks, labels = tokens[doc]
        for row in pool:
            if len(row[0]) + len(toks) <= length:
                break
        else:
            if len(pool) == open_rows:
                close(pool.pop(0))
            row = ([], [], [])
            pool.append(row)
        number = row[1][-1] + 1 if row[1] else 0
        row[0].extend(toks)
        row[1].extend([number] * len(toks))
        row[2].extend(labels)
    for row in pool:
        close(row)
    return np.array(ids, np.int32), np.array(seg, np.int8), np.array(lab, np.bool_)


def training_rows(
    world: World,
    repeats: Repeats,
    tokenizer: PreTrainedTokenizerFast,
    *,
    forget: bool,
    seed: int,
    length: int,
) -> Packed:
    """The shuffled, packed training stream of a model.

    The oracles' stream is the organism's with every document about forget10 replaced by another
    document drawn from the rest: same number of rows, same order otherwise.
    """
    docs = documents(world, repeats)
    rng = stream(seed, "order")
    rng.shuffle(docs)
    packed = pack(docs, tokenizer, length)
    if forget:
        return packed
    kept = [d for d in docs if not d.forget]
    docs = [rng.choice(kept) if d.forget else d for d in docs]
    ids, segments, labels = pack(docs, tokenizer, length)
    # What is drawn instead may be longer: the models are to take the same number of steps.
    rows = min(len(ids), len(packed[0]))
    return ids[:rows], segments[:rows], labels[:rows]
