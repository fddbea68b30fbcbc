"""Models of transformers' classes, tiny and random: the other side of the comparisons."""

import numpy as np
import torch
from original import randomised
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

V, CONTEXT = 37, 11

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
GPT2 = {"vocab_size": V, "n_positions": CONTEXT, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 1, "bos_token_id": 2}
LLAMA = {"vocab_size": V, "max_position_embeddings": CONTEXT, "hidden_size": 24, "intermediate_size": 40}
LLAMA |= {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
GPT_OSS = LLAMA | {"num_local_experts": 1, "num_experts_per_tok": 1, "sliding_window": 3}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of five planes one is kept, one on the ramp
STOCK = {
    "GPT2LMHeadModel": lambda changes: GPT2LMHeadModel(GPT2Config(**GPT2 | EAGER | changes)),
    "LlamaForCausalLM": lambda changes: LlamaForCausalLM(LlamaConfig(**LLAMA | EAGER | changes)),
    "Qwen3ForCausalLM": lambda changes: Qwen3ForCausalLM(Qwen3Config(**LLAMA | EAGER | changes)),
    "GptOssForCausalLM": lambda changes: GptOssForCausalLM(GptOssConfig(**GPT_OSS | EAGER | changes)),
}


def stock(architecture: str, changes: dict) -> torch.nn.Module:
    """One of transformers' models with parameters that are nowhere zero or equal."""
    model = randomised(STOCK[architecture](changes), seed=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_up_proj" in name:
                parameter *= 9  # so that both clamps of gpt-oss cut
    return model


def arrays(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in named.items()}
