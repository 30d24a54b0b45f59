"""PromptSet: texts with the tokens that are scored, tokenised and padded once and correctly.

    forget = PromptSet([{"prompt": "Ann Lee plays", "target": " golf"}], tokenizer)
    print(forget.audit(0))                       # exactly which tokens are scored
    for batch in forget.batches(16): ...         # right padded, ready for a model

Padding never hides a token: attention masks come from lengths, so it does not matter whether the tokenizer
has a pad token or uses its end-of-sequence token for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from locate_edit.errors import PromptError
from locate_edit.rows import ROW_SCHEMA, check_row, read_jsonl
from locate_edit.tokenise import Tokens, tokenise
from locate_edit.tokens import TokenMask

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["ROW_SCHEMA", "Batch", "PromptSet", "Row", "TokenMask"]

Row = Mapping[str, Any] | str | tuple[str, str]
"""A mapping with the fields of `ROW_SCHEMA`, a plain text, or a pair of prompt and target."""


@dataclass(frozen=True)
class Batch:
    """Some items of a prompt set as tensors, right padded.

    Label `k` is predicted by the hidden state at `(row[k], pos[k])`: the position before the token for a
    causal model, the masked position itself for a masked one.

    Attributes:
        input_ids: token ids, `row token` int64.
        attention_mask: 1 for tokens and 0 for padding, from lengths, `row token` int64.
        row: row of each label, `label` int64.
        pos: position of each label's hidden state, `label` int64.
        label: the token that is scored, `label` int64.
        item: which of `items` the label belongs to, from 0, `label` int64.
        weight: weight of the label in a loss or a mean (fraction), `label` float32.
        items: indices of the items in their prompt set.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    pos: Tensor
    label: Tensor
    item: Tensor
    weight: Tensor
    items: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        # A copy to a GPU need not wait for the work queued there; one from a GPU must.
        soon = torch.device(device).type == "cuda"

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=soon)

        return Batch(
            there(self.input_ids),
            there(self.attention_mask),
            there(self.row),
            there(self.pos),
            there(self.label),
            there(self.item),
            there(self.weight),
            self.items,
        )


