"""The tables of `models.py`: what other implementations compute, and their names and shapes of settings and weights.

Each family is one table for both directions, import and export.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from transformer.config import TransformerConfig

Arrays = dict[str, np.ndarray]

# --- Layouts: how one of their arrays holds one or more of ours ---------------------------------------------------


class Layout(NamedTuple):
    join: Callable[..., np.ndarray]  # our arrays -> theirs
    split: Callable[[np.ndarray], Iterable[np.ndarray]]  # theirs -> ours


SAME = Layout(lambda x: x, lambda x: [x])
FLAT = Layout(lambda x: x, lambda x: [x.reshape(-1)])
TRANSPOSED = Layout(lambda x: x.T, lambda x: [x.T])  # torch.nn.Linear holds [out, in]
SIDE_BY_SIDE = Layout(lambda *xs: np.concatenate(xs, -1), lambda x: np.split(x, 3, -1))  # q, k, v
ONE_EXPERT = Layout(lambda x: x[None], lambda x: [x[0]])
INTERLEAVED = Layout(  # gate and up of one expert, in alternate columns
    lambda gate, up: np.stack([gate, up], -1).reshape(1, *gate.shape[:-1], -1),
    lambda x: [x[0, ..., ::2], x[0, ..., 1::2]],
)


class Rule(NamedTuple):
    theirs: str  # {n} stands for the number of the block
    ours: tuple[str, ...]
    layout: Layout


_LINEAR = {".weight": "kernel", ".bias": "bias"}


def _layer(theirs: str, *ours: str, layout: Layout = TRANSPOSED, parts: Mapping[str, str] = _LINEAR) -> list[Rule]:
    """A rule for each array of a layer of theirs, which may hold several of ours; `parts` are its endings and ours."""
    return [Rule(theirs + end, tuple(f"{name}.{part}" for name in ours), layout) for end, part in parts.items()]


def _layers(theirs: str, ours: str, **names: str) -> list[Rule]:
    """The rules for linear maps of one module, by their names and ours."""
    return [rule for name, own in names.items() for rule in _layer(f"{theirs}.{name}", f"{ours}.{own}")]


_layer_norm = partial(_layer, layout=SAME, parts={".weight": "scale", ".bias": "bias"})
_experts = partial(_layer, parts={"": "kernel", "_bias": "bias"})

# --- Families -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A class of transformers in our settings, and its names of them.

    Attributes:
      settings: our setting -> their key and its default, if only the name differs.
      fixed: the values of our settings that the class always has.
      demands: their key -> the only value that we support, and its default.
      activations: their name of the activation -> our `mlp`; the first is their default.
      theta, rope: the rotary base and scaling if config.json has none.
      constants: arrays of theirs that have no counterpart here; written, and ignored when read.
    """

    model_type: str
    architecture: str
    rules: tuple[Rule, ...]
    settings: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]
    activations: Mapping[str, str]
    activation_key: str = "hidden_act"
    demands: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    theta: float = 10_000.0
    rope: Mapping[str, Any] = field(default_factory=dict)
    constants: Callable[[TransformerConfig], Arrays] = lambda config: {}


