"""Continuations of many prompts at once, sampled or greedy, with a key-value cache.

    written = sample(model, prompts, length=20, samples=4, seed=0)
    written[0].text                                  # the first of the first prompt

Rows are padded on the left, positions are counted from the first real token, and a batch ends when all of its rows
have. Every row has its own stream of random numbers, made from the seed, the prompt's tokens and the number of the
sample, so what is drawn depends neither on the other prompts and their order nor on the batch size (but for rounding)
nor on the device's generator.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from circuits.forward import cache_name
from locate_edit.errors import PromptError
from locate_edit.metrics.running import evaluating
from locate_edit.prompts import PromptSet

__all__ = [
    "LOST",
    "Continuation",
    "decode",
    "drop_lost",
    "end_tokens",
    "sample",
    "sample_ids",
    "until_end",
]

# Most probable tokens of a large vocabulary that are looked at first: sorting all of it costs more than a small model.
_FEW = 1024

LOST = -1
"""In the place of a token: the model gave NaN or infinity there, and the row ends."""
Choose = Callable[[Tensor, int], Tensor]
"""Next tokens `row` (or `LOST`) from logits `row vocab` (float32) and the number of tokens added so far."""


@dataclass(frozen=True)
class Continuation:
    """What a model wrote behind a prompt.

    Attributes:
        item: index of the prompt in its set.
        ids: token ids, the end token included where the model gave one.
        text: what they say, special tokens left out.
        finite: whether the model gave numbers to draw from; if not, it ends where they failed.
    """

    item: int
    ids: tuple[int, ...]
    text: str
    finite: bool = True


def sample(
    model: nn.Module,
    prompts: PromptSet,
    *,
    length: int = 20,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Continuation]:
    """Continuations of each prompt, prompt by prompt: those of item 0 first.

    What stands before the first scored token is continued; targets play no part. A row stops behind the end token that
    the tokenizer or the model names. The model's own generation settings (penalties, forced tokens) play no part.

    Args:
        model: a causal language model.
        prompts: the prompts; `PromptSet.preceded` puts tokens in front of them.
        length: largest number of tokens added to each.
        samples: continuations of each prompt.
        temperature: what logits are divided by; 0 takes the most probable token each time.
        top_p: draw among the fewest most probable tokens that have this probability together; 1 for all.
        seed: of what is drawn.
        batch_size: rows decoded together.

    Raises:
        PromptError: a masked set, a setting out of range, or a continuation that does not fit the model's context.
    """
    if prompts.masked:
        raise PromptError(f"{prompts!r} is for a masked model, which does not continue text.")
    starts = [prompts.prompt_ids(index) for index in range(len(prompts))]
    rows = _sampled(
        model, starts, length=length, samples=samples, temperature=temperature, top_p=top_p,
        seed=seed, ends=end_tokens(model, prompts), batch_size=batch_size,
    )  # fmt: skip
    ids = [drop_lost(row) for row in rows]
    texts = prompts.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [
        Continuation(index // samples, tuple(row_ids), text, LOST not in row)
        for index, (row, row_ids, text) in enumerate(zip(rows, ids, texts, strict=True))
    ]


def sample_ids(
    model: nn.Module,
    starts: Sequence[Sequence[int]],
    *,
    length: int = 20,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    ends: frozenset[int] = frozenset(),
    batch_size: int = 64,
) -> list[list[int]]:
    """`sample` for token ids: ``samples`` rows for each start, start by start.

    Raises:
        PromptError: as `sample`, and for an empty start.
    """
    rows = _sampled(
        model, starts, length=length, samples=samples, temperature=temperature, top_p=top_p,
        seed=seed, ends=ends, batch_size=batch_size,
    )  # fmt: skip
    return [drop_lost(row) for row in rows]


def _sampled(
    model: nn.Module,
    starts: Sequence[Sequence[int]],
    *,
    length: int,
    samples: int,
    temperature: float,
    top_p: float,
    seed: int,
    ends: frozenset[int],
    batch_size: int,
) -> list[list[int]]:
    """`sample_ids`, where a row that lost its way ends with `LOST`."""
    if length < 1 or samples < 1 or batch_size < 1:
        raise PromptError(
            f"length, samples and batch_size must be at least 1, got {length}, {samples} and {batch_size}."
        )
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise PromptError(
            f"temperature must be at least 0 and top_p in (0, 1], got {temperature} and {top_p}."
        )
    rows = [start for start in starts for _ in range(samples)]
    check_lengths(model, starts, [length] * len(starts))
    drawn = _numbers(starts, length, samples, seed) if temperature > 0 else torch.empty(0)
    # Rows of similar length share a batch: the least padding.
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    made: list[list[int]] = [[] for _ in rows]
    device = next(model.parameters()).device
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            choose: Choose = greedy_choice
            if temperature > 0:
                choose = _Draw(drawn[chosen].to(device), temperature, top_p)
            written = decode(model, [rows[i] for i in chosen], [length] * len(chosen), ends, choose)
            for index, row in zip(chosen, written, strict=True):
                made[index] = row
    return made


def _numbers(starts: Sequence[Sequence[int]], length: int, samples: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1) for every step of every row, `row step` float64.

    Each row's are made from the seed, its start, the number of the sample, and how often the start was there before.
    """
    numbers = np.empty((len(starts) * samples, length))
    before: Counter[bytes] = Counter()
    for index, start in enumerate(starts):
        tokens = np.asarray(start, dtype=np.int64).tobytes()
        for sample_index in range(samples):
            name = f"{seed} {sample_index} {before[tokens]} ".encode() + tokens
            key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
            row = np.random.Generator(np.random.Philox(key=key))
            row.random(out=numbers[index * samples + sample_index])
        before[tokens] += 1
    return torch.from_numpy(numbers)


