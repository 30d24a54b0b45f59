"""`compare`: every localizer with every method at every mask size, on one model and under one protocol.

The base model is shared: a cell edits it, measures, and undoes. A random mask of the same size stands beside every
localizer. Finished cells are kept in a folder, so that a long comparison can be interrupted and taken up again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from circuits import ComponentMask, Scores
from circuits.atomic import atomic_file
from locate_edit.editing import Method, edit
from locate_edit.errors import EditError
from locate_edit.fingerprint import fingerprint
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.oracle_distance import divergences
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet
from locate_edit.reports.states import called

__all__ = ["DISTANCE", "RANDOM", "Cell", "Comparison", "compare", "pareto"]

RANDOM = "random mask"
"""What the row of random masks is called."""
DISTANCE = "oracle_kl"
"""What the distance to the oracle is called (mean KL in nats a token; smaller is better on every set)."""

Localizer = Callable[..., Scores]
Metric = Callable[..., Values]


@dataclass(frozen=True)
class Cell:
    """One edit of a comparison.

    Attributes:
        localizer: what chose the units.
        method: what edited them.
        budget: number of units.
        seed: of localizer, random mask and order of the data.
        values: estimates by "set/metric"; None where a metric's precondition failed.
        seconds: wall-clock time of edit and measurement (s).
        failed: why there are no values, or None.
    """

    localizer: str
    method: str
    budget: int
    seed: int
    values: Mapping[str, float | None]
    seconds: float
    failed: str | None = None


@dataclass(frozen=True)
class Comparison:
    """All cells of a comparison, in the order localizer, method, budget, seed.

    Attributes:
        cells: what was measured.
        original: values of the unedited model by "set/metric".
        oracle: the same of the oracle; None without one.
        about: what a figure must say: the model's name, the number of prompts by set, and unit and direction by metric.
    """

    cells: tuple[Cell, ...]
    original: Mapping[str, float | None]
    oracle: Mapping[str, float | None] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Cell, ...]:
        """The cells without values."""
        return tuple(cell for cell in self.cells if cell.failed is not None)

    def means(self, key: str) -> dict[tuple[str, str, int], float]:
        """Mean over seeds of one "set/metric", by localizer, method and budget; only where there are values."""
        found: dict[tuple[str, str, int], list[float]] = {}
        for cell in self.cells:
            if (value := cell.values.get(key)) is not None:
                found.setdefault((cell.localizer, cell.method, cell.budget), []).append(value)
        return {place: sum(values) / len(values) for place, values in found.items()}

    def ranges(self, key: str) -> dict[tuple[str, str, int], tuple[float, float]]:
        """Least and greatest of one "set/metric" over seeds, by localizer, method and budget."""
        found: dict[tuple[str, str, int], tuple[float, float]] = {}
        for cell in self.cells:
            if (value := cell.values.get(key)) is not None:
                place = (cell.localizer, cell.method, cell.budget)
                low, high = found.get(place, (value, value))
                found[place] = (min(low, value), max(high, value))
        return found

    def table(self, keys: Sequence[str] | None = None) -> list[list[str]]:
        """A header, and a row for original, oracle and each localizer, method and budget, as text.

        With several seeds a measure is its mean, with the least and the greatest behind it.

        Args:
            keys: each "set/metric" that gets a column; None for all.

        Raises:
            EditError: nothing was measured under one of the keys.
        """
        keys = list(self.original if keys is None else keys)
        if unknown := [key for key in keys if key not in self.original]:
            raise EditError(
                f"nothing was measured as {unknown[0]!r}; there is {', '.join(self.original)}"
            )
        means = {key: self.means(key) for key in keys}
        ranges = {key: self.ranges(key) for key in keys}
        several = len({cell.seed for cell in self.cells}) > 1
        rows = [["localizer", "method", "units", *keys]]
        for name, values in (("original", self.original), ("oracle", self.oracle)):
            if values is not None:
                rows.append([name, "", "", *(_say(values.get(key)) for key in keys)])
        for place in dict.fromkeys((c.localizer, c.method, c.budget) for c in self.cells):
            said = [_say(means[key].get(place)) for key in keys]
            if several:
                both = [ranges[key].get(place) for key in keys]
                said = [
                    one if ends is None else f"{one} ({_say(ends[0])} to {_say(ends[1])})"
                    for one, ends in zip(said, both, strict=True)
                ]
            rows.append([*map(str, place), *said])
        return rows

    def markdown(self, keys: Sequence[str] | None = None) -> str:
        """`table(keys)` in Markdown, and below it what failed."""
        header, *rows = self.table(keys)
        lines = [_row(header), "|---" * len(header) + "|", *map(_row, rows)]
        failed = [
            f"- {c.localizer}, {c.method}, {c.budget} units, seed {c.seed}: {c.failed}"
            for c in self.failures
        ]
        return "\n".join([*lines, "", "Failed:", *failed] if failed else lines)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return asdict(self)

    def save(self, folder: str | Path) -> None:
        """Write `comparison.json` and `comparison.md` into a folder."""
        for name, text in {
            "comparison.json": json.dumps(self.to_json(), indent=1),
            "comparison.md": self.markdown(),
        }.items():
            with atomic_file(Path(folder) / name) as path:
                path.write_text(text + "\n", encoding="utf-8")


def compare(
    model: nn.Module,
    *,
    localizers: Sequence[Localizer],
    methods: Sequence[Method],
    budgets: Sequence[int],
    forget: PromptSet,
    retain: PromptSet,
    others: Mapping[str, PromptSet] | None = None,
    metrics: Sequence[Metric] = (likelihood,),
    oracle: nn.Module | None = None,
    folder: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    batch_size: int = 8,
    progress: bool = False,
) -> Comparison:
    """Edit with every localizer, method and number of units; measure each on the forget, retain and other prompts.

    Localizers choose by ``forget`` and may look at ``retain``, and methods train on both. What an edit costs where
    nothing looked after it shows only in ``others``. The model is afterwards as it was, bit for bit, on every
    way out. Results depend on nothing but the arguments.

    Args:
        model: the model; edited in place and undone for each cell.
        localizers: objects like ``PrivacyNeurons()``, called as ``(model, forget, retain=..., seed=...)``.
        methods: objects like ``NPO(steps=100, lr=1e-3)``.
        budgets: numbers of units a mask has.
        forget: prompts to forget.
        retain: prompts to keep.
        others: further prompts to measure, by name, that neither localizers nor methods see.
        metrics: functions of predictions, from `locate_edit.metrics`.
        oracle: a model retrained without the forget set; adds "oracle_kl".
        folder: where each finished cell is kept as JSON; what is there already is not done again, except failures.
        seeds: each is a repetition of everything.
        batch_size: prompts a batch.
        progress: show a progress bar on standard error.

    Raises:
        EditError: nothing to compare, two localizers or methods that print alike, a number of units below one or given
            twice, other prompts called forget or retain, or the model as its own oracle. What only one cell cannot do
            is said in that cell.
    """
    where, how = _names(localizers), _names(methods)
    _check(where, how, budgets, seeds, others or {})
    if oracle is model:
        raise EditError(
            "the oracle is the model that is edited, so that every distance would be 0: load the retrained model "
            "apart, or leave the oracle out"
        )
    shared = {
        "model": fingerprint(model),
        "oracle": None if oracle is None else fingerprint(oracle),
        "forget": forget.digest,
        "retain": retain.digest,
        "metrics": [_of_metric(metric) for metric in metrics],
        "batch_size": batch_size,
    }
    sets = {"forget": forget, "retain": retain, **(others or {})}
    if others:
        shared["others"] = {name: prompts.digest for name, prompts in others.items()}
    measured: dict[str, dict[str, str]] = {}

    def values(net: nn.Module) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for name, prompts in sets.items():
            seen = Predictions(net, prompts, batch_size=batch_size)
            for metric in metrics:
                about = metric(seen)
                if not isinstance(about, Values):
                    raise EditError(
                        f"{getattr(metric, '__name__', metric)} gives {type(about).__name__}, not the Values of a "
                        "metric: see locate_edit.metrics for functions of predictions"
                    )
                if (key := f"{name}/{about.name}") in found:
                    raise EditError(f"two metrics are called {about.name!r}: give each once")
                found[key] = about.estimate
                measured[about.name] = {"unit": about.unit, "direction": about.direction}
            if oracle is not None:
                away = divergences(oracle, [net], prompts, batch_size=batch_size)[0]
                found[f"{name}/{DISTANCE}"] = float(away.mean())
                measured[DISTANCE] = {"unit": "nats a token", "direction": "distance"}
        return found

    scored: dict[tuple[str, int], Scores | Exception] = {}

    def scores(name: str, seed: int) -> Scores:
        if (name, seed) not in scored:
            try:
                scored[name, seed] = where[name](model, forget, retain=retain, seed=seed)
            except Exception as problem:
                scored[name, seed] = problem
        if isinstance(found := scored[name, seed], Exception):
            raise found
        return found

    def mask(name: str, budget: int, seed: int) -> ComponentMask:
        if name != RANDOM:
            return scores(name, seed).top(budget)
        reasons = []
        for other in where:  # the first that can be had says of which kind the units are
            try:
                return scores(other, seed).top(budget).random_like(seed=seed + 1)
            except Exception as problem:
                reasons.append(f"{other}: {problem}")
        raise EditError("no localizer gave a mask to draw one like; " + "; ".join(reasons))

    def work(name: str, method: str, budget: int, seed: int) -> Cell:
        started = time.perf_counter()
        found: dict[str, float | None] = {}
        failed = None
        try:
            made = edit(
                model, how[method], mask(name, budget, seed), forget=forget, retain=retain,
                batch_size=batch_size, seed=seed,
            )  # fmt: skip
            try:
                found = values(model)
            finally:
                made.undo()
        except Exception as problem:
            failed = f"{type(problem).__name__}: {problem}"
        return Cell(name, method, budget, seed, found, time.perf_counter() - started, failed)

    # First of all, because what these cannot measure no cell can.
    references = values(model), None if oracle is None else values(oracle)
    todo = [(w, h, b, s) for w in (*where, RANDOM) for h in how for b in budgets for s in seeds]
    cells = []
    with _bar(progress, len(todo)) as advance:
        for place in todo:
            # The random mask is of the kind that the localizers choose, so they are part of what it is.
            kinds = [repr(one) for one in localizers] if place[0] == RANDOM else []
            key = [shared, place, kinds, repr(how[place[1]])]
            path = None if folder is None else Path(folder) / f"cell-{_digest(key)}.json"
            cell = None if path is None else _kept(path)
            if cell is None:
                cell = work(*place)
                if path is not None:
                    with atomic_file(path) as writing:
                        writing.write_text(json.dumps(asdict(cell), indent=1) + "\n", "utf-8")
            cells.append(cell)
            advance(f"{cell.localizer}, {cell.method}, {cell.budget}")
    about = {
        "model": called(model),
        "prompts": {name: len(prompts) for name, prompts in sets.items()},
        "metrics": measured,
    }
    return Comparison(tuple(cells), *references, about)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats, in order: less of the first, more of the second is good.

    A point is beaten by one that is at least as good in both and better in one.
    """
    found = []
    for i, (x, y) in enumerate(points):
        beaten = any((a <= x and b >= y) and (a < x or b > y) for a, b in points)
        if not beaten:
            found.append(i)
    return sorted(found, key=lambda i: points[i])


