"""Cost of integrated gradients for all MLP neurons: `PrivacyNeurons` against the same thing layer by layer.

Run `python -m benchmarks.attribution`. The reference is the usual way: for each layer one batch that repeats the whole
text at every point of the path, forward and backward, parameters frozen. All variants take turns in one process,
because a shared machine drifts; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.machine import describe_machine
from benchmarks.meters import Clock, count_flops
from benchmarks.workload import SIZES, make_prompts
from circuits import Site, describe
from circuits.attribution import IntegratedGradients
from locate_edit.locate.privacy_neurons import PrivacyNeurons, scored_rows
from locate_edit.prompts import PromptSet

HERE = Path(__file__).parent
STEPS = 20
LAYERS, NEURONS, VOCAB = 6, 2048, 8192
FIRST_WORD = 8  # ids below are special tokens
REFERENCE = "layer by layer"


def make_model(device: torch.device, *, seed: int = 0) -> GPTNeoXForCausalLM:
    """A GPT-NeoX of 27 million random weights in evaluation mode."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config).eval()
    model.get_output_embeddings().weight.data.mul_(10)  # some words are clearly more probable
    return model.to(device)


@torch.no_grad()
def make_prompt(model: nn.Module, tokens: int) -> PromptSet:
    """A text of random words, and as its target the word the model finds most probable."""
    words = make_prompts(SIZES["45m"], rows=1, tokens=tokens)
    ids = torch.tensor([words.ids(0)], device=next(model.parameters()).device)
    likely = int(model(input_ids=ids).logits[0, -1, FIRST_WORD:].argmax()) + FIRST_WORD
    prompt = " ".join(f"w{i}" for i in words.ids(0))
    return PromptSet([{"prompt": prompt, "target": f" w{likely}"}], words.tokenizer)


def layer_by_layer(model: nn.Module, prompts: PromptSet) -> Tensor:
    """Attribution `layer neuron` with one batch of whole texts for each layer."""
    model_map = describe(model)
    ids = torch.tensor([prompts.prompt_ids(0)], device=next(model.parameters()).device)
    (label,) = prompts.target_ids(0)
    alphas = (torch.arange(STEPS, device=ids.device)[:, None] + 0.5) / STEPS
    found = []
    for layer in range(model_map.n_layers):
        down = model_map.read_point(Site(layer, "neuron")).module
        seen: list[Tensor] = []
        handle = down.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0][0, -1])
        )
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        handle.remove()
        scaled = (alphas * seen[0]).requires_grad_()

        def feed(_: nn.Module, args: tuple[Tensor], scaled: Tensor = scaled) -> tuple[Tensor]:
            return (torch.cat([args[0][:, :-1], scaled[:, None]], 1),)

        handle = down.register_forward_pre_hook(feed)
        logits = model(input_ids=ids.expand(STEPS, -1), use_cache=False).logits
        handle.remove()
        probability = logits[:, -1].softmax(-1)[:, label]
        (gradient,) = torch.autograd.grad(probability.sum(), scaled)
        found.append(seen[0] * gradient.mean(0))
    return torch.stack(found).cpu()


def scores(localizer: PrivacyNeurons, model: nn.Module, prompts: PromptSet) -> Tensor:
    """The scores of the one prompt, `layer neuron`."""
    found = localizer(model, prompts)
    return torch.stack([found[Site(layer, "neuron")][0] for layer in range(LAYERS)])


def alone(model: nn.Module, prompts: PromptSet) -> Tensor:
    """The same without what is written into the scores' provenance (a checksum of all weights)."""
    attribute = IntegratedGradients(describe(model), STEPS)
    return torch.stack(list(attribute(scored_rows(prompts.batch([0]))).values.values()))


def measure(tokens: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds, floating-point operations and numbers of every variant for one length of the text."""
    model = make_model(device)
    prompts = make_prompt(model, tokens)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ways: dict[str, Callable[[], Tensor]] = {
        REFERENCE: lambda: layer_by_layer(model, prompts),
        "PrivacyNeurons": lambda: scores(PrivacyNeurons(STEPS), model, prompts),
        "the attribution alone": lambda: alone(model, prompts),
        "approximate='joint'": lambda: scores(
            PrivacyNeurons(STEPS, approximate="joint"), model, prompts
        ),
        "approximate='gradient'": lambda: scores(
            PrivacyNeurons(STEPS, approximate="gradient"), model, prompts
        ),
    }
    values = {name: way() for name, way in ways.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            clock = Clock(device)
            clock.tick()
            way()
            clock.tick()
            seconds[name] += clock.seconds()
    return {
        "tokens": tokens,
        "largest": float(values[REFERENCE].abs().max()),
        "variants": [
            {
                "variant": name,
                "seconds": seconds[name],
                "times_less": statistics.median(
                    a / b for a, b in zip(seconds[REFERENCE], seconds[name], strict=True)
                ),
                "flops": sum(count_flops(way)),
                "max_difference": float((values[name] - values[REFERENCE]).abs().max()),
            }
            for name, way in ways.items()
        ],
    }


def table(found: dict[str, Any]) -> str:
    """The results as markdown."""
    lines = [
        f"Integrated gradients of one token's probability for all {LAYERS} x {NEURONS} neurons of a random GPT-NeoX "
        f"({found['parameters'] / 1e6:.1f} M parameters), {STEPS} points, float32; {found['clock']} time, medians of "
        f"{found['rounds']} rounds in alternation. Differences are from the numbers of {REFERENCE!r}.",
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in found["machine"].items()) + ".",
        "",
        "| text (tokens) | way | time (s) | times less | GFLOP | largest difference | largest score |",
        "|---|---|---|---|---|---|---|",
    ]
    for length in found["lengths"]:
        for row in length["variants"]:
            lines.append(
                f"| {length['tokens']} | {row['variant']} | {statistics.median(row['seconds']):.3f} | "
                f"{row['times_less']:.1f} | {row['flops'] / 1e9:.1f} | {row['max_difference']:.1e} | "
                f"{length['largest']:.1e} |"
            )
    return "\n".join(lines)


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 96])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write results/attribution-<device>")
    given = parser.parse_args(list(arguments) if arguments is not None else None)
    torch.set_num_threads(1)
    device = torch.device(given.device)
    found: dict[str, Any] = {
        "machine": describe_machine(str(device)),
        "clock": "GPU" if device.type == "cuda" else "CPU",
        "parameters": sum(p.numel() for p in make_model(torch.device("cpu")).parameters()),
        "steps": STEPS,
        "rounds": given.rounds,
        "lengths": [measure(tokens, device, given.rounds) for tokens in given.tokens],
    }
    text = table(found)
    print(text)
    if given.save:
        results = HERE / "results"
        results.mkdir(exist_ok=True)
        stem = f"attribution-{device.type}"
        (results / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (results / f"{stem}.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