def drop_lost(row: Sequence[int]) -> list[int]:
    """A row without the mark that it was lost."""
    return [token for token in row if token != LOST]


def greedy_choice(logits: Tensor, _added: int) -> Tensor:
    """The most probable token of each row: `row`."""
    most = logits.argmax(-1)
    # NaN counts as the largest, so the largest alone tells whether all are numbers.
    return most.where(logits.gather(-1, most[:, None])[:, 0].isfinite(), LOST)


@torch.no_grad()
def decode(
    model: nn.Module,
    starts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    ends: frozenset[int],
    choose: Choose = greedy_choice,
) -> list[list[int]]:
    """One left-padded batch, decoded until every row has ended or reached its length.

    Args:
        model: a causal language model, in evaluation mode.
        starts: token ids to continue, at least one each.
        lengths: how many tokens to add to each.
        ends: tokens after which a row stops; they are part of it.
        choose: takes the next token of each row.

    Returns:
        The tokens added to each row; `LOST` is the last one where the model gave none.
    """
    device = next(model.parameters()).device
    width = max(len(start) for start in starts)
    ids = torch.zeros((len(starts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, start in enumerate(starts):
        ids[index, width - len(start) :] = torch.tensor(start, dtype=torch.long)
        mask[index, width - len(start) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    takes, kept_as = inspect.signature(model.forward).parameters, cache_name(model)
    ends = ends | {LOST}
    stop = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    budget = torch.tensor(list(lengths), dtype=torch.long, device=device)
    done = budget <= 0
    added: list[Tensor] = []
    cache: Any = None
    while not bool(done.all()):
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
        if "position_ids" in takes:
            # Counted from the first real token, so that padding on the left shifts nothing.
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in takes:
            inputs["logits_to_keep"] = 1
        if cache is not None:
            inputs[kept_as] = cache
        output = model(**inputs)
        cache = getattr(output, kept_as)
        chosen = choose(output.logits[:, -1].float(), len(added))
        added.append(chosen)
        ids = chosen[:, None].clamp(min=0)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
        done = done | (len(added) >= budget) | torch.isin(chosen, stop)
    if not added:
        return [[] for _ in starts]
    table = torch.stack(added, dim=1).tolist()
    return [until_end(row[:length], ends) for row, length in zip(table, lengths, strict=True)]


def end_tokens(model: nn.Module, prompts: PromptSet) -> frozenset[int]:
    """The end tokens that tokenizer and model name."""
    settings = getattr(model, "generation_config", None)
    named: list[Any] = [prompts.tokenizer.eos_token_id]
    own = getattr(settings, "eos_token_id", None)
    named += own if isinstance(own, list) else [own]
    return frozenset(int(token) for token in named if token is not None)


def check_lengths(
    model: nn.Module, starts: Sequence[Sequence[int]], lengths: Sequence[int]
) -> None:
    """Raise for a start without tokens or a continuation longer than the context.

    Raises:
        PromptError: with the row, its length and the model's limit.
    """
    limit = None
    if (config := getattr(model, "config", None)) is not None:
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if not start:
            raise PromptError(
                f"row {index} has no token to continue. Write a prompt, or use a tokenizer with a start token."
            )
        if isinstance(limit, int) and 0 < limit < len(start) + length:
            raise PromptError(
                f"row {index}: {len(start)} tokens and {length} new ones are more than the {limit} of the model's "
                "context. Lower the number of new tokens or shorten the prompt."
            )


@dataclass(frozen=True)
class _Draw:
    """The token where the cumulative probability passes the row's number for this step.

    Attributes:
        numbers: uniform in [0, 1), `row step` float64.
        temperature: what logits are divided by.
        top_p: share of the probability that is drawn from.
    """

    numbers: Tensor
    temperature: float
    top_p: float

    def __call__(self, logits: Tensor, added: int) -> Tensor:
        """Tokens `row` for logits `row vocab`."""
        probabilities = torch.softmax(logits.double() / self.temperature, dim=-1)
        numbers = self.numbers[:, added, None]
        if self.top_p == 1 or probabilities.shape[-1] <= _FEW:
            return self._token(probabilities, numbers)
        most = probabilities.topk(_FEW, dim=-1)
        # What ties with the least of these may not be among them, so those above it must have the share.
        above = most.values * (most.values > most.values[:, -1:])
        enough = above.cumsum(-1)[:, -1] >= self.top_p
        token = torch.empty_like(most.indices[:, 0])
        if enough.any():
            few = most.indices[enough].sort(dim=-1).values
            place = self._token(probabilities[enough].gather(-1, few), numbers[enough])
            token[enough] = few.gather(-1, place[:, None])[:, 0]
        if not enough.all():
            token[~enough] = self._token(probabilities[~enough], numbers[~enough])
        return token

    def _token(self, probabilities: Tensor, numbers: Tensor) -> Tensor:
        """Index `row` of the probability `row token` that each number `row 1` falls on."""
        order = None
        if self.top_p < 1:
            probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
            # A token is in as long as those before it do not have the share yet: the first always is.
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        sums = probabilities.cumsum(-1)
        # Strictly below the last sum, and past tokens of no probability.
        wanted = numbers * sums[:, -1:]
        place = torch.searchsorted(sums, wanted, right=True)
        last = (probabilities > 0).long().cumsum(-1).argmax(-1, keepdim=True)
        place = place.minimum(last)
        token = (place if order is None else order.gather(-1, place))[:, 0]
        return token.where(sums[:, -1].isfinite(), LOST)


def until_end(row: Sequence[int], ends: frozenset[int]) -> list[int]:
    """A row of tokens up to its first end token, that included."""
    for position, token in enumerate(row):
        if token in ends:
            return list(row[: position + 1])
    return list(row)
