"""EUL on the organism's people: an adapter for each request, and both requests' adapters fused."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.claims.claim import DEVICE, Check, Claim, Figures, precondition
from circuits.forward import labelled_logits
from locate_edit import Edit, PromptSet, edit, organism
from locate_edit.fusion import fuse
from locate_edit.losses import kl_divergence, per_item_mean, per_item_sum
from locate_edit.methods.eul import EUL

PEOPLE = 5  # a request
KEPT, TESTED, UNSEEN = (
    20,
    25,
    15,
)  # people: retained in training, retained and only tested, never met
METHOD = EUL(steps=200)
BATCH = 8


def measure(seed: int) -> dict[str, float]:
    """Accuracies (%) and distances (nats a token) of one seed: who makes up the requests, and who is kept."""
    loaded, tokenizer = organism.load(dtype=torch.float32)
    model = nn.Module.to(loaded, DEVICE)
    oracle = nn.Module.to(organism.load("oracle", dtype=torch.float32)[0], DEVICE)
    other = nn.Module.to(organism.load("oracle2", dtype=torch.float32)[0], DEVICE)
    draw = random.Random(seed)

    def people(split: str, *sizes: int) -> list[PromptSet]:
        rows = organism.rows("facts", split)
        names = draw.sample(sorted({row["group"] for row in rows}), sum(sizes))
        parts = []
        for size in sizes:
            chosen, names = set(names[:size]), names[size:]
            part = [row for row in rows if row["group"] in chosen]
            parts.append(PromptSet(part, tokenizer, name=f"facts {split}"))
        return parts

    one, two = people("forget10", PEOPLE, PEOPLE)
    kept, tested = people("retain", KEPT, TESTED)
    (unseen,) = people("holdout", UNSEEN)
    both = one + two

    found = {
        "forget, base": accuracy(model, both),
        "test, base": accuracy(model, tested),
        "forget, retrained": accuracy(oracle, both),
        "nll, retrained": loss(oracle, both),
        "distance, base": distance(oracle, model, both),
        "distance, retrained again": distance(oracle, other, both),
    }
    lowest = min(found["forget, base"], found["test, base"])
    precondition(lowest >= 95, f"the model knows the facts ({lowest:.0f}% right, 95 wanted)")
    precondition(
        found["forget, retrained"] <= 40,
        f"the retrained model does not know the requests ({found['forget, retrained']:.0f}% right, at most 40 wanted)",
    )
    plain = everything(model, both)

    def requested(prompts: PromptSet) -> Edit:
        return edit(
            model, METHOD, None, forget=prompts, retain=kept, never_seen=unseen, batch_size=BATCH, seed=seed
        )  # fmt: skip

    first = requested(one)
    found["request 1, its adapter"] = accuracy(model, one)
    found["test, its adapter"] = accuracy(model, tested)
    with first.off():
        identical = torch.equal(everything(model, both), plain)
    first.undo()
    last = requested(two)
    found |= {f"request {n}, last adapter": accuracy(model, p) for n, p in ((1, one), (2, two))}
    found["test, last adapter"] = accuracy(model, tested)
    last.undo()
    with fuse([first, last], model).applied(model):
        found |= {f"request {n}, fused": accuracy(model, p) for n, p in ((1, one), (2, two))}
        found["test, fused"] = accuracy(model, tested)
        found["nll, fused"] = loss(model, both)
        found["distance, fused"] = distance(oracle, model, both)
    with fuse([first, last], model, ridge=1e-6).applied(model):
        found |= {f"request {n}, by formula": accuracy(model, p) for n, p in ((1, one), (2, two))}
        found["test, by formula"] = accuracy(model, tested)
    found["off equals base (1: bit for bit)"] = float(
        identical and torch.equal(everything(model, both), plain)
    )
    return found


@torch.no_grad()
def everything(model: nn.Module, prompts: PromptSet) -> Tensor:
    """Logits at every scored token, `label vocab`."""
    return torch.cat([labelled_logits(model, b.to(DEVICE)) for b in prompts.batches(BATCH)])


@torch.no_grad()
def accuracy(model: nn.Module, prompts: PromptSet) -> float:
    """Share of prompts (%) whose target is the greedy continuation."""
    right = 0
    for batch in prompts.batches(32):
        there = batch.to(DEVICE)
        wrong = labelled_logits(model, there).argmax(-1) != there.label
        right += int((per_item_sum(wrong.float(), there.item, len(batch.items)) == 0).sum())
    return 100 * right / len(prompts)


@torch.no_grad()
def loss(model: nn.Module, prompts: PromptSet) -> float:
    """Negative log-likelihood a token (nats), mean over prompts."""
    total = 0.0
    for batch in prompts.batches(32):
        there = batch.to(DEVICE)
        costs = -labelled_logits(model, there).log_softmax(-1).gather(1, there.label[:, None])[:, 0]
        total += float(per_item_mean(costs, there.item, len(batch.items)).sum())
    return total / len(prompts)


@torch.no_grad()
def distance(oracle: nn.Module, model: nn.Module, prompts: PromptSet) -> float:
    """KL(oracle || model) a scored token (nats), mean over prompts."""
    total = 0.0
    for batch in prompts.batches(32):
        there = batch.to(DEVICE)
        gap = kl_divergence(labelled_logits(oracle, there), labelled_logits(model, there))
        total += float(per_item_mean(gap, there.item, len(batch.items)).sum())
    return total / len(prompts)


def _lower(request: int) -> Callable[[Figures], float]:
    return lambda f: f[f"request {request}, last adapter"] - f[f"request {request}, fused"]


CLAIM = Claim(
    system="EUL",
    paper="Chen and Yang 2023, arXiv:2310.20150",
    says="An adapter makes the model forget a request at next to no cost elsewhere, and the fused adapters of two "
    "requests forget more of both than the last single one.",
    setting=f"the organism, facts of {PEOPLE} people a request, {METHOD.steps} steps, adapters of 0.5% of the "
    f"parameters; tested on {TESTED} people that no training saw",
    measure=measure,
    checks=(
        Check(
            "accuracy on a request (%) falls by at least 30 points with its adapter (paper: 34)",
            ("forget, base", "request 1, its adapter", "forget, retrained"),
            lambda f: f["forget, base"] - f["request 1, its adapter"] - 30,
        ),
        Check(
            "test accuracy (%) falls by less than 1 point",
            ("test, base", "test, its adapter"),
            lambda f: 1 - (f["test, base"] - f["test, its adapter"]),
        ),
        Check(
            "fused: request 1 (%) is lower than with the last adapter",
            ("request 1, last adapter", "request 1, fused"),
            _lower(1),
        ),
        Check(
            "fused: request 2 (%) is lower than with the last adapter",
            ("request 2, last adapter", "request 2, fused"),
            _lower(2),
        ),
        Check(
            "fused: test accuracy (%) falls by less than 1 point",
            ("test, last adapter", "test, fused"),
            lambda f: 1 - (f["test, base"] - f["test, fused"]),
        ),
        Check(
            "fused by the formula alone, with next to no pull towards the mean: test accuracy (%) falls by less than "
            "1 point",
            ("test, by formula", "request 1, by formula", "request 2, by formula"),
            lambda f: 1 - (f["test, base"] - f["test, by formula"]),
        ),
        Check(
            "fused: nearer to the retrained model on both requests (nats a token) than the base model is",
            ("distance, base", "distance, fused", "distance, retrained again"),
            lambda f: f["distance, base"] - f["distance, fused"],
        ),
        Check(
            "fused: no over-forgetting, loss (nats a token) at most 1 above the retrained model's",
            ("nll, fused", "nll, retrained"),
            lambda f: f["nll, retrained"] + 1 - f["nll, fused"],
        ),
        Check(
            "adapters off: the same bits as before",
            ("off equals base (1: bit for bit)",),
            lambda f: f["off equals base (1: bit for bit)"] - 0.5,
        ),
    ),
)
