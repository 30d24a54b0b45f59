"""Selective forgetting: ascent on the names in passages of the novel against ascent on the whole passages."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import nn

from benchmarks.claims.claim import DEVICE, Check, Claim, precondition
from locate_edit import PromptSet, edit, organism
from locate_edit.editing import Method
from locate_edit.engine import StopWhen
from locate_edit.methods.gradient_ascent import GradientAscent
from locate_edit.methods.selective import SelectiveForgetting
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.memorization import exact_memorization
from locate_edit.metrics.perplexity import perplexity
from locate_edit.organism import words
from locate_edit.spans import texts
from locate_edit.tokens import TokenMask

FORGET = 6  # passages
SENTENCES = 3  # of each passage after its opening
STEPS, LR = 150, 1e-4
FACTS = 100  # facts of people, which stand in for the paper's benchmarks
NAMES = texts(*(name for slot in ("who", "where", "beast") for name in words.NOVEL_SLOTS[slot]))


def measure(seed: int) -> dict[str, float]:
    """What the three ways leave when the names are forgotten equally far, of one seed."""
    model, tokenizer = organism.load(dtype=torch.float32)
    nn.Module.to(model, DEVICE)
    draw = random.Random(seed)
    passages = [shortened(row) for row in organism.rows("novel")]
    draw.shuffle(passages)
    never_read = [shortened(row) for row in organism.rows("novel", "holdout")]
    forget, others, unseen = (
        NAMES.annotate(PromptSet(rows, tokenizer))
        for rows in (passages[:FORGET], passages[FORGET:], never_read)
    )
    rest = {
        "others": others,
        "facts": PromptSet(draw.sample(organism.rows("facts"), FACTS), tokenizer),
        "general": organism.prompts("general", "held_out"),
    }
    names = TokenMask.from_spans(forget)
    found = {
        "names (fraction of tokens)": names.fraction,
        "S-MA, unseen": in_names(model, unseen),
        **after(model, forget, rest, "before"),
    }
    precondition(
        found["S-MA, before"] >= 0.9,
        f"the names are memorised (S-MA {found['S-MA, before']:.2f}, 0.9 wanted)",
    )
    precondition(
        found["S-MA, unseen"] <= 0.7 * found["S-MA, before"],
        f"names of unseen passages are not guessed (S-MA {found['S-MA, unseen']:.2f})",
    )
    stop = StopWhen(lambda now: in_names(now, forget), below=found["S-MA, unseen"] + 1e-9)
    some = SelectiveForgetting(STEPS, LR, alpha=0.0)
    trials: dict[str, tuple[Method, PromptSet]] = {
        "names": (some, forget),
        "all tokens": (GradientAscent(STEPS, LR, optim=some.optim), forget),
        "random tokens": (some, without_spans(forget).with_token_mask(scattered(names, draw))),
    }
    for name, (method, prompts) in trials.items():
        made = edit(
            model,
            method,
            None,
            forget=prompts,
            batch_size=FORGET,
            seed=seed,
            never_seen=None,
            stop=stop,
        )
        found |= after(model, forget, rest, name)
        found[f"steps, {name}"] = len(made.log)
        made.undo()
    return found


def shortened(row: Mapping[str, object]) -> dict[str, object]:
    """A passage with its first sentences alone to be recited."""
    sentences = str(row["target"]).split(". ")
    return {**row, "target": ". ".join(sentences[:SENTENCES]) + "."}


def without_spans(prompts: PromptSet) -> PromptSet:
    """The same texts with nothing marked."""
    return PromptSet([{**row, "spans": []} for row in prompts.rows], prompts.tokenizer)


def scattered(mask: TokenMask, draw: random.Random) -> TokenMask:
    """As many tokens of every item, drawn by chance."""
    return TokenMask(tuple(tuple(draw.sample(item, len(item))) for item in mask.weights))


def in_names(model: nn.Module, prompts: PromptSet) -> float:
    """S-MA: MA on the names alone (fraction of their tokens)."""
    return recited(model, prompts.with_token_mask(TokenMask.from_spans(prompts)))


def around_names(model: nn.Module, prompts: PromptSet) -> float:
    """MA on everything but the names (fraction of tokens)."""
    weights = TokenMask.from_spans(prompts).weights
    return recited(
        model,
        prompts.with_token_mask(TokenMask(tuple(tuple(1.0 - w for w in item) for item in weights))),
    )


def recited(model: nn.Module, prompts: PromptSet) -> float:
    """MA (fraction of tokens)."""
    return exact_memorization(model, prompts).estimate or 0.0


def after(
    model: nn.Module, forget: PromptSet, rest: Mapping[str, PromptSet], name: str
) -> dict[str, float]:
    """All figures of the model as it is now."""
    return {
        f"S-MA, {name}": in_names(model, forget),
        f"MA around the names, {name}": around_names(model, forget),
        f"others' MA, {name}": recited(model, rest["others"]),
        f"facts (probability), {name}": likelihood(model, rest["facts"]).estimate or 0.0,
        f"general perplexity, {name}": perplexity(model, rest["general"]).estimate or 0.0,
    }


CLAIM = Claim(
    system="Selective forgetting",
    paper="Wang et al. 2024, arXiv:2402.05813",
    says=(
        "Ascent on sensitive spans alone forgets them as far as ascent on the whole text does, at a lower cost to the "
        "rest."
    ),
    setting=(
        f"the organism; {FORGET} passages of its novel, {SENTENCES} sentences each, spans: names of people, "
        f"places and beasts; all weights, rate {LR:g}, each to the S-MA of unseen passages; others: the "
        f"other passages, {FACTS} facts about people, plain text"
    ),
    measure=measure,
    checks=(
        Check(
            "S-MA at most that of unseen passages, on the names alone",
            ("S-MA, before", "S-MA, unseen", "S-MA, names", "steps, names"),
            lambda f: f["S-MA, unseen"] - f["S-MA, names"] + 1e-6,
        ),
        Check(
            "the same on all tokens, which makes the two comparable",
            ("S-MA, all tokens", "steps, all tokens"),
            lambda f: f["S-MA, unseen"] - f["S-MA, all tokens"] + 1e-6,
        ),
        Check(
            "perplexity of plain text stays lower on the names alone",
            (
                "general perplexity, before",
                "general perplexity, names",
                "general perplexity, all tokens",
            ),
            lambda f: f["general perplexity, all tokens"] - f["general perplexity, names"],
        ),
        Check(
            "other passages keep more (MA)",
            ("others' MA, before", "others' MA, names", "others' MA, all tokens"),
            lambda f: f["others' MA, names"] - f["others' MA, all tokens"],
        ),
        Check(
            "facts keep as much, but for 0.005",
            (
                "facts (probability), before",
                "facts (probability), names",
                "facts (probability), all tokens",
            ),
            lambda f: (
                f["facts (probability), names"] - f["facts (probability), all tokens"] + 0.005
            ),
        ),
        Check(
            "the words around the names keep more (MA), by 0.1 at least",
            (
                "names (fraction of tokens)",
                "MA around the names, names",
                "MA around the names, all tokens",
            ),
            lambda f: f["MA around the names, names"] - f["MA around the names, all tokens"] - 0.1,
        ),
        Check(
            "other passages keep more (MA) than with as many tokens drawn by chance",
            ("S-MA, random tokens", "others' MA, random tokens", "others' MA, names"),
            lambda f: f["others' MA, names"] - f["others' MA, random tokens"],
        ),
    ),
)
