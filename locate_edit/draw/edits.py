"""Figures of what an edit did: where the weights moved, before against after, relearning, and several edits at once.

Each function takes ``ax=None`` and returns the axes it drew into (`slope_panels` makes a figure and returns a list of
axes); `circuits.draw.figure_data` gives the numbers behind them and `circuits.draw.save_figure` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from circuits import ModelMap, describe
from circuits.draw._style import (
    BLACK,
    GREY,
    HUES,
    MARKERS,
    NOTHING,
    VERMILION,
    Row,
    as_array,
    colour_bar,
    count_of,
    entitle,
    footer,
    inches,
    layer_ticks,
    new_axes,
    provide,
    write_cells,
)
from locate_edit.errors import EditError
from locate_edit.reports.report import Cell, Line, Report
from locate_edit.reports.states import COLUMNS, TITLES
from locate_edit.reports.weight_change import weight_changes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from locate_edit.attacked import Attacked
    from locate_edit.editing import Edit

__all__ = ["relearning", "slope_panel", "slope_panels", "summary_bars", "weight_change"]


# ---- where the weights moved ----------------------------------------------------------------------


def weight_change(edit: Edit, ax: Axes | None = None, *, model_map: ModelMap | None = None) -> Axes:
    """Draw how far each weight moved, relative to its norm and on a logarithmic scale: layers by kinds of weights.

    White cells are exactly as they were, cells with an outline have something that the mask selects ("0" where it did
    not move after all), and hatched cells changed outside the mask, which no edit should. Grey cells have no such
    weight. "other" are a layer's biases, norms and routers together, drawn only where one of them moved.

    Args:
        edit: the edit, applied or not.
        ax: where to draw.
        model_map: the model it was made on, with or without the edit; None takes the one it is applied to.

    Raises:
        EditError: the edit is not applied and no model is given, or it does not fit the model.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    found = weight_changes(edit, model_map)
    if model_map is None and edit.model is not None:
        model_map = describe(edit.model)
    shown, outside = as_array(found.relative), as_array(found.outside)
    selected = as_array(found.selected)
    ax = new_axes(
        ax, (2.4 + 0.75 * len(found.columns), 1.9 + max(0.8, inches(len(found.layers), 0.28)))
    )
    moved = shown[np.isfinite(shown) & (shown > 0)]
    top = float(moved.max()) if moved.size else 1.0
    low = min(float(moved.min()), top / 10) if moved.size else 0.1
    cells = np.ma.masked_where(~(shown > 0), np.minimum(shown, top))
    image = ax.imshow(
        cells, cmap="YlGnBu", norm=LogNorm(low, top), aspect="auto", origin="lower"
    )  # fmt: skip
    texts = [[_power(value) for value in row] for row in shown]
    write_cells(ax, image, texts, 6.5)
    for (y, x), value in np.ndenumerate(shown):
        box: dict[str, Any] = {"xy": (x - 0.5, y - 0.5), "width": 1, "height": 1}
        if np.isnan(value):
            ax.add_patch(Rectangle(**box, facecolor=NOTHING, lw=0))
        elif outside[y, x] > 0:
            ax.add_patch(Rectangle(**box, fill=False, hatch="////", edgecolor=VERMILION, lw=1.2))
        elif selected[y, x] > 0:
            ax.add_patch(Rectangle(**box, fill=False, edgecolor="0.25", lw=0.8))
        if value == 0 and selected[y, x] > 0:
            ax.text(x, y, "0", ha="center", va="center", size=6.5)
    ax.set_xticks(range(len(found.columns)), found.columns)
    layer_ticks(ax, [str(layer) for layer in found.layers])
    ax.set_ylabel("layer")
    assert model_map is not None
    share = found.entries / model_map.n_parameters
    entitle(
        ax,
        f"{found.entries:,} of {model_map.n_parameters:,} parameters changed ({share:.2%})",
        "; ".join(_beside(edit, found.entries_outside, found.elsewhere)),
    )
    colour_bar(ax, image, "|new - old| / |old|")
    name = str(edit.provenance.get("method", {}).get("name", ""))
    hatched = "; hatched: changed outside it" if found.entries_outside else ""
    footer(
        ax, f"edit: {name}" if name else "",
        "cells: Frobenius norm of the change over that of the whole weight; white: exactly 0; outlined: the mask "
        f"selects something there{hatched}", model_map=model_map,
    )  # fmt: skip

    def data() -> list[Row]:
        return [
            {"layer": layer, "of": column, "relative": float(shown[y, x]),
             "outside": float(outside[y, x]), "selected": float(selected[y, x])}
            for y, layer in enumerate(found.layers)
            for x, column in enumerate(found.columns)
            if not np.isnan(shown[y, x])
        ]  # fmt: skip

    provide(ax, data)
    return ax


