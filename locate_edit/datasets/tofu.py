"""TOFU: questions about invented authors, with paraphrased and wrong answers.

Paper: Maini et al. 2024, TOFU: A Task of Fictitious Unlearning for LLMs (arXiv:2401.06121).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from locate_edit.datasets._source import Record, field, one_of, records
from locate_edit.errors import PromptError
from locate_edit.prompts import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["HUB", "SPLITS", "prompts", "rows", "wrong_answers"]

HUB = "locuslab/TOFU"
TEMPLATE = "Question: {question}\nAnswer:"
"""How a question is put to a model that is no chat model."""
AUTHOR = 20
"""Questions about each author."""
SPLITS = (
    "full", "forget01", "forget05", "forget10", "retain90", "retain95", "retain99",
    "forget01_perturbed", "forget05_perturbed", "forget10_perturbed", "retain_perturbed",
    "real_authors_perturbed", "world_facts_perturbed", "holdout01", "holdout05", "holdout10",
)  # fmt: skip
ANSWERS = ("answer", "paraphrased_answer")


def rows(
    source: str | Path = HUB,
    split: str = "forget10",
    *,
    answer: str = "answer",
    template: str | None = TEMPLATE,
) -> list[dict[str, Any]]:
    """The questions and answers of one split.

    ``wrong`` holds the perturbed answers and ``paraphrases`` the paraphrased question, where the split has them;
    ``group`` is the author.

    Args:
        source: a folder with `SPLIT.json(l)` files or one `tofu_full.jsonl` that marks its splits, or a hub name.
        split: one of `SPLITS`; forget01 is in forget05, and this in forget10; retainN is the rest.
        answer: "answer", or "paraphrased_answer" (perturbed splits only), which the truth ratio scores.
        template: how a question becomes a prompt; None leaves it bare, for ``PromptSet(chat_template=True)``.

    Raises:
        PromptError: an unknown split or answer, or a source that does not have it.
    """
    one_of("TOFU split", split, SPLITS)
    one_of("TOFU answer", answer, ANSWERS)
    if template is not None and "{question}" not in template:
        raise PromptError(f"TOFU template: expected {{question}} in it, got {template!r}.")
    authors = 1 if split.startswith(("real", "world")) else AUTHOR
    made = []
    for index, record in enumerate(_records(source, split)):
        if answer not in record and answer == "paraphrased_answer" and "perturbed" in split:
            answer_here = "answer"  # real authors and world facts have one wording only
        else:
            answer_here = answer
        target = str(field(record, answer_here, index, f"TOFU {split}"))
        question = str(field(record, "question", index, f"TOFU {split}"))
        row: dict[str, Any] = {
            "prompt": _asked(question, template),
            "target": " " + target.strip(),
            "question": question,
            "answer": str(field(record, "answer", index, f"TOFU {split}")),
            "group": str(record.get("author", f"{split}-{index // authors}")),
            "id": f"{split}-{index}",
            "kind": "qa",
        }
        if wrong := record.get("perturbed_answer"):
            row["wrong"] = [
                " " + str(text).strip() for text in ([wrong] if isinstance(wrong, str) else wrong)
            ]
        if other := record.get("paraphrased_question"):
            row["paraphrases"] = [_asked(str(other), template)]
        made.append(row)
    return made


def prompts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "forget10",
    *,
    answer: str = "answer",
    template: str | None = TEMPLATE,
    **reading: Any,
) -> PromptSet:
    """One split as prompts, see `rows`.

    With ``chat_template=True`` the question itself is the user's turn. ``reading`` says how `PromptSet` reads the rows
    (``append_eos``, ``chat_template``, ``max_length``).
    """
    bare = None if reading.get("chat_template") else template
    made = rows(source, split, answer=answer, template=bare)
    return PromptSet(made, tokenizer, **{"name": f"tofu-{split}", **reading})


def wrong_answers(prompts: PromptSet) -> PromptSet:
    """The same questions with each of their wrong answers as the target, one row an answer.

    ``of`` is the index of the row in ``prompts``, which the truth ratio needs to bring them together again.

    Raises:
        PromptError: a row has no wrong answers.
    """
    made = []
    for index, row in enumerate(prompts.rows):
        if not row.get("wrong"):
            raise PromptError(
                f"{prompts!r}, item {index}: no wrong answers; take a split whose name ends in '_perturbed'."
            )
        made += [{**row, "target": text, "of": index} for text in row["wrong"]]
    return prompts.reread(made, f"{prompts.name}-wrong")


def _asked(question: str, template: str | None) -> str:
    return question if template is None else template.format(question=question)


def _records(source: str | Path, split: str) -> list[Record]:
    """The records of a split; those that the published files hold, or what a file of all of them marks."""
    place = Path(source)
    marked = place / "tofu_full.jsonl"
    whole = split.removesuffix("_perturbed")
    if not marked.is_file() or split.startswith(("real", "world", "retain_", "holdout")):
        return records(source, split)
    everything = records(marked)
    if split.endswith("_perturbed"):
        perturbed = {r.get("question"): r for r in records(source, "forget10_perturbed")}
        chosen = [record for record in everything if record.get(whole)]
        for index, record in enumerate(chosen):
            if (question := field(record, "question", index, marked.name)) not in perturbed:
                raise PromptError(
                    f"forget10_perturbed of {source} lacks the question {question!r}."
                )
        return [{**perturbed[r["question"]], "author": r.get("author", "")} for r in chosen]
    if split == "full":
        return everything
    if split.startswith("forget"):
        return [record for record in everything if record.get(split)]
    complement = {"retain90": "forget10", "retain95": "forget05", "retain99": "forget01"}[split]
    return [record for record in everything if not record.get(complement)]
