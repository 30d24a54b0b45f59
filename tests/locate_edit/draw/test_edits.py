"""Figures of reports and attacks: what is drawn is what the reports say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from circuits.draw import figure_data, save_figure
from locate_edit.attacked import Attacked, Point
from locate_edit.draw.edits import relearning, slope_panel, slope_panels, summary_bars
from locate_edit.errors import EditError
from locate_edit.metrics.values import Values
from locate_edit.reports.report import Cell, Line, Report


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def line(metric: str, prompts: str, numbers: dict[str, Any], direction: str = "up") -> Line:
    cells = {
        column: value if isinstance(value, Cell) else Cell(value, value * 0.9, value * 1.1, 20)
        for column, value in numbers.items()
    }
    unit = {"up": "probability", "down": "tokens", "distance": "noise floors"}[direction]
    return Line(metric, prompts, unit, direction, "What it is.", cells)


def report(after: float = 0.2, **changes: Any) -> Report:
    fields: dict[str, Any] = {
        "lines": (
            line("oracle_distance", "forget", {"before": 40.0, "after": 1.5}, "distance"),
            line("likelihood", "forget",
                 {"before": 0.8, "after": after, "random": 0.72, "oracle": 0.1}),
            line("likelihood", "retain", {"before": 0.5, "after": 0.45, "random": 0.5}),
            line("perplexity", "forget", {"before": 2.0, "after": 500.0, "random": 4.0}, "down"),
            line("perplexity", "retain", {"before": 3.0, "after": math.inf, "random": 3.0}, "down"),
            line("exposure", "forget",
                 {"before": Cell(None, withheld="needs: digits"), "after": Cell(1.0)}),
        ),
        "edit": {"method": {"name": "NPO"}},
        "model": {"name": "tiny"},
        "settings": {"level": 0.95},
    }  # fmt: skip
    return Report(**{**fields, **changes})


# ---- before against after -------------------------------------------------------------------------


def test_a_slope_runs_from_before_to_after_with_the_reports_intervals() -> None:
    ax: Any = slope_panel(report())
    slopes = [drawn for drawn in ax.lines if len(drawn.get_xdata()) == 2 and not upright(drawn)]
    assert [list(s.get_ydata()) for s in slopes] == [[0.8, 0.2], [0.5, 0.45]]
    whiskers = [tuple(drawn.get_ydata()) for drawn in ax.lines if upright(drawn)]
    values = (0.8, 0.2, 0.72, 0.1, 0.5, 0.45, 0.5)
    assert whiskers == [(v * 0.9, v * 1.1) for v in values]
    # No two points of one state lie on one another.
    at = [float(np.asarray(drawn.get_xdata())[0]) for drawn in ax.lines if upright(drawn)]
    assert len(set(at)) == len(at)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [
        "before",
        "after",
        "random mask",
        "oracle",
    ]
    found = {(row["set"], row["state"]): row["value"] for row in figure_data(ax)}
    assert found["forget", "random"] == 0.72
    assert ("retain", "oracle") not in found
    assert ax.get_title() == "NPO"


def upright(drawn: Any) -> bool:
    x = np.asarray(drawn.get_xdata())
    return len(x) == 2 and x[0] == x[1]


def test_what_has_no_number_is_not_drawn() -> None:
    ax: Any = slope_panel(report(), "perplexity")  # infinite after the edit on retain
    assert {row["set"] for row in figure_data(ax)} == {"forget"}
    assert ax.get_yscale() == "log"
    with pytest.raises(EditError, match="'exposure' has no number before and after"):
        slope_panel(report(), "exposure")


def test_a_panel_for_each_report_on_one_scale(tmp_path: Any) -> None:
    drawn = slope_panels({"NPO": report(), "other": report(0.6)})
    assert [ax.get_title() for ax in drawn] == ["NPO", "other"] * 2  # likelihood, perplexity
    assert drawn[0].get_ylim() == drawn[1].get_ylim() != drawn[2].get_ylim()
    after = [r["value"] for r in figure_data(drawn[1]) if r["state"] == "after"]
    assert after == [0.6, 0.45]
    save_figure(drawn, tmp_path / "slopes.png", dpi=50)
    few = report(lines=report().lines[:2])
    assert len(slope_panels({"a": report(), "b": few})) == 2
    with pytest.raises(EditError, match="no metric to draw"):
        slope_panels({})


# ---- relearning -----------------------------------------------------------------------------------


def attacked(points: Sequence[tuple[float, float, float | None]], unit: str = "steps") -> Attacked:
    values = Values.make(
        "likelihood", [points[-1][1] - 0.1, points[-1][1] + 0.1], unit="probability", direction="up"
    )
    return Attacked(values, values, curve=tuple(Point(*p) for p in points), strength=unit)


def test_relearning_has_a_line_a_method_and_the_oracle_in_black() -> None:
    hidden, gone = [(0, 0.1, 0.9), (10, 0.8, 0.88)], [(0, 0.1, None), (10, 0.2, None)]
    never = attacked([(0, 0.1, 0.9), (10, 0.15, 0.9)])
    ax: Any = relearning({"hidden": attacked(hidden), "gone": attacked(gone)}, oracle=never)
    lines = {str(drawn.get_label()): drawn for drawn in ax.lines}
    assert list(lines["hidden"].get_ydata()) == [0.1, 0.8]
    assert list(lines["hidden"].get_xdata()) == [0, 10]
    assert lines["oracle (never saw them)"].get_color() == "#000000"
    colours = [lines[name].get_color() for name in ("hidden", "gone")]
    assert len({*colours, "#000000"}) == 3
    dashed = [
        list(d.get_ydata()) for d in ax.lines if d.get_linestyle() == "--" and len(d.get_ydata())
    ]
    assert dashed == [[0.9, 0.88], [0.9, 0.9]]  # retain, where it was measured
    assert next(tuple(d.get_ydata()) for d in ax.lines if upright(d)) == pytest.approx((0.7, 0.9))
    assert ax.get_xlabel() == "steps"
    rows = figure_data(ax)
    assert {"method": "gone", "strength": 10, "forget": 0.2, "retain": None} in rows


def test_curves_of_one_kind_only() -> None:
    good = attacked([(0, 0.1, None)])
    with pytest.raises(EditError, match="no curve to draw: empty"):
        relearning({"good": good, "empty": Attacked(good.forget, good.forget)})
    with pytest.raises(EditError, match="no curve to draw"):
        relearning({})
    with pytest.raises(EditError, match="do not belong on one scale"):
        relearning({"good": good, "bits": attacked([(4, 0.1, None)], "bits")})


# ---- several edits --------------------------------------------------------------------------------


def test_bars_are_fractions_of_the_original() -> None:
    ax: Any = summary_bars({"a": report(), "b": report(0.6)})
    found = {(r["report"], r["key"], r["state"]): r["normalised"] for r in figure_data(ax)}
    assert found == pytest.approx({
        ("a", "forget.likelihood", "after"): 0.25, ("b", "forget.likelihood", "after"): 0.75,
        ("a", "retain.likelihood", "after"): 0.9, ("b", "retain.likelihood", "after"): 0.9,
        # Perplexity rises where the model knows less: before over after.
        ("a", "forget.perplexity", "after"): 2 / 500, ("b", "forget.perplexity", "after"): 2 / 500,
        **{(name, "forget.likelihood", "random"): 0.9 for name in "ab"},
        **{(name, "forget.likelihood", "oracle"): 0.125 for name in "ab"},
        **{(name, "retain.likelihood", "random"): 1.0 for name in "ab"},
        **{(name, "forget.perplexity", "random"): 0.5 for name in "ab"},
    })  # fmt: skip
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx([0.25, 0.9, 0.004, 0.75, 0.9, 0.004])
    whiskers = [tuple(d.get_ydata()) for d in ax.lines if upright(d)]
    assert whiskers[0] == pytest.approx((0.2 * 0.9 / 0.8, 0.2 * 1.1 / 0.8))
    assert whiskers[2] == pytest.approx((2 / 550, 2 / 450))  # turned over, still low to high
    assert "before over after: perplexity" in " ".join(text.get_text() for text in ax.texts)


def test_bars_of_some_metrics_and_of_none() -> None:
    ax: Any = summary_bars(report(), ["likelihood"])
    assert {row["key"] for row in figure_data(ax)} == {"forget.likelihood", "retain.likelihood"}
    assert {row["report"] for row in figure_data(ax)} == {"NPO"}
    nothing = report(lines=(line("likelihood", "forget", {"before": 0.0, "after": 0.1}),))
    with pytest.raises(EditError, match="fraction of the original"):
        summary_bars(nothing)
