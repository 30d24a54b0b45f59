"""Which layers still carry a fact after an edit? The unlearning depth of four edits on the organism, three seeds.

Run `python -m benchmarks.depth --save`. The score wants an oracle whose residual stream fits the original's. The
shipped oracles do not have one (first table). So a pair is made that does: the shipped oracle, which never learned
forget10, is trained a little further, once on the statements of forget01 beside retained ones (the original), once on
the retained ones alone (its oracle), once more so with another order (the other oracle). Controls are statements about
people that none of these trainings saw. Rates and steps were set before the first measurement and not changed after it.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from torch import nn

from benchmarks.tables import write_between
from circuits import ComponentMask, describe
from locate_edit import PromptSet, edit, organism
from locate_edit.editing import Method
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.gradient_difference import GradientDifference
from locate_edit.methods.npo import NPO
from locate_edit.methods.zero_neurons import ZeroNeurons
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.unlearning_depth import Depth, from_costs, transplant_costs

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
TRAINED, TESTED = 48, 60
"""Retained statements in training, and others as the control: of different people."""
STEPS, LR = 120, 3e-4
EDIT_STEPS, EDIT_LR = 100, 1e-3


def sets(seed: int) -> tuple[PromptSet, PromptSet, PromptSet]:
    """Forgotten, trained retained and tested retained statements."""
    forget = organism.prompts("facts", "forget01")
    retain = organism.prompts("facts", "retain")
    subjects = sorted({str(row["subject"]) for row in retain.rows})
    half = set(np.random.default_rng(seed).permutation(subjects)[: len(subjects) // 2].tolist())
    order = np.random.default_rng(seed).permutation(len(retain)).tolist()
    seen = [i for i in order if str(retain[i]["subject"]) in half]
    unseen = [i for i in order if str(retain[i]["subject"]) not in half]
    return forget, retain.select(seen[:TRAINED]), retain.select(unseen[:TESTED])


def shipped(forget: PromptSet, tested: PromptSet) -> dict[str, Depth]:
    """The first stage and the controls with the shipped oracles; there is no edit."""
    original, oracle, other = (organism.load(name)[0] for name in organism.MODELS)
    none = np.zeros((len(forget), describe(original).n_layers))
    between = transplant_costs(other, oracle, tested)
    return {
        name: from_costs(
            transplant_costs(model, original, forget),
            none,
            transplant_costs(model, original, tested),
            between,
        )
        for name, model in (("oracle", oracle), ("oracle2", other))
    }


def family(
    seed: int, forget: PromptSet, retain: PromptSet
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Original, oracle and other oracle, all trained from the shipped oracle."""
    ancestor, _ = organism.load("oracle")
    method = FineTune(steps=STEPS, lr=LR)
    made = []
    for taught, order in ((forget, seed), (retain, seed), (retain, seed + 100)):
        model = copy.deepcopy(ancestor)
        edit(model, method, None, forget=taught, retain=retain, batch_size=8, seed=order)
        made.append(model)
    return made[0], made[1], made[2]


def edits(original: nn.Module, seed: int) -> dict[str, tuple[Method, ComponentMask | None]]:
    """The edits by name, with the mask of each."""
    about = describe(original)
    upper = ComponentMask.parse("L2.neuron[*]; L3.neuron[*]", about)
    drawn = np.random.default_rng(seed).permutation(4 * 640)[: 2 * 640]
    words = [
        f"L{layer}.neuron[{' '.join(str(n % 640) for n in drawn if n // 640 == layer)}]"
        for layer in range(4)
    ]
    steps: dict[str, Any] = {"steps": EDIT_STEPS, "lr": EDIT_LR}
    return {
        "gradient difference, neurons of layers 2 and 3": (GradientDifference(**steps), upper),
        "gradient difference, as many neurons at random": (
            GradientDifference(**steps),
            ComponentMask.parse("; ".join(words), about),
        ),
        "gradient difference, neurons of layer 3": (
            GradientDifference(**steps),
            ComponentMask.parse("L3.neuron[*]", about),
        ),
        "NPO, all weights": (NPO(**steps), None),
        "neurons of layer 3 off": (ZeroNeurons(), ComponentMask.parse("L3.neuron[*]", about)),
    }


