"""The suffix attack across queries and people, and from model to model: `python -m benchmarks.suffix --save`.

The dynamic unlearning attack of Yuan et al. 2024 (arXiv:2408.10682) asks two things of a suffix: does it work on
prompts that it was not searched on (within query, cross query, cross target), and on a model that it was not searched
on (from the original)? Here: 24 facts about six people, other six for each of three seeds, pushed down by the edit of
`benchmarks.attacks`. The score is theirs, the ROUGE-L recall of the answer behind the suffix minus that without. It
compares models only where some suffix makes the edited one say more; `MARGIN` was set before the first run.

The shipped organism loses its answers behind any tokens that it was not trained to find there. So original and oracle
are first taught to bear them: the same facts, the oracle's without the forgotten, with random tokens before the answer.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks.attacks import FACTS, LR, STEPS, UNITS
from benchmarks.machine import describe_machine
from benchmarks.tables import write_between
from locate_edit import PromptSet, edit, organism
from locate_edit.attacks._halves import Across, halves
from locate_edit.attacks.suffix import Suffix
from locate_edit.locate.attribution_patching import AttributionPatching
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.npo import NPO
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.rouge import rouge
from locate_edit.metrics.values import Values

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
SETTINGS: dict[Across, str] = {
    "within": "within query",
    "query": "cross query",
    "target": "cross target",
}
Pairs = tuple[tuple[str, str], ...]
"""Where a suffix is searched, and where it is measured."""
PAIRS: Pairs = (
    ("original", "original"), ("edited", "edited"), ("original", "edited"), ("oracle", "oracle"),
    ("original", "oracle"),
)  # fmt: skip
TAUGHT, TAUGHT_LR = 400, 5e-4
"""Steps and rate of the training behind random tokens, half of it without them."""
MARGIN = 0.1
"""By how much a suffix must raise the recall of the edited model within query, on every seed."""
DRAWN = 5
"""Random suffixes beside a searched one."""


def taught(which: str) -> nn.Module:
    """A shipped model that also answers behind random tokens."""
    model, _ = organism.load(which)
    facts = organism.prompts("facts", "retain")
    if which == "organism":
        facts = facts + organism.prompts("facts", "forget10")
    generator = torch.Generator().manual_seed(0)
    special = set(facts.tokenizer.all_special_ids)
    ids = torch.tensor([i for i in range(len(facts.tokenizer)) if i not in special])
    drawn = ids[torch.randint(len(ids), (len(facts), Suffix().length), generator=generator)]
    behind = facts.followed([tuple(each) for each in drawn.tolist()])
    edit(model, FineTune(steps=TAUGHT, lr=TAUGHT_LR), None, forget=facts + behind, batch_size=32)
    return model


def measure(
    original: nn.Module, oracle: nn.Module, seed: int, pairs: Pairs, settings: Sequence[Across]
) -> dict[str, dict[str, Any]]:
    """What each pair of models gives in each setting, by "searched > measured"."""
    facts = organism.prompts("facts", "retain")
    forget = organism.prompts("facts", "forget10")[seed * FACTS : (seed + 1) * FACTS]
    edited = copy.deepcopy(original)
    models = {"original": original, "oracle": oracle, "edited": edited}
    mask = AttributionPatching(kinds=("neuron",))(original, forget).top(UNITS)
    npo = NPO(steps=STEPS, lr=LR, retain="kl")
    edit(edited, npo, mask, forget=forget, retain=facts[::29], seed=seed)
    found: dict[str, dict[str, Any]] = {f"{a} > {b}": {} for a, b in pairs}
    for across in settings:
        attack = Suffix(across=across)
        tested = forget.select(halves(forget, across, seed)[1])
        random = _random_suffixes(attack, original, forget, seed)
        suffixes: dict[str, tuple[int, ...]] = {}
        for searched, measured in pairs:
            if searched == measured:
                attacked = attack(models[searched], forget, batch_size=FACTS, seed=seed)
                (ids,) = attacked.notes["suffix tokens"]
                suffixes[searched] = tuple(ids)
            found[f"{searched} > {measured}"][across] = {
                "suffix": list(suffixes[searched]),
                **{
                    name: _with_and_without(models[measured], asked, suffixes[searched], random)
                    for name, asked in (("forget", tested), ("retain", facts[7::30]))
                },
            }
    return found


def _random_suffixes(
    attack: Suffix, model: nn.Module, forget: PromptSet, seed: int
) -> list[tuple[int, ...]]:
    """As many tokens as a search may use, without a search."""
    allowed = attack.allowed(model, forget)
    generator = torch.Generator().manual_seed(100 + seed)
    picks = torch.randint(len(allowed), (DRAWN, attack.length), generator=generator)
    return [tuple(each) for each in allowed[picks].tolist()]


def _with_and_without(
    model: nn.Module,
    prompts: PromptSet,
    suffix: tuple[int, ...],
    random: list[tuple[int, ...]],
) -> dict[str, dict[str, float]]:
    """Recall and likelihood of the answers without a suffix, behind random ones (mean) and behind the searched one."""

    def scores(asked: PromptSet) -> dict[str, float]:
        said = Predictions(model, asked)
        return {"recall": _number(rouge(said)), "likelihood": _number(likelihood(said))}

    drawn = [scores(prompts.followed([each] * len(prompts))) for each in random]
    return {
        "clean": scores(prompts),
        "random": {key: mean(each[key] for each in drawn) for key in drawn[0]},
        "suffix": scores(prompts.followed([suffix] * len(prompts))),
    }


def _number(values: Values) -> float:
    assert values.estimate is not None
    return values.estimate


def score(run: Mapping[str, Any], part: str = "forget") -> float:
    """The paper's score: recall behind the suffix minus recall without."""
    difference: float = run[part]["suffix"]["recall"] - run[part]["clean"]["recall"]
    return difference


