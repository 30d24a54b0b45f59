"""A report in words: the summary paragraph and the markdown form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from locate_edit.reports.report import Cell, Line, Report, number
from locate_edit.reports.side_effects import LEAST
from locate_edit.reports.states import TITLES

__all__ = ["NO_SIDE_EFFECTS", "SIDE_EFFECTS", "answers", "markdown", "summary"]

SIDE_EFFECTS = (
    "Of the {n:,} prompts outside the forget set, those whose likelihood (geometric mean of the probabilities of the "
    "answer's tokens) fell most. They are the extremes of many, so some fall by chance: what the random mask does to "
    "the same prompts tells how much of it any change of this size does."
)
"""What stands above the table of side effects; ``n`` is the number of prompts."""
NO_SIDE_EFFECTS = f"Of none of the {{n:,}} prompts outside the forget set the likelihood fell by {LEAST:g} or more."
"""What stands in its place where there are none."""


# The distance headline has its own sentence; these are not the metric the other sentences are about.
_DISTANCES = ("oracle_distance", "oracle_kl")
_BETTER = {
    "up": "larger",
    "down": "smaller",
    "distance": "(smaller: closer)",
    "closeness": "(larger: closer)",
}


def summary(report: Report) -> str:
    """What was changed, what became of the prompts to forget, how that compares, and what else moved."""
    return " ".join(answers(report).values())


def answers(report: Report) -> dict[str, str]:
    """The same, each part under the question that it answers."""
    found = {
        "What was changed?": _what(report.mask, report.edit, report.model),
        "Is it forgotten?": _forgetting(report),
        "Did the place matter?": _control(report),
        "Is it as if it had never been learned?": _distance(report),
        "What else changed?": _elsewhere(report),
    }
    return {question: said for question, said in found.items() if said}


def _what(mask: Mapping[str, Any], edit: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    name = str(model.get("name") or model.get("class") or "the model")
    if not edit:
        return f"Measured on {name}, without an edit."
    method = str(edit.get("method", {}).get("name", "The edit"))
    if not mask:
        return f"{method} was free to change all weights of {name}."
    share = mask.get("fraction_of_parameters")
    part = f", {share:.2%} of its parameters" if isinstance(share, float) else ""
    kinds = " and ".join(str(kind) for kind in mask.get("kinds", ())) or "unit"
    plural = "s" if mask.get("units") != 1 else ""
    return f"{method} changed only {mask.get('units'):,} of the {mask.get('of'):,} {kinds}{plural} of {name}{part}."


def _headline(report: Report, prompts: str) -> Line | None:
    """The first metric of a set that has a number before and after."""
    for line in report.of_set(prompts):
        states = (line.value("before"), line.value("after"))
        if line.metric not in _DISTANCES and None not in states:
            return line
    return None


def _forgetting(report: Report) -> str:
    line = _headline(report, "forget")
    if line is None:
        return ""
    items = report.sets.get("forget", {}).get("items", line.cells["after"].items)
    text = (
        f"On the {items} prompt{'s' if items != 1 else ''} to forget, the {line.title} went from "
        f"{line.cells['before']} to {line.cells['after']}"
    )
    if (oracle := line.value("oracle")) is not None:
        text += f"; a model that never learned them has {number(oracle)}"
        if _overshoots(line):
            text += ", so the edit went further than never having learned them, which is damage and can be noticed"
    return text + "."


def _overshoots(line: Line) -> bool:
    """Whether the edit moved the number past the never-learned one by a tenth of the way or more."""
    before, after, oracle = (line.value(c) or 0.0 for c in ("before", "after", "oracle"))
    way = oracle - before
    return way != 0 and (after - oracle) / way > 0.1


def _control(report: Report) -> str:
    line = _headline(report, "forget")
    if line is None or line.value("random") is None:
        return ""
    before, after, random = (line.value(c) or 0.0 for c in ("before", "after", "random"))
    said = (
        f"The same method on a random mask of the same size and kind gives {line.cells['random']}"
    )
    if abs(after - before) <= LEAST * abs(before):
        return f"{said}. The edit itself changed next to nothing, so there is nothing to compare."
    share = (random - before) / (after - before)
    if share >= 0.8:
        return f"{said}: {_cost_elsewhere(report)}."
    if share <= 0.2:
        return f"{said}: the place mattered."
    return f"{said}, {share:.0%} of the change: the place mattered in part."


def _cost_elsewhere(report: Report) -> str:
    """What an equal effect on the forget set says about the place, from what the random mask cost elsewhere.

    Looks at the sets that the edit itself left within a twentieth of what they were.
    """
    for name in report.set_names:
        line = _headline(report, name) if name != "forget" else None
        if line is None or line.value("random") is None:
            continue
        before, after, random = (line.value(c) or 0.0 for c in ("before", "after", "random"))
        if abs(after - before) <= 0.05 * abs(before) < abs(random - before):
            return (
                f"as much, but at a price that the mask does not have: {name} {line.title} goes from "
                f"{number(before)} to {number(random)}, with the mask to {number(after)}"
            )
    return "the place made little difference, so this result does not show that the mask was well chosen"


def _distance(report: Report) -> str:
    lines = [line for line in report.of_set("forget") if line.metric == "oracle_distance"]
    if not lines or lines[0].value("after") is None:
        return ""
    line = lines[0]
    after, before = line.value("after") or 0.0, line.value("before")
    was = "" if before is None else f" (before: {number(before)})"
    if before is not None and after > 0.9 * before:
        verdict = (
            "no nearer than before the edit. Where a model that never learned them makes a confident guess of its own, "
            "forgetting does not bring another model to the same guess"
        )
    elif after <= 1.0:
        verdict = "it cannot be told from a retrained model by this measure"
    elif after <= 2.0:
        verdict = "close to a retrained model"
    else:
        verdict = "still far from a retrained model"
    return (
        f"Its distance from a model retrained without these prompts is {number(after)}{was}, where 1.0 is the distance "
        f"between two such models: {verdict}."
    )


def _elsewhere(report: Report) -> str:
    moved = []
    for name in report.set_names:
        line = _headline(report, name) if name != "forget" else None
        if line is not None:
            moved.append(
                f"{name} {line.title} {number(line.value('before'))} to {number(line.value('after'))}"
            )
    return f"Elsewhere: {'; '.join(moved)}." if moved else ""


def markdown(report: Report) -> str:
    """Title, summary, one table a prompt set, examples, notes and how to undo."""
    parts = ["# What the edit did", "", report.summary, ""]
    for name in report.set_names:
        lines = [line for line in report.of_set(name) if line.shown]
        if not lines:
            continue
        items = report.sets.get(name, {}).get("items")
        parts += [f"## {_cell(name)}" + (f" ({items} prompts)" if items is not None else ""), ""]
        head = ["metric", "known better when", *(TITLES[column] for column in report.columns)]
        parts += [_row(head), _row(["---", "---", *(["---:"] * len(report.columns))])]
        for line in lines:
            cells = [str(line.cells.get(column, Cell(None))) for column in report.columns]
            parts.append(_row([f"{line.title} ({line.unit})", _BETTER[line.direction], *cells]))
        parts.append("")
    if report.examples:
        parts += ["## What the model says", ""]
        states = [c for c in report.columns if any(c in e.outputs for e in report.examples)]
        head = ["prompts", "prompt", "target", *(TITLES[column] for column in states)]
        parts += [_row(head), _row(["---"] * len(head))]
        for example in report.examples:
            said = [example.outputs.get(column, "") for column in states]
            parts.append(_row([example.prompts, example.prompt, example.target, *said]))
        parts.append("")
    parts += _side_effects(report)
    parts += ["## Definitions", ""]
    defined = {line.title: f"{line.definition} [{line.unit}]" for line in report.lines}
    parts += [f"- **{_cell(title)}**: {_cell(text)}" for title, text in defined.items()]
    parts.append("")
    notes = [*report.notes, *(f"{key}, {column}: {why}" for key, column, why in report.withheld())]
    if notes:
        parts += ["## Notes", "", *(f"- {_cell(note)}" for note in notes), ""]
    if report.undo:
        parts += ["## Undo", "", "```", *report.undo, "```", ""]
    return "\n".join(parts)


def _side_effects(report: Report) -> list[str]:
    if report.side_effects is None or not report.n_elsewhere:
        return []
    if not report.side_effects:
        return ["## What else changed", "", NO_SIDE_EFFECTS.format(n=report.n_elsewhere), ""]
    states = [c for c in TITLES if any(c in e.likelihood for e in report.side_effects)]
    head = ["prompts", "prompt", "answer", *(TITLES[column] for column in states)]
    parts = ["## What else changed", "", SIDE_EFFECTS.format(n=report.n_elsewhere), ""]
    parts += [_row(head), _row(["---", "---", "---", *(["---:"] * len(states))])]
    for effect in report.side_effects:
        numbers = [number(effect.likelihood.get(column)) for column in states]
        parts.append(_row([effect.prompts, effect.prompt, effect.target, *numbers]))
    return [*parts, ""]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Text that cannot break out of its place in a markdown table."""
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return " ".join(safe.replace("|", "\\|").split())
