"""Clocks and counters: time, floating-point operations, peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


class Clock:
    """Times between ticks: the process's CPU time, or on a GPU the time between events on its stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ticks: list[Any] = []

    def tick(self) -> None:
        """Note the time; does not wait for a GPU."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ticks.append(event)
        else:
            self._ticks.append(time.process_time())

    def seconds(self) -> list[float]:
        """Seconds between successive ticks."""
        pairs = list(zip(self._ticks, self._ticks[1:], strict=False))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


def count_flops(work: Callable[[], object]) -> tuple[int, int]:
    """Floating-point operations of ``work``: of matrix products, and of attention scores.

    Torch's counter knows the attention kernels of GPUs; the CPU's is added here with the same formula (two products
    forward, five backward, no saving for causality).
    """
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with counter:
        work()
    by_operator = counter.get_flop_counts()["Global"]
    scores = sum(n for operator, n in by_operator.items() if "attention" in str(operator))
    return counter.get_total_flops() - scores, scores


def peak_added_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes held at one time by tensors made during ``work``.

    On a CPU every allocation and release of torch's allocator is read from the profiler, temporaries inside operators
    included. That is exact and repeatable, unlike the resident set of the process, which keeps freed pages.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as recorded:
        work()
    results = recorded.profiler.kineto_results
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):  # stable: equal times stay in order
        held += size
        peak = max(peak, held)
    return peak


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, tokens, width = query
    return int(2 * batch * heads * tokens * key[-2] * (width + value[-1]))


def _attention_backward(_grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, tokens, width = query
    return int(2 * batch * heads * tokens * key[-2] * (3 * width + 2 * value[-1]))


_CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
