"""`evaluate`: measure a model or an edit and its controls on every prompt set, under one protocol.

Columns: *before* the edit, *after* it, the same method on a *random* mask of equal size and kind, and the *oracle*
that never learned the forget set. Rows: every metric on every prompt set. The model is left exactly as it was found.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn

from circuits import ComponentMask, describe
from circuits.errors import UnknownFamily
from locate_edit import catalog
from locate_edit.errors import EditError, PromptError
from locate_edit.metrics.counterfact import locality
from locate_edit.metrics.divergence import jensen_shannon, kl_divergence
from locate_edit.metrics.generation import generate
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.membership import reference_loss
from locate_edit.metrics.memorization import exact_memorization
from locate_edit.metrics.oracle_distance import from_divergences, item_means
from locate_edit.metrics.perplexity import perplexity
from locate_edit.metrics.perplexity_shift import perplexity_rose, perplexity_shift
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.statistic import Statistic
from locate_edit.metrics.values import Floats, Values, average_over_runs
from locate_edit.metrics.whole_sets import Measured, WholeSets, key_of
from locate_edit.prompts import PromptSet
from locate_edit.reports.controls import Control, Editable, opened, wanted
from locate_edit.reports.report import Cell, Example, Line, Report
from locate_edit.reports.side_effects import SHOWN_TOKENS, shown_text, side_effects
from locate_edit.reports.states import COLUMNS, TITLES, called, check_oracle

__all__ = ["Editable", "Metric", "evaluate"]

Metric = Callable[..., Values] | WholeSets | ModuleType | str
"""A metric function, a number about whole sets (`locate_edit.metrics.whole_sets`), a module of `locate_edit.metrics`
(its function of the same name, or else all of its metrics), or a name."""


def evaluate(
    target: Editable | nn.Module,
    metrics: Sequence[Metric] | Metric | None = None,
    *,
    forget: PromptSet | None = None,
    retain: PromptSet | None = None,
    others: Mapping[str, PromptSet] | None = None,
    oracle: nn.Module | None = None,
    other_oracle: nn.Module | None = None,
    random: bool | int | Sequence[Control] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    n_bootstrap: int = 1000,
    level: float = 0.95,
    examples: int = 3,
    undo: Sequence[str] = (),
    progress: bool = False,
) -> Report:
    """Measure an edit before, after, with a random mask and against an oracle, or just measure a model.

    Args:
        target: an applied edit, or a model.
        metrics: metric functions, modules or names; None takes likelihood, exact memorization and perplexity.
        forget: the prompts to forget; None takes those of the edit.
        retain: prompts to keep; None takes those of the edit.
        others: more prompt sets by name (other secrets, facts, general text).
        oracle: a model retrained without the forget set; it adds the oracle column and, on every set, the oracle
            distance. Metrics that compare with a reference compare with it, but for those whose reference is the model
            before the edit (`FROM_BASE`): these take a copy of that, and a forward pass of either model more.
        other_oracle: the same with another seed: the unit of the oracle distance.
        random: the random control: True or a number of random masks of the edit's size and kind, on which the edit
            is made again; masks; edits or models made elsewhere; False for none. None makes one random mask where the
            edit can be made again.
        seed: of random masks and bootstrap.
        batch_size: rows a forward pass.
        n_bootstrap: resamples of the bootstrap intervals.
        level: coverage of the intervals (fraction).
        examples: how many prompts of the first set to show with the model's own words, and one of each other set.
        undo: lines that tell how to take the edit back; None of them gives the general ones.
        progress: show a progress bar on standard error.

    Raises:
        PromptError: no prompt set, two sets of one name, or prompts that do not fit the model.
        EditError: the edit is not applied, a random control was asked for that cannot be made, an oracle that is the
            model itself or has another vocabulary, or a second oracle without the first.
        CatalogError: a metric name that does not exist.
    """
    sets = _sets(target, forget, retain, others or {})
    chosen, whole = _functions(metrics)
    editable = None if isinstance(target, nn.Module) else target
    model = _applied_model(target)
    if other_oracle is not None and oracle is None:
        raise EditError("other_oracle is the second of two oracles: give the first as oracle=")
    for each in (oracle, other_oracle):
        if each is not None:
            check_oracle(each, model)
    run = _Run(
        sets, chosen, whole, oracle, other_oracle, batch_size=batch_size, n_examples=examples, seed=seed,
        ranked=editable is not None, base=_base(editable, chosen),
    )  # fmt: skip
    states: dict[str, _State] = {}
    controls, reason = ([], "") if editable is None else wanted(editable, random, seed)
    with _bar(progress, 1 + (editable is not None) + len(controls) + (oracle is not None)) as step:
        if editable is None:
            states["before"] = step("model", lambda: run.measure(model))
        else:
            states["after"] = step("after", lambda: run.measure(model))
            with editable.off():
                states["before"] = step("before", lambda: run.measure(model))
            works = [functools.partial(run.control, editable, control) for control in controls]
            if runs := [step("random", work) for work in works]:
                states["random"] = _pooled(runs)
        if oracle is not None:
            states["oracle"] = step("oracle", lambda: run.measure(oracle))
    return Report(
        lines=(
            *_lines(
                states,
                chosen,
                run.base is not None,
                seed=seed,
                n_bootstrap=n_bootstrap,
                level=level,
            ),
            *_whole_lines(states, whole, sets, seed=seed, n_bootstrap=n_bootstrap, level=level),
        ),
        mask={} if editable is None else _about_mask(editable.mask, model),
        edit={} if editable is None else _about_edit(editable),
        model=_about_model(model),
        sets={
            name: {"items": len(ps), "scored_tokens": ps.n_scored, "digest": ps.digest}
            for name, ps in sets.items()
        },
        settings={
            "seed": seed,
            "batch_size": batch_size,
            "n_bootstrap": n_bootstrap,
            "level": level,
            "random_masks": len(controls),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        examples=run.examples(states),
        notes=(
            *([f"no random control: {reason}"] if reason else []),
            *_about_oracle(states),
        ),
        undo=() if editable is None else tuple(undo) or _undo(editable),
        side_effects=None
        if editable is None
        else side_effects({c: state.likelihoods for c, state in states.items()}, sets),
    )


FROM_BASE = (kl_divergence, perplexity_rose, locality)
"""What these metrics measure a distance from is the model before the edit, where there is an edit."""
FROM_ORACLE = (jensen_shannon, perplexity_shift, reference_loss)
"""What these measure a distance from is the oracle."""


def _measures_from_base(metric: Callable[..., Values]) -> bool:
    return _bare(metric) in FROM_BASE


def _reference(metric: Callable[..., Values], has_base: bool) -> str:
    """A sentence on what a metric compares with, for one that does."""
    if _measures_from_base(metric) and has_base:
        return " The reference is the model before the edit."
    if _bare(metric) in FROM_BASE + FROM_ORACLE:
        return " The reference is the oracle."
    return ""


def _bare(metric: Callable[..., Any]) -> Callable[..., Any]:
    """A metric without the settings that a partial fixes."""
    return metric.func if isinstance(metric, functools.partial) else metric


def _base(
    target: Editable | None, metrics: Mapping[str, Callable[..., Values]]
) -> nn.Module | None:
    """A copy of the model before the edit, where a metric measures from it."""
    if target is None or not any(_measures_from_base(metric) for metric in metrics.values()):
        return None
    with target.off() as model:
        base: nn.Module = copy.deepcopy(model)
    return base


def _about_oracle(states: Mapping[str, _State]) -> Iterator[str]:
    """What makes an oracle look like none."""
    if "oracle" not in states or "before" not in states:
        return
    key, kept = ("forget", "likelihood"), ("retain", "likelihood")
    now, was = (states[column].values for column in ("oracle", "before"))
    if _share(now, was, key) > KNOWS:
        yield (
            "the oracle knows the forget prompts nearly as well as the model before the edit: a model trained without "
            "them was expected"
        )
    if _share(now, was, kept) < IGNORANT:
        yield (
            "the oracle hardly knows the retain prompts: a model trained like the edited one, without the forget "
            "prompts, was expected"
        )


KNOWS, IGNORANT = 0.9, 0.5
"""An oracle is doubted above this share of the forget likelihood before the edit, and below that of retain."""


def _share(
    now: Mapping[tuple[str, str], Values],
    was: Mapping[tuple[str, str], Values],
    key: tuple[str, str],
) -> float:
    """One estimate as a share of another; not a number where there is none."""
    pair = [values[key].estimate if key in values else None for values in (now, was)]
    return math.nan if pair[0] is None or not pair[1] else pair[0] / pair[1]


_UNDO = (
    "edit.undo()                                         # in Python: the model is bit for bit as it was",
    "locate-edit undo EDITED_MODEL --edit FOLDER_OF_EDIT   # in a shell: takes the edit out of a saved model",
)


def _undo(target: Editable) -> tuple[str, ...]:
    """How to take an edit back; one with additions is never part of a checkpoint."""
    return _UNDO[:1] if getattr(target, "additions", ()) else _UNDO


@dataclass
class _State:
    """Everything measured on one state of the model: values by set and metric, and its own words by set and item.

    ``needed`` is what the numbers about whole sets are made from. Of the sets outside the forget set there is every
    item's likelihood too, which the side effects are ranked by.
    """

    values: dict[tuple[str, str], Values] = field(default_factory=dict)
    needed: dict[tuple[str, str], Values] = field(default_factory=dict)
    words: dict[tuple[str, int], str] = field(default_factory=dict)
    likelihoods: dict[str, Values] = field(default_factory=dict)


@dataclass
class _Run:
    """What stays the same from one state of the model to the next."""

    sets: Mapping[str, PromptSet]
    metrics: Mapping[str, Callable[..., Values]]
    whole: Mapping[str, WholeSets]
    oracle: nn.Module | None
    other_oracle: nn.Module | None
    batch_size: int
    n_examples: int
    seed: int
    ranked: bool
    base: nn.Module | None = None
    noise: dict[str, Floats] = field(default_factory=dict)

    def measure(self, model: nn.Module) -> _State:
        """All metrics on all sets, for the model as it is now."""
        state = _State()
        for name, prompts in self.sets.items():
            reference = None if model is self.oracle else self.oracle
            from_oracle, from_base = (
                Predictions(model, prompts, batch_size=self.batch_size, reference=each)
                for each in (reference, self.base or reference)
            )
            # Nothing runs before it is asked for, so without an oracle one pass serves all.
            predictions = from_base if self.oracle is None else from_oracle
            if self.oracle is not None:
                self._distances(predictions, name, state)
            for label, metric in self.metrics.items():
                if _measures_from_base(metric):
                    state.values[name, label] = metric(from_base)
                elif _bare(metric) in FROM_ORACLE:
                    state.values[name, label] = metric(from_oracle)
                else:
                    state.values[name, label] = metric(predictions)
            for metric in {m for w in self.whole.values() for on, m in w.needs if on == name}:
                state.needed[name, key_of(metric)] = metric(predictions)
            if self.ranked and name != "forget":
                state.likelihoods[name] = likelihood(predictions)
            self._say(name, predictions, state)
        return state

    def control(self, target: Editable, control: Control) -> _State:
        """The same for a random control."""
        with opened(target, control) as model:
            return self.measure(model)

    def _distances(self, predictions: Predictions, name: str, state: _State) -> None:
        """Oracle distance of one state on one set; the distance between the oracles is measured once."""
        prompts = predictions.prompts
        if self.other_oracle is not None and name not in self.noise:
            between = Predictions(
                self.other_oracle, prompts, batch_size=self.batch_size, reference=self.oracle
            )
            self.noise[name] = item_means(between, between.divergence)
        noise = self.noise.get(name)
        if predictions.reference is not None:
            distance = item_means(predictions, predictions.divergence)
        elif noise is not None:
            # In the oracle's own column: how far another retraining is.
            distance = noise
        else:
            return
        found = from_divergences(distance, noise, prompts)
        state.values[name, "oracle_distance"] = found.ratio
        state.values[name, "oracle_kl"] = found.nats

    def _say(self, name: str, predictions: Predictions, state: _State) -> None:
        """The model's own words on the first items of a set."""
        prompts = predictions.prompts
        shown = self._shown(name)
        if not shown:
            return
        if prompts.masked:
            said = [predictions.top[predictions.of_item(i)].tolist() for i in shown]
        else:
            few = prompts.select(shown)
            longest = max(len(few.target_ids(i)) for i in range(len(few)))
            length = SHOWN_TOKENS if longest > SHOWN_TOKENS else None
            said = generate(predictions.model, few, length, batch_size=self.batch_size)
        for index, tokens in zip(shown, said, strict=True):
            state.words[name, index] = str(prompts.tokenizer.decode(tokens))

    def _shown(self, name: str) -> list[int]:
        """Items of a set to show: plain text has no question to answer; of other sets than the first one will do."""
        asked = [i for i, row in enumerate(self.sets[name]) if row.get("target") is not None]
        first = name == next(iter(self.sets))
        return asked[: self.n_examples if first else min(1, self.n_examples)]

    def examples(self, states: Mapping[str, _State]) -> tuple[Example, ...]:
        """The items that every state said something to."""
        found = []
        for name, prompts in self.sets.items():
            for index in self._shown(name):
                before, target = shown_text(prompts, index)
                outputs = {
                    column: states[column].words[name, index]
                    for column in COLUMNS
                    if column in states and (name, index) in states[column].words
                }
                found.append(Example(name, before, target, outputs))
        return tuple(found)


