"""Figures of what edits did: reports, attacks, layers, moved weights, and several edits compared.

Like those of `circuits.draw`, whose `save_figure` and `figure_data` work on them too. Names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuits.lazy import lazy_exports

_HOME = {
    "before_after": "locate_edit.draw.report",
    "carried_map": "locate_edit.draw.layers",
    "attack_curves": "locate_edit.draw.robustness",
    "attack_dots": "locate_edit.draw.robustness",
    "heat_map": "locate_edit.draw.comparison",
    "layer_lines": "locate_edit.draw.layers",
    "lens_map": "locate_edit.draw.layers",
    "metric_panel": "locate_edit.draw.report",
    "oracle_panel": "locate_edit.draw.report",
    "relearning": "locate_edit.draw.edits",
    "slope_panel": "locate_edit.draw.edits",
    "slope_panels": "locate_edit.draw.edits",
    "summary_bars": "locate_edit.draw.edits",
    "trade_off": "locate_edit.draw.comparison",
    "weight_change": "locate_edit.draw.edits",
}

__all__ = [
    "attack_curves",
    "attack_dots",
    "before_after",
    "carried_map",
    "heat_map",
    "layer_lines",
    "lens_map",
    "metric_panel",
    "oracle_panel",
    "relearning",
    "slope_panel",
    "slope_panels",
    "summary_bars",
    "trade_off",
    "weight_change",
]

if TYPE_CHECKING:
    from locate_edit.draw.comparison import heat_map, trade_off
    from locate_edit.draw.edits import (
        relearning,
        slope_panel,
        slope_panels,
        summary_bars,
        weight_change,
    )
    from locate_edit.draw.layers import carried_map, layer_lines, lens_map
    from locate_edit.draw.report import before_after, metric_panel, oracle_panel
    from locate_edit.draw.robustness import attack_curves, attack_dots

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
