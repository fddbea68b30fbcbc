"""What a model costs, from its config alone: parameters, arithmetic, memory, and a run's share of the devices' peak."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from training.optimizer import OptimizerConfig
from training.step import TrainState
from transformer.config import TransformerConfig
from transformer.kernels.choose import choose
from transformer.sharding import DATA, FSDP, SEQUENCE, TENSOR


def parameter_counts(config: TransformerConfig) -> dict[str, int]:
    """The number of parameters by part, from the config alone."""
    c = config
    D, H, N, K, F, L = c.embedding_dim, c.head_dim, c.num_heads, c.num_kv_heads, c.mlp_dim, c.num_blocks
    matrices = 3 if c.mlp.startswith("swiglu") else 2
    period = len(c.sink_pattern)  # L may be any number, also a mistaken one
    norm = 2 * D if c.norm == "layernorm" and c.norm_bias else D
    attention = 2 * D * H * (N + K) + _gate(c) * D + (c.qkv_bias and (N + 2 * K) * H) + (c.attention_out_bias and D)
    return {
        "embedding": c.vocab_size * D,
        "positions": c.context_len * D if c.position == "learned" else 0,
        "attention": L * attention,
        "mlp": L * (matrices * D * F + (c.mlp_bias and (matrices - 1) * F + D)),
        "norms": (2 * L + 1) * norm + (2 * L * H if c.qk_norm == "scaled" else 0),
        "sinks": sum({"logit": N, "key": K * H}.get(c.sink(i), 0) * len(range(i, L, period)) for i in range(period)),
        "residual scalars": 2 * L * c.residual_scalars,
        "head": 0 if c.tie_embeddings else c.vocab_size * D,
    }


def _gate(config: TransformerConfig) -> int:
    """Numbers in a token's gate, in one layer."""
    return config.num_heads * {"none": 0, "head": 1, "channel": config.head_dim}[config.attention_gate]


def flops_per_token(config: TransformerConfig) -> float:
    """Training FLOPs per token, forward and backward: 6 per matrix weight, and 12 L N H T for attention.

    The convention of PaLM (arXiv:2204.02311, appendix B): embedding look-ups do not count, and attention counts as if
    there were no causal mask.
    """
    c, D = config, config.embedding_dim
    keys = sum(min(c.window(i) or c.context_len, c.context_len) for i in range(c.num_blocks))
    attention = 2 * c.head_dim * (c.num_heads + c.num_kv_heads) + _gate(c)
    mlp = (3 if c.mlp.startswith("swiglu") else 2) * c.mlp_dim
    matrices = D * (c.num_blocks * (attention + mlp) + c.vocab_size)
    return 6 * matrices + 12 * keys * c.num_heads * c.head_dim


