"""Cost of evaluating: every likelihood metric beside a plain forward pass, and many texts written beside one by one.

Run `python -m benchmarks.evaluation --save`. The plain forward is what `model(input_ids, attention_mask)` does on the
same batches: logits at every position, and nothing read off them. All variants take turns in one process, because a
shared machine drifts; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.machine import describe_machine
from benchmarks.meters import Clock, count_flops, peak_added_bytes
from benchmarks.tables import write_between
from benchmarks.workload import SIZES, make_model, make_prompts
from circuits.forward import labelled_logits
from docs.make_reference import stated
from locate_edit import catalog, organism
from locate_edit.metrics.generation import generate
from locate_edit.metrics.predictions import Predictions
from locate_edit.prompts import PromptSet
from locate_edit.sampling import end_tokens, sample

HERE = Path(__file__).parent
CPU = torch.device("cpu")
NEW_TOKENS = 24
Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A model and the rows it is measured on."""

    model: nn.Module
    other: nn.Module
    prompts: PromptSet
    name: str
    batch_size: int = 16

    def __str__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        return f"{parameters:.1f} M, {self.name}"


def cases(size: str) -> list[Case]:
    """Prompts with answers, and plain texts, for the organism and for a model of random weights."""
    model, tokenizer = organism.load()
    oracle, _ = organism.load("oracle")
    facts = organism.prompts("facts", "retain")[:256]
    general = organism.prompts("general").rows[:256]
    texts = PromptSet([row["prompt"] + row.get("target", "") for row in general], tokenizer)
    large, other = (as_sure_as_trained(make_model(SIZES[size], seed=seed)) for seed in (0, 1))
    words = make_prompts(SIZES[size], rows=16)
    answered = []
    for row in words.rows:
        each = row["prompt"].split(" ")
        answered.append({"prompt": " ".join(each[:96]), "target": " " + " ".join(each[96:])})
    return [
        Case(model, oracle, facts, "facts and their answers"),
        Case(model, oracle, texts, "plain text"),
        Case(large, other, PromptSet(answered, words.tokenizer), "prompts and answers of 96 and 32 tokens", 8),
        Case(large, other, words, "plain text", 8),
    ]  # fmt: skip


def as_sure_as_trained(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with louder logits: an entropy of 2.5 nats where random weights give 10, which nobody samples from."""
    with torch.no_grad():
        model.model.norm.weight.fill_(12.0)
    return model


def metrics_that_cost(cost: str) -> list[Callable[..., Any]]:
    """The metrics of the catalogue that state this cost."""
    loaded = [entry.load() for entry in catalog.entries("metric")]
    return [m for m in loaded if stated(inspect.getdoc(m) or "")["Cost"] == cost]


SHARED = metrics_that_cost("shared forward.")
COMPARED = metrics_that_cost("shared forward, and one of the reference.")


def plain(case: Case, *models: nn.Module) -> None:
    """A forward pass of each model over the data with logits everywhere."""
    with torch.no_grad():
        for batch in case.prompts.batches(case.batch_size):
            for model in models:
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)  # fmt: skip


def gathered(case: Case) -> None:
    """A forward pass over the data with logits where something is scored."""
    with torch.no_grad():
        for batch in case.prompts.batches(case.batch_size):
            labelled_logits(case.model, batch)


def read_off(case: Case) -> Predictions:
    """That, and everything that metrics read off the logits."""
    predictions = Predictions(case.model, case.prompts, batch_size=case.batch_size)
    _ = predictions.logprob
    return predictions


def all_metrics(case: Case, metrics: Sequence[Callable[..., Any]], *, compared: bool) -> None:
    """`metrics` on new predictions."""
    reference = case.other if compared else None
    of = Predictions(case.model, case.prompts, batch_size=case.batch_size, reference=reference)
    for metric in metrics:
        metric(of)


def likelihoods(case: Case, rounds: int) -> dict[str, Any]:
    """Every variant's cost over that of the plain forward of the model, or of model and reference."""
    variants: dict[str, Work] = {
        "plain": partial(plain, case, case.model),
        "gathered": partial(gathered, case),
        "read off": partial(read_off, case),
        "metrics": partial(all_metrics, case, SHARED, compared=False),
        "plain, two models": partial(plain, case, case.model, case.other),
        "metrics, two models": partial(all_metrics, case, [*SHARED, *COMPARED], compared=True),
    }
    seconds = in_turn(variants, rounds)
    two = ("plain, two models", "metrics, two models")
    products = {name: count_flops(variants[name])[0] for name in ("plain", "metrics")}
    peaks = {name: peak_added_bytes(variants[name], CPU) for name in ("plain", "metrics")}
    return {
        "case": str(case), "items": len(case.prompts), "scored": case.prompts.n_scored,
        "tokens": sum(len(case.prompts.ids(i)) for i in range(len(case.prompts))),
        "seconds": seconds,
        "against_plain": {
            name: ratios(seconds[name], seconds[two[0] if name in two else "plain"])
            for name in variants
        },
        "flops": products, "peak_added_bytes": peaks,
    }  # fmt: skip


def writing(case: Case, rounds: int) -> dict[str, Any]:
    """Continuations of the prompts together, one after the other, and by the model's own `generate`."""
    prompts, one_by_one = case.prompts, [case.prompts.select([i]) for i in range(len(case.prompts))]
    options: dict[str, Any] = {"length": NEW_TOKENS, "samples": 2, "top_p": 0.9}

    def own(each: PromptSet) -> Any:
        ids = torch.tensor([each.prompt_ids(0)])
        ends = sorted(end_tokens(case.model, each))
        with torch.no_grad():
            return case.model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                eos_token_id=ends, pad_token_id=ends[0],
            )  # fmt: skip

    variants: dict[str, Work] = {
        "greedy, together": lambda: generate(case.model, prompts, NEW_TOKENS, batch_size=64),
        "greedy, one by one": lambda: [generate(case.model, p, NEW_TOKENS) for p in one_by_one],
        "greedy, transformers": lambda: [own(each) for each in one_by_one],
        "sampled, together": lambda: sample(case.model, prompts, batch_size=64, **options),
        "sampled, one by one": lambda: [
            sample(case.model, each, **{**options, "samples": 1, "seed": seed})
            for each in one_by_one
            for seed in range(options["samples"])
        ],
    }
    seconds = in_turn(variants, rounds)
    return {
        "case": str(case), "items": len(prompts), "new_tokens": NEW_TOKENS, "samples": options["samples"],
        "seconds": seconds,
        "times_less": {
            name: ratios(seconds[name], seconds[f"{name.split(',')[0]}, together"])
            for name in variants
            if "together" not in name
        },
    }  # fmt: skip


