"""Tiny random models of every family, and tokenizers, made in memory from a seed.

`tiny("llama")` takes milliseconds. Sizes differ from one another wherever a family allows it, key-value heads are
shared where it can, biases and norms are random instead of zero and one, so that a confusion shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

VOCAB = 300
"""Enough for `byte_tokenizer`."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_WIDE_HEADS = {
    **_GROUPED,
    "head_dim": 8,
}  # heads that do not add up to the width of the residual stream
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "intermediate_size": 20}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 24,
    "n_inner": 40,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# name of the variant -> (model_type, configuration)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "llama-biases": ("llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "mistral": ("mistral", _WIDE_HEADS),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _WIDE_HEADS),
    "gemma": ("gemma", {**_WIDE_HEADS, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {**_WIDE_HEADS, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "gemma3_text": (
        "gemma3_text",
        {**_WIDE_HEADS, "query_pre_attn_scalar": 8, "sliding_window": 8},
    ),
    "gemma3_text-bidirectional": (
        "gemma3_text",
        {**_WIDE_HEADS, "query_pre_attn_scalar": 8, "use_bidirectional_attention": True},
    ),
    "olmo2": ("olmo2", _GROUPED),
    "phi": ("phi", {**_GROUPED, "partial_rotary_factor": 0.67}),
    "phi-qk_norm": ("phi", {**_GROUPED, "partial_rotary_factor": 0.67, "qk_layernorm": True}),
    "phi3": ("phi3", _GROUPED),
    "gpt2": ("gpt2", _GPT),
    "gpt_neo": (
        "gpt_neo",
        {
            **{k: v for k, v in _COMMON.items() if not k.startswith("num_")},
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "gpt_neox": ("gpt_neox", {**_COMMON, "rotary_pct": 0.67}),
    "gpt_neox-sequential": (
        "gpt_neox",
        {**_COMMON, "rotary_pct": 0.67, "use_parallel_residual": False},
    ),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "bloom": (
        "bloom",
        {"vocab_size": VOCAB, "hidden_size": 24, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    ),
    "falcon": ("falcon", {**_COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-multi_query": ("falcon", {**_COMMON, "multi_query": True, "bias": True}),
    "falcon-alibi": (
        "falcon",
        {
            **_COMMON,
            "multi_query": False,
            "alibi": True,
            "parallel_attn": False,
            "ffn_hidden_size": 40,
        },
    ),
    "opt": (
        "opt",
        {
            **{k: v for k, v in _COMMON.items() if k != "intermediate_size"},
            "ffn_dim": 40,
            "word_embed_proj_dim": 24,
        },
    ),
    "opt-post_norm": (
        "opt",
        {
            **{k: v for k, v in _COMMON.items() if k != "intermediate_size"},
            "ffn_dim": 40,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
    ),
    "stablelm": ("stablelm", {**_GROUPED, "use_qkv_bias": True}),
    "stablelm-parallel": (
        "stablelm",
        {**_GROUPED, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "bert": ("bert", _COMMON),
    "roberta": ("roberta", {**_COMMON, "pad_token_id": 1, "bos_token_id": 0}),
    "distilbert": (
        "distilbert",
        {
            "vocab_size": VOCAB,
            "dim": 24,
            "hidden_dim": 40,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
        },
    ),
    "mixtral": ("mixtral", {**_EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 20,
            "intermediate_size": 40,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 1,
            "head_dim": 8,
        },
    ),
    "olmoe": ("olmoe", {**_EXPERTS, "num_experts": 4}),
    "gpt_oss": (
        "gpt_oss",
        {
            **_EXPERTS,
            "num_local_experts": 4,
            "head_dim": 8,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}

MASKED = ("bert", "roberta", "distilbert")

SQUARE = {
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
"""Overrides that make every matrix of a llama-like model square: shape checks see nothing then."""


def tiny(
    name: str,
    *,
    seed: int = 0,
    auto: Any = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Any:
    """A tiny random model in evaluation mode.

    Args:
        name: a key of ``CONFIGS``.
        seed: of all weights.
        auto: the Auto class to build with; by default the one for causal or masked language models.
        dtype: of all parameters.
        **overrides: configuration values to change, e.g. ``num_hidden_layers=4``.
    """
    model_type, settings = CONFIGS[name]
    config = AutoConfig.for_model(model_type, **{**settings, **overrides})
    config._experts_implementation = (
        "eager"  # the faster kernels refuse float64 and need a GPU to pay
    )
    config._attn_implementation = "eager"
    if auto is None:
        auto = AutoModelForMaskedLM if model_type in MASKED else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = auto.from_config(config)
    randomise(model, seed)
    return model.to(dtype).eval()


def randomise(model: nn.Module, seed: int) -> None:
    """Replace all weights: matrices of unit gain, biases and norms clearly away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))


def token_ids(*shape: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Random token ids, none of them a special token of the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, vocab, shape, generator=generator)


def byte_tokenizer(
    *, pad: str | None = "<pad>", mask: bool = False, prefix: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per UTF-8 byte, made in code. Fits every tiny model.

    Args:
        pad: the padding token; None for a tokenizer that has none.
        mask: whether it has a mask token and wraps texts in [CLS] and [SEP], as masked models do.
        prefix: whether it puts <s> before every text, as many causal models do.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, vocabulary, pad=pad, mask=mask, prefix=prefix)


def word_tokenizer(
    words: Sequence[str], *, pad: str | None = "<pad>", mask: bool = False, prefix: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, split at white space and punctuation; unknown words become <unk>."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrap(tokenizer, vocabulary, pad=pad, mask=mask, prefix=prefix)


def _wrap(
    tokenizer: Tokenizer, vocabulary: dict[str, int], *, pad: str | None, mask: bool, prefix: bool
) -> PreTrainedTokenizerFast:
    if mask:
        ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
        template = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        tokenizer.post_processor = template
    elif prefix:
        start = [("<s>", vocabulary["<s>"])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=start
        )
    names: dict[str, str] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if pad is not None:
        names["pad_token"] = pad
    if mask:
        names |= {"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
