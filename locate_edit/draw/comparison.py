"""Figures of a comparison: a heat map of one measure, and forgetting against keeping with its best trade-offs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from circuits.draw._style import BLACK, GREY, HUES, MARKERS, footer, provide
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
    provide(
        axes,
        lambda: [
            {"localizer": row, "method": column[0], "units": column[1], key: float(values[i, j])}
            for i, row in enumerate(rows)
            for j, column in enumerate(columns)
        ],
    )
    return axes


def trade_off(
    found: Comparison, metric: str = "likelihood", keep: str = "retain", ax: Axes | None = None
) -> Axes:
    """A point for each localizer, method and size: ``metric`` on the ``keep`` prompts to the right, on forget upwards.

    Points are means over seeds, larger for more units; colours are localizers and markers methods, and a thin line
    joins the sizes of one pair. The wide grey line joins the points that no other beats: forgotten as far and kept
    better, or the other way round. What is known less well than the oracle, which never knew, lies in the shaded area:
    that is no merit, so there only keeping counts. Original and oracle are marked. Prompts that no method saw
    (`compare(others=...)`) make the fairer ``keep``.

    Raises:
        EditError: no cell has that measure.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    forget, kept = _means(found, f"forget/{metric}"), _means(found, f"{keep}/{metric}")
    places = sorted((place for place in forget if place in kept), key=_order(found))
    points = {place: (kept[place], forget[place]) for place in places}
    where, how, budgets = (list(dict.fromkeys(place[k] for place in places)) for k in range(3))
    sizes = {budget: 4.0 + 2.5 * n for n, budget in enumerate(sorted(budgets))}
    axes = ax if ax is not None else free_figure(7.2, 4.4).add_subplot()
    known = found.about.get("metrics", {}).get(metric, {})
    direction = "distance" if metric == DISTANCE else known.get("direction", "up")
    # Less is more forgotten, and more is better kept, except where a metric falls with knowledge or is a distance.
    of_forget, of_kept = -1.0 if direction == "down" else 1.0, 1.0 if direction == "up" else -1.0
    never = None if direction == "distance" else (found.oracle or {}).get(f"forget/{metric}")
    beyond = {p for p in places if never is not None and of_forget * (forget[p] - never) < 0}
    order = pareto(
        [
            (of_forget * (never if p in beyond and never is not None else y), of_kept * x)
            for p, (x, y) in points.items()
        ]
    )
    best = [points[places[i]] for i in order]
    front: dict[str, Any] = {
        "color": "#cccccc",
        "lw": 6.0,
        "zorder": 0.5,
        "solid_capstyle": "round",
    }
    axes.plot([x for x, _ in best], [y for _, y in best], label="not beaten", **front)
    for localizer, method in dict.fromkeys(place[:2] for place in places):
        mine = [place for place in places if place[:2] == (localizer, method)]
        look: dict[str, Any] = {
            "color": HUES[where.index(localizer) % len(HUES)],
            "marker": MARKERS[how.index(method) % len(MARKERS)],
        }
        axes.plot(
            *zip(*(points[p] for p in mine), strict=True), color=look["color"], lw=0.9, alpha=0.6
        )
        for place in mine:
            axes.plot(*points[place], ls="", ms=sizes[place[2]], **look)
    handles: list[Any] = [
        Line2D([], [], marker="o", ls="", color=HUES[n % len(HUES)], label=name)
        for n, name in enumerate(where)
    ]
    handles += [
        Line2D([], [], marker=MARKERS[n % len(MARKERS)], ls="", color=GREY, label=name)
        for n, name in enumerate(how)
    ]
    handles.append(Line2D([], [], label="not beaten", **front))
    for name, values, marker in (("original", found.original, "D"), ("oracle", found.oracle, "*")):
        at = [(values or {}).get(f"{part}/{metric}") for part in (keep, "forget")]
        if (there := [value for value in at if value is not None]) == at:
            handles.append(
                axes.scatter(there[:1], there[1:], marker=marker, color=BLACK, s=80, label=name)
            )
    if never is not None:
        low, high = axes.get_ylim()
        shade: dict[str, Any] = {"color": "#f7e4d9", "zorder": 0, "lw": 0}
        axes.axhspan(*((low, never) if of_forget > 0 else (never, high)), **shade)
        axes.set_ylim(low, high)
        handles.append(Patch(label="beyond the oracle", **shade))
    unit = str(known.get("unit") or ("nats a token" if metric == DISTANCE else ""))
    title = metric.replace("_", " ")
    right, down = ("right" if of_kept > 0 else "left"), ("down" if of_forget > 0 else "up")
    axes.set_xlabel(f"{title}, {keep} prompts{f' ({unit})' if unit else ''}; {right}: better kept")
    axes.set_ylabel(f"{title}, forget prompts{f' ({unit})' if unit else ''}\n{down}: forgotten")
    axes.legend(
        handles=handles, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    axes.spines[["top", "right"]].set_visible(False)
    seeds = len({cell.seed for cell in found.cells})
    footer(
        axes,
        _named(found, ("forget", keep)),
        f"units: {', '.join(map(str, sorted(budgets)))}",
        f"means over {seeds} seed{'s' if seeds > 1 else ''}",
    )
    unbeaten = {places[i] for i in order}
    provide(
        axes,
        lambda: [
            {
                "localizer": p[0],
                "method": p[1],
                "units": p[2],
                "keep": x,
                "forget": y,
                "not beaten": p in unbeaten,
                "beyond oracle": p in beyond,
            }
            for p, (x, y) in points.items()
        ],
    )
    return axes


def _named(found: Comparison, sets: Sequence[str]) -> str:
    """Which model the figure is of, and how many prompts the sets have, as far as the comparison says."""
    model, prompts = found.about.get("model"), found.about.get("prompts", {})
    counts = ", ".join(f"{prompts[name]} {name}" for name in sets if name in prompts)
    said = (f"model: {model}" if model else "", f"prompts: {counts}" if counts else "")
    return " | ".join(each for each in said if each)


def _order(found: Comparison) -> Callable[[tuple[str, str, int]], tuple[int, int, int]]:
    """Places in the order of the comparison, sizes rising."""
    where = list(dict.fromkeys(cell.localizer for cell in found.cells))
    how = list(dict.fromkeys(cell.method for cell in found.cells))
    return lambda place: (where.index(place[0]), how.index(place[1]), place[2])


def _means(found: Comparison, key: str) -> dict[tuple[str, str, int], float]:
    means = found.means(key)
    if not means:
        raise EditError(f"no cell has {key!r}; there are {', '.join(found.original) or 'none'}")
    return means
