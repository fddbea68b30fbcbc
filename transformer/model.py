"""The model: a decoder-only Transformer. Its settings cover the original, GPT-2, Llama, Qwen3 and gpt-oss's attention.

Shapes: B batch, T time, D embedding_dim, N query heads, K key/value heads, H head_dim, F mlp_dim, V vocabulary.
Weights are 2-D, [in, out], and float32; they are cast to the compute dtype where they are used.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from transformer import forms
from transformer.attention import Cache, LayerCache, attend_heads_first, visible_slots, write
from transformer.config import TransformerConfig
from transformer.half import half_dot_general, half_product
from transformer.kernels.choose import causal_attention
from transformer.rotary import rope_frequencies, rotate, rotation
from transformer.sharding import constrain, part_shape
from transformer.stack import run_blocks
from transformer.xla import dot_general, materialize

CacheAccess = tuple[LayerCache, jax.Array, dict[int, jax.Array]]  # a layer's, the first slot to write, masks by window
Params = dict[str, jax.Array]  # "blocks.0.attention.query.kernel" -> array


class TokenInfo(NamedTuple):
    """What the blocks know of the tokens besides the residual stream. Document 0 may lack its beginning."""

    turn: tuple[jax.Array, jax.Array] | None  # rotary cosines and sines, see `rotation`
    document_BT: jax.Array | None  # each token's document number
    first_BTD: jax.Array  # what entered the first block


_normal = nnx.initializers.normal(0.02)


def _output_initializer(config: TransformerConfig) -> nnx.Initializer:
    """For the two projections that write into the residual stream ("scaled": GPT-2, 0.02 / sqrt(2 blocks))."""
    if config.output_init == "zero":
        return nnx.initializers.zeros_init()
    scale = math.sqrt(2 * config.num_blocks) if config.output_init == "scaled" else 1.0
    return nnx.initializers.normal(0.02 / scale)


def _linear(n_in: int, n_out: int, bias: bool, config: TransformerConfig, rngs: nnx.Rngs, init=None) -> nnx.Linear:
    product = half_dot_general if config.dtype == "bfloat16_matmul" else dot_general
    options: dict[str, Any] = {"dtype": config.activation_dtype, "dot_general": product}
    return nnx.Linear(n_in, n_out, use_bias=bias, kernel_init=init or _normal, rngs=rngs, **options)


def _embed(rows: int, width: int, config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(rows, width, embedding_init=_normal, dtype=config.activation_dtype, rngs=rngs)


def _rows(embed: nnx.Embed, at: jax.Array, config: TransformerConfig) -> jax.Array:
    """Rows of a table in the activations' dtype; the gradients of one that is taken often are summed in the table's."""
    return jnp.take(embed.embedding[...], at, axis=0).astype(config.activation_dtype)


def _norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Module:
    common: dict[str, Any] = {"epsilon": config.norm_eps, "dtype": config.activation_dtype, "rngs": rngs}
    if config.norm == "rmsnorm":
        return nnx.RMSNorm(config.embedding_dim, **common)
    # The one-pass variance E[x^2] - E[x]^2 loses precision; the two-pass form takes no measurable time.
    return nnx.LayerNorm(config.embedding_dim, use_bias=config.norm_bias, use_fast_variance=False, **common)


class Attention(nnx.Module):
    """Queries, keys, values, the sinks, and the projection back into the residual stream."""

    def __init__(self, config: TransformerConfig, layer: int, rngs: nnx.Rngs):
        c = self.config = config
        self.window, self.sinks = c.window(layer), c.sink(layer)
        self.query = _linear(c.embedding_dim, c.num_heads * c.head_dim, c.qkv_bias, c, rngs)
        self.key = _linear(c.embedding_dim, c.num_kv_heads * c.head_dim, c.qkv_bias, c, rngs)
        self.value = _linear(c.embedding_dim, c.num_kv_heads * c.head_dim, c.qkv_bias, c, rngs)
        out_init = _output_initializer(c)
        self.out = _linear(c.num_heads * c.head_dim, c.embedding_dim, c.attention_out_bias, c, rngs, out_init)
        if c.qk_norm != "none":
            own: dict[str, Any] = {"epsilon": c.norm_eps, "dtype": c.activation_dtype, "rngs": rngs}
            own["use_scale"] = c.qk_norm == "scaled"
            self.query_norm, self.key_norm = nnx.RMSNorm(c.head_dim, **own), nnx.RMSNorm(c.head_dim, **own)
        if self.sinks == "logit":
            self.sink = nnx.Param(jnp.zeros(c.num_heads, jnp.float32))
        if self.sinks == "key":
            self.sink_key = nnx.Param(jnp.zeros((c.num_kv_heads, c.head_dim), jnp.float32))
        if c.attention_gate != "none":
            rngs = nnx.Rngs(rngs.forms())  # keys of its own, so that all other weights begin as without it
            width = c.num_heads * (c.head_dim if c.attention_gate == "channel" else 1)
            self.gate = _linear(c.embedding_dim, width, False, c, rngs)

    def project(self, x_BTD: jax.Array, info: TokenInfo) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], normalised and rotated, in the dtype of operands; and the
        sinks' logits, as `attend` takes them."""
        c, B, T = self.config, *x_BTD.shape[:2]
        q_BTNH = self.query(x_BTD).reshape(B, T, c.num_heads, c.head_dim)
        k_BTKH, v_BTKH = (f(x_BTD).reshape(B, T, c.num_kv_heads, c.head_dim) for f in (self.key, self.value))
        if c.qk_norm != "none":
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        sink = forms.sink_logits(self.sinks, q_BTNH, getattr(self, "sink", None), getattr(self, "sink_key", None))
        if info.turn is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, info.turn), rotate(k_BTKH, info.turn)
        return q_BTNH.astype(c.operand_dtype), k_BTKH.astype(c.operand_dtype), v_BTKH.astype(c.operand_dtype), sink

    def __call__(
        self, x_BTD: jax.Array, info: TokenInfo, access: CacheAccess | None
    ) -> tuple[jax.Array, LayerCache | None]:
        c = self.config
        q_BTNH, k_BTKH, v_BTKH, sink = self.project(x_BTD, info)
        if access is None:
            how = self.window, c.attention_kernel, info.document_BT
            cache, y_BTNH = None, causal_attention(q_BTNH, k_BTKH, v_BTKH, sink, *how)
        else:
            before, slot, masks = access
            cache = write(before, k_BTKH, v_BTKH, slot)
            y_BTNH = attend_heads_first(q_BTNH, *cache, masks[self.window], sink)
        if c.exclusive_attention:
            y_BTNH = forms.exclusive(y_BTNH, v_BTKH)
        if c.attention_gate != "none":
            y_BTNH = forms.gated(y_BTNH, self.gate(x_BTD))
        return self.out(y_BTNH.reshape(*x_BTD.shape[:2], c.num_heads * c.head_dim)), cache


