"""Mechanistic unlearning where the place of facts is known: a network set by hand that looks sports up in one MLP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random
from typing import Any

from benchmarks.claims._budget import localizations
from benchmarks.claims._forms import choice, mean_probability
from benchmarks.claims.claim import Check, Claim, Figures, precondition
from circuits import ComponentMask, Site
from locate_edit import PromptSet, edit
from locate_edit.methods.mechanistic import MechanisticUnlearning
from locate_edit.planted.lookup import N_SPORTS, plant_lookup

PROMPTS = 600
FORGOTTEN, UNSEEN = 8, 14  # of 36 people: to be forgotten, and kept without being in any loss
STEPS, RATE, RATE_ALL, BATCH = 150, 3e-4, 1e-4, 16
LOCATED = 48  # prompts that localizers see


def measure(seed: int) -> dict[str, float]:
    """What each localization forgets and keeps where names stand elsewhere in the prompt than they did in training."""
    plant = plant_lookup(n_prompts=PROMPTS, seed=seed)
    model = plant.model
    everyone = sorted({row["subject"] for row in plant.prompts.rows})
    order = Random(seed).sample(everyone, len(everyone))
    gone, unseen = frozenset(order[:FORGOTTEN]), frozenset(order[FORGOTTEN : FORGOTTEN + UNSEEN])
    forget = plant.prompts.filter(lambda row: row["subject"] in gone and early(row))
    gone_elsewhere = with_options(
        plant.prompts.filter(lambda row: row["subject"] in gone and not early(row))
    )
    retain = plant.prompts.filter(lambda row: row["subject"] not in gone | unseen)
    stayed = with_options(plant.prompts.filter(lambda row: row["subject"] in unseen))
    for name, prompts in (("forgotten", forget), ("kept", stayed)):
        before = mean_probability(model, prompts)
        precondition(
            before > 0.9, f"facts to be {name} are known (probability {before:.2f}, 0.9 wanted)"
        )
    located = plant.prompts.filter(lambda row: row["subject"] in gone)[:LOCATED]
    masks = localizations(model, located, seed=seed)
    precondition(
        planted(masks["lookup"], plant.mask), "fact lookup finds the MLP that somebody put the facts in"
    )  # fmt: skip
    found: dict[str, float] = {}
    for name, mask in masks.items():
        method = MechanisticUnlearning(steps=STEPS, lr=RATE_ALL if mask is None else RATE)
        made = edit(
            model, method, mask, forget=forget, retain=retain, batch_size=BATCH, seed=seed,
            never_seen=math.log(N_SPORTS),
        )  # fmt: skip
        found[f"forgotten as trained, {name}"] = mean_probability(model, forget)
        found[f"forgotten elsewhere, {name}"] = choice(model, gone_elsewhere)
        found[f"kept, {name}"] = choice(model, stayed)
        made.undo()
    others = [name for name in found if "other MLP" in name]
    for what in sorted({name.split(",")[0] for name in others}):
        each = [found[name] for name in others if name.startswith(f"{what},")]
        found[f"{what}, random MLP"] = sum(each) / len(each)
    return found


def early(row: Mapping[str, Any]) -> bool:
    """Whether the name stands among the first three words."""
    return str(row["prompt"]).split().index(str(row["subject"]).split()[0]) < 3


def with_options(prompts: PromptSet) -> PromptSet:
    """The same prompts with every other sport as a wrong answer."""
    sports = [f" sport{i}" for i in range(N_SPORTS)]
    rows = [
        {**row, "wrong": [each for each in sports if each != row["target"]]} for row in prompts.rows
    ]
    return prompts.reread(rows)


def planted(found: ComponentMask | None, truth: ComponentMask) -> bool:
    """Whether the one MLP that was found is the one whose neurons hold the facts."""
    layers = {
        site.layer
        for site, units in truth.on.items()
        if site.kind == "neuron" and bool(units.any())
    }
    return found is not None and {unit.site for unit in found.units()} == {
        Site(n, "mlp") for n in layers
    }


def beats(other: str) -> Check:
    """Lower on what is to be forgotten than another localization, and at most 0.05 lower on what is to be kept."""
    names = [
        f"{what}, {each}" for what in ("forgotten elsewhere", "kept") for each in ("lookup", other)
    ]

    def margin(f: Figures) -> float:
        return min(f[names[1]] - f[names[0]], f[names[2]] - f[names[3]] + 0.05)

    return Check(
        f"less of the forgotten left than with {other}, kept at most 0.05 lower", tuple(names), margin
    )  # fmt: skip


CLAIM = Claim(
    system="Mechanistic unlearning, planted facts",
    paper="Guo et al. 2024, arXiv:2410.12949",
    says=(
        "On a small model with facts stored in a known MLP, unlearning there generalises better than in as many "
        "parameters chosen otherwise."
    ),
    setting=(
        f"plant_lookup: 36 people's sports, {FORGOTTEN} forgotten to chance (ln 6 nats), named among the first three "
        f"words, asked with the name further back; share of the right sport among six; kept: {UNSEEN} people in no loss"
    ),
    measure=measure,
    checks=(
        Check(
            "forgotten as trained to 0.25 at most with every localization but random MLPs",
            tuple(f"forgotten as trained, {name}" for name in ("lookup", "AP", "CT", "all")),
            lambda f: 0.25 - max(f[f"forgotten as trained, {name}"] for name in ("lookup", "AP", "CT", "all")),
        ),
        beats("AP"),
        beats("CT"),
        beats("all"),
        beats("random MLP"),
    ),
)  # fmt: skip
