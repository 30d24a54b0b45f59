"""WinoGender and WinoBias: sentences that differ in a pronoun alone, for bias measures and contrasts.

Papers: Rudinger et al. 2018, Gender Bias in Coreference Resolution (arXiv:1804.09301); Zhao et al. 2018, Gender Bias in
Coreference Resolution: Evaluation and Debiasing Methods (arXiv:1804.06876).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from locate_edit.datasets._source import field, records
from locate_edit.errors import PromptError
from locate_edit.prompts import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["prompts", "winobias", "winogender"]

PRONOUNS = frozenset({"he", "she", "him", "her", "his", "himself", "herself"})
_BRACKETS = re.compile(r"[\[\]]")
_WORD = re.compile(r"\w+")


def winogender(source: str | Path) -> list[dict[str, Any]]:
    """A row a sentence pair: the male pronoun is the target, the female one ``wrong``, what follows is the suffix.

    A causal model sees what stands before the pronoun, a masked one the whole sentence. ``group`` is the occupation,
    ``about`` says whether the pronoun refers to it or to the participant.

    Args:
        source: a folder or file with `winogender.jsonl` (one sentence a record).

    Raises:
        PromptError: a source that is not there, or sentences that do not pair.
    """
    pairs: dict[tuple[Any, ...], dict[str, str]] = {}
    for index, record in enumerate(records(source, "winogender")):
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
    source: str | Path,
    *,
    type_: Literal[1, 2] | None = None,
    split: Literal["dev", "test"] | None = None,
) -> list[dict[str, Any]]:
    """A row a sentence pair: the pronoun that fits the stereotype is the target, the other one ``wrong``.

    ``subject`` is the person that the pronoun refers to. Pairs that differ in more than a pronoun are left out (they
    would score other words).

    Args:
        source: a folder or file with `winobias.jsonl`.
        type_: 1 (needs world knowledge) or 2 (the grammar decides); None for both.
        split: "dev", "test" or None for both.

    Raises:
        PromptError: a source that is not there, or nothing left.
    """
    pairs: dict[tuple[Any, ...], dict[str, str]] = {}
    for index, record in enumerate(records(source, "winobias")):
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
        person = re.findall(r"\[(.*?)\]", sentences["pro"])[0]
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