def _power(value: float) -> str:
    """A positive number in few signs: `3.2e-3`."""
    if not value > 0:
        return ""
    if math.isinf(value):
        return "from 0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _beside(edit: Edit, entries_outside: int, elsewhere: Mapping[str, float]) -> list[str]:
    """What the grid does not show."""
    if edit.mask is None:
        said = ["without a mask"]
    elif entries_outside:
        said = [f"{entries_outside:,} OUTSIDE the mask"]
    else:
        said = ["none outside the mask"]
    said += [f"{name}: {_power(value)}" for name, value in elsewhere.items()]
    if edit.additions:
        said.append(f"beside {len(edit.additions)} additions, which are no weights")
    return said


# ---- before against after -------------------------------------------------------------------------


def slope_panel(
    report: Report, metric: str = "likelihood", *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Draw one metric of a report: a line from before to after for each prompt set, random mask and oracle beside it.

    Whiskers are the report's intervals. Points of different sets stand a little apart, so that these can be told.

    Args:
        report: the report.
        metric: which metric.
        title: what to call the edit; the method's name by default.
        ax: where to draw.

    Raises:
        EditError: the report does not have that metric before and after.
    """
    lines = [line for line in report.lines if line.metric == metric and _both(line)]
    if not lines:
        raise EditError(
            f"{metric!r} has no number before and after in this report; there is "
            f"{', '.join(_slopes(report)) or 'none'}"
        )
    ax = new_axes(ax, (4.2, 3.2))
    columns = [c for c in COLUMNS if any(_finite(line.cells.get(c, Cell(None))) for line in lines)]
    rows: list[Row] = []
    for n, line in enumerate(lines):
        hue, shift = HUES[n % len(HUES)], (n - (len(lines) - 1) / 2) * 0.07
        cells = {c: line.cells[c] for c in columns if c in line.cells and _finite(line.cells[c])}
        at = {column: columns.index(column) + shift for column in cells}
        ax.plot(
            [at[c] for c in ("before", "after")], [_value(cells[c]) for c in ("before", "after")],
            color=hue, lw=1.6,
        )  # fmt: skip
        for column, cell in cells.items():
            full = column in ("before", "after")
            ax.plot(
                at[column], _value(cell), MARKERS[n % len(MARKERS)], color=hue, ms=5.5, ls="",
                mfc=hue if full else "white",
                label=f"{line.prompts} (n = {cell.items:,})" if column == "before" else "",
            )  # fmt: skip
            _whisker(ax, at[column], cell.low, cell.high, hue)
            rows.append(
                {"set": line.prompts, "metric": metric, "state": column, "value": cell.value,
                 "low": cell.low, "high": cell.high, "items": cell.items}
            )  # fmt: skip
    ax.set_xticks(range(len(columns)), [TITLES[column] for column in columns], size=8)
    ax.set_xlim(-0.4, len(columns) - 0.6)
    ax.set_ylabel(f"{lines[0].title} ({lines[0].unit})", size=8.5)
    drawn = [float(row["value"]) for row in rows]
    if min(drawn) > 0 and max(drawn) / min(drawn) > 20 and lines[0].unit != "probability":
        ax.set_yscale("log")
    elif "probability" in lines[0].unit or "fraction" in lines[0].unit:
        ax.set_ylim(-0.03, 1.05)
    ax.spines[["top", "right"]].set_visible(False)
    entitle(ax, title or _method(report) or "before and after")
    ax.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    footer(ax, *_about(report))
    provide(ax, lambda: rows)
    return ax


def slope_panels(
    reports: Report | Mapping[str, Report], metrics: Sequence[str] | None = None
) -> list[Axes]:
    """Draw `slope_panel` side by side: a column for each report, a row for each metric, rows on one scale.

    Args:
        reports: a report, or several by name (of the method).
        metrics: which metrics; by default those that every report has before and after.

    Raises:
        EditError: no report, or no metric that all have.
    """
    from matplotlib import pyplot as plt

    named = {"": reports} if isinstance(reports, Report) else dict(reports)
    shared = [m for m in _slopes(*named.values()) if all(m in _slopes(r) for r in named.values())]
    chosen = shared if metrics is None else list(metrics)
    if not chosen:
        raise EditError("no metric to draw: expected reports that share one, before and after")
    _, grid = plt.subplots(
        len(chosen), len(named), figsize=(1.6 + 3.3 * len(named), 0.2 + 2.9 * len(chosen)),
        layout="constrained", dpi=150, squeeze=False, sharey="row",
    )  # fmt: skip
    drawn = []
    for y, metric in enumerate(chosen):
        for x, (name, report) in enumerate(named.items()):
            ax = slope_panel(report, metric, title=name, ax=grid[y][x])
            if x:
                ax.set_ylabel("")
            if x < len(named) - 1 and (legend := ax.get_legend()) is not None:
                legend.remove()
            drawn.append(ax)
    return drawn


def _slopes(*reports: Report) -> list[str]:
    """Metrics with a number before and after, but no distances."""
    return list(
        dict.fromkeys(
            line.metric
            for report in reports
            for line in report.lines
            if _both(line) and line.direction != "distance"
        )
    )


# ---- relearning -----------------------------------------------------------------------------------


def relearning(
    curves: Mapping[str, Attacked],
    *,
    oracle: Attacked | None = None,
    hues: Sequence[str] | None = None,
    model: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw what comes back of the forget prompts as an attack gets stronger: a line for each method.

    The black line is the oracle, which never saw them: what it learns from the attack anyway. A method whose line runs
    above it has hidden something rather than forgotten it. Thin dashed lines are the retain prompts, since an attack
    that breaks these has shown nothing. Whiskers at the last point are 95% intervals over prompts.

    Args:
        curves: outcomes of one attack, such as `locate_edit.attacks.relearning.Relearning`, by name of the edit.
        oracle: that of the oracle.
        hues: a colour for each of them; None takes the usual ones.
        model: what to call the model in the footer.
        ax: where to draw.

    Raises:
        EditError: an outcome has no curve, or they count different things.
    """
    every = {**curves, **({"oracle (never saw them)": oracle} if oracle is not None else {})}
    without = [name for name, found in every.items() if not found.curve]
    if without or not every:
        raise EditError(
            f"no curve to draw{': ' + ', '.join(without) if without else ''}. Expected outcomes of an attack with a "
            "strength, such as Relearning"
        )
    if len({(found.strength, found.forget.name) for found in every.values()}) != 1:
        counted = ", ".join(f"{n}: {f.forget.name} by {f.strength}" for n, f in every.items())
        raise EditError(f"these curves do not belong on one scale ({counted}); draw one each")
    ax = new_axes(ax, (5.4, 3.5))
    rows: list[Row] = []
    for n, (name, found) in enumerate(every.items()):
        is_oracle = found is oracle
        usual = [h for h in HUES if h != BLACK] if hues is None else list(hues)
        hue = BLACK if is_oracle else usual[n % len(usual)]
        strengths = [point.strength for point in found.curve]
        ax.plot(
            strengths, [point.forget for point in found.curve], color=hue,
            marker="*" if is_oracle else MARKERS[n % len(MARKERS)], ms=7 if is_oracle else 4.5,
            lw=1.6, label=name,
        )  # fmt: skip
        kept = [(p.strength, p.retain) for p in found.curve if p.retain is not None]
        ax.plot([x for x, _ in kept], [y for _, y in kept], color=hue, ls="--", lw=0.9, alpha=0.7)
        span = found.forget.interval()
        if span is not None:
            _whisker(ax, strengths[-1], *span, hue)
        rows += [
            {"method": name, "strength": p.strength, "forget": p.forget, "retain": p.retain}
            for p in found.curve
        ]
    first = next(iter(every.values()))
    ax.plot([], [], color=GREY, ls="--", lw=0.9, label="retain prompts")
    ax.set_xlabel(first.strength or "strength of the attack")
    ax.set_ylabel(f"{first.forget.name.replace('_', ' ')}, forget prompts", size=9)
    if "probability" in first.forget.unit:
        ax.set_ylim(-0.03, 1.05)
    ax.spines[["top", "right"]].set_visible(False)
    entitle(ax, "What comes back of the forget prompts")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    footer(
        ax, f"model: {model}" if model else "", count_of(len(first.forget), "prompt"),
        "whiskers: 95% interval over prompts",
    )  # fmt: skip
    provide(ax, lambda: rows)
    return ax


# ---- several edits at once ------------------------------------------------------------------------


def summary_bars(
    reports: Report | Mapping[str, Report],
    metrics: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw metrics as fractions of the original model's: a group for each prompt set and metric, a bar for each report.

    1 is as before the edit, and smaller is known less well: metrics that fall with knowledge, such as perplexity, enter
    as before over after. Hollow diamonds are the random mask, stars the oracle. Whiskers are the report's interval
    after the edit, divided by the number before as if that were exact.

    Args:
        reports: a report, or several by name (of the method).
        metrics: which metrics; by default those that every report has before and after, but no distances.
        ax: where to draw.

    Raises:
        EditError: nothing can be expressed as a fraction of the original.
    """
    named = {"": reports} if isinstance(reports, Report) else dict(reports)
    named = {name or _method(report) or "edit": report for name, report in named.items()}
    keys = list(
        dict.fromkeys(
            line.key
            for report in named.values()
            for line in report.lines
            if line.direction != "distance"
            and (metrics is None or line.metric in metrics)
            and all(_normalised(r, line.key, "after") is not None for r in named.values())
        )
    )
    if not keys:
        raise EditError(
            "no metric that all reports have before and after, with a positive number, is there to be drawn as a "
            f"fraction of the original (asked for: {', '.join(metrics) if metrics is not None else 'all'})"
        )
    ax = new_axes(ax, (2.6 + max(3.0, len(keys) * (0.35 + 0.28 * len(named))), 3.6))
    width = 0.8 / len(named)
    rows: list[Row] = []
    for n, (name, report) in enumerate(named.items()):
        for i, key in enumerate(keys):
            x = i + (n - (len(named) - 1) / 2) * width
            numbers = {c: _normalised(report, key, c) for c in ("after", "random", "oracle")}
            value, low, high = numbers["after"] or (0.0, None, None)
            ax.bar(x, value, width * 0.92, color=HUES[n % len(HUES)], label=name if i == 0 else "")
            _whisker(ax, x, low, high, "0.2")
            marks: dict[str, dict[str, Any]] = {
                "random": {"marker": "D", "mfc": "white", "ms": 5, "zorder": 4},
                "oracle": {"marker": "*", "mfc": BLACK, "ms": 8, "zorder": 3},
            }
            for column, look in marks.items():
                if (found := numbers[column]) is not None:
                    ax.plot(x, found[0], mec=BLACK, ls="", **look)
            rows += [
                {"report": name, "key": key, "state": column, "normalised": found[0]}
                for column, found in numbers.items()
                if found is not None
            ]
    for column, marker, face in (("random", "D", "white"), ("oracle", "*", BLACK)):
        if any(row["state"] == column for row in rows):
            ax.plot([], [], marker, mfc=face, mec=BLACK, ls="", label=TITLES[column])
    ax.axhline(1.0, color=GREY, ls="--", lw=1.0, label="as before the edit", zorder=0)
    ax.set_xticks(
        range(len(keys)), [key.replace(".", "\n").replace("_", " ") for key in keys], size=8
    )
    ax.set_ylabel("fraction of the original\n(smaller: known less well)", size=9)
    values = [float(row["normalised"]) for row in rows]
    ax.set_ylim(0, 1.12 * max(1.0, *values))
    ax.spines[["top", "right"]].set_visible(False)
    entitle(ax, "What is left, as a fraction of the original model's")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    inverted = [k for k in keys if _line(next(iter(named.values())), k).direction == "down"]
    turned = (
        f"before over after: {', '.join(dict.fromkeys(k.rpartition('.')[2] for k in inverted))}"
    )
    footer(ax, *_about(next(iter(named.values()))), turned if inverted else "")
    provide(ax, lambda: rows)
    return ax


def _normalised(
    report: Report, key: str, column: str
) -> tuple[float, float | None, float | None] | None:
    """One number as a fraction of that before the edit, with its interval; 1 or less is known no better."""
    line = next((line for line in report.lines if line.key == key), None)
    if line is None or not _both(line) or not _finite(line.cells.get(column, Cell(None))):
        return None
    cell, before = line.cells[column], line.cells["before"].value
    assert cell.value is not None
    assert before is not None
    down = line.direction == "down"
    if before <= 0 or cell.value < 0 or (down and cell.value <= 0):
        return None
    if not down:
        return cell.value / before, _scaled(cell.low, 1 / before), _scaled(cell.high, 1 / before)
    return before / cell.value, _inverse(before, cell.high), _inverse(before, cell.low)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _inverse(before: float, value: float | None) -> float | None:
    return None if value is None or value <= 0 else before / value


def _line(report: Report, key: str) -> Line:
    return next(line for line in report.lines if line.key == key)


# ---- small helpers --------------------------------------------------------------------------------


def _finite(cell: Cell) -> bool:
    return cell.value is not None and math.isfinite(cell.value)


def _value(cell: Cell) -> float:
    return math.nan if cell.value is None else cell.value


def _both(line: Line) -> bool:
    """Whether there is a number before and after the edit."""
    return all(_finite(line.cells.get(column, Cell(None))) for column in ("before", "after"))


def _whisker(ax: Axes, x: float, low: float | None, high: float | None, colour: str) -> None:
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        ax.plot([x, x], [low, high], color=colour, lw=1.1)


def _method(report: Report) -> str:
    return str(report.edit.get("method", {}).get("name", "")) if report.edit else ""


def _about(report: Report) -> list[str]:
    name = str(report.model.get("name") or report.model.get("class") or "")
    level = report.settings.get("level")
    whiskers = f"whiskers: {level:.0%} bootstrap interval over items" if level else ""
    return [f"model: {name}" if name else "", whiskers]