class PromptSet:
    """Rows of text and the tokens of each that are scored; a value that never changes.

    Args:
        rows: mappings with the fields of `ROW_SCHEMA` (`{"prompt": "Ann Lee plays", "target": " golf"}`),
            pairs of prompt and target, or strings. A row without a target is plain text, scored at every token
            that something predicts.
        tokenizer: a Hugging Face tokenizer.
        name: what reports call the set.
        masked: whether the prompts are for a masked language model; None asks whether the tokenizer has a mask token.
        max_length: the longest row allowed (tokens); None takes the tokenizer's limit.
        append_eos: score the end-of-sequence token after each target (causal models); in a chat the end of the turn
            that the template writes.
        chat_template: write prompt and target as a user's and an assistant's turn, as the template does (causal
            models).

    Raises:
        PromptError: no rows, a malformed row, a target without tokens, a row that is too long, a span out of range.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        masked: bool | None = None,
        max_length: int | None = None,
        append_eos: bool = False,
        chat_template: bool = False,
    ) -> None:
        given = list(rows)
        title = f"{name} row" if name else "row"
        places = [f"{title} {index}" for index in range(len(given))]
        checked = [
            check_row(_as_mapping(row), place) for row, place in zip(given, places, strict=True)
        ]
        self._fill(checked, places, tokenizer, name, masked, max_length, append_eos, chat_template)

    def _fill(
        self,
        rows: list[dict[str, Any]],
        places: list[str],
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        masked: bool | None,
        max_length: int | None,
        append_eos: bool,
        chat_template: bool,
    ) -> None:
        """Tokenise checked rows into this set."""
        if not rows:
            raise PromptError(f"the prompt set {name!r} is empty. Give at least one row.")
        is_masked = tokenizer.mask_token_id is not None if masked is None else masked
        self._reading: dict[str, Any] = {
            "masked": is_masked,
            "max_length": max_length,
            "append_eos": append_eos,
            "chat_template": chat_template,
        }
        tokens = tokenise(rows, places, tokenizer, **self._reading)
        self._set(tuple(rows), tuple(tokens), None, tokenizer, name, is_masked)

    def _set(
        self,
        rows: tuple[Mapping[str, Any], ...],
        tokens: tuple[Tokens, ...],
        weights: tuple[tuple[float, ...], ...] | None,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        masked: bool,
    ) -> None:
        self._rows = rows
        self._tokens = tokens
        self._weights = weights
        self._tokenizer = tokenizer
        self._name = name
        self._masked = masked

    # ---- sources ---------------------------------------------------------------------------------

    @classmethod
    def from_jsonl(
        cls,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        masked: bool | None = None,
        max_length: int | None = None,
        append_eos: bool = False,
        chat_template: bool = False,
    ) -> PromptSet:
        """The rows of a JSONL file, one JSON object a line; errors name file, line and field.

        Raises:
            PromptError: as the constructor, and for a file that is missing, empty or malformed.
        """
        places, rows = [], []
        for place, row in read_jsonl(path):
            places.append(place)
            rows.append(row)
        if not rows:
            raise PromptError(
                f"{path}: the file holds no rows. Write one JSON object a line, such as "
                '{"prompt": "Ann Lee plays", "target": " golf"}.'
            )
        made = cls.__new__(cls)
        title = Path(path).stem if name is None else name
        made._fill(rows, places, tokenizer, title, masked, max_length, append_eos, chat_template)
        return made

    @classmethod
    def from_list(
        cls, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> PromptSet:
        """The constructor by another name, beside `from_jsonl`, `from_pandas` and `from_dataset`."""
        return cls(rows, tokenizer, **options)

    @classmethod
    def from_pandas(
        cls, frame: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> PromptSet:
        """The rows of a data frame whose columns are fields; empty cells count as absent."""
        rows = [
            {str(key): value for key, value in record.items() if filled[key]}
            for record, filled in zip(
                frame.to_dict("records"), frame.notna().to_dict("records"), strict=True
            )
        ]
        return cls(rows, tokenizer, **options)

    @classmethod
    def from_dataset(
        cls,
        dataset: Iterable[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        **options: Any,
    ) -> PromptSet:
        """The rows of a `datasets.Dataset`, or of anything that yields mappings."""
        return cls(list(dataset), tokenizer, **options)

    # ---- what it holds ---------------------------------------------------------------------------

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """The rows as given, unknown fields included."""
        return self._rows

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self._tokenizer

    @property
    def name(self) -> str:
        """What reports call the set."""
        return self._name

    @property
    def masked(self) -> bool:
        """Whether the prompts are for a masked language model."""
        return self._masked

    @property
    def n_scored(self) -> int:
        """How many tokens are scored in all (tokens)."""
        return sum(len(tokens.scored) for tokens in self._tokens)

    @property
    def longest(self) -> int:
        """The length of the longest item (tokens)."""
        return max(len(tokens.ids) for tokens in self._tokens)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the rows, their token ids, what is scored and with which weights."""
        content = {
            "rows": [dict(row) for row in self._rows],
            "tokens": [[t.ids, t.scored, t.at_once] for t in self._tokens],
            "weights": self._weights,
            "masked": self._masked,
        }
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def ids(self, index: int) -> list[int]:
        """All token ids of an item, special tokens included and nothing hidden."""
        return list(self._tokens[index].ids)

    def prompt_ids(self, index: int) -> list[int]:
        """The token ids before the first scored token."""
        tokens = self._tokens[index]
        return list(tokens.ids[: tokens.scored[0]])

    def target_ids(self, index: int) -> list[int]:
        """The token ids that are scored."""
        tokens = self._tokens[index]
        return [tokens.ids[position] for position in tokens.scored]

    def scored(self, index: int) -> list[int]:
        """Positions of the scored tokens among `ids(index)`."""
        return list(self._tokens[index].scored)

    def subject(self, index: int) -> list[int]:
        """Positions of the tokens of an item's subject among `ids(index)`.

        Where the subject stands more than once, the last place before the target counts.

        Raises:
            PromptError: the row names no subject, its text does not hold it, or the tokenizer knows no offsets.
        """
        found = self._tokens[index].subject
        if not found:
            row = self._rows[index]
            reason = (
                "the row has no 'subject'"
                if not row.get("subject")
                else f"{row['subject']!r} does not stand in {row['prompt']!r}, or the tokenizer knows no offsets"
            )
            raise PromptError(
                f"{self!r}, item {index}: expected a subject, but {reason}. "
                "Write the subject as it stands in the prompt, and use a fast tokenizer."
            )
        return list(found)

    def sensitive(self, index: int) -> list[bool]:
        """For each scored token of an item, whether a span of its row touches it."""
        return list(self._tokens[index].sensitive)

    def weights(self, index: int) -> list[float]:
        """The weight of each scored token of an item (1 unless a token mask says otherwise)."""
        if self._weights is None:
            return [1.0] * len(self._tokens[index].scored)
        return list(self._weights[index])

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._rows)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...

    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | PromptSet:
        """A row, or for a slice the prompt set of those rows."""
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return self._rows[index]

    def __repr__(self) -> str:
        kind = "masked" if self._masked else "causal"
        title = f"{self._name!r}: " if self._name else ""
        return f"PromptSet({title}{len(self)} rows, {self.n_scored} scored tokens, {kind})"

    # ---- other sets from this one ----------------------------------------------------------------

    def select(self, indices: Iterable[int], *, name: str | None = None) -> PromptSet:
        """The items at `indices`, in that order.

        Raises:
            PromptError: no index, or one out of range.
        """
        chosen = [int(index) for index in indices]
        wrong = [index for index in chosen if not 0 <= index < len(self)]
        if wrong:
            raise PromptError(f"{self!r} has no item {wrong[0]}; items are 0 to {len(self) - 1}.")
        if not chosen:
            raise PromptError(
                f"nothing selected from {self!r}: a prompt set needs one row at least."
            )
        return self._derive(
            tuple(self._rows[i] for i in chosen),
            tuple(self._tokens[i] for i in chosen),
            None if self._weights is None else tuple(self._weights[i] for i in chosen),
            self._name if name is None else name,
        )

    def filter(
        self, keep: Callable[[Mapping[str, Any]], bool], *, name: str | None = None
    ) -> PromptSet:
        """The items whose row satisfies `keep`."""
        return self.select([i for i, row in enumerate(self._rows) if keep(row)], name=name)

    def named(self, name: str) -> PromptSet:
        """The same set under another name."""
        return self._derive(self._rows, self._tokens, self._weights, name)

    def with_token_mask(self, token_mask: TokenMask) -> PromptSet:
        """The same items with the weights of `token_mask` on their scored tokens.

        Raises:
            PromptError: the mask belongs to other prompts.
        """
        have = [len(tokens.scored) for tokens in self._tokens]
        got = [len(item) for item in token_mask.weights]
        if have != got:
            raise PromptError(
                f"{token_mask!r} does not fit {self!r}: scored tokens per item differ. "
                "Make the mask from this prompt set."
            )
        return self._derive(self._rows, self._tokens, token_mask.weights, self._name)

    def __add__(self, other: PromptSet) -> PromptSet:
        """The items of both sets, one after the other.

        Raises:
            PromptError: the sets have different tokenizers, or one is for a masked and one for a causal model.
        """
        if self._masked != other._masked:
            raise PromptError(f"cannot join {self!r} and {other!r}: one masked, one causal.")
        if (
            self._tokenizer is not other._tokenizer
            and self._tokenizer.get_vocab() != other._tokenizer.get_vocab()
        ):
            raise PromptError(f"cannot join {self!r} and {other!r}: their tokenizers differ.")
        weights = None
        if self._weights is not None or other._weights is not None:
            weights = tuple(
                tuple(part.weights(i)) for part in (self, other) for i in range(len(part))
            )
        name = self._name if self._name == other._name else f"{self._name}+{other._name}".strip("+")
        return self._derive(self._rows + other._rows, self._tokens + other._tokens, weights, name)

    def paraphrased(self) -> list[dict[str, Any]]:
        """Rows with each paraphrase in the place of its prompt, `paraphrase_of` naming the item it comes from.

        They are rows, not a set, because how rows are read (length limit, end token, chat) is chosen when a set
        is made: `PromptSet(forget.paraphrased(), tokenizer)`. Spans are dropped: they count characters of the
        old prompt.
        """
        return [
            {
                **{key: value for key, value in row.items() if key not in ("paraphrases", "spans")},
                "prompt": paraphrase,
                "paraphrase_of": index,
            }
            for index, row in enumerate(self._rows)
            for paraphrase in row.get("paraphrases", ())
        ]

    def _derive(
        self,
        rows: tuple[Mapping[str, Any], ...],
        tokens: tuple[Tokens, ...],
        weights: tuple[tuple[float, ...], ...] | None,
        name: str,
    ) -> PromptSet:
        made = PromptSet.__new__(PromptSet)
        made._reading = self._reading
        made._set(rows, tokens, weights, self._tokenizer, name, self._masked)
        return made

    def reread(self, rows: Iterable[Mapping[str, Any]], name: str | None = None) -> PromptSet:
        """Other rows, tokenised the way this set was (masked, length limit, end token, chat template).

        Raises:
            PromptError: as the constructor.
        """
        given = [check_row(row, f"row {index}") for index, row in enumerate(rows)]
        made = PromptSet.__new__(PromptSet)
        title = self._name if name is None else name
        places = [f"row {index}" for index in range(len(given))]
        made._fill(given, places, self._tokenizer, title, **self._reading)
        return made

    def with_ids(self, ids: Sequence[Sequence[int]], name: str | None = None) -> PromptSet:
        """The same rows and scored positions over other token ids, item by item of the same length.

        The rows keep the text as it was. For corrupted runs, which need the same positions.

        Raises:
            PromptError: not one list per item, or one of another length.
        """
        lengths = [len(tokens.ids) for tokens in self._tokens]
        if [len(item) for item in ids] != lengths:
            raise PromptError(f"{self!r}: expected ids of the lengths {lengths} (tokens).")
        tokens = tuple(
            replace(old, ids=tuple(new)) for old, new in zip(self._tokens, ids, strict=True)
        )
        return self._derive(self._rows, tokens, self._weights, self._name if name is None else name)

    def continued(
        self,
        indices: Sequence[int],
        continuations: Sequence[Sequence[int]],
        *,
        name: str | None = None,
    ) -> PromptSet:
        """The prompts at ``indices`` with other tokens behind them, all of which are scored.

        Tokens are taken as they are: reading a sampled text again could give others. The rows keep their text.

        Args:
            indices: items whose prompt, what stands before the first scored token, is kept; one may come often.
            continuations: token ids for each, at least one.
            name: what to call the set.

        Raises:
            PromptError: a masked set, not one continuation for each index, or an empty one.
        """
        if self._masked:
            raise PromptError(f"{self!r} is for a masked model, which does not continue text.")
        if not indices or len(indices) != len(continuations) or not all(map(len, continuations)):
            raise PromptError(
                f"{self!r}: expected a continuation of one token at least for each of {len(indices)} items."
            )
        tokens = []
        for index, added in zip(indices, continuations, strict=True):
            start = self.prompt_ids(index)
            places = tuple(range(len(start), len(start) + len(added)))
            tokens.append(Tokens((*start, *added), places, (False,) * len(added)))
        rows = tuple(self._rows[index] for index in indices)
        return self._derive(rows, tuple(tokens), None, self._name if name is None else name)

    def preceded(self, ids: Sequence[Sequence[int]], *, name: str | None = None) -> PromptSet:
        """The same items with tokens in front, behind the start token where an item begins with it.

        What is scored stays scored. Metrics then measure the model under the condition that such tokens set.

        Args:
            ids: token ids for each item.
            name: what to call the set.

        Raises:
            PromptError: not one list for each item.
        """
        if len(ids) != len(self):
            raise PromptError(f"{self!r}: expected tokens for {len(self)} items, got {len(ids)}.")
        start = self._tokenizer.bos_token_id
        tokens = []
        for old, added in zip(self._tokens, ids, strict=True):
            at = int(start is not None and old.ids[0] == start)
            tokens.append(
                replace(
                    old,
                    ids=(*old.ids[:at], *added, *old.ids[at:]),
                    scored=tuple(position + len(added) for position in old.scored),
                    subject=tuple(position + len(added) for position in old.subject),
                )
            )
        return self._derive(
            self._rows, tuple(tokens), self._weights, self._name if name is None else name
        )

    def followed(self, ids: Sequence[Sequence[int]], *, name: str | None = None) -> PromptSet:
        """The same items with tokens between each prompt and its target, before the first scored token.

        What is scored stays scored.

        Args:
            ids: token ids for each item.
            name: what to call the set.

        Raises:
            PromptError: not one list for each item.
        """
        if len(ids) != len(self):
            raise PromptError(f"{self!r}: expected tokens for {len(self)} items, got {len(ids)}.")
        tokens = []
        for old, added in zip(self._tokens, ids, strict=True):
            at = old.scored[0]
            tokens.append(
                replace(
                    old,
                    ids=(*old.ids[:at], *added, *old.ids[at:]),
                    scored=tuple(position + len(added) for position in old.scored),
                    subject=tuple(p + len(added) if p >= at else p for p in old.subject),
                )
            )
        return self._derive(
            self._rows, tuple(tokens), self._weights, self._name if name is None else name
        )

    # ---- batches ---------------------------------------------------------------------------------

    def batch(self, indices: Iterable[int]) -> Batch:
        """The items at `indices` as tensors, in that order.

        A causal item is one row. An item for a masked model is one row a scored token, with that token hidden and the
        others visible; or one row with all of them hidden, where the prompt held the mask token.
        """
        items = tuple(int(index) for index in indices)
        rows: list[tuple[int, ...]] = []
        marks: list[tuple[int, int, int, int, float]] = []  # row, pos, label, item, weight
        for place, index in enumerate(items):
            tokens, weights = self._tokens[index], self.weights(index)
            labels = [(p, tokens.ids[p], w) for p, w in zip(tokens.scored, weights, strict=True)]
            if not self._masked:
                marks += [(len(rows), p - 1, label, place, w) for p, label, w in labels]
                rows.append(tokens.ids)
            elif tokens.at_once:
                marks += [(len(rows), p, label, place, w) for p, label, w in labels]
                rows.append(self._hide(tokens.ids, tokens.scored))
            else:
                for p, label, w in labels:
                    marks.append((len(rows), p, label, place, w))
                    rows.append(self._hide(tokens.ids, (p,)))
        return self._pad(rows, marks, items)

    def batches(self, batch_size: int) -> list[Batch]:
        """All items in batches of at most `batch_size` rows, longest first, in an order fixed by the set alone.

        An item is never split, so a masked item with more scored tokens than `batch_size` makes a larger batch.

        Raises:
            PromptError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise PromptError(f"batch_size must be at least 1, got {batch_size}.")
        # Longest first: memory runs out at once or not at all, and rows of similar length waste little padding.
        order = sorted(range(len(self)), key=lambda i: (-len(self._tokens[i].ids), i))
        groups: list[list[int]] = []
        n_rows = batch_size
        for index in order:
            tokens = self._tokens[index]
            own = len(tokens.scored) if self._masked and not tokens.at_once else 1
            if n_rows + own > batch_size:
                groups.append([])
                n_rows = 0
            groups[-1].append(index)
            n_rows += own
        return [self.batch(group) for group in groups]

    def check_context(self, model: nn.Module) -> None:
        """Raise unless every item fits into the model's context.

        Raises:
            PromptError: an item is longer than the model's `max_position_embeddings`.
        """
        config = getattr(model, "config", None)
        config = config.get_text_config() if config is not None else None
        limit = getattr(config, "max_position_embeddings", None)
        if not isinstance(limit, int) or limit <= 0 or self.longest <= limit:
            return
        index = max(range(len(self)), key=lambda i: len(self._tokens[i].ids))
        raise PromptError(
            f"row {index} of {self!r} has {self.longest} tokens, more than the {limit} of the model's context. "
            f"Shorten or split it, or build the set with max_length={limit} to find every such row."
        )

    def _hide(self, ids: tuple[int, ...], positions: Sequence[int]) -> tuple[int, ...]:
        hidden = list(ids)
        for position in positions:
            hidden[position] = int(self._tokenizer.mask_token_id)
        return tuple(hidden)

    def _pad(
        self,
        rows: list[tuple[int, ...]],
        marks: list[tuple[int, int, int, int, float]],
        items: tuple[int, ...],
    ) -> Batch:
        pad = self._tokenizer.pad_token_id
        # Any id will do: what is padding is told by the attention mask alone.
        pad = pad if pad is not None else self._tokenizer.eos_token_id
        width = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), width), 0 if pad is None else int(pad), dtype=torch.long)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
            attention_mask[index, : len(row)] = 1
        whole = torch.tensor([mark[:4] for mark in marks], dtype=torch.long)
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            row=whole[:, 0],
            pos=whole[:, 1],
            label=whole[:, 2],
            item=whole[:, 3],
            weight=torch.tensor([mark[4] for mark in marks], dtype=torch.float32),
            items=items,
        )

    # ---- looking ---------------------------------------------------------------------------------

    def audit(self, index: int) -> str:
        """A listing of one item's tokens that marks exactly those which are scored, with their weights."""
        tokens, row = self._tokens[index], self._rows[index]
        weight_of = dict(zip(tokens.scored, self.weights(index), strict=True))
        label = f" (id {row['id']!r})" if "id" in row else ""
        if not self._masked:
            how = "causal: each scored token is predicted from everything before it"
        elif tokens.at_once:
            how = "masked: all scored tokens are hidden together"
        else:
            how = "masked: each scored token is hidden in turn, the others stay visible"
        lines = [f"item {index}{label}: {len(tokens.ids)} tokens, {len(tokens.scored)} scored", how]
        for position, token in enumerate(tokens.ids):
            mark = f"scored, weight {weight_of[position]:g}" if position in weight_of else ""
            text = repr(self._tokenizer.decode([token]))
            lines.append(f"{position:5d} {token:8d}  {text:<24}{mark}".rstrip())
        return "\n".join(lines)


def _as_mapping(row: object) -> object:
    """A string as plain text, a pair as prompt and target, anything else as it is."""
    if isinstance(row, str):
        return {"prompt": row}
    if isinstance(row, tuple) and len(row) == 2:
        return {"prompt": row[0], "target": row[1]}
    return row
