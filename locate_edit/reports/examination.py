"""`examine`: one call that says what an edit did, whether what it took is gone or only hidden, and what else it broke.

    found = examine(edit, oracle=oracle, seconds=180)
    print(found)               # the answers in words
    found.save("report")       # report.html for somebody who was not there, beside numbers and figures

1. Numbers: every metric on every prompt set, before, after, on a random mask, and of the oracle (`evaluate`).
2. Attacks: what brings the answers back, each tried on a positive control first (`robustness`).
3. Layers: which of them still carry the answers (`layers`).
4. Weights: where the edit moved them, and that nothing outside its mask did.

Random masks are edited once and serve all four.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from circuits.atomic import atomic_file
from locate_edit.attacked import Attack
from locate_edit.editing import Edit
from locate_edit.errors import EditError, Interrupted, LocateEditError
from locate_edit.prompts import PromptSet
from locate_edit.reports.controls import Control, made, wanted
from locate_edit.reports.evaluation import Metric, evaluate
from locate_edit.reports.layers import Layers, layers
from locate_edit.reports.report import Report, plain
from locate_edit.reports.robustness import Robustness, robustness
from locate_edit.reports.text import answers
from locate_edit.reports.weight_change import weight_changes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Examination", "examine"]


@dataclass(frozen=True, eq=False)
class Examination:
    """Everything that was found out about an edit.

    Attributes:
        report: the numbers.
        robustness: what attacks bring back; None where none was asked for.
        layers: which layers still carry the answers; None where that could not be told.
        pictures: figures of the edit itself, PNG by name.
        notes: what could not be done, and why.
    """

    report: Report
    robustness: Robustness | None = None
    layers: Layers | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def noted(self, note: str) -> Examination:
        """The same with another note."""
        return replace(self, notes=(*self.notes, note))

    @property
    def answers(self) -> dict[str, str]:
        """Questions about the edit, each with what was found, in words."""
        found = dict(answers(self.report))
        if self.robustness is not None:
            found["Is it gone, or only hidden?"] = self.robustness.in_words()
        if self.layers is not None:
            found["Where is it still?"] = self.layers.in_words()
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data: the report, and the attacks and layers beside it."""
        return {
            "answers": self.answers,
            "report": self.report.to_json(),
            "robustness": None if self.robustness is None else self.robustness.to_json(),
            "layers": None if self.layers is None else self.layers.to_json(),
            "notes": list(self.notes),
        }

    def to_html(self) -> str:
        """One self-contained page, no script and nothing to download."""
        images, noted = self._drawn()
        return noted._page(images)

    def to_markdown(self) -> str:
        """The answers, then the report and the table of attacks."""
        parts = ["# What the edit did, and whether it lasts", ""]
        parts += [f"**{question}** {said}\n" for question, said in self.answers.items()]
        if self.robustness is not None:
            parts += ["## Attacks", "", self.robustness.markdown(), ""]
        parts += [f"- {note}" for note in self.notes]
        return "\n".join([*parts, "", self.report.to_markdown()])

    def figures(self) -> dict[str, Figure]:
        """The figures by file name, in the order of the page; those of the edit itself are `pictures`."""
        return {name: figure for _, draw in self._figures() for name, figure in draw().items()}

    def _figures(self) -> Iterator[tuple[str, Callable[[], dict[str, Figure]]]]:
        """What there is to draw, and how."""
        from locate_edit.draw.layers import carried_map, lens_map
        from locate_edit.draw.robustness import attack_curves, attack_dots

        def one(name: str, draw: Callable[[Any], Any], of: Any) -> Callable[[], dict[str, Figure]]:
            return lambda: {name: _figure_of(draw(of))}

        yield "the numbers", self.report.figures
        if self.robustness is not None and self.robustness.models:
            curves = partial(attack_curves, model=self.robustness.settings.get("model", ""))
            yield "the attacks", one("attacks", attack_dots, self.robustness)
            for trial in self.robustness.trials:
                if trial.name.startswith("Relearning") and trial.found:
                    name = re.sub(r"[^a-z0-9]+", "-", trial.name.lower()).strip("-")
                    yield trial.title, one(name, curves, trial)
        if self.layers is not None:
            yield "what layers carry", one("carried", carried_map, self.layers)
            yield "what the lens reads", one("lens", lens_map, self.layers)

    def save(self, folder: str | Path) -> Path:
        """Write `report.html`, `report.md`, `report.json`, `robustness.json`, `layers.json` and the figures.

        Everything is made before anything is written, and each file appears whole or not at all. `report.json` is that
        of the numbers, as `evaluate` writes it.

        Returns:
            The folder.
        """
        images, noted = self._drawn()
        files = {f"{name}.png": image for name, image in images.items()}
        data = {"report": self.report, "robustness": self.robustness, "layers": self.layers}
        for name, part in data.items():
            if part is not None:
                said = plain(part.to_json())
                text = json.dumps(said, indent=1, ensure_ascii=False, allow_nan=False)
                files[f"{name}.json"] = f"{text}\n".encode()
        files["report.md"] = noted.to_markdown().encode()
        files["report.html"] = noted._page(images).encode()
        for name, content in files.items():
            with atomic_file(Path(folder) / name) as path:
                path.write_bytes(content)
        return Path(folder)

    def _page(self, images: Mapping[str, bytes]) -> str:
        from locate_edit.reports.html import whole_page

        return whole_page(self, images)

    def _drawn(self) -> tuple[dict[str, bytes], Examination]:
        """The figures as PNG by name, and the examination with a note of each that could not be drawn."""
        found, images = self, dict[str, bytes]()
        for what, draw in self._figures():
            try:
                images |= {name: _png(figure) for name, figure in draw().items()}
            except Exception as problem:  # a figure must not cost the numbers
                found = found.noted(f"Not drawn: {what}. {type(problem).__name__}: {problem}")
        return images | dict(self.pictures), found

    def __repr__(self) -> str:
        parts = [f"{len(self.report.lines)} metrics"]
        if self.robustness is not None:
            parts.append(f"{len(self.robustness.trials)} attacks")
        if self.layers is not None:
            parts.append(f"{self.layers.n_layers} layers")
        return (
            f"Examination({', '.join(parts)}; print() shows the answers, .save(folder) writes them)"
        )

    def __str__(self) -> str:
        """The answers in words."""
        return "\n".join(f"{question} {said}" for question, said in self.answers.items())

    def _repr_html_(self) -> str:
        from locate_edit.reports.html import at_a_glance

        return at_a_glance(self.answers)


