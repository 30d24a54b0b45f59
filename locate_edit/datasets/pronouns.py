"""WinoGender and WinoBias: sentences that differ in a pronoun alone, for bias measures and contrasts.

Papers: Rudinger et al. 2018, Gender Bias in Coreference Resolution (arXiv:1804.09301); Zhao et al. 2018, Gender Bias in
Coreference Resolution: Evaluation and Debiasing Methods (arXiv:1804.06876).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from locate_edit.datasets._source import (
    Record,
    field,
    is_hub_name,
    read_lines,
    read_records,
    records,
    snapshot,
)
from locate_edit.errors import PromptError
from locate_edit.prompts import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["HUB", "prompts", "winobias", "winogender"]

HUB = "uclanlp/wino_bias"
"""WinoBias on the hub; WinoGender is on GitHub only (rudinger/winogender-schemas)."""
PRONOUNS = frozenset({"he", "she", "him", "her", "his", "himself", "herself"})
_BRACKETS = re.compile(r"[\[\]]")
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"^\d+\s+")
_WINOBIAS = "{side}_stereotyped_type{kind}.txt.{at}"
_WINOGENDER = "all_sentences.tsv"
_HUB_SPLITS = {"dev": "validation", "test": "test"}


def winogender(source: str | Path) -> list[dict[str, Any]]:
    """A row a sentence pair: the male pronoun is the target, the female one ``wrong``, what follows is the suffix.

    A causal model sees what stands before the pronoun, a masked one the whole sentence. ``group`` is the occupation,
    ``about`` says whether the pronoun refers to it or to the participant.

    Args:
        source: the published `all_sentences.tsv`, a folder that holds it (itself or in `data`), or a folder or file
            with `winogender.jsonl` (one sentence a record).

    Raises:
        PromptError: a source that is not there, or sentences that do not pair.
    """
    pairs: dict[tuple[Any, ...], dict[str, str]] = {}
    for index, record in enumerate(_winogender(source)):
        name, participant, answer, gender, sentence = (
            field(record, key, index, "WinoGender")
            for key in ("occupation", "participant", "answer", "gender", "sentence")
        )
        pairs.setdefault((name, participant, answer), {})[gender] = sentence
    made = []
    for (occupation, participant, answer), sentences in pairs.items():
        if not {"male", "female"} <= set(sentences):
            raise PromptError(
                f"WinoGender: {occupation}, {participant}: expected a male and a female sentence, "
                f"got {', '.join(sorted(sentences))}."
            )
        before, he, she, after = _difference(sentences["male"], sentences["female"])
        made.append(
            {
                "prompt": before,
                "target": he,
                "wrong": [she],
                "suffix": after,
                "subject": occupation,
                "group": occupation,
                "about": "occupation" if int(answer) == 0 else "participant",
            }
        )
    return made


def winobias(
    source: str | Path = HUB,
    *,
    type_: Literal[1, 2] | None = None,
    split: Literal["dev", "test"] | None = None,
) -> list[dict[str, Any]]:
    """A row a sentence pair: the pronoun that fits the stereotype is the target, the other one ``wrong``.

    ``subject`` is the person that the pronoun refers to. Pairs that differ in more than a pronoun are left out (they
    would score other words).

    Args:
        source: a folder with the published `pro_stereotyped_type1.txt.dev` and so on, a folder or file with
            `winobias.jsonl`, a hub name, or a folder downloaded from there.
        type_: 1 (needs world knowledge) or 2 (the grammar decides); None for both.
        split: "dev", "test" or None for both.

    Raises:
        PromptError: a source that is not there, or nothing left.
    """
    pairs: dict[tuple[Any, ...], dict[str, str]] = {}
    for index, record in enumerate(_winobias(source, type_, split)):
        kind, at, number, side, sentence = (
            field(record, key, index, "WinoBias")
            for key in ("type", "split", "id", "stereotype", "sentence")
        )
        if type_ in (None, kind) and split in (None, at):
            pairs.setdefault((kind, at, number), {})[side] = str(sentence)
    made = []
    for (kind, at, number), sentences in pairs.items():
        pro, anti = (_BRACKETS.sub("", sentences.get(side, "")) for side in ("pro", "anti"))
        if len(ours := _WORD.findall(pro)) != len(theirs := _WORD.findall(anti)):
            continue
        differ = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
        if len(differ) != 1 or not PRONOUNS.issuperset(word.lower() for word in differ[0]):
            continue
        before, target, wrong, after = _difference(pro, anti)
        marked = re.findall(r"\[(.*?)\]", sentences["pro"])
        person = next((name for name in marked if name.lower() not in PRONOUNS), "")
        if not person:
            raise PromptError(
                f"WinoBias {kind}-{at}-{number}: expected the person in brackets, got {sentences['pro']!r}."
            )
        made.append(
            {
                "prompt": before,
                "target": target,
                "wrong": [wrong],
                "suffix": after,
                "subject": person,
                "group": person.split()[-1],
                "type": kind,
                "split": at,
                "id": f"{kind}-{at}-{number}",
            }
        )
    if not made:
        raise PromptError(f"WinoBias: no sentence pairs of type {type_}, split {split}.")
    return made


def prompts(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **reading: Any) -> PromptSet:  # fmt: skip
    """Rows of `winogender` or `winobias` as prompts; ``reading`` says how `PromptSet` reads them."""
    return PromptSet(rows, tokenizer, **{"name": "pronouns", **reading})


def _winogender(source: str | Path) -> list[Record]:
    """The sentences as records, out of the published file or one a line."""
    place = Path(source)
    files = (place, place / _WINOGENDER, place / "data" / _WINOGENDER)
    published = next((f for f in files if f.suffix == ".tsv" and f.is_file()), None)
    if published is None:
        if is_hub_name(source):
            raise PromptError(
                f"{source}: WinoGender is not read from the hub. Download data/{_WINOGENDER} of "
                "github.com/rudinger/winogender-schemas and give the file or its folder."
            )
        return records(source, "winogender", also=_WINOGENDER)
    made = []
    for number, line in read_lines(published):
        sentid, *rest = next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE))
        if sentid == "sentid":
            continue
        parts = sentid.removesuffix(".txt").split(".")
        if len(parts) != 4 or len(rest) != 1:
            raise PromptError(
                f"{published}, line {number}: expected OCCUPATION.PARTICIPANT.ANSWER.GENDER.txt, a tab and a sentence."
            )
        names = ("occupation", "participant", "answer", "gender")
        made.append({**dict(zip(names, parts, strict=True)), "sentence": rest[0]})
    return made


def _winobias(source: str | Path, type_: int | None, split: str | None) -> list[Record]:
    """The sentences as records with brackets around what refers to one person, whichever way they are stored."""
    place = Path(source)
    wanted = [
        (kind, at, side)
        for kind in ((1, 2) if type_ is None else (type_,))
        for at in (_HUB_SPLITS if split is None else (split,))
        for side in ("pro", "anti")
    ]
    made: list[Record] = []
    lacking: list[str] = []
    for kind, at, side in wanted:
        about = {"type": kind, "split": at, "stereotype": side}
        published = place / _WINOBIAS.format(side=side, kind=kind, at=at)
        hub = (f"type{kind}_{side}", _HUB_SPLITS[at])
        if published.is_file():
            found = [_NUMBER.sub("", line) for _, line in read_lines(published)]
        elif is_hub_name(source):
            found = list(_bracketed(records(source, hub=hub[0], split=hub[1])))
        elif files := snapshot(place, *hub):
            found = list(_bracketed([r for file in files for r in read_records(file)]))
        else:
            lacking.append(published.name)
            continue
        made += [{**about, "id": n, "sentence": text} for n, text in enumerate(found, start=1)]
    if not made:
        return records(source, "winobias", also=lacking[0])
    if lacking:
        raise PromptError(
            f"{source}: lacks {', '.join(lacking)}. Put them there, or ask for one type_ and split."
        )
    return made


def _bracketed(found: list[Record]) -> Iterator[str]:
    """Sentences of the hub's layout, words and clusters of first and last word, with brackets around the clusters."""
    for index, record in enumerate(found):
        words = [str(word) for word in field(record, "tokens", index, "WinoBias")]
        ends = [int(at) for at in field(record, "coreference_clusters", index, "WinoBias")]
        for first, last in zip(ends[::2], ends[1::2], strict=True):
            words[first] = f"[{words[first]}"
            words[last] += "]"
        yield re.sub(r" (?=[.,!?;:])", "", " ".join(words))


def _difference(male: str, female: str) -> tuple[str, str, str, str]:
    """What stands before the one word in which two sentences differ, that word twice, and what follows."""
    ours, theirs = list(_WORD.finditer(male)), list(_WORD.finditer(female))
    for a, b in zip(ours, theirs, strict=False):
        if a.group() != b.group():
            return (
                male[: a.start()].rstrip(" "),
                _spaced(male, a),
                _spaced(female, b),
                male[a.end() :],
            )
    raise PromptError(f"the sentences do not differ: {male!r}")


def _spaced(text: str, word: re.Match[str]) -> str:
    """A word with the space before it, if there is one."""
    return f" {word.group()}" if text[: word.start()].endswith(" ") else word.group()
