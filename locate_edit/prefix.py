"""Reuse of the frozen layers below an edit.

Layers below the lowest edited one give the same activations at every step. When the same items come back, those
activations are computed once, kept per input row, and later forward passes start at the edited layer: the layers below
it return at once, and a pre-hook hands the kept hidden states to the first one that runs. The same holds for the
attention of that one when only its MLP is edited. Embeddings, masks and position encodings are still built by the
model's own code, so every family keeps its conventions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
        frozen: a module of the first running block that computes the same at every step too, as its
            attention does when only its MLP is edited. Its output `token d_model` is kept beside the
            hidden states, and it does not run.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        start: int,
        max_bytes: int,
        frozen: nn.Module | None = None,
    ) -> None:
        self.model, self.layers, self.start, self.frozen = model, layers, start, frozen
        self.free_bytes = max_bytes
        self._kept: dict[bytes, tuple[Tensor, ...]] = {}
        # How many values a module returns, for those that return (hidden, None, ...).
        self._tuple_lengths: dict[nn.Module, int] = {}

    def hidden(self, batch: Batch) -> tuple[Tensor, ...]:
        """States `row token d_model` to `supply` for a CPU ``batch``.

        The hidden states entering the first running block, then the output of ``frozen`` if there is one.
        """
        lengths = batch.attention_mask.sum(1).tolist()
        keys = [row[:n].numpy().tobytes() for row, n in zip(batch.input_ids, lengths, strict=True)]
        missing = [i for i, key in enumerate(keys) if key not in self._kept]
        fresh: dict[int, tuple[Tensor, ...]] = {}
        if missing:
            device = next(self.model.parameters()).device
            part = replace(
                batch,
                input_ids=batch.input_ids[missing],
                attention_mask=batch.attention_mask[missing],
            )
            computed = self._compute(part.to(device))
            for place, i in enumerate(missing):
                row = tuple(state[place, : lengths[i]].clone() for state in computed)
                size = sum(state.numel() * state.element_size() for state in row)
                if size <= self.free_bytes:
                    self._kept[keys[i]] = row
                    self.free_bytes -= size
                else:
                    fresh[i] = row
        rows = [fresh[i] if i in fresh else self._kept[key] for i, key in enumerate(keys)]
        width = batch.input_ids.shape[1]
        return tuple(_padded(states, width) for states in zip(*rows, strict=True))

    @contextmanager
    def supply(self, states: tuple[Tensor, ...]) -> Iterator[None]:
        """Forward passes in this context start at the first running block, from what `hidden` returned."""
        hidden = states[0]

        def hand_over(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, Any]:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        with ExitStack() as stack:
            handle = self.layers[self.start].register_forward_pre_hook(hand_over, with_kwargs=True)
            stack.callback(handle.remove)
            for layer in self.layers[: self.start]:
                stack.enter_context(_replaced(layer, self._returning(layer, None)))
            if self.frozen is not None:
                output = self._returning(self.frozen, states[1])
                stack.enter_context(_replaced(self.frozen, output))
            yield

    def _returning(self, module: nn.Module, value: Tensor | None) -> Callable[..., Any]:
        """A forward that returns ``value``, or its hidden states unchanged, in the form ``module`` does."""
        length = self._tuple_lengths.get(module, 0)

        def forward(*args: Any, **kwargs: Any) -> Any:
            first = value
            if first is None:
                first = args[0] if args else kwargs["hidden_states"]
            return (first, *[None] * (length - 1)) if length else first

        return forward

    @torch.no_grad()
    def _compute(self, batch: Batch) -> tuple[Tensor, ...]:
        found: list[Tensor] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            if self.frozen is None:
                raise _Reached

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        def note(module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, tuple):
                self._tuple_lengths[module] = len(output)

        skipped = self.layers[: self.start]
        handles = [self.layers[self.start].register_forward_pre_hook(enter, with_kwargs=True)]
        if self.frozen is not None:
            skipped = [*skipped, self.frozen]
        handles += [module.register_forward_hook(note) for module in skipped]
        if self.frozen is not None:
            handles.append(self.frozen.register_forward_hook(leave))
        try:
            self.model(**model_inputs(self.model, batch))
        except _Reached:
            return tuple(found)
        finally:
            for handle in handles:
                handle.remove()
        # Unreachable for described models.
        raise RuntimeError("the model finished without running its blocks")


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """Rows `token d_model` as one tensor `row token d_model` of ``width`` tokens, zeros behind each row's end."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    shortage = width - padded.shape[1]
    return nn.functional.pad(padded, (0, 0, 0, shortage)) if shortage else padded


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` with another forward while the context is open."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before