def _pooled(runs: Sequence[_State]) -> _State:
    """Several random controls as one: item by item their mean; the words of the first."""
    values = {
        key: average_over_runs([run.values[key] for run in runs if key in run.values])
        for key in runs[0].values
    }
    likelihoods = {
        name: average_over_runs([run.likelihoods[name] for run in runs])
        for name in runs[0].likelihoods
    }
    needed = {key: average_over_runs([run.needed[key] for run in runs]) for key in runs[0].needed}
    return _State(values, needed, runs[0].words, likelihoods)


def _lines(
    states: Mapping[str, _State],
    metrics: Mapping[str, Callable[..., Values]],
    has_base: bool,
    *,
    seed: int,
    n_bootstrap: int,
    level: float,
) -> Iterator[Line]:
    """A line for each set and metric, with a cell for each state."""
    keys = dict.fromkeys(key for state in states.values() for key in state.values)
    for name, label in keys:
        values = {
            column: states[column].values[name, label]
            for column in COLUMNS
            if column in states and (name, label) in states[column].values
        }
        first = next(iter(values.values()))
        cells = {
            column: _cell(found, seed=seed, n_bootstrap=n_bootstrap, level=level)
            for column, found in values.items()
        }
        definition = _DISTANCES.get(label) or (
            _first_sentence(metrics[label]) + _reference(metrics[label], has_base)
        )
        yield Line(label, name, first.unit, first.direction, definition, cells, values)