class MLP(nnx.Module):
    """D -> F -> D, plain or gated."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        c = config
        self.kind = c.mlp
        self.up = _linear(c.embedding_dim, c.mlp_dim, c.mlp_bias, c, rngs)
        if self.kind.startswith("swiglu"):
            self.gate = _linear(c.embedding_dim, c.mlp_dim, c.mlp_bias, c, rngs)
        self.down = _linear(c.mlp_dim, c.embedding_dim, c.mlp_bias, c, rngs, _output_initializer(c))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up_BTF = self.up(x_BTD)
        match self.kind:
            case "gelu":  # with erf: faster on a CPU than jax.nn.gelu's erfc, and the same function
                h_BTF = 0.5 * up_BTF * (1 + jax.lax.erf(up_BTF * math.sqrt(0.5)))
            case "gelu_tanh":
                h_BTF = jax.nn.gelu(up_BTF, approximate=True)
            case "relu2":  # Primer, arXiv:2109.08668
                h_BTF = jnp.square(jax.nn.relu(up_BTF))
            case "swiglu":  # arXiv:2002.05202
                h_BTF = jax.nn.silu(self.gate(x_BTD)) * up_BTF
            case _:  # swiglu_clamped: gpt-oss, arXiv:2508.10925
                gate_BTF = jnp.minimum(self.gate(x_BTD), 7.0)
                h_BTF = (jnp.clip(up_BTF, -7.0, 7.0) + 1) * gate_BTF * jax.nn.sigmoid(1.702 * gate_BTF)
        return self.down(constrain(h_BTF, "BTF"))


class Block(nnx.Module):
    """Pre-norm residual block: x + Attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: TransformerConfig, layer: int, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, layer, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs)
        self.dropout = nnx.Dropout(config.dropout)
        if config.residual_scalars:
            self.residual_scalars = nnx.Param(forms.first_residual_scalars(layer, config.num_blocks))

    def __call__(
        self, x_BTD: jax.Array, info: TokenInfo, rngs: nnx.Rngs | None, access: CacheAccess | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        if hasattr(self, "residual_scalars"):
            x_BTD = forms.scaled_residual(x_BTD, info.first_BTD, self.residual_scalars[...])
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), info, access)
        x_BTD = materialize(constrain(x_BTD + self.dropout(y_BTD, deterministic=rngs is None, rngs=rngs), "BTD"))
        y_BTD = self.mlp(self.mlp_norm(x_BTD))
        return materialize(constrain(x_BTD + self.dropout(y_BTD, deterministic=rngs is None, rngs=rngs), "BTD")), cache


