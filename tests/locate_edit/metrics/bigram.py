"""A language model worked out by hand: the next token depends on the last one through a table in the test."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token of the vocabulary."""
    return int(tokenizer.get_vocab()[token])


class Bigram(nn.Module):
    """p(next | last) from a table of probabilities; rows that the table lacks are uniform.

    It has what metrics use of a Hugging Face model: an output embedding, `logits`, and a cache (the last token
    is enough).
    """

    def __init__(self, vocab: int, table: Mapping[int, Mapping[int, float]]) -> None:
        super().__init__()
        probabilities = torch.full((vocab, vocab), 1.0 / vocab)
        for last, row in table.items():
            rest = (1.0 - sum(row.values())) / (vocab - len(row))
            probabilities[last] = rest
            for token, probability in row.items():
                probabilities[last, token] = probability
        self.states = nn.Embedding.from_pretrained(torch.eye(vocab))
        self.head = nn.Linear(vocab, vocab, bias=False)
        self.head.weight.data = probabilities.clamp(min=1e-30).log().T.contiguous()
        self.n_calls = 0
        self.n_tokens = 0

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> SimpleNamespace:
        self.n_calls += 1
        self.n_tokens += input_ids.numel()
        return SimpleNamespace(logits=self.head(self.states(input_ids)), past_key_values="cache")
