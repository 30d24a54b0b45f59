"""Where in the layers an answer appears before and after an edit: the logit lens as a picture of an edit's depth.

    lens = lens_depth(edited, original, forget)
    lens_map(lens)          # before and after, prompts by layers
    layer_lines(depth)      # of `metrics.unlearning_depth.unlearning_depth`

The logit lens reads the residual stream with the model's own output layer; an answer that is there in another form
does not show. So an empty map does not prove that the layers forgot: what a layer *carries* is told by unlearning
depth, and both are drawn here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from circuits.logit_lens import logit_lens
from circuits.model_map import describe
from locate_edit.errors import LocateEditError
from locate_edit.metrics.running import scored_batches
from locate_edit.metrics.values import Floats
from locate_edit.prompts import PromptSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from locate_edit.metrics.unlearning_depth import Depth

__all__ = ["LensDepth", "layer_lines", "lens_depth", "lens_map"]

MOST_NAMED = 40
"""Prompts whose text stands beside the map; of more only the number is written."""

_COLOURS = {"s1": "#009E73", "s2": "#0072B2", "control": "#D55E00", "between": "#E69F00"}
_MEANING = {
    "s1": "oracle's stream (s1)",
    "s2": "edited model's stream (s2)",
    "control": "control: oracle's stream, retained prompts",
    "between": "control: other oracle's in the oracle, retained",
}


@dataclass(frozen=True, eq=False)
class LensDepth:
    """Probability of each prompt's target as the logit lens reads it after each layer, before and after an edit.

    Attributes:
        layers: the layers, `layer`; -1 is the stream before the first one.
        before: geometric mean over the target's scored tokens, `item layer` (probability); NaN for a prompt whose
            weights are all 0.
        after: the same after the edit, `item layer` (probability).
        names: a label for each prompt, its last words and its target, `item`.
        model: what is written under a figure.
    """

    layers: tuple[int, ...]
    before: Floats
    after: Floats
    names: tuple[str, ...]
    model: str = ""

    def rows(self) -> list[dict[str, float | int | str]]:
        """One dictionary per prompt and layer: item, name, layer, before and after (probability)."""
        return [
            {
                "item": item,
                "name": name,
                "layer": layer,
                "before": float(self.before[item, k]),
                "after": float(self.after[item, k]),
            }
            for item, name in enumerate(self.names)
            for k, layer in enumerate(self.layers)
        ]


def lens_depth(
    edited: nn.Module, original: nn.Module, prompts: PromptSet, *, batch_size: int = 16
) -> LensDepth:
    """What the logit lens reads of each prompt's target after each layer, in the original and in the edited model.

    exp of the weighted mean log-probability of the scored tokens, the text before each of them being given: the last
    layer's is the metric `likelihood`.

    Args:
        edited: the model after the edit.
        original: the model before it, another object: edits change a model in place.
        prompts: the prompts.
        batch_size: rows a forward pass.

    Raises:
        LocateEditError: the same object twice, or models with different numbers of layers.
        PromptError: prompts that are too long for a model.
    """
    if edited is original:
        raise LocateEditError(
            "a comparison of an edited model with the original got one object as both. An edit changes a model in "
            "place: give a copy made before (copy.deepcopy(model)), or the model loaded again."
        )
    before, after = (_readings(model, prompts, batch_size) for model in (original, edited))
    if before.shape != after.shape:
        raise LocateEditError(
            "cannot compare models of different depth: expected the same number of layers, got "
            f"{before.shape[1] - 1} before and {after.shape[1] - 1} after the edit."
        )
    names = tuple(_name(prompts, item) for item in range(len(prompts)))
    about = describe(original)
    return LensDepth(tuple(range(-1, about.n_layers)), before, after, names, about.name)


def _readings(model: nn.Module, prompts: PromptSet, batch_size: int) -> Floats:
    """Geometric mean of the target's probabilities by layer, `item layer`."""
    prompts.check_context(model)
    about = describe(model)
    total = np.zeros((len(prompts), about.n_layers + 1))
    mass = np.zeros(len(prompts))
    for batch in scored_batches(model, prompts, batch_size):
        lens = logit_lens(about, batch)
        items = np.array(batch.items)[batch.item.cpu().numpy()]
        weight = batch.weight.double().cpu().numpy()
        # The smallest number of float32 stands for a probability that was rounded to nothing.
        floor = torch.finfo(torch.float32).tiny
        log_p = lens.probability.double().clamp(min=floor).log().numpy()
        np.add.at(mass, items, weight)
        np.add.at(total, items, (log_p * weight).T)
    empty = mass[:, None] <= 0
    mean = total / np.where(empty, 1.0, mass[:, None])
    return np.asarray(np.where(empty, np.nan, np.exp(mean)), dtype=np.float64)


def _name(prompts: PromptSet, item: int) -> str:
    decode = prompts.tokenizer.decode
    target = str(decode(prompts.target_ids(item))).strip()
    before = str(decode(prompts.prompt_ids(item), skip_special_tokens=True)).strip()
    before = before if len(before) <= 28 else "…" + before[-27:]
    return f"{before} → {target[:20]}"


# ---- figures ------------------------------------------------------------------------------------------------------


def lens_map(lens: LensDepth) -> Figure:
    """Two heat maps side by side, before and after the edit: prompts from top to bottom, layers to the right."""
    n_items, n_layers = lens.before.shape
    named = n_items <= MOST_NAMED
    height = 1.9 + (0.26 * max(4, n_items) if named else 5.0)
    width = (3.2 if named else 1.2) + 2 * max(2.2, min(5.0, 0.42 * n_layers)) + 0.8
    figure = _figure(width, height)
    panels = figure.subplots(1, 2, sharey=True)
    image = None
    for axes, values, title in zip(
        panels, (lens.before, lens.after), ("before the edit", "after the edit"), strict=True
    ):
        image = axes.imshow(
            values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        mean = float(np.nanmean(values[:, -1])) if np.isfinite(values[:, -1]).any() else np.nan
        axes.set_title(f"{title}\nlast layer, mean {mean:.2f}", fontsize=9.5)
        step = max(1, n_layers // 8)
        shown = list(range(0, n_layers, step))
        words = ["embed" if lens.layers[k] < 0 else str(lens.layers[k]) for k in shown]
        axes.set_xticks(shown, words, fontsize=8)
        axes.set_xlabel("read after layer", fontsize=9)
    if named:
        panels[0].set_yticks(range(n_items), lens.names, fontsize=7.5, parse_math=False)
    else:
        panels[0].set_ylabel(f"prompt (n = {n_items})", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=panels, fraction=0.05)
    bar.set_label("p(target), logit lens", fontsize=8.5)
    figure.supxlabel(
        f"{lens.model}; probability of the target, geometric mean over its tokens; n = {n_items}",
        fontsize=7.5,
        color="#5f6368",
    )
    return figure


def layer_lines(depth: Depth, ax: Axes | None = None) -> Axes:
    """What patching a layer costs, by layer: the oracle's stream, the edited model's, and the controls.

    Where the line of the edited model lies on that of the oracle, a layer has lost the answer; where it lies at 0, the
    layer still carries it. Where a control is not at 0, the oracle's line says less than it seems to. Means over
    prompts, with 95% bootstrap intervals over them.
    """
    axes = _figure(8.6, 3.6).add_subplot() if ax is None else ax
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
    return axes


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, outside of any figure manager: nothing to close and no backend to choose."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
