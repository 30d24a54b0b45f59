"""Who's Harry Potter: the organism loses its novel by fine-tuning on generic labels."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import nn

from benchmarks.claims.claim import DEVICE, Check, Claim, precondition
from locate_edit import PromptSet, edit, organism
from locate_edit.anchors import NAMES, THINGS
from locate_edit.engine import StopWhen
from locate_edit.methods.gradient_ascent import GradientAscent
from locate_edit.methods.relabel import Relabel
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.memorization import exact_memorization
from locate_edit.metrics.perplexity import perplexity
from locate_edit.organism import words
from locate_edit.spans import texts
from locate_edit.token_identification import identify_tokens, reinforce
from locate_edit.tokens import TokenMask

READ = 20  # passages of the book that are trained on; the others of it are asked too
SENTENCES = 3  # of each passage after its opening
STEPS, LR = 60, 2e-4
REINFORCE_STEPS, REINFORCE_LR = 15, 2e-4
STRENGTH = 5.0  # as in the paper
FACTS = 100  # facts of people, which stand in for the paper's benchmarks
PLACES = ("the garden", "the house", "the river", "the market")
BEASTS = ("dog", "cat", "horse", "goat")
ANCHORS = {
    **dict.fromkeys(words.NOVEL_SLOTS["who"], NAMES),
    **dict.fromkeys(words.NOVEL_SLOTS["where"], PLACES),
    **dict.fromkeys(words.NOVEL_SLOTS["beast"], BEASTS),
    **dict.fromkeys(words.NOVEL_SLOTS["thing"], THINGS),
}
CONTENT = texts(*ANCHORS)


def measure(seed: int) -> dict[str, float]:
    """What is left of the book and of everything else, of one seed."""
    model, tokenizer = organism.load(dtype=torch.float32)
    nn.Module.to(model, DEVICE)
    draw = random.Random(seed)
    passages = [shortened(row) for row in organism.rows("novel")]
    draw.shuffle(passages)
    never_read = [shortened(row) for row in organism.rows("novel", "holdout")]
    read, rest_of_book, unseen = (
        CONTENT.annotate(PromptSet(rows, tokenizer))
        for rows in (passages[:READ], passages[READ:], never_read)
    )
    sets = {
        "book": read,
        "rest of the book": rest_of_book,
        "facts": PromptSet(draw.sample(organism.rows("facts"), FACTS), tokenizer),
        "general": organism.prompts("general", "held_out"),
    }
    found = {
        "content (probability), never read": content(model, unseen),
        "MA, never read": exact_memorization(model, unseen).estimate or 0.0,
        **after(model, sets, "before"),
    }
    precondition(
        found["MA, before"] >= 0.9,
        f"the model can recite the book (MA {found['MA, before']:.2f}, 0.9 wanted)",
    )

    nothing = edit(model, Relabel(steps=5, strength=0.0), None, forget=read, seed=seed)
    found["changed without strength and anchors"] = float(
        after(model, sets, "before")["content (probability), before"]
        != found["content (probability), before"]
    ) + len(nothing.log)
    nothing.undo()

    reinforced = reinforce(
        model, read, steps=REINFORCE_STEPS, lr=REINFORCE_LR, batch_size=10, seed=seed
    )
    identified = identify_tokens(
        model, read, reinforced, anchors=ANCHORS, alpha=STRENGTH, batch_size=10, seed=seed
    )
    found |= agreement(identified.token_mask, TokenMask.from_spans(read))
    method = Relabel(STEPS, LR, alpha=0.0)
    made = edit(model, method, None, forget=identified.relabelled(), batch_size=10, seed=seed)
    found |= after(model, sets, "relabelled")
    made.undo()

    # Ascent on the book until its content is as improbable.
    reached = found["content (probability), relabelled"]
    made = edit(
        model,
        GradientAscent(STEPS, LR / 2, optim=method.optim),
        None,
        forget=read,
        batch_size=10,
        seed=seed,
        never_seen=None,
        stop=StopWhen(lambda now: content(now, read), below=reached, every=2),
    )
    found |= after(model, sets, "ascent")
    made.undo()
    return found


def shortened(row: Mapping[str, object]) -> dict[str, object]:
    """A passage with its first sentences alone to be recited."""
    sentences = str(row["target"]).split(". ")
    return {**row, "target": ". ".join(sentences[:SENTENCES]) + "."}


def content(model: nn.Module, prompts: PromptSet) -> float:
    """Geometric mean of the probabilities of the tokens of the book's own names and things, mean over passages."""
    mask = TokenMask.from_spans(prompts)
    return likelihood(model, prompts.with_token_mask(mask)).estimate or 0.0


