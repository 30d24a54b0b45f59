"""Report: the outcome of an evaluation as a table, JSON, markdown, HTML and figures.

A report is plain data: it can be made from `evaluate`, saved, and read back without a model.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.atomic import atomic_file
from locate_edit.reports.states import COLUMNS, TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from locate_edit.metrics.values import Values

__all__ = [
    "FILES",
    "Cell",
    "Example",
    "Line",
    "Report",
    "SideEffect",
    "number",
    "plain",
    "signed",
    "without_doubles",
]

FORMAT = 1
MEASURED = ("report.json", "report.md", "report.html", "before_after.png", "oracle_distance.png")
FILES = (
    *MEASURED, "robustness.json", "layers.json", "attacks.png", "relearning*.png", "carried.png", "lens.png",
    "weight_change.png",
)  # fmt: skip
"""What the folder of a report or an examination may hold."""
_ARROWS = {"up": "\u2191", "down": "\u2193"}


_WIDTH_WITH_INTERVALS = 120


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        value: the average over the items, or None where it is withheld.
        low: lower end of its bootstrap interval, or None where none can be told.
        high: upper end of the interval, or None.
        items: how many items the number rests on.
        withheld: why there is no number, if there is none.
        note: what a reader must know about the number.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    items: int = 0
    withheld: str = ""
    note: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


@dataclass(frozen=True)
class Line:
    """One metric on one prompt set, in every state of the model.

    Attributes:
        metric: name of the metric.
        prompts: name of the prompt set.
        unit: of the numbers.
        direction: "up" if a larger number means that the model knows the texts better, "down" if a smaller one
            does, "distance" if the number tells how far the model is from another one, "closeness" how near.
        definition: what the number is, in a sentence.
        cells: the numbers, by state.
        values: the numbers item by item, by state; empty for a report read from a file.
    """

    metric: str
    prompts: str
    unit: str
    direction: str
    definition: str
    cells: Mapping[str, Cell]
    values: Mapping[str, Values] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """How files name the line: `forget.likelihood`."""
        return f"{self.prompts}.{self.metric}"

    @property
    def title(self) -> str:
        """The metric's name in words, with its settings if it has any."""
        name, bracket, settings = self.metric.partition("(")
        # Keys of files hold no dots: see `key_of`.
        settings = re.sub(r"(?<=\d)_(?=\d)", ".", settings)
        return f"{name.replace('_', ' ')}{bracket and ' ('}{settings}"

    def value(self, column: str) -> float | None:
        """The number in one state, or None."""
        cell = self.cells.get(column)
        return None if cell is None else cell.value

    @property
    def shown(self) -> bool:
        """Whether there is any number in the line."""
        return any(cell.value is not None for cell in self.cells.values())


@dataclass(frozen=True)
class Example:
    """What the model says to one prompt, in every state."""

    prompts: str
    prompt: str
    target: str
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class SideEffect:
    """A prompt outside the forget set whose answer the edit made less, or more, probable.

    Attributes:
        prompts: name of its prompt set.
        item: its index there.
        prompt: the text before the target.
        target: the answer, cut where it is long.
        likelihood: of the target (geometric mean of its tokens' probabilities), by state.
    """

    prompts: str
    item: int
    prompt: str
    target: str
    likelihood: Mapping[str, float]

    @property
    def change(self) -> float:
        """Likelihood after minus likelihood before."""
        return self.likelihood["after"] - self.likelihood["before"]


