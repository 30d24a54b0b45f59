"""How near does `NeverMet` come to a model that was retrained without the people, beside other methods?

Run `python -m benchmarks.own_method --save`; finished cells are kept in ``--folder``, so that it can be interrupted. On
the organism, everything about the two people of forget01 is to go: their facts in the wordings of training, and the
phone numbers and addresses of those who have them. The number measured is the oracle distance (1: another retraining
seed) of what is forgotten, of the same in wordings that the edit did not see, and of what should stay: other people
than those whose facts the edit was given to keep. Every other method stops where the forget prompts are as likely as
after `NeverMet`. Then half of the facts are taught again, to the edited model and to the oracle. Settings are to be
chosen on other people of forget10 (``--tune``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import describe_machine
from benchmarks.tables import write_between
from circuits import ComponentMask
from circuits.atomic import atomic_file
from locate_edit import PromptSet, edit, organism
from locate_edit.engine import StopWhen
from locate_edit.errors import EditError
from locate_edit.locate.activation_contrast import ActivationContrast
from locate_edit.methods.dpo import DPO
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.gradient_difference import GradientDifference
from locate_edit.methods.gradient_surgery import GradientSurgery
from locate_edit.methods.latent_adversarial import LatentAdversarial
from locate_edit.methods.llm_unlearning import LLMUnlearning
from locate_edit.methods.mechanistic import MechanisticUnlearning
from locate_edit.methods.never_met import NeverMet
from locate_edit.methods.npo import NPO
from locate_edit.methods.rmu import RMU
from locate_edit.methods.simnpo import SimNPO
from locate_edit.methods.undial import UNDIAL
from locate_edit.methods.wga import WeightedGradientAscent
from locate_edit.metrics.exposure import exposure
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.oracle_distance import divergences
from locate_edit.metrics.predictions import Predictions
from locate_edit.organism import words
from locate_edit.replacements import random_replacements
from locate_edit.tokens import TokenMask

HERE = Path(__file__).parent
UNITS = 320
"""Neurons that are trained, of 2560."""
BATCH = 32
SEEDS = (0, 1, 2)
REPLACEMENTS = 12
LOOK = 5
"""Steps between two looks at how likely the forget prompts are."""
SHARED: dict[str, Any] = {"steps": 100, "lr": 2e-3, "alpha": 100.0}
"""The same for every method that takes them."""
METHODS: dict[str, Any] = {
    "NeverMet": NeverMet(**SHARED),
    "fine-tuning on replacements": FineTune(retain="kl", **SHARED),
    "NPO": NPO(retain="kl", **SHARED),
    "gradient difference": GradientDifference(retain="kl", **SHARED),
    "NeverMet, located neurons": NeverMet(**SHARED),
    "fine-tuning on replacements, not stopped": FineTune(retain="kl", **SHARED),
    "NeverMet, namesakes not kept": NeverMet(**SHARED, beta=0.0),
    "SimNPO": SimNPO(retain="kl", **SHARED),
    "UNDIAL": UNDIAL(retain="kl", **SHARED),
    "weighted ascent": WeightedGradientAscent(retain="kl", **SHARED),
    "gradient surgery": GradientSurgery(retain="kl", **SHARED),
    "mechanistic unlearning": MechanisticUnlearning(retain="kl", **SHARED),
    "DPO, refusals": DPO(prefer="refusal", retain="kl", **SHARED),
    "AdvNPO": LatentAdversarial(retain="kl", **SHARED),
    "LLM unlearning": LLMUnlearning(steps=100, lr=2e-3, retain_weight=100.0, k=1),
    "RMU": RMU(steps=100, lr=2e-3),
}
RELEARN = FineTune(steps=3, lr=2e-4)
"""Of every weight, at a rate that brings the oracle part of the way on the tuning people."""
TAUGHT = ("sport", "city")
"""The attributes that are taught again; the others and the secrets are tested."""
GONE = ("forget", "held out", "question", "choice")
STAYS = ("facts", "asked otherwise", "secrets", "neighbours", "general")
FORMS = ("held_out", "qa", "mc")


class Setting:
    """What is forgotten, kept and measured for some people.

    Of the retained people a quarter, and half of those who share a name with somebody to be forgotten, are measured;
    the edit may see all others.
    """

    def __init__(self, people: set[str]) -> None:
        self.model, _ = organism.load()
        self.oracle, _ = organism.load("oracle")
        self.other, _ = organism.load("oracle2")
        self.facts = in_all_wordings(of("facts", "forget10", people), words.TEMPLATES)
        self.secrets = with_secrets(people)
        self.forget = (self.facts + self.secrets).named("forget")
        shown, measured, near = divided(people)
        self.retain = to_keep(shown, near)
        kept = of("facts", "retain", measured)
        unseen = {
            form: of("facts", "forget10", people, form) + of("secrets", "forget10", people, form)
            for form in ("held_out", "qa")
        }
        self.sets = {
            "forget": self.forget,
            "held out": unseen["held_out"],
            "question": unseen["qa"],
            "choice": of("facts", "forget10", people, "mc"),
            "facts": kept.filter(lambda row: row["group"] not in near),
            "asked otherwise": other_forms(measured),
            "secrets": of("secrets", "retain", measured),
            "neighbours": kept.filter(lambda row: row["group"] in near)
            + of("secrets", "retain", measured & near),
            "general": organism.prompts("general", "held_out")[:40],
        }
        # The person's own digits, without what every number has in common.
        phone = self.secrets.filter(lambda row: row["secret"] == "phone")
        self.digits = phone.with_token_mask(TokenMask.from_spans(phone))
        self.noise, self.before = {}, {}
        for name, prompts in self.sets.items():
            models = [self.other, self.model]
            noise, before = divergences(self.oracle, models, prompts)
            self.noise[name] = float(noise.mean())
            self.before[name] = float(before.mean()) / self.noise[name]

    def distances(self, model: nn.Module) -> dict[str, float]:
        """Oracle distance of every set."""
        return {
            name: float(divergences(self.oracle, [model], prompts)[0].mean()) / self.noise[name]
            for name, prompts in self.sets.items()
        }

    def mask(self, units: int) -> ComponentMask:
        """The neurons that write more about the people to be forgotten than about others."""
        return ActivationContrast()(self.model, self.forget, retain=self.retain[0::2]).top(units)

    def replaced(self, seed: int) -> PromptSet:
        """Other values instead of the facts, and random digits and letters instead of the secrets."""
        rows = [
            {**row, "target": value}
            for row in self.facts.rows
            for value in (row["target"], *row["wrong"])
        ]
        drawn = random_replacements(self.secrets, REPLACEMENTS, seed=seed)
        return self.facts.reread(rows) + drawn

    def likely(self, model: nn.Module) -> float:
        """How likely the forget prompts are: the geometric mean over tokens, mean over prompts."""
        return float(likelihood(model, self.forget).estimate or 0.0)

    def relearned(self, model: nn.Module, seed: int) -> dict[str, float]:
        """How likely facts are after half of the forgotten ones were taught again; undone afterwards."""
        taught = self.facts.filter(lambda row: row["attribute"] in TAUGHT)
        others = self.facts.filter(lambda row: row["attribute"] not in TAUGHT)
        sets = {"taught": taught, "other facts": others, "secrets": self.secrets}
        sets["kept facts"] = self.sets["facts"]
        before = {name: likelihood(model, prompts).estimate for name, prompts in sets.items()}
        made = edit(model, RELEARN, None, forget=taught, batch_size=BATCH, seed=seed)
        try:
            after = {name: likelihood(model, prompts).estimate for name, prompts in sets.items()}
        finally:
            made.undo()
        return {f"{name}, before": float(v or 0.0) for name, v in before.items()} | {
            name: float(v or 0.0) for name, v in after.items()
        }


def of(name: str, split: str, who: set[str], form: str | None = None) -> PromptSet:
    """The organism's prompts about some people."""
    return organism.prompts(name, split, form).filter(lambda row: row["group"] in who)


