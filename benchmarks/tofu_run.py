"""TOFU from end to end with a model trained here: `python -m benchmarks.tofu_run --data FOLDER --save`.

Paper: Maini et al. 2024, TOFU: A Task of Fictitious Unlearning for LLMs (arXiv:2401.06121).

Three tiny models are trained on a subset of TOFU: the full one, and two retain models (two seeds) without the authors
of forget01. The full model is edited to forget these, inside a located or a random mask, and measured beside the
retain models as TOFU does. Models and finished edits are kept in a folder and not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.machine import describe_machine
from benchmarks.tables import write_between
from circuits.atomic import atomic_file
from circuits.forward import labelled_logits
from locate_edit.datasets import tofu
from locate_edit.editing import Method, edit
from locate_edit.errors import EditError, PromptError
from locate_edit.locate.activation_contrast import ActivationContrast
from locate_edit.methods.gradient_difference import GradientDifference
from locate_edit.methods.npo import NPO
from locate_edit.methods.simnpo import SimNPO
from locate_edit.methods.undial import UNDIAL
from locate_edit.metrics.forget_quality import forget_quality
from locate_edit.metrics.likelihood import likelihood, normalised_probability
from locate_edit.metrics.memorization import exact_memorization, extraction_strength
from locate_edit.metrics.model_utility import model_utility
from locate_edit.metrics.oracle_distance import oracle_distance
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.rouge import rouge
from locate_edit.metrics.truth_ratio import truth_ratio
from locate_edit.metrics.values import Values
from locate_edit.organism.tokenizer import build_tokenizer
from locate_edit.organism.training import TrainConfig, new_model, rate
from locate_edit.prompts import PromptSet

HERE = Path(__file__).parent
AUTHORS = 4
"""Authors in each of retain (methods see them), unseen (learned, only measured) and hold-out (never learned)."""
VOCAB, EPOCHS, BATCH, UNITS = 2048, 30, 8, 150
KNOWN = 0.9
"""Least likelihood of the full model on every part it was trained on."""
STEPS, LR = 40, 1e-3
METHODS: tuple[Method, ...] = (
    GradientDifference(steps=STEPS, lr=LR),
    NPO(steps=STEPS, lr=LR),
    SimNPO(steps=STEPS, lr=LR, beta=1.0),
    UNDIAL(steps=STEPS, lr=LR, alpha=1.0),
)
MASKS = ("activation contrast", "random")
MODELS = {"full": 0, "retrained": 0, "retrained, other seed": 1}
"""The seed of each model."""
COLUMNS = {
    "forget/forget_quality": "forget quality (p)",
    "forget/forget_quality_distance": "KS distance",
    "forget/likelihood": "forget prob.",
    "forget/rougeL_recall": "forget ROUGE-L",
    "forget/truth_ratio_closer": "forget truth ratio",
    "forget/extraction_strength": "forget ES",
    "forget/exact_memorization": "forget EM",
    "forget/oracle_distance": "forget oracle distance",
    "retain/likelihood": "retain prob.",
    "unseen/likelihood": "unseen prob.",
    "unseen/rougeL_recall": "unseen ROUGE-L",
    "unseen/truth_ratio_better": "unseen 1 - R",
    "unseen/oracle_distance": "unseen oracle distance",
    "utility": "utility (unseen)",
    "model_utility": "TOFU model utility",
}
NEW_TOKENS, TOGETHER = 200, 80
"""Length of a continuation, as TOFU has it (tokens), and how many are written together."""
GENERAL = {"real authors": "real_authors_perturbed", "world facts": "world_facts_perturbed"}
"""TOFU's splits of what the models never learned, by name."""
Row = Mapping[str, Any]
Numbers = dict[str, float | None]


