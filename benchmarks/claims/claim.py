"""A claim of a paper, small enough to be tried: what it says, how it is measured, and what must hold.

A file of this folder holds one system: a function that measures one seed and a `CLAIM` made of it::

    def measure(seed: int) -> dict[str, float]:
        model, tokenizer = organism.load()
        ...
        precondition(before > 0.9, f"the model knows the facts (probability {before:.2f}, 0.9 wanted)")
        return {"before": before, "edited": edited, "random neurons": control}

    CLAIM = Claim(
        system="Privacy neurons",
        paper="Wu et al. 2023, arXiv:2310.20138",
        says="Zeroing the located neurons lowers the exposure of numbers more than zeroing random ones.",
        setting="the organism, twelve phone numbers, 60 of 2560 neurons",
        measure=measure,
        checks=(
            Check("exposure (bits) falls below that with random neurons", ("edited", "random neurons"),
                  lambda f: f["random neurons"] - f["edited"]),
        ),
    )

The seed draws whatever can be drawn (people, masks, order of the data, a small model trained for it), so that seeds are
repetitions of the experiment. The margin of a check is positive where it holds, and states the size of what is claimed:
"at least half of it is left" is ``f["after"] - 0.5 * f["before"]``. Bounds are set from the paper's words before the
seeds are run, and stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where claims run."""

Figures = Mapping[str, float]


class PreconditionFailed(Exception):
    """The model does not do what the experiment needs it to do first, so nothing can be said about the claim."""


def precondition(holds: bool, says: str) -> None:
    """Go on only if ``holds``; ``says`` states what must be, with the number found.

    Raises:
        PreconditionFailed: it does not hold.
    """
    if not holds:
        raise PreconditionFailed(says)


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Attributes:
        says: what, in words with the unit and the bound.
        figures: names of the figures it is about, as the table shows them.
        margin: of one seed's figures; positive where it holds.
    """

    says: str
    figures: tuple[str, ...]
    margin: Callable[[Figures], float]


@dataclass(frozen=True)
class Claim:
    """What a system's paper claims, and its trial.

    Attributes:
        system: its name.
        paper: its citation.
        says: the claim in one sentence.
        setting: model, data and sizes of the trial.
        measure: figures by name of one seed; raises `PreconditionFailed`.
        checks: what must hold for the claim to hold.
    """

    system: str
    paper: str
    says: str
    setting: str
    measure: Callable[[int], Figures]
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Trial:
    """What one seed gave.

    Attributes:
        seed: which.
        figures: by name; None when there are none.
        precondition: which precondition failed, or None.
        error: why it broke, or None.
        seconds: CPU time (s).
    """

    seed: int
    figures: Figures | None
    precondition: str | None = None
    error: str | None = None
    seconds: float = 0.0


def verdict(check: Check, trials: Sequence[Trial]) -> str:
    """What all seeds together say of one check: "held", "did not hold", or in how many seeds it did."""
    if any(trial.error is not None for trial in trials):
        return "could not be run"
    found = [trial.figures for trial in trials if trial.figures is not None]
    failed = len(trials) - len(found)
    if not found:
        return "precondition failed"
    held = sum(check.margin(figures) > 0 for figures in found)
    word = (
        "held"
        if held == len(found)
        else "did not hold"
        if not held
        else f"held in {held} of {len(found)} seeds"
    )
    return f"{word}; precondition failed in {failed} of {len(trials)} seeds" if failed else word


def shown(name: str, trials: Sequence[Trial]) -> str:
    """One figure over the seeds, as "name 0.84 (0.79 to 0.90)": mean, least and most."""
    values = [trial.figures[name] for trial in trials if trial.figures is not None]
    if not values:
        return f"{name} -"
    mean = sum(values) / len(values)
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return f"{name} {mean:.3g}{spread}"


def markdown(claims: Sequence[Claim], trials: Mapping[str, Sequence[Trial]]) -> str:
    """The table of all claims, a row for each check, and below it what kept claims from being tried.

    Args:
        claims: the claims, in order.
        trials: what their seeds gave, by system.
    """
    lines = [
        "| system | claim | setting | figures: mean (least to most) | seeds | verdict |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for claim in claims:
        found = trials[claim.system]
        for number, check in enumerate(claim.checks):
            first = (f"{claim.system} ({claim.paper})", claim.says) if number == 0 else ("", "")
            figures = ", ".join(shown(name, found) for name in check.figures)
            cells = (
                first[0],
                f"{first[1]} *{check.says}*".strip(),
                claim.setting if number == 0 else "",
                figures,
                str(len(found)),
                f"**{verdict(check, found)}**",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        notes += [
            f"- {claim.system}, seed {trial.seed}: {trial.precondition or trial.error}"
            for trial in found
            if trial.figures is None
        ]
    return "\n".join([*lines, "", "Without figures:", "", *notes] if notes else lines)
