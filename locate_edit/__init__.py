"""Locate where a language model keeps something, then edit exactly those weights.

The names below are loaded when they are first used, so that `import locate_edit` (and the command
line's `--help`) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Edit": "locate_edit.editing",
    "EditError": "locate_edit.errors",
    "LocateEditError": "locate_edit.errors",
    "PromptError": "locate_edit.errors",
    "PromptSet": "locate_edit.prompts",
    "Report": "locate_edit.report",
    "edit": "locate_edit.editing",
    "evaluate": "locate_edit.evaluation",
}

__all__ = [  # noqa: RUF022 - in the order of use
    "PromptSet",
    "edit",
    "Edit",
    "evaluate",
    "Report",
    "LocateEditError",
    "PromptError",
    "EditError",
]

if TYPE_CHECKING:
    from locate_edit.editing import Edit, edit
    from locate_edit.errors import EditError, LocateEditError, PromptError
    from locate_edit.evaluation import evaluate
    from locate_edit.prompts import PromptSet
    from locate_edit.report import Report


def __getattr__(name: str) -> Any:
    """Import `name` from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'locate_edit' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
