"""Figures of a comparison: a heat map of one measure, and forgetting against keeping with its best trade-offs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from locate_edit.draw._style import free_figure
from locate_edit.errors import EditError
from locate_edit.reports.comparison import DISTANCE, Comparison, pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heat_map", "trade_off"]


def heat_map(found: Comparison, key: str, ax: Axes | None = None) -> Axes:
    """One "set/metric", mean over seeds: a row for each localizer, a column for each method and number of units.

    Cells without a value stay empty.

    Raises:
        EditError: no cell has that measure.
    """
    means = _means(found, key)
    rows = list(dict.fromkeys(cell.localizer for cell in found.cells))
    columns = list(dict.fromkeys((cell.method, cell.budget) for cell in found.cells))
    values = np.array([[means.get((row, *col), np.nan) for col in columns] for row in rows])
    axes = (
        ax
        if ax is not None
        else free_figure(2.5 + 0.62 * len(columns), 2.4 + 0.45 * len(rows)).add_subplot()
    )
    image = axes.imshow(np.ma.masked_invalid(values), cmap="cividis", aspect="auto")
    middle = float(np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "black" if value > middle else "white"
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=colour, size=8)
    axes.set_yticks(range(len(rows)), rows)
    labels = [f"{method}, {budget}" for method, budget in columns]
    axes.set_xticks(
        range(len(columns)), labels, size=8, rotation=40, ha="right", rotation_mode="anchor"
    )
    axes.set_xlabel("method, units")
    axes.set_title(key)
    axes.figure.colorbar(image, ax=axes)
    return axes


def trade_off(
    found: Comparison, metric: str = "likelihood", keep: str = "retain", ax: Axes | None = None
) -> Axes:
    """A point for each localizer, method and size: ``metric`` on the forget against that on the ``keep`` prompts.

    The line joins the points that no other beats: less on forget and more on ``keep``, or less of both where the metric
    is the distance to the oracle. Original and oracle are marked; going beyond the oracle on the forget prompts is no
    merit. Prompts that no method saw (`compare(others=...)`) make the fairer ``keep``.

    Raises:
        EditError: no cell has that measure.
    """
    forget, retain = _means(found, f"forget/{metric}"), _means(found, f"{keep}/{metric}")
    places = [place for place in forget if place in retain]
    points = [(forget[place], retain[place]) for place in places]
    sign = -1.0 if metric == DISTANCE else 1.0
    axes = ax if ax is not None else free_figure(6.4, 4.2).add_subplot()
    for name in dict.fromkeys(place[0] for place in places):
        mine = [point for place, point in zip(places, points, strict=True) if place[0] == name]
        axes.scatter([x for x, _ in mine], [y for _, y in mine], label=name, s=28)
    best = [points[i] for i in pareto([(x, sign * y) for x, y in points])]
    axes.plot(
        [x for x, _ in best],
        [y for _, y in best],
        color="#555555",
        lw=1,
        zorder=0,
        label="not beaten",
    )
    for name, values, marker in (("original", found.original, "D"), ("oracle", found.oracle, "*")):
        at = [(values or {}).get(f"{part}/{metric}") for part in ("forget", keep)]
        if (known := [value for value in at if value is not None]) == at:
            axes.scatter(known[:1], known[1:], marker=marker, color="black", s=80, label=name)
    axes.set_xlabel(f"{metric}, forget")
    axes.set_ylabel(f"{metric}, {keep}")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _means(found: Comparison, key: str) -> dict[tuple[str, str, int], float]:
    means = found.means(key)
    if not means:
        raise EditError(f"no cell has {key!r}; there are {', '.join(found.original) or 'none'}")
    return means
