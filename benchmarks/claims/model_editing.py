"""ROME, MEMIT and MEMIT in the null space on the organism: people get other attributes, one fact at a time or many."""

from __future__ import annotations

import random

import torch
from torch import nn

from benchmarks.claims._budget import mlps
from benchmarks.claims._forms import asked, mean_probability, statements
from benchmarks.claims.claim import DEVICE, Check, Claim, precondition
from circuits import describe
from locate_edit import PromptSet, edit, organism
from locate_edit.editing import Method
from locate_edit.engine import StopWhen
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.memit import MEMIT
from locate_edit.methods.rome import ROME

SINGLE, MANY = 6, 120  # of the 200 facts about tested people
LAYER = (
    3  # whose MLP looks most facts up, at the prompt's end (effect on the answer by path patching)
)
FREE = 1e-5  # eigenvalues of the null space's directions, against the largest
MOST = (
    0.99  # probability of the new answer at which fine-tuning stops, if the closed form gets there
)


def measure(seed: int) -> dict[str, float]:
    """New answers as edited and in other wordings, and what is left of neighbours, of one seed."""
    model, tokenizer = organism.load(dtype=torch.float32)
    nn.Module.to(model, DEVICE)
    model_map = describe(model)
    everything = asked(tokenizer, lambda row: True)
    draw = random.Random(seed)
    ids = [str(row["id"]) for row in everything["statement"].rows]
    chosen = draw.sample(ids, MANY)
    left = [row for row in everything["statement"].rows if row["id"] not in chosen]
    retain = statements(tokenizer) + PromptSet(left, tokenizer, name="left")
    mask = mlps(model_map, LAYER)
    found: dict[str, float] = {}

    def facts(which: list[str], form: str) -> PromptSet:
        rows = [row for row in everything[form].rows if row["id"] in which]
        return PromptSet(rows, tokenizer, name=form)

    close = everything["held_out"].filter(lambda row: row["id"] not in chosen)

    def tried(method: Method, which: list[str], enough: float = MOST) -> list[float]:
        forget = facts(which, "statement")
        new = taught(forget)
        if isinstance(method, FineTune):
            stop = StopWhen(lambda _: mean_probability(model, new), above=min(enough, MOST))
            made = edit(
                model, method, mask, forget=new, batch_size=10, seed=seed, stop=stop, side="write"
            )
        else:
            made = edit(model, method, mask, forget=forget, retain=retain, batch_size=10, seed=seed)
        others = taught(facts(which, "held_out") + facts(which, "qa"), new)
        values = [mean_probability(model, each) for each in (new, others, close)]
        made.undo()
        return values

    before = mean_probability(model, close)
    precondition(before > 0.9, f"neighbours are known ({before:.2f}, 0.9 wanted)")
    slow, fast = FineTune(steps=60, lr=1e-3), FineTune(steps=240, lr=1e-3)
    pairs = [
        (rome := tried(ROME(), [fact]), tried(slow, [fact], rome[0])) for fact in chosen[:SINGLE]
    ]
    for name, each in zip(("ROME", "fine-tuning"), zip(*pairs, strict=True), strict=True):
        found |= named(name, "one", [sum(values) / SINGLE for values in zip(*each, strict=True)])
    together = tried(MEMIT(), chosen)
    found |= named("MEMIT", "many", together)
    found |= named("ROME", "many", tried(ROME(), chosen))
    found |= named("null space", "many", tried(MEMIT(null_space=True, threshold=FREE), chosen))
    found |= named("fine-tuning", "many", tried(fast, chosen, together[0]))
    return found


def taught(prompts: PromptSet, like: PromptSet | None = None) -> PromptSet:
    """The prompts with the answers that the editors teach: the first wrong one, or as the same facts in ``like``."""
    if like is None:
        rows = [{**row, "target": row["wrong"][0]} for row in prompts.rows]
    else:
        answers = {row["id"]: row["target"] for row in like.rows}
        rows = [{**row, "target": answers[row["id"]]} for row in prompts.rows]
    return prompts.reread(rows)


def named(name: str, how_many: str, values: list[float]) -> dict[str, float]:
    """The figures of one way."""
    what = ("new", "new, other wordings", "neighbours")
    return {f"{each}: {name}, {how_many}": value for each, value in zip(what, values, strict=True)}


CLAIM = Claim(
    system="ROME, MEMIT, AlphaEdit",
    paper="Meng et al. 2022, arXiv:2202.05262 and 2210.07229; Fang et al. 2024, arXiv:2410.02355",
    says=(
        "A closed-form edit of one fact generalises to other wordings and leaves neighbours alone, where fine-tuning "
        "does one or the other; MEMIT does it for many facts where sequential ROME breaks; the null space keeps others."
    ),
    setting=(
f"the organism, facts about tested people get another value in MLP {LAYER}'s down projection: {SINGLE} one at a "
        f"time, or {MANY} together (ROME: one after the other); probabilities of whole answers; neighbours: the "
        f"{200 - MANY} facts left, in held-out wordings; fine-tuning of the same weights until the new answers are as "
        "probable"
    ),
    measure=measure,
    checks=(
        Check(
            "ROME, one fact: new answer at 0.9 at least",
            ("new: ROME, one", "new: fine-tuning, one"),
            lambda f: f["new: ROME, one"] - 0.9,
        ),
        Check(
            "ROME, one fact: in other wordings more than by fine-tuning, neighbours at most 0.02 lower",
            (
                "new, other wordings: ROME, one", "new, other wordings: fine-tuning, one",
                "neighbours: ROME, one", "neighbours: fine-tuning, one",
            ),
            lambda f: min(
                f["new, other wordings: ROME, one"] - f["new, other wordings: fine-tuning, one"],
                f["neighbours: ROME, one"] - f["neighbours: fine-tuning, one"] + 0.02,
            ),
        ),
        Check(
            "many facts: MEMIT has more of the new answers than sequential ROME",
            ("new: MEMIT, many", "new: ROME, many"),
            lambda f: f["new: MEMIT, many"] - f["new: ROME, many"],
        ),
        Check(
            "many facts: and no fewer of the neighbours",
            ("neighbours: MEMIT, many", "neighbours: ROME, many"),
            lambda f: f["neighbours: MEMIT, many"] - f["neighbours: ROME, many"],
        ),
        Check(
            "many facts: MEMIT in other wordings more than fine-tuning, neighbours at most 0.02 lower",
            (
                "new, other wordings: MEMIT, many", "new, other wordings: fine-tuning, many",
                "neighbours: MEMIT, many", "neighbours: fine-tuning, many",
            ),
            lambda f: min(
                f["new, other wordings: MEMIT, many"] - f["new, other wordings: fine-tuning, many"],
                f["neighbours: MEMIT, many"] - f["neighbours: fine-tuning, many"] + 0.02,
            ),
        ),
        Check(
            "many facts: the null space keeps more of the neighbours, new answers at most 0.05 lower",
            (
                "neighbours: null space, many", "neighbours: MEMIT, many",
                "new: null space, many", "new: MEMIT, many",
            ),
            lambda f: min(
                f["neighbours: null space, many"] - f["neighbours: MEMIT, many"],
                f["new: null space, many"] - f["new: MEMIT, many"] + 0.05,
            ),
        ),
    ),
)  # fmt: skip
