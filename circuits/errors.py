"""Errors of the project. Each message says what is wrong, where, what was expected, what was found, what to do.

LocateEditError
├── UnknownFamily   a model whose layout is not known, or does not agree with what is known
├── SiteError       a place that cannot be named, or that this model does not have
└── MaskError       scores or masks that cannot be made, combined, read, or used with this model
"""

from __future__ import annotations


class LocateEditError(Exception):
    """Everything this project raises on purpose."""


class UnknownFamily(LocateEditError):
    """The model's layout is not known, or its modules and shapes contradict what is known."""


class SiteError(LocateEditError):
    """A site or unit that cannot be parsed, or that the model does not have."""


class MaskError(LocateEditError):
    """Scores or a mask that cannot be made, combined, read from a file, or used with this model."""
