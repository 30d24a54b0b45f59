"""The ways to train part of a model that the engine is compared with.

Every baseline runs the model's ordinary forward with ``labels`` (mean cross-entropy over all labelled tokens) and an
ordinary backward; only what is trained and how differs. They train the same entries as the engine's mask, or for LoRA
as many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import peft
import torch
from torch import Tensor, nn

from benchmarks.workload import Size, labels_of
from circuits import ComponentMask, describe
from locate_edit.prompts import Batch
from locate_edit.slots import slots_for

LR = 1e-4
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Step = Callable[[], None]


def dense_masking(
    model: nn.Module, mask: ComponentMask, batch: Batch, *, fused: bool = False
) -> Step:
    """Gradients of all parameters, multiplied by the mask, then AdamW over all parameters."""
    return _masked(model, mask, batch, everything=True, fused=fused)


def touched_only(model: nn.Module, mask: ComponentMask, batch: Batch) -> Step:
    """``requires_grad`` for the tensors the mask touches, their gradients multiplied by it, AdamW over them."""
    return _masked(model, mask, batch, everything=False, fused=False)


def _masked(
    model: nn.Module, mask: ComponentMask, batch: Batch, *, everything: bool, fused: bool
) -> Step:
    touched = {slot.name: slot.selection.mask() for slot in slots_for(describe(model), mask)}
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(everything or name in touched)
        if parameter.requires_grad:
            flags = touched.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
            pairs.append((parameter, flags.to(parameter.device)))
    parameters = [parameter for parameter, _ in pairs]
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True if fused else None)

    def apply_mask() -> None:
        for parameter, flags in pairs:
            if parameter.grad is not None:
                parameter.grad.mul_(flags)

    return _step(model, batch, optimizer, apply_mask)


def shira(model: nn.Module, size: Size, mask: ComponentMask, batch: Batch) -> Step:
    """PEFT SHiRA with exactly the mask's entries: a value vector added to a copy of each weight in every forward."""
    slots = slots_for(describe(model), mask)
    masks = {id(slot.parameter): slot.selection.mask() for slot in slots}

    def same_entries(base_layer: nn.Linear, r: int, **_: object) -> Tensor:
        return masks[id(base_layer.weight)].to(base_layer.weight)

    config = peft.ShiraConfig(r=size.rank, target_modules=_modules([slot.name for slot in slots]))
    config.mask_fn = same_entries  # type: ignore[assignment]
    return _adapter(peft.get_peft_model(model, config), batch)


def lora(model: nn.Module, size: Size, mask: ComponentMask, batch: Batch) -> Step:
    """PEFT LoRA on the same matrices with as many trained values; not restricted to the mask."""
    names = [slot.name for slot in slots_for(describe(model), mask)]
    config = peft.LoraConfig(r=size.rank, lora_alpha=2 * size.rank, target_modules=_modules(names))
    return _adapter(peft.get_peft_model(model, config), batch)


def _modules(parameters: Sequence[str]) -> list[str]:
    return [name.removesuffix(".weight") for name in parameters]


def _adapter(model: nn.Module, batch: Batch) -> Step:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _step(model, batch, torch.optim.AdamW(trained, lr=LR), lambda: None)


def _step(
    model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, after_backward: Step
) -> Step:
    there = batch.to(next(model.parameters()).device)
    labels = labels_of(there)

    def step() -> None:
        output = model(
            input_ids=there.input_ids,
            attention_mask=there.attention_mask,
            labels=labels,
            use_cache=False,
        )
        output.loss.backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
