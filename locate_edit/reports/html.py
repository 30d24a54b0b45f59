"""A report as one HTML page that explains itself to someone who did not run it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from locate_edit.reports.layers import CARRIES, FITS
from locate_edit.reports.report import Cell, Line, Report, number, signed, without_doubles
from locate_edit.reports.robustness import BROKEN, Outcome
from locate_edit.reports.states import COLUMNS, TITLES
from locate_edit.reports.text import answers, remarks, side_effects_in_words, where_in_words

if TYPE_CHECKING:
    from locate_edit.reports.examination import Examination
    from locate_edit.reports.layers import Layers
    from locate_edit.reports.robustness import Robustness, Trial

__all__ = ["at_a_glance", "page", "tables", "whole_page"]

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #202124; max-width: 66rem; margin: 2rem auto; padding: 0
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
td.q { min-width: 11rem; } td.a { min-width: 12rem; } td.o { min-width: 11rem; }
td.w small { white-space: normal; min-width: 8rem; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0 0 .3rem 1.2rem; }
@media print { html, body { font-size: 11px; } body { max-width: none; margin: 0; padding: 0; }
.wide { overflow: visible; } tr, figure { break-inside: avoid; } }
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
    "gives without the attack, and what becomes of prompts that it should answer anyway. The control is a model that "
    "surely hides the answers: an attack counts only where it finds them there. Each interval is of one comparison: of "
    "many, one may lie above 0 by chance."
)
_MARGIN = " An attack that adds less than {margin:g} to its control has no number here."
_OUTCOMES: Mapping[Outcome, str] = {
    "brings answers back": "the attack adds to what the model gives without it, adds more than to a model that never "
    "knew (the oracle), and ends above that; the 95% intervals of all three differences lie above 0.",
    "rises": "the attack adds to what the model gives without it, but there is no oracle to tell whether it would add "
    "as much to a model that never knew.",
    "ends above the oracle": "the model gives more than the oracle under the attack, so something is left; that it was "
    "hidden, and that the attack brought it back, is not shown. Compare with what it gives without the attack.",
    "breaks the model": f"nothing came back, and of what the model should know anyway less than {BROKEN:.0%} is left: "
    "this says nothing about the edit.",
    "nothing shown": "none of the others, with so many prompts. Another attack, or more prompts, may show something.",
    "too few prompts": "it takes two to tell an interval.",
}
_LAYERS = (
    "The answers may be silenced at the end and still be there on the way. So the inner state of a model is put into "
    "the original model after one layer at a time: where that goes on to give the answers, with at least "
    f"{CARRIES:.0%} of their likelihood, the layer still carries them. Layers below the lowest edited one are as they "
    f"were. Where answers that every model knows keep less than {FITS:.0%} of their likelihood, the state does not fit "
    "into the original model, and nothing can be told (hatched)."
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
    """A row for each attack: what it shows, and what it measures without and under it in every state of the model."""
    states = [state for state in COLUMNS if state in found.models]
    head = "".join(f'<th class="n">{escape(TITLES[state])}</th>' for state in states)
    of = found.settings.get("forget", {}).get("prompts")
    rows = []
    for trial in found.trials:
        title = _small_print(f"{escape(trial.title)}", _tried(trial, of))
        if trial.withheld:
            why = f"no number: {trial.withheld}"
            cells = f'<td class="muted" colspan="{len(states) + 1}">{escape(why)}</td>'
        else:
            shown = _small_print(f"<b>{escape(trial.outcome())}</b>", _differences(trial))
            cells = f'<td class="o">{shown}</td>' + "".join(_attacked(trial, s) for s in states)
        rows.append(f'<tr><td class="a">{title}</td>{cells}</tr>')
    margin = found.settings.get("margin") if found.settings.get("controls") else None
    said = _ATTACKS + ("" if margin is None else _MARGIN.format(margin=margin))
    outcomes = {trial.outcome() for trial in found.trials}
    meaning = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
        for name, text in _OUTCOMES.items()
        if name in outcomes
    )
    return (
        f"<h2>Is it gone, or only hidden?</h2><p>{escape(said)}</p>"
        f'<div class="wide"><table><thead><tr><th>attack</th><th>what it shows of the edit</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{f'<dl>{meaning}</dl>' if meaning else ''}"
    )


def _small_print(first: str, below: Sequence[str]) -> str:
    """A cell: its first line (HTML), and small ones (text) below it."""
    return first + "".join(f"<small>{escape(each)}</small>" for each in below)


def _tried(trial: Trial, of: int | None) -> list[str]:
    """What an attack does, on how many prompts, and what it made of its control."""
    said = [trial.does]
    if trial.found:
        n = len(trial.found.get("after", next(iter(trial.found.values()))).forget)
        said.append(f"n = {n}" if of in (None, n) else f"n = {n} of the {of} prompts")
    if trial.control is not None:
        hidden, under = trial.control.forget_clean.estimate, trial.control.forget.estimate
        said.append(f"control: {_plain(hidden)} \u2192 {_plain(under)}")
    return [each for each in said if each]


def _differences(trial: Trial) -> list[str]:
    """What an outcome follows from: what the attack adds, and how the edited model stands beside the oracle."""
    given = {
        "adds": trial.gain(),
        "more than to the oracle": trial.gain_beyond(),
        "above the oracle": trial.beyond(),
    }
    said = [f"{what}: {_with_interval(each)}" for what, each in given.items() if each is not None]
    if (steps := trial.recovered()) is not None and steps > 0:
        said.append(f"half of what it gave before the edit is back after {steps:g} steps")
    return said


def _with_interval(found: tuple[float, float, float]) -> str:
    middle, low, high = map(_plain, found)
    return f"{middle if middle.startswith('-') else f'+{middle}'} ({low}\u00a0to\u00a0{high})"


def _plain(measure: float | None) -> str:
    """A measure of an attack, mostly between 0 and 1; smaller digits would only hide the others."""
    return "-" if measure is None else f"{round(measure, 3) + 0.0:.3f}"  # no "-0.000"


def _attacked(trial: Trial, state: str) -> str:
    """The measure under an attack with its interval, and small below it that without the attack and that on retain."""
    found = trial.found.get(state)
    if found is None or trial.reason(state):
        why = trial.reason(state)
        return f'<td class="n w muted">-<small>{escape(why)}</small></td>'
    span = found.forget.interval()
    small = [] if span is None else [f"{_plain(span[0])} to {_plain(span[1])}"]
    small.append(f"without: {_plain(found.forget_clean.estimate)}")
    if found.retain is not None and found.retain_clean is not None:
        kept = f"{_plain(found.retain_clean.estimate)} \u2192 {_plain(found.retain.estimate)}"
        small.append(f"retain: {kept}")
    return f'<td class="n">{_small_print(f"<b>{_plain(found.forget.estimate)}</b>", small)}</td>'


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
    said = f"<h2>What else changed</h2><p>{escape(side_effects_in_words(report))}</p>"
    if not report.side_effects:
        return said
    states = [c for c in TITLES if any(c in e.likelihood for e in report.side_effects)]
    head = "".join(f'<th class="n">{escape(TITLES[column])}</th>' for column in states)
    rows = "".join(
        f"<tr><td>{escape(effect.prompts)}</td>"
        f'<td class="q"><code>{escape(effect.prompt)}</code></td>'
        f"<td><code>{escape(effect.target)}</code></td>"
        f'<td class="n">{signed(effect.change)}</td>'
        + "".join(f'<td class="n">{number(effect.likelihood.get(c))}</td>' for c in states)
        + "</tr>"
        for effect in report.side_effects
    )
    return (
        f'{said}<div class="wide"><table><thead><tr><th>prompts</th><th>prompt</th><th>answer</th>'
        f'<th class="n">change</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _where(report: Report) -> str:
    added = [str(part) for part in report.edit.get("additions", ())]
    changed = report.edit.get("entries_changed") != 0
    sites = report.mask.get("sites") if changed else None
    places = {site: n for site, n in sites.items() if n} if isinstance(sites, dict) else {}
    if not (places or added or (report.edit and not changed)):
        return ""
    said = where_in_words(report) if places or not changed else ""
    if added:
        said += f" Added to the model: {', '.join(added)}."
    rows = "".join(
        f'<tr><td>{escape(str(site))}</td><td class="n">{n}</td></tr>' for site, n in places.items()
    )
    return f"<h2>Where the model was changed</h2><p>{escape(said.strip())}</p>" + (
        "<table><thead><tr><th>place</th><th class='n'>units</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
        if rows
        else ""
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
    notes = dict.fromkeys([*report.notes, *more, *remarks(report)])
    if not notes:
        return ""
    return f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"


def _settings(report: Report) -> str:
    data = report.to_json()
    shown = {key: data[key] for key in ("edit", "mask", "model", "sets", "settings")}
    text = json.dumps(shown, indent=2, ensure_ascii=False)
    return f"<details><summary>Everything that was set</summary><pre>{escape(text)}</pre></details>"
