"""Every form of attention with sinks against the definition in float64: outputs and all gradients.

A form takes (q_BTNH, k_BTKH, v_BTKH, sink, window), the sink by head, by row and head, or None, and returns
[B, T, N, H] in the dtype of v. Heads are compared one by one: the one with a sink of 20 puts 1e-9 of its weight on
keys, and would vanish beside the others.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from transformer.attention import LayerCache, attend, attend_heads_first, visible, write
from transformer.config import TransformerConfig
from transformer.kernels.choose import causal_attention
from transformer.model import Attention, TokenInfo
from transformer.rotary import rope_frequencies, rotation

B, N, H = 4, 6, 8
SINKS = np.float32([-20, -11.9, -3.7, 4.1, 12.3, 20])  # bfloat16 would change the inner ones
NO_SINKS = np.full(N, -np.inf)  # to the definition; to a form a sink of None
BY_ROW = np.float32(np.random.default_rng(0).normal(SINKS, 3, (B, 37, N)))  # as a query and a sink's key give them


def attend_in_one(q_BTNH, k_BTKH, v_BTKH, sink, window):
    position_T = jnp.arange(q_BTNH.shape[1])
    return attend(q_BTNH, k_BTKH, v_BTKH, visible(position_T[None], position_T, window), sink)


def attend_through_the_cache(q_BTNH, k_BTKH, v_BTKH, sink, window):
    """The text comes in two parts, and the cache has room, with old numbers in it, for three tokens more."""
    T = q_BTNH.shape[1]
    cache = LayerCache(*(jnp.full((B, x.shape[2], T + 3, H), 9, x.dtype) for x in (k_BTKH, v_BTKH)))
    outputs = []
    for part in (slice(0, T // 3), slice(T // 3, T)):
        cache = write(cache, k_BTKH[:, part], v_BTKH[:, part], jnp.int32(part.start))
        mask_1TS = visible(jnp.arange(T)[None, part], jnp.arange(T + 3), window)
        own = sink[:, part] if sink is not None and sink.ndim == 3 else sink
        outputs.append(attend_heads_first(q_BTNH[:, part], *cache, mask_1TS, own))
    return jnp.concatenate(outputs, axis=1)


FORMS = {
    "one pass": attend_in_one,
    "through the cache": attend_through_the_cache,
    "keeping probabilities": partial(causal_attention, kernel="plain"),
    "in chunks": partial(causal_attention, kernel="chunked"),
}


def definition(q_BTNH, k_BTNH, v_BTNH, sink, window):
    """exp(s) / (exp(sink) + sum of the visible exp(s)), times v."""
    distance_TS = torch.arange(q_BTNH.shape[1])[:, None] - torch.arange(q_BTNH.shape[1])
    seen_TS = (distance_TS >= 0) & (distance_TS < (window or math.inf))
    weights_BNTS = seen_TS * torch.exp(torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH) / math.sqrt(H))
    sink_BNT = sink[:, None] if sink.ndim == 1 else sink.transpose(1, 2)
    probs_BNTS = weights_BNTS / (torch.exp(sink_BNT)[..., None] + weights_BNTS.sum(-1, keepdim=True))
    return torch.einsum("bnts,bsnh->btnh", probs_BNTS, v_BTNH)


def define_and_differentiate(inputs: list, window: int, cotangent) -> list[np.ndarray]:
    """Output, dq, dk, dv, dsink. A key head that serves several queries is repeated, so autograd sums its gradients."""
    inputs = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in inputs]
    q_BTNH, k_BTKH, v_BTKH, sink = inputs
    k_BTNH, v_BTNH = (x.repeat_interleave(N // x.shape[2], dim=2) for x in (k_BTKH, v_BTKH))
    output = definition(q_BTNH, k_BTNH, v_BTNH, sink, window)
    gradients = torch.autograd.grad(output, inputs, torch.tensor(np.asarray(cotangent, np.float64)))
    return [x.detach().numpy() for x in (output, *gradients)]


@partial(jax.jit, static_argnames=("form", "window"))
def form_and_gradients(form: Callable, inputs: list, window: int, cotangent: jax.Array) -> tuple:
    """As above; with three inputs there is no sink."""
    output, pull_back = jax.vjp(lambda q, k, v, sink=None: form(q, k, v, sink, window), *inputs)
    assert output.dtype == cotangent.dtype
    return output, *pull_back(cotangent)


def by_head(tensors) -> dict[str, np.ndarray]:
    """[B, T, N or K, H] tensors and, last, dsink [N] or [B, T, N]: one entry a head."""
    heads = {}
    for name, x in zip(("output", "dq", "dk", "dv", "dsink"), tensors, strict=False):
        x = np.asarray(x, np.float64)
        axis = 0 if x.ndim == 1 else 2
        heads |= {f"{name} of head {n}": x.take(n, axis) for n in range(x.shape[axis])}
    return heads


def both_sides(name: str, T: int, K: int, window: int, sink: np.ndarray, scale: float, dtype: str) -> tuple:
    """(form, definition), by head, of the same random inputs: queries and keys whose scores spread by `scale`."""
    rng = np.random.default_rng(T)
    normal = lambda *shape, mean=0.0: mean + rng.normal(size=shape)
    # Values and cotangent lean to one side, or the sum over rows in dsink would cancel down to rounding errors.
    inputs = scale * normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H, mean=0.5)
    *inputs, cotangent = (jnp.asarray(x, dtype) for x in (*inputs, normal(B, T, N, H, mean=0.5)))
    want = define_and_differentiate([*inputs, sink], window, cotangent)
    if sink is NO_SINKS:
        want.pop()
    else:
        inputs.append(jnp.float32(sink))
    return by_head(form_and_gradients(FORMS[name], inputs, window, cotangent)), by_head(want)


# T, K, window, sinks. No length is a multiple of a block. One key and a sink of -20 would make dq and dk differences
# of almost equal numbers, so there the sinks are zero.
CASES = [
    (1, 3, 0, np.zeros(N)),
    (5, 1, 3, SINKS),
    (5, 6, 0, NO_SINKS),
    (37, 2, 0, SINKS),
    (37, 3, 8, NO_SINKS),
    (37, 3, 9, BY_ROW),
    (130, 6, 50, SINKS),
    (130, 1, 0, SINKS),
    (130, 2, 3, NO_SINKS),
]
LONGER = [case for case in CASES if case[0] > 5]  # with few keys a large score leaves one with all the weight


def every_form_and_case(cases):
    kind = lambda sink: "no sinks" if sink is NO_SINKS else "sinks by row" if sink is BY_ROW else "sinks"
    ids = [f"T={T} K={K} window={window} {kind(sink)}" for T, K, window, sink in cases]
    by_case = pytest.mark.parametrize("case", cases, ids=ids)
    return lambda test: pytest.mark.parametrize("name", FORMS)(by_case(test))


@every_form_and_case(CASES)
def test_float32_equals_the_definition(agree, name, case):
    # A sink of 20 makes exponents of 16 to 32; half a unit in their last place is 2^-20 = 1e-6, which exp makes a
    # relative error. Sums and products add less than half of that.
    agree("definition, float64", f"attention {name}, float32", *both_sides(name, *case, 1, "float32"), 1.5e-6)


@every_form_and_case(LONGER)
def test_scores_beyond_the_range_of_exp_equal_the_definition(agree, name, case):
    # Scores reach 200: each is wrong by some units of 200 x 2^-24 = 1.2e-5, and exp makes that relative.
    agree("definition, float64", f"attention {name}, huge scores", *both_sides(name, *case, 40, "float32"), 4e-5)


@every_form_and_case(LONGER[:3])
def test_bfloat16_equals_the_definition_to_its_roundings(agree, name, case):
    # A rounding to 8 bits is wrong by 0.42 x 2^-8 in the mean square. Probabilities, their gradients, those of the
    # scores and the result are rounded, and the sum over parts in the cache: five independent ones make 0.95 x 2^-8.
    # Scores of 30 and sinks would be wrong by several times this limit if they or their sums were rounded too.
    agree("definition, float64", f"attention {name}, bfloat16", *both_sides(name, *case, 8, "bfloat16"), 1.25 * 2**-8)


def test_attention_with_a_gate_by_channel_equals_qwen3_next(agree):
    """Qwen3-Next's attention layer (transformers), rotary factor 1: outputs and the gradient of every weight."""
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    B, T, D, N, K, H = 2, 7, 18, 6, 3, 4
    sizes = {"hidden_size": D, "num_attention_heads": N, "num_key_value_heads": K, "head_dim": H}
    rope = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 1.0}
    config = theirs.Qwen3NextConfig(**sizes, rms_norm_eps=1e-5, rope_parameters=rope, attn_implementation="eager")
    layer = theirs.Qwen3NextAttention(config, 0).double()
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.tensor(rng.normal(size=weight.shape)))
    x_BTD, cotangent_BTD = rng.normal(size=(2, B, T, D))
    turn = theirs.Qwen3NextRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float64), torch.arange(T)[None])
    hidden_TT = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)
    their_x_BTD = torch.tensor(x_BTD, requires_grad=True)
    output_BTD = layer(their_x_BTD, tuple(part.double() for part in turn), hidden_TT[None, None])[0]
    output_BTD.backward(torch.tensor(cotangent_BTD))

    def ours(weights):
        """Our names and forms: there queries and gates are one matrix, head by head."""
        query_DNX = weights["q_proj.weight"].T.reshape(D, N, 2 * H)
        named = {f"{name}.kernel": weights[f"{name[0]}_proj.weight"].T for name in ("key", "value", "out")}
        named |= {"query.kernel": query_DNX[..., :H].reshape(D, N * H)}
        named |= {"gate.kernel": query_DNX[..., H:].reshape(D, N * H)}
        return named | {f"{name}_norm.scale": weights[f"{name[0]}_norm.weight"] for name in ("query", "key")}

    weights = {name: weight.detach().numpy() for name, weight in layer.named_parameters()}
    params = {n: jnp.float32(w + n.endswith("scale")) for n, w in ours(weights).items()}  # a norm's scale is 1 + weight
    shape = {"num_heads": N, "num_kv_heads": K, "embedding_dim": D, "head_dim": H, "position": "rope"}
    form = {"qk_norm": "scaled", "attention_sink": "none", "attention_gate": "channel", "rope_theta": 50.0}
    graph, _ = nnx.split(Attention(TransformerConfig(vocab_size=5, **shape, **form), 0, nnx.Rngs(0)))
    info = TokenInfo(rotation(jnp.arange(T)[None], *rope_frequencies(H, 50.0, None)), None, None)

    def attend_with(params, x_BTD):
        state = nnx.from_flat_state([(tuple(n.split(".")), nnx.Param(p)) for n, p in params.items()])
        return nnx.merge(graph, state)(x_BTD, info, None)[0]

    found_BTD, pull_back = jax.vjp(attend_with, params, jnp.float32(x_BTD))
    gradients, dx_BTD = pull_back(jnp.float32(cotangent_BTD))
    found = {"output": found_BTD, "dx": dx_BTD, **gradients}
    want = {"output": output_BTD.detach().numpy(), "dx": their_x_BTD.grad.numpy()}
    want |= ours({name: weight.grad.numpy() for name, weight in layer.named_parameters()})
    agree("Qwen3-Next (transformers)", "attention layer with its gate", found, want, 1e-6)
