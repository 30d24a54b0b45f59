"""Speed and memory of the editing engine against the usual ways to train a part of a model.

Run `python -m benchmarks.engine`. Whole optimizer steps of the public `locate_edit.edit` are timed, not a copy of its
loop. All variants take turns in one process, because a shared machine drifts; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import baselines
from benchmarks.machine import describe_machine
from benchmarks.meters import Clock, count_flops, peak_added_bytes
from benchmarks.tables import engine_table, write_between
from benchmarks.workload import ROWS, SIZES, TOKENS, Size, make_model, make_prompts, neuron_mask
from circuits import ComponentMask
from locate_edit.editing import edit
from locate_edit.engine import StopWhen
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.gradient_ascent import GradientAscent
from locate_edit.methods.npo import NPO
from locate_edit.prompts import PromptSet

HERE = Path(__file__).parent
Tick = Callable[[], None]
Go = Callable[[int, Tick], None]
"""``go(steps, tick)`` takes optimizer steps and calls ``tick`` after each."""


@dataclass(frozen=True)
class Variant:
    """One way to take a step: ``prepare`` makes its `Go` from a fresh model, ``start`` is its lowest edited layer."""

    name: str
    prepare: Callable[[nn.Module], Go]
    start: int
    ours: bool
    reuse: bool = False


def variants(size: Size, prompts: PromptSet) -> list[Variant]:
    """Baselines first, the first of them the one that ratios refer to; then the engine."""
    batch = prompts.batch(range(len(prompts)))
    half, quarter = size.layers // 2, size.layers * 3 // 4
    everywhere, upper = neuron_mask(size, 0), neuron_mask(size, half)

    def plain(make: Callable[[nn.Module], baselines.Step]) -> Callable[[nn.Module], Go]:
        return lambda model: _repeat(make(model))

    found = [
        Variant(name, plain(make), start, ours=False)
        for name, make, start in (
            ("dense masking", lambda m: baselines.dense_masking(m, everywhere, batch), 0),
            (
                "dense masking, fused AdamW",
                lambda m: baselines.dense_masking(m, everywhere, batch, fused=True),
                0,
            ),
            ("touched tensors only", lambda m: baselines.touched_only(m, everywhere, batch), 0),
            (
                "touched tensors only, upper half",
                lambda m: baselines.touched_only(m, upper, batch),
                half,
            ),
            ("PEFT SHiRA, same entries", lambda m: baselines.shira(m, size, everywhere, batch), 0),
            ("PEFT LoRA, as many values", lambda m: baselines.lora(m, size, everywhere, batch), 0),
        )
    ]
    for where, start in (("all layers", 0), ("upper half", half), ("last quarter", quarter)):
        for reuse in (False, True) if start else (False,):
            mask = neuron_mask(size, start)
            name = f"locate-edit, {where}" + (", prefix reused" if reuse else "")
            found.append(
                Variant(name, engine(mask, prompts, reuse=reuse), start, ours=True, reuse=reuse)
            )
    return found


def engine(mask: ComponentMask, prompts: PromptSet, *, reuse: bool) -> Callable[[nn.Module], Go]:
    """The public engine on ``mask``; the model is restored after each run."""

    def prepare(model: nn.Module) -> Go:
        def go(steps: int, tick: Tick) -> None:
            def stamp(_model: nn.Module) -> float:
                tick()
                return 0.0

            method = FineTune(steps=steps, lr=baselines.LR)
            memory = 2**30 if reuse else 0
            edit(
                model, method, mask, forget=prompts, batch_size=ROWS,
                reuse_prefix_bytes=memory, stop=StopWhen(stamp),
            ).undo()  # fmt: skip

        return go

    return prepare


def _repeat(step: Callable[[], None]) -> Go:
    def go(steps: int, tick: Tick) -> None:
        for _ in range(steps):
            step()
            tick()

    return go


def _nothing() -> None:
    pass


# -- measuring ------------------------------------------------------------------------------------


def time_steps(
    chosen: Sequence[Variant], size: Size, device: torch.device, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Median seconds a step of every variant, one value a round; each round has all variants, in a new order."""
    runs = {variant.name: variant.prepare(place(size, device)) for variant in chosen}
    found: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for index in range(-1, rounds):  # round -1 warms up
        for name in order:
            clock = Clock(device)
            runs[name](steps + 1 if index >= 0 else 2, clock.tick)
            if index >= 0:
                found[name].append(statistics.median(clock.seconds()))
        order = order[1:] + order[:1]
        if index >= 0:
            shown = ", ".join(f"{name} {1e3 * values[-1]:.0f} ms" for name, values in found.items())
            print(f"round {index + 1}/{rounds}: {shown}", flush=True)
    return found


