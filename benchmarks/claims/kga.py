"""Knowledge gap alignment: facts about people of the organism, against a model retrained without them."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from benchmarks.claims.claim import DEVICE, Check, Claim, precondition
from circuits.forward import labelled_logits
from locate_edit import PromptSet, edit, organism
from locate_edit.engine import StopWhen
from locate_edit.methods.gradient_ascent import GradientAscent
from locate_edit.methods.kga import KGA
from locate_edit.metrics.likelihood import likelihood, nll
from locate_edit.metrics.perplexity import perplexity

PEOPLE, RETAINED = 6, 20
STEPS, HELPER_STEPS, LR, RATIO = 80, 20, 1e-4, 1.0
BATCH = 12


def measure(seed: int) -> dict[str, float]:
    """Distances to the retrained model on what is forgotten and what stays elsewhere, of one seed."""
    model, tokenizer = organism.load(dtype=torch.float32)
    oracle, _ = organism.load("oracle", dtype=torch.float32)
    for each in (model, oracle):
        nn.Module.to(each, DEVICE)
    draw = random.Random(seed)

    def facts(split: str, people: int, name: str) -> list[PromptSet]:
        """Facts of drawn people twice over: one set to edit with, and one of other people to measure."""
        rows = organism.rows("facts", split)
        groups = sorted({str(row["subject"]) for row in rows})
        chosen = draw.sample(groups, min(2 * people, len(groups)))
        return [
            PromptSet([row for row in rows if row["subject"] in part], tokenizer, name=name)
            for part in (chosen[:people], chosen[people:])
        ]

    forget = facts("forget10", PEOPLE, "forget")[0]
    new = facts("holdout", PEOPLE, "new")[0]
    retain, others = facts("retain", RETAINED, "retain")
    general = organism.prompts("general", "held_out").select(range(30))
    goal = probabilities(oracle, forget)
    reference = {"forget": losses(oracle, forget), "before": losses(model, forget)}
    found: dict[str, float] = {"forget, retrained": likelihood(oracle, forget).estimate or 0.0}

    def look(name: str) -> None:
        now = losses(model, forget)
        found[f"forget, {name}"] = likelihood(model, forget).estimate or 0.0
        found[f"JSD, {name}"] = divergence(goal, probabilities(model, forget))
        theirs = reference["forget"].exp()
        found[f"LPD, {name}"] = float(((now.exp() - theirs).abs() / theirs).mean())
        found[f"PDLP, {name}"] = float((now > reference["before"]).float().mean())
        found[f"others, {name}"] = likelihood(model, others).estimate or 0.0
        found[f"perplexity, {name}"] = perplexity(model, general).estimate or 0.0

    look("before")
    precondition(
        found["forget, before"] >= 0.8 and found["forget, retrained"] <= 0.4,
        f"the facts are known ({found['forget, before']:.2f}, 0.8 wanted) and not to the retrained model "
        f"({found['forget, retrained']:.2f}, at most 0.4 wanted)",
    )
    method = KGA(steps=STEPS, lr=LR, gap=new, alpha=RATIO, helper_steps=HELPER_STEPS)
    made = edit(model, method, None, forget=forget, retain=retain, batch_size=BATCH, seed=seed)
    align = [float(record["align"]) for record in made.log if "align" in record]
    found["distance to the gap, first"], found["distance to the gap, last"] = align[0], align[-1]
    look("KGA")
    made.undo()

    def forgotten(edited: nn.Module) -> float:
        return likelihood(edited, forget).estimate or 0.0

    made = edit(
        model,
        GradientAscent(STEPS, LR / 4),
        None,
        forget=forget,
        batch_size=BATCH,
        seed=seed,
        never_seen=None,
        stop=StopWhen(forgotten, below=found["forget, KGA"] + 1e-9),
    )
    look("ascent")
    made.undo()
    return found


@torch.no_grad()
def probabilities(model: nn.Module, prompts: PromptSet) -> Tensor:
    """What is said at every scored position: `label vocab`."""
    batches = prompts.batches(32)
    return torch.cat([labelled_logits(model, each.to(DEVICE)).softmax(-1) for each in batches])


def divergence(one: Tensor, other: Tensor) -> float:
    """Mean Jensen-Shannon divergence of distributions `label vocab` (nats a token)."""
    middle = (one + other) / 2
    halves = [(torch.xlogy(p, p) - torch.xlogy(p, middle)).sum(-1) for p in (one, other)]
    return float(((halves[0] + halves[1]) / 2).mean())


def losses(model: nn.Module, prompts: PromptSet) -> Tensor:
    """Mean negative log-likelihood of each prompt's tokens: `item`, in nats a token."""
    return torch.tensor(nll(model, prompts).values)


CLAIM = Claim(
    system="KGA",
    paper="Wang et al. 2023, arXiv:2305.06535",
    says=(
        "Aligning the gaps makes the model treat what is forgotten as a retrained model does, nearer than ascent "
        "does, and keeps it elsewhere."
    ),
    setting=(
        f"the organism and its oracle; facts of {PEOPLE} people of forget10, new facts of {PEOPLE} invented ones, "
        f"{RETAINED} people retained and {RETAINED} others measured; all weights, helpers as deltas; ascent to the "
        "same probability of what is forgotten"
    ),
    measure=measure,
    checks=(
        Check(
            "distance to the gap (nats a token) falls to half at most",
            ("distance to the gap, first", "distance to the gap, last"),
            lambda f: 0.5 * f["distance to the gap, first"] - f["distance to the gap, last"],
        ),
        Check(
            "the retrained model is nearer than before (JSD, nats a token)",
            ("JSD, before", "JSD, KGA", "forget, before", "forget, KGA", "forget, retrained"),
            lambda f: f["JSD, before"] - f["JSD, KGA"],
        ),
        Check(
            "and nearer than after ascent to the same probability of what is forgotten",
            ("JSD, KGA", "JSD, ascent", "forget, ascent"),
            lambda f: f["JSD, ascent"] - f["JSD, KGA"],
        ),
        Check(
            "perplexity is nearer to the retrained model's (LPD) than after ascent",
            ("LPD, before", "LPD, KGA", "LPD, ascent"),
            lambda f: f["LPD, ascent"] - f["LPD, KGA"],
        ),
        Check(
            "perplexity rises on nine tenths of what is forgotten (PDLP)",
            ("PDLP, KGA", "PDLP, ascent"),
            lambda f: f["PDLP, KGA"] - 0.9 + 1e-9,
        ),
        Check(
            "facts of other people lose at most 0.05",
            ("others, before", "others, KGA", "others, ascent"),
            lambda f: f["others, KGA"] - f["others, before"] + 0.05,
        ),
        Check(
            "perplexity of plain text rises by a tenth at most",
            ("perplexity, before", "perplexity, KGA", "perplexity, ascent"),
            lambda f: 1.1 * f["perplexity, before"] - f["perplexity, KGA"],
        ),
    ),
)
