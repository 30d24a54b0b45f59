"""Settings and fixtures of all tests: offline, one thread, and models that nobody may change by accident."""

from __future__ import annotations

import os

# On shared cores two OpenMP threads that wait for each other by spinning can be tens of times slower than one.
# Set before torch is imported, and again below in case a plug-in imported it first.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny import tiny

torch.set_num_threads(1)


def fingerprint(model: nn.Module) -> str:
    """Hash of everything an inspection must leave alone: weights, gradients, flags, modes, hooks."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(
            f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode()
        )
        digest.update(
            tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
        digest.update(
            b"none" if tensor.grad is None else tensor.grad.cpu().double().numpy().tobytes()
        )
    for name, module in model.named_modules():
        hooks = [
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
        ]
        digest.update(f"{name} {type(module).__name__} {module.training} {hooks}".encode())
    return digest.hexdigest()


@pytest.fixture
def untouched() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """``untouched(model)`` returns the model and checks after the test that nothing about it has changed."""
    watched: list[tuple[nn.Module, str]] = []

    def watch(model: nn.Module) -> nn.Module:
        watched.append((model, fingerprint(model)))
        return model

    yield watch
    for model, before in watched:
        if fingerprint(model) != before:
            raise AssertionError(
                f"the test changed {type(model).__name__}, which it had to leave as it was"
            )


@pytest.fixture(scope="session")
def shared() -> Iterator[Callable[[str], Any]]:
    """``shared("llama")`` is one tiny model for the whole session, to be read only; checked at the end."""
    models: dict[str, tuple[Any, str]] = {}

    def get(name: str) -> Any:
        if name not in models:
            model = tiny(name)
            models[name] = (model, fingerprint(model))
        return models[name][0]

    yield get
    changed = [name for name, (model, before) in models.items() if fingerprint(model) != before]
    if changed:
        raise AssertionError(f"tests changed the shared models {', '.join(changed)}")
