"""Writing text: here and by transformers' `generate` with its key/value cache, on the same weights.

    python -m benchmarks.decode

Greedy, in GPT-2's exact settings without sinks, float32. Both sides continue the same random prompts by as many tokens,
in turn in one process, set up as `main.py sample` does it (one device; torch takes all cores). Time to first token is
from the call to the first token on the host, with everything compiled; tokens per second count a whole call, prefill
included. Where two logits are as good as equal the sides may choose differently: `same` says how many texts agree.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoConfig, GPT2LMHeadModel

from benchmarks.harness import interleaved, report, spread
from runtime import devices
from runtime.large_pages import restart_with_large_pages
from transformer.interop import to_theirs
from transformer.model import Transformer, TransformerConfig, init_params, model_of, params_of
from transformer.sampling import Sampling, generate_tokens

VOCAB = 65  # the characters of tiny shakespeare
PROMPT = 16
SHAPES = [(4, 128, 4, 64), (4, 128, 4, 256), (6, 384, 6, 256)]  # blocks, width, heads, context
BATCHES = (1, 16)
ROUNDS = 5
GREEDY = Sampling(temperature=0)


def gpt2(blocks: int, width: int, heads: int, context: int) -> Transformer:
    """A model of GPT-2's form with weights at random, large enough that texts do not end in one repeated token."""
    config = TransformerConfig(
        vocab_size=VOCAB,
        context_len=context,
        num_blocks=blocks,
        num_heads=heads,
        embedding_dim=width,
        mlp_dim=4 * width,
        mlp="gelu_tanh",
        attention_sink=False,
        qkv_bias=True,
        attention_out_bias=True,
    )
    params = jax.jit(partial(init_params, config))(jax.random.key(0))
    larger = {name: value * 5 if value.ndim == 2 else value for name, value in params.items()}
    return model_of(config, larger)


def in_torch(model: Transformer) -> GPT2LMHeadModel:
    """The same model as transformers' class, by way of our export."""
    theirs, weights = to_theirs(model.config, {name: np.asarray(value) for name, value in params_of(model).items()})
    twin = GPT2LMHeadModel(AutoConfig.for_model(**theirs, bos_token_id=None, eos_token_id=None))
    missing = twin.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys, missing  # the head is tied
    twin.tie_weights()
    return twin.eval()


def compare(model: Transformer, twin: GPT2LMHeadModel, batch: int) -> dict[str, Any]:
    """One row of the table."""
    prompts_BP = np.random.default_rng(0).integers(0, VOCAB, (batch, PROMPT))
    count = model.config.context_len - PROMPT
    prompts, theirs_BP = list(prompts_BP), torch.tensor(prompts_BP)
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(theirs_BP)}

    def here(tokens: int) -> np.ndarray:
        return np.concatenate(list(generate_tokens(model, prompts, tokens, GREEDY))).T

    def there(tokens: int) -> np.ndarray:
        with torch.inference_mode():
            return twin.generate(theirs_BP, max_new_tokens=tokens, **settings)[:, PROMPT:].numpy()

    same = (here(count) == there(count)).all(axis=1)
    seconds = interleaved(
        {
            "first here": lambda: next(generate_tokens(model, prompts, count, GREEDY)),
            "first there": lambda: there(1),
            "all here": lambda: here(count),
            "all there": lambda: there(count),
        },
        rounds=ROUNDS,
        warmup=1,
    )
    of = {name: spread(values) for name, values in seconds.items()}
    c = model.config
    return {
        "model": f"{c.num_blocks} x {c.embedding_dim}, context {c.context_len}",
        "batch": batch,
        "new tokens": count,
        "first token, transformers (ms)": 1e3 * of["first there"]["median"],
        "here (ms)": 1e3 * of["first here"]["median"],
        "tokens/s, transformers": batch * count / of["all there"]["median"],
        "here": batch * count / of["all here"]["median"],
        "quartiles here": " - ".join(f"{batch * count / of['all here'][end]:,.0f}" for end in ("high", "low")),
        "times as fast": of["all there"]["median"] / of["all here"]["median"],
        "same": f"{same.sum()} of {batch}",
    }


def main() -> None:
    devices.set_up_compile_cache()
    devices.wake_up()
    rows = []
    for shape in SHAPES:
        model = gpt2(*shape)
        twin = in_torch(model)
        rows += [compare(model, twin, batch) for batch in BATCHES]
    report("decode", "Greedy decoding, float32, medians", rows, f"torch on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    restart_with_large_pages()
    main()