def _whole_lines(
    states: Mapping[str, _State],
    whole: Mapping[str, WholeSets],
    sets: Mapping[str, PromptSet],
    **how: Any,
) -> Iterator[Line]:
    """A line for each number about whole sets."""
    measured = {column: Measured(state.needed, sets) for column, state in states.items()}
    for label, metric in whole.items():
        found = {
            column: metric(
                measured[column],
                before=measured.get("before") if column != "before" else None,
                oracle=measured.get("oracle"),
            )
            for column in COLUMNS
            if column in measured
        }
        first = next(iter(found.values()))
        cells = {column: _cell(statistic, **how) for column, statistic in found.items()}
        definition = _first_sentence(type(metric))
        yield Line(label, metric.prompts, first.unit, first.direction, definition, cells)


def _cell(found: Values | Statistic, *, seed: int, n_bootstrap: int, level: float) -> Cell:
    span = found.interval(level=level, n_bootstrap=n_bootstrap, seed=seed)
    low, high = span if span is not None else (None, None)
    return Cell(found.estimate, low, high, len(found), found.withheld, found.note)


_DISTANCES = {
    "oracle_distance": "Divergence (KL) of the model's predictions from those of a model retrained without "
    "the forget set, divided by that between two such models; 1 is the distance of another retraining.",
    "oracle_kl": "The same divergence as a plain number.",
}


