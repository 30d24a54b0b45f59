"""A report from hand-made numbers, read back from each of its forms."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from torch import nn

from circuits.atomic import StorageError
from circuits.draw import figure_data
from locate_edit.draw._style import COLOURS
from locate_edit.draw.report import before_after, metric_panel, oracle_panel
from locate_edit.reports.report import Cell, Example, Line, Report, SideEffect, number
from locate_edit.reports.states import called
from locate_edit.reports.text import answers


def line(
    metric: str,
    prompts: str,
    numbers: dict[str, Any],
    unit: str = "probability",
    direction: str = "up",
    items: int = 20,
) -> Line:
    cells = {
        column: value if isinstance(value, Cell) else Cell(value, value * 0.9, value * 1.1, items)
        for column, value in numbers.items()
    }
    return Line(metric, prompts, unit, direction, f"What {metric} is.", cells)


def sample(**changes: Any) -> Report:
    forget = {"before": 0.98, "after": 0.1, "random": 0.95, "oracle": 0.12}
    kept = {"before": 0.9, "after": 0.88, "random": 0.89, "oracle": 0.9}
    fields: dict[str, Any] = {
        "lines": (
            line("oracle_distance", "forget", {"before": 40.0, "after": 1.5, "random": 38.0, "oracle": 1.0},
                 "noise floors", "distance"),
            line("likelihood", "forget", forget),
            line("perplexity", "forget", {"before": 1.02, "after": 300.0, "random": 1.05, "oracle": 200.0},
                 "tokens", "down"),
            line("exposure", "forget", {"before": Cell(None, withheld="needs: digits"), "after": Cell(None)}, "bits"),
            line("likelihood", "retain", kept),
            line("perplexity", "retain", {"before": 1.1, "after": 1.2, "random": 1.1, "oracle": 1.1},
                 "tokens", "down"),
        ),
        "mask": {"units": 30, "of": 2560, "kinds": ["neuron"], "sites": {"L1.neuron": 20, "L3.neuron": 10},
                 "fraction_of_parameters": 0.007},
        "edit": {"method": {"name": "NPO", "steps": 20}},
        "model": {"class": "LlamaForCausalLM", "name": "tiny"},
        "sets": {"forget": {"items": 20}, "retain": {"items": 20}},
        "settings": {"seed": 0, "level": 0.95},
        "examples": (
            Example("forget", "Ann's <b>number</b> is", " 555-0123", {"before": " 555-0123", "after": " | & 9"}),
        ),
        "notes": ("a note with <script>alert(1)</script>",),
        "undo": ("edit.undo()",),
    }  # fmt: skip
    return Report(**{**fields, **changes})


HARMED = SideEffect(
    "retain", 7, "Where | is <b>Bo</b>?", " in | Oslo", {"before": 0.913, "after": 0.277, "random": 0.9}
)  # fmt: skip


def test_side_effects_are_in_every_form() -> None:
    report = sample(side_effects=(HARMED,))
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert Report.from_json(data).side_effects == (HARMED,)
    del data["side_effects"]  # as reports were before there were any
    assert Report.from_json(data).side_effects is None
    row = (
        "| retain | Where \\| is &lt;b>Bo&lt;/b>? | in \\| Oslo | -0.636 | 0.913 | 0.277 | 0.900 |"
    )
    text = report.to_markdown()
    assert row in text.splitlines()
    assert "Of the 20 prompts outside the forget set" in text
    page = report.to_html()
    assert "<b>Bo</b>" not in page
    cells = "".join(f'<td class="n">{n}</td>' for n in ("-0.636", "0.913", "0.277", "0.900"))
    assert f"<td><code> in | Oslo</code></td>{cells}" in page
    for form in (sample().to_markdown(), sample().to_html()):
        assert "What else changed<" not in form
        assert "## What else changed" not in form
    none = sample(side_effects=())
    assert Report.from_json(none.to_json()).side_effects == ()
    for form in (none.to_markdown(), none.to_html()):
        assert (
            "Of none of the 20 prompts outside the forget set the likelihood changed by 0.01"
            in form
        )


# ---- numbers and look-up -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.98765, "0.988"), (0.99961, "1.00"), (1.0, "1.00"), (12.345, "12.3"), (123.4, "123"), (0, "0"),
        (12345.6, "12,346"), (1.5e9, "1.5e+09"), (0.00321, "0.00321"), (0.00000321, "3.2e-06"), (-2.5, "-2.50"),
        (float("inf"), "infinite"), (None, "-"),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_report_is_short_at_the_prompt() -> None:
    shown = repr(sample())
    assert len(shown) < 200
    assert "forget" in shown
    assert "print()" in shown


def test_lines_are_found_by_metric_and_set() -> None:
    report = sample()
    assert report.value("likelihood") == 0.1
    assert report.value("likelihood", "retain", "before") == 0.9
    assert report.columns == ("before", "after", "random", "oracle")
    assert report.set_names == ["forget", "retain"]
    with pytest.raises(KeyError, match=r"no 'nll' on 'forget'; there are: forget\.oracle_distance"):
        report.line("nll")
    assert report.withheld() == [("forget.exposure", "before", "needs: digits")]


# ---- JSON ----------------------------------------------------------------------------------------


def test_json_holds_plain_numbers_and_reads_back() -> None:
    report = sample()
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["metrics"]["forget.likelihood"] == {
        "before": 0.98, "after": 0.1, "random": 0.95, "oracle": 0.12
    }  # fmt: skip
    assert data["intervals"]["forget.likelihood"]["after"] == pytest.approx([0.09, 0.11])
    assert data["metrics"]["forget.exposure"] == dict.fromkeys(
        ("before", "after", "random", "oracle")
    )
    assert data["reasons"] == {"forget.exposure": {"before": "needs: digits"}}
    assert data["definitions"]["perplexity"]["direction"] == "down"
    assert data["mask"]["units"] == 30
    assert data["edit"]["method"]["name"] == "NPO"
    back = Report.from_json(data)
    assert back.to_json() == data
    assert back.summary == report.summary


def test_infinite_numbers_do_not_break_the_json() -> None:
    endless = line(
        "perplexity",
        "forget",
        {"before": 1.0, "after": Cell(float("inf"), 2.0, float("inf"), 3)},
        "tokens",
    )
    report = sample(lines=(endless,), edit={"method": {"name": "x", "lr": float("nan")}})
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["metrics"]["forget.perplexity"]["after"] is None
    assert data["intervals"]["forget.perplexity"]["after"] is None
    assert "infinite" in str(report)
    assert report.to_markdown()


# ---- words ---------------------------------------------------------------------------------------


def test_the_summary_says_what_happened() -> None:
    text = sample().summary
    assert text.startswith(
        "NPO changed only 30 of the 2,560 neurons of tiny, 0.70% of its parameters."
    )
    assert (
        "On the 20 prompts to forget, the likelihood went from 0.980 [0.882, 1.08] to 0.100" in text
    )
    assert "a model that never learned them has 0.120" in text
    assert (
        "random mask of the same size and kind gives 0.950 [0.855, 1.04]: the place mattered."
        in text
    )
    assert (
        "is 1.50 [1.35, 1.65] (before: 40.0 [36.0, 44.0]), where 1.0 is the distance between two such models: close to"
        in text
    )
    assert "Elsewhere: retain likelihood 0.900 to 0.880." in text
    assert "further than never having learned" not in text


def test_the_summary_tells_when_the_place_made_no_difference_and_when_forgetting_went_too_far() -> (
    None
):
    same = {"before": 0.98, "after": 0.1, "random": 0.11, "oracle": 0.3}
    text = sample(lines=(line("likelihood", "forget", same),)).summary
    assert "the place made little difference" in text
    assert "the edit went further than never having learned them, which is damage" in text
    half = sample(
        lines=(line("likelihood", "forget", {"before": 1.0, "after": 0.0, "random": 0.5}),)
    )
    assert "50% of the change: the place mattered in part" in half.summary
    none = sample(
        lines=(line("likelihood", "forget", {"before": 0.999, "after": 0.998, "random": 0.999}),)
    )
    assert "changed next to nothing, so there is nothing to compare" in none.summary
    assert "mattered" not in none.summary
    # Nothing to compare with, nothing said.
    alone = sample(lines=(line("likelihood", "forget", {"before": 0.5}),), edit={}, mask={})
    assert alone.summary == "Measured on tiny, without an edit."


def test_the_summary_says_when_a_random_mask_does_as_much_but_costs_more_elsewhere() -> None:
    forget = line("likelihood", "forget", {"before": 0.98, "after": 0.1, "random": 0.11})
    harmed = line("likelihood", "retain", {"before": 0.9, "after": 0.89, "random": 0.5})
    text = sample(lines=(forget, harmed)).summary
    assert (
        "as much, but at a price that the mask does not have: retain likelihood goes from" in text
    )
    assert "0.900 to 0.500, with the mask to 0.890" in text
    also = line("likelihood", "retain", {"before": 0.9, "after": 0.4, "random": 0.3})
    assert "the place made little difference" in sample(lines=(forget, also)).summary


def test_the_summary_does_not_praise_a_distance_that_did_not_fall() -> None:
    distance = {"before": 1.56, "after": 1.57, "oracle": 1.0}
    likelihood = {"before": 0.98, "after": 0.1, "oracle": 0.12}
    lines = (
        line("oracle_distance", "forget", distance, "noise floors", "distance"),
        line("likelihood", "forget", likelihood),
    )
    text = sample(lines=lines).summary
    assert "is 1.57 [1.41, 1.73] (before: 1.56 [1.40, 1.72])" in text
    assert "no nearer than before the edit" in text
    assert "close to a retrained model" not in text


def test_markdown_keeps_foreign_text_inside_its_cell() -> None:
    text = sample().to_markdown()
    assert "| likelihood (probability) | larger | 0.980 [0.882, 1.08] |" in text
    row = next(row for row in text.splitlines() if "555-0123" in row)
    assert (
        row.count("|") - row.count("\\|") == 1 + 5
    )  # five cells: set, prompt, target, before, after
    assert "&lt;b>number" in row
    assert "<script>" not in text
    assert "- forget.exposure (before): not measured; needs: digits" in text


def test_a_narrow_table_leaves_the_intervals_out_and_says_where_they_are() -> None:
    narrow = Console(width=80, record=True, file=io.StringIO())
    narrow.print(sample().table(width=80))
    text = narrow.export_text()
    assert "0.98" in text
    assert "[0.882" not in text
    assert "intervals: in 120 columns or more, and in a saved report" in " ".join(text.split())
    assert max(len(row) for row in text.splitlines()) <= 80


def test_the_table_fits_a_terminal_and_escapes_markup() -> None:
    report = sample(sets={"forget": {"items": 20}, "[red]x": {}})
    console = Console(width=120, record=True, file=None, quiet=True)
    console.print(report.table(title="t"))
    text = str(report)
    assert "likelihood \u2191" in text
    assert "perplexity \u2193" in text
    assert "exposure" not in text  # nothing was measured: it is listed among the notes instead
    rows = [row for row in text.splitlines() if "likelihood" in row]
    assert "0.100" in rows[0]
    assert rows[0].index("0.980") < rows[0].index("0.100") < rows[0].index("0.950")


# ---- HTML ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if self.open.pop() != tag:
            raise AssertionError(f"</{tag}> closes another tag")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    return page


def test_the_page_is_self_contained_and_escapes_foreign_text() -> None:
    report = sample()
    page = read(report.to_html())
    assert page.open == []
    assert "script" not in page.tags
    assert len(page.links) == 2
    for link in page.links:
        head, _, code = link.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(code).startswith(b"\x89PNG")
    text = "".join(page.text)
    for question, said in answers(report).items():
        assert f"{question}{said}" in text
    assert "a note with <script>alert(1)</script>" in text
    assert "Ann's <b>number</b> is" in text
    assert "edit.undo()" in text
    assert "forget.exposure (before): not measured; needs: digits" in text
    assert "0.09 to 0.11" in text.replace("0.0900", "0.09").replace("0.110", "0.11")


def test_the_fragment_for_notebooks_is_a_table_alone() -> None:
    page = read(sample()._repr_html_())
    assert page.open == []
    assert page.links == []
    assert "0.980" in "".join(page.text)


# ---- figures -------------------------------------------------------------------------------------


def test_bars_stand_for_the_numbers_and_whiskers_for_the_intervals() -> None:
    report = sample()
    axes = metric_panel(report, "likelihood")
    assert {"set": "forget", "metric": "likelihood", "state": "before"}.items() <= figure_data(
        axes
    )[0].items()
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in axes.containers}
    assert heights == {
        "before": [0.98, 0.9], "after": [0.1, 0.88], "random mask": [0.95, 0.89], "oracle": [0.12, 0.9]
    }  # fmt: skip
    whiskers = sorted(tuple(np.asarray(ln.get_ydata()).tolist()) for ln in axes.lines)
    assert len(whiskers) == 8
    assert whiskers[0] == pytest.approx((0.09, 0.11))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "forget\nn = 20",
        "retain\nn = 20",
    ]
    assert axes.get_ylabel() == "probability"
    assert axes.get_ylim() == (0, 1.05)
    assert metric_panel(report, "perplexity").get_yscale() == "log"
    away = replace(report, lines=tuple(replace(x, direction="distance") for x in report.lines))
    title = metric_panel(away, "likelihood").get_title(loc="left")
    assert title == "likelihood (smaller: closer)"


def test_one_panel_a_metric_with_a_footer_that_describes_the_figure() -> None:
    report = sample()
    figure = before_after(report)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["likelihood (larger: better known)", "perplexity (smaller: better known)"]
    footer = figure.get_supxlabel().replace("\n", " ")
    assert footer == "tiny, NPO; bars: mean over items; lines: 95% bootstrap interval over items"
    assert set(report.figures()) == {"before_after", "oracle_distance"}
    without = sample(lines=tuple(ln for ln in report.lines if ln.metric != "oracle_distance"))
    assert set(without.figures()) == {"before_after"}


def test_the_distance_panel_marks_another_retraining() -> None:
    axes = oracle_panel(sample())
    assert axes.get_xscale() == "log"
    points = {
        c.get_label(): c.get_offsets().tolist()[0][0]  # type: ignore[union-attr]
        for c in axes.collections
    }
    assert points == {"before": 40.0, "after": 1.5, "random mask": 38.0}
    upright = [ln for ln in axes.lines if ln.get_label() == "two retrained models"]
    assert np.asarray(upright[0].get_xdata()).tolist() == [1.0, 1.0]


def test_colours_are_told_apart_without_red_and_green() -> None:
    def luminance(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    shades = sorted(luminance(colour) for column, colour in COLOURS.items() if column != "before")
    assert all(b - a > 0.05 for a, b in itertools.pairwise(shades))


# ---- files ---------------------------------------------------------------------------------------


def test_a_saved_report_has_all_its_forms(tmp_path: Path) -> None:
    report = sample()
    folder = report.save(tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == [
        "before_after.png", "oracle_distance.png", "report.html", "report.json", "report.md"
    ]  # fmt: skip
    assert json.loads((folder / "report.json").read_text("utf-8")) == report.to_json()
    page = read((folder / "report.html").read_text("utf-8"))
    drawn = base64.b64encode((folder / "before_after.png").read_bytes()).decode()
    assert page.links[0].endswith(drawn)
    image = (folder / "before_after.png").read_bytes()
    width, height = struct.unpack(">II", image[16:24])
    assert width > 1000
    assert height > 500
    # Again, beside other files: replaced, nothing else touched.
    (folder / "mine.txt").write_text("x")
    report.save(folder)
    assert (folder / "mine.txt").read_text() == "x"


def test_nothing_is_written_when_a_form_cannot_be_made(tmp_path: Path) -> None:
    class Broken(Report):
        def to_markdown(self) -> str:
            raise RuntimeError("no words")

    with pytest.raises(RuntimeError, match="no words"):
        Broken(lines=sample().lines).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises((StorageError, NotADirectoryError, FileExistsError)):
        sample().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_no_absolute_path_travels_with_a_report() -> None:
    model = nn.Linear(1, 1)
    assert called(model) == "Linear"
    for name, said in {"/some/where/my-model": "my-model", "owner/name": "owner/name"}.items():
        model.config = SimpleNamespace(name_or_path=name)  # type: ignore[assignment]
        assert called(model) == said
    assert not re.search(r"/(work|home|tmp)/", json.dumps(sample().to_json()))
