"""Locate where a language model keeps something, then edit exactly those weights.

The names below are loaded when they are first used, so that `import locate_edit` (and the command
line's `--help`) does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuits.lazy import lazy_exports

__version__ = "0.1.0"

_HOME = {
    "Edit": "locate_edit.editing",
    "EditError": "locate_edit.errors",
    "LocateEditError": "locate_edit.errors",
    "PromptError": "locate_edit.errors",
    "PromptSet": "locate_edit.prompts",
    "Report": "locate_edit.reports.report",
    "compare": "locate_edit.reports.comparison",
    "edit": "locate_edit.editing",
    "evaluate": "locate_edit.reports.evaluation",
    "examine": "locate_edit.reports.examination",
    "robustness": "locate_edit.reports.robustness",
}

__all__ = [
    "Edit",
    "EditError",
    "LocateEditError",
    "PromptError",
    "PromptSet",
    "Report",
    "compare",
    "edit",
    "evaluate",
    "examine",
    "robustness",
]

if TYPE_CHECKING:
    from locate_edit.editing import Edit, edit
    from locate_edit.errors import EditError, LocateEditError, PromptError
    from locate_edit.prompts import PromptSet
    from locate_edit.reports.comparison import compare
    from locate_edit.reports.evaluation import evaluate
    from locate_edit.reports.examination import examine
    from locate_edit.reports.report import Report
    from locate_edit.reports.robustness import robustness

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
