"""What every localizer writes into its `Scores`: how they were made, of which model, on which prompts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from circuits import ModelMap
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
