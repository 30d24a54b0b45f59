"""What the figures of edits share: a figure of its own, and a colour for each state of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Mapping[str, str] = {
    "before": "#9aa0a6",
    "after": "#0072B2",
    "random": "#E69F00",
    "oracle": "#009E73",
}
"""Okabe and Ito's palette, with grey for the state that is only the point of departure."""


def free_figure(width: float, height: float) -> Figure:
    """A figure (inches) outside of any figure manager: nothing to close and no backend to choose."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
