"""Where in the layers an answer appears before and after an edit: the logit lens as a picture of an edit's depth.

    lens = lens_depth(edited, original, forget)
    lens_map(lens)          # before and after, prompts by layers
    layer_lines(depth)      # of `metrics.unlearning_depth.unlearning_depth`

The logit lens reads the residual stream with the model's own output layer; an answer that is there in another form
does not show. So an empty map does not prove that the layers forgot: what a layer *carries* is told by unlearning
depth, and both are drawn here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from circuits.logit_lens import logit_lens
from circuits.model_map import describe
from locate_edit.errors import LocateEditError
from locate_edit.metrics.running import scored_batches
from locate_edit.metrics.values import Floats
from locate_edit.prompts import PromptSet

__all__ = ["LensDepth", "lens_depth"]


@dataclass(frozen=True, eq=False)
class LensDepth:
    """Probability of each prompt's target as the logit lens reads it after each layer, before and after an edit.

    Attributes:
        layers: the layers, `layer`; -1 is the stream before the first one.
        before: geometric mean over the target's scored tokens, `item layer` (probability); NaN for a prompt whose
            weights are all 0.
        after: the same after the edit, `item layer` (probability).
        names: a label for each prompt, its last words and its target, `item`.
        model: what is written under a figure.
    """

    layers: tuple[int, ...]
    before: Floats
    after: Floats
    names: tuple[str, ...]
    model: str = ""

    def rows(self) -> list[dict[str, float | int | str]]:
        """One dictionary per prompt and layer: item, name, layer, before and after (probability)."""
        return [
            {
                "item": item,
                "name": name,
                "layer": layer,
                "before": float(self.before[item, k]),
                "after": float(self.after[item, k]),
            }
            for item, name in enumerate(self.names)
            for k, layer in enumerate(self.layers)
        ]


def lens_depth(
    edited: nn.Module, original: nn.Module, prompts: PromptSet, *, batch_size: int = 16
) -> LensDepth:
    """What the logit lens reads of each prompt's target after each layer, in the original and in the edited model.

    exp of the weighted mean log-probability of the scored tokens, the text before each of them being given: the last
    layer's is the metric `likelihood`.

    Args:
        edited: the model after the edit.
        original: the model before it, another object: edits change a model in place.
        prompts: the prompts.
        batch_size: rows a forward pass.

    Raises:
        LocateEditError: the same object twice, or models with different numbers of layers.
        PromptError: prompts that are too long for a model.
    """
    if edited is original:
        raise LocateEditError(
            "a comparison of an edited model with the original got one object as both. An edit changes a model in "
            "place: give a copy made before (copy.deepcopy(model)), or the model loaded again."
        )
    before, after = (_readings(model, prompts, batch_size) for model in (original, edited))
    if before.shape != after.shape:
        raise LocateEditError(
            "cannot compare models of different depth: expected the same number of layers, got "
            f"{before.shape[1] - 1} before and {after.shape[1] - 1} after the edit."
        )
    names = tuple(_name(prompts, item) for item in range(len(prompts)))
    about = describe(original)
    return LensDepth(tuple(range(-1, about.n_layers)), before, after, names, about.name)


def _readings(model: nn.Module, prompts: PromptSet, batch_size: int) -> Floats:
    """Geometric mean of the target's probabilities by layer, `item layer`."""
    prompts.check_context(model)
    about = describe(model)
    total = np.zeros((len(prompts), about.n_layers + 1))
    mass = np.zeros(len(prompts))
    for batch in scored_batches(model, prompts, batch_size):
        lens = logit_lens(about, batch)
        items = np.array(batch.items)[batch.item.cpu().numpy()]
        weight = batch.weight.double().cpu().numpy()
        # The smallest number of float32 stands for a probability that was rounded to nothing.
        floor = torch.finfo(torch.float32).tiny
        log_p = lens.probability.double().clamp(min=floor).log().numpy()
        np.add.at(mass, items, weight)
        np.add.at(total, items, (log_p * weight).T)
    empty = mass[:, None] <= 0
    mean = total / np.where(empty, 1.0, mass[:, None])
    return np.asarray(np.where(empty, np.nan, np.exp(mean)), dtype=np.float64)


def _name(prompts: PromptSet, item: int) -> str:
    decode = prompts.tokenizer.decode
    target = str(decode(prompts.target_ids(item))).strip()
    before = str(decode(prompts.prompt_ids(item), skip_special_tokens=True)).strip()
    before = before if len(before) <= 28 else "…" + before[-27:]
    return f"{before} → {target[:20]}"
