"""What localizers share: the provenance of their scores, the check of their prompts, the sites of some kinds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from circuits import ModelMap, Site, SiteError
from locate_edit.errors import PromptError
from locate_edit.fingerprint import fingerprint
from locate_edit.prompts import PromptSet


def provenance(
    localizer: Any, model_map: ModelMap, prompts: PromptSet | None, **more: Any
) -> dict[str, Any]:
    """Name and hyperparameters of a localizer, identity of model and prompts, and ``more``, as JSON-like values."""
    checksums = json.dumps(fingerprint(model_map.model), sort_keys=True)
    described = None
    if prompts is not None:
        described = {"name": prompts.name, "prompts": len(prompts), "digest": prompts.digest}
    return {
        "localizer": type(localizer).__name__,
        "options": asdict(localizer),
        "architecture": model_map.architecture,
        "model": {
            "class": type(model_map.model).__name__,
            "fingerprint": hashlib.sha256(checksums.encode()).hexdigest()[:16],
        },
        "prompts": described,
        **more,
    }


def check_prompts(model_map: ModelMap, prompts: PromptSet) -> None:
    """Refuse prompts that this model cannot be given.

    Raises:
        PromptError: no `PromptSet`, prompts made for the other kind of model, or longer than its context.
    """
    if not isinstance(prompts, PromptSet):
        raise PromptError(
            f"expected a PromptSet, got {type(prompts).__name__}: PromptSet(rows, tokenizer) makes one from a list"
        )
    if prompts.masked == model_map.causal:
        kind, made = ("causal", "masked") if model_map.causal else ("masked", "causal")
        raise PromptError(
            f"{type(model_map.model).__name__} is a {kind} language model, but {prompts!r} was made for a {made} one: "
            f"pass PromptSet(..., masked={not model_map.causal})"
        )
    prompts.check_context(model_map.model)


def sites_of(model_map: ModelMap, kinds: Iterable[str]) -> list[Site]:
    """All sites of some kinds, in order.

    Raises:
        SiteError: an unknown kind, or one that the model has no sites of.
    """
    found: list[Site] = []
    for kind in dict.fromkeys(kinds):
        sites = model_map.sites(kind)
        if not sites:
            raise SiteError(
                f"{model_map.name} has no {kind} sites; it has {', '.join(model_map.kinds)}"
            )
        found += sites
    if not found:
        raise SiteError(f"no kinds of sites given: choose from {', '.join(model_map.kinds)}")
    return sorted(found)
