"""Read a transformer: name its parts, view its weights, watch its activations, score its units.

Nothing here writes to a parameter; ``locate_edit`` decides and changes.
"""

from __future__ import annotations

from circuits.errors import LocateEditError, MaskError, SiteError, UnknownFamily
from circuits.mask import ComponentMask
from circuits.model_map import ModelMap, ReadPoint, Slice, describe
from circuits.scores import Scores
from circuits.sites import Site, Unit

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
    "describe",
]