def divided(people: set[str]) -> tuple[set[str], set[str], set[str]]:
    """Retained people that the edit may see, those that are measured, and those who share a name with ``people``."""
    names = {n for p in organism.people("forget10") if p.id in people for n in (p.first, p.last)}
    retained = organism.people("retain")
    near = [p.id for p in retained if {p.first, p.last} & names]
    far = [p.id for p in retained if p.id not in near]
    measured = {*near[1::2], *far[1::4]}
    return {p.id for p in retained} - measured, measured, set(near)


def to_keep(shown: set[str], near: set[str]) -> PromptSet:
    """The retain prompts: every fact and secret in one wording of training and one other form in turn.

    Those of people who share a name with somebody to be forgotten come in all wordings and forms.
    """
    facts, secrets = of("facts", "retain", shown), of("secrets", "retain", shown)
    close = shown & near
    some = [
        in_all_wordings(facts, words.TEMPLATES, one=True),
        in_all_wordings(secrets, words.SECRET_TEMPLATES, one=True),
        other_forms(shown),
        in_all_wordings(of("facts", "retain", close), words.TEMPLATES),
        in_all_wordings(of("secrets", "retain", close), words.SECRET_TEMPLATES),
        *(of("facts", "retain", close, form) for form in FORMS),
    ]
    found = some[0]
    for prompts in some[1:]:
        found = found + prompts
    return found.named("retain")