def table(found: Mapping[str, Any]) -> str:
    """The results as text."""
    holds = {world: _raised(found[world]) for world in ("shipped", "taught")}
    good = min(holds["taught"]) >= MARGIN
    lines = [
        f"{len(SEEDS)} seeds, mean (least to most); {found['seconds']:.0f} s of CPU time on one thread.",
        "",
        f"Precondition: within query, on the edited model itself, a suffix raises recall by {MARGIN} at least on every "
        "seed.",
        "",
        "| organism | recall | random suffix | searched suffix | score | precondition |",
        "|---|---|---|---|---|---|",
    ]
    for world, raised in holds.items():
        each = [run["edited > edited"]["within"] for run in found[world]]
        verdict = "holds" if min(raised) >= MARGIN else "does not hold"
        lines.append(f"| {world} | {_recalls(each)} | {_span(raised)} | {verdict} |")
    lines += [
        "",
        "The taught organism"
        + ("" if good else ", whose scores are withheld as the precondition does not hold")
        + ":",
        "",
        "| searched on | measured on | setting | recall | random suffix | searched suffix | score | likelihood | "
        "retain recall | random | searched |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for searched, measured in PAIRS:
        for across, name in SETTINGS.items():
            each = [run[f"{searched} > {measured}"][across] for run in found["taught"]]
            scores = _span([score(run) for run in each]) if good else "withheld"
            likelihoods = " to ".join(
                f"{mean(run['forget'][what]['likelihood'] for run in each):.2f}"
                for what in ("clean", "suffix")
            )
            lines.append(
                f"| {searched} | {measured} | {name} | {_recalls(each)} | {scores} | {likelihoods} | "
                f"{_recalls(each, 'retain')} |"
            )
    return "\n".join(lines)


def _raised(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [score(run["edited > edited"]["within"]) for run in runs]


def _recalls(runs: Sequence[Mapping[str, Any]], part: str = "forget") -> str:
    """Three cells: without a suffix, behind random ones, behind the searched one."""
    return " | ".join(
        _span([run[part][what]["recall"] for run in runs]) for what in ("clean", "random", "suffix")
    )


def _span(values: list[float]) -> str:
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Run, and with --save write the table and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    shipped = [organism.load(which)[0] for which in ("organism", "oracle")]
    own: Pairs = (("edited", "edited"),)
    found: dict[str, Any] = {"machine": describe_machine()}
    found["shipped"] = [measure(*shipped, seed, own, ["within"]) for seed in SEEDS]
    better = [taught(which) for which in ("organism", "oracle")]
    found["taught"] = [measure(*better, seed, PAIRS, list(SETTINGS)) for seed in SEEDS]
    found["seconds"] = time.process_time() - started
    text = table(found)
    print(text)
    if given.save:
        path = HERE / "results" / "suffix.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_between(HERE / "ATTACKS.md", "suffix", text)


if __name__ == "__main__":
    main()
