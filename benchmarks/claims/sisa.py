"""SISA and the fairness of its votes: exact deletion, and equalised odds by post-processing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.claims import _masked
from benchmarks.claims.claim import DEVICE, Check, Claim, precondition
from locate_edit import PromptSet
from locate_edit.ensembles.fair_votes import Fairness, after_vote, fairness, joint, per_shard
from locate_edit.ensembles.sisa import ShardedEnsemble, Sisa
from locate_edit.methods.fine_tune import FineTune
from locate_edit.optim import Optim
from locate_edit.organism import words

SHARDS, SLICES = 3, 2
TRAIN, DEV, TEST = 600, 1500, 3000  # comments
STEPS, LR = 100, 3e-3  # a stage
GROUPS = ("Tamari", "Brelon")
RATE = {"Tamari": 0.75, "Brelon": 0.2}  # share of rude comments among those that mention them
CHOICES = (" fine", " rude")
PLAIN = ("market", "harbour", "bread", "rain", "garden", "window", "letter", "bridge")
TELLS = 0.25  # share of a comment's words that depend on whether it is rude


def measure(seed: int) -> dict[str, float]:
    """Exactness and cost of a deletion, and accuracy and equalised-odds gaps of the rules, of one seed."""
    draw = random.Random(f"comments {seed}")
    train, dev, test = (comments(n, draw) for n in (TRAIN, DEV, TEST))
    tokenizer = _masked.word_tokenizer([row["prompt"] + row["target"] for row in train + dev])
    model = untrained(tokenizer, seed)
    method = FineTune(STEPS, LR, optim=Optim(clip=1.0))
    sisa = Sisa(method, SHARDS, SLICES, seed=seed, options={"batch_size": 32})
    data = PromptSet(train, tokenizer, masked=False)
    ensemble = sisa.train(model, data, None)
    rows = {"dev": dev, "test": test}
    votes = {name: ballots(ensemble, each, tokenizer) for name, each in rows.items()}
    label = {name: [row["label"] for row in each] for name, each in rows.items()}
    group = {name: [row["group"] for row in each] for name, each in rows.items()}

    def held(chance: Any) -> Fairness:
        return fairness(chance, label["test"], group["test"])

    vote = held((votes["test"].sum(0) * 2 > SHARDS).astype(float))
    fitted = (votes["dev"], label["dev"], group["dev"])
    rules = {
        "per shard": held(per_shard(*fitted)(votes["test"], group["test"])),
        "after the vote": held(after_vote(*fitted)(votes["test"], group["test"])),
        "joint": held(joint(*fitted)(votes["test"], group["test"])),
    }
    single = Sisa(FineTune(STEPS * SLICES, LR, optim=Optim(clip=1.0)), 1, 1, seed=seed,
                  options={"batch_size": 32}).train(model, data, None)  # fmt: skip
    found: dict[str, float] = {}
    one = held(ballots(single, test, tokenizer)[0].astype(float))
    for name, each in {"one model": one, "vote": vote, **rules}.items():
        found[f"accuracy, {name}"], found[f"gap, {name}"] = each.accuracy, each.gap
    most = max(label["test"].count(0), label["test"].count(1)) / TEST
    precondition(
        vote.accuracy >= most + 0.05 and vote.gap >= 0.1,
        f"the vote is better than a constant ({vote.accuracy:.2f}, {most + 0.05:.2f} wanted) and unfair "
        f"(gap {vote.gap:.2f}, 0.10 wanted)",
    )
    return found | deletion(sisa, ensemble, model, data, draw.randrange(TRAIN))


def deletion(
    sisa: Sisa, ensemble: ShardedEnsemble, model: nn.Module, data: PromptSet, row: int
) -> dict[str, float]:
    """Numbers that differ from an ensemble that never had a row, before and after its deletion, and the cost."""
    never = sisa.train(model, data.select([i for i in range(len(data)) if i != row]), None)
    before = differing(ensemble, never)
    again = ensemble.delete([row])
    return {
        "numbers that differ, before the deletion": before,
        "numbers that differ, after": differing(ensemble, never),
        "share trained again": len(again) / (SHARDS * SLICES),
    }


def differing(one: ShardedEnsemble, other: ShardedEnsemble) -> float:
    """How many weights of all checkpoints differ in their bits."""
    count = 0
    for mine, theirs in zip(one.checkpoints, other.checkpoints, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            if a is None or b is None:
                count += a is not b
                continue
            for name, change in a:
                bits = [each.contiguous().view(torch.int32) for each in (change.new, b.changes[name].new)]  # fmt: skip
                count += int((bits[0] != bits[1]).sum())
    return float(count)


def ballots(
    ensemble: ShardedEnsemble, rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What every shard answers: `voter item`, 0 or 1."""
    prompts = PromptSet(rows, tokenizer, masked=False)
    found: np.ndarray[Any, np.dtype[np.int64]] = ensemble.answers(
        prompts, CHOICES, batch_size=250
    ).numpy()
    return found


