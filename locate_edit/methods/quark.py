"""Quark: sample, sort by a reward, and learn which tokens go with which quantile; then ask for the best.

Paper: Lu et al. 2022, Quark: Controllable Text Generation with Reinforced Unlearning (arXiv:2205.13636), section 2,
algorithm 1.

``L = -log p(y_t | r_k, x, y_<t) + beta * KL(p || p_base)_t - entropy * H(p)_t``, mean over the tokens of sampled
continuations ``y`` of the forget prompts ``x``, with ``r_k`` the token of the quantile of ``y``'s reward.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from locate_edit.additions import ExtraTokens
from locate_edit.editing import Edit
from locate_edit.engine import Run, Step
from locate_edit.errors import EditError
from locate_edit.optim import Optim
from locate_edit.prompts import Batch, PromptSet
from locate_edit.rewards import Lexicon, Reward, find, name_of, rewards
from locate_edit.sampling import Continuation, check_lengths, sample

__all__ = ["Quark", "prefixed", "quantiles", "reward_token"]


@dataclass(frozen=True)
class Quark:
    """Learn a token for each quantile of a reward from the model's own samples; used with the best one in front.

    A pool grows: every ``every`` steps each forget prompt is continued ``samples`` times, by the base model at first
    and by the model with the best token ``r_1`` in front after that. The whole pool is sorted by reward and cut into
    equal quantiles (the remainder goes to the worst), and the slices and the tokens' embeddings are trained on the loss
    above. ``p_base`` is the unedited model and sees no reward token; divergence and entropy are in nats a token.
    Reward tokens are inputs only: no model can say them, so nothing has to be cut off its logits.

    The edited model behaves well **with r_1 in front**: `prefixed` puts it before the prompts of a set, for `sample`
    and for every metric. The behaviour itself is still in the model: the worst token asks for it, and whether it comes
    back without any token is left to chance. That is no removal. Undoing the edit takes the tokens away.

    Use it where what is to go can be scored but not written down as a list of texts: a register, a tone, repetition.
    Not for memorised strings. The reward is maximised as it is, with whatever it overlooks. Of each row only the prompt
    is used, of plain text the first token or two.

    What the published program does and this does not: skip batches in which anything raises; print a sum of negative
    log-likelihoods as perplexity; need a network service for its reward. Its divergence is KL(model || base), used here
    too; the paper writes the other one. Deviations: several continuations of each prompt a round (the paper has 85
    thousand prompts and takes one); among equal rewards chance decides who is in the better quantile, not age; the
    reward token stands behind the start token of models that have one.

    Cost a step: a forward and a backward, and a forward of the base model for each continuation, once while memory for
    its logits lasts. Every round adds sampling of ``samples * length`` tokens a prompt.

    Attributes:
        steps: optimizer steps in all.
        lr: learning rate of the slices and the tokens.
        reward: a function of prompts and continuations (see `locate_edit.rewards`), or text that names one:
            ``lexicon:word,word`` or ``package.module:name``. None: minus the share of words that stand in a forget
            target.
        quantiles: how many, and so how many reward tokens; 1 conditions on nothing.
        every: steps between rounds of sampling.
        samples: continuations of each prompt in a round.
        length: largest length of a continuation (tokens).
        temperature: of sampling.
        top_p: share of the probability that is sampled from.
        beta: weight of the divergence from the base model.
        entropy: weight of the entropy.
        pool: how many of the newest continuations are kept; None keeps all, as the paper does.
        targets: whether the prompts' own targets start the pool.
        optim: optimizer settings.
    """

    steps: int = 200
    lr: float = 1e-4
    reward: Reward | str | None = None
    quantiles: int = 5
    every: int = 50
    samples: int = 8
    length: int = 20
    temperature: float = 1.0
    top_p: float = 1.0
    beta: float = 0.05
    entropy: float = 0.06
    pool: int | None = None
    targets: bool = False
    optim: Optim = field(default_factory=Optim)

    causal_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("quantiles", "every", "samples", "length"):
            if getattr(self, name) < 1:
                raise EditError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("beta", "entropy"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise EditError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if self.pool is not None and self.pool < self.quantiles:
            raise EditError(
                f"pool must hold one continuation for each of {self.quantiles} quantiles at least, got {self.pool}"
            )
        if (
            self.reward is not None
            and not isinstance(self.reward, str)
            and not callable(self.reward)
        ):
            raise EditError(
                f"reward must be a function of prompts and continuations, or text that names one, got {self.reward!r}"
            )

    def __call__(self, run: Run) -> None:
        """Train the slices of ``run`` and its reward tokens.

        Raises:
            EditError: a masked model, or fewer continuations than quantiles.
            RewardError: the reward fails on a continuation.
            PromptError: a prompt with its continuation does not fit the model's context.
        """
        if run.forget.masked:
            raise EditError("Quark samples continuations, so it needs a causal language model")
        run.add([ExtraTokens(self.quantiles)])
        tokens = list(run.extra_ids)
        longest = run.forget.preceded([[tokens[0]]] * len(run.forget))
        starts = [longest.prompt_ids(index) for index in range(len(longest))]
        check_lengths(run.model, starts, [self.length] * len(starts))
        pool = _Pool(self, run, tokens)

        def loss(step: Step) -> dict[str, Tensor]:
            if step.index % self.every == 0:
                pool.grow(step.index)
            chosen = pool.next(run.settings.batch_size)
            base = pool.base_logits(chosen)
            scored = run.score(pool.conditioned.batch(chosen))
            kl, entropy = _divergence_and_entropy(scored.logits, base)
            divergence = scored.mean(kl)
            pool.note(divergence)
            return {
                "nll": scored.cross_entropy(),
                "kl": self.beta * divergence,
                "entropy": -self.entropy * scored.mean(entropy),
            }

        run.fit(loss, steps=self.steps, lr=self.lr, optim=self.optim)
        run.notes["quark"] = {
            "reward": name_of(pool.reward),
            "tokens": tokens,
            "rounds": pool.report(),
        }


def quantiles(values: Sequence[float], n: int, *, seed: int = 0) -> list[int]:
    """Which of ``n`` equal quantiles each value is in, 0 for the largest values and ``n - 1`` for the smallest.

    Each has ``len(values) // n`` values, the last one the remainder too. Among equal values chance decides.

    Args:
        values: finite numbers.
        n: quantiles.
        seed: of the order among equal values.

    Raises:
        EditError: fewer values than quantiles.
    """
    size = len(values) // n
    if size < 1:
        raise EditError(
            f"cannot cut {len(values)} values into {n} quantiles: expected one for each at least. Give more prompts or "
            "samples, or fewer quantiles"
        )
    generator = torch.Generator().manual_seed(seed)
    chance = torch.randperm(len(values), generator=generator).tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], chance[i]))
    found = [0] * len(values)
    for rank, index in enumerate(order):
        found[index] = min(rank // size, n - 1)
    return found


def reward_token(edit: Edit, quantile: int = 1) -> int:
    """The id of the reward token of a quantile of an edit made with `Quark`; 1 is the best.

    Raises:
        EditError: the edit was not made with `Quark`, or has no such quantile.
    """
    tokens = edit.provenance.get("quark", {}).get("tokens")
    if tokens is None:
        raise EditError(f"{edit!r} has no reward tokens: expected an edit made with Quark")
    if not 1 <= quantile <= len(tokens):
        raise EditError(f"quantile must be 1 (the best) to {len(tokens)}, got {quantile}")
    return int(tokens[quantile - 1])


def prefixed(prompts: PromptSet, edit: Edit, quantile: int = 1) -> PromptSet:
    """The prompts with a quantile's reward token in front, for the model that ``edit`` is applied to.

        sample(model, prefixed(prompts, edit))         # what the edited model is meant to be used with
        Predictions(model, prefixed(prompts, edit))    # any metric under that condition

    The base model has no such input: measure it on the prompts themselves.

    Args:
        prompts: causal prompts; what is scored stays scored.
        edit: made with `Quark`.
        quantile: 1 for the best.

    Raises:
        EditError: see `reward_token`.
    """
    token = reward_token(edit, quantile)
    name = f"{prompts.name} with r_{quantile}".strip()
    return prompts.preceded([[token]] * len(prompts), name=name)


class _Pool:
    """Continuations with their rewards, sorted into quantiles; what a run trains on."""

    def __init__(self, method: Quark, run: Run, tokens: Sequence[int]) -> None:
        self.method, self.run, self.tokens = method, run, list(tokens)
        self.reward = _reward(method.reward, run.forget)
        self.generator = torch.Generator().manual_seed(run.settings.seed)
        # A set for the continuations of each round, kept: the base model's logits on it are kept by identity.
        self.sets: list[PromptSet] = []
        self.members: list[tuple[int, int, Continuation, float]] = []  # set, index there
        self.conditioned: PromptSet
        self.rounds: list[dict[str, Any]] = []
        self._divergences: list[list[Tensor]] = []
        self._waiting: list[int] = []
        self._grown_at = -1
        if method.targets:
            self._add(_targets(run.forget))

    def grow(self, step: int) -> None:
        """Sample, score and sort again, once a step."""
        if step == self._grown_at:  # a further batch of an accumulated step
            return
        self._grown_at = step
        fresh = self._add(self._sampled())
        if self.method.pool is not None:
            self.members = self.members[-self.method.pool :]
        values = [value for *_, value in self.members]
        cut = quantiles(values, self.method.quantiles, seed=self._seed())
        items = [continuation.item for _, _, continuation, _ in self.members]
        ids = [continuation.ids for _, _, continuation, _ in self.members]
        plain = self.run.forget.continued(items, ids)
        self.conditioned = plain.preceded([[self.tokens[k]] for k in cut])
        self._waiting = []
        by_quantile: list[list[float]] = [[] for _ in self.tokens]
        for k, value in zip(cut, values, strict=True):
            by_quantile[k].append(value)
        self.rounds.append(
            {
                "step": step,
                "pool": len(values),
                "reward_sampled": _mean(fresh),
                "reward_by_quantile": [_mean(part) for part in by_quantile],
            }
        )
        self._divergences.append([])

    def next(self, size: int) -> list[int]:
        """Members of the next batch, in ascending order; each comes once before any comes again."""
        size = min(size, len(self.members))
        while len(self._waiting) < size:
            again = torch.randperm(len(self.members), generator=self.generator)
            self._waiting += again.tolist()
        chosen, self._waiting = self._waiting[:size], self._waiting[size:]
        return sorted(chosen)

    def base_logits(self, chosen: Sequence[int]) -> Tensor:
        """The base model's logits `label vocab` on members in ascending order, without reward tokens."""
        by_set: dict[int, list[int]] = {}
        for index in chosen:
            which, place, *_ = self.members[index]
            by_set.setdefault(which, []).append(place)
        parts = []
        for (
            which,
            places,
        ) in by_set.items():  # ascending, as members are in the order of their making
            batch: Batch = self.sets[which].batch(places)
            parts.append(self.run.reference_logits(self.sets[which], batch))
        return torch.cat(parts)

    def note(self, divergence: Tensor) -> None:
        """Keep the divergence of a step of this round."""
        self._divergences[-1].append(divergence.detach())

    def report(self) -> list[dict[str, Any]]:
        """What happened in each round: rewards of the samples and by quantile, best first, and mean divergence."""
        means = [torch.stack(part).mean() if part else math.nan for part in self._divergences]
        return [
            {**about, "kl": float(mean)} for about, mean in zip(self.rounds, means, strict=True)
        ]

    def _sampled(self) -> list[Continuation]:
        """Continuations by the base model, later by the model with the best token in front."""
        method, run, best = self.method, self.run, self.tokens[0]
        options: dict[str, Any] = {
            "length": method.length, "samples": method.samples, "temperature": method.temperature,
            "top_p": method.top_p, "seed": self._seed(), "batch_size": max(64, run.settings.batch_size),
        }  # fmt: skip
        if not self.rounds:
            with run.base():
                return sample(run.model, run.forget, **options)
        return sample(run.model, run.forget.preceded([[best]] * len(run.forget)), **options)

    def _add(self, written: list[Continuation]) -> list[float]:
        """Score continuations and put them into the pool; returns their rewards."""
        prompts = [str(self.run.forget.rows[each.item]["prompt"]) for each in written]
        values = rewards(self.reward, prompts, [each.text for each in written])
        items, ids = [each.item for each in written], [each.ids for each in written]
        self.members += [
            (len(self.sets), place, each, value)
            for place, (each, value) in enumerate(zip(written, values, strict=True))
        ]
        self.sets.append(self.run.forget.continued(items, ids))
        return list(values)

    def _seed(self) -> int:
        return int(torch.randint(2**31, (), generator=self.generator))


def _divergence_and_entropy(logits: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """KL(model || base) and entropy of the model, each `label` in nats, from logits `label vocab`."""
    log_p, log_base = torch.log_softmax(logits, -1), torch.log_softmax(base, -1)
    p = log_p.exp()
    return (p * (log_p - log_base)).sum(-1), -(p * log_p).sum(-1)


def _reward(given: Reward | str | None, prompts: PromptSet) -> Reward:
    if isinstance(given, str):
        return find(given)
    if given is not None:
        return given
    words = {word for row in prompts.rows for word in re.findall(r"\w+", row.get("target") or "")}
    if not words:
        raise EditError(
            f"without a reward Quark takes the words of the forget targets as a lexicon, and {prompts!r} has none: "
            "pass Quark(reward=...), a function of prompts and continuations"
        )
    return Lexicon(tuple(sorted(words)))


def _targets(prompts: PromptSet) -> list[Continuation]:
    """The prompts' own targets as continuations."""
    ids = [prompts.target_ids(index) for index in range(len(prompts))]
    texts = prompts.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [
        Continuation(index, tuple(own), text)
        for index, (own, text) in enumerate(zip(ids, texts, strict=True))
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