def other_forms(who: set[str]) -> PromptSet:
    """Three of four facts, each in one of the forms that are not those of training, in turn."""
    parts = []
    for k, form in enumerate(FORMS):
        asked = of("facts", "retain", who, form)
        parts.append(asked.select([i for i in range(len(asked)) if (i + i // 4) % 4 == k]))
    return parts[0] + parts[1] + parts[2]


def in_all_wordings(
    prompts: PromptSet, templates: Mapping[str, Mapping[str, Sequence[str]]], *, one: bool = False
) -> PromptSet:
    """Each row in every wording of training, or in ``one`` of them in turn."""
    rows = []
    for i, row in enumerate(prompts.rows):
        texts = templates[row.get("attribute") or row["secret"]]["train"]
        for text in [texts[(i + i // 4) % len(texts)]] if one else texts:
            prompt = text.format(n=row["subject"])
            rows.append({**row, "prompt": prompt, "paraphrases": [], "spans": [], "random": []})
    return prompts.reread(rows, prompts.name)


def with_secrets(people: set[str]) -> PromptSet:
    """The people's secrets in all wordings of training, their drawn characters marked."""
    found = organism.prompts("secrets", "forget10").filter(lambda row: row["group"] in people)
    rows = []
    for row in found.rows:
        places = [[a - len(row["prompt"]) for a in span] for span in row["random"]]
        for prompt in (row["prompt"], *row["paraphrases"]):
            spans = [[len(prompt) + a for a in span] for span in places]
            rows.append({**row, "prompt": prompt, "paraphrases": [], "spans": spans})
    return found.reread(rows)


def cell(
    setting: Setting, name: str, method: Any, mask: ComponentMask, seed: int, level: float
) -> dict[str, Any]:
    """One edit, measured and undone; it stops where the forget prompts are less likely than ``level``."""
    start = time.process_time()
    if "located" not in name:
        mask = mask.random_like(seed=seed + 1)
    forget = setting.replaced(seed) if isinstance(method, FineTune) else setting.forget
    to_the_end = isinstance(method, NeverMet) or "not stopped" in name
    stop = StopWhen(setting.likely, below=level, every=LOOK)
    made = edit(
        setting.model, method, mask, forget=forget, retain=setting.retain,
        batch_size=BATCH, seed=seed, stop=() if to_the_end else stop,
    )  # fmt: skip
    try:
        found: dict[str, Any] = {
            "method": name,
            "seed": seed,
            "steps": len(made.log),
            "edit_seconds": time.process_time() - start,
            "distance": setting.distances(setting.model),
            "exposure": exposure(Predictions(setting.model, setting.digits)).estimate,
            "likelihood": setting.likely(setting.model),
            "relearned": setting.relearned(setting.model, seed),
        }
    finally:
        made.undo()
    return found


def measure(
    folder: Path, people: set[str], seeds: Iterable[int], *, kept_only: bool = False
) -> dict[str, Any]:
    """Every method and seed; what stands in ``folder`` is not done again, and the rest is left out if so asked."""
    setting = Setting(people)
    mask = setting.mask(UNITS)
    cells = []
    for seed in seeds:
        level = 0.0
        for name, method in METHODS.items():
            path = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"
            about = {
                "method": repr(method), "units": UNITS, "people": sorted(people), "relearn": repr(RELEARN),
                "level": level,
            }  # fmt: skip
            if path.exists() and (kept := json.loads(path.read_text("utf-8")))["about"] == about:
                found = kept
            elif kept_only:
                continue
            else:
                try:
                    found = {**cell(setting, name, method, mask, seed, level), "about": about}
                except EditError as problem:
                    found = {"method": name, "seed": seed, "failed": str(problem), "about": about}
                with atomic_file(path) as place:
                    place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(row_of(name, [found]), flush=True)
            cells.append(found)
            level = level or found.get("likelihood", 0.0)
    reference = {
        name: {
            "distance": distance,
            "exposure": exposure(Predictions(model, setting.digits)).estimate,
            "likelihood": setting.likely(model),
            "steps": 0,
            "relearned": setting.relearned(model, 0),
        }
        for name, model, distance in (
            ("before", setting.model, setting.before),
            ("oracle", setting.oracle, dict.fromkeys(setting.sets, 0.0)),
            ("second oracle", setting.other, dict.fromkeys(setting.sets, 1.0)),
        )
    }
    sizes = {name: len(prompts) for name, prompts in setting.sets.items()}
    return {
        "machine": describe_machine(), "people": sorted(people), "units": UNITS, "sizes": sizes,
        "noise_nats": setting.noise, "reference": reference, "cells": cells,
    }  # fmt: skip


def say(values: Sequence[float | None]) -> str:
    """The mean, with the least and the most of several."""
    there = [v for v in values if v is not None]
    if not there:
        return "-"
    middle = f"{sum(there) / len(there):.2f}"
    return middle if len(there) < 2 else f"{middle} ({min(there):.2f}-{max(there):.2f})"


def row_of(name: str, cells: list[dict[str, Any]]) -> str:
    """One line of the first table: means over seeds, with the least and the most."""
    done = [c for c in cells if "failed" not in c]
    if not done:
        return f"| {name} | failed: {cells[0]['failed']} |"
    steps = "-".join(dict.fromkeys(str(f([c["steps"] for c in done])) for f in (min, max)))
    parts = [steps, say([c["likelihood"] for c in done])]
    parts += [say([c["distance"][key] for c in done]) for key in (*GONE, *STAYS)]
    parts.append(say([c["exposure"] for c in done]))
    return f"| {name} | " + " | ".join(parts) + " |"


def relearned_row(name: str, cells: list[dict[str, Any]]) -> str:
    """One line of the second table."""
    done = [c["relearned"] for c in cells if "failed" not in c]
    keys = ("taught", "other facts", "secrets", "kept facts")
    parts = [say([c[key] for c in done]) for k in keys for key in (f"{k}, before", k)]
    return f"| {name} | " + " | ".join(parts) + " |"


def table(found: dict[str, Any]) -> str:
    """The results as markdown."""
    names = dict.fromkeys(c["method"] for c in found["cells"])
    rows = {name: [reference] for name, reference in found["reference"].items()}
    rows |= {n: [c for c in found["cells"] if c["method"] == n] for n in names}
    columns = ["", "steps", "likelihood", *GONE, *STAYS, "exposure (bits)"]
    again = ["", "taught, before", "after", "other facts, before", "after"]
    again += ["secrets, before", "after", "kept facts, before", "after"]
    floor = ", ".join(f"{name} {nats:.2g}" for name, nats in found["noise_nats"].items())
    return "\n".join(
        [
            "| " + " | ".join(columns) + " |",
            "|---" * len(columns) + "|",
            *(row_of(name, cells) for name, cells in rows.items()),
            "",
            f"Noise floors (nats a token): {floor}.",
            "",
            "How likely targets are before and after half of the facts were taught again:",
            "",
            "| " + " | ".join(again) + " |",
            "|---" * len(again) + "|",
            *(relearned_row(name, cells) for name, cells in rows.items()),
        ]
    )


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE / "results" / "own-method-cells")
    parser.add_argument("--tune", action="store_true", help="the people settings were chosen on")
    parser.add_argument("--save", action="store_true", help="write results and table")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds")
    parser.add_argument("--kept", action="store_true", help="only of cells that are finished")
    given = parser.parse_args(list(arguments) if arguments is not None else None)
    torch.set_num_threads(1)
    reported = {person.id for person in organism.people("forget01")}
    tuned = {p.id for p in organism.people("forget10") if p.id not in reported and p.secrets}
    people = set(sorted(tuned)[:2]) if given.tune else reported
    seeds = SEEDS[: 1 if given.tune else given.seeds]
    found = measure(given.folder, people, seeds, kept_only=given.kept)
    text = table(found)
    print(text)
    if given.save:
        with atomic_file(HERE / "results" / "own-method.json") as place:
            place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_between(HERE / "OWN_METHOD.md", "own-method", text)


if __name__ == "__main__":
    main()
