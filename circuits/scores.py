"""`Scores`: how strongly each unit of a model takes part in something, per prompt.

Localizers return them; arithmetic contrasts them; selection turns them into a `ComponentMask`. All selections are
deterministic: among equal scores the lower site and unit comes first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.errors import MaskError
from circuits.mask import ComponentMask, first_largest, split_units
from circuits.sites import Site, Unit
from circuits.storage import load_tensors, save_tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Scores of all units of some sites, for each of several prompts.

    Attributes:
        values: one float32 tensor `prompt *units` per site, sorted by site. Copied on construction.
        provenance: where the scores come from, as JSON-like values; selections hand it on to the mask.

    Raises:
        MaskError: a key that is no site, tensors with differing numbers of prompts, or scores that are not finite.
    """

    values: Mapping[Site, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values:
            raise MaskError("scores need at least one site, got none")
        prompts = None
        given: Mapping[Any, Any] = self.values
        for site, scores in given.items():
            if not isinstance(site, Site):
                raise MaskError(f"the keys of scores are sites, got {site!r}; see Site.parse")
            if not isinstance(scores, Tensor) or scores.dim() < 2 or not scores.is_floating_point():
                got = (scores.dtype, tuple(scores.shape)) if isinstance(scores, Tensor) else scores
                raise MaskError(f"{site}: expected a floating tensor `prompt *units`, got {got}")
            prompts = len(scores) if prompts is None else prompts
            if len(scores) != prompts or not prompts:
                raise MaskError(
                    f"{site}: expected scores for {prompts} prompts, at least one, got {len(scores)}"
                )
            if not bool(torch.isfinite(scores).all()):
                raise MaskError(
                    f"{site}: {int((~torch.isfinite(scores)).sum())} scores are not finite"
                )
        copied = {
            site: self.values[site].detach().to("cpu", torch.float32, copy=True)
            for site in sorted(self.values)
        }
        object.__setattr__(self, "values", MappingProxyType(copied))
        object.__setattr__(self, "provenance", dict(self.provenance))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (dict(self.values), self.provenance))

    # ---- looking ---------------------------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that have scores, in order."""
        return tuple(self.values)

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return len(next(iter(self.values.values())))

    @property
    def n_units(self) -> int:
        """Number of units of all sites together."""
        return sum(scores[0].numel() for scores in self.values.values())

    def __getitem__(self, site: Site) -> Tensor:
        return self.values[site]

    def prompt(self, i: int) -> Scores:
        """The scores of one prompt."""
        return Scores({site: scores[[i]] for site, scores in self.values.items()}, self.provenance)

    def ranked(self, k: int | None = None) -> list[tuple[Unit, float]]:
        """The ``k`` units with the highest mean score (all if None), highest first, with that score."""
        flat, sites, shapes = self._flat_mean()
        order = first_largest(flat, len(flat) if k is None else k)
        ends = torch.tensor([shape.numel() for shape in shapes]).cumsum(0)
        ranking = []
        for i in order.tolist():
            which = int(torch.searchsorted(ends, i, right=True))
            inside = torch.tensor(i - (int(ends[which - 1]) if which else 0))
            index = tuple(int(j) for j in torch.unravel_index(inside, shapes[which]))
            ranking.append((Unit(sites[which], index), float(flat[i])))
        return ranking

    # ---- arithmetic ------------------------------------------------------------------------------------------------

    def __add__(self, other: Scores) -> Scores:
        return self._combine(other, "+", torch.add)

    def __sub__(self, other: Scores) -> Scores:
        return self._combine(other, "-", torch.sub)

    def __mul__(self, factor: float) -> Scores:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return self._map(lambda scores: scores * factor, {"times": factor})

    __rmul__ = __mul__

    def __neg__(self) -> Scores:
        return self * -1.0

    def abs(self) -> Scores:
        """The absolute value of every score."""
        return self._map(torch.abs, {"step": "abs"})

    def mean(self) -> Scores:
        """The mean over prompts, as scores of a single prompt."""
        return self._map(
            lambda s: s.mean(0, keepdim=True), {"step": "mean", "over": self.n_prompts}
        )

    def sum(self) -> Scores:
        """The sum over prompts, as scores of a single prompt."""
        return self._map(lambda s: s.sum(0, keepdim=True), {"step": "sum", "over": self.n_prompts})

    def contrast(self, other: Scores, weight: float = 1.0) -> Scores:
        """What is specific to these prompts: the mean minus ``weight`` times the mean |score| of other prompts."""
        return self.mean() - weight * other.abs().mean()

    @classmethod
    def concat(cls, parts: Sequence[Scores]) -> Scores:
        """The prompts of several scores over the same sites, one after the other.

        Raises:
            MaskError: no parts, or parts with differing sites.
        """
        if not parts:
            raise MaskError("nothing to concatenate: expected at least one Scores")
        for part in parts[1:]:
            _same_sites(parts[0], part)
        values = {site: torch.cat([part.values[site] for part in parts]) for site in parts[0].sites}
        return cls(values, _joined("concat", parts))

    def _combine(self, other: Any, sign: str, operation: Any) -> Scores:
        if not isinstance(other, Scores):
            return NotImplemented  # type: ignore[no-any-return]
        _same_sites(self, other)
        if 1 not in (self.n_prompts, other.n_prompts) and self.n_prompts != other.n_prompts:
            raise MaskError(
                f"scores of {self.n_prompts} and {other.n_prompts} prompts do not combine; take .mean() of one"
            )
        values = {
            site: operation(scores, other.values[site]) for site, scores in self.values.items()
        }
        return Scores(values, _joined(sign, (self, other)))

    def _map(self, function: Any, step: Mapping[str, Any]) -> Scores:
        steps = [*self.provenance.get("steps", []), dict(step)]
        values = {site: function(scores) for site, scores in self.values.items()}
        return Scores(values, {**self.provenance, "steps": steps})

    # ---- selection -------------------------------------------------------------------------------------------------

    def top(self, k: int) -> ComponentMask:
        """The ``k`` units with the highest mean score over prompts, over all sites.

        Raises:
            MaskError: ``k`` is negative or exceeds the number of units.
        """
        flat, sites, shapes = self._flat_mean()
        _check_k(k, len(flat), "all sites together")
        return self._mask(
            split_units(sites, shapes, first_largest(flat, k)), {"select": "top", "k": k}
        )

    def top_per_site(self, k: int) -> ComponentMask:
        """The ``k`` units of every site with the highest mean score over prompts.

        Raises:
            MaskError: ``k`` is negative or exceeds the number of units of a site.
        """
        on = {}
        for site, scores in self.values.items():
            mean = scores.mean(0)
            _check_k(k, mean.numel(), str(site))
            on.update(split_units([site], [mean.shape], first_largest(mean.flatten(), k)))
        return self._mask(on, {"select": "top_per_site", "k": k})

    def threshold(self, x: float, relative: bool = False) -> ComponentMask:
        """The units whose mean score over prompts is at least ``x``.

        Args:
            x: the threshold, in the unit of the scores.
            relative: ``x`` is a fraction of the largest mean score of all sites. If that is not positive, nothing is
                selected.
        """
        flat, sites, shapes = self._flat_mean()
        largest = float(flat.max())
        chosen = flat >= (x * largest if relative else x)
        if relative and largest <= 0:
            chosen = torch.zeros_like(chosen)
        on = split_units(sites, shapes, chosen.nonzero()[:, 0])
        return self._mask(on, {"select": "threshold", "at": x, "relative": relative})

    def vote(
        self, above: float = 0.1, share: float = 0.5, keep: int | None = None
    ) -> ComponentMask:
        """Units that many prompts agree on (knowledge neurons, Dai et al. 2022, section 3.3; DEPN, Wu et al. 2023).

        1. For each prompt, keep the units with a score of at least ``above`` times the prompt's largest over all
           sites. A prompt without a positive score keeps none.
        2. Choose the units that at least the fraction ``share`` of the prompts keep.
        3. Of those, take the ``keep`` units with most votes; among equals those with the higher mean score, then the
           lower unit.

        Args:
            above: fraction of a prompt's largest score.
            share: fraction of prompts.
            keep: number of units at most; None takes all that were chosen.

        Raises:
            MaskError: ``share`` is not in (0, 1] or ``keep`` is negative.
        """
        if not 0 < share <= 1:
            raise MaskError(
                f"share of prompts: expected a fraction above 0 and at most 1, got {share}"
            )
        mean, sites, shapes = self._flat_mean()
        scores = torch.cat([s.flatten(1) for s in self.values.values()], dim=1)  # `prompt unit`
        largest = scores.amax(dim=1, keepdim=True)
        votes = ((scores >= above * largest) & (largest > 0)).sum(dim=0)
        # Rounded first, so that a share such as 0.07 of 100 prompts means 7 of them whatever floating point says.
        chosen = votes >= ceil(round(share * self.n_prompts, 6))
        if keep is not None:
            _check_k(keep, None, "votes")
            by_score = first_largest(mean, len(mean))
            ranked = by_score[first_largest(votes[by_score], len(votes))]
            kept = torch.zeros_like(chosen)
            kept[ranked[chosen[ranked]][:keep]] = True
            chosen = kept
        on = split_units(sites, shapes, chosen.nonzero()[:, 0])
        return self._mask(on, {"select": "vote", "above": above, "share": share, "keep": keep})

    def _flat_mean(self) -> tuple[Tensor, list[Site], list[torch.Size]]:
        """Mean scores of all units of all sites in one vector, with the sites and their unit shapes."""
        means = {site: scores.mean(0) for site, scores in self.values.items()}
        flat = torch.cat([mean.flatten() for mean in means.values()])
        return flat, list(means), [mean.shape for mean in means.values()]

    def _mask(self, on: Mapping[Site, Tensor], selection: Mapping[str, Any]) -> ComponentMask:
        return ComponentMask(on, {**self.provenance, "selection": dict(selection)})

    # ---- files and figures -----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores to one safetensors file, whole or not at all."""
        save_tensors(
            path, "scores", {str(site): s for site, s in self.values.items()}, self.provenance
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """The scores that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            MaskError: the file is damaged or holds something else.
        """
        tensors, provenance = load_tensors(path, "scores")
        return cls({Site.parse(name): scores for name, scores in tensors.items()}, provenance)

    def __repr__(self) -> str:
        flat, _, _ = self._flat_mean()
        source = self.provenance.get("localizer")
        return (
            f"Scores({self.n_prompts} prompts, {len(self.sites)} sites, {self.n_units} units, "
            f"mean {float(flat.min()):.3g} to {float(flat.max()):.3g}{f'; {source}' if source else ''})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(str(unit))}</td><td>{score:.4g}</td></tr>"
            for unit, score in self.ranked(10)
        )
        return (
            f"<p>{escape(repr(self))}</p><table><thead><tr><th>unit</th><th>mean score</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the mean scores, layer by unit. See `circuits.draw.score_map`."""
        from circuits.draw import score_map

        return score_map(self, ax=ax)


def _same_sites(one: Scores, two: Scores) -> None:
    if one.values.keys() != two.values.keys():
        differing = sorted(one.values.keys() ^ two.values.keys())
        raise MaskError(
            f"scores of different sites do not combine: {', '.join(map(str, differing[:5]))}"
        )
    for site in one.sites:
        shapes = tuple(one.values[site].shape[1:]), tuple(two.values[site].shape[1:])
        if shapes[0] != shapes[1]:
            raise MaskError(f"{site}: scores of {shapes[0]} and {shapes[1]} units do not combine")


def _joined(operation: str, parts: Sequence[Scores]) -> dict[str, Any]:
    provenance: dict[str, Any] = {"localizer": operation, "of": [dict(p.provenance) for p in parts]}
    architectures = {p.provenance["architecture"] for p in parts if "architecture" in p.provenance}
    if len(architectures) > 1:
        raise MaskError(
            f"cannot combine scores of several models: {', '.join(sorted(architectures))}"
        )
    if architectures:
        provenance["architecture"] = architectures.pop()
    return provenance


def _check_k(k: int, available: int | None, where: str) -> None:
    if k < 0 or (available is not None and k > available):
        limit = "" if available is None else f" to {available}"
        raise MaskError(f"number of units to select from {where}: expected 0{limit}, got {k}")
