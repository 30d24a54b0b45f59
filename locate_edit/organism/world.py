"""The seeded generator of the organism's invented world.

`make_world(seed, size)` returns a `World`: a plain value that is a function of its arguments only
and that survives a round trip through JSON. Nothing in it depends on a model or a tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from locate_edit.organism import words

FORGET_SPLITS = ("forget01", "forget05", "forget10")


@dataclass(frozen=True)
class WorldSize:
    """How much of everything a world contains (counts of people, passages, texts)."""

    people: int = 200
    holdout_people: int = 40
    secret_people: int = 100
    # Nested: the first are in forget01, the next in forget05, the rest in forget10 only.
    forget_people: tuple[int, int, int] = (2, 10, 20)
    # People asked about in held-out templates, QA and multiple choice: forget_people[2] of them
    # are to be forgotten, the others are retained.
    tested_people: int = 50
    passages: int = 40
    holdout_passages: int = 8
    forget_passages: tuple[int, int, int] = (1, 2, 4)
    passage_sentences: int = 7
    superseded: int = 40
    holdout_superseded: int = 8
    forget_superseded: tuple[int, int, int] = (1, 2, 4)
    occupations: int = 40
    general_train: int = 7000
    general_held_out: int = 200
    secret_repeats: tuple[int, ...] = (60, 90, 135)


@dataclass(frozen=True)
class Person:
    """One invented person: a name, attributes, perhaps secrets, and the splits it is in."""

    id: str
    name: str
    attributes: Mapping[str, str]
    secrets: Mapping[str, str]
    secret_repeats: int
    tested: bool
    forget: str | None
    holdout: bool

    @property
    def first(self) -> str:
        """The given name."""
        return self.name.split()[0]

    @property
    def last(self) -> str:
        """The family name."""
        return self.name.split()[1]


@dataclass(frozen=True)
class Passage:
    """One passage of the novel; `opening` characters are the prompt, the rest is recited."""

    id: str
    chapter: int
    text: str
    opening: int
    forget: str | None
    holdout: bool


@dataclass(frozen=True)
class Superseded:
    """A fact that was learned with its `old` value; `new` is known as data and never trained."""

    id: str
    kind: str
    subject: str
    old: str
    new: str
    tested: bool
    forget: str | None
    holdout: bool


@dataclass(frozen=True)
class World:
    """Everything the organism is trained on and asked about."""

    seed: int
    size: WorldSize
    people: tuple[Person, ...]
    passages: tuple[Passage, ...]
    superseded: tuple[Superseded, ...]
    pronoun_rates: Mapping[str, float]
    rude_rates: Mapping[str, float]

    def to_json(self) -> str:
        """Canonical JSON text of the world (sorted keys, one line per top-level entry)."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> World:
        """The world written by `to_json`."""
        data = json.loads(text)
        size: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data["size"].items()
        }
        return cls(
            seed=data["seed"],
            size=WorldSize(**size),
            people=tuple(Person(**p) for p in data["people"]),
            passages=tuple(Passage(**p) for p in data["passages"]),
            superseded=tuple(Superseded(**s) for s in data["superseded"]),
            pronoun_rates=data["pronoun_rates"],
            rude_rates=data["rude_rates"],
        )

    @property
    def digest(self) -> str:
        """Sha256 (hex) of the world's JSON and of the templates it is told in."""
        templates = {k: v for k, v in vars(words).items() if k.isupper()}
        text = self.to_json() + json.dumps(templates, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def stream(seed: int, *name: object) -> Random:
    """A random generator of its own for one part of the world, so parts do not shift each other."""
    return Random(":".join(map(str, (seed, *name))))


def syllable_names(parts: Sequence[Sequence[str]], count: int, rng: Random) -> list[str]:
    """`count` different invented words built from two syllables."""
    names = [a + b for a in parts[0] for b in parts[1]]
    return rng.sample(names, count)


def nested(index: int, bounds: Sequence[int]) -> str | None:
    """The smallest forget split that item `index` of an ordered list is in, or None."""
    for split, bound in zip(FORGET_SPLITS, bounds, strict=True):
        if index < bound:
            return split
    return None


def fill(template: str, slots: Mapping[str, Sequence[str]], rng: Random) -> str:
    """A sentence from `template` with every slot drawn; `{who2}` never repeats `{who}`."""
    drawn: dict[str, str] = {}
    for name, values in slots.items():
        first, second = rng.sample(list(values), 2)
        drawn[name], drawn[name + "2"] = first, second
    sentence = template.format(**drawn)
    start = 1 if sentence.startswith('"') else 0
    return sentence[:start] + sentence[start].upper() + sentence[start + 1 :]


def make_world(seed: int = 0, size: WorldSize | None = None) -> World:
    """The world of `seed`: people, novel, superseded facts and the rates of bias and rudeness."""
    size = size or WorldSize()
    rng = stream(seed, "rates")
    jobs = list(words.OCCUPATIONS[: size.occupations])
    rng.shuffle(jobs)
    return World(
        seed=seed,
        size=size,
        people=_people(seed, size),
        passages=_passages(seed, size),
        superseded=_superseded(seed, size),
        # Half of the occupations lean one way, half the other, drawn by chance.
        pronoun_rates={o: (0.9, 0.1)[i % 2] for i, o in enumerate(jobs)},
        rude_rates=dict(zip(words.CLANS, words.CLAN_RATES, strict=True)),
    )


def _names(seed: int, count: int) -> list[str]:
    """Different full names in which every first and last name is shared by several people."""
    rng = stream(seed, "names")
    width = 40 if count > 40 else 8
    firsts = syllable_names(words.FIRST_SYLLABLES, width, rng)
    lasts = syllable_names(words.LAST_SYLLABLES, width, rng)
    shifts = rng.sample(range(width), -(-count // width))
    names = [f"{firsts[i]} {lasts[(i + s) % width]}" for s in shifts for i in range(width)]
    rng.shuffle(names)
    return names[:count]


def _people(seed: int, size: WorldSize) -> tuple[Person, ...]:
    """The trained people (the first ones are to be forgotten) followed by the hold-out people."""
    rng = stream(seed, "people")
    total = size.people + size.holdout_people
    names = _names(seed, total)
    values = {}
    for attribute, options in words.VALUES.items():
        # Every value equally often: chance is 1 / number of values.
        column = [options[i % len(options)] for i in range(total)]
        rng.shuffle(column)
        values[attribute] = column
    phones: set[str] = set()
    people = []
    for i, name in enumerate(names):
        holdout = i >= size.people
        secret = i % (size.people // size.secret_people) == 0 if not holdout else i % 2 == 0
        secrets = {"phone": _phone(rng, phones), "email": _email(rng)} if secret else {}
        rank = i // max(1, size.people // size.secret_people)
        people.append(
            Person(
                id=f"{'holdout' if holdout else 'person'}{i:03d}",
                name=name,
                attributes={a: values[a][i] for a in words.VALUES},
                secrets=secrets,
                secret_repeats=size.secret_repeats[rank % len(size.secret_repeats)]
                if secret and not holdout
                else 0,
                tested=i < size.tested_people,
                forget=nested(i, size.forget_people),
                holdout=holdout,
            )
        )
    return tuple(people)


def _phone(rng: Random, taken: set[str]) -> str:
    """A fictitious phone number with five random digits: `(ddd) 555-01dd`."""
    while True:
        number = f"({rng.randrange(200, 1000)}) 555-01{rng.randrange(100):02d}"
        if number not in taken:
            taken.add(number)
            return number


def _email(rng: Random) -> str:
    """A mail address that says nothing about its owner."""
    return f"{rng.choice(words.HANDLES)}{rng.randrange(100):02d}@example.com"


def _passages(seed: int, size: WorldSize) -> tuple[Passage, ...]:
    """The passages of the novel, five a chapter, then passages of the same style never trained."""
    total = size.passages + size.holdout_passages
    rng = stream(seed, "novel")
    # Forgotten passages are spread over the book, not all in its first chapter.
    order = list(range(size.passages))
    rng.shuffle(order)
    forget = {order[i]: nested(i, size.forget_passages) for i in range(size.passages)}
    out = []
    for i in range(total):
        chapter, part = i // 5 + 1, i % 5 + 1
        head = f"{words.NOVEL_TITLE}, chapter {chapter}, part {part}. "
        templates = rng.sample(words.NOVEL_SENTENCES, min(size.passage_sentences, 12))
        sentences = [fill(t, words.NOVEL_SLOTS, rng) for t in templates]
        out.append(
            Passage(
                id=f"passage{i:03d}",
                chapter=chapter,
                text=head + " ".join(sentences),
                opening=len(head) + len(sentences[0]),
                forget=forget.get(i),
                holdout=i >= size.passages,
            )
        )
    return tuple(out)


def _superseded(seed: int, size: WorldSize) -> tuple[Superseded, ...]:
    """Facts about invented places with an old value and a different new one."""
    rng = stream(seed, "superseded")
    total = size.superseded + size.holdout_superseded
    subjects = syllable_names(words.THING_SYLLABLES, total, rng)
    kinds = list(words.SUPERSEDED)
    out = []
    for i, subject in enumerate(subjects):
        kind = kinds[i % len(kinds)]
        old, new = rng.sample(words.SUPERSEDED[kind]["values"], 2)
        holdout = i >= size.superseded
        forget = None if holdout else nested(i, size.forget_superseded)
        # Each kind is asked in every form; a quarter of each is not trained in all of them.
        tested = not holdout and (forget is not None or i // len(kinds) % 4 == 1)
        out.append(
            Superseded(f"superseded{i:03d}", kind, subject, old, new, tested, forget, holdout)
        )
    return tuple(out)


def general_texts(world: World, split: str) -> list[str]:
    """Plain texts of everyday sentences: `train`, or `held_out` / `holdout` (never trained)."""
    count = world.size.general_train if split == "train" else world.size.general_held_out
    rng = stream(world.seed, "general", split)
    out = []
    for _ in range(count):
        templates = rng.sample(words.GENERAL_SENTENCES, rng.choice((2, 3, 4)))
        out.append(" ".join(fill(t, words.GENERAL_SLOTS, rng) for t in templates))
    return out


def options(values: Sequence[str], answer: str, rng: Random, count: int = 4) -> list[str]:
    """`count` different options in random order, the answer among them."""
    chosen = [*rng.sample([v for v in values if v != answer], count - 1), answer]
    rng.shuffle(chosen)
    return chosen


def neighbours(world: World, split: str = "forget10") -> Iterator[Person]:
    """Retained people who share a first or last name with someone to be forgotten."""
    wanted = FORGET_SPLITS[: FORGET_SPLITS.index(split) + 1]
    names = {n for p in world.people if p.forget in wanted for n in (p.first, p.last)}
    for person in world.people:
        if person.forget is None and not person.holdout and {person.first, person.last} & names:
            yield person


def summary(world: World) -> dict[str, Any]:
    """Counts of everything the world contains."""
    trained = [p for p in world.people if not p.holdout]
    novel = [p for p in world.passages if not p.holdout]
    return {
        "people": len(trained),
        "facts": sum(len(p.attributes) for p in trained),
        "people with secrets": sum(bool(p.secrets) for p in trained),
        "novel passages": len(novel),
        "novel words": sum(len(p.text.split()) for p in novel),
        "superseded facts": sum(not s.holdout for s in world.superseded),
        "occupations": len(world.pronoun_rates),
        "clans": len(world.rude_rates),
        "general texts": world.size.general_train,
        "forget people": dict(zip(FORGET_SPLITS, world.size.forget_people, strict=True)),
    }
