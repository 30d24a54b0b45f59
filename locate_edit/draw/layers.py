"""Figures of what the layers still carry: the logit lens, the stream put into the original, and what that costs.

The maps have several panels: each makes a figure and returns it. `circuits.draw.figure_data` gives the numbers of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from circuits.draw._style import Row, provide
from locate_edit.draw._style import free_figure
from locate_edit.reports.states import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from locate_edit.metrics.unlearning_depth import Depth
    from locate_edit.reports.layers import Layers

__all__ = ["carried_map", "layer_lines", "lens_map"]

MOST_NAMED = 40
"""Prompts whose text stands beside the map; of more only the number is written."""
MOST_WRITTEN = 16
"""Layers whose numbers are written into the cells."""

_COLOURS = {"s1": "#009E73", "s2": "#0072B2", "control": "#D55E00", "between": "#E69F00"}
_MEANING = {
    "s1": "oracle's stream (s1)",
    "s2": "edited model's stream (s2)",
    "control": "control: oracle's stream, retained prompts",
    "between": "control: other oracle's in the oracle, retained",
}


def lens_map(found: Layers) -> Figure:
    """Heat maps side by side, one for each state of the model: prompts from top to bottom, layers to the right."""
    states = list(found.lens)
    n_items, n_layers = found.lens[states[0]].shape
    named = n_items <= MOST_NAMED
    height = 1.9 + (0.26 * max(4, n_items) if named else 5.0)
    width = (3.2 if named else 1.2) + len(states) * max(1.7, min(4.0, 0.36 * n_layers)) + 0.8
    figure = free_figure(width, height)
    panels = figure.subplots(1, len(states), sharey=True, squeeze=False)[0]
    image = None
    for axes, state in zip(panels, states, strict=True):
        values = found.lens[state]
        image = axes.imshow(
            values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        mean = float(np.nanmean(values[:, -1])) if np.isfinite(values[:, -1]).any() else np.nan
        axes.set_title(f"{TITLES[state]}\nlast layer, mean {mean:.2f}", fontsize=9.5)
        step = max(1, n_layers // 8)
        shown = list(range(0, n_layers, step))
        axes.set_xticks(shown, ["embed" if k == 0 else str(k - 1) for k in shown], fontsize=8)
        axes.set_xlabel("read after layer", fontsize=9)
    if named:
        panels[0].set_yticks(range(n_items), found.names, fontsize=7.5, parse_math=False)
    else:
        panels[0].set_ylabel(f"prompt (n = {n_items})", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=panels, fraction=0.05)
    bar.set_label("p(target), logit lens", fontsize=8.5)
    _footer(
        figure, found, f"probability of the target, geometric mean over its tokens; n = {n_items}"
    )

    def data() -> list[Row]:
        # The first column is the stream before all layers.
        return [
            {"state": state, "prompt": found.names[item], "item": item, "layer": k - 1, "probability": float(value)}
            for state in states
            for (item, k), value in np.ndenumerate(found.lens[state])
        ]  # fmt: skip

    provide(figure, data)
    return figure


def carried_map(found: Layers) -> Figure:
    """Two heat maps, forgotten and retained prompts: likelihood of the answers when the original goes on from a state.

    A row for each state, a column for each layer after which its stream is put into the original model; means over
    prompts. Hatched: retained answers are lost with it too, so the stream does not fit and the cell says nothing.
    """
    from matplotlib.patches import Rectangle

    states = list(found.carried)
    n_layers = found.n_layers
    figure = free_figure(2.6 + 2 * max(2.0, min(5.0, 0.55 * n_layers)), 1.7 + 0.42 * len(states))
    panels = figure.subplots(1, 2, sharey=True)
    image = None
    for axes, (values, title) in zip(
        panels,
        ((found.carried, "forgotten answers"), (found.kept, "retained answers (control)")),
        strict=True,
    ):
        table = np.stack([np.nanmean(values[state], axis=0) for state in states])
        image = axes.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (row, layer), value in np.ndenumerate(table):
            fits = found.fits(states[row])[layer]
            if not fits:
                axes.add_patch(
                    Rectangle(
                        (layer - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", ec="white", lw=0
                    )
                )
            if n_layers <= MOST_WRITTEN:
                axes.text(
                    layer, row, f"{value:.2f}", ha="center", va="center", size=7.5,
                    color="black" if value > 0.6 else "white",
                )  # fmt: skip
        axes.set_title(title, fontsize=9.5)
        shown = list(range(0, n_layers, max(1, n_layers // 12)))
        axes.set_xticks(shown, [str(layer) for layer in shown], fontsize=8)
        axes.set_xlabel("stream put in after layer", fontsize=9)
    panels[0].set_yticks(range(len(states)), [TITLES[state] for state in states], fontsize=8.5)
    assert image is not None
    bar = figure.colorbar(image, ax=panels, fraction=0.05)
    bar.set_label("likelihood", fontsize=8.5)
    count = f"{len(found.names)} and {next(iter(found.kept.values())).shape[0]} prompts"
    _footer(
        figure, found, f"the original model goes on from another state's residual stream; {count}"
    )

    def data() -> list[Row]:
        return [
            {"state": state, "prompts": name, "layer": layer, "likelihood": float(value),
             "fits": found.fits(state)[layer]}
            for name, part in (("forget", found.carried), ("retain", found.kept))
            for state in states
            for layer, value in enumerate(np.nanmean(part[state], axis=0))
        ]  # fmt: skip

    provide(figure, data)
    return figure


def _footer(figure: Figure, found: Layers, how: str) -> None:
    figure.supxlabel(f"{found.model}; {how}", fontsize=7.5, color="#5f6368")


def layer_lines(depth: Depth, ax: Axes | None = None) -> Axes:
    """What patching a layer costs, by layer: the oracle's stream, the edited model's, and the controls.

    Where the line of the edited model lies on that of the oracle, a layer has lost the answer; where it lies at 0, the
    layer still carries it. Where a control is not at 0, the oracle's line says less than it seems to. Means over
    prompts, with 95% bootstrap intervals over them.
    """
    axes = free_figure(8.6, 3.6).add_subplot() if ax is None else ax
    given = {key: getattr(depth, key) for key in _COLOURS}
    for place, (key, costs) in enumerate(given.items()):
        if costs is None:
            continue
        costs = costs[np.isfinite(costs).all(axis=1)]
        at = np.array(depth.layers) + 0.06 * (place - 1.5)
        dash = "-" if key in ("s1", "s2") else "--"
        label = f"{_MEANING[key]}, n = {len(costs)}"
        axes.plot(at, costs.mean(0), dash, marker="o", ms=4, color=_COLOURS[key], label=label)
        drawn = np.random.default_rng(0).integers(len(costs), size=(1000, len(costs)))
        low, high = np.quantile(costs[drawn].mean(1), (0.025, 0.975), axis=0)
        axes.vlines(at, low, high, color=_COLOURS[key], lw=1.1)
    axes.axhline(0, color="#9aa0a6", lw=0.8)
    axes.set_xticks(depth.layers[:: max(1, len(depth.layers) // 12)])
    axes.set_xlabel("layer whose residual stream is replaced", fontsize=9)
    axes.set_ylabel("log-probability lost (nats a token)", fontsize=9)
    said = "withheld" if depth.score.withheld else f"{depth.score.estimate:.2f}"
    damage = "unknown" if np.isnan(depth.damage) else f"{depth.damage:.0%}"
    axes.set_title(f"Unlearning depth: {said} (damage {damage})", fontsize=10, loc="left")
    axes.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    provide(axes, lambda: [dict(row) for row in depth.rows()])
    return axes
