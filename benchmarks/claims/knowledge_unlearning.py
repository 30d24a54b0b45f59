"""Knowledge unlearning: gradient ascent on passages known by heart, all at once or chunk by chunk."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from benchmarks.claims.claim import DEVICE, Check, Claim, precondition
from locate_edit import PromptSet, edit, organism
from locate_edit.editing import Method
from locate_edit.methods.gradient_ascent import GradientAscent
from locate_edit.methods.sequential_ascent import SequentialAscent
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.memorization import exact_memorization, extraction_likelihood
from locate_edit.metrics.perplexity import perplexity
from locate_edit.metrics.predictions import Predictions

FORGET, CHUNK = 16, 4  # passages
SENTENCES = 2  # of each passage after its opening, about 26 tokens
N = 5  # tokens: of the n-grams of EL, whose texts have 200 tokens in the paper and n = 10
STEPS, LR = 150, 1e-4
FACTS = 100  # facts of people, which stand in for the paper's benchmarks


def measure(seed: int) -> dict[str, float]:
    """What both ways leave of the passages and of everything else, of one seed."""
    model, tokenizer = organism.load(dtype=torch.float32)
    nn.Module.to(model, DEVICE)
    draw = random.Random(seed)
    passages = [shortened(row) for row in organism.rows("novel")]
    draw.shuffle(passages)
    forget, others = (
        PromptSet(rows, tokenizer, name=name)
        for rows, name in ((passages[:FORGET], "forget"), (passages[FORGET:], "others"))
    )
    unseen = PromptSet([shortened(row) for row in organism.rows("novel", "holdout")], tokenizer)
    rest = {
        "others": others,
        "facts": PromptSet(draw.sample(organism.rows("facts"), FACTS), tokenizer),
        "general": organism.prompts("general", "held_out"),
    }
    ma, el = memorised(model, unseen)
    found = {"MA, unseen": ma, "EL, unseen": el}
    found |= after(model, forget, rest, "before")
    precondition(
        found["MA, before"] >= 0.9,
        f"the passages are memorised (MA {found['MA, before']:.2f}, 0.9 wanted)",
    )
    at_once = GradientAscent(STEPS, LR, "forgotten", (ma, el), N)
    in_chunks = SequentialAscent(STEPS, LR, CHUNK, rule="forgotten", thresholds=(ma, el), n=N)
    methods: dict[str, Method] = {"at once": at_once, "in chunks": in_chunks}
    for name, method in methods.items():
        made = edit(model, method, None, forget=forget, batch_size=FORGET, seed=seed)
        found |= after(model, forget, rest, name)
        found[f"steps, {name}"] = len(made.log)
        made.undo()
    # Chunks that come later carry earlier ones on, so all at once goes on to the same MA before the two are compared.
    further = replace(at_once, thresholds=(found["MA, in chunks"], 1.0))
    made = edit(model, further, None, forget=forget, batch_size=FORGET, seed=seed)
    found |= after(model, forget, rest, "at once, as far")
    made.undo()
    return found


def shortened(row: Mapping[str, object]) -> dict[str, object]:
    """A passage with its first sentences alone to be recited."""
    sentences = str(row["target"]).split(". ")
    return {**row, "target": ". ".join(sentences[:SENTENCES]) + "."}


def memorised(model: nn.Module, prompts: PromptSet) -> tuple[float, float]:
    """MA and EL_n (fractions)."""
    seen = Predictions(model, prompts, batch_size=64)
    return (
        exact_memorization(seen).estimate or 0.0,
        extraction_likelihood(seen, n=N).estimate or 0.0,
    )


def after(
    model: nn.Module, forget: PromptSet, rest: Mapping[str, PromptSet], name: str
) -> dict[str, float]:
    """All figures of the model as it is now."""
    ma, el = memorised(model, forget)
    seen = {what: Predictions(model, prompts, batch_size=64) for what, prompts in rest.items()}
    return {
        f"MA, {name}": ma,
        f"EL, {name}": el,
        f"others' MA, {name}": exact_memorization(seen["others"]).estimate or 0.0,
        f"facts (probability), {name}": likelihood(seen["facts"]).estimate or 0.0,
        f"general perplexity, {name}": perplexity(seen["general"]).estimate or 0.0,
    }


CLAIM = Claim(
    system="Knowledge unlearning",
    paper="Jang et al. 2023, arXiv:2210.01504",
    says=(
        "Ascending the loss of token sequences brings them to where unseen text is with little or no loss elsewhere, "
        "and chunk after chunk is better than all at once."
    ),
    setting=(
        f"the organism; {FORGET} passages of its novel, {SENTENCES} sentences each, EL_{N}, chunks of {CHUNK}; "
        f"all weights, rate {LR:g}; others: the 24 other passages, {FACTS} facts about people, plain text"
    ),
    measure=measure,
    checks=(
        Check(
            "MA and EL at most those of unseen passages, at once",
            (
                "MA, before",
                "MA, at once",
                "MA, unseen",
                "EL, before",
                "EL, at once",
                "EL, unseen",
                "steps, at once",
            ),
            lambda f: (
                min(f["MA, unseen"] - f["MA, at once"], f["EL, unseen"] - f["EL, at once"]) + 1e-9
            ),
        ),
        Check(
            "the same in chunks, each of which stays forgotten",
            ("MA, in chunks", "EL, in chunks", "steps, in chunks"),
            lambda f: (
                min(f["MA, unseen"] - f["MA, in chunks"], f["EL, unseen"] - f["EL, in chunks"])
                + 1e-9
            ),
        ),
        Check(
            "facts lose at most 0.02, at once",
            ("facts (probability), before", "facts (probability), at once"),
            lambda f: f["facts (probability), at once"] - f["facts (probability), before"] + 0.02,
        ),
        Check(
            "facts lose at most 0.02, in chunks",
            ("facts (probability), in chunks",),
            lambda f: f["facts (probability), in chunks"] - f["facts (probability), before"] + 0.02,
        ),
        Check(
            "perplexity of plain text rises by a tenth at most, at once",
            ("general perplexity, before", "general perplexity, at once"),
            lambda f: 1.1 * f["general perplexity, before"] - f["general perplexity, at once"],
        ),
        Check(
            "in chunks facts keep more than at once, to the same MA",
            ("facts (probability), at once, as far", "facts (probability), in chunks"),
            lambda f: (
                f["facts (probability), in chunks"] - f["facts (probability), at once, as far"]
            ),
        ),
        Check(
            "in chunks the perplexity of plain text stays lower, to the same MA",
            ("general perplexity, at once, as far", "general perplexity, in chunks"),
            lambda f: f["general perplexity, at once, as far"] - f["general perplexity, in chunks"],
        ),
        Check(
            "in chunks other passages keep more (MA), to the same MA",
            ("others' MA, before", "others' MA, at once, as far", "others' MA, in chunks"),
            lambda f: f["others' MA, in chunks"] - f["others' MA, at once, as far"],
        ),
    ),
)
