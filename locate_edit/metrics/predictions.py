"""Predictions: what a model makes of the scored tokens of a prompt set, from one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from circuits.forward import labelled_logits
from locate_edit.errors import PromptError
from locate_edit.metrics.generation import continued
from locate_edit.metrics.running import (
    compare_labels,
    evaluating,
    normalised,
    row_blocks,
    scored_batches,
)
from locate_edit.metrics.values import Floats
from locate_edit.prompts import Batch, PromptSet
from locate_edit.sampling import Continuation, sample

__all__ = ["Digits", "Predictions", "Reworded", "Wrong", "digit_tokens"]

# What tokenizers write before a piece of text: nothing, a space (three spellings), "continues a word".
_PREFIXES = ("", "\u0120", "\u2581", " ", "##")


@dataclass(frozen=True)
class Digits:
    """The scored tokens that are single digits.

    Attributes:
        label: their indices among all scored tokens, `digit` int64.
        value: the true digit, `digit` int64.
        logprob: natural-log probability of each of the ten digit tokens of the same spelling (with or
            without the leading space), over the whole vocabulary, `digit 10` float64.
    """

    label: NDArray[np.int64]
    value: NDArray[np.int64]
    logprob: Floats


class Wrong(NamedTuple):
    """Predictions on the wrong answers of a prompt set.

    Attributes:
        predictions: those on rows that have a wrong answer in the place of the target, one item an answer.
        of: the item of the prompt set that each answer belongs to, `answer` int64, in ascending order.
    """

    predictions: Predictions
    of: NDArray[np.int64]


class Reworded(NamedTuple):
    """Predictions on other prompts for the same answers.

    Attributes:
        predictions: those on rows with another prompt each, the item's target, and its first wrong answer in `wrong`.
        of: the item of the prompt set that each row belongs to, `row` int64, in ascending order.
    """

    predictions: Predictions
    of: NDArray[np.int64]


@dataclass(frozen=True)
class _Scored:
    logprob: Floats
    entropy: Floats
    variance: Floats
    rank: NDArray[np.int64]
    top: NDArray[np.int64]
    digits: Digits
    divergence: Floats
    jensen_shannon: Floats
    reference_logprob: Floats


class Predictions:
    """A model's predictions on the scored tokens of a prompt set, computed when first asked for and then
    kept.

    All arrays go through the scored tokens item by item in the order of the set, so they depend neither on
    `batch_size` nor on padding. Logits are float32 whatever the model's dtype, and never kept. The model is
    run in evaluation mode; its modes are restored. Ask for the values *before* the model is changed: they
    describe it at the moment of the first use.

    Args:
        model: a causal or masked language model.
        prompts: the prompts, for the same kind of model.
        batch_size: rows a forward pass.
        reference: another model that sees the same batches, for `divergence` and its like.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: PromptSet,
        *,
        batch_size: int = 16,
        reference: nn.Module | None = None,
    ) -> None:
        prompts.check_context(model)
        self.model = model
        self.prompts = prompts
        self.batch_size = batch_size
        self.reference = reference
        counts = [len(prompts.target_ids(i)) for i in range(len(prompts))]
        self._reworded: dict[str, Reworded] = {}
        self._sampled: dict[tuple[float, ...], list[list[Continuation]]] = {}
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._starts = self._ends - np.array(counts, dtype=np.int64)

    @classmethod
    def of(cls, predictions: Predictions | nn.Module, prompts: PromptSet | None) -> Predictions:
        """`predictions` themselves, or those of a model on `prompts`: metrics take either.

        Raises:
            PromptError: a model without prompts, or predictions with prompts beside them.
        """
        if isinstance(predictions, Predictions):
            if prompts is not None:
                raise PromptError("give a metric either predictions, or a model and a prompt set.")
            return predictions
        if prompts is None:
            raise PromptError(
                f"a metric of {type(predictions).__name__} needs a prompt set: metric(model, prompts)."
            )
        return cls(predictions, prompts)

    @property
    def masked(self) -> bool:
        """Whether the prompts are for a masked language model."""
        return self.prompts.masked

    def __len__(self) -> int:
        return len(self.prompts)

    # ---- arrays over all scored tokens -----------------------------------------------------------

    @cached_property
    def label(self) -> NDArray[np.int64]:
        """The scored tokens themselves, `label` int64."""
        return np.concatenate(
            [np.array(self.prompts.target_ids(i), dtype=np.int64) for i in range(len(self))]
        )

    @cached_property
    def item(self) -> NDArray[np.int64]:
        """The item of each scored token, `label` int64."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self._ends - self._starts)

    @cached_property
    def weight(self) -> Floats:
        """The weight of each scored token, `label` float64: 1 unless the set carries a token mask."""
        return np.concatenate([np.array(self.prompts.weights(i)) for i in range(len(self))])

    @property
    def logprob(self) -> Floats:
        """Natural-log probability of each scored token, `label` float64 (nats)."""
        return self._scored.logprob

    @property
    def entropy(self) -> Floats:
        """Entropy of the predicted distribution at each scored token, `label` float64 (nats)."""
        return self._scored.entropy

    @property
    def variance(self) -> Floats:
        """Variance of the log-probability of a token drawn from the prediction itself, `label` float64 (nats^2).

        Its mean is minus the entropy.
        """
        return self._scored.variance

    @cached_property
    def rank(self) -> Floats:
        """How many tokens of the vocabulary are more probable than each scored token, `label` float64.

        NaN where the model gives no number, as for `logprob`.
        """
        return np.where(self.broken, np.nan, self._scored.rank)

    @property
    def top(self) -> NDArray[np.int64]:
        """The most probable token at each scored place, `label` int64; any where the model is `broken`."""
        return self._scored.top

    @cached_property
    def broken(self) -> NDArray[np.bool_]:
        """Where the model gives NaN or plus infinity, so that nothing can be said, `label` bool."""
        return np.isnan(self.logprob)

    @cached_property
    def correct(self) -> Floats:
        """1 where greedy decoding gives the scored token, those before it being given, otherwise 0; `label` float64.

        NaN where the model gives no number, as for `logprob`.
        """
        return np.where(self.broken, np.nan, self.top == self.label)

    @property
    def digits(self) -> Digits:
        """The scored tokens that are single digits, with their distribution over the ten digits."""
        return self._scored.digits

    @property
    def divergence(self) -> Floats:
        """KL(reference || model) of the predictions at each scored token, `label` float64 (nats).

        Raises:
            PromptError: there is no reference.
        """
        self._check_reference()
        return self._scored.divergence

    @property
    def jensen_shannon(self) -> Floats:
        """Jensen-Shannon divergence of the two models' predictions at each scored token, `label` float64 (nats).

        Raises:
            PromptError: there is no reference.
        """
        self._check_reference()
        return self._scored.jensen_shannon

    @property
    def reference_logprob(self) -> Floats:
        """Natural-log probability of each scored token under the reference, `label` float64 (nats).

        Raises:
            PromptError: there is no reference.
        """
        self._check_reference()
        return self._scored.reference_logprob

    @cached_property
    def generated(self) -> list[list[int]]:
        """Greedy continuation of each prompt, as long as its target (causal models).

        `locate_edit.sampling.LOST` is the last token where the model gives NaN or infinity.
        """
        return continued(self.model, self.prompts, batch_size=self.batch_size)

    @cached_property
    def wrong(self) -> Wrong:
        """The same model on the rows' wrong answers, each of them in the place of the target.

        Rows without a `wrong` answer have none here. A token mask plays no part, nor do spans.

        Raises:
            PromptError: no row has a wrong answer, or as `reread`.
        """
        rows, of = [], []
        for index, row in enumerate(self.prompts.rows):
            kept = {key: value for key, value in row.items() if key not in ("spans", "wrong")}
            for text in row.get("wrong", ()):
                rows.append({**kept, "target": text})
                of.append(index)
        if not rows:
            raise PromptError(
                f"{self.prompts!r} has no wrong answers. Give each row a list of them in the field 'wrong'."
            )
        return Wrong(self.reread(rows), np.array(of, dtype=np.int64))

    def reworded(self, field: str) -> Reworded:
        """The same model asked in the words of a field of the rows (`paraphrases`), kept for the next metric.

        Of rows with a target and a wrong answer; what stands behind the target (`suffix`) stays. A token mask plays no
        part, nor do spans.

        Raises:
            PromptError: no row has both answers and such prompts, or as `reread`.
        """
        if field not in self._reworded:
            rows, of = [], []
            for index, row in enumerate(self.prompts.rows):
                new = list(row.get("wrong", ()))[:1]
                kept = {key: row[key] for key in ("target", "suffix") if key in row}
                for text in row.get(field, ()) if new and "target" in row else ():
                    rows.append({**kept, "prompt": text, "wrong": new})
                    of.append(index)
            if not rows:
                raise PromptError(f"{self.prompts!r} has no {field!r} beside a target and 'wrong'.")
            self._reworded[field] = Reworded(self.reread(rows), np.array(of, dtype=np.int64))
        return self._reworded[field]

    def sampled(
        self,
        *,
        length: int = 20,
        samples: int = 25,
        temperature: float = 1.0,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> list[list[Continuation]]:
        """Sampled continuations of each prompt (causal models), kept for the next metric with the same settings.

        Args:
            length: largest number of tokens added.
            samples: continuations of each prompt.
            temperature: what logits are divided by; 0 takes the most probable token each time.
            top_p: draw among the fewest most probable tokens that have this probability together.
            seed: of what is drawn.

        Raises:
            PromptError: as `locate_edit.sampling.sample`.
        """
        settings = (length, samples, temperature, top_p, seed)
        if settings not in self._sampled:
            rows = sample(
                self.model, self.prompts, length=length, samples=samples, temperature=temperature,
                top_p=top_p, seed=seed, batch_size=self.batch_size,
            )  # fmt: skip
            by_item = [rows[i * samples : (i + 1) * samples] for i in range(len(self))]
            self._sampled[settings] = by_item
        return self._sampled[settings]

    def reread(self, rows: Iterable[Mapping[str, Any]]) -> Predictions:
        """Predictions of the same model on other rows, read the way this set was.

        Without the reference: what metrics ask of other rows is the model's own answer.

        Raises:
            PromptError: this set holds other tokens than its rows say (tokens put in front, say), which other rows
                would be without.
        """
        again = self.prompts.reread(self.prompts.rows)
        if any(again.ids(i) != self.prompts.ids(i) for i in range(len(self))):
            raise PromptError(
                f"{self.prompts!r} holds other tokens than its rows say, so other rows cannot be read the same way. "
                "Make the set from rows that have everything in their text."
            )
        return Predictions(self.model, self.prompts.reread(rows), batch_size=self.batch_size)

    def on(self, prompts: PromptSet) -> Predictions:
        """Predictions of the same model, with the same reference and batch size, on other prompts."""
        return Predictions(
            self.model, prompts, batch_size=self.batch_size, reference=self.reference
        )

    def of_item(self, index: int) -> slice:
        """Where the scored tokens of an item stand in the arrays."""
        return slice(int(self._starts[index]), int(self._ends[index]))

    def split(self, array: Floats) -> list[Floats]:
        """An array over scored tokens as one array an item."""
        return [array[self.of_item(index)] for index in range(len(self))]

    def means(self, array: Floats) -> list[float | None]:
        """The weighted mean of an array over each item's scored tokens; None where all weights are 0."""
        totals = np.add.reduceat(self.weight * array, self._starts)
        return [
            total / mass if mass else None
            for total, mass in zip(totals.tolist(), self.mass.tolist(), strict=True)
        ]

    @cached_property
    def mass(self) -> Floats:
        """The sum of the weights of each item's scored tokens, `item` float64."""
        return np.asarray(np.add.reduceat(self.weight, self._starts), dtype=np.float64)

    # ---- the forward pass ------------------------------------------------------------------------

    @cached_property
    def _scored(self) -> _Scored:
        n_labels = int(self._ends[-1])
        logprob, entropy, variance, divergence, shannon, other = np.zeros((6, n_labels))
        rank, top = np.zeros(n_labels, np.int64), np.zeros(n_labels, np.int64)
        value, ten = self._digit_table()
        is_digit = value >= 0
        digit_logprob = np.zeros((n_labels, 10))
        with evaluating(self.model), torch.no_grad():
            for batch in scored_batches(self.model, self.prompts, self.batch_size):
                # Labels come item by item and in order, so each item's fill its own stretch of the arrays.
                where = np.concatenate(
                    [np.arange(self._starts[i], self._ends[i]) for i in batch.items]
                )
                here = np.flatnonzero(is_digit[where])
                own, digits, compared = self._of_batch(batch, here, ten[where[here]])
                logprob[where], entropy[where], variance[where], rank[where], top[where] = own
                digit_logprob[where[here]] = digits
                if compared is not None:
                    divergence[where], shannon[where], other[where] = compared
        found = np.flatnonzero(is_digit).astype(np.int64)
        of_digits = Digits(found, value[found], digit_logprob[found])
        return _Scored(logprob, entropy, variance, rank, top, of_digits, divergence, shannon, other)

    def _of_batch(
        self, batch: Batch, here: NDArray[np.int64], ten: NDArray[np.int64]
    ) -> tuple[tuple[Any, ...], Floats, Floats | None]:
        """What the logits of one batch give, which are held no longer than here.

        Args:
            batch: the batch, on the model's device.
            here: which of its labels are digits, `digit`.
            ten: the ten tokens of each one's spelling, `digit 10`.

        Returns:
            Log-probability, entropy, variance, rank and most probable token, each `label`; log-probabilities of the
            ten digits, `digit 10`; with a reference the divergences and its log-probability, `3 label`.
        """
        logits = labelled_logits(self.model, batch)
        *own, normaliser = _reduce(logits, batch.label)
        rows, ids = (torch.as_tensor(each, device=logits.device) for each in (here[:, None], ten))
        digits = logits[rows, ids].double().cpu().numpy() - normaliser[here][:, None]
        if self.reference is None:
            return tuple(own), digits, None
        with evaluating(self.reference):
            there = batch.to(next(self.reference.parameters()).device)
            wanted = labelled_logits(self.reference, there).to(logits.device)
        compared = compare_labels(wanted, logits, batch.label)
        return tuple(own), digits, torch.stack([t.double() for t in compared]).cpu().numpy()

    def _check_reference(self) -> None:
        if self.reference is None:
            raise PromptError(
                "a divergence needs a second model: Predictions(model, prompts, reference=...)."
            )

    def _digit_table(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Digit of each scored token (-1 for none) `label`, and the ten tokens of its spelling `label 10`."""
        value = np.full(len(self.label), -1, dtype=np.int64)
        ten = np.zeros((len(self.label), 10), dtype=np.int64)
        for spelling in digit_tokens(self.prompts.tokenizer):
            for digit, token in enumerate(spelling):
                here = self.label == token
                value[here], ten[here] = digit, spelling
        return value, ten


def _reduce(
    logits: Tensor, label: Tensor
) -> tuple[Floats, Floats, Floats, NDArray[np.int64], NDArray[np.int64], Floats]:
    """Log-probability, entropy, variance, rank, most probable token and normaliser, each `label`, of `label vocab`."""
    floats, counts = [], []
    for block, own in zip(row_blocks(logits), row_blocks(label, logits.shape[-1]), strict=True):
        chosen = block.gather(-1, own[:, None])
        probability, top, normaliser = normalised(block)
        # Log-probabilities vary as the logits do.
        expected = torch.linalg.vecdot(probability, block)
        rest = block - expected[:, None]
        variance = torch.linalg.vecdot(probability.mul_(rest), rest)
        rank = torch.gt(block, chosen, out=rest).sum(-1)
        each = normaliser[:, 0]
        floats.append(torch.stack([chosen[:, 0] - each, each - expected, variance.double(), each]))
        counts.append(torch.stack([rank.long(), top[:, 0]]))
    logprob, entropy, spread, norm = torch.cat(floats, dim=1).cpu().numpy()
    ranks, tops = torch.cat(counts, dim=1).cpu().numpy()
    return logprob, entropy, spread, ranks, tops, norm


def digit_tokens(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of the tokens for 0 to 9, one list for each spelling (bare, after a space) that has all ten."""
    found = []
    for prefix in _PREFIXES:
        ids: Any = tokenizer.convert_tokens_to_ids([f"{prefix}{digit}" for digit in range(10)])
        if None not in ids and tokenizer.unk_token_id not in ids:
            found.append([int(token) for token in ids])
    return found
