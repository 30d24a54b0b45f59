"""What can go wrong with the input: one small tree, so that a caller can catch it in one place."""

from __future__ import annotations

from circuits.errors import LocateEditError, MaskError, SiteError, UnknownFamily

__all__ = [
    "EditError",
    "LocateEditError",
    "MaskError",
    "PromptError",
    "RewardError",
    "SiteError",
    "UnknownFamily",
]


class PromptError(LocateEditError):
    """A prompt, a target or a file of prompts that cannot be used as it is."""


class EditError(LocateEditError):
    """An edit that cannot be made, loaded or applied; the model is as it was."""


class RewardError(LocateEditError):
    """A reward that cannot be found, or that does not give one finite number for each continuation."""
