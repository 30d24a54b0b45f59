"""A report as one HTML page that explains itself to someone who did not run it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from locate_edit.reports.report import Cell, Line, Report, number, without_doubles
from locate_edit.reports.states import COLUMNS, TITLES
from locate_edit.reports.text import NO_SIDE_EFFECTS, SIDE_EFFECTS, answers

if TYPE_CHECKING:
    from locate_edit.reports.examination import Examination
    from locate_edit.reports.layers import Layers
    from locate_edit.reports.robustness import Robustness, Trial

__all__ = ["at_a_glance", "page", "tables", "whole_page"]

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #202124; max-width: 62rem; margin: 2rem auto; padding: 0
1.25rem; } h1 { font-size: 1.7rem; margin-bottom: .4rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.summary { background: #f1f6fb; border-left: 4px solid #0072B2; padding: .6rem 1.1rem .9rem; border-radius: 4px; }
.summary dd { margin-left: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1rem; font-size: .93rem; }
th, td { padding: .38rem .7rem; border-bottom: 1px solid #e3e6ea; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #c4c9cf; font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
td small { display: block; color: #5f6368; } .muted, small { color: #5f6368; }
tr.set td { background: #f7f8fa; font-weight: 600; }
code, pre { font: .88rem/1.45 ui-monospace, monospace; } pre { background: #f7f8fa; padding: .8rem 1rem; overflow-x:
auto; } img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
td code { display: inline-block; min-width: 6.3rem; overflow-wrap: anywhere; }
td.q { min-width: 11rem; } td.a { min-width: 13rem; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0 0 .3rem 1.2rem; }
"""

_BETTER = {
    "up": "larger",
    "down": "smaller",
    "distance": "(smaller: closer)",
    "closeness": "(larger: closer)",
}
_ATTACKS = (
    "What an edit took may only be hidden. Each attack tries to bring the answers back, told nothing of the edit. "
    "Bold: what it gets out of the model, larger is more, with its 95% interval over prompts; below it what the model "
    "says without the attack, and what becomes of prompts that it should answer anyway. An attack counts only where it "
    "finds what is surely hidden, a control made for it; and only what it gets beyond a model that never knew is "
    "knowledge."
)
_LAYERS = (
    "The answers may be silenced at the end and still be there on the way. So the inner state of a model is put into "
    "the original model after one layer at a time: where that goes on to give the answer, the layer still carried it. "
    "Layers below the lowest edited one are as they were. Hatched cells say nothing, because answers that every model "
    "knows are lost there too."
)
_COLUMN_HELP = {
    "before": "the model as it was",
    "after": "the model with the edit",
    "random": "the same method on as many randomly chosen places: what the edit does by its size alone",
    "oracle": "a model trained the same way without the prompts to forget: the target",
}


def page(report: Report, images: Mapping[str, bytes]) -> str:
    """The page of a report, with its style and the given figures (PNG, by name) inside."""
    return _whole(
        "What the edit did",
        [
            at_a_glance(answers(report)),
            _examples(report),
            "<h2>Figures</h2>" if images else "",
            *(_figure(name, image) for name, image in images.items()),
            _numbers(report),
            _side_effects(report),
            _where(report),
            _undo(report),
            _definitions(report),
            _notes(report),
            _settings(report),
        ],
    )


def whole_page(found: Examination, images: Mapping[str, bytes]) -> str:
    """The page of an examination: the answers, then what they rest on, and at the end what a specialist wants."""
    report, pictures = found.report, dict(images)

    def figures(*names: str) -> str:
        return "".join(_figure(name, pictures.pop(name)) for name in names if name in pictures)

    relearned = [name for name in pictures if name.startswith("relearning")]
    return _whole(
        "What the edit did, and whether it lasts",
        [
            at_a_glance(found.answers),
            _examples(report),
            _numbers(report),
            figures("before_after", "oracle_distance"),
            "" if found.robustness is None else _attacks(found.robustness),
            figures("attacks", *relearned),
            "" if found.layers is None else _layers(found.layers),
            figures("carried", "lens"),
            _side_effects(report),
            _where(report),
            figures("weight_change"),
            *(_figure(name, image) for name, image in pictures.items()),
            _undo(report),
            _definitions(report),
            _notes(report, found.notes),
            _settings(report),
        ],
    )


