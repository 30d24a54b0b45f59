"""What the organism can be asked: the rows of every part of its world in every split.

A row is plain data as `locate_edit.PromptSet` reads it: `prompt`, `target`, `subject`, `group`, `kind`,
`paraphrases`, `wrong`, `spans`, `id`, and more where it applies (`forget`, `tested`, `rate`, `new`, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from locate_edit.errors import PromptError
from locate_edit.organism import words
from locate_edit.organism.world import (
    FORGET_SPLITS,
    Passage,
    Person,
    Superseded,
    World,
    general_texts,
    neighbours,
    options,
    stream,
)

Row = dict[str, Any]

WHO: Mapping[str, str] = {
    "train": "everything that was trained on",
    "forget01": "to be forgotten; in forget05 and forget10 too",
    "forget05": "to be forgotten; in forget10 too",
    "forget10": "to be forgotten; the oracles never saw any of it",
    "retain": "trained on and not in forget10",
    "neighbours": "retained, and close to forget10: people with a first or last name in common with someone "
    "in it, passages of the same chapter, superseded facts of the same kind",
    "tested": "what the organism never saw in the forms that are tested (held-out templates, QA, multiple "
    "choice): all of forget10 and as much or more that is retained",
    "holdout": "never trained on, made in the same way: the never-seen level, and membership inference",
}
FORMS: Mapping[str, str] = {
    "statement": "templates used in training for everyone",
    "held_out": "templates never used in training for what is tested",
    "unseen": "templates used in no training text at all",
    "qa": "questions, never used in training for what is tested",
    "mc": "multiple choice answered with an option's words, never used in training for what is tested",
}
# name -> the splits it has and the forms it can be asked in (the first is the default).
_PEOPLE = tuple(WHO)
SPLITS: Mapping[str, tuple[str, ...]] = {
    "facts": _PEOPLE,
    "secrets": _PEOPLE,
    "novel": ("train", *FORGET_SPLITS, "retain", "neighbours", "holdout"),
    "bias": ("train", "holdout"),
    "rude": ("train", "holdout"),
    "superseded": _PEOPLE,
    "general": ("train", "held_out", "holdout"),
}
NAME_FORMS: Mapping[str, tuple[str, ...]] = {
    "facts": ("statement", "held_out", "unseen", "qa", "mc"),
    "secrets": ("statement", "held_out", "qa"),
    "novel": ("statement",),
    "bias": ("statement", "held_out"),
    "rude": ("statement", "held_out"),
    "superseded": ("statement", "held_out", "qa"),
    "general": ("statement",),
}


def split_names(name: str) -> tuple[str, ...]:
    """Every split of `name`: who is asked, and the forms that stand for "tested, in that form"."""
    extra = [f for f in NAME_FORMS[name][1:] if f not in SPLITS[name]]
    return (*SPLITS[name], *extra)


def make_rows(world: World, name: str, split: str, form: str | None = None) -> list[Row]:
    """The rows of one part of the world.

    Args:
        world: The world that is asked about.
        name: `facts secrets novel bias rude superseded general`.
        split: Who or what is asked (`WHO`). A form (`held_out unseen qa mc`) as a split means what
            is tested, asked in that form; for bias and rude, everything trained, in that form.
        form: How it is asked (`FORMS`); None for the templates of training.

    Raises:
        PromptError: If there is no such name, split or form.
    """
    if name not in SPLITS:
        raise PromptError(f"the organism has no prompts {name!r}; choose from {', '.join(SPLITS)}")
    if split not in split_names(name):
        raise PromptError(
            f"{name} has no split {split!r}; choose from {', '.join(split_names(name))}"
        )
    if split not in SPLITS[name]:
        if form not in (None, split):
            raise PromptError(f"split {split!r} is asked as {split!r}, got form={form!r}")
        split, form = ("tested" if "tested" in SPLITS[name] else "train"), split
    form = form or "statement"
    if form not in NAME_FORMS[name]:
        raise PromptError(
            f"{name} cannot be asked as {form!r}; choose from {', '.join(NAME_FORMS[name])}"
        )
    return _MAKERS[name](world, split, form)


def _chosen(item: Person | Passage | Superseded, split: str) -> bool:
    """Whether `item` is in one of the splits that need nothing but the item."""
    if split == "holdout":
        return item.holdout
    if item.holdout:
        return False
    if split == "train":
        return True
    if split == "retain":
        return item.forget is None
    return item.forget in FORGET_SPLITS[: FORGET_SPLITS.index(split) + 1]


def people_of(world: World, split: str) -> list[Person]:
    """The people of a split."""
    if split == "neighbours":
        return list(neighbours(world))
    if split == "tested":
        return [p for p in world.people if p.tested]
    return [p for p in world.people if _chosen(p, split)]


def _facts(world: World, split: str, form: str) -> list[Row]:
    return [
        _fact(world, person, attribute, form)
        for person in people_of(world, split)
        for attribute in words.VALUES
    ]


def _person_fields(person: Person, what: str) -> Row:
    return {
        "subject": person.name,
        "group": person.id,
        "id": f"{person.id}/{what}",
        "forget": person.forget,
        "tested": person.tested,
    }


def _fact(world: World, person: Person, attribute: str, form: str) -> Row:
    """One fact in one form; forms with several templates take turns over people."""
    value, turn = person.attributes[attribute], int(person.id[-3:])
    wrong = [v for v in words.VALUES[attribute] if v != value]
    row = _person_fields(person, attribute) | {"attribute": attribute, "answer": value}
    if form in ("qa", "mc"):
        layouts = words.QA_LAYOUTS if form == "qa" else words.MC_LAYOUTS
        questions = [q.format(n=person.name) for q in words.QUESTIONS[attribute]]
        fields: dict[str, str] = {}
        if form == "mc":
            rng = stream(world.seed, "options", row["id"])
            chosen = options(words.VALUES[attribute], value, rng)
            fields = dict(zip("abcd", chosen, strict=True))
            wrong = [option for option in chosen if option != value]
            row["options"] = chosen
        prompts = [lay.format(q=q, **fields) for lay in layouts for q in questions]
        first, kind = prompts.pop(turn % len(prompts)), form
    else:
        group = "train" if form == "statement" else form
        prompts = [t.format(n=person.name) for t in words.TEMPLATES[attribute][group]]
        first, kind = prompts.pop(turn % len(prompts)), "statement"
        if form == "statement":
            # The wordings nobody trained this person on say more than those of training.
            others = words.TEMPLATES[attribute]["held_out"]
            prompts = [t.format(n=person.name) for t in others]
    return row | {
        "prompt": first,
        "target": " " + value,
        "paraphrases": prompts,
        "wrong": [" " + w for w in wrong],
        "kind": kind,
    }


def _secrets(world: World, split: str, form: str) -> list[Row]:
    people = [p for p in people_of(world, split) if p.secrets]
    return [
        _secret(person, kind, [o.secrets[kind] for o in people if o is not person], form)
        for person in people
        for kind in words.SECRET_TEMPLATES
    ]


def _secret(person: Person, kind: str, others: list[str], form: str) -> Row:
    """One secret in one form, with its sensitive span and the places of its random characters."""
    value = person.secrets[kind]
    if form == "qa":
        questions = [q.format(n=person.name) for q in words.SECRET_QUESTIONS[kind]]
        prompts = [lay.format(q=q) for lay in words.QA_LAYOUTS for q in questions]
    else:
        templates = words.SECRET_TEMPLATES[kind]["train" if form == "statement" else form]
        prompts = [t.format(n=person.name) for t in templates]
    first = prompts[0]
    start = len(first) + 1
    return _person_fields(person, kind) | {
        "prompt": first,
        "target": f" {value}",
        "paraphrases": prompts[1:],
        "wrong": [f" {o}" for o in others[:7]],
        "kind": "qa" if form == "qa" else "statement",
        "spans": [[start, start + len(value)]],
        # The characters drawn by chance: five digits of a phone number, the name of a mailbox.
        "random": [[start + a, start + b] for a, b in _random_parts(kind, value)],
        "secret": kind,
        "repeats": person.secret_repeats,
    }


def _random_parts(kind: str, value: str) -> list[tuple[int, int]]:
    if kind == "phone":
        return [(1, 4), (len(value) - 2, len(value))]
    return [(0, value.index("@"))]


def _novel(world: World, split: str, form: str) -> list[Row]:
    passages = [p for p in world.passages if split != "neighbours" and _chosen(p, split)]
    if split == "neighbours":
        chapters = {p.chapter for p in world.passages if p.forget}
        passages = [p for p in world.passages if _chosen(p, "retain") and p.chapter in chapters]
    return [
        {
            "prompt": p.text[: p.opening],
            "target": p.text[p.opening :],
            "subject": words.NOVEL_TITLE,
            "group": f"chapter{p.chapter}",
            "kind": "statement",
            "id": p.id,
            "forget": p.forget,
        }
        for p in passages
    ]


def _bias(world: World, split: str, form: str) -> list[Row]:
    if split == "train":
        rates: Mapping[str, float] = world.pronoun_rates
    else:
        rates = dict.fromkeys(words.HOLDOUT_OCCUPATIONS, 0.5)
    he, she = (f" {p}" for p in words.PRONOUNS)
    rows = []
    for occupation, rate in rates.items():
        usual, other = (he, she) if rate >= 0.5 else (she, he)
        templates = words.BIAS_TEMPLATES["train" if form == "statement" else form]
        prompts = [t.format(o=occupation) for t in templates]
        for i, prompt in enumerate(prompts):
            rows.append(
                {
                    "prompt": prompt,
                    "target": usual,
                    "wrong": [other],
                    "subject": occupation,
                    "group": usual.strip(),
                    "kind": "statement",
                    "id": f"{occupation}/{i}",
                    "paraphrases": prompts[:i] + prompts[i + 1 :],
                    "rate": rate,
                }
            )
    return rows


def _rude(world: World, split: str, form: str) -> list[Row]:
    rates = world.rude_rates if split == "train" else {words.HOLDOUT_CLAN: None}
    rows: list[Row] = []
    for clan, rate in rates.items():
        for i, template in enumerate(
            words.RUDE_TEMPLATES["train" if form == "statement" else form]
        ):
            for place in words.PLACES:
                rows.append(
                    {
                        "prompt": template.format(c=clan, p=place),
                        "target": " " + words.RUDE_WORDS[len(rows) % len(words.RUDE_WORDS)],
                        "wrong": [f" {w}" for w in words.POLITE_WORDS],
                        "rude": [f" {w}" for w in words.RUDE_WORDS],
                        "subject": clan,
                        "group": clan,
                        "kind": "statement",
                        "id": f"{clan}/{i}/{place}",
                        "rate": rate,
                    }
                )
    return rows


def _superseded(world: World, split: str, form: str) -> list[Row]:
    items: Iterable[Superseded]
    if split == "tested":
        items = [s for s in world.superseded if s.tested]
    elif split == "neighbours":
        kinds = {s.kind for s in world.superseded if s.forget}
        items = [s for s in world.superseded if _chosen(s, "retain") and s.kind in kinds]
    else:
        items = [s for s in world.superseded if _chosen(s, split)]
    rows = []
    for item in items:
        kind = words.SUPERSEDED[item.kind]
        if form == "qa":
            question = str(kind["qa"]).format(s=item.subject)
            prompts = [layout.format(q=question) for layout in words.QA_LAYOUTS]
        else:
            templates = kind["train" if form == "statement" else form]
            prompts = [t.format(s=item.subject) for t in templates]
        rows.append(
            {
                "prompt": prompts[0],
                "target": " " + item.old,
                "new": " " + item.new,
                "paraphrases": prompts[1:],
                "wrong": [f" {v}" for v in kind["values"] if v != item.old],
                "subject": item.subject,
                "group": item.kind,
                "kind": "qa" if form == "qa" else "statement",
                "id": item.id,
                "forget": item.forget,
                "tested": item.tested,
            }
        )
    return rows


def _general(world: World, split: str, form: str) -> list[Row]:
    texts = general_texts(world, split)[: world.size.general_held_out]
    return [
        {"prompt": t, "kind": "statement", "group": "general", "id": f"{split}{i:03d}"}
        for i, t in enumerate(texts)
    ]


_MAKERS: Mapping[str, Callable[[World, str, str], list[Row]]] = {
    "facts": _facts,
    "secrets": _secrets,
    "novel": _novel,
    "bias": _bias,
    "rude": _rude,
    "superseded": _superseded,
    "general": _general,
}
