"""What a model costs, from its config alone: parameters, arithmetic, memory."""

import jax.numpy as jnp

from transformer.flash import choose
from transformer.model import TransformerConfig


def parameter_counts(config: TransformerConfig) -> dict[str, int]:
    """The number of parameters by part, from the config alone."""
    c = config
    D, H, N, K, F, L = c.embedding_dim, c.head_dim, c.num_heads, c.num_kv_heads, c.mlp_dim, c.num_blocks
    matrices = 3 if c.mlp.startswith("swiglu") else 2
    norm = 2 * D if c.norm == "layernorm" and c.norm_bias else D
    attention = 2 * D * H * (N + K) + (c.qkv_bias and (N + 2 * K) * H) + (c.attention_out_bias and D)
    return {
        "embedding": c.vocab_size * D,
        "positions": c.context_len * D if c.position == "learned" else 0,
        "attention": L * attention,
        "mlp": L * (matrices * D * F + (c.mlp_bias and (matrices - 1) * F + D)),
        "norms": (2 * L + 1) * norm + (2 * L * H if c.qk_norm == "scaled" else 0),
        "sinks": L * N if c.attention_sink else 0,
        "head": 0 if c.tie_embeddings else c.vocab_size * D,
    }


def _hidden_weights(config: TransformerConfig) -> int:
    """Entries of the 2-D weights of all blocks."""
    c = config
    attention = 2 * c.embedding_dim * c.head_dim * (c.num_heads + c.num_kv_heads)
    return c.num_blocks * (attention + (3 if c.mlp.startswith("swiglu") else 2) * c.embedding_dim * c.mlp_dim)


def flops_per_token(config: TransformerConfig) -> float:
    """Training FLOPs a token, forward and backward: 6 a matrix weight, and 12 L N H T for attention.

    The convention of PaLM (arXiv:2204.02311, appendix B): look-ups count nothing, the causal mask halves nothing.
    """
    c = config
    attention = sum(min(c.window(i) or c.context_len, c.context_len) for i in range(c.num_blocks))
    return 6 * (_hidden_weights(c) + c.embedding_dim * c.vocab_size) + 12 * attention * c.num_heads * c.head_dim


def memory_bytes(
    config: TransformerConfig, rows: int, use_muon: bool, accumulation_steps: int, num_devices: int = 1, tensor: int = 1
) -> dict[str, int]:
    """What a training step holds on each device, by part, in bytes.

    Parameters and optimizer are exact, the rest a rule that was fitted on a CPU: there the sum lay within -16 % and
    +30 % of what the compiled steps of a dozen configs, 12 MB to 6 GB, say they need.

    gradients: with the updates made of them, and what travels between devices. activations: what the forward pass
    keeps, and 5/4 of it for the one block that is being differentiated. logits: with their gradient.

    Args:
      rows: sequences of context_len tokens a device.
      tensor: into how many parts heads and hidden units are split, which are activations' alone: a device holds the
        residual stream whole. Parameters are counted as if they were whole.
    """
    c = config
    D, N, K, H, F = c.embedding_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
    tokens, gated, size = rows * c.context_len, c.mlp.startswith("swiglu"), 2 if c.dtype == "bfloat16" else 4
    parameters, hidden = sum(parameter_counts(c).values()), _hidden_weights(c) if use_muon else 0

    qkv = (N + 2 * K) * H
    inner = qkv + 2 * N * H + (4 if gated else 2) * F + ((N + K) * H if c.qk_norm != "none" else 0)
    kernel = c.attention_kernel, c.context_len, N, K, H
    probs = N * c.context_len * (choose(*kernel, jnp.dtype(c.dtype), c.document_start >= 0) == "plain")
    whole = size * (6 * D + inner // tensor) + 4 * probs // tensor
    dots = size * (3 * D + (qkv + (2 if gated else 1) * F) // tensor)
    kept = {"none": whole, "dots": dots, "block": size * D}[c.remat]
    at_once = min(c.loss_chunk or tokens, tokens)
    return {
        "parameters": 4 * parameters,
        "optimizer": 4 * (2 * parameters - hidden + (parameters if accumulation_steps > 1 else 0)),
        "gradients": 4 * parameters * (2 + (accumulation_steps > 1) + (num_devices > 1)),
        "activations": tokens * (4 * c.num_blocks * kept + 5 * whole) // 4,
        "logits": 2 * 4 * at_once * c.vocab_size,
    }