def place(size: Size, device: torch.device) -> nn.Module:
    """A fresh model on ``device``, in bfloat16 on a GPU."""
    model: nn.Module = make_model(size)
    return model.to(device, torch.bfloat16) if device.type == "cuda" else model


def flops_of_step(variant: Variant, size: Size, device: torch.device) -> tuple[int, int]:
    """FLOPs of one step in the steady state: of matrix products with weights, and of attention scores besides."""
    go = variant.prepare(place(size, device))
    two, three = (count_flops(partial(go, steps, _nothing)) for steps in (2, 3))
    return three[0] - two[0], three[1] - two[1]


def flops_of_forward(size: Size, device: torch.device) -> tuple[int, int]:
    """FLOPs of one forward of the whole model on the batch, counted the same way."""
    model, batch = place(size, device), make_prompts(size).batch(range(ROWS)).to(device)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    return count_flops(forward)


def floors(variant: Variant, size: Size) -> tuple[float, float]:
    """The least a step can cost, in forwards of the model: spread evenly over the layers, and with the head exact.

    Forward 1 (or the part from the lowest edited layer up, when hidden states below are reused), input gradients of
    that part, and the weight gradient of the edited fraction. The head runs and passes a gradient in any case.
    """
    layer = 4 * size.d_model**2 + 3 * size.d_model * size.d_mlp
    head = size.d_model * size.vocab
    total = size.layers * layer + head
    edited = 3 * size.d_model * size.neurons * (size.layers - variant.start) / total
    above = 1 - variant.start / size.layers
    above_exact = ((size.layers - variant.start) * layer + head) / total
    return tuple((part if variant.reuse else 1.0) + part + edited for part in (above, above_exact))  # type: ignore[return-value]


def memory_of(variant: Variant, size: Size, device: torch.device) -> tuple[int, int]:
    """Peak bytes added to the model by three steps from nothing, and bytes of the optimizer's state."""
    state: list[int] = [0]

    def note(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        tensors = [t for slot in optimizer.state.values() for t in slot.values()]
        state[0] = sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))

    model = place(size, device)
    handle = register_optimizer_step_post_hook(note)
    try:
        peak = peak_added_bytes(lambda: variant.prepare(model)(3, _nothing), device)
    finally:
        handle.remove()
    return peak, state[0]


def npo_against_ascent(size: Size, device: torch.device) -> dict[str, float]:
    """Peak bytes added by NPO and by gradient ascent on the same mask."""
    mask, prompts = neuron_mask(size, 0), make_prompts(size)
    peaks = {}
    for method in (GradientAscent(steps=3, lr=1e-6), NPO(steps=3, lr=1e-6)):
        work = partial(
            edit, place(size, device), method, mask,
            forget=prompts, batch_size=ROWS, never_seen=None,
        )  # fmt: skip
        peaks[type(method).__name__] = peak_added_bytes(work, device)
    return {**peaks, "ratio": peaks["NPO"] / peaks["GradientAscent"]}