def activation_bytes(config: TransformerConfig, rows: int, tensor: int = 1) -> dict[str, int]:
    """What the forward pass of a training step computes on each device, in bytes, by `held_bytes`'s rule.

    kept: what stays of all blocks for the backward pass. block: all of one block. logits: in float32.

    `rows` are the sequences on each device; heads and hidden units are split into `tensor` parts, the residual stream
    is whole on each device.
    """
    c = config
    D, N, K, H, F = c.embedding_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
    tokens, gated, size = rows * c.context_len, c.mlp.startswith("swiglu"), jnp.dtype(c.activation_dtype).itemsize

    qkv = (N + 2 * K) * H
    attended = 2 * N * H + (N * H + 2 * _gate(c) if _gate(c) else 0)
    inner = qkv + attended + (4 if gated else 2) * F + ((N + K) * H if c.qk_norm != "none" else 0)
    probs = N * c.context_len * (_kernel(c) == "plain")
    whole = size * ((6 + c.residual_scalars) * D + inner // tensor) + 4 * probs // tensor
    dots = size * (3 * D + (qkv + (2 if gated else 1) * F) // tensor)
    kept = {"none": whole, "dots": dots, "block": size * D}[c.remat]
    at_once = min(c.loss_chunk or tokens, tokens)
    apart = 2 * tokens * c.context_len * (c.document_start >= 0 and _kernel(c) == "cudnn")  # its bias
    return {"kept": tokens * c.num_blocks * kept, "block": tokens * whole + apart, "logits": 4 * at_once * c.vocab_size}


def _kernel(config: TransformerConfig) -> str:
    """The kernel of attention in training."""
    c = config
    sizes = c.context_len, c.num_heads, c.num_kv_heads, c.head_dim
    return choose(c.attention_kernel, *sizes, jnp.dtype(c.operand_dtype), c.document_start >= 0)


def held_bytes(
    settings: OptimizerConfig, model_config: TransformerConfig, batch_size: int, state: TrainState, mesh: Mesh
) -> dict[str, int]:
    """What a training step holds on each device when it holds most, by part, in bytes.

    Parameters and optimizer are exact, from the shapes and shardings of `state`. The rest is a rule. It looks at three
    moments: the loss, where there are logits with their gradient, and that of the head; the backward pass of the last
    block, where what remat left out is computed again; and the update, when no activation is left. launch/README.md
    says how near the sum is to what compiled steps take.

    gradients: at the end with the updates made from them, and copies for communication. gathered: weights that fsdp
    splits, whole where they are used, those of two blocks at a time. `batch_size`: sequences in a micro-batch, over all
    devices.
    """
    c, parts = model_config, mesh.shape[SEQUENCE]
    rows, tensor = batch_size // (mesh.shape[DATA] * mesh.shape[FSDP]), mesh.shape[TENSOR]
    forward, parameters = activation_bytes(c, rows, tensor), _bytes_of(state.params)
    kept, block, size = forward["kept"], forward["block"], jnp.dtype(c.activation_dtype).itemsize
    again = block - kept // c.num_blocks  # without remat no more than what cuDNN adds
    # While a block is differentiated, the gradients of what it computed; in chunks, also the loops' copies and sums.
    work = block * (8 if _kernel(c) == "chunked" else 3) // 5
    logits = 2 * forward["logits"] * size // (4 * (1 if c.vocab_size % tensor else tensor))
    head = {"gradients": 4 * c.vocab_size * c.embedding_dim // tensor}
    if mesh.shape[FSDP] > 1:
        whole = {name: p.size * size // tensor for name, p in state.params.items()}
        blocks = sum(n for name, n in whole.items() if name.startswith("blocks."))
        head["gathered"] = sum(whole.values()) - blocks + 2 * blocks // c.num_blocks
    moments = (
        {**head, "activations": kept // parts, "logits": logits // parts},
        {**head, "activations": (kept + again + work) // parts},
        {"gradients": parameters * (2 + (settings.accumulation_steps > 1) + (mesh.size > 1))},
    )
    most = max(moments, key=lambda moment: sum(moment.values()))
    return {"parameters": parameters, "optimizer": _bytes_of(state.opt_state), **most}


def _bytes_of(tree: Any) -> int:
    """The size of the tree's arrays on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- Utilisation --------------------------------------------------------------------------------------------------

PEAK_FLOPS = {
    # Dense bfloat16 floating-point operations per second of one JAX device, by words of its `device_kind`; float16 if
    # the hardware has no bfloat16. From vendors' data sheets, halved if those count 2:4 sparsity.
    **{"B300": 2.25e15, "GB300": 2.5e15, "B200": 2.25e15, "GB200": 2.5e15},
    **{"H200": 989e12, "H200 NVL": 836e12, "GH200": 989e12, "H800": 989e12, "H20": 148e12},
    **{"H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 836e12},  # SXM's device kind reads "NVIDIA H100 80GB HBM3"
    **{"A100": 312e12, "A800": 312e12, "A40": 150e12, "A30": 165e12, "A10": 125e12, "A10G": 70e12},
    **{"L40S": 362e12, "L40": 181e12, "L4": 121e12},
    **{"T4": 65e12, "V100": 125e12},  # float16
    **{"RTX 6000 Ada": 364e12, "RTX A6000": 155e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12},
    "MI300X": 1307e12,
    # A TPU v2, v3 or 7x chip is two JAX devices, the others are one.
    **{"TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 275e12, "TPU v5": 459e12, "TPU v5p": 459e12},
    **{"TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 1153e12},
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a JAX device by its kind; None for a CPU, a slice of a GPU, or a kind that is not in the table."""

    def named(key: str) -> bool:  # whole words: an "RTX A1000" is no A100, and an L40 no L4
        return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", device_kind) is not None

    key = max(filter(named, PEAK_FLOPS), key=len, default="")
    return None if named("MIG") else PEAK_FLOPS.get(key)


def mfu(flops_per_token: float, tokens_per_second: float, num_devices: int, device_kind: str) -> float | None:
    """Model FLOPs utilisation: the share, 0 to 1, of the devices' peak that the model's own arithmetic uses.

    As in PaLM (Chowdhery et al., 2022, appendix B), recomputed activations do not count. None if the peak is unknown.
    `tokens_per_second` is over all devices, `device_kind` is `jax.Device.device_kind`.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_token * tokens_per_second / (num_devices * peak)