def at_a_glance(found: Mapping[str, str]) -> str:
    """Questions and their answers."""
    parts = "".join(f"<dt>{escape(q)}</dt><dd>{escape(said)}</dd>" for q, said in found.items())
    return f'<dl class="summary">{parts}</dl>'


def _numbers(report: Report) -> str:
    return f"<h2>Numbers</h2>{_columns_help(report)}{tables(report)}"


def _attacks(found: Robustness) -> str:
    """A row for each attack: what it measures without and under it, in every state of the model."""
    states = [state for state in COLUMNS if state in found.models]
    head = "".join(f'<th class="n">{escape(TITLES[state])}</th>' for state in states)
    rows = []
    for trial in found.trials:
        title = f'<td class="a">{escape(trial.title)}<small>{escape(trial.does)}</small></td>'
        if trial.withheld:
            why = f"no number: {trial.withheld}"
            rows.append(
                f'<tr>{title}<td class="muted" colspan="{len(states) + 1}">{escape(why)}</td></tr>'
            )
            continue
        cells = "".join(_attacked(trial, state) for state in states)
        rows.append(f"<tr>{title}{cells}<td>{escape(trial.outcome())}</td></tr>")
    return (
        f"<h2>Is it gone, or only hidden?</h2><p>{escape(_ATTACKS)}</p>"
        f'<div class="wide"><table><thead><tr><th>attack</th>{head}<th>what it shows</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _attacked(trial: Trial, state: str) -> str:
    """The measure under an attack with its interval, and small below it that without the attack and that on retain."""
    found = trial.found.get(state)
    if found is None:
        return f'<td class="n muted" title="{escape(trial.failed.get(state, ""))}">-</td>'
    span = found.forget.interval()
    under = number(found.forget.estimate)
    between = "" if span is None else f" [{number(span[0])}, {number(span[1])}]"
    small = [f"without: {number(found.forget_clean.estimate)}"]
    if found.retain is not None and found.retain_clean is not None:
        kept = f"{number(found.retain_clean.estimate)} to {number(found.retain.estimate)}"
        small.append(f"retain: {kept}")
    below = "".join(f"<small>{escape(each)}</small>" for each in small)
    return f'<td class="n"><b>{under}</b>{escape(between)}{below}</td>'


def _layers(found: Layers) -> str:
    depth = f"<p>{escape(found.depth_in_words())}</p>" if found.depth is not None else ""
    return f"<h2>Where is it still?</h2><p>{escape(_LAYERS)}</p><p>{escape(found.in_words())}</p>{depth}"


def _whole(title: str, body: Sequence[str]) -> str:
    body = [f"<h1>{escape(title)}</h1>", *body]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def tables(report: Report) -> str:
    """The table of numbers: a block of rows for each prompt set."""
    head = "".join(f'<th class="n">{escape(TITLES[column])}</th>' for column in report.columns)
    rows = []
    for name in report.set_names:
        lines = without_doubles(report.of_set(name))
        if not lines:
            continue
        items = report.sets.get(name, {}).get("items")
        label = escape(name) + (f' <span class="muted">({items} prompts)</span>' if items else "")
        rows.append(f'<tr class="set"><td colspan="{2 + len(report.columns)}">{label}</td></tr>')
        rows += [_row(report, line) for line in lines]
    return (
        f'<div class="wide"><table><thead><tr><th>metric</th><th>known better when</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(report: Report, line: Line) -> str:
    cells = "".join(_number(line.cells.get(column, Cell(None))) for column in report.columns)
    better = _BETTER[line.direction]
    return (
        f'<tr><td title="{escape(line.definition)}">{escape(line.title)} '
        f"<small>{escape(line.unit)}</small></td><td>{better}</td>{cells}</tr>"
    )


def _number(cell: Cell) -> str:
    if cell.value is None:
        return f'<td class="n muted" title="{escape(cell.withheld)}">-</td>'
    span = ""
    if cell.low is not None and cell.high is not None:
        span = f"<small>{number(cell.low)} to {number(cell.high)}</small>"
    return f'<td class="n" title="{escape(cell.note)}">{number(cell.value)}{span}</td>'


def _columns_help(report: Report) -> str:
    parts = [
        f"<dt>{escape(TITLES[column])}</dt><dd>{escape(_COLUMN_HELP[column])}</dd>"
        for column in report.columns
    ]
    return f"<dl>{''.join(parts)}</dl>"


def _figure(name: str, image: bytes) -> str:
    code = base64.b64encode(image).decode("ascii")
    alt = escape(name.replace("_", " "))
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{code}"></figure>'


def _examples(report: Report) -> str:
    if not report.examples:
        return ""
    states = [c for c in report.columns if any(c in e.outputs for e in report.examples)]
    head = "".join(f"<th>{escape(TITLES[column])}</th>" for column in states)
    rows = "".join(
        f"<tr><td>{escape(example.prompts)}</td>"
        f'<td class="q"><code>{escape(example.prompt)}</code></td>'
        f"<td><code>{escape(example.target)}</code></td>"
        + "".join(f"<td><code>{escape(example.outputs.get(c, ''))}</code></td>" for c in states)
        + "</tr>"
        for example in report.examples
    )
    return (
        "<h2>What the model says</h2><p>The most probable continuation of a few prompts.</p>"
        f'<div class="wide"><table><thead><tr><th>prompts</th><th>prompt</th><th>true</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _side_effects(report: Report) -> str:
    if report.side_effects is None or not report.n_elsewhere:
        return ""
    if not report.side_effects:
        none = NO_SIDE_EFFECTS.format(n=report.n_elsewhere)
        return f"<h2>What else changed</h2><p>{escape(none)}</p>"
    states = [c for c in TITLES if any(c in e.likelihood for e in report.side_effects)]
    head = "".join(f'<th class="n">{escape(TITLES[column])}</th>' for column in states)
    rows = "".join(
        f"<tr><td>{escape(effect.prompts)}</td>"
        f'<td class="q"><code>{escape(effect.prompt)}</code></td>'
        f"<td><code>{escape(effect.target)}</code></td>"
        + "".join(f'<td class="n">{number(effect.likelihood.get(c))}</td>' for c in states)
        + "</tr>"
        for effect in report.side_effects
    )
    return (
        f"<h2>What else changed</h2><p>{escape(SIDE_EFFECTS.format(n=report.n_elsewhere))}</p>"
        f'<div class="wide"><table><thead><tr><th>prompts</th><th>prompt</th><th>answer</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _where(report: Report) -> str:
    sites = report.mask.get("sites")
    if not isinstance(sites, dict) or not sites:
        return ""
    rows = "".join(
        f'<tr><td>{escape(str(site))}</td><td class="n">{count}</td></tr>'
        for site, count in sites.items()
        if count
    )
    return (
        "<h2>Where the model was changed</h2><p>Everything outside these places is bit for bit as it was.</p>"
        f"<table><thead><tr><th>place</th><th class='n'>units</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _undo(report: Report) -> str:
    if not report.undo:
        return ""
    return f"<h2>Undo</h2><pre>{escape(chr(10).join(report.undo))}</pre>"


def _definitions(report: Report) -> str:
    defined = {line.title: f"{line.definition} Unit: {line.unit}." for line in report.lines}
    parts = (f"<dt>{escape(title)}</dt><dd>{escape(text)}</dd>" for title, text in defined.items())
    return f"<h2>What the numbers are</h2><dl>{''.join(parts)}</dl>"


def _notes(report: Report, more: Sequence[str] = ()) -> str:
    notes = [*report.notes, *more]
    for line in report.lines:
        notes += [f"{line.key}, {TITLES[c]}: {n.note}" for c, n in line.cells.items() if n.note]
    notes += [
        f"{key}, {TITLES[column]}: not measured; {why}" for key, column, why in report.withheld()
    ]
    if not notes:
        return ""
    # The same remark about every state is one remark.
    return (
        f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(n)}</li>' for n in dict.fromkeys(notes))}</ul>"
    )


def _settings(report: Report) -> str:
    data = report.to_json()
    shown = {key: data[key] for key in ("edit", "mask", "model", "sets", "settings")}
    text = json.dumps(shown, indent=2, ensure_ascii=False)
    return f"<details><summary>Everything that was set</summary><pre>{escape(text)}</pre></details>"