def import_seconds(runs: int = 5) -> dict[str, float | bool]:
    """CPU seconds of ``import locate_edit`` and of the command line's ``--help`` in fresh processes."""
    code = (
        "import sys, time; t = time.process_time(); import locate_edit; "
        "print(time.process_time() - t, 'torch' in sys.modules)"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(runs)
    ]
    seconds = [float(out.stdout.split()[0]) for out in outputs]
    return {
        "import_seconds": statistics.median(seconds),
        "torch_loaded": "True" in outputs[0].stdout,
    }


def host_syncs(variant: Variant, size: Size, device: torch.device) -> list[str]:
    """Places in code that waited for the GPU within two steps of the steady state, as `file:line`."""
    seen = 0

    def tick() -> None:
        nonlocal seen
        seen += 1
        torch.cuda.set_sync_debug_mode("warn" if seen in (2, 3) else "default")

    go = variant.prepare(place(size, device))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            go(5, tick)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    return sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits})


# -- the command ----------------------------------------------------------------------------------


def measure(name: str, device: torch.device, rounds: int, steps: int) -> dict[str, Any]:
    """All figures of one model size."""
    size = SIZES[name]
    prompts = make_prompts(size)
    chosen = variants(size, prompts)
    parameters = sum(p.numel() for p in make_model(size).parameters())
    print(f"{name}: {parameters:,} parameters on {device}", flush=True)
    forward = flops_of_forward(size, device)
    seconds = time_steps(chosen, size, device, rounds, steps)
    dense, shira = seconds[chosen[0].name], seconds["PEFT SHiRA, same entries"]
    table = []
    for variant in chosen:
        gc.collect()
        products, scores = flops_of_step(variant, size, device)
        peak, state = memory_of(variant, size, device)
        even, exact = floors(variant, size)
        own = seconds[variant.name]
        table.append({
            "variant": variant.name, "ours": variant.ours, "lowest_layer": variant.start,
            "seconds": own, "vs_dense": _ratios(own, dense), "vs_shira": _ratios(own, shira),
            "flops": products, "flops_of_attention_scores": scores,
            "forwards": products / forward[0], "floor": even, "floor_with_head": exact,
            "peak_added_bytes": peak, "optimizer_state_bytes": state,
        })  # fmt: skip
        print(
            f"{variant.name}: {table[-1]['forwards']:.3f} forwards, {peak / 1e6:.0f} MB", flush=True
        )
    found: dict[str, Any] = {
        "model": {"name": name, "parameters": parameters, **asdict(size)},
        "tokens_per_step": ROWS * TOKENS, "rounds": rounds, "steps_per_round": steps,
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "machine": describe_machine(str(device)),
        "forward_flops": forward[0], "forward_flops_of_attention_scores": forward[1],
        "variants": table,
        "npo": npo_against_ascent(size, device),
        **import_seconds(),
    }  # fmt: skip
    if device.type == "cuda":
        found["host_syncs"] = {v.name: host_syncs(v, size, device) for v in chosen if v.ours}
    return found


def _ratios(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    each = sorted(a / b for a, b in zip(own, other, strict=True))
    return {"median": statistics.median(each), "least": each[0], "most": each[-1]}


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*SIZES], default="45m")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a variant in a round")
    parser.add_argument("--quick", action="store_true", help="two rounds of one step")
    parser.add_argument(
        "--save", action="store_true", help="write results/ and the tables in README.md"
    )
    given = parser.parse_args(list(arguments) if arguments is not None else None)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="(peft|transformers)")
    rounds, steps = (2, 1) if given.quick else (given.rounds, given.steps)
    started = time.perf_counter()
    found = measure(given.model, torch.device(given.device), rounds, steps)
    text = engine_table(found)
    print(text)
    print(f"took {time.perf_counter() - started:.0f} s")
    if given.save:
        key = f"engine-{given.model}-{torch.device(given.device).type}"
        path = HERE / "results" / f"{key}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_between(HERE / "README.md", key, text)


if __name__ == "__main__":
    main()