def _first_sentence(metric: Callable[..., Any]) -> str:
    text = " ".join((inspect.getdoc(_bare(metric)) or "").split("\n\n")[0].split())
    return text if text.endswith(".") or not text else f"{text}."


# ---- reading the arguments -----------------------------------------------------------------------


def _applied_model(target: Editable | nn.Module) -> nn.Module:
    if isinstance(target, nn.Module):
        return target
    if not isinstance(target.model, nn.Module):
        raise EditError("the edit is not applied to a model; call .apply(model) before evaluate")
    return target.model


def _sets(
    target: Editable | nn.Module,
    forget: PromptSet | None,
    retain: PromptSet | None,
    others: Mapping[str, PromptSet],
) -> dict[str, PromptSet]:
    if not isinstance(target, nn.Module):
        forget = target.forget if forget is None else forget
        retain = target.retain if retain is None else retain
    given = {"forget": forget, "retain": retain}
    sets = {name: prompts for name, prompts in given.items() if prompts is not None}
    if twice := sets.keys() & others.keys():
        raise PromptError(
            f"two prompt sets are called {min(twice)!r}: give the one in others= another name."
        )
    sets.update(others)
    if not sets:
        raise PromptError(
            "nothing to measure on: give forget=, retain= or others={'name': prompts}. "
            "An edit loaded from a folder does not carry its prompts."
        )
    return sets


