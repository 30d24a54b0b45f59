"""`robustness`: attacks on an edited model, beside the same attacks on a model that never knew.

What an attack brings back says something only next to three other numbers: what it finds where something is known to be
hidden (its positive control), what it makes of a model that never knew (the oracle), and what it does to prompts that
should be answered anyway (retain). An attack that does not find its control has no number here, but a reason.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from circuits.atomic import atomic_file
from locate_edit import catalog
from locate_edit.attacked import Attack, Attacked
from locate_edit.editing import Edit
from locate_edit.errors import EditError, PromptError
from locate_edit.metrics.values import Values, average_over_runs, difference
from locate_edit.prompts import PromptSet
from locate_edit.reports.controls import Control
from locate_edit.reports.states import COLUMNS, TITLES, Opened, states

__all__ = ["Robustness", "Trial", "robustness"]

BROKEN = 0.5
"""An attack breaks a model where less than this share of the retain measure is left under it."""
STILL = 0.9
"""Above this share of the measure before the edit, answers count as given rather than hidden."""
SPENT = "not run: the time was spent"

Outcome = Literal[
    "brings answers back", "nothing beyond", "breaks the model", "too few prompts", "withheld"
]


@dataclass(frozen=True, eq=False)
class Trial:
    """One attack on every model.

    Attributes:
        name: what the attack is called here.
        attack: it with its hyperparameters, as text.
        found: what came of it, by state (see `COLUMNS` in `reports.states`); empty where `withheld`.
        control: what it found in its positive control; None where that was not asked for or could not be made.
        withheld: why it has no numbers, if it has none; empty otherwise.
        failed: why a model has no numbers, by model.
        seconds: wall-clock time of everything (s).
        does: what the attack measures, in a sentence.
    """

    name: str
    attack: str
    found: Mapping[str, Attacked] = field(default_factory=dict)
    control: Attacked | None = None
    withheld: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    does: str = ""

    @property
    def title(self) -> str:
        """The attack's name in words, such as "latent perturbation"."""
        kind, _, settings = self.name.partition("(")
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind).lower()
        return f"{words} ({settings}" if settings else words

    def beyond(self, model: str = "after") -> tuple[float, float, float] | None:
        """How much more a model gives away under the attack than the oracle does, with its 95% interval.

        Prompts are drawn for both together. None without an oracle, or where there are fewer than two shared prompts.
        """
        mine, other = self.found.get(model), self.found.get("oracle")
        if mine is None or other is None or list(mine.forget.items) != list(other.forget.items):
            return None
        return difference(mine.forget, other.forget)

    def gain(self, model: str = "after") -> tuple[float, float, float] | None:
        """How much more a model gives away under the attack than without it, with its 95% interval.

        None where there are fewer than two prompts.
        """
        found = self.found.get(model)
        if found is None or list(found.forget.items) != list(found.forget_clean.items):
            return None
        return difference(found.forget, found.forget_clean)

    def outcome(self, model: str = "after") -> Outcome:
        """What the attack shows about a model, in two or three words.

        It "brings answers back" where their measure rises beyond what it is without the attack and, if there is an
        oracle, beyond what the same attack gets from that (the 95% intervals of both differences lie above 0). It
        "breaks the model" where retain is lost and nothing came back. "nothing beyond": none of these.
        """
        if self.withheld or model not in self.found:
            return "withheld"
        gain, beyond = self.gain(model), self.beyond(model)
        if gain is None:
            return "too few prompts"
        if gain[1] > 0 and ("oracle" not in self.found or (beyond is not None and beyond[1] > 0)):
            return "brings answers back"
        return "breaks the model" if self.breaks(model) else "nothing beyond"

    def open(self, model: str = "after") -> bool:
        """Whether a model gives the answers nearly as before the edit without any attack, so that none are hidden."""
        found, before = self.found.get(model), self.found.get("before")
        if found is None or before is None:
            return False
        now, was = found.forget_clean.estimate, before.forget_clean.estimate
        return now is not None and was is not None and now > STILL * was

    def breaks(self, model: str) -> bool:
        """Whether the attack takes more than half of the retain measure from a model."""
        found = self.found.get(model)
        if found is None or found.retain is None or found.retain_clean is None:
            return False
        under, clean = found.retain.estimate, found.retain_clean.estimate
        return under is not None and clean is not None and under < BROKEN * clean