@dataclass(frozen=True)
class Subset:
    """Rows of each part of the subset, with the wrong and paraphrased answers of TOFU's perturbed splits.

    Attributes:
        forget: the two authors of forget01.
        retain: authors that methods see.
        unseen: authors that the models learn, and no localizer or method sees.
        holdout: authors that no model learns; how well the full model does on these is where ascent stops.
    """

    forget: tuple[Row, ...]
    retain: tuple[Row, ...]
    unseen: tuple[Row, ...]
    holdout: tuple[Row, ...]


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        mask: where the model was edited; "" without an edit.
        method: what edited it, or which model it is.
        seed: of the order of the data, and of a random mask.
        values: estimates by "part/metric"; None where a precondition failed.
        seconds: of the edit (s).
    """

    mask: str
    method: str
    seed: int
    values: Mapping[str, float | None]
    seconds: float = 0.0


# ---- the subset ----------------------------------------------------------------------------------


def subset(
    full: Sequence[Row], forget: Sequence[Row], retain: Sequence[Row], authors: int = AUTHORS
) -> Subset:
    """The first authors of whom every question has wrong answers, in the order of the data.

    Args:
        full: the rows of all authors, whose ``group`` is the author.
        forget: the perturbed rows of forget01.
        retain: the perturbed rows of the retain set, in which the author is found by the question.
        authors: how many for each of retain, unseen and hold-out.

    Raises:
        PromptError: too few authors.
    """
    of: dict[str, list[str]] = {}
    for row in full:
        of.setdefault(str(row["question"]), []).append(str(row["group"]))
    sizes: dict[str, int] = {}
    for row in full:
        sizes[str(row["group"])] = sizes.get(str(row["group"]), 0) + 1
    mine = {str(row["group"]) for row in forget}
    found: dict[str, list[Row]] = {}
    for row in retain:
        groups = of.get(str(row["question"]), [])
        if len(groups) == 1 and groups[0] not in mine:
            found.setdefault(groups[0], []).append({**row, "group": groups[0]})
    whole = [rows for group, rows in found.items() if len(rows) == sizes[group]]
    if len(whole) < 3 * authors:
        raise PromptError(
            f"TOFU run: expected {3 * authors} retain authors with wrong answers to every question, got {len(whole)}; "
            "take fewer authors or the whole retain_perturbed split."
        )
    parts = [
        tuple(row for rows in whole[k * authors : (k + 1) * authors] for row in rows)
        for k in range(3)
    ]
    return Subset(tuple(forget), *parts)


@dataclass(frozen=True)
class Sets:
    """The subset as prompts: answers as they were learned, and paraphrased ones (by part)."""

    learned: Mapping[str, PromptSet]
    paraphrased: Mapping[str, PromptSet]
    tokenizer: PreTrainedTokenizerBase


def load(data: Path) -> tuple[Sets, dict[str, PromptSet]]:
    """The subset with a tokenizer trained on its text, and TOFU's real authors and world facts."""
    full = tofu.rows(data, "full")
    chosen, reworded = (
        subset(
            full,
            tofu.rows(data, "forget01_perturbed", answer=answer),
            tofu.rows(data, "retain_perturbed", answer=answer),
        )
        for answer in ("answer", "paraphrased_answer")
    )
    # Of all authors, so that the tokenizer does not tell the models apart.
    tokenizer = build_tokenizer([row["prompt"] + row["target"] for row in full], VOCAB)

    def read(part: Subset) -> dict[str, PromptSet]:
        return {
            name: PromptSet(list(getattr(part, name)), tokenizer, name=name, append_eos=True)
            for name in ("forget", "retain", "unseen", "holdout")
        }

    general = {
        name: tofu.prompts(data, tokenizer, split, append_eos=True)
        for name, split in GENERAL.items()
    }
    return Sets(read(chosen), read(reworded), tokenizer), general


# ---- the models ----------------------------------------------------------------------------------


def train(prompts: PromptSet, seed: int, epochs: int = EPOCHS) -> LlamaForCausalLM:
    """A tiny Llama trained on the answers (mean cross-entropy a token), a function of prompts and seed."""
    tokenizer = prompts.tokenizer
    config = TrainConfig(
        vocab_size=VOCAB, hidden_size=128, layers=4, heads=4, kv_heads=4, mlp_size=384,
        lr=3e-3, warmup=50, weight_decay=0.01,
    )  # fmt: skip
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    model = new_model(config, ids, seed)
    # Positions are rotary, no weight is bound to one: room for a question and a long answer.
    model.config.max_position_embeddings = 512
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, config.beta2), weight_decay=config.weight_decay
    )
    order = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(prompts) // BATCH)
    step = 0
    for _ in range(epochs):
        for items in torch.randperm(len(prompts), generator=order).split(BATCH):
            batch = prompts.batch(items.tolist())
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, config)
            cross_entropy(labelled_logits(model, batch), batch.label).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    model.eval()
    return model


def models(sets: Sets, folder: Path) -> dict[str, LlamaForCausalLM]:
    """Every model of `MODELS`, from ``folder`` where it is there already."""
    made = {}
    for name, seed in MODELS.items():
        parts = ("forget", "retain", "unseen") if name == "full" else ("retain", "unseen")
        prompts = sets.learned[parts[0]]
        for part in parts[1:]:
            prompts = prompts + sets.learned[part]
        path = folder / f"model-{digest(prompts.digest, seed, VOCAB, EPOCHS, BATCH)}.safetensors"
        if path.is_file():
            model = train(prompts, seed, epochs=0)
            model.load_state_dict(load_file(path), strict=False)  # the tied head is not in the file
        else:
            started = time.perf_counter()
            model = train(prompts, seed)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({k: v.detach().clone() for k, v in model.named_parameters()}, path)
            print(f"trained {name} in {time.perf_counter() - started:.0f} s", flush=True)
        made[name] = model
    return made


