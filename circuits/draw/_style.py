"""What all figures share: colours, axes, titles, footers, the numbers behind a figure, and how one is saved.

Matplotlib is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import PurePath
from textwrap import wrap
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from circuits.errors import LocateEditError
from circuits.model_map import ModelMap

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array: TypeAlias = "npt.NDArray[Any]"
Row = dict[str, Any]

# Okabe and Ito's palette, without its yellow (too light for lines on paper), with grey for chance.
BLUE, VERMILION, GREEN, ORANGE, SKY, PINK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
)
BLACK, GREY = "#000000", "#7F7F7F"
HUES = (BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, BLACK)
MARKERS = "osD^vPX"
NOTHING = "0.92"
"""Shade of cells that stand for nothing."""

PRINT = 300
"""Dots per inch of a saved figure."""

_ROWS: WeakKeyDictionary[Any, Callable[[], list[Row]]] = WeakKeyDictionary()


def new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given axes, or those of a new figure of a size in inches."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    _, new = plt.subplots(figsize=size, layout="constrained", dpi=150)
    return new


def inches(cells: int, each: float, most: float = 7.0) -> float:
    """How long so many cells are; large models get smaller cells."""
    return min(most, cells * each)


def new_row(n: int, size: tuple[float, float]) -> list[Axes]:
    """Axes side by side in a new figure of a size in inches."""
    from matplotlib import pyplot as plt

    _, made = plt.subplots(1, n, figsize=size, layout="constrained", dpi=150, squeeze=False)
    return list(made[0])


def figure_of(ax: Axes) -> Any:
    """The figure that axes belong to."""
    return ax.figure


# ---- the numbers behind a figure ----------------------------------------------------------------------------------


def provide(drawn: Axes | Figure, rows: Callable[[], list[Row]]) -> None:
    """Remember how to make the rows of what has been drawn."""
    _ROWS[drawn] = rows


def figure_data(drawn: Axes | Sequence[Axes] | Figure) -> list[Row]:
    """What a figure of this package shows, as one dictionary per mark (cell, bar, point, edge, token).

    Args:
        drawn: what the function that drew it returned.

    Raises:
        LocateEditError: nothing was drawn there by a function of this package.
    """
    if isinstance(drawn, Sequence):
        return [row for each in drawn for row in figure_data(each)]
    if drawn not in _ROWS:
        raise LocateEditError(
            "these axes have no data to export: expected what a function of circuits.draw or locate_edit.draw returned"
        )
    return _ROWS[drawn]()


def figure_frame(drawn: Axes | Sequence[Axes] | Figure) -> pd.DataFrame:
    """`figure_data` as a data frame.

    Raises:
        LocateEditError: pandas is not installed, or nothing was drawn there by a function of this package.
    """
    try:
        import pandas
    except ImportError:
        raise LocateEditError(
            "a data frame needs pandas, which is not installed: pip install pandas, or use figure_data()"
        ) from None
    return pandas.DataFrame(figure_data(drawn))


def save_figure(
    drawn: Axes | Sequence[Axes] | Figure, path: str | PathLike[str], dpi: int = PRINT
) -> None:
    """Write the figure of some axes to a file, with everything that reaches out of it.

    Args:
        drawn: axes, several of one figure, or a figure.
        path: the file; its ending says the format (png, pdf, svg).
        dpi: dots per inch.
    """
    first: Any = drawn[0] if isinstance(drawn, Sequence) else drawn
    figure = getattr(first, "figure", first) or first
    figure.savefig(path, dpi=dpi, bbox_inches="tight", pad_inches=0.05)


# ---- text ---------------------------------------------------------------------------------------------------------


def entitle(ax: Axes, title: str, subtitle: str = "") -> None:
    """A title as wide as the figure allows, and small print below it."""
    width = int(max(24, _points(ax) * 1.25 / 5.2))
    lines = wrap(title, width, max_lines=2) + (wrap(subtitle, width + 12) if subtitle else [])
    ax.set_title("\n".join(lines), size=10 if not subtitle else 9.5, parse_math=False)


def footer(
    ax: Axes,
    *parts: str,
    model_map: ModelMap | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Small print under the axes: of which model it is, what it shows (``parts``), and how it was found."""
    notes = provenance or {}
    model, source = model_name(model_map, notes), source_of(notes)
    # A colour bar beside the axes leaves room below itself.
    width = max(40, int(_points(ax) * 1.18 / 3.3))
    said = [f"model: {model}" if model else "", *parts, f"found by: {source}" if source else ""]
    text = " | ".join(part for part in said if part)
    ax.annotate(
        "\n".join(wrap(text, width, max_lines=3)),
        xy=(0, 0), xycoords=("axes fraction", ax.xaxis.label), xytext=(0, -5),
        textcoords="offset points", size=6.5, color="0.35", va="top", annotation_clip=False,
        parse_math=False,
    )  # fmt: skip