@dataclass(frozen=True, eq=False)
class Robustness:
    """What attacks bring back, by attack and model.

    Attributes:
        trials: one an attack, in the order given.
        settings: seed, margin, numbers of prompts and what else a reader needs to repeat it.
    """

    trials: tuple[Trial, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Trial:
        """The trial of an attack by name.

        Raises:
            EditError: there is none.
        """
        for trial in self.trials:
            if trial.name == name:
                return trial
        raise EditError(
            f"no attack is called {name!r}; there are {', '.join(t.name for t in self.trials)}"
        )

    @property
    def models(self) -> tuple[str, ...]:
        """The models that any attack has numbers of, in the order of the tables."""
        return tuple(name for name in COLUMNS if any(name in trial.found for trial in self.trials))

    def in_words(self) -> str:
        """Whether what was forgotten is gone or only hidden, as far as the attacks can tell."""
        tried = [trial for trial in self.trials if "after" in trial.found]
        if not tried:
            return "No attack could be tried; the table says why."
        found: dict[Outcome, list[str]] = {}
        for trial in tried:
            found.setdefault(trial.outcome(), []).append(trial.title)
        than = " than from a model that never knew" if "oracle" in self.models else ""
        said = [f"Of {len(self.trials)} attacks {len(tried)} could be tried."]
        if back := found.get("brings answers back"):
            said.append(
                f"{_listed(back, 'brings', 'bring')} back more{than}: there the answers are hidden rather than gone."
            )
            if not than:
                said.append(
                    "Without an oracle it cannot be told how much a model that never knew would guess under them."
                )
        elif all(trial.open() for trial in tried):
            said.append(
                "None brings back more, but there is little to bring back: the edited model gives the answers without "
                "an attack."
            )
        else:
            said.append(
                f"None brings back more{than}; what another attack would find, nobody knows."
            )
        if broke := found.get("breaks the model"):
            said.append(f"{_listed(broke, 'breaks', 'break')} the model, which says nothing.")
        if missing := [trial.title for trial in self.trials if trial not in tried]:
            said.append(
                f"{_listed(missing, 'has', 'have')} no number, for the reason that the table gives."
            )
        return " ".join(said)

    def table(self) -> list[list[str]]:
        """A header, and a row for each attack and model: each measure clean and attacked, as text.

        Behind an attacked forget measure stands its 95% bootstrap interval over prompts.
        """
        rows = [
            ["attack", "model", "forget", "attacked", "retain", "attacked", "beyond oracle", "note"]
        ]
        for trial in self.trials:
            if trial.withheld:
                rows.append([trial.name, "", *["-"] * 5, f"withheld: {trial.withheld}"])
                continue
            if trial.control is not None:
                rows.append(
                    [trial.name, "control", *_said(trial.control), "", "hides and is found"]
                )
            for model in COLUMNS:
                if model in trial.found:
                    beyond = "" if model == "oracle" else _with_interval(trial.beyond(model))
                    note = _note(trial, model)
                    rows.append(
                        [trial.name, TITLES[model], *_said(trial.found[model]), beyond, note]
                    )
                elif model in trial.failed:
                    rows.append([trial.name, TITLES[model], *["-"] * 5, trial.failed[model]])
        return rows

    def markdown(self) -> str:
        """`table()` in Markdown, with what its columns mean."""
        header, *rows = ([_escaped(cell) for cell in row] for row in self.table())
        lines = [_row(header), "|---" * len(header) + "|", *map(_row, rows)]
        return "\n".join([*lines, "", *_LEGEND])

    def to_json(self) -> dict[str, Any]:
        """Everything but the values of single prompts, as JSON can hold it."""
        return {
            "settings": dict(self.settings),
            "trials": [_trial_json(trial) for trial in self.trials],
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write `robustness.json`, `robustness.md` and, where there are numbers, `robustness.png`; their paths."""
        from circuits.draw import save_figure
        from locate_edit.draw.robustness import attack_dots

        place = Path(folder)
        written = []
        for name, text in {
            "robustness.json": json.dumps(self.to_json(), indent=1),
            "robustness.md": self.markdown(),
        }.items():
            with atomic_file(place / name) as path:
                path.write_text(text + "\n", encoding="utf-8")
            written.append(place / name)
        if self.models:
            with atomic_file(place / "robustness.png") as path:
                save_figure(attack_dots(self), path, dpi=150)
            written.append(place / "robustness.png")
        return written


def robustness(
    target: Edit | nn.Module,
    attacks: Sequence[Attack] | None = None,
    forget: PromptSet | None = None,
    retain: PromptSet | None = None,
    *,
    original: nn.Module | None = None,
    oracle: nn.Module | None = None,
    controls: bool = True,
    random: bool | int | Sequence[Control] = 0,
    margin: float = 0.3,
    seconds: float | None = None,
    steps: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Robustness:
    """Attack an edited model, the original, the same edit on random masks, and a model that never knew.

    First each attack meets its positive control, made of the original model. Where it brings back less than ``margin``
    of what is hidden there, it is not run on anything else: from a tool that finds nothing where something is, finding
    nothing says nothing. The model is afterwards as it was, bit for bit, on every way out. Where an attack cannot be
    made the others go on, with the reason in its place.

    Args:
        target: an applied edit, or the edited model.
        attacks: objects like ``Relearning(steps=20)``; None takes every attack of the catalogue as it is.
        forget: what was to be forgotten; None takes the prompts of the edit.
        retain: what the model should know anyway; None takes the prompts of the edit.
        original: the model before the edit, where ``target`` is no edit.
        oracle: a model trained without what was to be forgotten: the reference for what an attack makes up by itself.
        controls: try each attack on its positive control first. False leaves a number without what makes it credible.
        random: the random control, of which the mean is reported: on how many random masks of the edit's size and kind
            it is made again; masks; edits or models made elsewhere.
        margin: how much of the measure (such as a likelihood) an attack must bring back in its control.
        seconds: no attack is begun after this time (s); None for no limit.
        steps: no attack takes more optimizer steps than this; None for their own.
        batch_size: rows a forward pass.
        seed: of the attacks and the random masks.
        progress: show a progress bar on standard error.

    Raises:
        EditError: the edit is not applied, there is no original model for the controls, no attack, two that print
            alike, random masks for an edit that cannot be made again, or a model as its own oracle.
        PromptError: no prompts, or prompts a model cannot read.
    """
    named = _named(_all() if attacks is None else attacks)
    named = {name: _capped(attack, steps) for name, attack in named.items()}
    forget, retain = _prompts(target, forget, retain)
    if not margin > 0:
        raise EditError(f"margin must be positive, got {margin}")
    opened = states(target, original=original, oracle=oracle, random=random, seed=seed)
    if controls and "before" not in opened:
        raise EditError(
            "the positive controls are made of the model before the edit: give the edit itself or original=, or pass "
            "controls=False and read every number as that of an untried tool"
        )
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    started = time.perf_counter()
    trials = []
    with _bar(progress, len(named)) as advance:
        for name, attack in named.items():
            if seconds is not None and time.perf_counter() - started > seconds:
                why = f"{SPENT} ({seconds:g} s)"
                trials.append(Trial(name, repr(attack), withheld=why, does=_does(attack)))
            else:
                trials.append(
                    _trial(
                        name, attack, opened, forget, retain,
                        margin=margin if controls else None, options=options,
                    )
                )  # fmt: skip
            advance(name)
    settings = {
        "seed": seed, "batch_size": batch_size, "margin": margin, "controls": controls, "steps": steps,
        "seconds": seconds, "random_masks": len(opened.get("random", ())),
        "forget": {"prompts": len(forget), "digest": forget.digest},
        "retain": {"prompts": len(retain), "digest": retain.digest},
    }  # fmt: skip
    return Robustness(tuple(trials), settings)


def _trial(
    name: str,
    attack: Attack,
    opened: Mapping[str, Sequence[Opened]],
    forget: PromptSet,
    retain: PromptSet,
    *,
    margin: float | None,
    options: dict[str, Any],
) -> Trial:
    """One attack on its control and then on every model."""
    started = time.perf_counter()
    control: Attacked | None = None
    withheld = ""
    if margin is not None:
        try:
            with (
                opened["before"][0]() as model,
                attack.hide(model, forget, **options) as hidden,
            ):
                control = attack(hidden, forget, retain=retain, **options)
            withheld = _not_found(control, margin)
        except Exception as problem:
            withheld = f"no positive control: {type(problem).__name__}: {problem}"
    found: dict[str, Attacked] = {}
    failed: dict[str, str] = {}
    for which, ways in {} if withheld else opened.items():
        try:
            runs = []
            for each in ways:
                with each() as model:
                    runs.append(attack(model, forget, retain=retain, **options))
            found[which] = _pooled(runs)
        except Exception as problem:
            failed[which] = f"{type(problem).__name__}: {problem}"
    if not withheld and not found:
        withheld = next(iter(failed.values()))
    spent = time.perf_counter() - started
    return Trial(name, repr(attack), found, control, withheld, failed, spent, _does(attack))


def _does(attack: Attack) -> str:
    """The first sentence of the attack's description."""
    text = " ".join((inspect.getdoc(type(attack)) or "").split("\n\n")[0].split())
    return text.replace("``", "")


def _not_found(control: Attacked, margin: float) -> str:
    """Why the numbers of an attack are withheld after its control; empty where it found it."""
    hidden, under = control.forget_clean.estimate, control.forget.estimate
    if hidden is None or under is None:
        reason = control.forget.withheld or control.forget_clean.withheld
        return f"the positive control has no number: {reason}"
    if under < hidden + margin:
        return (
            f"it does not find its positive control, which gives away {hidden:.2f} by itself and {under:.2f} attacked, "
            f"where {hidden + margin:.2f} is needed"
        )
    return ""


def _pooled(runs: Sequence[Attacked]) -> Attacked:
    """Several runs as one: prompt by prompt their mean; curve and notes only of a single run."""
    first = runs[0]
    if len(runs) == 1:
        return first

    def mean(parts: Sequence[Values | None]) -> Values | None:
        values = [part for part in parts if part is not None]
        return average_over_runs(values) if values else None

    return Attacked(
        average_over_runs([run.forget for run in runs]),
        average_over_runs([run.forget_clean for run in runs]),
        mean([run.retain for run in runs]),
        mean([run.retain_clean for run in runs]),
        notes={"runs": len(runs)},
    )


# ---- reading the arguments ---------------------------------------------------------------------------------------


def _all() -> list[Attack]:
    return [entry.load()() for entry in catalog.entries("attack")]


def _named(attacks: Sequence[Attack]) -> dict[str, Attack]:
    """Attacks by type, or by how they print where several have one type."""
    short = [type(attack).__name__ for attack in attacks]
    names = [
        repr(attack) if short.count(name) > 1 else name
        for name, attack in zip(short, attacks, strict=True)
    ]
    if not names:
        raise EditError("give at least one attack, or None for all there are")
    for attack in attacks:
        if isinstance(attack, type) or not isinstance(attack, Attack):
            raise EditError(
                f"an attack is an object like Relearning(steps=20) with a call and hide(), got {attack!r}"
            )
    if twice := [name for name in names if names.count(name) > 1]:
        raise EditError(f"two attacks are called {twice[0]!r}: give each once")
    return dict(zip(names, attacks, strict=True))


def _capped(attack: Any, steps: int | None) -> Attack:
    """The attack with at most so many steps, where it has any."""
    own = getattr(attack, "steps", None)
    if steps is not None and isinstance(own, int) and own > steps:
        attack = dataclasses.replace(attack, steps=steps)
    return attack  # type: ignore[no-any-return]


def _prompts(
    target: Edit | nn.Module, forget: PromptSet | None, retain: PromptSet | None
) -> tuple[PromptSet, PromptSet]:
    if isinstance(target, Edit):
        forget = target.forget if forget is None else forget
        retain = target.retain if retain is None else retain
    for name, given in (("forget", forget), ("retain", retain)):
        if given is None:
            raise PromptError(
                f"no {name} prompts: pass {name}=PromptSet(...). Without retain prompts an attack that breaks the "
                "model looks like one that finds nothing"
            )
        if not isinstance(given, PromptSet):
            raise PromptError(f"{name} must be a PromptSet, got {type(given).__name__}")
    assert forget is not None
    assert retain is not None
    return forget, retain


# ---- text --------------------------------------------------------------------------------------------------------

_LEGEND = (
    "Each measure is the likelihood of the answers, or what the attack's description says; larger is more given away. "
    "In brackets: 95% bootstrap interval over prompts.",
    "control: a model that knows the answers and hides them, which the attack must find. before, after: the edit. "
    "random mask: the same edit in other units. oracle: never knew.",
    "beyond oracle: attacked forget measure minus the oracle's; what is left of the knowledge shows here and nowhere "
    "else. Where retain falls, the attack breaks the model rather than finding nothing.",
)


def _said(found: Attacked) -> list[str]:
    """Four cells: forget and retain, clean and attacked."""
    estimate = found.forget.estimate
    interval = found.forget.interval()
    under = None if estimate is None or interval is None else (estimate, *interval)
    return [
        _number(found.forget_clean),
        _with_interval(under) or _number(found.forget),
        _number(found.retain_clean),
        _number(found.retain),
    ]


def _note(trial: Trial, model: str) -> str:
    """What must be known beside the numbers of one model."""
    back = model in ("after", "random") and trial.outcome(model) == "brings answers back"
    said = ["brings answers back"] if back else []
    return ", ".join([*said, "breaks the model"] if trial.breaks(model) else said)


def _listed(names: Sequence[str], one: str, several: str) -> str:
    """The beginning of a sentence about one or several of them, with its verb."""
    said = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{said[:1].upper()}{said[1:]} {one if len(names) == 1 else several}"


def _number(values: Values | None) -> str:
    estimate = None if values is None else values.estimate
    return "-" if estimate is None else f"{estimate:.3f}"


def _with_interval(given: tuple[float, float, float] | None) -> str:
    return "" if given is None else f"{given[0]:.3f} ({given[1]:.3f} to {given[2]:.3f})"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _row(parts: Sequence[str]) -> str:
    return "| " + " | ".join(parts) + " |"


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "name": trial.name,
        "does": trial.does,
        "attack": trial.attack,
        "withheld": trial.withheld,
        "failed": dict(trial.failed),
        "seconds": trial.seconds,
        "control": None if trial.control is None else _attacked_json(trial.control),
        "models": {
            model: _attacked_json(found)
            | {
                "beyond oracle": trial.beyond(model),
                "gain": trial.gain(model),
                "broken": trial.breaks(model),
                "outcome": trial.outcome(model),
            }
            for model, found in trial.found.items()
        },
    }


def _attacked_json(found: Attacked) -> dict[str, Any]:
    about: dict[str, Any] = {
        part: _values_json(getattr(found, part))
        for part in ("forget_clean", "forget", "retain_clean", "retain")
    }
    curve = [dataclasses.asdict(point) for point in found.curve]
    notes = json.loads(json.dumps(dict(found.notes), default=str))
    return about | {"curve": curve, "strength": found.strength, "notes": notes}


def _values_json(values: Values | None) -> dict[str, Any] | None:
    if values is None:
        return None
    return {
        "estimate": values.estimate,
        "interval": values.interval(),
        "items": len(values),
        "withheld": values.withheld,
        "note": values.note,
    }


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[str], None]]:
    """A function that says which attack is done, on a progress bar if one is wanted."""
    if not show:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("attack", total=total)
        yield lambda name: bar.update(task, advance=1, description=f"attack: {name}")