def examine(
    edit: Edit,
    metrics: Sequence[Metric] | Metric | None = None,
    *,
    forget: PromptSet | None = None,
    retain: PromptSet | None = None,
    others: Mapping[str, PromptSet] | None = None,
    oracle: nn.Module | None = None,
    other_oracle: nn.Module | None = None,
    attacks: Sequence[Attack] | None = None,
    random: bool | int | Sequence[Control] | None = None,
    seconds: float | None = None,
    steps: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    undo: Sequence[str] = (),
    progress: bool = False,
) -> Examination:
    """Measure an edit, attack it, and look into its layers and weights, beside random masks and an oracle.

    The model is afterwards as it was, with the edit applied.

    Args:
        edit: an applied edit.
        metrics: as of `evaluate`.
        forget: what was to be forgotten; None takes the prompts of the edit.
        retain: what the model should know anyway; None takes the prompts of the edit.
        others: more prompt sets by name, which are measured.
        oracle: a model retrained without the forget prompts.
        other_oracle: the same with another seed: the unit of the distance from it.
        attacks: as of `robustness`; None takes every attack there is, an empty list none.
        random: the random control, as of `evaluate`.
        seconds: no attack is begun after this time (s); None for no limit.
        steps: no attack takes more optimizer steps than this; None for their own.
        batch_size: rows a forward pass.
        seed: of random masks, attacks and bootstrap.
        undo: lines that tell how to take the edit back.
        progress: show progress bars on standard error.

    Raises:
        EditError: the edit is not applied, or a random control was asked for that cannot be made.
        PromptError: no forget or retain prompts, or prompts a model cannot read.
        Interrupted: Ctrl-C after the numbers were measured, with what was done by then as its `found`.
    """
    given: Any = edit
    if not isinstance(given, Edit) or edit.model is None:
        raise EditError(
            f"examine takes an applied edit, got {edit!r}. For two models, evaluate, robustness(original=...) and "
            "layers(original=...) do the parts"
        )
    forget = edit.forget if forget is None else forget
    retain = edit.retain if retain is None else retain
    controls, reason = wanted(edit, random, seed)
    same = made(edit, controls)
    report = evaluate(
        edit, metrics, forget=forget, retain=retain, others=others, oracle=oracle,
        other_oracle=other_oracle, random=same, seed=seed, batch_size=batch_size, undo=undo,
        progress=progress,
    )  # fmt: skip
    notes = [f"No random control: {reason}."] if reason else []
    attacked = None
    if attacks is None or len(attacks):
        try:
            attacked = robustness(
                edit, attacks, forget, retain, oracle=oracle, random=same, seconds=seconds, steps=steps,
                batch_size=batch_size, seed=seed, progress=progress,
            )  # fmt: skip
        except Interrupted as stopped:
            notes.append("Interrupted during the attacks: layers and weights were not looked at.")
            so_far = Examination(report, stopped.found, notes=tuple(notes))
            raise Interrupted(so_far) from stopped

    def look(oracle: nn.Module | None) -> Layers:
        return layers(
            edit, forget=forget, retain=retain, oracle=oracle, random=same, batch_size=batch_size, seed=seed
        )  # fmt: skip

    try:
        seen = _tried(lambda: look(oracle), "which layers still carry the answers", notes)
        if seen is None and oracle is not None:
            notes[-1] += " Looked at without the oracle."
            seen = _tried(lambda: look(None), "which layers still carry the answers", notes)
        picture = _tried(lambda: _moved(edit), "where the weights moved", notes)
    except KeyboardInterrupt as interrupt:
        notes.append("Interrupted: layers and weights were not looked at.")
        raise Interrupted(Examination(report, attacked, notes=tuple(notes))) from interrupt
    pictures = {} if picture is None else {"weight_change": picture}
    return Examination(report, attacked, seen, pictures, tuple(notes))


def _tried(part: Callable[[], Any], what: str, notes: list[str]) -> Any:
    """A part of the examination; where this edit, model or machine does not allow it, None and a note of why.

    Whatever it is that went wrong: it must not cost the numbers that took an hour.
    """
    try:
        return part()
    except Exception as problem:
        kind = "" if isinstance(problem, LocateEditError) else f"{type(problem).__name__}: "
        notes.append(f"Not told: {what}. {kind}{problem}")
        return None


def _moved(edit: Edit) -> bytes:
    """The figure of where the weights moved, drawn while the edit is applied."""
    from locate_edit.draw._style import free_figure
    from locate_edit.draw.edits import weight_change

    if not edit.delta:
        raise EditError("the edit changes no weights")
    found = weight_changes(edit)
    figure = free_figure(2.4 + 0.75 * len(found.columns), 1.9 + min(7.0, 0.28 * len(found.layers)))
    weight_change(edit, figure.add_subplot())
    return _png(figure)


def _figure_of(axes: Any) -> Any:
    return axes.figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()