def _check(
    where: Mapping[str, Localizer],
    how: Mapping[str, Method],
    budgets: Sequence[int],
    seeds: Sequence[int],
    others: Mapping[str, PromptSet],
) -> None:
    """Refuse what no cell could make sense of."""
    if not (where and how and budgets and seeds):
        raise EditError("give at least one localizer, method, budget and seed to compare")
    for name, numbers in (("budget", budgets), ("seed", seeds)):
        if twice := [n for n in numbers if list(numbers).count(n) > 1]:
            raise EditError(f"the {name} {twice[0]} is given twice: give each once")
    if (least := min(budgets)) < 1:
        raise EditError(f"a budget is a number of units of at least 1, got {least}")
    for name in others:
        if name in ("forget", "retain") or "/" in name:
            raise EditError(
                f"other prompts cannot be called {name!r}: expected a name without a slash, other than forget and "
                "retain, which are measured anyway"
            )


def _names(objects: Sequence[Any]) -> dict[str, Any]:
    """Objects by type, or by how they print where several have one type."""
    short = [getattr(one, "__name__", type(one).__name__) for one in objects]
    names = [repr(one) if short.count(n) > 1 else n for n, one in zip(short, objects, strict=True)]
    if twice := [name for name in names if names.count(name) > 1 or name == RANDOM]:
        raise EditError(f"two things to compare are called {twice[0]!r}: give each once")
    return dict(zip(names, objects, strict=True))


def _kept(path: Path) -> Cell | None:
    """A finished cell of an earlier run; None where there is none, or it failed."""
    try:
        cell = Cell(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return cell if cell.failed is None else None


def _of_metric(metric: Any) -> str:
    """What a metric is called in a cell's key, with its settings where it has any."""
    if isinstance(metric, partial):
        given = ", ".join(f"{name}={value!r}" for name, value in sorted(metric.keywords.items()))
        return f"{_of_metric(metric.func)}({given})"
    return repr(getattr(metric, "__name__", metric))


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _say(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _row(parts: Sequence[str]) -> str:
    return "| " + " | ".join(parts) + " |"


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[str], None]]:
    """A function that says which cell is done, on a progress bar if one is wanted."""
    if not show:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compare", total=total)
        yield lambda name: bar.update(task, advance=1, description=f"compare: {name}")