@dataclass(frozen=True, repr=False)
class Report:
    """What an edit did: numbers before and after it, beside a random mask and a model that never learned.

    Attributes:
        lines: a metric on a prompt set each.
        mask: size, place and origin of the component mask.
        edit: how the edit was made.
        model: which model.
        sets: size and digest of each prompt set.
        settings: seed, bootstrap, batch size, versions.
        examples: what the model says.
        notes: what a reader must know.
        undo: how to take the edit back, in lines of code or shell.
        side_effects: the prompts outside the forget set whose likelihood changed most, largest change first; None
            where nobody looked.
    """

    lines: tuple[Line, ...]
    mask: Mapping[str, Any] = field(default_factory=dict)
    edit: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    notes: tuple[str, ...] = ()
    undo: tuple[str, ...] = ()
    side_effects: tuple[SideEffect, ...] | None = None

    # ---- looking up ------------------------------------------------------------------------------

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The states in which anything was measured."""
        measured = {
            column
            for line in self.lines
            for column, cell in line.cells.items()
            if cell.value is not None
        }
        return tuple(column for column in COLUMNS if column in measured)

    def line(self, metric: str, prompts: str = "forget") -> Line:
        """The line of a metric on a prompt set.

        Raises:
            KeyError: there is none; the message lists what there is.
        """
        for line in self.lines:
            if (line.metric, line.prompts) == (metric, prompts):
                return line
        known = ", ".join(line.key for line in self.lines)
        raise KeyError(f"no {metric!r} on {prompts!r}; there are: {known}")

    def value(self, metric: str, prompts: str = "forget", column: str = "after") -> float | None:
        """One number, or None where it is withheld."""
        return self.line(metric, prompts).value(column)

    def of_set(self, prompts: str) -> list[Line]:
        """The lines of one prompt set."""
        return [line for line in self.lines if line.prompts == prompts]

    @property
    def set_names(self) -> list[str]:
        """The prompt sets in the order they were measured."""
        return list(dict.fromkeys(line.prompts for line in self.lines))

    @property
    def metric_names(self) -> list[str]:
        """The metrics in the order they were measured."""
        return list(dict.fromkeys(line.metric for line in self.lines))

    def withheld(self) -> list[tuple[str, str, str]]:
        """What was not measured and why: line, state and reason."""
        return [
            (line.key, column, cell.withheld)
            for line in self.lines
            for column, cell in line.cells.items()
            if cell.withheld
        ]

    @property
    def n_elsewhere(self) -> int:
        """How many prompts outside the forget set were measured: what the side effects are the extremes of."""
        return sum(
            int(about.get("items", 0)) for name, about in self.sets.items() if name != "forget"
        )

    @property
    def summary(self) -> str:
        """The outcome in one paragraph for someone who was not there."""
        from locate_edit.reports.text import summary

        return summary(self)

    # ---- forms -----------------------------------------------------------------------------------

    def table(self, *, title: str = "", width: int = 140) -> Table:
        """A table for the terminal: one row a metric, one column a state.

        Args:
            title: what stands above it.
            width: columns of the terminal; the bootstrap intervals are left out where they would not fit on a line.
        """
        from rich.markup import escape
        from rich.table import Table

        wide = width >= _WIDTH_WITH_INTERVALS
        table = Table(title=title or None, title_justify="left", pad_edge=False)
        table.add_column("prompts")
        table.add_column("metric")
        for column in self.columns:
            table.add_column(TITLES[column], justify="right")
        for name in self.set_names:
            lines = without_doubles(self.of_set(name))
            for index, line in enumerate(lines):
                found = [line.cells.get(column, Cell(None)) for column in self.columns]
                cells = [str(cell) if wide else number(cell.value) for cell in found]
                first = escape(self._set_title(name)) if index == 0 else ""
                table.add_row(
                    first,
                    f"{escape(line.title)} {_ARROWS.get(line.direction, '')}".rstrip(),
                    *cells,
                )
            table.add_section()
        table.caption = self._caption(intervals=wide)
        table.caption_justify = "left"
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain data: `metrics` holds the numbers, `intervals` and `reasons` have the same keys."""
        shown = list(self.lines)
        return {
            "format": FORMAT,
            "summary": self.summary,
            "metrics": {
                line.key: {column: _finite(line.value(column)) for column in COLUMNS}
                for line in shown
            },
            "intervals": {
                line.key: {column: _interval(line.cells.get(column)) for column in COLUMNS}
                for line in shown
            },
            "items": {
                line.key: {c: line.cells[c].items if c in line.cells else 0 for c in COLUMNS}
                for line in shown
            },
            "reasons": {
                line.key: {c: cell.withheld for c, cell in line.cells.items() if cell.withheld}
                for line in shown
                if any(cell.withheld for cell in line.cells.values())
            },
            "cautions": {
                line.key: {c: cell.note for c, cell in line.cells.items() if cell.note}
                for line in shown
                if any(cell.note for cell in line.cells.values())
            },
            "definitions": {
                line.metric: {
                    "unit": line.unit,
                    "direction": line.direction,
                    "definition": line.definition,
                }
                for line in shown
            },
            "mask": plain(self.mask),
            "edit": plain(self.edit),
            "model": plain(self.model),
            "sets": plain(self.sets),
            "settings": plain(self.settings),
            "examples": [
                {
                    "prompts": example.prompts,
                    "prompt": example.prompt,
                    "target": example.target,
                    "outputs": dict(example.outputs),
                }
                for example in self.examples
            ],
            "side_effects": None
            if self.side_effects is None
            else [
                {
                    "prompts": effect.prompts,
                    "item": effect.item,
                    "prompt": effect.prompt,
                    "target": effect.target,
                    "likelihood": dict(effect.likelihood),
                }
                for effect in self.side_effects
            ],
            "notes": list(self.notes),
            "undo": list(self.undo),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_json` describes, without the values of single items."""
        lines = []
        for key, numbers in data["metrics"].items():
            prompts, _, metric = key.rpartition(".")
            about = data["definitions"][metric]
            cells = {}
            for column in COLUMNS:
                withheld = data["reasons"].get(key, {}).get(column, "")
                if numbers[column] is None and not withheld:
                    continue
                low, high = data["intervals"][key][column] or (None, None)
                cells[column] = Cell(
                    numbers[column],
                    low,
                    high,
                    data["items"][key][column],
                    withheld,
                    data["cautions"].get(key, {}).get(column, ""),
                )
            lines.append(
                Line(
                    metric,
                    prompts,
                    about["unit"],
                    about["direction"],
                    about["definition"],
                    cells,
                )
            )
        return cls(
            tuple(lines),
            mask=data["mask"],
            edit=data["edit"],
            model=data["model"],
            sets=data["sets"],
            settings=data["settings"],
            examples=tuple(Example(**example) for example in data["examples"]),
            notes=tuple(data["notes"]),
            undo=tuple(data["undo"]),
            # Older reports of this format lack them.
            side_effects=None
            if data.get("side_effects") is None
            else tuple(SideEffect(**effect) for effect in data["side_effects"]),
        )

    def to_markdown(self) -> str:
        """Summary and tables as markdown."""
        from locate_edit.reports.text import markdown

        return markdown(self)

    def to_html(self) -> str:
        """One self-contained page: summary, tables and figures, no script and nothing to download."""
        from locate_edit.reports.html import page

        return page(self, self._images())

    def figures(self) -> dict[str, Figure]:
        """The figures by file name: every metric before and after, and the distance to the oracle if there is one."""
        from locate_edit.draw.report import figures

        return figures(self)

    def save(self, folder: str | Path) -> Path:
        """Write `report.json`, `report.html`, `report.md` and the figures (PNG) into a folder.

        Everything is made before anything is written, and each file appears whole or not at all.

        Returns:
            The folder.
        """
        from locate_edit.reports.html import page

        place = Path(folder)
        images = self._images()
        files = {f"{name}.png": image for name, image in images.items()}
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        files["report.json"] = f"{text}\n".encode()
        files["report.md"] = self.to_markdown().encode()
        files["report.html"] = page(self, images).encode()
        for name, content in files.items():
            with atomic_file(place / name) as path:
                path.write_bytes(content)
        return place

    def _images(self) -> dict[str, bytes]:
        """Every figure as the bytes of a PNG file: drawn once for the page and the files."""
        images = {}
        for name, figure in self.figures().items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=160)
            images[name] = buffer.getvalue()
        return images

    def __repr__(self) -> str:
        sets = ", ".join(self.set_names)
        return f"Report({len(self.lines)} metrics on {sets}; print() shows the table, .save(folder) writes it)"

    def __str__(self) -> str:
        """The table as text."""
        from rich.console import Console

        buffer = io.StringIO()
        Console(file=buffer, width=140, color_system=None).print(self.table())
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())

    def __rich__(self) -> Table:
        return self.table()

    def _repr_html_(self) -> str:
        from locate_edit.reports.html import tables

        return tables(self)

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    def _set_title(self, name: str) -> str:
        items = self.sets.get(name, {}).get("items")
        return name if items is None else f"{name} ({items})"

    def _caption(self, *, intervals: bool) -> str:
        parts = ["\u2191 \u2193: larger, smaller means that the model knows the texts better"]
        level = self.settings.get("level")
        if not intervals:
            parts.append(
                f"intervals: in {_WIDTH_WITH_INTERVALS} columns or more, and in a saved report"
            )
        elif level is not None and any(
            cell.low is not None for line in self.lines for cell in line.cells.values()
        ):
            parts.append(
                f"[low, high]: {level:.0%} bootstrap interval over items".replace("[", "\\[")
            )
        return "; ".join(parts)


def without_doubles(lines: Sequence[Line]) -> list[Line]:
    """The lines of a set with any number, without the plain oracle distance where the scaled one is there."""
    shown = [line for line in lines if line.shown]
    scaled = any(line.metric == "oracle_distance" for line in shown)
    return [line for line in shown if not (scaled and line.metric == "oracle_kl")]


def number(value: float | None) -> str:
    """A number with three significant digits, as people write them."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "infinite" if value > 0 else "-infinite"
    size = abs(float(f"{value:.3g}"))  # rounded first: 0.9996 is written like 1
    if size == 0:
        return "0"
    if size >= 1e6 or size < 1e-4:
        return f"{value:.2g}"
    if size >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:.{digits}f}"


def signed(value: float) -> str:
    """A change as people write it: `number` with its sign."""
    return f"+{number(value)}" if value > 0 else number(value)


def _finite(value: float | None) -> float | None:
    """JSON knows no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _interval(cell: Cell | None) -> list[float] | None:
    if cell is None or cell.low is None or cell.high is None:
        return None
    return [cell.low, cell.high] if math.isfinite(cell.low) and math.isfinite(cell.high) else None


def plain(value: Any) -> Any:
    """Only what JSON can hold; anything else as its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return str(value)