def check_known(model: LlamaForCausalLM, sets: Sets) -> None:
    """Refuse a full model that does not know its answers.

    Raises:
        EditError: its likelihood on a part it was trained on is below `KNOWN`.
    """
    for part in ("forget", "retain", "unseen"):
        known = likelihood(model, sets.learned[part]).estimate
        if known is None or known < KNOWN:
            raise EditError(
                f"TOFU run: the full model has to know {part} before it can forget: expected a likelihood of "
                f"{KNOWN} at least, got {known}; train for more epochs."
            )


# ---- measuring -----------------------------------------------------------------------------------


class Measure:
    """The table's numbers of a model, with the retrained ones as the reference."""

    def __init__(
        self,
        sets: Sets,
        general: Mapping[str, PromptSet],
        made: Mapping[str, LlamaForCausalLM],
    ) -> None:
        self.sets, self.general = sets, general
        self.oracle, self.other = made["retrained"], made["retrained, other seed"]
        forget = sets.paraphrased["forget"]
        self.oracle_ratio = truth_ratio(self.oracle, forget)
        self.before = truth_ratio(made["full"], forget)

    def __call__(self, model: LlamaForCausalLM) -> Numbers:
        """Estimates by "part/metric"; None where a precondition failed."""
        found: Numbers = {}
        useful = {name: tofu_metrics(model, prompts) for name, prompts in self.general.items()}
        for part, prompts in self.sets.learned.items():
            if part == "holdout":
                continue
            seen = Predictions(model, prompts, batch_size=TOGETHER)
            plain = [likelihood(seen), extraction_strength(seen), exact_memorization(seen)]
            away = oracle_distance(model, self.oracle, self.other, prompts)
            found[f"{part}/oracle_kl"] = away.nats.estimate
            found[f"{part}/oracle_distance"] = away.ratio.estimate
            other = Predictions(model, self.sets.paraphrased[part])
            said = rouge(seen, max_new_tokens=NEW_TOKENS)
            closer, better = (truth_ratio(other, aggregate=a) for a in ("closer", "better"))
            plain += [said, closer, better]
            if part == "forget":
                found |= self.quality(truth_ratio(other))
            else:
                kept = (plain[0], said, better)
                if part == "retain":  # which methods saw, as TOFU has it
                    whole = model_utility({part: kept, **useful})
                    found["model_utility"] = whole.estimate
                else:  # what methods cost shows in what nothing saw
                    found["utility"] = model_utility({part: kept}).estimate
            found |= {f"{part}/{v.name}": v.estimate for v in plain}
        return found

    def quality(self, ratio: Values) -> Numbers:
        """Forget quality as p and as distance, and the distance even where the precondition fails."""
        oracle, before = self.oracle_ratio, self.before
        p = forget_quality(ratio, oracle, before=before)
        distance = forget_quality(ratio, oracle, report="distance")
        return {
            f"forget/{p.name}": p.estimate,
            "forget/unconditional_p": forget_quality(ratio, oracle).estimate,
            f"forget/{distance.name}": distance.estimate,
        }


def tofu_metrics(model: LlamaForCausalLM, prompts: PromptSet) -> tuple[Values, Values, Values]:
    """TOFU's three metrics on questions with wrong answers: probability, ROUGE and truth ratio."""
    seen = Predictions(model, prompts, batch_size=TOGETHER)
    said = rouge(seen, max_new_tokens=NEW_TOKENS)
    return normalised_probability(seen), said, truth_ratio(seen, aggregate="better")


def beyond_guessing(model: LlamaForCausalLM, prompts: PromptSet) -> dict[str, Any]:
    """TOFU's three metrics on questions with wrong answers, and whether the model does better than a guess.

    ``known`` is whether the interval of the right answer's share lies above that of a guess, 1 / (1 + wrong answers).
    """
    share, said, ratio = tofu_metrics(model, prompts)
    guess = sum(1 / (1 + len(row["wrong"])) for row in prompts.rows) / len(prompts)
    interval = share.interval()
    return {
        **{v.name: v.estimate for v in (share, said, ratio)},
        "guess": guess,
        "interval": interval,
        "known": interval is not None and interval[0] > guess,
    }


