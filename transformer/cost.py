"""What a model costs, from its config alone: parameters and arithmetic."""

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


def flops_per_token(config: TransformerConfig) -> float:
    """Training FLOPs a token, forward and backward: 6 a matrix weight, and 12 L N H T for attention.

    The convention of PaLM (arXiv:2204.02311, appendix B): look-ups count nothing, the causal mask halves nothing.
    """
    c = config
    D, H = c.embedding_dim, c.head_dim
    block = 2 * D * H * (c.num_heads + c.num_kv_heads) + (3 if c.mlp.startswith("swiglu") else 2) * D * c.mlp_dim
    attention = sum(min(c.window(i) or c.context_len, c.context_len) for i in range(c.num_blocks)) * c.num_heads * H
    return 6 * (c.num_blocks * block + D * c.vocab_size) + 12 * attention