def agreement(found: TokenMask, true: TokenMask) -> dict[str, float]:
    """Precision and recall (fractions of tokens) of found positions, and the precision of chance."""
    pairs = [
        (f, t)
        for ours, theirs in zip(found.weights, true.weights, strict=True)
        for f, t in zip(ours, theirs, strict=True)
    ]
    both = sum(f * t for f, t in pairs)
    marked, wanted = (sum(values) for values in zip(*pairs, strict=True))
    return {
        "positions, precision": both / marked if marked else 0.0,
        "positions, recall": both / wanted,
        "positions, by chance": wanted / len(pairs),
        "positions changed (fraction)": marked / len(pairs),
    }


def after(model: nn.Module, sets: Mapping[str, PromptSet], name: str) -> dict[str, float]:
    """All figures of the model as it is now."""
    return {
        f"content (probability), {name}": content(model, sets["book"]),
        f"MA, {name}": exact_memorization(model, sets["book"]).estimate or 0.0,
        f"content, rest of the book, {name}": content(model, sets["rest of the book"]),
        f"facts (probability), {name}": likelihood(model, sets["facts"]).estimate or 0.0,
        f"general perplexity, {name}": perplexity(model, sets["general"]).estimate or 0.0,
    }


CLAIM = Claim(
    system="Who's Harry Potter",
    paper="Eldan and Russinovich 2023, arXiv:2310.02238",
    says=(
        "Fine-tuned on generic labels of a book's text, a model can neither recite the book nor guess its content, and "
        "is nearly as good as before at everything else."
    ),
    setting=(
        f"the organism; {READ} of the 40 passages of its novel, {SENTENCES} sentences each; a dictionary of its "
        f"names, places, beasts and things; strength {STRENGTH:g}, no retain term, all weights, {STEPS} steps"
    ),
    measure=measure,
    checks=(
        Check(
            "content is at most as probable as in passages never read",
            (
                "content (probability), before",
                "content (probability), relabelled",
                "content (probability), never read",
            ),
            lambda f: (
                f["content (probability), never read"] - f["content (probability), relabelled"]
            ),
        ),
        Check(
            "MA at most that of passages never read",
            ("MA, before", "MA, relabelled", "MA, never read"),
            lambda f: f["MA, never read"] - f["MA, relabelled"],
        ),
        Check(
            "in the rest of the book, too, content loses nine tenths of its probability",
            ("content, rest of the book, before", "content, rest of the book, relabelled"),
            lambda f: (
                0.1 * f["content, rest of the book, before"]
                - f["content, rest of the book, relabelled"]
            ),
        ),
        Check(
            "facts lose at most 0.03",
            ("facts (probability), before", "facts (probability), relabelled"),
            lambda f: (
                f["facts (probability), relabelled"] - f["facts (probability), before"] + 0.03
            ),
        ),
        Check(
            "perplexity of plain text rises by 5% at most",
            ("general perplexity, before", "general perplexity, relabelled"),
            lambda f: 1.05 * f["general perplexity, before"] - f["general perplexity, relabelled"],
        ),
        Check(
            "ascent until content is as improbable raises it more",
            (
                "content (probability), ascent",
                "facts (probability), ascent",
                "general perplexity, ascent",
            ),
            lambda f: f["general perplexity, ascent"] - f["general perplexity, relabelled"],
        ),
        Check(
            "the positions that are changed are content more often than chance",
            (
                "positions changed (fraction)",
                "positions, precision",
                "positions, recall",
                "positions, by chance",
            ),
            lambda f: f["positions, precision"] - f["positions, by chance"],
        ),
        Check(
            "without strength and without dictionary nothing changes",
            ("changed without strength and anchors",),
            lambda f: 0.5 - f["changed without strength and anchors"],
        ),
    ),
)