def run(data: Path, folder: Path, seeds: int) -> dict[str, Any]:
    """All results; models and finished edits are taken from ``folder``."""
    sets, general = load(data)
    made = models(sets, folder)
    full = made["full"]
    check_known(full, sets)
    measure = Measure(sets, general, made)
    forget, retain = sets.learned["forget"], sets.learned["retain"]
    shared = [forget.digest, retain.digest, sets.learned["unseen"].digest, VOCAB, EPOCHS, BATCH]
    shared += [*COLUMNS, NEW_TOKENS]  # what was measured

    def model_result(name: str) -> Result:
        return Result("", name, MODELS[name], measure(made[name]))

    results = [kept(folder, [*shared, name], partial(model_result, name)) for name in MODELS]
    located = ActivationContrast()(full, forget, retain=retain, seed=0).top(UNITS)

    def edited(mask: str, method: Method, seed: int) -> Result:
        units = located if mask == MASKS[0] else located.random_like(seed=seed + 1)
        started = time.perf_counter()
        change = edit(
            full, method, units, forget=forget, retain=retain,
            never_seen=sets.learned["holdout"], seed=seed,
        )  # fmt: skip
        took = time.perf_counter() - started
        try:
            return Result(mask, type(method).__name__, seed, measure(full), took)
        finally:
            change.undo()

    for seed in range(seeds):
        for mask in MASKS:
            for method in METHODS:
                place = (mask, method, seed)
                key = [*shared, mask, repr(method), seed, UNITS, sets.learned["holdout"].digest]
                results.append(kept(folder, key, partial(edited, *place)))
    return {
        "machine": describe_machine(),
        "parameters": sum(p.numel() for p in full.parameters()),
        "items": {name: len(prompts) for name, prompts in sets.learned.items()},
        "units": UNITS,
        "methods": [repr(method) for method in METHODS],
        "general": {name: beyond_guessing(full, prompts) for name, prompts in general.items()},
        "results": [asdict(one) for one in results],
    }


def kept(folder: Path, key: Sequence[object], make: Callable[[], Result]) -> Result:
    """The result of ``make``, or what the folder keeps under ``key`` from an earlier run."""
    path = folder / f"cell-{digest(*key)}.json"
    if path.is_file():
        return Result(**json.loads(path.read_text("utf-8")))
    started = time.perf_counter()
    found = make()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as writing:
        writing.write_text(json.dumps(asdict(found), indent=1), "utf-8")
    seconds = time.perf_counter() - started
    print(f"{found.mask} {found.method} {found.seed}: {seconds:.0f} s", flush=True)
    return found


# ---- the page ------------------------------------------------------------------------------------


def table(results: Sequence[Result], columns: Mapping[str, str] = COLUMNS) -> str:
    """A Markdown row for each model and each mask and method: means over seeds, least and greatest behind them.

    A number that is withheld in any seed is a dash.
    """
    lines = [
        "| mask | method | " + " | ".join(columns.values()) + " |",
        "|---|---" + "|---" * len(columns) + "|",
    ]
    for mask, method in dict.fromkeys((one.mask, one.method) for one in results):
        mine = [one for one in results if (one.mask, one.method) == (mask, method)]
        said = [_say([one.values.get(key) for one in mine]) for key in columns]
        lines.append(f"| {mask or 'no edit'} | {method} | " + " | ".join(said) + " |")
    return "\n".join(lines)


def _say(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-"
    mean = f"{sum(known) / len(known):.2g}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.2g} to {max(known):.2g})"


def general_table(general: Mapping[str, Mapping[str, Any]]) -> str:
    """What the full model knows of TOFU's general sets, in Markdown."""
    lines = [
        "| set | right answer's share (95%) | guess | ROUGE-L | 1 - R | known |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in general.items():
        low, high = of["interval"]
        lines.append(
            f"| {name} | {of['normalised_probability']:.2f} ({low:.2f} to {high:.2f}) | {of['guess']:.2f} | "
            f"{of['rougeL_recall']:.2f} | {of['truth_ratio_better']:.2f} | {'yes' if of['known'] else 'no'} |"
        )
    return "\n".join(lines)


def digest(*parts: object) -> str:
    """A short name for what was done, a function of the text of its parts."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:16]


def main() -> None:
    """Run, and with --save write the table and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 11), metavar="1-10")
    parser.add_argument("--folder", type=Path, default=HERE / "results" / "tofu-cells")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    found = run(given.data, given.folder, given.seeds)
    text = table([Result(**one) for one in found["results"]])
    text += "\n\n" + general_table(found["general"])
    print(text)
    if given.save:
        (HERE / "results" / "tofu.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        write_between(HERE / "TOFU.md", "tofu", text)


if __name__ == "__main__":
    main()