_PLAIN_BLOCKS = {"sink_pattern": "S", "attention_gate": "none", "exclusive_attention": False, "residual_scalars": False}
_QUERY_KEY_VALUE = [f"blocks.{{n}}.attention.{part}" for part in ("query", "key", "value")]

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    rules=(
        Rule("transformer.wte.weight", ("embedding.embedding",), SAME),
        Rule("transformer.wpe.weight", ("positions.embedding",), SAME),
        *_layer_norm("transformer.h.{n}.ln_1", "blocks.{n}.attention_norm"),
        *_layer("transformer.h.{n}.attn.c_attn", *_QUERY_KEY_VALUE, layout=SIDE_BY_SIDE),
        *_layer("transformer.h.{n}.attn.c_proj", "blocks.{n}.attention.out", layout=SAME),
        *_layer_norm("transformer.h.{n}.ln_2", "blocks.{n}.mlp_norm"),
        *_layer("transformer.h.{n}.mlp.c_fc", "blocks.{n}.mlp.up", layout=SAME),
        *_layer("transformer.h.{n}.mlp.c_proj", "blocks.{n}.mlp.down", layout=SAME),
        *_layer_norm("transformer.ln_f", "final_norm"),
        Rule("lm_head.weight", ("head.kernel",), TRANSPOSED),
    ),
    settings={
        "vocab_size": ("vocab_size", 50257),
        "context_len": ("n_positions", 1024),
        "embedding_dim": ("n_embd", 768),
        "num_blocks": ("n_layer", 12),
        "num_heads": ("n_head", 12),
        "mlp_dim": ("n_inner", None),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    fixed={
        **{"norm": "layernorm", "norm_bias": True, "position": "learned", "qk_norm": "none", "attention_sink": "none"},
        **_PLAIN_BLOCKS,
        **{"sliding_window": 0, "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True, "logit_softcap": 0.0},
    },
    activations={"gelu_new": "gelu_tanh", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"},
    activation_key="activation_function",
    demands={
        **{"scale_attn_weights": (True, True), "scale_attn_by_inverse_layer_idx": (False, False)},
        "add_cross_attention": (False, False),
    },
)


def _llama_rules(*mlp: Rule) -> tuple[Rule, ...]:
    """Llama's names, which Qwen3 and gpt-oss share outside the MLP."""
    projections = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    return (
        Rule("model.embed_tokens.weight", ("embedding.embedding",), SAME),
        Rule("model.layers.{n}.input_layernorm.weight", ("blocks.{n}.attention_norm.scale",), SAME),
        *_layers("model.layers.{n}.self_attn", "blocks.{n}.attention", **projections),
        Rule("model.layers.{n}.post_attention_layernorm.weight", ("blocks.{n}.mlp_norm.scale",), SAME),
        *mlp,
        Rule("model.norm.weight", ("final_norm.scale",), SAME),
        Rule("lm_head.weight", ("head.kernel",), TRANSPOSED),
    )


_GATED_MLP = _layers("model.layers.{n}.mlp", "blocks.{n}.mlp", gate_proj="gate", up_proj="up", down_proj="down")
_BIASES = "qkv_bias", "attention_out_bias"  # they have one key for both
_LLAMA_SETTINGS = {
    "vocab_size": ("vocab_size", 32000),
    "context_len": ("max_position_embeddings", 2048),
    "embedding_dim": ("hidden_size", 4096),
    "num_blocks": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "mlp_dim": ("intermediate_size", 11008),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", False),
    **dict.fromkeys(_BIASES, ("attention_bias", False)),
}
_LLAMA_FIXED = {
    **{"norm": "rmsnorm", "position": "rope", "qk_norm": "none", "attention_sink": "none", "logit_softcap": 0.0},
    **_PLAIN_BLOCKS,
}
_SILU = {"silu": "swiglu", "swish": "swiglu"}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    rules=_llama_rules(*_GATED_MLP),
    settings={**_LLAMA_SETTINGS, "mlp_bias": ("mlp_bias", False)},
    fixed={**_LLAMA_FIXED, "sliding_window": 0},
    activations=_SILU,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    rules=_llama_rules(
        Rule("model.layers.{n}.self_attn.q_norm.weight", ("blocks.{n}.attention.query_norm.scale",), SAME),
        Rule("model.layers.{n}.self_attn.k_norm.weight", ("blocks.{n}.attention.key_norm.scale",), SAME),
        *_GATED_MLP,
    ),
    settings={**_LLAMA_SETTINGS, "head_dim": ("head_dim", 128)},
    fixed={**_LLAMA_FIXED, "qk_norm": "scaled", "mlp_bias": False},
    activations=_SILU,
)
GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    rules=_llama_rules(
        Rule("model.layers.{n}.self_attn.sinks", ("blocks.{n}.attention.sink",), SAME),
        *_experts(
            "model.layers.{n}.mlp.experts.gate_up_proj", "blocks.{n}.mlp.gate", "blocks.{n}.mlp.up", layout=INTERLEAVED
        ),
        *_experts("model.layers.{n}.mlp.experts.down_proj", "blocks.{n}.mlp.down", layout=ONE_EXPERT),
    ),
    settings={
        **_LLAMA_SETTINGS,
        "norm_eps": ("rms_norm_eps", 1e-5),
        **dict.fromkeys(_BIASES, ("attention_bias", True)),
    },
    fixed={**_LLAMA_FIXED, "attention_sink": "logit", "mlp_bias": True},
    activations={"silu": "swiglu_clamped"},
    demands={
        **{"num_local_experts": (1, 128), "num_experts_per_tok": (1, 1)},
        **{"swiglu_limit": (7.0, 7.0), "swiglu_alpha": (1.702, 1.702)},
    },
    theta=150_000.0,
    rope={"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    constants=lambda config: {  # a router over one expert gives it weight 1, whatever its own weights are
        f"model.layers.{n}.mlp.router.{part}": np.zeros(shape, np.float32)
        for n in range(config.num_blocks)
        for part, shape in (("weight", (1, config.embedding_dim)), ("bias", (1,)))
    },
)
FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, QWEN3, GPT_OSS)}

ORIGINAL_RULES = (
    Rule("embed.W_E.weight", ("embedding.embedding",), SAME),
    Rule("embed.W_pos.weight", ("positions.embedding",), SAME),
    *_layer_norm("blocks.{n}.layer_norm1", "blocks.{n}.attention_norm"),
    *_layers("blocks.{n}.Attention_Layers", "blocks.{n}.attention", W_Q="query", W_K="key", W_V="value", W_out="out"),
    Rule("blocks.{n}.Attention_Layers.sink_scalar", ("blocks.{n}.attention.sink",), FLAT),
    *_layer_norm("blocks.{n}.layer_norm2", "blocks.{n}.mlp_norm"),
    *_layers("blocks.{n}.MLP_Layers", "blocks.{n}.mlp", layer1="up", layer2="down"),
    *_layer_norm("final_layer_norm", "final_norm"),
    Rule("deembed.W_D.weight", ("head.kernel",), TRANSPOSED),
)

# Buffers that some files have among the weights.
BUFFER = re.compile(r".*(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq|causal_mask)")
