"""A report in words: the summary paragraph and the markdown form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from locate_edit.reports.report import Cell, Line, Report, SideEffect, number, signed
from locate_edit.reports.side_effects import LEAST
from locate_edit.reports.states import TITLES

__all__ = ["answers", "markdown", "remarks", "side_effects_in_words", "summary", "where_in_words"]

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
    added = _added(edit)
    if edit.get("entries_changed") == 0:
        if not added:
            return f"{method} changed nothing: every weight of {name} is bit for bit as it was."
        return f"{method} changed no weight of {name}. It added: {added}."
    more = f" It added: {added}." if added else ""
    if not mask:
        return f"{method} was free to change all weights of {name}.{more}"
    share = mask.get("fraction_of_parameters")
    part = f", {share:.2%} of its parameters" if isinstance(share, float) else ""
    units, of = mask.get("units"), mask.get("of")
    kinds = [str(kind) for kind in mask.get("kinds", ())] or ["unit"]
    what = " and ".join(kind if of == 1 else f"{kind}s" for kind in kinds)
    count = f"all {of:,}" if units == of else f"only {units:,} of the {of:,}"
    return f"{method} changed {count} {what} of {name}{part}.{more}"


def _added(edit: Mapping[str, Any]) -> str:
    """What an edit added to the model beside its weights, in a few words."""
    parts = [str(part) for part in edit.get("additions", ())]
    if len(parts) > 3:
        parts = [*parts[:2], f"{len(parts) - 2} more of them"]
    return ", ".join(parts)


def where_in_words(report: Report) -> str:
    """What became of the weights outside the places that the mask names."""
    if report.edit.get("entries_changed") == 0:
        return "No weight was changed: all of them are bit for bit as they were."
    return "Every weight outside these places is bit for bit as it was."


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
    """How far it is from a retrained model; of the two forms of the distance the one with a unit, if there is one."""
    lines = {line.metric: line for line in report.of_set("forget") if line.metric in _DISTANCES}
    found = [lines[name] for name in _DISTANCES if name in lines]
    line = next((each for each in found if each.value("after") is not None), None)
    if line is None:
        return ""
    after, before = line.cells["after"], line.cells.get("before", Cell(None))
    was = "" if before.value is None else f" (before: {before})"
    said = "Its distance from a model retrained without these prompts is"
    far = _no_nearer(report, after, before)
    doubt = (
        ", though this interval and that before the edit overlap" if _overlap(after, before) else ""
    )
    if line.metric == "oracle_distance":
        verdict = far or f"{_closeness(after.value or 0.0)}{doubt}"
        return f"{said} {after}{was}, where 1.0 is the distance between two such models: {verdict}."
    return (
        f"{said} {after} {line.unit}{was}{f': {far}' if far else doubt}. How near that is takes a second retrained "
        "model to tell: the distance between two of them is the unit."
    )


def _closeness(distance: float) -> str:
    """A distance in units of that between two retrained models, in words."""
    if distance <= 1.0:
        return "it cannot be told from a retrained model by this measure"
    return "close to a retrained model" if distance <= 2.0 else "still far from a retrained model"


def _no_nearer(report: Report, after: Cell, before: Cell) -> str:
    """That an edit brought a model no nearer to a retrained one, or hardly; nothing where it did by a tenth."""
    if after.value is None or before.value is None or after.value <= 0.9 * before.value:
        return ""
    said = f"{'no' if after.value > (1 - LEAST) * before.value else 'hardly'} nearer than before the edit"
    line = _headline(report, "forget")
    if line is None or not _fell(line):
        return said
    return (
        f"{said}, although the prompts are known less well. Where a model that never learned them makes a confident "
        "guess of its own, forgetting does not bring another model to the same guess"
    )


def _overlap(one: Cell, other: Cell) -> bool:
    """Whether two intervals overlap."""
    ends = (one.low, one.high, other.low, other.high)
    low, high, least, most = (end if end is not None else math.nan for end in ends)
    return low <= most and least <= high


def _fell(line: Line) -> bool:
    """Whether the texts are known less well after the edit, by a tenth or more."""
    before, after = (line.value(c) or 0.0 for c in ("before", "after"))
    return before <= 0.9 * after if line.direction == "down" else after <= 0.9 * before


def _elsewhere(report: Report) -> str:
    moved = []
    for name in report.set_names:
        line = _headline(report, name) if name != "forget" else None
        if line is not None:
            moved.append(
                f"{name} {line.title} {number(line.value('before'))} to {number(line.value('after'))}"
            )
    said = [f"Elsewhere: {'; '.join(moved)}."] if moved else []
    if report.side_effects:
        worst = report.side_effects[0]
        before, after = (number(worst.likelihood[c]) for c in ("before", "after"))
        said.append(
            f"Of single prompts \u201c{_short(worst)}\u201d ({worst.prompts}) changed most, from {before} to {after}."
        )
    elif report.side_effects is not None and report.n_elsewhere:
        said.append(side_effects_in_words(report))
    return " ".join(said)


def _short(effect: SideEffect, most: int = 60) -> str:
    """The words of a prompt and its answer, the end of them where they are long."""
    text = " ".join(f"{effect.prompt}{effect.target}".split())
    return text if len(text) <= most else f"\u2026{text[-most:]}"


def side_effects_in_words(report: Report) -> str:
    """What stands above the table of the prompts outside the forget set that changed most, or in its place."""
    if not report.side_effects:
        return (
            f"Of none of the {report.n_elsewhere:,} prompts outside the forget set the likelihood changed by "
            f"{LEAST:g} or more."
        )
    said = (
        f"Of the {report.n_elsewhere:,} prompts outside the forget set, those whose likelihood (geometric mean of the "
        "probabilities of the answer's tokens) changed most, whether it fell or rose. They are the extremes of many, "
        "so some of this is chance"
    )
    if not any("random" in effect.likelihood for effect in report.side_effects):
        return f"{said}."
    return f"{said}: what the random mask does to the same prompts tells how much of it any edit of this size does."


def remarks(report: Report) -> list[str]:
    """What a reader must know about the numbers: each remark once, with the lines and states that it is about."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in report.lines:
        for column, cell in line.cells.items():
            for said in (cell.note, cell.withheld and f"not measured; {cell.withheld}"):
                if said:
                    found.setdefault(said, {}).setdefault(line.key, []).append(TITLES[column])
    remarked = []
    for said, where in found.items():
        # Lines that it is about in the same states share a remark.
        together: dict[tuple[str, ...], list[str]] = {}
        for key, states in where.items():
            together.setdefault(tuple(states), []).append(key)
        remarked += [
            f"{', '.join(keys)} ({', '.join(states)}): {said}" for states, keys in together.items()
        ]
    return list(dict.fromkeys([*report.notes, *remarked]))


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
    if notes := remarks(report):
        parts += ["## Notes", "", *(f"- {_cell(note)}" for note in notes), ""]
    if report.undo:
        parts += ["## Undo", "", "```", *report.undo, "```", ""]
    return "\n".join(parts)


def _side_effects(report: Report) -> list[str]:
    if report.side_effects is None or not report.n_elsewhere:
        return []
    parts = ["## What else changed", "", side_effects_in_words(report), ""]
    if not report.side_effects:
        return parts
    states = [c for c in TITLES if any(c in e.likelihood for e in report.side_effects)]
    head = ["prompts", "prompt", "answer", "change", *(TITLES[column] for column in states)]
    parts += [_row(head), _row(["---", "---", "---", *(["---:"] * (1 + len(states)))])]
    for effect in report.side_effects:
        numbers = [number(effect.likelihood.get(column)) for column in states]
        parts.append(
            _row([effect.prompts, effect.prompt, effect.target, signed(effect.change), *numbers])
        )
    return [*parts, ""]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Text that cannot break out of its place in a markdown table."""
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return " ".join(safe.replace("|", "\\|").split())
