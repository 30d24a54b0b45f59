"""Figures of masks and scores.

Each function takes ``ax=None``, draws into it (or into a new figure) and returns it. Colours tell apart to colour-blind
readers, and a footer states model, unit and number of examples, so that a saved picture explains itself. Matplotlib is
imported on first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.errors import MaskError
from circuits.families import ROLES
from circuits.layout import unfold
from circuits.mask import ComponentMask
from circuits.model_map import KeyValues, ModelMap, Side
from circuits.sites import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from circuits.scores import Scores

# Okabe and Ito's blue, vermilion and grey.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#7F7F7F"
MAX_BINS = 200
"""Columns of a score map at most; more units than that share columns."""


def mask_map(
    mask: ComponentMask,
    model_map: ModelMap | None = None,
    *,
    side: Side = "both",
    kv: KeyValues = "all",
    ax: Axes | None = None,
) -> Axes:
    """Draw how much of each layer a mask selects, one column per kind of unit or of weight.

    Args:
        mask: the mask.
        model_map: if given, columns are the weights q, k, v, o, gate, up and down, and cells the percentage of their
            parameters; otherwise columns are the kinds of sites and cells the percentage of their units.
        side: with a model, which weights of a unit count.
        kv: with a model, whether shared key and value rows count; see ``ModelMap.selected_slices``.
        ax: where to draw.

    Raises:
        MaskError: the mask has no site in any layer, or does not fit the model.
    """
    if model_map is None:
        rows, columns, fractions, labels = unit_fractions(mask)
        unit = "units"
        title = f"{mask.count():,} of {mask.total():,} units selected"
    else:
        rows, columns, fractions = parameter_fractions(mask, model_map, side, kv)
        labels = [[f"{x:.2%}" if 0 < x < 1 else "" for x in row] for row in fractions.tolist()]
        unit = "parameters"
        count = model_map.count_parameters(mask, side, kv)
        share = count / model_map.n_parameters
        title = f"{count:,} of {model_map.n_parameters:,} parameters selected ({share:.2%})"
    ax = _axes(ax, (1.2 + 0.75 * len(columns), 1.6 + 0.28 * len(rows)))
    shown = 100 * fractions.double().numpy()
    top = float(torch.nan_to_num(fractions).max()) * 100
    image = ax.imshow(shown, cmap="Blues", vmin=0, vmax=top or 100, aspect="auto", origin="lower")
    ax.set_facecolor("0.92")  # where a layer has no such unit
    for y, row in enumerate(labels):
        for x, label in enumerate(row):
            dark = shown[y, x] > 0.6 * (top or 100)
            ax.text(
                x, y, label, ha="center", va="center", size=7, color="white" if dark else "black"
            )
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(0, len(rows), max(1, len(rows) // 16)), rows[:: max(1, len(rows) // 16)])
    ax.set_ylabel("layer")
    ax.set_title(title, size=10)
    ax.figure.colorbar(image, ax=ax, label=f"% of {unit} selected")
    _footer(ax, model_map, mask.provenance, f"cells: % of {unit}")
    return ax


def neuron_histogram(
    mask: ComponentMask,
    kind: str = "neuron",
    *,
    model_map: ModelMap | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many units of a kind a mask selects in each layer, beside what a random mask would.

    The dashed line is the expectation for as many units drawn uniformly from all layers of the mask.

    Args:
        mask: the mask.
        kind: a kind of site that belongs to a layer.
        model_map: the model, for the footer.
        ax: where to draw.

    Raises:
        MaskError: the mask has no site of this kind.
    """
    sites = [site for site in mask.sites if site.kind == kind and site.layer is not None]
    if not sites:
        raise MaskError(
            f"the mask has no {kind} sites to draw: it has {', '.join(_kinds(mask)) or 'none'}"
        )
    layers = [site.layer or 0 for site in sites]
    counts = [int(mask.on[site].sum()) for site in sites]
    sizes = [mask.on[site].numel() for site in sites]
    chance = [sum(counts) * size / sum(sizes) for size in sizes]
    ax = _axes(ax, (max(4.0, 1.5 + 0.3 * len(sites)), 3.0))
    ax.bar(layers, counts, color=BLUE, width=0.8, label="selected")
    for i, (layer, expected) in enumerate(zip(layers, chance, strict=True)):
        label = "expected at random" if i == 0 else ""
        ax.hlines(
            expected, layer - 0.5, layer + 0.5, colors=VERMILION, linestyles="dashed", label=label
        )
    ax.set_xlabel("layer")
    ax.set_ylabel(f"selected {kind}s")
    ax.set_title(f"Selected {kind}s per layer ({sum(counts):,} of {sum(sizes):,})", size=10)
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=False, fontsize=8)
    _footer(ax, model_map, mask.provenance, f"unit: {kind}")
    return ax


