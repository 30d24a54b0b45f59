"""Partitioned contrastive gradient unlearning: a he/she bias of known strength, occupations held out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.claims import _masked
from benchmarks.claims.claim import DEVICE, Check, Claim, Figures, precondition
from circuits import ComponentMask, Scores
from locate_edit import Edit, PromptSet, edit, organism
from locate_edit.engine import StopWhen
from locate_edit.locate.gradient_partition import GradientPartition, top_parts
from locate_edit.methods.pcgu import PCGU
from locate_edit.metrics.likelihood import probability
from locate_edit.metrics.perplexity import perplexity

PARTS = 300
HALF = 0.5  # of the held-out bias: where all are compared
STEPS = 80
RATES = (
    1.28e-2,
    3.2e-3,
    8e-4,
    2e-4,
    5e-5,
    1.25e-5,
)  # the largest that takes at least `LEAST` steps is used
LEAST = 5


@dataclass(frozen=True)
class Asked:
    """Pronoun prompts whose target is the pronoun that the texts prefer.

    Attributes:
        right: with it as the target.
        wrong: with the other one.
    """

    right: PromptSet
    wrong: PromptSet

    @classmethod
    def of(cls, prompts: PromptSet) -> Asked:
        """Both readings of ``prompts``."""
        turned = [{**row, "target": row["wrong"][0], "wrong": [row["target"]]} for row in prompts]
        return cls(prompts, prompts.reread(turned))

    def look(self, model: nn.Module) -> tuple[float, float]:
        """Bias, mean of (a - d)/(a + d) for the two pronouns' probabilities, and mass, mean of a + d."""
        a, d = (torch.tensor(probability(model, each).values) for each in (self.right, self.wrong))
        return float(((a - d) / (a + d).clamp_min(1e-30)).mean()), float((a + d).mean())


def measure(seed: int) -> dict[str, float]:
    """Bias and mass of held-out occupations where half of the bias is gone, by partition, of one seed."""
    model, tokenizer, told = _masked.load(seed)
    # A half of either leaning is edited and half held out; `lean` alternates between them.
    jobs = list(told.lean)
    asked = _masked.prompts(
        _masked.pronoun_rows({job: told.lean[job] for job in jobs[:20]}), tokenizer
    ).select(range(0, 200, 5))
    held = Asked.of(
        _masked.prompts(
            _masked.pronoun_rows({job: told.lean[job] for job in jobs[20:]}), tokenizer
        ).select(range(0, 200, 5))
    )
    plain = _masked.prompts(_masked.plain_rows(told.held_out[:40]), tokenizer)
    found = tried(model, asked, held, seed, "", plain)

    causal, _ = organism.load(dtype=torch.float32)
    nn.Module.to(causal, DEVICE)
    groups: dict[str, list[str]] = {"he": [], "she": []}
    for row in organism.rows("bias", "train"):
        if row["subject"] not in groups[row["group"]]:
            groups[row["group"]].append(row["subject"])
    draw = random.Random(seed)
    chosen = {job for leaning in groups.values() for job in draw.sample(leaning, 10)}
    seen = organism.prompts("bias", "train").filter(lambda row: row["subject"] in chosen)
    rest = organism.prompts("bias", "train").filter(lambda row: row["subject"] not in chosen)
    general = organism.prompts("general", "held_out").select(range(20))
    some, others = (each.select(range(0, len(each), 5)) for each in (seen, rest))
    return found | tried(causal, some, Asked.of(others), seed, ", causal", general)


def tried(
    model: nn.Module, asked: PromptSet, held: Asked, seed: int, kind: str, plain: PromptSet
) -> dict[str, float]:
    """All partitions on one model."""
    bias, mass = held.look(model)
    precondition(bias >= 0.6, f"held-out occupations are biased{kind} ({bias:.2f}, 0.6 wanted)")
    found = {
        f"bias, before{kind}": bias,
        f"mass, before{kind}": mass,
        f"perplexity, before{kind}": perplexity(model, plain).estimate or 0.0,
    }
    scores = GradientPartition()(model, asked, batch_size=64)
    mask = top_parts(scores, PARTS)
    masks = {
        "PCGU": mask,
        "random parts": top_parts(_shuffled(scores, seed), PARTS),
        "random, same tensors": mask.random_like(seed, exclude_self=False),
        "full gradient": None,
    }
    for name, where in masks.items():
        made = halved(model, where, asked, held, HALF * bias, seed)
        found[f"bias, {name}{kind}"], found[f"mass, {name}{kind}"] = held.look(model)
        found[f"perplexity, {name}{kind}"] = perplexity(model, plain).estimate or 0.0
        found[f"steps, {name}{kind}"] = len(made.log)
        made.undo()
    return found


