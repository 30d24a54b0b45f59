"""Names for places in a model.

A `Site` is all like units of one place (the neurons of layer 4); a `Unit` is one of them. Both print as short text and
parse back: ``L4.neuron``, ``L4.neuron[17]``, ``L4.neuron[3,17]`` (expert 3, neuron 17), ``embed.vocab[42]``,
``model.layers.0.mlp.down_proj.weight:row[7]``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Any

from circuits.errors import SiteError

LAYER_KINDS = ("neuron", "head", "kv_head", "expert", "mlp", "attn", "layer")
"""Kinds of units that belong to a layer."""
PARAMETER_KINDS = ("row", "col", "weight")
"""Kinds of units that belong to one named parameter."""
KINDS = (*LAYER_KINDS, *PARAMETER_KINDS, "vocab")
VOCAB_NAMES = ("embed", "unembed")

_LAYER_SITE = re.compile(r"L(\d+)\.(\w+)")
_VOCAB_SITE = re.compile(r"(\w+)\.vocab")
_PARAMETER_SITE = re.compile(r"([\w.]+):(\w+)")
_UNIT = re.compile(r"(?P<site>.+)\[\s*(?P<index>\d+(?:\s*,\s*\d+)*)\s*\]")


@total_ordering
@dataclass(frozen=True, eq=True)
class Site:
    """All like units of one place in a model.

    Kinds with a layer: neuron, head, kv_head, expert, mlp, attn, layer. Kinds of one parameter, ``name`` being the
    parameter's name: row (first axis), col (last axis), weight (single entries). Kind vocab has ``name`` "embed" or
    "unembed" and one unit per vocabulary item. Sites sort by layer, then kind, then name; sites without a layer last.

    Raises:
        SiteError: the combination of kind, layer and name means nothing.
    """

    layer: int | None
    kind: str
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SiteError(
                f"unknown kind of site {self.kind!r}: expected one of {', '.join(KINDS)}"
            )
        if self.kind in LAYER_KINDS:
            if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 0:
                raise SiteError(
                    f"a {self.kind} site needs a layer number of at least 0, got {self.layer!r}"
                )
            if self.name:
                raise SiteError(f"a {self.kind} site has no name, got {self.name!r}")
            return
        if self.layer is not None:
            raise SiteError(
                f"a {self.kind} site has no layer, got {self.layer!r}: use Site(None, {self.kind!r}, name)"
            )
        if self.kind == "vocab" and self.name not in VOCAB_NAMES:
            raise SiteError(f"a vocab site is named 'embed' or 'unembed', got {self.name!r}")
        if not self.name:
            raise SiteError(f"a {self.kind} site needs the name of a parameter, got an empty name")

    @property
    def sort_key(self) -> tuple[bool, int, int, str]:
        """What sites are ordered by: layer (none last), kind in the order of ``KINDS``, name."""
        return (self.layer is None, self.layer or 0, KINDS.index(self.kind), self.name)

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        return self.sort_key < other.sort_key

    def __str__(self) -> str:
        if self.kind in LAYER_KINDS:
            return f"L{self.layer}.{self.kind}"
        return f"{self.name}.vocab" if self.kind == "vocab" else f"{self.name}:{self.kind}"

    def __getitem__(self, index: int | tuple[int, ...]) -> Unit:
        return Unit(self, index if isinstance(index, tuple) else (index,))

    # Without this, Python would try integer indices forever when a site is iterated over by mistake.
    __iter__ = None

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site whose ``str()`` is ``text``.

        Raises:
            SiteError: the text is not a site.
        """
        stripped = text.strip()
        if match := _LAYER_SITE.fullmatch(stripped):
            return cls(int(match[1]), match[2])
        if match := _VOCAB_SITE.fullmatch(stripped):
            return cls(None, "vocab", match[1])
        if match := _PARAMETER_SITE.fullmatch(stripped):
            return cls(None, match[2], match[1])
        raise SiteError(
            f"{text!r} is not a site: expected something like 'L4.neuron', 'embed.vocab' or "
            "'model.layers.0.mlp.down_proj.weight:row'"
        )


@total_ordering
@dataclass(frozen=True, eq=True)
class Unit:
    """One unit of a site: a neuron, a head, a row, ...

    ``index`` has one number per unit axis: two, (expert, neuron), for the neurons of a mixture-of-experts layer.

    Raises:
        SiteError: an index that is empty or negative.
    """

    site: Site
    index: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.index or any(_not_a_position(i) for i in self.index):
            raise SiteError(
                f"a unit of {self.site} needs indices of at least 0, got {self.index!r}"
            )

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Unit):
            return NotImplemented
        return (self.site, self.index) < (other.site, other.index)

    def __str__(self) -> str:
        return f"{self.site}[{','.join(map(str, self.index))}]"

    @classmethod
    def parse(cls, text: str) -> Unit:
        """The unit whose ``str()`` is ``text``.

        Raises:
            SiteError: the text is not a unit.
        """
        match = _UNIT.fullmatch(text.strip())
        if match is None:
            raise SiteError(f"{text!r} is not a unit: expected something like 'L4.neuron[17]'")
        return cls(Site.parse(match["site"]), tuple(int(i) for i in match["index"].split(",")))


def _not_a_position(index: Any) -> bool:
    return not isinstance(index, int) or isinstance(index, bool) or index < 0
