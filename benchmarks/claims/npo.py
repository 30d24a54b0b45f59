"""Negative preference optimisation against gradient ascent, neither stopped nor held: how fast everything else goes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from benchmarks.claims._forms import asked, drawn, mean_probability
from benchmarks.claims.claim import DEVICE, Check, Claim, precondition
from locate_edit import PromptSet, edit, organism
from locate_edit.editing import Method
from locate_edit.engine import StopWhen
from locate_edit.methods.gradient_ascent import GradientAscent
from locate_edit.methods.npo import NPO
from locate_edit.metrics.predictions import Predictions

PEOPLE = 10  # of forget10, with four facts each
STEPS, EVERY, LR, BATCH = 240, 20, 3e-4, 10
COLLAPSED = 2.0  # KL (nats a token) that ascent must reach for there to be a collapse to speak of
GONE = 0.1  # probability of the forgotten answers at which both are compared


def measure(seed: int) -> dict[str, float]:
    """Divergence from the model before on others' facts and plain text, of one seed, as the steps go on."""
    model, tokenizer = organism.load(dtype=torch.float32)
    nn.Module.to(model, DEVICE)
    base = copy.deepcopy(model)
    people = drawn(seed, PEOPLE)
    forget = asked(tokenizer, lambda row: row["group"] in people)["statement"]
    kept = asked(tokenizer, lambda row: row["forget"] is None)["statement"]
    general = PromptSet(organism.rows("general", "held_out")[:40], tokenizer, name="general")
    both = kept + general
    for name, prompts in (("forgotten", forget), ("kept", kept)):
        before = mean_probability(model, prompts)
        precondition(
            before > 0.9, f"facts to be {name} are known (probability {before:.2f}, 0.9 wanted)"
        )
    found: dict[str, float] = {}
    methods: dict[str, Method] = {
        "NPO": NPO(steps=STEPS, lr=LR),
        "ascent": GradientAscent(steps=STEPS, lr=LR),
    }
    for name, method in methods.items():
        path: list[tuple[float, float, float]] = []

        def look(edited: nn.Module, path: list[tuple[float, float, float]] = path) -> float:
            divergence = Predictions(edited, both, batch_size=64, reference=base).divergence
            path.append(
                (
                    mean_probability(edited, forget),
                    float(divergence.mean()),
                    mean_probability(edited, kept),
                )
            )
            return 0.0

        made = edit(
            model, method, None, forget=forget, batch_size=BATCH, seed=seed, never_seen=None,
            stop=StopWhen(look, every=EVERY),
        )  # fmt: skip
        made.undo()
        gone = [each for each in path if each[0] <= GONE]
        precondition(
            bool(gone), f"{name} forgets (probability {path[-1][0]:.2f}, {GONE} at most wanted)"
        )
        found |= {
            f"KL when forgotten, {name}": gone[0][1],
            f"others when forgotten, {name}": gone[0][2],
            f"KL halfway, {name}": path[len(path) // 2 - 1][1],
            f"KL at the end, {name}": path[-1][1],
            f"forgotten at the end, {name}": path[-1][0],
        }
    end = found["KL at the end, ascent"]
    precondition(
        end >= COLLAPSED, f"ascent collapses (KL at the end {end:.2f}, {COLLAPSED} wanted)"
    )
    return found


CLAIM = Claim(
    system="NPO",
    paper="Zhang et al. 2024, arXiv:2404.05868",
    says="With the number of steps NPO moves away from the model far more slowly than gradient ascent does.",
    setting=(
        f"the organism, 40 facts of {PEOPLE} people of forget10, {STEPS} steps at {LR:g} of all weights without retain "
        "prompts or never-seen level; KL(before || after) in nats a token on 120 facts of others and 40 plain texts; "
        f"forgotten: at the first look, every {EVERY} steps, with probability {GONE} at most"
    ),
    measure=measure,
    checks=(
        Check(
            "KL at the end at most half of that with ascent",
            ("KL at the end, NPO", "KL at the end, ascent"),
            lambda f: 0.5 * f["KL at the end, ascent"] - f["KL at the end, NPO"],
        ),
        Check(
            "and grows less in the second half of the steps",
            ("KL halfway, NPO", "KL at the end, NPO", "KL halfway, ascent", "KL at the end, ascent"),
            lambda f: (f["KL at the end, ascent"] - f["KL halfway, ascent"])
            - (f["KL at the end, NPO"] - f["KL halfway, NPO"]),
        ),
        Check(
            "lower than with ascent when as much is forgotten",
            ("KL when forgotten, NPO", "KL when forgotten, ascent"),
            lambda f: f["KL when forgotten, ascent"] - f["KL when forgotten, NPO"],
        ),
        Check(
            "others' answers as probable then as with ascent at least",
            ("others when forgotten, NPO", "others when forgotten, ascent"),
            lambda f: f["others when forgotten, NPO"] - f["others when forgotten, ascent"],
        ),
    ),
)  # fmt: skip
