"""Weight layouts as strings, and the one function that reads them.

A layout names the axes of a parameter in the order they are *stored*:

    "neuron d_model"                                    nn.Linear, output axis first
    "d_model neuron"                                    Conv1D, input axis first
    "d_model (qkv head d_head) @ qkv=0"                 fused and concatenated, its first third
    "(head qkv d_head) d_model @ qkv=0"                 fused and interleaved per head
    "(kv_head slot d_head) d_model @ slot=:-2"          grouped: every slot of a group but the last two
    "(head d_head + kv_head d_head) d_model @ 1"        blocks of unequal size, the second one
    "expert d_model (neuron two) @ two=1"               stacked experts, interleaved

So fusion, transposition, interleaving, grouping and stacking are one short string, and `unfold` turns a tensor into a
**writable view** with one axis per name. It uses only slicing and splitting of axes, hence never copies: the same view
builds masks, reads gradients, changes weights and feeds figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from circuits.errors import UnknownFamily

FIXED_SIZES = {"qkv": 3, "two": 2}
"""Axes whose size is part of their meaning."""

_TERM = re.compile(r"\(([^()]*)\)|(\w+)")
_PICK = re.compile(r"(?P<axis>[a-z_]+)=(?P<index>-?\d+|-?\d*:-?\d*)|(?P<block>\d+)")


@dataclass(frozen=True)
class Weight:
    """One weight of a layer: where it is and how it is laid out, parsed from ``"path:name | axes @ picks"``.

    The path is relative to the layer; ``:name`` is the parameter's name, "weight" unless given.

    Raises:
        ValueError: the text is not a layout (a mistake in the table of families, not of a user).
    """

    text: str

    def __post_init__(self) -> None:
        self._parsed  # noqa: B018  - a malformed entry fails where it is written, not where it is used

    @property
    def _parsed(self) -> _Parsed:
        return _parse(self.text)

    @property
    def path(self) -> str:
        """Path of the module, relative to the layer."""
        return self._parsed.path

    @property
    def parameter(self) -> str:
        """Name of the parameter inside its module."""
        return self._parsed.parameter

    @property
    def bias_parameter(self) -> str:
        """Name the matching bias has, where there is one."""
        return "bias" if self.parameter == "weight" else f"{self.parameter}_bias"

    @property
    def layout(self) -> Layout:
        """The layout of the weight itself."""
        return self._parsed.layout

    def bias_layout(self, contracted: Iterable[str]) -> Layout:
        """The layout of the bias: the storage axes that the product with the input does not sum over."""
        inputs = set(contracted)
        kept = tuple(group for group in self.layout.groups if not inputs & group.names)
        names = {name for group in kept for name in group.names}
        picks = {axis: index for axis, index in self.layout.picks.items() if axis in names}
        return Layout(kept, picks, self.layout.block)


@dataclass(frozen=True)
class Group:
    """One storage axis: blocks laid end to end, each the product of named axes."""

    blocks: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> set[str]:
        """Every axis name in the group."""
        return {name for block in self.blocks for name in block}


@dataclass(frozen=True)
class Layout:
    """Storage axes, indices fixed by name, and which of several blocks is meant."""

    groups: tuple[Group, ...]
    picks: Mapping[str, int | slice]
    block: int = 0

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of the unfolded view, in storage order."""
        names = (name for group in self.groups for name in self._block(group))
        return tuple(name for name in names if not isinstance(self.picks.get(name), int))

    def _block(self, group: Group) -> tuple[str, ...]:
        return group.blocks[self.block if len(group.blocks) > 1 else 0]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The storage shape that the named ``sizes`` imply."""
        return tuple(sum(_product(block, sizes) for block in group.blocks) for group in self.groups)

    def unknown(self, sizes: Mapping[str, int]) -> set[str]:
        """Axes whose size is neither fixed nor in ``sizes``."""
        return {n for g in self.groups for n in g.names if n not in sizes and n not in FIXED_SIZES}


@dataclass(frozen=True)
class _Parsed:
    path: str
    parameter: str
    layout: Layout


@cache
def _parse(text: str) -> _Parsed:
    place, bar, axes = text.partition("|")
    if not bar:
        raise ValueError(f"layout {text!r}: expected 'path | axes'")
    path, _, parameter = place.strip().partition(":")
    body, _, picked = axes.partition("@")
    groups = tuple(_group(match) for match in _TERM.finditer(body))
    if not groups or _TERM.sub("", body).strip():
        raise ValueError(f"layout {text!r}: cannot read the axes {body.strip()!r}")
    picks: dict[str, int | slice] = {}
    block = 0
    for word in picked.split():
        match = _PICK.fullmatch(word)
        if match is None:
            raise ValueError(f"layout {text!r}: cannot read the index {word!r}")
        if match["block"] is not None:
            block = int(match["block"])
        else:
            picks[match["axis"]] = _index(match["index"])
    named = {name for group in groups for name in group.names}
    if missing := set(picks) - named:
        raise ValueError(f"layout {text!r}: no axis {sorted(missing)} to fix an index of")
    if any(block >= len(group.blocks) > 1 for group in groups):
        raise ValueError(f"layout {text!r}: there is no block {block}")
    return _Parsed(path, parameter or "weight", Layout(groups, picks, block))


def _group(match: re.Match[str]) -> Group:
    inner = match[1] if match[1] is not None else match[2]
    return Group(tuple(tuple(block.split()) for block in inner.split("+")))


def _index(text: str) -> int | slice:
    if ":" not in text:
        return int(text)
    start, stop = (int(part) if part else None for part in text.split(":"))
    return slice(start, stop)


def _product(names: Iterable[str], sizes: Mapping[str, int]) -> int:
    total = 1
    for name in names:
        total *= FIXED_SIZES[name] if name in FIXED_SIZES else sizes[name]
    return total


def unfold(tensor: Tensor, layout: Layout | Weight, sizes: Mapping[str, int]) -> Tensor:
    """A view of ``tensor`` with one axis per name in ``layout.axes``; writing to it writes to ``tensor``.

    Args:
        tensor: a parameter, its gradient, or anything of its shape.
        layout: the axis names in storage order.
        sizes: size of every named axis.

    Raises:
        UnknownFamily: the tensor's shape is not the one the layout and the sizes imply.
    """
    layout = layout.layout if isinstance(layout, Weight) else layout
    expected = layout.shape(sizes)
    if tuple(tensor.shape) != expected:
        raise UnknownFamily(f"expected shape {expected}, got {tuple(tensor.shape)}")
    view = tensor
    axis = 0
    for group in layout.groups:
        chosen = layout.block if len(group.blocks) > 1 else 0
        if len(group.blocks) > 1:
            start = sum(_product(block, sizes) for block in group.blocks[:chosen])
            view = view.narrow(axis, start, _product(group.blocks[chosen], sizes))
        names = group.blocks[chosen]
        view = view.unflatten(axis, [_product((name,), sizes) for name in names])
        for name in names:
            pick = layout.picks.get(name)
            if isinstance(pick, int):
                view = view.select(axis, pick)
                continue
            if pick is not None:
                view = view[(slice(None),) * axis + (pick,)]
            axis += 1
    return view
