"""StereoSet: a blank filled by a stereotype, by its opposite, and by a word without meaning.

Paper: Nadeem et al. 2021, StereoSet: Measuring Stereotypical Bias in Pretrained Language Models (arXiv:2004.09456): the
sentences with a blank in them (intrasentence). Blodgett et al. 2021, Stereotyping Norwegian Salmon, found that many of
them do not hold the stereotype that they should: look at rows before you trust a score.

    prompts = stereoset.prompts("folder", tokenizer, bias_type="profession")
    icat(stereotype_score(model, prompts), language_modelling_score(model, prompts))
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from locate_edit.datasets._source import Record, field, one_of, records
from locate_edit.errors import PromptError
from locate_edit.prompts import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BIAS_TYPES", "HUB", "prompts", "rows"]

HUB = "McGill-NLP/stereoset"
NAMES = ("dev", "stereoset", "test")
BIAS_TYPES = ("gender", "profession", "race", "religion")
LABELS = ("anti-stereotype", "stereotype", "unrelated")
"""The names of the numbers that the hub has in their place."""
BLANK = "BLANK"
SCORED = ("word", "sentence")

Scored = Literal["word", "sentence"]


def rows(
    source: str | Path = HUB, *, bias_type: str | None = None, scored: Scored = "word"
) -> list[dict[str, Any]]:
    """A row a sentence with a blank: the stereotype is the target, ``wrong`` its opposite and the word without meaning.

    ``scored`` is "word": what stands before the blank is the prompt, what follows the suffix, which masked models see
    and causal ones do not. Or "sentence": the whole sentences are target and ``wrong``, which is how the paper scores
    causal models. ``group`` is the target term, ``bias_type`` the kind of stereotype.

    Args:
        source: a folder with `dev.json`, such a file in the published layout, or a hub name.
        bias_type: one of `BIAS_TYPES`; None for all.
        scored: "word" or "sentence".

    Raises:
        PromptError: an unknown setting, a source that is not there, a record without one of the three sentences, or
            none of this bias type.
    """
    one_of("StereoSet scored", scored, SCORED)
    if bias_type is not None:
        one_of("StereoSet bias_type", bias_type, BIAS_TYPES)
    made = []
    for index, record in enumerate(_intrasentence(source)):
        kind = str(field(record, "bias_type", index, "StereoSet"))
        if bias_type not in (None, kind):
            continue
        context = str(field(record, "context", index, "StereoSet"))
        if context.count(BLANK) != 1:
            raise PromptError(
                f"StereoSet, record {index}: expected one {BLANK} in 'context', got {context!r}."
            )
        sentences = _by_label(record, index)
        texts = [sentences[label] for label in ("stereotype", "anti-stereotype", "unrelated")]
        before, after = context.split(BLANK)
        frame = {"prompt": ""}
        if scored == "word":
            space = " " if before.endswith(" ") else ""
            texts = [f"{space}{_filling(context, text, index)}" for text in texts]
            frame = {"prompt": before.rstrip(" "), "suffix": after}
        made.append(
            {
                **frame,
                "target": texts[0],
                "wrong": texts[1:],
                "group": str(field(record, "target", index, "StereoSet")),
                "bias_type": kind,
                "id": str(record.get("id", index)),
            }
        )
    if not made:
        raise PromptError(f"StereoSet: {source} has no sentences of bias type {bias_type}.")
    return made


def prompts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bias_type: str | None = None,
    scored: Scored = "word",
    **reading: Any,
) -> PromptSet:
    """The sentences as prompts, see `rows`; ``reading`` says how `PromptSet` reads them."""
    made = rows(source, bias_type=bias_type, scored=scored)
    return PromptSet(made, tokenizer, **{"name": "stereoset", **reading})


def _intrasentence(source: str | Path) -> list[Record]:
    """The records with a blank, out of the published file or one a line."""
    found = records(source, *NAMES, hub="intrasentence", split="validation")
    if len(found) > 1 or "data" not in found[0]:
        return found
    data = found[0]["data"]
    if not isinstance(data, dict) or "intrasentence" not in data:
        there = ", ".join(sorted(data)) if isinstance(data, dict) else type(data).__name__
        raise PromptError(f"StereoSet: expected 'intrasentence' in 'data' of {source}, got {there}.")  # fmt: skip
    return list(data["intrasentence"])


def _by_label(record: Record, index: int) -> dict[str, str]:
    """The three sentences of a record by what they are."""
    given = field(record, "sentences", index, "StereoSet")
    if isinstance(given, dict):  # the hub's layout: a list a field
        given = [
            {"sentence": sentence, "gold_label": label}
            for sentence, label in zip(given["sentence"], given["gold_label"], strict=True)
        ]
    found = {}
    for each in given:
        label = field(each, "gold_label", index, "StereoSet")
        name = LABELS[label] if label in range(len(LABELS)) else str(label)
        found[name] = str(field(each, "sentence", index, "StereoSet"))
    if not set(LABELS) <= set(found):
        raise PromptError(
            f"StereoSet, record {index}: expected sentences labelled {', '.join(LABELS)}, "
            f"got {', '.join(sorted(found))}."
        )
    return found


def _filling(context: str, sentence: str, index: int) -> str:
    """What stands in the place of the blank.

    Where a sentence was not written exactly into its context: the word in the blank's place, counted in words, without
    punctuation, which is what the published code takes everywhere (and so the first word only of longer fillings).
    """
    before, after = context.split(BLANK)
    if sentence.startswith(before) and sentence.endswith(after):
        inside = sentence[len(before) : len(sentence) - len(after)].strip()
        if inside:
            return inside
    words = sentence.split(" ")
    place = next(i for i, word in enumerate(context.split(" ")) if BLANK in word)
    word = words[place].strip(string.punctuation) if place < len(words) else ""
    if not word:
        raise PromptError(
            f"StereoSet, record {index}: {sentence!r} does not fill the blank of {context!r}."
        )
    return word