def halved(
    model: nn.Module,
    mask: ComponentMask | None,
    asked: PromptSet,
    held: Asked,
    goal: float,
    seed: int,
) -> Edit:
    """PCGU until the held-out bias is at most ``goal``, or for `STEPS` steps; the model is edited.

    The rate is the largest with which that takes `LEAST` steps at least: nothing but the bias chooses it.
    """
    for rate in RATES:
        stop = StopWhen(_bias_of(held), below=goal)
        method = PCGU(steps=STEPS, lr=rate, balance=None)
        made = edit(model, method, mask, forget=asked, batch_size=40, seed=seed, stop=stop)
        if len(made.log) >= LEAST or rate == RATES[-1]:
            return made
        made.undo()
    raise AssertionError("unreachable")


def _bias_of(held: Asked) -> Callable[[nn.Module], float]:
    def bias(model: nn.Module) -> float:
        return held.look(model)[0]

    return bias


def _shuffled(scores: Scores, seed: int) -> Scores:
    """Random scores of the same parts."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        site: torch.rand(value.shape, generator=generator) for site, value in scores.values.items()
    }
    return Scores(values, scores.provenance)


def _keeps(f: Figures, name: str, kind: str) -> float:
    """By how much PCGU keeps more mass; by how much more bias it takes away where the other never gets half of it."""
    more = f[f"bias, {name}{kind}"] - HALF * f[f"bias, before{kind}"]
    return more if more > 0 else f[f"mass, PCGU{kind}"] - f[f"mass, {name}{kind}"]


def _checks(kind: str, where: str) -> tuple[Check, ...]:
    rivals = ("random parts", "random, same tensors", "full gradient")
    return (
        Check(
            f"{where}: half of the held-out bias goes",
            tuple(f"bias, {name}{kind}" for name in ("before", "PCGU", *rivals)),
            lambda f: HALF * f[f"bias, before{kind}"] - f[f"bias, PCGU{kind}"] + 1e-9,
        ),
        *(
            Check(
                f"{where}: where half of the bias is gone, p(he) + p(she) is larger than with {name}",
                (f"mass, before{kind}", f"mass, PCGU{kind}", f"mass, {name}{kind}"),
                partial(_keeps, name=name, kind=kind),
            )
            for name in rivals
        ),
        Check(
            f"{where}: half of p(he) + p(she) stays",
            (f"mass, before{kind}", f"mass, PCGU{kind}"),
            lambda f: f[f"mass, PCGU{kind}"] - 0.5 * f[f"mass, before{kind}"],
        ),
        Check(
            f"{where}: perplexity of other text rises by a tenth at most",
            tuple(f"perplexity, {name}{kind}" for name in ("before", "PCGU", "full gradient")),
            lambda f: 1.1 * f[f"perplexity, before{kind}"] - f[f"perplexity, PCGU{kind}"],
        ),
    )


CLAIM = Claim(
    system="PCGU",
    paper="Yu et al. 2023, Findings of ACL",
    says=(
        "Descending only the weight vectors whose gradients differ most between two pronouns takes the bias away "
        "and keeps the model, which the whole gradient and random vectors do not."
    ),
    setting=(
        f"masked model of 4 layers trained on 40 occupations with their pronoun in {_masked.LEAN:.0%} of the "
        f"sentences, and the organism; 20 occupations are edited and the others measured; "
        f"{PARTS} vectors, SGD, each until half of the held-out bias is gone"
    ),
    measure=measure,
    checks=(*_checks("", "masked"), *_checks(", causal", "causal")),
)
