"""CounterFact: facts with a false counterpart, paraphrases, and neighbours that share the true answer.

Paper: Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv:2202.05262), section 3.3.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from locate_edit.datasets._source import Record, field, records
from locate_edit.errors import PromptError
from locate_edit.prompts import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["HUB", "neighbours", "prompts", "rows"]

HUB = "azhx/counterfact"
NAMES = ("counterfact", "counterfact_1000")


def rows(source: str | Path = HUB) -> list[dict[str, Any]]:
    """A row a case: the true answer is the target; the new one is ``alternative`` and first of ``wrong``.

    ``paraphrases`` and ``neighbours`` are prompts; neighbours have the same true answer about other subjects.

    Args:
        source: a folder or file, in the layout of the published JSON (``requested_rewrite``), that of
            `NeelNanda/counterfact-tracing` (without paraphrases and neighbours) or flat, or a hub name.

    Raises:
        PromptError: a source that is not there, or a record without the fields of a case.
    """
    made = []
    for index, record in enumerate(records(source, *NAMES, hub="default")):
        case = _flat(record)
        subject = str(field(case, "subject", index, "CounterFact"))
        template = str(field(case, "prompt", index, "CounterFact"))
        true, new = (
            " " + str(field(case, name, index, "CounterFact")).strip()
            for name in ("target_true", "target_new")
        )
        if "{}" not in template:
            raise PromptError(
                f"CounterFact, record {index}: expected {{}} for the subject in 'prompt', got {template!r}."
            )
        made.append(
            {
                "prompt": template.replace("{}", subject),
                "target": true,
                "alternative": new,
                "wrong": [new],
                "subject": subject,
                "paraphrases": list(case.get("paraphrase_prompts", ())),
                "neighbours": list(case.get("neighborhood_prompts", ())),
                "generation": list(case.get("generation_prompts", ())),
                "relation": case.get("relation", ""),
                "group": str(case.get("case_id", index)),
                "id": str(case.get("case_id", index)),
            }
        )
    return made


def prompts(source: str | Path, tokenizer: PreTrainedTokenizerBase, **reading: Any) -> PromptSet:
    """The cases as prompts, see `rows`; ``reading`` says how `PromptSet` reads them."""
    return PromptSet(rows(source), tokenizer, **{"name": "counterfact", **reading})


def neighbours(prompts: PromptSet) -> PromptSet:
    """The neighbourhood prompts of the cases, with the answers of the case each belongs to.

    ``of`` is the index of the case in ``prompts``.

    Raises:
        PromptError: no case has any.
    """
    made = [
        {
            "prompt": text,
            "target": row["target"],
            "alternative": row["alternative"],
            "wrong": row["wrong"],
            "group": row["group"],
            "of": index,
        }
        for index, row in enumerate(prompts.rows)
        for text in row.get("neighbours", ())
    ]
    if not made:
        raise PromptError(f"{prompts!r} has no neighbourhood prompts.")
    return prompts.reread(made, f"{prompts.name}-neighbours")


def _flat(record: Record) -> Record:
    """A case with its rewrite's fields at the top, whichever way it was stored."""
    if "relation_prefix" in record and "target_false" in record:
        return _of_tracing(record)
    rewrite = record.get("requested_rewrite")
    if not isinstance(rewrite, dict):
        return record
    answers = {
        name: value["str"] if isinstance(value, dict) else value
        for name, value in rewrite.items()
        if name in ("target_true", "target_new")
    }
    return {**record, **rewrite, **answers, "relation": rewrite.get("relation_id", "")}


def _of_tracing(record: Record) -> Record:
    """A case of `NeelNanda/counterfact-tracing`, where the space before a subject is part of it."""
    subject = str(record.get("subject", ""))
    before = record["relation_prefix"] + subject[: len(subject) - len(subject.lstrip())]
    return {
        **record,
        "subject": subject.strip(),
        "prompt": f"{before}{{}}{record.get('relation_suffix', '')}",
        "target_new": record["target_false"],
        "relation": record.get("relation_id", ""),
    }