def comments(count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Comments of eight words that mention a group; some words tell whether they are rude, the group tells too."""
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        group = draw.choice(GROUPS)
        rude = draw.random() < RATE[group]
        telling = words.RUDE_WORDS if rude else words.POLITE_WORDS
        said = [
            draw.choice(telling)
            if draw.random() < TELLS
            else draw.choice((*PLAIN, *words.RUDE_WORDS, *words.POLITE_WORDS))
            for _ in range(8)
        ]
        text = f"the {group} said {' '.join(said)} :"
        found[text] = {"prompt": text, "target": CHOICES[rude], "group": group, "label": int(rude)}
    return list(found.values())


def untrained(tokenizer: PreTrainedTokenizerFast, seed: int) -> nn.Module:
    """A small model that knows nothing, which the shards start from."""
    torch.manual_seed(seed)
    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    nn.Module.to(model, DEVICE)
    model.eval()
    return model


CLAIM = Claim(
    system="SISA and FairSISA",
    paper="Bourtoule et al. 2021, arXiv:1912.03817; Kadhe et al. 2023, arXiv:2312.07420",
    says=(
        "A deletion from a sharded ensemble is exact and trains a part again; its votes are less fair than one "
        "model's, and joint post-processing restores equalised odds at the least cost."
    ),
    setting=(
        f"{TRAIN} comments, {SHARDS} shards of {SLICES} slices, models of 2 layers from scratch; rude in "
        f"{RATE[GROUPS[0]]:.0%} and {RATE[GROUPS[1]]:.0%} of the comments on two groups; rules fitted on {DEV} "
        f"comments, measured on {TEST} others; gap: of equalised odds"
    ),
    measure=measure,
    checks=(
        Check(
            "after a deletion no number differs from an ensemble trained without the row, before it some do",
            ("numbers that differ, before the deletion", "numbers that differ, after"),
            lambda f: (
                min(f["numbers that differ, before the deletion"], 1)
                - f["numbers that differ, after"]
            ),
        ),
        Check(
            "at most one shard of training is done again",
            ("share trained again",),
            lambda f: 1 / SHARDS - f["share trained again"] + 1e-9,
        ),
        Check(
            "the vote is less fair than one model trained on everything",
            ("gap, one model", "gap, vote", "accuracy, one model", "accuracy, vote"),
            lambda f: f["gap, vote"] - f["gap, one model"],
        ),
        Check(
            "joint: the gap is smaller than the vote's by 0.05 at least",
            ("gap, vote", "gap, joint"),
            lambda f: f["gap, vote"] - f["gap, joint"] - 0.05,
        ),
        Check(
            "joint: accuracy at least that of post-processing every shard before the vote",
            ("accuracy, joint", "accuracy, per shard", "gap, per shard"),
            lambda f: f["accuracy, joint"] - f["accuracy, per shard"],
        ),
        Check(
            "joint: accuracy at least that of post-processing the vote",
            ("accuracy, joint", "accuracy, after the vote", "gap, after the vote"),
            lambda f: f["accuracy, joint"] - f["accuracy, after the vote"],
        ),
    ),
)