class Transformer(nnx.Module):
    """Tokens in, logits of the next token out."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        c = config
        self.config = c
        self.embedding = _embed(c.vocab_size, c.embedding_dim, c, rngs)
        if c.position == "learned":
            self.positions = _embed(c.context_len, c.embedding_dim, c, rngs)
        self.blocks = nnx.List([Block(c, layer, rngs) for layer in range(c.num_blocks)])
        self.final_norm = _norm(c, rngs)
        if not c.tie_embeddings:
            init = nnx.initializers.zeros_init() if c.output_init == "zero" else _normal
            self.head = _linear(c.embedding_dim, c.vocab_size, False, c, rngs, init)
        self.dropout = nnx.Dropout(c.dropout)

    def __call__(self, tokens_BT: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits [B, T, V], float32. T may be shorter than the context. With `rngs`, dropout is on."""
        return self.logits(self.hidden(tokens_BT, rngs=rngs)[0])

    def hidden(
        self, tokens_BT: jax.Array, cache: Cache | None = None, rngs: nnx.Rngs | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """The last layer's normalised output [B, T, D]; and, if a cache is given, the cache after these tokens."""
        c, T = self.config, tokens_BT.shape[1]
        position_BT = jnp.arange(T)[None]
        if cache is not None:
            position_BT = jnp.maximum(cache.length.reshape(-1, 1) + position_BT - cache.start_B[:, None], 0)
        x_BTD = _rows(self.embedding, tokens_BT, c)
        if c.position == "learned":
            x_BTD = x_BTD + _rows(self.positions, position_BT, c)
        x_BTD = self.dropout(constrain(x_BTD, "BTD"), deterministic=rngs is None, rngs=rngs)
        rope, documents = c.position == "rope", cache is None and c.document_start >= 0
        turn = rotation(position_BT, *rope_frequencies(c.head_dim, c.rope_theta, c.yarn)) if rope else None
        document_BT = jnp.cumsum(tokens_BT == c.document_start, axis=1) if documents else None
        info = TokenInfo(turn, document_BT, x_BTD)
        if cache is None:
            period = c.period if c.scan_blocks else 0
            return self.final_norm(run_blocks(self.blocks, x_BTD, info, rngs, c.remat, period)), None
        masks = {window: visible_slots(cache, T, window) for window in {b.attention.window for b in self.blocks}}
        layers: list[Any] = []
        for block, before in zip(self.blocks, cache.layers, strict=True):
            x_BTD, after = block(x_BTD, info, rngs, (before, cache.length, masks))
            layers.append(after)
        return self.final_norm(x_BTD), Cache(layers, cache.start_B, cache.length + T)

    @property
    def output(self) -> nnx.Embed | nnx.Linear:
        """The module whose weights give the logits."""
        return self.embedding if self.config.tie_embeddings else self.head

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 from the output of `hidden`, soft-capped to ±logit_softcap if that is set."""
        return head_logits(self.output, x_BTD, self.config)

    def empty_cache(self, start_B: jax.Array, slots: int) -> Cache:
        """A cache for texts that will begin at these slots."""
        c = self.config
        empty = jnp.zeros((len(start_B), c.num_kv_heads, slots, c.head_dim), c.activation_dtype)
        return Cache([LayerCache(empty, empty) for _ in range(c.num_blocks)], start_B, jnp.int32(0))


def head_logits(output: nnx.Embed | nnx.Linear, x_BTD: jax.Array, config: TransformerConfig) -> jax.Array:
    """`Transformer.logits` as a function of the module whose weights give them."""
    if isinstance(output, nnx.Embed) and config.dtype == "bfloat16_matmul":
        logits = half_product(x_BTD, output.embedding[...].T)
    else:
        logits = (output.attend(x_BTD) if isinstance(output, nnx.Embed) else output(x_BTD)).astype(jnp.float32)
    softcap = config.logit_softcap
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


# --- Parameters by name -------------------------------------------------------------------------------------------


def params_of(model: Transformer) -> Params:
    """The model's parameters as a flat dict, by dotted name."""
    leaves = jax.tree.leaves_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Variable))  # `nnx.state`: 2 ms
    params = [(path, leaf) for path, leaf in leaves if isinstance(leaf, nnx.Param)]
    return {jax.tree_util.keystr(path, simple=True, separator="."): param[...] for path, param in params}


def init_params(config: TransformerConfig, key: jax.Array) -> Params:
    """Initial parameters (call it inside `jit`, which then places them)."""
    return params_of(Transformer(config, nnx.Rngs(key, forms=jax.random.fold_in(key, 1))))


def shapes_of(config: TransformerConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape and dtype of each of `init_params`, as `jax.ShapeDtypeStruct`."""
    return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, (_, value) in _skeleton(config)[1].items()}


def model_of(config: TransformerConfig, params: Params) -> Transformer:
    """The model with these parameters, traced or real. Raises ValueError if a name or shape does not fit the config."""
    graph, flat = _skeleton(config)
    want = {name: part_shape(name, value.shape) for name, (_, value) in flat.items()}
    have = {name: value.shape for name, value in params.items()}
    if want != have:
        odd = [f"{n} {have.get(n)} is not {want.get(n)}" for n in sorted(want | have) if want.get(n) != have.get(n)]
        raise ValueError(f"parameters do not fit the config: {'; '.join(odd[:3])}")
    return nnx.merge(graph, nnx.from_flat_state([(path, nnx.Param(params[name])) for name, (path, _) in flat.items()]))


@lru_cache  # tracing it takes 45 ms for 4 blocks, and every program asks for it
def _skeleton(config: TransformerConfig) -> tuple[nnx.GraphDef, dict[str, tuple[tuple, nnx.Variable]]]:
    """The model without its parameters; of each parameter, by dotted name, the path and an abstract array."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    return graph, {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
