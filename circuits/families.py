"""What is known about each model family, as data.

One `Family` says where the weights of a layer are and how they are stored (`circuits.layout`), plus the few facts that
a layout cannot carry. Everything else (sizes, biases, norms on queries and keys, dense or expert layers) is read off
the model itself. A new family is one entry here and one tiny configuration in the tests, where output identities check
the entry without a reference model.

A weight may have alternatives: the first whose module a layer really has is used, so a model may mix dense and
mixture-of-experts layers. Where one model type comes in several forms, ``when`` names the configuration values that an
entry is for; the first entry that fits is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from circuits.layout import Weight

Roles = tuple[Weight, ...]

ATTENTION_ROLES = ("q", "k", "v", "o")
MLP_ROLES = ("gate", "up", "down")
ROLES = ATTENTION_ROLES + MLP_ROLES

CONTRACTED = {
    "q": ("d_model",),
    "k": ("d_model",),
    "v": ("d_model",),
    "o": ("head", "kv_head", "d_head"),
    "gate": ("d_model",),
    "up": ("d_model",),
    "down": ("neuron",),
}
"""Axes that the product with the input sums over, for each role; a bias has the others."""


@dataclass(frozen=True)
class Family:
    """Where the weights of one family are, and how it is wired.

    Attributes:
        names: the ``model_type`` values it covers.
        layers: path of the list of layers inside the base model.
        q, k, v, o, gate, up, down: the weights of a layer; ``gate`` is empty where the MLP has none.
        attn, mlp: modules, relative to a layer, whose parameters make up the block. Layer norms stand outside.
        embed: modules of the base model that run before the first layer.
        n_kv_heads: configuration field with the number of key-value heads, or the number itself.
        q_norm, k_norm: modules that normalise queries and keys, where the model has them.
        target: "last" if a token is predicted from the position before it, "mask" if from its own.
        norm: where layer norms act: "pre" on the input of a block, "post" on the sum after it, "branch" on its output
            before the sum, "both" on input and output.
        parallel: attention and MLP read the same residual stream; a string names the configuration flag that says so.
        up_offset: what a gated MLP adds to ``up`` before the product, so that a neuron is ``act(gate) (up + offset)``.
        when: configuration values that this entry is for.
    """

    names: tuple[str, ...]
    layers: str
    q: Roles
    k: Roles
    v: Roles
    o: Roles
    up: Roles
    down: Roles
    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    embed: tuple[str, ...]
    gate: Roles = ()
    n_kv_heads: str | int = "num_attention_heads"
    q_norm: str = ""
    k_norm: str = ""
    target: Literal["last", "mask"] = "last"
    norm: Literal["pre", "post", "branch", "both"] = "pre"
    parallel: bool | str = False
    up_offset: float = 0.0
    when: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, config: Any) -> bool:
        """Whether this entry is for a model with this configuration."""
        return getattr(config, "model_type", None) in self.names and all(
            getattr(config, key, None) == value for key, value in self.when.items()
        )

    def weights(self, role: str) -> Roles:
        """The alternatives for one role, a name in ``ROLES``."""
        alternatives: Roles = getattr(self, role)
        return alternatives


def _w(*texts: str) -> Roles:
    return tuple(Weight(text) for text in texts)


_LLAMA = Family(
    names=("llama", "mistral", "qwen2", "qwen3", "gemma"),
    layers="layers",
    q=_w("self_attn.q_proj | (head d_head) d_model"),
    k=_w("self_attn.k_proj | (kv_head d_head) d_model"),
    v=_w("self_attn.v_proj | (kv_head d_head) d_model"),
    o=_w("self_attn.o_proj | d_model (head d_head)"),
    gate=_w("mlp.gate_proj | neuron d_model"),
    up=_w("mlp.up_proj | neuron d_model"),
    down=_w("mlp.down_proj | d_model neuron"),
    attn=("self_attn",),
    mlp=("mlp",),
    embed=("embed_tokens",),
    n_kv_heads="num_key_value_heads",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)
_GEMMA2 = replace(_LLAMA, names=("gemma2", "gemma3_text"), norm="both")
_EXPERTS = replace(
    _LLAMA,
    names=("mixtral", "qwen3_moe", "olmoe"),
    gate=_w("mlp.experts:gate_up_proj | expert (two neuron) d_model @ two=0", _LLAMA.gate[0].text),
    up=_w("mlp.experts:gate_up_proj | expert (two neuron) d_model @ two=1", _LLAMA.up[0].text),
    down=_w("mlp.experts:down_proj | expert d_model neuron", _LLAMA.down[0].text),
)
_GPT_NEOX = Family(
    names=("gpt_neox",),
    layers="layers",
    q=_w("attention.query_key_value | (head qkv d_head) d_model @ qkv=0"),
    k=_w("attention.query_key_value | (head qkv d_head) d_model @ qkv=1"),
    v=_w("attention.query_key_value | (head qkv d_head) d_model @ qkv=2"),
    o=_w("attention.dense | d_model (head d_head)"),
    up=_w("mlp.dense_h_to_4h | neuron d_model"),
    down=_w("mlp.dense_4h_to_h | d_model neuron"),
    attn=("attention",),
    mlp=("mlp",),
    embed=("embed_in",),
    parallel="use_parallel_residual",
)
_BLOOM = replace(
    _GPT_NEOX,
    names=("bloom",),
    layers="h",
    q=_w("self_attention.query_key_value | (head qkv d_head) d_model @ qkv=0"),
    k=_w("self_attention.query_key_value | (head qkv d_head) d_model @ qkv=1"),
    v=_w("self_attention.query_key_value | (head qkv d_head) d_model @ qkv=2"),
    o=_w("self_attention.dense | d_model (head d_head)"),
    attn=("self_attention",),
    embed=("word_embeddings", "word_embeddings_layernorm"),
    parallel=False,
)
# One layout serves all Falcons: the queries of a group, then its key, then its value. With as many groups as heads it
# is the interleaved one, with a single group the multi-query one. Only the number of groups is told differently.
_FALCON = replace(
    _BLOOM,
    names=("falcon",),
    q=_w("self_attention.query_key_value | (kv_head slot d_head) d_model @ slot=:-2"),
    k=_w("self_attention.query_key_value | (kv_head slot d_head) d_model @ slot=-2"),
    v=_w("self_attention.query_key_value | (kv_head slot d_head) d_model @ slot=-1"),
    embed=("word_embeddings",),
    n_kv_heads="num_kv_heads",
    parallel=True,
    when={"new_decoder_architecture": True},
)
_OPT = Family(
    names=("opt",),
    layers="decoder.layers",
    q=_w("self_attn.q_proj | (head d_head) d_model"),
    k=_w("self_attn.k_proj | (head d_head) d_model"),
    v=_w("self_attn.v_proj | (head d_head) d_model"),
    o=_w("self_attn.out_proj | d_model (head d_head)"),
    up=_w("fc1 | neuron d_model"),
    down=_w("fc2 | d_model neuron"),
    attn=("self_attn",),
    mlp=("fc1", "fc2"),
    embed=("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"),
    when={"do_layer_norm_before": True},
)
_BERT = Family(
    names=("bert", "roberta"),
    layers="encoder.layer",
    q=_w("attention.self.query | (head d_head) d_model"),
    k=_w("attention.self.key | (head d_head) d_model"),
    v=_w("attention.self.value | (head d_head) d_model"),
    o=_w("attention.output.dense | d_model (head d_head)"),
    up=_w("intermediate.dense | neuron d_model"),
    down=_w("output.dense | d_model neuron"),
    attn=("attention.self", "attention.output.dense"),
    mlp=("intermediate", "output.dense"),
    embed=("embeddings",),
    target="mask",
    norm="post",
)

FAMILIES: tuple[Family, ...] = (
    _LLAMA,
    replace(_GEMMA2, target="mask", when={"use_bidirectional_attention": True}),
    _GEMMA2,
    replace(_LLAMA, names=("olmo2",), norm="branch"),
    replace(
        _LLAMA,
        names=("stablelm",),
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        parallel="use_parallel_residual",
    ),
    replace(
        _LLAMA,
        names=("phi",),
        o=_w("self_attn.dense | d_model (head d_head)"),
        gate=(),
        up=_w("mlp.fc1 | neuron d_model"),
        down=_w("mlp.fc2 | d_model neuron"),
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        parallel=True,
    ),
    replace(
        _LLAMA,
        names=("phi3",),
        q=_w("self_attn.qkv_proj | (head d_head + kv_head d_head + kv_head d_head) d_model @ 0"),
        k=_w("self_attn.qkv_proj | (head d_head + kv_head d_head + kv_head d_head) d_model @ 1"),
        v=_w("self_attn.qkv_proj | (head d_head + kv_head d_head + kv_head d_head) d_model @ 2"),
        gate=_w("mlp.gate_up_proj | (two neuron) d_model @ two=0"),
        up=_w("mlp.gate_up_proj | (two neuron) d_model @ two=1"),
    ),
    _EXPERTS,
    replace(
        _EXPERTS,
        names=("gpt_oss",),
        gate=_w("mlp.experts:gate_up_proj | expert d_model (neuron two) @ two=0"),
        up=_w("mlp.experts:gate_up_proj | expert d_model (neuron two) @ two=1"),
        down=_w("mlp.experts:down_proj | expert neuron d_model"),
        up_offset=1.0,
    ),
    Family(
        names=("gpt2",),
        layers="h",
        q=_w("attn.c_attn | d_model (qkv head d_head) @ qkv=0"),
        k=_w("attn.c_attn | d_model (qkv head d_head) @ qkv=1"),
        v=_w("attn.c_attn | d_model (qkv head d_head) @ qkv=2"),
        o=_w("attn.c_proj | (head d_head) d_model"),
        up=_w("mlp.c_fc | d_model neuron"),
        down=_w("mlp.c_proj | neuron d_model"),
        attn=("attn",),
        mlp=("mlp",),
        embed=("wte", "wpe"),
    ),
    Family(
        names=("gpt_neo",),
        layers="h",
        q=_w("attn.attention.q_proj | (head d_head) d_model"),
        k=_w("attn.attention.k_proj | (head d_head) d_model"),
        v=_w("attn.attention.v_proj | (head d_head) d_model"),
        o=_w("attn.attention.out_proj | d_model (head d_head)"),
        up=_w("mlp.c_fc | neuron d_model"),
        down=_w("mlp.c_proj | d_model neuron"),
        attn=("attn",),
        mlp=("mlp",),
        embed=("wte", "wpe"),
    ),
    Family(
        names=("gptj",),
        layers="h",
        q=_w("attn.q_proj | (head d_head) d_model"),
        k=_w("attn.k_proj | (head d_head) d_model"),
        v=_w("attn.v_proj | (head d_head) d_model"),
        o=_w("attn.out_proj | d_model (head d_head)"),
        up=_w("mlp.fc_in | neuron d_model"),
        down=_w("mlp.fc_out | d_model neuron"),
        attn=("attn",),
        mlp=("mlp",),
        embed=("wte",),
        parallel=True,
    ),
    _GPT_NEOX,
    _BLOOM,
    _FALCON,
    replace(
        _FALCON,
        n_kv_heads=1,
        parallel="parallel_attn",
        when={"new_decoder_architecture": False, "multi_query": True},
    ),
    replace(
        _FALCON,
        n_kv_heads="num_attention_heads",
        parallel="parallel_attn",
        when={"new_decoder_architecture": False, "multi_query": False},
    ),
    _OPT,
    replace(_OPT, norm="post", when={"do_layer_norm_before": False}),
    _BERT,
    replace(
        _BERT,
        names=("distilbert",),
        layers="transformer.layer",
        q=_w("attention.q_lin | (head d_head) d_model"),
        k=_w("attention.k_lin | (head d_head) d_model"),
        v=_w("attention.v_lin | (head d_head) d_model"),
        o=_w("attention.out_lin | d_model (head d_head)"),
        up=_w("ffn.lin1 | neuron d_model"),
        down=_w("ffn.lin2 | d_model neuron"),
        attn=("attention",),
        mlp=("ffn",),
    ),
)
"""Every family that is known. Where two entries fit a configuration, the first one counts."""


def supported() -> tuple[str, ...]:
    """The ``model_type`` values that the table covers, sorted."""
    return tuple(sorted({name for family in FAMILIES for name in family.names}))
