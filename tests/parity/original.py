"""The PyTorch original's model, in plain torch and by its own parameter names: the other side of the comparisons.

LayerNorm's epsilon (1e-5) and GELU (the exact one) are torch's defaults. Shapes as in `transformer/`, with P for the
columns of a softmax row, the sink's included.
"""

import math

import torch
from torch import Tensor, nn


class Embed(nn.Module):
    def __init__(self, vocab_size: int, context_len: int, embedding_dim: int):
        super().__init__()
        self.W_E = nn.Embedding(vocab_size, embedding_dim)
        self.W_pos = nn.Embedding(context_len, embedding_dim)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.W_E(tokens_BT) + self.W_pos(torch.arange(tokens_BT.shape[1]))


class Attention(nn.Module):
    """Causal; a learned score of each head is one more column of the softmax, whose probability is cut off."""

    def __init__(self, context_len: int, num_heads: int, embedding_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.W_Q, self.W_K, self.W_V, self.W_out = (
            nn.Linear(embedding_dim, embedding_dim, bias=False) for _ in range(4)
        )
        self.sink_scalar = nn.Parameter(torch.zeros(num_heads))
        self.register_buffer("causal_mask", torch.ones(context_len, context_len, dtype=torch.bool).triu(1))

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BNTH, k_BNTH, v_BNTH = (
            project(x_BTD).view(B, T, self.num_heads, -1).transpose(1, 2) for project in (self.W_Q, self.W_K, self.W_V)
        )
        scores_BNTT = q_BNTH @ k_BNTH.mT / math.sqrt(q_BNTH.shape[-1])
        scores_BNTT = scores_BNTT.masked_fill(self.causal_mask[:T, :T], -torch.inf)
        sink_BNT1 = self.sink_scalar.view(1, -1, 1, 1).expand(B, -1, T, 1)
        probs_BNTP = torch.softmax(torch.cat([sink_BNT1, scores_BNTT], dim=-1), dim=-1)
        y_BNTH = probs_BNTP[..., 1:] @ v_BNTH
        return self.W_out(y_BNTH.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, embedding_dim: int, mlp_dim: int):
        super().__init__()
        self.layer1 = nn.Linear(embedding_dim, mlp_dim)
        self.layer2 = nn.Linear(mlp_dim, embedding_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.layer2(nn.functional.gelu(self.layer1(x_BTD)))


class Block(nn.Module):
    def __init__(self, context_len: int, num_heads: int, embedding_dim: int, mlp_dim: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(embedding_dim)
        self.Attention_Layers = Attention(context_len, num_heads, embedding_dim)
        self.layer_norm2 = nn.LayerNorm(embedding_dim)
        self.MLP_Layers = MLP(embedding_dim, mlp_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.Attention_Layers(self.layer_norm1(x_BTD))
        return x_BTD + self.MLP_Layers(self.layer_norm2(x_BTD))


class Deembed(nn.Module):
    def __init__(self, vocab_size: int, embedding_dim: int):
        super().__init__()
        self.W_D = nn.Linear(embedding_dim, vocab_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.W_D(x_BTD)


class Original(nn.Module):
    """Tokens [B, T], T up to `context_len`, to float32 logits [B, T, V] of the next ones. No dropout."""

    def __init__(
        self, vocab_size: int, context_len: int, num_blocks: int, num_heads: int, embedding_dim: int, mlp_dim: int
    ):
        super().__init__()
        self.embed = Embed(vocab_size, context_len, embedding_dim)
        self.blocks = nn.Sequential(*(Block(context_len, num_heads, embedding_dim, mlp_dim) for _ in range(num_blocks)))
        self.final_layer_norm = nn.LayerNorm(embedding_dim)
        self.deembed = Deembed(vocab_size, embedding_dim)
        self.deembed.W_D.weight = self.embed.W_E.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.deembed(self.final_layer_norm(self.blocks(self.embed(tokens_BT))))


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """The same model with parameters that are nowhere zero or equal, so that one left out or mixed up shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            elif "sink" in name:
                parameter.copy_(noise)
            else:  # biases, and the scales of norms
                parameter.copy_(0.1 * noise + name.endswith("weight"))
    return model
