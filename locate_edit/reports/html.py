"""A report as one HTML page that explains itself to someone who did not run it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape

from locate_edit.reports.report import Cell, Line, Report, number
from locate_edit.reports.states import TITLES
from locate_edit.reports.text import SIDE_EFFECTS

__all__ = ["page", "tables"]

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #202124; max-width: 62rem; margin: 2rem auto; padding: 0
1.25rem; } h1 { font-size: 1.7rem; margin-bottom: .4rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.summary { background: #f1f6fb; border-left: 4px solid #0072B2; padding: .9rem 1.1rem; border-radius: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1rem; font-size: .93rem; }
th, td { padding: .38rem .7rem; border-bottom: 1px solid #e3e6ea; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #c4c9cf; font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
td.n small { display: block; color: #5f6368; } .muted, small { color: #5f6368; }
tr.set td { background: #f7f8fa; font-weight: 600; }
code, pre { font: .88rem/1.45 ui-monospace, monospace; } pre { background: #f7f8fa; padding: .8rem 1rem; overflow-x:
auto; } img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
td code { overflow-wrap: anywhere; } td.q { min-width: 13rem; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0 0 .3rem 1.2rem; }
"""

_BETTER = {
    "up": "larger",
    "down": "smaller",
    "distance": "(smaller: closer)",
    "closeness": "(larger: closer)",
}
_COLUMN_HELP = {
    "before": "the model as it was",
    "after": "the model with the edit",
    "random": "the same method on as many randomly chosen places: what the edit does by its size alone",
    "oracle": "a model trained the same way without the prompts to forget: the target",
}


def page(report: Report, images: Mapping[str, bytes]) -> str:
    """The whole page, with its style and the given figures (PNG, by name) inside."""
    body = [
        "<h1>What the edit did</h1>",
        f'<p class="summary">{escape(report.summary)}</p>',
        _examples(report),
        _figures(images),
        "<h2>Numbers</h2>",
        _columns_help(report),
        tables(report),
        _side_effects(report),
        _where(report),
        _undo(report),
        _definitions(report),
        _notes(report),
        _settings(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>What the edit did</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def tables(report: Report) -> str:
    """The table of numbers: a block of rows for each prompt set."""
    head = "".join(f'<th class="n">{escape(TITLES[column])}</th>' for column in report.columns)
    rows = []
    for name in report.set_names:
        lines = [line for line in report.of_set(name) if line.shown]
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


def _figures(images: Mapping[str, bytes]) -> str:
    parts = []
    for name, image in images.items():
        code = base64.b64encode(image).decode("ascii")
        alt = escape(name.replace("_", " "))
        parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{code}"></figure>')
    return f"<h2>Figures</h2>{''.join(parts)}" if parts else ""


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
    if not report.side_effects:
        return ""
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


def _notes(report: Report) -> str:
    notes = list(report.notes)
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
