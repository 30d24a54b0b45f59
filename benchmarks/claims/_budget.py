"""Localizations of equal size: the MLP that fact lookup finds, and what others choose with as many parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuits import ComponentMask, ModelMap, Scores, Site, Unit, describe
from locate_edit import PromptSet
from locate_edit.locate.attribution_patching import AttributionPatching
from locate_edit.locate.causal_tracing import CausalTracing
from locate_edit.locate.fact_lookup import FactLookup

Masks = Mapping[str, ComponentMask | None]
KINDS = ("head", "mlp")


def localizations(model: Any, facts: PromptSet, *, traced: int = 16, seed: int = 0) -> Masks:
    """Where to edit, by localization: one MLP by fact lookup, and others with at least as many parameters.

    - "lookup": the MLP with the largest effect on the values of the heads that fetch the answer: early lookup, what
      the paper means.
    - "early or late": the MLP with the largest effect on those or on the logits directly, as `FactLookup` scores it.
    - "AP": heads and MLPs by attribution patching, the largest first, until they have as many parameters.
    - "CT": the same by causal tracing of the first ``traced`` facts.
    - "other MLP 0" and so on: every other MLP alone. Their mean is what a random MLP gives.
    - "all": every parameter.

    Raises:
        LocateEditError: no head fetches the answer, so that nothing feeds one.
    """
    model_map = describe(model)
    found = FactLookup(probes=False).circuit(model, facts, seed=seed)
    early = {layer: float(effect.mean()) for layer, effect in found.early.items()}
    direct = {layer: float(effect.mean()) for layer, effect in found.late.items()}
    layer = max(early, key=lambda each: early[each])
    lookup = mlps(model_map, layer)
    either = {each: max(late, early.get(each, 0.0)) for each, late in direct.items()}
    size = lookup.fraction(model_map)
    ap = AttributionPatching(kinds=KINDS)(model, facts, seed=seed)
    ct = CausalTracing(kinds=KINDS)(model, facts[:traced], seed=seed)
    others = [each for each in range(model_map.n_layers) if each != layer]
    return {
        "lookup": lookup,
        "early or late": mlps(model_map, max(either, key=lambda each: either[each])),
        "AP": until(ap, model_map, size),
        "CT": until(ct, model_map, size),
        **{f"other MLP {each}": mlps(model_map, each) for each in others},
        "all": None,
    }


def mlps(model_map: ModelMap, *layers: int) -> ComponentMask:
    """The MLPs of some layers."""
    return ComponentMask.of([Unit(Site(layer, "mlp"), (0,)) for layer in layers], model_map)


def until(scores: Scores, model_map: ModelMap, fraction: float) -> ComponentMask:
    """The units with the largest scores, as many as it takes to hold ``fraction`` of the parameters."""
    chosen: list[Unit] = []
    for unit, _ in scores.mean().ranked():
        chosen.append(unit)
        mask = ComponentMask.of(chosen, model_map)
        if mask.fraction(model_map) >= fraction:
            return mask
    return mask
