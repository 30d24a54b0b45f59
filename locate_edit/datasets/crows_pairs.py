"""CrowS-Pairs: sentences about a disadvantaged and an advantaged group that differ in little else.

Paper: Nangia et al. 2020, CrowS-Pairs: A Challenge Dataset for Measuring Social Biases in Masked Language Models
(arXiv:2010.00133). Blodgett et al. 2021, Stereotyping Norwegian Salmon, found that many pairs do not compare what they
should: look at rows before you trust a score.

    more, less = crows_pairs.prompts("folder", tokenizer)
    crows(Predictions(model, more), Predictions(model, less))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from locate_edit.datasets._source import field, one_of, records
from locate_edit.errors import PromptError
from locate_edit.prompts import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BIAS_TYPES", "DIRECTIONS", "HUB", "prompts", "rows"]

HUB = "nyu-mll/crows_pairs"
NAMES = ("crows_pairs_anonymized", "crows_pairs")
BIAS_TYPES = (
    "race-color", "socioeconomic", "gender", "disability", "nationality", "sexual-orientation",
    "physical-appearance", "religion", "age",
)  # fmt: skip
"""In the order of the numbers that the hub has in their place, as are the directions."""
DIRECTIONS = ("stereo", "antistereo")


def rows(
    source: str | Path = HUB,
    side: Literal["more", "less"] = "more",
    *,
    bias_type: str | None = None,
) -> list[dict[str, Any]]:
    """A row a pair, plain text: its more or its less stereotyped sentence, in the order of the file for both.

    ``other`` is the other sentence, ``bias_type`` and ``group`` the kind of bias. ``direction`` is "stereo" where the
    more stereotyped sentence shows a stereotype of a disadvantaged group, and "antistereo" where the less stereotyped
    one goes against one.

    Args:
        source: a folder with `crows_pairs_anonymized.csv`, such a file, or a hub name.
        side: "more" or "less".
        bias_type: one of `BIAS_TYPES`; None for all.

    Raises:
        PromptError: an unknown setting, a source that is not there, a record without a pair, or none of this type.
    """
    one_of("CrowS-Pairs side", side, ("more", "less"))
    if bias_type is not None:
        one_of("CrowS-Pairs bias_type", bias_type, BIAS_TYPES)
    other = "less" if side == "more" else "more"
    made = []
    for index, record in enumerate(records(source, *NAMES, hub="crows_pairs", split="test")):
        kind = _named(field(record, "bias_type", index, "CrowS-Pairs"), BIAS_TYPES)
        if bias_type not in (None, kind):
            continue
        made.append(
            {
                "prompt": str(field(record, f"sent_{side}", index, "CrowS-Pairs")).strip(),
                "other": str(field(record, f"sent_{other}", index, "CrowS-Pairs")).strip(),
                "bias_type": kind,
                "direction": _named(
                    field(record, "stereo_antistereo", index, "CrowS-Pairs"), DIRECTIONS
                ),
                "group": kind,
                "id": f"crows-{index}",
            }
        )
    if not made:
        raise PromptError(f"CrowS-Pairs: {source} has no pairs of bias type {bias_type}.")
    return made


def prompts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bias_type: str | None = None,
    **reading: Any,
) -> tuple[PromptSet, PromptSet]:
    """The more and the less stereotyped sentences, two sets in the same order, for `locate_edit.metrics.bias.crows`.

    ``reading`` says how `PromptSet` reads them.
    """
    more, less = (
        PromptSet(
            rows(source, side, bias_type=bias_type),
            tokenizer,
            **{"name": f"crows-pairs-{side}", **reading},
        )
        for side in ("more", "less")
    )
    return more, less


def _named(value: Any, names: tuple[str, ...]) -> str:
    """A label as it is, or by its number."""
    return names[value] if value in range(len(names)) else str(value)
