"""What `locate-edit evaluate` and `edit --report` do: measure, print the table, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from circuits.atomic import atomic_folder
from locate_edit.cli.saying import terminal, wants_progress
from locate_edit.reports.evaluation import evaluate
from locate_edit.reports.report import FILES


def measure_and_write(
    target: Any, out: Path | None, as_json: bool, notes: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    """Evaluate, print the table and write the report, with notes of what was not done."""
    report = evaluate(target, progress=wants_progress(as_json), **options)
    report = replace(report, notes=(*report.notes, *notes))
    if out is not None:
        with atomic_folder(out, like="report.json", ours=FILES) as place:
            report.save(place)
    if not as_json:
        console = terminal()
        console.print(report.table(width=console.width))
        console.print(report.summary, highlight=False)
        for note in notes:
            console.print(f"Note: {note}", highlight=False, markup=False)
        if out is not None:
            console.print(f"Written: {out / 'report.html'}", soft_wrap=True)
    return report.to_json()
