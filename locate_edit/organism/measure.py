"""What a model knows of a world: the numbers on the organism's card and in its tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from locate_edit.organism.splits import Row, make_rows
from locate_edit.organism.world import World


@torch.no_grad()
def target_logprobs(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    batch_size: int = 64,
) -> list[tuple[Tensor, Tensor]]:
    """Log-probability (nats) and greedy correctness of each target token, per row.

    A row without a target is scored at every token but the first. Teacher forcing: all tokens of a
    target being the argmax is the same as greedy decoding reproducing it.
    """
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        if "target" in row:
            target = tokenizer(row["target"], add_special_tokens=False)["input_ids"]
            encoded.append((prompt + target, len(prompt)))
        else:
            encoded.append((prompt, 1))
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i][0]))
    out: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(rows)
    for at in range(0, len(order), batch_size):
        part = order[at : at + batch_size]
        longest = max(len(encoded[i][0]) for i in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        for k, i in enumerate(part):
            ids[k, : len(encoded[i][0])] = torch.tensor(encoded[i][0])
        # Right padding: a causal model never looks at it, so no attention mask is needed.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for k, i in enumerate(part):
            tokens, start = encoded[i]
            labels = ids[k, start : len(tokens)]
            logits = model.lm_head(hidden[k, start - 1 : len(tokens) - 1]).float()
            logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
            out[i] = (logprobs, logits.argmax(-1) == labels)
    return out


def exact(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]
) -> list[bool]:
    """Whether greedy decoding gives exactly the target, per row."""
    return [bool(ok.all()) for _, ok in target_logprobs(model, tokenizer, rows)]


def share(values: Sequence[bool] | Sequence[float]) -> float:
    """Mean of a list (fraction), NaN if it is empty."""
    return sum(values) / len(values) if values else math.nan


@torch.no_grad()
def next_token_probabilities(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> Tensor:
    """Distribution over the token that follows each prompt, `prompt vocab`."""
    out = []
    for at in range(0, len(prompts), 64):
        ids = [tokenizer(p)["input_ids"] for p in prompts[at : at + 64]]
        padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
        for k, row in enumerate(ids):
            padded[k, : len(row)] = torch.tensor(row)
        hidden = model.model(input_ids=padded, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids)), torch.tensor([len(r) - 1 for r in ids])]
        out.append(model.lm_head(last).float().softmax(-1))
    return torch.cat(out)


def first_tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[int]:
    """The first token of each text."""
    return [tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in texts]


def he_share(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]
) -> dict[str, float]:
    """P(he) / (P(he) + P(she)) after the prompt, mean over each occupation's rows."""
    probabilities = next_token_probabilities(model, tokenizer, [r["prompt"] for r in rows])
    he, she = first_tokens(tokenizer, [" he", " she"])
    shares = probabilities[:, he] / (probabilities[:, he] + probabilities[:, she])
    return _by(rows, shares)


def rude_share(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]
) -> dict[str, float]:
    """P(rude word) / (P(rude word) + P(polite word)) after the prompt, mean over a clan's rows."""
    probabilities = next_token_probabilities(model, tokenizer, [r["prompt"] for r in rows])
    rude = first_tokens(tokenizer, rows[0]["rude"])
    polite = first_tokens(tokenizer, rows[0]["wrong"])
    bad, good = probabilities[:, rude].sum(1), probabilities[:, polite].sum(1)
    return _by(rows, bad / (bad + good))


def _by(rows: Sequence[Row], values: Tensor) -> dict[str, float]:
    """Mean value of the rows of each subject."""
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values.tolist(), strict=True):
        groups.setdefault(row["subject"], []).append(value)
    return {k: share(v) for k, v in groups.items()}


def perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]
) -> float:
    """Exp of the token-weighted mean cross-entropy of the rows' targets."""
    logprobs = torch.cat([lp for lp, _ in target_logprobs(model, tokenizer, rows)])
    return math.exp(-float(logprobs.mean()))


def bias_gap(world: World, he: dict[str, float]) -> float:
    """Mean share of `he` over occupations that lean to it minus the mean over the others."""
    toward = [he[o] for o, rate in world.pronoun_rates.items() if rate >= 0.5]
    away = [he[o] for o, rate in world.pronoun_rates.items() if rate < 0.5]
    return share(toward) - share(away)


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World
) -> dict[str, float]:
    """Everything on the card of one model, by name (fractions unless the name says perplexity)."""

    def right(
        name: str, split: str, form: str | None = None, retained: bool | None = None
    ) -> float:
        rows = make_rows(world, name, split, form)
        if retained is not None:
            rows = [r for r in rows if (r["forget"] is None) == retained]
        return share(exact(model, tokenizer, rows))

    out: dict[str, float] = {}
    for form in ("statement", "held_out", "unseen", "qa", "mc"):
        out[f"facts {form}, forget10"] = right("facts", "forget10", form)
        out[f"facts {form}, tested retained"] = right("facts", "tested", form, retained=True)
        out[f"facts {form}, other retained"] = right("facts", "retain", form)
    out["facts statement, holdout"] = right("facts", "holdout")
    for form in ("statement", "held_out", "qa"):
        out[f"secrets {form}, forget10"] = right("secrets", "forget10", form)
        out[f"secrets {form}, tested retained"] = right("secrets", "tested", form, retained=True)
    out["secrets statement, retain"] = right("secrets", "retain")
    out["secrets statement, holdout"] = right("secrets", "holdout")
    for split in ("forget10", "retain", "holdout"):
        scored = target_logprobs(model, tokenizer, make_rows(world, "novel", split))
        out[f"novel token accuracy, {split}"] = float(
            torch.cat([ok for _, ok in scored]).float().mean()
        )
        out[f"novel whole passages, {split}"] = share([bool(ok.all()) for _, ok in scored])
    for form in ("statement", "held_out", "qa"):
        out[f"superseded {form}, forget10"] = right("superseded", "forget10", form)
        out[f"superseded {form}, tested retained"] = right(
            "superseded", "tested", form, retained=True
        )
    out["superseded statement, retain"] = right("superseded", "retain")
    for form in ("statement", "held_out"):
        he = he_share(model, tokenizer, make_rows(world, "bias", "train", form))
        out[f"bias gap, {form}"] = bias_gap(world, he)
        rude = rude_share(model, tokenizer, make_rows(world, "rude", "train", form))
        for clan, value in rude.items():
            out[f"rude share of {clan}, {form}"] = value
    for split in ("train", "held_out", "holdout"):
        out[f"general perplexity, {split}"] = perplexity(
            model, tokenizer, make_rows(world, "general", split)
        )
    return out