def _functions(
    metrics: Sequence[Metric] | Metric | None,
) -> tuple[dict[str, Callable[..., Values]], dict[str, WholeSets]]:
    """Metric functions and numbers about whole sets by the name they are reported under."""
    several = isinstance(metrics, Sequence) and not isinstance(metrics, str)
    given: Any = [metrics] if metrics is not None and not several else metrics
    found: dict[str, Any] = {}
    for metric in given or (likelihood, exact_memorization, perplexity):
        made = _by_name(metric) if isinstance(metric, str) else metric
        if inspect.isclass(made):
            raise PromptError(f"expected a metric like {made.__name__}(), got the class itself.")
        for each in _of_module(made) if isinstance(made, ModuleType) else [made]:
            name = _snake(type(each).__name__) if isinstance(each, WholeSets) else key_of(each)
            if name in found:
                raise PromptError(f"the metric {name!r} is given twice.")
            found[name] = each
    whole = {name: each for name, each in found.items() if isinstance(each, WholeSets)}
    return {name: each for name, each in found.items() if name not in whole}, whole


def _by_name(name: str) -> Callable[..., Values] | WholeSets:
    """A metric or a number about whole sets, as the command line names them."""
    try:
        found: Callable[..., Values] | WholeSets = catalog.build("metric", name)
    except catalog.CatalogError as unknown:
        try:
            found = catalog.build("statistic", name)
        except catalog.CatalogError:
            raise unknown from None
    return found


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _of_module(module: ModuleType) -> list[Callable[..., Values]]:
    """The function of the module's own name, or else every metric it defines."""
    own = getattr(module, module.__name__.rpartition(".")[2], None)
    if own is not None:
        return [own]
    functions: list[Callable[..., Values]] = [
        function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and function.__module__ == module.__name__
        and next(iter(inspect.signature(function).parameters), "") == "predictions"
    ]
    if not functions:
        raise PromptError(
            f"the module {module.__name__} defines no metric: no function whose first argument is `predictions`."
        )
    return functions


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[str, Callable[[], _State]], _State]]:
    """A function that names a step, runs it and moves a progress bar, if one is wanted."""
    if not show:
        yield lambda _, work: work()
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("evaluate", total=total)

        def step(name: str, work: Callable[[], _State]) -> _State:
            bar.update(task, description=f"evaluate: {TITLES.get(name, name)}")
            result = work()
            bar.advance(task)
            return result

        yield step


# ---- what the report says about the edit ---------------------------------------------------------


def _about_mask(mask: Any, model: nn.Module) -> dict[str, Any]:
    if not isinstance(mask, ComponentMask):
        return {}
    kinds = sorted({site.kind for site in mask.sites})
    about: dict[str, Any] = {
        "units": mask.count(),
        "of": mask.total(),
        "kinds": kinds,
        "sites": {str(site): count for site, count in mask.counts().items()},
        "provenance": dict(mask.provenance),
    }
    try:
        model_map = describe(model)
        about["fraction_of_parameters"] = float(mask.fraction(model_map))
        # Of the whole model, where the mask speaks about some of its layers only.
        every = {site for kind in kinds for site in model_map.sites(kind)} | set(mask.sites)
        about["of"] = sum(math.prod(model_map.shape(site)) for site in every)
    except UnknownFamily:
        pass  # a mask of named rows works on any model; only the share cannot be told
    text = str(mask)
    if len(text) <= 2000:
        about["units_on"] = text
    return about


def _about_edit(target: Editable) -> dict[str, Any]:
    about = dict(target.provenance)
    if (delta := getattr(target, "delta", None)) is not None:
        about["entries_changed"] = int(delta.count())
    if additions := getattr(target, "additions", ()):
        about["additions"] = [str(each.what) for each in additions]
    if log := getattr(target, "log", None):
        about["steps_run"] = len(log)
    return about


def _about_model(model: nn.Module) -> dict[str, Any]:
    return {
        "class": type(model).__name__,
        "name": called(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