def measure(seed: int) -> dict[str, Any]:
    """Everything of one seed."""
    forget, retain, tested = sets(seed)
    original, oracle, other = family(seed, forget, retain)

    def known(model: nn.Module) -> list[float]:
        return [likelihood(model, of).estimate or 0.0 for of in (forget, tested)]

    s1 = transplant_costs(oracle, original, forget)
    control = transplant_costs(oracle, original, tested)
    between = transplant_costs(other, oracle, tested)
    found: dict[str, Any] = {"original": known(original), "oracle": known(oracle), "edits": {}}
    for name, (method, mask) in edits(original, seed).items():
        edited = copy.deepcopy(original)
        edit(edited, method, mask, forget=forget, retain=retain, batch_size=8, seed=seed)
        s2 = transplant_costs(edited, original, forget)
        depth = from_costs(s1, s2, control, between)
        found["edits"][name] = {
            "known": known(edited),
            "score": depth.score.estimate,
            "unheld": from_costs(s1, s2, control, tolerance=np.inf).score.estimate,
            "withheld": depth.score.withheld,
            "damage": depth.damage,
            "rows": depth.rows(),
        }
    return found


def table(found: dict[str, Any]) -> str:
    """The results as text."""
    n_seeds = len(found["seeds"])
    lines = [
        "The shipped models, nats a token lost after layers 0 to 3:",
        "",
        "| oracle | forgotten (s1) | retained (control) | other oracle into oracle | damage |",
        "|---|---|---|---|---|",
    ]
    for name, each in found["shipped"].items():
        rows = each["rows"]
        cells = (_by_layer([row[key] for row in rows]) for key in ("s1", "control", "between"))
        lines.append(f"| {name} | {' | '.join(cells)} | {each['damage']:.0%} |")
    first = [run["edits"] for run in found["seeds"]]
    lines += [
        "",
        f"Models trained from one ancestor, {n_seeds} seeds (least to most); probabilities are of the answers:",
        "",
        "| edit | forgotten | retained | depth | lost in layers 0 to 3 (s2, mean) |",
        "|---|---|---|---|---|",
    ]
    for name in ("original", "oracle"):
        both = [_span([run[name][k] for run in found["seeds"]]) for k in (0, 1)]
        s1 = _layers(first, "s1") if name == "oracle" else "0"
        lines.append(f"| {name} | {' | '.join(both)} | {'1' if s1 != '0' else '0'} | {s1} |")
    for name in first[0]:
        runs = [run[name] for run in first]
        both = [_span([run["known"][k] for run in runs]) for k in (0, 1)]
        scores = [run["score"] for run in runs if run["score"] is not None]
        said = _span(scores) if len(scores) == n_seeds else f"withheld in {n_seeds - len(scores)}"
        s2 = _layers([{name: run} for run in runs], "s2")
        lines.append(f"| {name} | {' | '.join(both)} | {said} | {s2} |")
    damage = _span([next(iter(run.values()))["damage"] for run in first])
    control = _layers(first, "control")
    lines += ["", f"Damage of these pairs: {damage}; the control costs {control} nats a token."]
    return "\n".join(lines)


def _layers(runs: list[dict[str, Any]], key: str) -> str:
    """Means over seeds by layer."""
    rows = [next(iter(run.values()))["rows"] for run in runs]
    return _by_layer([mean(r[k][key] for r in rows) for k in range(len(rows[0]))])


def _by_layer(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _span(values: list[float]) -> str:
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write results and the README")
    options = parser.parse_args()
    forget, _, tested = sets(0)
    pairs = {
        name: {"rows": depth.rows(), "damage": depth.damage, "withheld": depth.score.withheld}
        for name, depth in shipped(forget, tested).items()
    }
    found: dict[str, Any] = {"shipped": pairs, "seeds": [measure(seed) for seed in SEEDS]}
    text = table(found)
    print(text)
    if options.save:
        path = HERE / "results" / "depth.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_between(HERE / "README.md", "depth", text)


if __name__ == "__main__":
    main()
