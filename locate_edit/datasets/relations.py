"""Subject-object pairs of factual, commonsense, linguistic and bias relations.

Paper: Hernandez et al. 2024, Linearity of Relation Decoding in Transformer Language Models (arXiv:2308.09124).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locate_edit.datasets._source import Record, field, read_json, read_object
from locate_edit.errors import PromptError
from locate_edit.prompts import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["names", "prompts", "rows"]

WRONG = 3
"""Other objects of the relation given as wrong answers."""


def names(source: str | Path) -> list[str]:
    """The relations of a folder, sorted."""
    return sorted(_read(source))


def rows(
    source: str | Path, relation: str, *, template: int = 0, seed: int = 0
) -> list[dict[str, Any]]:
    """The pairs of one relation; ``wrong`` are other objects of it, drawn with ``seed``.

    Args:
        source: a folder in the published layout (a JSON file a relation, in folders by category), a clone of the
            published repository, or a folder with `relations.jsonl` and `templates.jsonl`.
        relation: one of `names`.
        template: which of the relation's prompts; the others are the ``paraphrases``.
        seed: of the wrong answers.

    Raises:
        PromptError: no such folder, relation or template, or a record without its fields.
    """
    found = _read(source)
    if relation not in found:
        raise PromptError(
            f"relation: expected one of {', '.join(sorted(found))}, got {relation!r}."
        )
    about = found[relation]
    templates = [*about["prompt_templates"], *about.get("prompt_templates_zs", ())]
    if not 0 <= template < len(templates):
        raise PromptError(
            f"template: {relation!r} has {len(templates)} (0 to {len(templates) - 1}), got {template}."
        )
    pairs = [
        tuple(str(field(pair, name, index, relation)) for name in ("subject", "object"))
        for index, pair in enumerate(about["samples"])
    ]
    objects = sorted({answer for _, answer in pairs})
    generator = random.Random(seed)
    made = []
    for subject, answer in pairs:
        others = [text for text in objects if text != answer]
        wrong = generator.sample(others, min(WRONG, len(others)))
        made.append(
            {
                "prompt": templates[template].replace("{}", subject),
                "target": f" {answer}",
                "subject": subject,
                "wrong": [f" {text}" for text in wrong],
                "paraphrases": [
                    text.replace("{}", subject)
                    for number, text in enumerate(templates)
                    if number != template
                ],
                "relation": relation,
                "category": about["category"],
                "group": subject,
            }
        )
    return made


def prompts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    relation: str,
    *,
    template: int = 0,
    seed: int = 0,
    **reading: Any,
) -> PromptSet:
    """One relation as prompts, see `rows`; ``reading`` says how `PromptSet` reads them."""
    made = rows(source, relation, template=template, seed=seed)
    return PromptSet(made, tokenizer, **{"name": relation, **reading})


def _read(source: str | Path) -> dict[str, Record]:
    """Templates, category and pairs by relation."""
    place = Path(source)
    if not place.is_dir():
        raise PromptError(
            f"{place}: no such folder. Give the folder that holds the relations: 'data' of a clone of "
            "github.com/evandez/relations. They are not read from the hub."
        )
    if not (place / "relations.jsonl").is_file() and (place / "data").is_dir():
        place /= "data"
    if (place / "relations.jsonl").is_file():
        return _by_relation(place / "templates.jsonl", place / "relations.jsonl")
    found = {}
    for path in sorted(place.rglob("*.json")):
        record = read_object(path)
        if {"name", "samples", "prompt_templates"} <= set(record):
            category = record.get("properties", {}).get("relation_type", path.parent.name)
            found[path.stem] = {**record, "category": category}
    if not found:
        raise PromptError(
            f"{place}: no relations in it; expected relations.jsonl, or a JSON file a relation as in the folder 'data' "
            "of github.com/evandez/relations."
        )
    return found


def _by_relation(templates: Path, pairs: Path) -> dict[str, Record]:
    """Templates, category and pairs by relation, out of a file of each."""
    about: dict[str, Record] = {}
    for index, record in enumerate(read_json(templates)):
        name = str(field(record, "relation", index, templates.name))
        for needed in ("prompt_templates", "category"):
            field(record, needed, index, templates.name)
        about[name] = {**record, "samples": []}
    for index, pair in enumerate(read_json(pairs)):
        name = str(field(pair, "relation", index, pairs.name))
        if name not in about:
            raise PromptError(
                f"{pairs.name}, record {index}: expected a relation of {templates.name}, got {name!r}."
            )
        about[name]["samples"].append(pair)
    return about
