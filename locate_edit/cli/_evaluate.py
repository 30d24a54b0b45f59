"""What `locate-edit evaluate` and `edit --report` do: read metrics, measure, print the table, write the report."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from circuits.atomic import atomic_folder
from locate_edit import catalog, rewards
from locate_edit.cli import _compare
from locate_edit.cli.saying import terminal, wants_progress
from locate_edit.errors import LocateEditError
from locate_edit.reports.evaluation import evaluate
from locate_edit.reports.report import MEASURED

USUAL = ("likelihood", "exact-memorization", "perplexity")
"""What is measured where no metric is named."""


def build(names: Sequence[str] | None, settings: Mapping[str, str]) -> list[Any]:
    """Metrics, and numbers about whole sets, by name and with their settings.

    Args:
        names: catalogue names or `package.module:Name`; None for the usual ones.
        settings: text by "name.option", such as `min-k.k`.

    Raises:
        CatalogError: an unknown name or option, or text that does not fit.
        RewardError: a reward that cannot be found.
        LocateEditError: a setting that begins with none of the names, or a metric that lacks its reward.
    """
    chosen = list(names or USUAL)
    own = _compare.by_name(settings, chosen, "a metric of this run")
    return [_built(name, own.get(name, {})) for name in chosen]


def _built(name: str, settings: Mapping[str, str]) -> Any:
    wanted = name.replace("_", "-").lower()
    statistics = {text for e in catalog.entries("statistic") for text in (e.name, e.attribute.lower())}  # fmt: skip
    kind: catalog.Kind = "statistic" if wanted in statistics else "metric"
    made = catalog.build(kind, name, dict(settings))
    function = made.func if isinstance(made, partial) else made
    if inspect.isfunction(function) and "reward" in catalog.hyperparameters(function):
        reward = made.keywords.get("reward") if isinstance(made, partial) else None
        if reward is None:
            raise LocateEditError(
                f"--metric {name} needs a reward: --set {name}.reward=lexicon:word,word for words to count, or "
                f"--set {name}.reward=package.module:name for a function of prompts and continuations"
            )
        rewards.find(reward)  # found out now, not after the first forward passes
    return made


def measure_and_write(
    target: Any, out: Path | None, as_json: bool, notes: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    """Evaluate, print the table and write the report, with notes of what was not done."""
    report = evaluate(target, progress=wants_progress(as_json), **options)
    report = replace(report, notes=(*report.notes, *notes))
    if out is not None:
        with atomic_folder(out, like="report.json", ours=MEASURED) as place:
            report.save(place)
    if not as_json:
        console = terminal()
        console.print(report.table(width=console.width))
        console.print(report.summary, highlight=False)
        # What is missing for the same reason in every state is said once.
        missing: dict[str, dict[str, None]] = {}
        for key, _, why in report.withheld():
            missing.setdefault(why, {})[key] = None
        lines = [f"{', '.join(keys)}: no number, {why}" for why, keys in missing.items()]
        for note in (*report.notes, *lines):
            console.print(f"Note: {note}", highlight=False, markup=False)
        if out is not None:
            console.print(f"Written: {out / 'report.html'}", soft_wrap=True)
    return report.to_json()