def model_name(model_map: ModelMap | None, provenance: Mapping[str, Any]) -> str:
    """What to call the model of a figure; empty if nothing says so."""
    if model_map is not None:
        # Where a model lies on somebody's disk is nobody else's business.
        path = PurePath(model_map.name)
        return path.name if path.is_absolute() else model_map.name
    model = provenance.get("model")
    if isinstance(model, Mapping):
        return f"{model.get('class', '')} {str(model.get('fingerprint', ''))[:8]}".strip()
    parts = provenance.get("of")
    if model is None and isinstance(parts, Sequence) and not isinstance(parts, str):
        names = {model_name(None, part) for part in parts if isinstance(part, Mapping)}
        return names.pop() if len(names) == 1 else ""
    return str(model or "")


def source_of(provenance: Mapping[str, Any]) -> str:
    """Which method made a value; set algebra and arithmetic are spelled out."""
    name = str(provenance.get("localizer") or provenance.get("method") or "")
    parts = provenance.get("of")
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        return name
    inner = [source_of(part) or "?" for part in parts]
    return f"{name}{inner[0]}" if len(inner) == 1 else f" {name} ".join(inner)


def token_text(text: str) -> str:
    """A token as a label: line breaks and blanks are made visible, a leading space is left out."""
    shown = text.replace("\n", "↵").replace("\t", "⇥")
    return shown.strip() or "␣" * len(shown)


def numbered(tokens: Sequence[str], starred: Sequence[int] = ()) -> list[str]:
    """Labels of positions: number and token, with a star for some."""
    return [
        f"{i}:{token_text(token)}{'*' if i in set(starred) else ''}"
        for i, token in enumerate(tokens)
    ]


def position_labels(ax: Axes, labels: Sequence[str]) -> None:
    """Tokens along the x axis, upright where there are many or long ones."""
    tight = sum(len(label) for label in labels) * 4.2 > _points(ax) * 0.8
    ax.set_xticks(range(len(labels)), labels, rotation=90 if tight else 0, size=7, parse_math=False)


def layer_ticks(ax: Axes, layers: Sequence[Any], axis: str = "y") -> None:
    """Numbers of layers at places 0, 1, ...; at most 16 of them."""
    step = max(1, -(-len(layers) // 16))
    places, labels = range(0, len(layers), step), [str(layer) for layer in layers[::step]]
    (ax.set_yticks if axis == "y" else ax.set_xticks)(places, labels)


# ---- numbers ------------------------------------------------------------------------------------------------------


def as_array(values: Any) -> Array:
    """Anything like an array in float64; tensors may be on any device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def largest(values: Array) -> float:
    """The largest absolute value, 1 where there is none: the limit of a scale that is symmetric about 0."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def count_of(n: int, what: str) -> str:
    """`n = 1 prompt`, `n = 8 prompts`."""
    return f"n = {n:,} {what}{'' if n == 1 else 's'}"


def colour_bar(ax: Axes, image: Any, label: str, **more: Any) -> Any:
    """A colour bar beside axes, its label in as many lines as it takes."""
    figure = figure_of(ax)
    points = ax.get_window_extent().height / figure.dpi * 72
    bar = figure.colorbar(image, ax=ax, **more)
    bar.set_label("\n".join(wrap(label, max(14, int(points / 4.6)))), size=8.5, parse_math=False)
    bar.ax.tick_params(labelsize=8)
    return bar


def write_cells(ax: Axes, image: Any, texts: Sequence[Sequence[str]], size: float = 7) -> None:
    """Text into the cells of an image, white on dark and black on light."""
    values = image.get_array()
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            if text:
                red, green, blue, _ = image.to_rgba(np.atleast_2d(values[y, x]))[0, 0]
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                ax.text(
                    x, y, text, ha="center", va="center", size=size,
                    color="white" if dark else "black", parse_math=False,
                )  # fmt: skip


def _points(ax: Axes) -> float:
    """Width of axes (points), before a layout has settled."""
    return float(ax.get_window_extent().width / figure_of(ax).dpi * 72)
