"""Read a transformer: name its parts, view its weights, watch its activations, score its units.

Nothing here writes to a parameter; ``locate_edit`` decides and changes. The names below are loaded when they are first
used, so that importing the package (or only its errors) does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuits.lazy import lazy_exports

_HOME = {
    "ComponentMask": "circuits.mask",
    "LocateEditError": "circuits.errors",
    "MaskError": "circuits.errors",
    "ModelMap": "circuits.model_map",
    "ReadPoint": "circuits.model_map",
    "Scores": "circuits.scores",
    "Site": "circuits.sites",
    "SiteError": "circuits.errors",
    "Slice": "circuits.model_map",
    "Unit": "circuits.sites",
    "UnknownFamily": "circuits.errors",
    "capture": "circuits.hooks",
    "describe": "circuits.model_map",
    "replace": "circuits.hooks",
}

__all__ = [
    "ComponentMask",
    "LocateEditError",
    "MaskError",
    "ModelMap",
    "ReadPoint",
    "Scores",
    "Site",
    "SiteError",
    "Slice",
    "Unit",
    "UnknownFamily",
    "capture",
    "describe",
    "replace",
]

if TYPE_CHECKING:
    from circuits.errors import LocateEditError, MaskError, SiteError, UnknownFamily
    from circuits.hooks import capture, replace
    from circuits.mask import ComponentMask
    from circuits.model_map import ModelMap, ReadPoint, Slice, describe
    from circuits.scores import Scores
    from circuits.sites import Site, Unit

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
