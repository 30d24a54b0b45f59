"""What can go wrong with the input: one small tree, so that a caller can catch it in one place."""

from __future__ import annotations

from typing import Any

from circuits.errors import LocateEditError, MaskError, SiteError, UnknownFamily

__all__ = [
    "EditError",
    "Interrupted",
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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during long work, with what was done by then; the model is as it was.

    Attributes:
        found: the same as the work would have returned, as far as it got.
    """

    def __init__(self, found: Any) -> None:
        super().__init__("interrupted; what was done by then is in .found")
        self.found = found