def in_turn(variants: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each variant in each round; the order turns round from one to the next."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in [*variants][:: 1 if number % 2 else -1]:
            clock = Clock(CPU)
            clock.tick()
            variants[name]()
            clock.tick()
            if number:  # the first round warms up
                found[name] += clock.seconds()
    return found


def ratios(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Of the same rounds."""
    each = sorted(a / b for a, b in zip(own, other, strict=True))
    return {"median": statistics.median(each), "least": each[0], "most": each[-1]}


def likelihood_table(found: Sequence[dict[str, Any]], rounds: int) -> str:
    """The cost of likelihood metrics as markdown."""
    lines = [
        f"CPU time over that of a plain forward on the same batches, medians of {rounds} rounds (least to most). "
        f"{len(SHARED)} metrics read off one forward; with a reference {len(COMPARED)} more, over the plain forwards "
        "of both models.",
        "",
        "| model, rows | items | scored of all tokens | plain forward (s) | logits where scored | all read off | "
        f"all {len(SHARED)} metrics | with a reference | FLOPs | added peak (MB), plain | metrics |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        against, flops, peak = row["against_plain"], row["flops"], row["peak_added_bytes"]
        lines.append(
            f"| {row['case']} | {row['items']} | {row['scored']:,} of {row['tokens']:,} | "
            f"{statistics.median(row['seconds']['plain']):.2f} | {_shown(against['gathered'])} | "
            f"{_shown(against['read off'])} | **{_shown(against['metrics'])}** | "
            f"{_shown(against['metrics, two models'])} | {flops['metrics'] / flops['plain']:.2f} | "
            f"{peak['plain'] / 1e6:.0f} | {peak['metrics'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def writing_table(found: Sequence[dict[str, Any]], rounds: int) -> str:
    """The cost of writing as markdown."""
    lines = [
        f"Continuations of {NEW_TOKENS} tokens at most, greedy, and {found[0]['samples']} samples a prompt; times less "
        f"CPU time together than otherwise, medians of {rounds} rounds (least to most).",
        "",
        "| model, rows | prompts | together, greedy (s) | than one by one | than transformers' `generate` one by one | "
        "together, sampled (s) | than one by one |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        less, seconds = row["times_less"], row["seconds"]
        lines.append(
            f"| {row['case']} | {row['items']} | {statistics.median(seconds['greedy, together']):.2f} | "
            f"**{_shown(less['greedy, one by one'], 1)}** | {_shown(less['greedy, transformers'], 1)} | "
            f"{statistics.median(seconds['sampled, together']):.2f} | "
            f"**{_shown(less['sampled, one by one'], 1)}** |"
        )
    return "\n".join(lines)


def _shown(ratio: dict[str, float], digits: int = 2) -> str:
    median, least, most = (f"{ratio[name]:.{digits}f}" for name in ("median", "least", "most"))
    return f"{median} ({least} to {most})"


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[*SIZES], default="45m-32k")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--save", action="store_true", help="write results/evaluation-cpu.json and EVALUATION.md"
    )
    given = parser.parse_args(list(arguments) if arguments is not None else None)
    torch.set_num_threads(1)
    several = cases(given.size)
    found: dict[str, Any] = {"machine": describe_machine("cpu"), "rounds": given.rounds}
    found["metrics"] = [metric.__name__ for metric in SHARED]
    found["likelihoods"] = [likelihoods(case, given.rounds) for case in several]
    print(text := likelihood_table(found["likelihoods"], given.rounds), flush=True)
    machine = "Machine: " + ", ".join(f"{k} {v}" for k, v in found["machine"].items()) + "."
    words = make_prompts(SIZES[given.size], rows=32, tokens=32)
    asked = [
        replace(several[0], prompts=several[0].prompts[:64]),
        replace(several[2], prompts=words.reread([{**r, "target": " w9"} for r in words.rows]), name="random words"),
    ]  # fmt: skip
    few = max(1, given.rounds // 3)
    found["writing"] = [writing(case, few) for case in asked]
    print(written := writing_table(found["writing"], few))
    if given.save:
        target = HERE / "results" / "evaluation-cpu.json"
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for key, table in (("machine", machine), ("likelihoods", text), ("writing", written)):
            write_between(HERE / "EVALUATION.md", f"evaluation-{key}", table)


if __name__ == "__main__":
    main()
