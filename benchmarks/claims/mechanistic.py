"""Mechanistic unlearning on the organism: facts unlearnt in one wording where they are looked up, asked in four."""

from __future__ import annotations

import math

import torch
from torch import nn

from benchmarks.claims._budget import localizations
from benchmarks.claims._forms import Known, asked, drawn, known, mean_probability, statements
from benchmarks.claims.claim import DEVICE, Check, Claim, Figures, precondition
from locate_edit import PromptSet, edit, organism
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.mechanistic import MechanisticUnlearning

PEOPLE = 10  # of forget10, with four facts each
VALUES = 12  # of every attribute, equally frequent: chance is ln 12 nats
STEPS, RATE, RATE_ALL, BATCH = 80, 1e-3, 3e-4, 10
RELEARNING = FineTune(steps=20, lr=3e-4)


def measure(seed: int) -> dict[str, float]:
    """What each localization forgets and keeps in every form, and what half of the facts bring back of the others."""
    model, tokenizer = organism.load(dtype=torch.float32)
    nn.Module.to(model, DEVICE)
    people = drawn(seed, PEOPLE)
    forget = asked(tokenizer, lambda row: row["group"] in people)
    kept = asked(tokenizer, lambda row: row["forget"] is None)  # in no loss
    general = PromptSet(organism.rows("general", "train"), tokenizer, name="general")
    retain = statements(tokenizer) + general
    half = frozenset(sorted(people)[: PEOPLE // 2])
    shown = forget["statement"].filter(lambda row: row["group"] in half)
    hidden = forget["statement"].filter(lambda row: row["group"] not in half)
    for name, facts in (("forgotten", forget), ("kept", kept)):
        before = known(model, facts)
        precondition(
            before.worst > 0.9, f"facts to be {name} are known in every form ({before.worst:.2f}, 0.9 wanted)"
        )  # fmt: skip
    found: dict[str, float] = {}
    of_mask: dict[str, dict[str, float]] = {}  # localizations that agree are tried once
    for name, mask in localizations(model, forget["statement"], seed=seed).items():
        if str(mask) in of_mask:
            found |= {f"{what}, {name}": value for what, value in of_mask[str(mask)].items()}
            continue
        method = MechanisticUnlearning(steps=STEPS, lr=RATE_ALL if mask is None else RATE)
        made = edit(
            model, method, mask, forget=forget["statement"], retain=retain, batch_size=BATCH, seed=seed,
            never_seen=math.log(VALUES),
        )  # fmt: skip
        gone, stayed = known(model, forget), known(model, kept)
        precondition(
            gone.statement < 0.2,
            f"{name}: forgotten as trained (probability {gone.statement:.2f}, below 0.2 wanted)",
        )
        back = edit(
            model, RELEARNING, None, forget=shown, retain=retain, batch_size=BATCH, seed=seed
        )
        values = figures(gone, stayed) | {"relearnt": mean_probability(model, hidden)}
        of_mask[str(mask)] = values
        found |= {f"{what}, {name}": value for what, value in values.items()}
        back.undo()
        made.undo()
    others = [name for name in found if "other MLP" in name]
    for what in sorted({name.split(",")[0] for name in others}):
        each = [found[name] for name in others if name.startswith(f"{what},")]
        found[f"{what}, random MLP"] = sum(each) / len(each)
    return found


def figures(gone: Known, stayed: Known) -> dict[str, float]:
    """Of one localization: held-out wordings are statements and questions, half each."""
    return {
        "forgotten as trained": gone.statement,
        "forgotten in held-out wordings": (gone.held_out + gone.qa) / 2,
        "kept in held-out wordings": (stayed.held_out + stayed.qa) / 2,
        "forgotten by choice": gone.choice,
        "kept by choice": stayed.choice,
    }


def beats(other: str, form: str, one: str = "lookup") -> Check:
    """Lower on what is to be forgotten than another localization, and at most 0.05 lower on what is to be kept."""
    names = [f"{what} {form}, {each}" for what in ("forgotten", "kept") for each in (one, other)]

    def margin(f: Figures) -> float:
        return min(f[names[1]] - f[names[0]], f[names[2]] - f[names[3]] + 0.05)

    return Check(
        f"{one}, {form}: less of the forgotten left than with {other}, kept at most 0.05 lower", tuple(names), margin
    )  # fmt: skip


CLAIM = Claim(
    system="Mechanistic unlearning",
    paper="Guo et al. 2024, arXiv:2410.12949",
    says=(
        "Facts unlearnt in the MLP that feeds the heads which fetch them are forgotten in other forms too, more than "
        "with as many parameters chosen otherwise, while other facts stay."
    ),
    setting=(
        f"the organism, 40 facts of {PEOPLE} people of forget10, unlearnt in one trained wording to the never-seen "
        "level (ln 12 nats each); one MLP of four, or components with as many parameters; kept: 120 facts in no loss"
    ),
    measure=measure,
    checks=(
        beats("AP", "by choice"),
        beats("all", "by choice"),
        beats("random MLP", "by choice"),
        beats("AP", "in held-out wordings"),
        beats("all", "in held-out wordings"),
        beats("random MLP", "in held-out wordings"),
        beats("random MLP", "by choice", "early or late"),
        Check(
            "half of the facts bring back less of the others than with a random MLP (probability as trained)",
            ("relearnt, lookup", "relearnt, random MLP"),
            lambda f: f["relearnt, random MLP"] - f["relearnt, lookup"],
        ),
    ),
)
