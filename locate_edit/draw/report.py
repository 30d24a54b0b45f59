"""Figures of a report: before against after per metric, and the distance to a retrained model.

Every panel takes `ax=None` and returns its `Axes`; `before_after` makes a figure of them and returns that. Colours
stay apart for colour-blind readers; each figure says in its footer which model, unit and number of items it shows.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuits.draw._style import Row, provide
from locate_edit.draw._style import COLOURS, free_figure
from locate_edit.reports.report import Cell, Line, Report
from locate_edit.reports.states import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["before_after", "figures", "metric_panel", "oracle_panel"]

_SEPARATE = ("oracle_distance", "oracle_kl")
_DIRECTIONS = {
    "up": "larger: better known",
    "down": "smaller: better known",
    "distance": "smaller: closer",
    "closeness": "larger: closer",
}


def figures(report: Report) -> dict[str, Figure]:
    """All figures of a report by name."""
    made = {}
    if any(line.shown and line.metric not in _SEPARATE for line in report.lines):
        made["before_after"] = before_after(report)
    if any(line.shown and line.metric == "oracle_distance" for line in report.lines):
        figure = free_figure(7.0, 1.6 + 0.55 * len(report.set_names))
        oracle_panel(report, figure.add_subplot())
        _footer(figure, report, "KL from a retrained model, over that between two of them")
        made["oracle_distance"] = figure
    return made


def before_after(report: Report) -> Figure:
    """One panel a metric: bars with intervals for every prompt set, before and after the edit and for the controls."""
    metrics = [
        name
        for name in report.metric_names
        if name not in _SEPARATE and any(line.shown for line in _lines(report, name))
    ]
    n_columns = min(2, len(metrics))
    n_rows = math.ceil(len(metrics) / n_columns)
    figure = free_figure(5.4 * n_columns, 2.9 * n_rows + 0.9)
    for index, metric in enumerate(metrics):
        metric_panel(report, metric, figure.add_subplot(n_rows, n_columns, index + 1))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    _footer(figure, report, "bars: mean over items")
    drawn = [line for line in report.lines if line.metric in metrics]
    provide(figure, lambda: _rows(drawn))
    return figure


def metric_panel(report: Report, metric: str, ax: Axes | None = None) -> Axes:
    """Bars of one metric: a group for each prompt set, a bar for each state, whiskers for the bootstrap interval."""
    axes = free_figure(5.4, 3.4).add_subplot() if ax is None else ax
    lines = [line for line in _lines(report, metric) if line.shown]
    width = 0.8 / max(1, len(report.columns))
    for offset, column in enumerate(report.columns):
        places = [i + (offset - (len(report.columns) - 1) / 2) * width for i in range(len(lines))]
        cells = [line.cells.get(column, Cell(None)) for line in lines]
        there = [(x, cell) for x, cell in zip(places, cells, strict=True) if _drawable(cell)]
        axes.bar(
            [x for x, _ in there],
            [cell.value or 0.0 for _, cell in there],
            width * 0.92,
            color=COLOURS[column],
            label=TITLES[column],
        )
        _whiskers(axes, there)
        for x, cell in there:
            if cell.value == 0:  # a bar of no height still has to be seen
                axes.plot([x - width * 0.4, x + width * 0.4], [0, 0], color=COLOURS[column], lw=3)
    unit = lines[0].unit if lines else ""
    if lines:
        title = f"{lines[0].title} ({_DIRECTIONS[lines[0].direction]})"
        axes.set_title(textwrap.fill(title, 56), fontsize=10, loc="left")
    axes.set_ylabel(unit, fontsize=9)
    names = [f"{textwrap.fill(line.prompts, 11)}\nn = {_items(line)}" for line in lines]
    axes.set_xticks(range(len(lines)), names, fontsize=8)
    if metric == "perplexity" and _spread(lines) > 20:
        axes.set_yscale("log")
        _plain_log_ticks(axes.yaxis)
    elif "probability" in unit or "fraction" in unit:
        axes.set_ylim(0, 1.05)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
    provide(axes, lambda: _rows(lines))
    return axes


def oracle_panel(report: Report, ax: Axes | None = None) -> Axes:
    """The distance to a model retrained without the forget set, for every prompt set; 1 is another retraining."""
    axes = free_figure(7.0, 3.4).add_subplot() if ax is None else ax
    lines = [line for line in _lines(report, "oracle_distance") if line.shown][::-1]
    columns = [column for column in report.columns if column != "oracle"]
    for height, line in enumerate(lines):
        known = [v for v in (line.value(column) for column in columns) if v]
        if known:
            axes.plot([min(known), max(known)], [height, height], color="#d0d4d8", lw=2, zorder=1)
    for step, column in enumerate(columns):
        shift = 0.14 * ((len(columns) - 1) / 2 - step)
        there = [(h, line.cells[column]) for h, line in enumerate(lines) if column in line.cells]
        for height, cell in there:
            if cell.low is not None and cell.high is not None and cell.low > 0:
                y = height + shift
                axes.plot([cell.low, cell.high], [y, y], color=COLOURS[column], lw=1.5, zorder=2)
        drawn = [(h, cell.value) for h, cell in there if cell.value]
        axes.scatter(
            [value for _, value in drawn],
            [height + shift for height, _ in drawn],
            s=48,
            color=COLOURS[column],
            label=TITLES[column],
            zorder=3,
        )
    axes.axvline(1.0, color=COLOURS["oracle"], ls="--", lw=1.2, label="two retrained models")
    axes.set_xscale("log")
    _plain_log_ticks(axes.xaxis)
    axes.set_yticks(range(len(lines)), [f"{line.prompts} (n = {_items(line)})" for line in lines])
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlabel(
        "distance to a model that never learned it (1 = another retraining)", fontsize=9
    )
    axes.set_title("How far from never having learned it", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    provide(axes, lambda: _rows(lines))
    return axes


def _rows(lines: Sequence[Line]) -> list[Row]:
    """A dictionary for each prompt set and state."""
    return [
        {
            "set": line.prompts,
            "metric": line.metric,
            "state": state,
            "value": cell.value,
            "low": cell.low,
            "high": cell.high,
        }
        for line in lines
        for state, cell in line.cells.items()
    ]


def _plain_log_ticks(axis: Axis) -> None:
    """Numbers as people write them on a logarithmic axis, in between the powers too where the axis is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axis.get_view_interval()
    few = high / low < 200
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _whiskers(axes: Axes, there: list[tuple[float, Cell]]) -> None:
    spans = [(x, c.low, c.high) for x, c in there if c.low is not None and c.high is not None]
    for x, low, high in spans:
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([x, x], [low, high], color="#202124", lw=1.1)


def _drawable(cell: Cell) -> bool:
    return cell.value is not None and math.isfinite(cell.value)


def _spread(lines: list[Line]) -> float:
    """The largest number drawn over the smallest."""
    drawn = [cell.value or 0.0 for line in lines for cell in line.cells.values() if _drawable(cell)]
    return max(drawn) / min(drawn) if drawn and min(drawn) > 0 else 1.0


def _items(line: Line) -> int:
    return max(cell.items for cell in line.cells.values())


def _lines(report: Report, metric: str) -> list[Line]:
    return [line for line in report.lines if line.metric == metric]


def _footer(figure: Figure, report: Report, how: str) -> None:
    level = report.settings.get("level")
    whiskers = f"; lines: {level:.0%} bootstrap interval over items" if level else ""
    name = str(report.model.get("name") or report.model.get("class") or "model")
    method = str(report.edit.get("method", {}).get("name", "")) if report.edit else ""
    about = ", ".join(part for part in (name, method) if part)
    # The layout makes room for the height of this text but does not break it into lines.
    width = max(40, int(figure.get_figwidth() * 18))
    text = "\n".join(textwrap.wrap(f"{about}; {how}{whiskers}", width))
    figure.supxlabel(text, fontsize=7.5, color="#5f6368")
