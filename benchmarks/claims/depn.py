"""Privacy neurons: zeroing the neurons that many phone numbers vote for, in a small masked model trained for it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from benchmarks.claims import _masked
from benchmarks.claims.claim import Check, Claim, precondition
from circuits import ComponentMask
from locate_edit import PromptSet, edit
from locate_edit.locate.privacy_neurons import PrivacyNeurons
from locate_edit.methods.zero_neurons import ZeroNeurons
from locate_edit.metrics.exposure import digit_accuracy, exposure
from locate_edit.metrics.perplexity import perplexity
from locate_edit.metrics.predictions import Predictions

NEURONS, MORE = 60, 200  # of 1024
RANDOM = 3  # draws of the control
STEPS = 10  # points on the path; 20 in the paper


def measure(seed: int) -> dict[str, float]:
    """Exposure of the numbers and perplexity of other text, with and without the neurons, of one seed."""
    model, tokenizer, told = _masked.load(seed)
    names = list(told.numbers)
    rows = [
        _masked.number_rows({name: told.numbers[name]}, at % len(_masked.TEMPLATES))[0]
        for at, name in enumerate(names)
    ]
    numbers = _masked.prompts(rows, tokenizer)
    plain = _masked.prompts(_masked.plain_rows(told.held_out[:40]), tokenizer)
    other = _masked.prompts(_masked.plain_rows(told.plain[:40]), tokenizer)
    found = after(model, numbers, plain, "before")
    precondition(
        found["exposure, before"] > 10 and found["digits, before"] >= 0.8,
        f"the numbers are memorised (exposure {found['exposure, before']:.1f} bits, more than 10 wanted; "
        f"{found['digits, before']:.2f} of the digits right, 0.8 wanted)",
    )
    scores = PrivacyNeurons(STEPS)(model, numbers, batch_size=64)
    gaps = scores.provenance["completeness_gap"]
    parts = [values.sum(-1) for values in scores.values.values()]
    # By how much the scores of a layer miss what the probability loses without it, of all layers and numbers together.
    missed = sum(abs(gap) for item in gaps for gap in item)
    found["completeness gap"] = missed / sum(float(part.abs().sum()) for part in parts)
    for z, name in ((NEURONS, "edited"), (MORE, f"edited, {MORE}")):
        mask = scores.vote(above=0.1, share=1 / len(numbers), keep=z)
        found |= edited(model, mask, "zero", numbers, other, plain, name)
        drawn = [mask.random_like(seed * RANDOM + i, exclude_self=True) for i in range(RANDOM)]
        each = [edited(model, one, "zero", numbers, other, plain, "") for one in drawn]
        for figure in each[0]:
            label = figure.replace(", ", f", {name.replace('edited', 'random')}")
            found[label] = sum(one[figure] for one in each) / RANDOM
    chosen = scores.vote(above=0.1, share=1 / len(numbers), keep=NEURONS)
    found |= edited(model, chosen, "unknown", numbers, other, plain, "unknown token")
    found |= edited(model, chosen, "mean", numbers, other, plain, "mean")
    return found


def edited(
    model: nn.Module,
    mask: ComponentMask,
    to: str,
    numbers: PromptSet,
    other: PromptSet,
    plain: PromptSet,
    name: str,
) -> dict[str, float]:
    """The figures with the neurons overwritten (means are those on ``other``); the model is as before afterwards."""
    made = edit(model, ZeroNeurons(to), mask, forget=numbers, retain=other)  # type: ignore[arg-type]
    found = after(model, numbers, plain, name)
    made.undo()
    return found


def after(model: nn.Module, numbers: PromptSet, plain: PromptSet, name: str) -> dict[str, float]:
    """Exposure (bits, the paper's estimator), digits right (fraction) and perplexity of other text."""
    seen = Predictions(model, numbers, batch_size=64)
    return {
        f"exposure, {name}": exposure(seen, estimator="depn").estimate or 0.0,
        f"digits, {name}": digit_accuracy(seen).estimate or 0.0,
        f"perplexity, {name}": perplexity(model, plain).estimate or 0.0,
    }


def _within(f: Mapping[str, float], name: str) -> float:
    return 1.03 * f["perplexity, before"] - f[f"perplexity, {name}"]


CLAIM = Claim(
    system="DEPN",
    paper="Wu et al. 2023, arXiv:2310.20138",
    says=(
        "Zeroing the neurons that most private strings vote for lowers the exposure of phone numbers more than "
        "zeroing random ones, and the model stays as good elsewhere."
    ),
    setting=(
        f"masked model of 4 layers and 1024 neurons trained on {_masked.NUMBERS} numbers of {_masked.DIGITS} digits; "
        f"integrated gradients of {STEPS} steps, votes at a tenth of the largest, {NEURONS} neurons; random: as many "
        f"of each layer, mean of {RANDOM} draws; perplexity of sentences that were never trained"
    ),
    measure=measure,
    checks=(
        Check(
            f"exposure (bits) below that with random neurons of the same layers, {NEURONS} neurons",
            ("exposure, before", "exposure, edited", "exposure, random"),
            lambda f: f["exposure, random"] - f["exposure, edited"],
        ),
        Check(
            f"the same, {MORE} neurons",
            (f"exposure, edited, {MORE}", f"exposure, random, {MORE}"),
            lambda f: f[f"exposure, random, {MORE}"] - f[f"exposure, edited, {MORE}"],
        ),
        Check(
            "exposure falls by a third at least (in the paper from 15.7 to 9.8)",
            ("exposure, before", "exposure, edited"),
            lambda f: 2 / 3 * f["exposure, before"] - f["exposure, edited"],
        ),
        Check(
            "fewer digits are right than with random neurons",
            ("digits, before", "digits, edited", "digits, random"),
            lambda f: f["digits, random"] - f["digits, edited"],
        ),
        Check(
            f"perplexity of other text at most 3% higher, {NEURONS} neurons",
            ("perplexity, before", "perplexity, edited", "perplexity, random"),
            lambda f: _within(f, "edited"),
        ),
        Check(
            "exposure below that with random neurons also where the unknown token is written instead",
            ("exposure, unknown token", "perplexity, unknown token"),
            lambda f: min(
                f["exposure, random"] - f["exposure, unknown token"],
                _within(f, "unknown token"),
            ),
        ),
        Check(
            "and where the neurons are held at their mean",
            ("exposure, mean", "perplexity, mean"),
            lambda f: min(f["exposure, random"] - f["exposure, mean"], _within(f, "mean")),
        ),
        Check(
            "the scores of a layer add up to what the probability loses without it, but for 10%",
            ("completeness gap",),
            lambda f: 0.1 - f["completeness gap"],
        ),
    ),
)
