"""The model, the text and the masks that the engine is timed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from circuits import ComponentMask, Site
from locate_edit.prompts import Batch, PromptSet

ROWS, TOKENS = 8, 128
"""Rows of a batch and tokens of a row: 1024 tokens a step."""


@dataclass(frozen=True)
class Size:
    """A Llama-type model with tied embeddings, and the ranks that give PEFT the entries of our masks.

    Attributes:
        neurons: selected neurons a layer, about 1%: a number for which SHiRA's ``rank * (d_model + d_mlp)`` entries
            a matrix are exactly those of the neurons.
        rank: that rank, also LoRA's.
    """

    layers: int
    d_model: int
    d_mlp: int
    heads: int
    vocab: int
    neurons: int
    rank: int


SIZES = {
    "45m": Size(12, 512, 1536, 8, 8192, neurons=16, rank=4),
    "45m-32k": Size(8, 512, 1536, 8, 32000, neurons=16, rank=4),
    "150m": Size(16, 768, 2304, 12, 32000, neurons=24, rank=6),
    "tiny": Size(4, 64, 192, 4, 300, neurons=4, rank=1),
}


def make_model(size: Size, *, seed: int = 0) -> LlamaForCausalLM:
    """A model of random weights in evaluation mode."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.d_model,
        intermediate_size=size.d_mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=2 * TOKENS,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.eval()
    return model


def make_prompts(size: Size, *, seed: int = 0, rows: int = ROWS, tokens: int = TOKENS) -> PromptSet:
    """Rows of random words, one token a word: every token but a row's first is labelled."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{i}" for i in range(len(special), size.vocab))]
    numbers = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(special), size.vocab, (rows, tokens), generator=generator).tolist()
    return PromptSet([" ".join(f"w{i}" for i in row) for row in drawn], fast, name="random words")


def neuron_mask(size: Size, start: int, *, seed: int = 0) -> ComponentMask:
    """``size.neurons`` random neurons of every layer from ``start`` upwards."""
    generator = torch.Generator().manual_seed(seed)
    on = {}
    for layer in range(size.layers):
        chosen = torch.randperm(size.d_mlp, generator=generator)[: size.neurons]
        flags = torch.zeros(size.d_mlp, dtype=torch.bool)
        flags[chosen] = True
        if layer >= start:
            on[Site(layer, "neuron")] = flags
    return ComponentMask(on)


def labels_of(batch: Batch) -> torch.Tensor:
    """What Hugging Face models take as ``labels`` `row token`: the tokens themselves, padding left out."""
    return batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
