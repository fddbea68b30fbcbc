"""The settings of a model's shape and of how it is run: allowed values, and what follows from them."""

from dataclasses import dataclass, fields

from transformer.forms import GATES, SINKS, sink_name
from transformer.kernels.choose import KERNEL_NAMES
from transformer.ranges import AboveOne, BelowOne, Count, CountOrNone, NotNegative, Positive, require
from transformer.rotary import Yarn
from transformer.stack import REMAT_POLICIES

CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "position": ("learned", "rope", "none"),
    "rope_scaling": ("none", "yarn", "llama3"),
    "mlp": ("gelu", "gelu_tanh", "relu2", "swiglu", "swiglu_clamped"),
    "qk_norm": ("none", "scaled", "unscaled"),
    "output_init": ("normal", "scaled", "zero"),
    "attention_sink": SINKS,
    "attention_gate": GATES,
    "dtype": ("float32", "bfloat16", "bfloat16_matmul"),
    "attention_kernel": KERNEL_NAMES,
    "remat": tuple(REMAT_POLICIES),
}
REMOVED = [("value_embeddings", False)]  # settings of some builds, at the value at which they did nothing


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model is run: these settings add, drop or reshape no parameter."""

    dtype: str = "float32"
    attention_kernel: str = "auto"
    loss_chunk: CountOrNone = 0
    remat: str = "none"
    scan_blocks: bool = False


@dataclass(frozen=True)
class TransformerConfig(Execution):
    """The shape of a model, and how it is run. `configs/default.py` says what each setting means.

    `num_kv_heads` and `head_dim` may be 0: as many as `num_heads`, and `embedding_dim / num_heads`. `document_start` is
    the token with which a document begins; attention does not reach across it. With -1, or with a cache, the whole
    sequence is one document. `answer_start` and `answer_end` are the tokens around what is learned of a conversation;
    with -1 all is. Raises ValueError, `<field>: <what is wrong>`.
    """

    vocab_size: Count
    context_len: Count = 64
    num_blocks: Count = 4
    num_heads: Count = 4
    num_kv_heads: CountOrNone = 0
    embedding_dim: Count = 128
    head_dim: CountOrNone = 0
    mlp_dim: Count = 512
    mlp: str = "gelu"
    norm: str = "layernorm"
    norm_eps: Positive = 1e-5
    norm_bias: bool = True
    position: str = "learned"
    rope_theta: AboveOne = 10_000.0
    rope_scaling: str = "none"
    yarn_factor: AboveOne = 32.0
    yarn_original_context: Count = 4096
    yarn_beta_fast: Positive = 32.0
    yarn_beta_slow: Positive = 1.0
    yarn_truncate: bool = True
    yarn_attention_factor: NotNegative = 0.0
    qk_norm: str = "none"
    attention_sink: str = "logit"
    sink_pattern: str = "S"
    attention_gate: str = "none"
    exclusive_attention: bool = False
    residual_scalars: bool = False
    sliding_window: CountOrNone = 0
    window_pattern: str = "L"
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = True
    tie_embeddings: bool = True
    logit_softcap: NotNegative = 0.0
    dropout: BelowOne = 0.0
    output_init: str = "normal"
    document_start: int = -1
    answer_start: int = -1
    answer_end: int = -1

    def __post_init__(self):
        object.__setattr__(self, "attention_sink", sink_name(self.attention_sink))
        require(vars(self), {field.name: field.type for field in fields(self)})
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if not self.head_dim:
            if self.embedding_dim % self.num_heads:
                near = max(1, round(self.embedding_dim / self.num_heads)) * self.num_heads
                raise ValueError(
                    f"embedding_dim: {self.embedding_dim} is not divisible by num_heads {self.num_heads}; "
                    f"use {near}, or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.embedding_dim // self.num_heads)
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim: rotary positions need an even number, got {self.head_dim}")
        if self.rope_scaling == "llama3" and self.yarn_beta_fast <= self.yarn_beta_slow:
            raise ValueError(f"yarn_beta_fast: must exceed yarn_beta_slow {self.yarn_beta_slow} under llama3")
        for name, one, other in ("window_pattern", "L (local)", "G (global)"), ("sink_pattern", "S (sink)", "N (none)"):
            if not (pattern := getattr(self, name)) or set(pattern) - {one[0], other[0]}:
                raise ValueError(f"{name}: must be letters {one} and {other}, got {pattern!r}")
        if not self.has_sinks:
            object.__setattr__(self, "attention_sink", "none")
            object.__setattr__(self, "sink_pattern", "S")
        if self.scan_blocks and self.period == self.num_blocks > 1:
            raise ValueError(
                f"scan_blocks: window_pattern {self.window_pattern!r} and sink_pattern {self.sink_pattern!r} do not "
                f"repeat in {self.num_blocks} blocks; use False, or a multiple of their lengths"
            )

    @property
    def period(self) -> int:
        """The number of layers after which their kinds repeat: the least such divisor of num_blocks."""
        layers = [(self.window(i), self.sink(i)) for i in range(self.num_blocks)]
        sizes = (p for p in range(1, self.num_blocks + 1) if self.num_blocks % p == 0)
        return next(p for p in sizes if layers == layers[:p] * (self.num_blocks // p))

    @property
    def activation_dtype(self) -> str:
        """The dtype of matrix products' results, and of everything between the products."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"

    @property
    def operand_dtype(self) -> str:
        """The dtype of matrix products' operands; their sums are float32."""
        return "float32" if self.dtype == "float32" else "bfloat16"

    @property
    def yarn(self) -> Yarn | None:
        if self.rope_scaling == "none":
            return None
        llama3 = self.rope_scaling == "llama3"
        sizes = self.yarn_factor, self.yarn_original_context, self.yarn_beta_fast, self.yarn_beta_slow
        return Yarn(*sizes, self.yarn_truncate, 1.0 if llama3 else self.yarn_attention_factor, ramp_over_turns=llama3)

    def window(self, layer: int) -> int:
        """How many keys a query of this layer sees, itself included; 0 is all."""
        local = self.window_pattern[layer % len(self.window_pattern)] == "L"
        return self.sliding_window if local else 0

    def sink(self, layer: int) -> str:
        """The form of this layer's sinks."""
        return self.attention_sink if self.sink_pattern[layer % len(self.sink_pattern)] == "S" else "none"

    @property
    def has_sinks(self) -> bool:
        """Whether some layer has them."""
        return any(self.sink(layer) != "none" for layer in range(self.num_blocks))