def score_map(
    scores: Scores,
    kind: str | None = None,
    *,
    top: int = 10,
    model_map: ModelMap | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the mean scores of all units of a kind: layers upwards, units to the right, red positive, blue negative.

    Where units outnumber columns, a column shows the one with the largest absolute value of those that share it.

    Args:
        scores: the scores.
        kind: a kind of site that belongs to a layer; by default the one with most units.
        top: how many of the highest units to mark.
        model_map: the model, for the footer.
        ax: where to draw.

    Raises:
        MaskError: there are no scores of this kind in any layer.
    """
    per_kind: dict[str, int] = {}
    for site in scores.sites:
        if site.layer is not None:
            per_kind[site.kind] = per_kind.get(site.kind, 0) + scores[site][0].numel()
    chosen = kind or max(per_kind, key=lambda k: per_kind[k], default=None)
    sites = [site for site in scores.sites if site.kind == chosen and site.layer is not None]
    if not sites:
        raise MaskError(
            f"there are no {kind or 'layer'} scores to draw: found {', '.join(per_kind) or 'none'}"
        )
    means = [scores[site].mean(0).flatten() for site in sites]
    widest = max(len(mean) for mean in means)
    columns = min(widest, MAX_BINS)
    grid = torch.full((len(sites), columns), float("nan"))
    for y, mean in enumerate(means):
        grid[y] = _extremes(mean, widest, columns)
    limit = float(torch.nan_to_num(grid).abs().max()) or 1.0
    ax = _axes(ax, (7.0, 1.6 + 0.28 * len(sites)))
    image = ax.imshow(
        grid.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower",
        interpolation="nearest", extent=(-0.5, widest - 0.5, -0.5, len(sites) - 0.5),
    )  # fmt: skip
    ax.set_facecolor("0.92")
    best = _highest(means, top)
    ax.scatter(
        [x for x, _ in best], [y for _, y in best], s=24, facecolors="none", edgecolors="black",
        linewidths=0.8, label=f"highest {len(best)}",
    )  # fmt: skip
    step = max(1, len(sites) // 16)
    ax.set_yticks(range(0, len(sites), step), [str(site.layer) for site in sites[::step]])
    ax.set_xlabel(f"{chosen}")
    ax.set_ylabel("layer")
    ax.set_title(f"Mean score per {chosen}, {scores.n_prompts} prompts", size=10)
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    ax.figure.colorbar(image, ax=ax, label="mean score")
    _footer(ax, model_map, scores.provenance, f"unit: {chosen}, n = {scores.n_prompts} prompts")
    return ax


# ---- numbers behind the figures -----------------------------------------------------------------------------------


def unit_fractions(
    mask: ComponentMask,
) -> tuple[list[str], list[str], Tensor, list[list[str]]]:
    """Layers, kinds, the fraction `layer kind` of units that are on (NaN where there are none), and counts as text.

    Raises:
        MaskError: the mask has no site in any layer.
    """
    sites = [site for site in mask.sites if site.layer is not None]
    if not sites:
        raise MaskError(
            f"the mask has no site in any layer to draw: it has {', '.join(_kinds(mask)) or 'none'}"
        )
    kinds = [kind for kind in KINDS if any(site.kind == kind for site in sites)]
    layers = range(max(site.layer for site in sites if site.layer is not None) + 1)
    fractions = torch.full((len(layers), len(kinds)), float("nan"))
    labels = [["" for _ in kinds] for _ in layers]
    for site in sites:
        assert site.layer is not None
        y, x = site.layer, kinds.index(site.kind)
        fractions[y, x] = mask.on[site].double().mean()
        labels[y][x] = str(int(mask.on[site].sum())) if bool(mask.on[site].any()) else ""
    return [str(layer) for layer in layers], kinds, fractions, labels


def parameter_fractions(
    mask: ComponentMask, model_map: ModelMap, side: Side = "both", kv: KeyValues = "all"
) -> tuple[list[str], list[str], Tensor]:
    """Layers, roles, and the fraction `layer role` of each weight's entries that a mask selects.

    Biases, norms and routers are left out.

    Raises:
        MaskError: the mask does not fit the model.
    """
    marks: dict[str, Tensor] = {}
    for piece, units in model_map.selected_slices(mask, side, kv):
        if piece.parameter not in marks:
            shape = model_map.model.get_parameter(piece.parameter).shape
            marks[piece.parameter] = torch.zeros(shape, dtype=torch.bool)
        piece.of(marks[piece.parameter])[units] = True
    layers = range(model_map.n_layers)
    columns = [role for role in ROLES if any(model_map.has(layer, role) for layer in layers)]
    fractions = torch.full((len(layers), len(columns)), float("nan"))
    for layer in layers:
        for x, role in enumerate(columns):
            if model_map.has(layer, role):
                marked = marks.get(model_map.parameter_name(layer, role))
                weight, _, _ = model_map.find(layer, role)
                fractions[layer, x] = (
                    0.0
                    if marked is None
                    else unfold(marked, weight, model_map.sizes(layer)).double().mean()
                )
    return [str(layer) for layer in layers], columns, fractions


def _extremes(values: Tensor, widest: int, columns: int) -> Tensor:
    """The value of largest magnitude in each column, `column`; NaN where the layer has no units any more."""
    column = torch.arange(len(values)) * columns // widest
    shown = torch.full((columns,), float("nan"))
    # Sorted by magnitude, so that the last one written to a column is the largest.
    for i in torch.argsort(values.abs(), stable=True).tolist():
        shown[column[i]] = values[i]
    return shown


def _highest(means: Sequence[Tensor], k: int) -> list[tuple[int, int]]:
    ranked = sorted(
        ((float(value), x, y) for y, mean in enumerate(means) for value, x in _top(mean, k)),
        key=lambda item: -item[0],
    )
    return [(x, y) for _, x, y in ranked[:k]]


def _top(mean: Tensor, k: int) -> list[tuple[float, int]]:
    values, order = torch.sort(mean, descending=True, stable=True)
    return list(zip(values[:k].tolist(), order[:k].tolist(), strict=True))


def _kinds(mask: ComponentMask) -> list[str]:
    return sorted({site.kind for site in mask.sites})


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    _, new = plt.subplots(figsize=size, layout="constrained", dpi=150)
    return new


def _footer(
    ax: Axes, model_map: ModelMap | None, provenance: Mapping[str, Any], details: str
) -> None:
    """Small print under the axes: what the figure shows, of which model, and how it was found."""
    model = model_map.name if model_map is not None else provenance.get("model")
    source = _source(provenance)
    parts = [f"model: {model}" if model else "", details, f"found by: {source}" if source else ""]
    text = " | ".join(part for part in parts if part)
    width = ax.get_window_extent().width / ax.figure.dpi * 72 / 3.6  # characters at this size
    ax.annotate(
        "\n".join(wrap(text, max(20, int(width)), max_lines=3)),
        xy=(0, 0), xycoords="axes fraction", xytext=(0, -34), textcoords="offset points",
        size=6.5, color=GREY, va="top", annotation_clip=False,
    )  # fmt: skip


def _source(provenance: Mapping[str, Any]) -> str:
    """Which localizer made a mask or scores; set algebra is spelled out."""
    name, parts = str(provenance.get("localizer") or ""), provenance.get("of")
    if not isinstance(parts, Sequence):
        return name
    inner = [_source(part) or "?" for part in parts]
    return f"{name}{inner[0]}" if len(inner) == 1 else f" {name} ".join(inner)


__all__ = [
    "mask_map",
    "neuron_histogram",
    "parameter_fractions",
    "score_map",
    "unit_fractions",
]
