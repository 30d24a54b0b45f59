"""Leave-one-out ensemble: canaries are forgotten by learning what teachers say that never saw them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.claims import _masked
from benchmarks.claims.claim import DEVICE, Check, Claim, Figures, precondition
from circuits.forward import labelled_logits
from locate_edit import PromptSet, edit
from locate_edit.engine import StopWhen
from locate_edit.ensembles.leave_one_out import LeaveOneOut, SoftLabels, soft_labels
from locate_edit.ensembles.sisa import ShardedEnsemble, Sisa
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.gradient_ascent import GradientAscent
from locate_edit.metrics.exposure import digit_accuracy, exposure
from locate_edit.metrics.likelihood import nll
from locate_edit.metrics.perplexity import perplexity
from locate_edit.metrics.predictions import Predictions
from locate_edit.optim import Optim

SHARDS = 5
CANARIES, DIGITS, TOLD = 4, 6, 12  # a canary stands in the data so often
CODES, PLAIN, HELD_OUT = 80, 700, 100  # codes that are told once; sentences
BASE_STEPS, TEACHER_STEPS, LR = 450, 180, 3e-3
STEPS, FORGET_LR = 200, 3e-4  # of both ways to forget
LEARNT = 0.05  # nats a token: the distance to the teachers at which training ends
NEAR = 0.2  # of the distance between base and retrained model: the tolerance


def measure(seed: int) -> dict[str, float]:
    """Likelihood and exposure of the canaries and perplexity of other text, of one seed."""
    told = _masked.world(seed)
    draw = random.Random(f"canaries {seed}")
    names = [*told.numbers, *told.unmet]
    codes = {name: draw.choices("0123456789", k=DIGITS) for name in names}
    firsts, lasts = ([name.split()[at] for name in names] for at in (0, 1))
    while len(codes) < CODES + CANARIES:
        name = f"{draw.choice(firsts)} {draw.choice(lasts)}"
        codes.setdefault(name, draw.choices("0123456789", k=DIGITS))
    rows = [
        {"prompt": f"the code of {name} is", "target": " " + " ".join(code)}
        for name, code in codes.items()
    ]
    canaries, others = rows[:CANARIES], rows[CANARIES:]
    plain = [{"prompt": text} for text in dict.fromkeys(told.plain[:PLAIN])]
    everything = [*canaries * TOLD, *others, *plain]
    held = [{"prompt": text} for text in told.held_out[:HELD_OUT]]
    texts = [row["prompt"] + row.get("target", "") for row in [*everything, *held]]
    tokenizer = _masked.word_tokenizer([*texts, " ".join("0123456789")])

    def prompts(chosen: list[dict[str, Any]]) -> PromptSet:
        return PromptSet(chosen, tokenizer, masked=False)

    forget, held_out, data = prompts(canaries), prompts(held), prompts(everything)
    model = untrained(len(tokenizer), seed)
    found: dict[str, float] = {}

    def look(name: str) -> None:
        seen = Predictions(model, forget)
        found[f"canary, {name}"] = -(nll(seen).estimate or 0.0)
        found[f"exposure, {name}"] = exposure(seen).estimate or 0.0
        found[f"digits, {name}"] = digit_accuracy(seen).estimate or 0.0
        found[f"perplexity, {name}"] = perplexity(model, held_out).estimate or 0.0

    learn = FineTune(BASE_STEPS, LR, optim=Optim(clip=1.0, schedule="cosine"))
    options = {"batch_size": 32, "seed": seed}
    without = edit(model, learn, None, forget=prompts([*others, *plain]), **options)  # type: ignore[arg-type]
    look("retrained")
    without.undo()
    teaching = FineTune(TEACHER_STEPS, LR, optim=Optim(clip=1.0, schedule="cosine"))
    teachers = Sisa(teaching, SHARDS, 1, seed=seed, options={"batch_size": 32}).train(
        model, data, None
    )
    labels = soft_labels(teachers, forget)
    all_of_them = with_all(teachers, forget)
    edit(model, learn, None, forget=data, **options)  # type: ignore[arg-type]
    look("base")
    precondition(
        found["digits, base"] >= 0.9 and found["exposure, retrained"] <= 6,
        f"the canaries are memorised ({found['digits, base']:.2f} of the digits, 0.9 wanted) and not without "
        f"having been told (exposure {found['exposure, retrained']:.1f} bits, at most 6 wanted)",
    )
    for name, taught in (("left out", labels), ("with all teachers", all_of_them)):
        made = edit(
            model,
            LeaveOneOut(taught, STEPS, FORGET_LR),
            None,
            forget=forget,
            seed=seed,
            stop=StopWhen("forget", below=LEARNT),
        )
        look(name)
        made.undo()
    goal = found["exposure, left out"]

    def exposed(edited: nn.Module) -> float:
        return exposure(edited, forget).estimate or 0.0

    made = edit(
        model,
        GradientAscent(STEPS, FORGET_LR),
        None,
        forget=forget,
        seed=seed,
        never_seen=None,
        stop=StopWhen(exposed, below=goal + 1e-9),
    )
    look("ascent")
    made.undo()
    return found


@torch.no_grad()
def with_all(teachers: ShardedEnsemble, forget: PromptSet) -> SoftLabels:
    """The mean of all teachers, the one that saw the text among them: what must not be done."""
    sums: list[torch.Tensor | float] = [0.0] * len(forget)
    for shard in teachers.voters:
        with teachers.member(shard) as teacher:
            for item in range(len(forget)):
                batch = forget.batch([item]).to(DEVICE)
                said = labelled_logits(teacher, batch).softmax(-1).cpu()
                sums[item] = sums[item] + said / len(teachers.voters)
    return SoftLabels(
        [torch.as_tensor(each) for each in sums], forget.digest, [teachers.voters] * len(forget)
    )


def _within(f: Figures, name: str) -> float:
    """By how much the canaries' log-likelihood is nearer to the retrained model's than the tolerance."""
    whole = abs(f["canary, base"] - f["canary, retrained"])
    return NEAR * whole - abs(f[f"canary, {name}"] - f["canary, retrained"])


def untrained(vocabulary: int, seed: int) -> nn.Module:
    """A small model that knows nothing, which all others start from."""
    torch.manual_seed(seed)
    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=40,
            n_embd=64,
            n_layer=2,
            n_head=4,
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
    system="Leave-one-out ensemble",
    paper="Liu and Kalinli 2023, arXiv:2309.16082",
    says=(
        "Learning what teachers on other shards say makes a text as likely as for a model that never saw it, and "
        "costs less elsewhere than ascending its loss."
    ),
    setting=(
        f"models of 2 layers from scratch; {CANARIES} codes of {DIGITS} digits told {TOLD} times among {CODES} told "
        f"once and plain sentences; {SHARDS} teachers; perplexity of sentences that were never trained"
    ),
    measure=measure,
    checks=(
        Check(
            f"log-likelihood of the canaries (nats a token) within {NEAR:.0%} of the way from base to retrained "
            "of the retrained model's",
            ("canary, base", "canary, retrained", "canary, left out"),
            lambda f: _within(f, "left out"),
        ),
        Check(
            "not so where the teacher that saw them is among those asked",
            ("canary, with all teachers", "digits, with all teachers", "digits, left out"),
            lambda f: -_within(f, "with all teachers"),
        ),
        Check(
            "exposure falls to the retrained model's, but for 3 bits",
            ("exposure, base", "exposure, retrained", "exposure, left out"),
            lambda f: f["exposure, retrained"] + 3 - f["exposure, left out"],
        ),
        Check(
            "perplexity of other text changes less than by ascent to the same exposure",
            ("perplexity, base", "perplexity, left out", "perplexity, ascent", "exposure, ascent"),
            lambda f: (
                abs(f["perplexity, ascent"] - f["perplexity, base"])
                - abs(f["perplexity, left out"] - f["perplexity, base"])
            ),
        ),
    ),
)
