"""Reuse of the frozen layers below an edit.

Layers below the lowest edited one give the same activations at every step. When the same items come back, those
activations are computed once, kept per input row, and later forward passes start at the edited layer: the layers below
it return at once, and a pre-hook hands the kept hidden states to the first one that runs. Embeddings, masks and
position encodings are still built by the model's own code, so every family keeps its conventions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from circuits.forward import model_inputs
from locate_edit.prompts import Batch


class _Reached(Exception):
    """Raised inside a forward pass once the hidden states of interest are known; never leaves this module."""


class PrefixCache:
    """Hidden states entering ``layers[start]``, one tensor `token d_model` for every distinct input row.

    Args:
        model: the model, in evaluation mode and frozen below ``start``.
        layers: its blocks, in order.
        start: index of the first block that must run, at least 1.
        max_bytes: rows are kept until this much memory is used; further rows are computed anew each time.
    """

    def __init__(
        self, model: nn.Module, layers: list[nn.Module], start: int, max_bytes: int
    ) -> None:
        self.model, self.layers, self.start = model, layers, start
        self.free_bytes = max_bytes
        self._kept: dict[bytes, Tensor] = {}
        self._tuple_lengths: dict[
            int, int
        ] = {}  # blocks that return (hidden, None, ...) and how many values

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states `row token d_model` entering the first running block for a CPU ``batch``."""
        lengths = batch.attention_mask.sum(1).tolist()
        keys = [row[:n].numpy().tobytes() for row, n in zip(batch.input_ids, lengths, strict=True)]
        missing = [i for i, key in enumerate(keys) if key not in self._kept]
        fresh: dict[int, Tensor] = {}
        if missing:
            device = next(self.model.parameters()).device
            part = replace(
                batch,
                input_ids=batch.input_ids[missing],
                attention_mask=batch.attention_mask[missing],
            )
            computed = self._compute(part.to(device))
            for place, i in enumerate(missing):
                row = computed[place, : lengths[i]].clone()
                size = row.numel() * row.element_size()
                if size <= self.free_bytes:
                    self._kept[keys[i]] = row
                    self.free_bytes -= size
                else:
                    fresh[i] = row
        rows = [fresh[i] if i in fresh else self._kept[key] for i, key in enumerate(keys)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        shortage = batch.input_ids.shape[1] - padded.shape[1]
        return nn.functional.pad(padded, (0, 0, 0, shortage)) if shortage else padded

    @contextmanager
    def supply(self, hidden: Tensor) -> Iterator[None]:
        """Forward passes in this context start at the first running block, from ``hidden``."""

        def hand_over(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, Any]:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        skipped = self.layers[: self.start]
        before = [layer.__dict__.get("forward") for layer in skipped]
        handle = self.layers[self.start].register_forward_pre_hook(hand_over, with_kwargs=True)
        try:
            for i, layer in enumerate(skipped):
                layer.forward = self._skip(i)
            yield
        finally:
            handle.remove()
            for layer, forward in zip(skipped, before, strict=True):
                if forward is None:
                    del layer.__dict__["forward"]
                else:
                    layer.forward = forward

    def _skip(self, i: int) -> Callable[..., Any]:
        """A forward that returns its hidden states unchanged, in the form block ``i`` returns them."""
        length = self._tuple_lengths.get(i, 0)

        def skip(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *[None] * (length - 1)) if length else hidden

        return skip

    @torch.no_grad()
    def _compute(self, batch: Batch) -> Tensor:
        found: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        def note(i: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                if isinstance(output, tuple):
                    self._tuple_lengths[i] = len(output)

            return hook

        handles = [self.layers[self.start].register_forward_pre_hook(stop, with_kwargs=True)]
        handles += [
            layer.register_forward_hook(note(i))
            for i, layer in enumerate(self.layers[: self.start])
        ]
        try:
            self.model(**model_inputs(self.model, batch))
        except _Reached:
            return found[0]
        finally:
            for handle in handles:
                handle.remove()
        raise RuntimeError(
            "the model finished without running its blocks"
        )  # unreachable for described models
