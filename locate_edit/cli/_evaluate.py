"""What `locate-edit evaluate` and `edit --report` do: measure, print the table, write the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from circuits.atomic import atomic_folder
from locate_edit.cli.saying import terminal, wants_progress
from locate_edit.reports.evaluation import evaluate


def measure_and_write(
    target: Any, out: Path | None, as_json: bool, **options: Any
) -> dict[str, Any]:
    """Evaluate, print the table and write the report."""
    report = evaluate(target, progress=wants_progress(as_json), **options)
    if out is not None:
        with atomic_folder(out, like="report.json") as place:
            report.save(place)
    if not as_json:
        console = terminal()
        console.print(report.table(width=console.width))
        console.print(report.summary, highlight=False)
        if out is not None:
            console.print(f"Written: {out / 'report.html'}", soft_wrap=True)
    return report.to_json()
