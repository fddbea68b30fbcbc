"""Writing text: here and by transformers' `generate` with its key/value cache, on the same weights.

    python -m benchmarks.decode

Greedy, in GPT-2's exact settings without sinks; in float32, and in bfloat16 as each has it: transformers throughout,
here the products (`dtype=bfloat16_matmul`). Both sides continue the same random prompts by as many tokens.
Each runs in a process of its own, set up as its users do (`main.py sample` has one device; torch takes all cores), and
they take turns, a block of texts at a time, while the other sleeps. Time to first token is from the call to the first
token on the host, with everything compiled; tokens per second count a whole call, prefill included. Where two logits
are as good as equal the sides may choose differently: `same` says how many texts agree.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoConfig, GPT2LMHeadModel

from benchmarks.harness import RESULTS, answer, report, seconds_of_one, spread, workers
from interop.models import to_theirs
from runtime import programs
from runtime.malloc import restart_with_large_pages
from transformer.config import TransformerConfig
from transformer.model import Transformer, init_params, model_of, params_of
from transformer.sampling import Sampling, generate_tokens

VOCAB = 65  # the characters of tiny shakespeare
PROMPT = 16
SHAPES = [(4, 128, 4, 64), (4, 128, 4, 256), (6, 384, 6, 256)]  # blocks, width, heads, context
BATCHES = (1, 16)
ROUNDS = 5
BLOCK = 0.5  # seconds of texts of a side in a round
SIDES = ("transformers", "here")
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
    twin.transformer.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    twin.tie_weights()
    return twin.eval()


def writer(side: str, model: Transformer, prompts_BP: np.ndarray) -> Callable[[int], np.ndarray]:
    """A function that continues the prompts by so many tokens."""
    if side == "here":
        prompts = list(prompts_BP)
        return lambda length: np.concatenate(list(generate_tokens(model, prompts, length, GREEDY))).T
    twin, theirs_BP = in_torch(model), torch.tensor(prompts_BP)
    if model.config.dtype != "float32":
        twin = twin.to(torch.bfloat16)
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(theirs_BP)}

    def write(length: int) -> np.ndarray:
        with torch.inference_mode():
            return twin.generate(theirs_BP, max_new_tokens=length, **settings)[:, PROMPT:].numpy()

    return write


def work(side: str, shape: tuple[int, ...], batch: int, half: bool) -> None:
    """The process of one side: says its texts; then, asked for a length, the seconds that texts of it take."""
    programs.set_up_compile_cache(print)
    model = gpt2(*shape)
    if half:
        model = model_of(replace(model.config, dtype="bfloat16_matmul"), params_of(model))
    write = writer(side, model, np.random.default_rng(0).integers(0, VOCAB, (batch, PROMPT)))
    several = lambda length: lambda times: [write(length) for _ in range(times)]
    texts = write(model.config.context_len - PROMPT).tolist()
    answer(json.dumps(texts), lambda length: seconds_of_one(several(int(length)), BLOCK))


def compare(shape: tuple[int, ...], batch: int, half: bool, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    blocks, width, _, context = shape
    whole = context - PROMPT
    row = f"--shape={','.join(map(str, shape))}", f"--batch={batch}", *(["--half"] if half else [])
    seconds: dict[tuple[str, int], list[float]] = {(side, length): [] for side in SIDES for length in (1, whole)}
    with workers({side: ("benchmarks.decode", f"--work={side}", *row) for side in SIDES}) as made:
        for side, worker in made.items():
            if not worker.ready:
                raise SystemExit(f"{side} did not start; what it said of that stands above")
        texts = [json.loads(worker.ready) for worker in made.values()]
        for _ in range(rounds):
            for (side, length), values in seconds.items():
                values.append(float(made[side].ask(length)))
    theirs, ours = SIDES
    first, all_of = ({side: spread(seconds[side, length]) for side in SIDES} for length in (1, whole))
    ratios = [a / b for a, b in zip(seconds[theirs, whole], seconds[ours, whole], strict=True)]
    return {
        "model": f"{blocks} x {width}, context {context}",
        "batch": batch,
        "precision": "bfloat16" if half else "float32",
        "new tokens": whole,
        "first token, transformers (ms)": 1e3 * first[theirs]["median"],
        "here (ms)": 1e3 * first[ours]["median"],
        "tokens/s, transformers": batch * whole / all_of[theirs]["median"],
        "here": batch * whole / all_of[ours]["median"],
        "quartiles here": " - ".join(f"{batch * whole / all_of[ours][end]:,.0f}" for end in ("high", "low")),
        "times as fast": spread(ratios)["median"],
        "same": f"{sum(a == b for a, b in zip(*texts, strict=True))} of {batch}",
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    parser.add_argument("--work", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument(
        "--shape", type=lambda text: tuple(map(int, text.split(","))), help="one row: blocks,width,heads,context"
    )
    parser.add_argument("--batch", type=int)
    parser.add_argument("--half", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # PyTorch stays there too
    if flags.work:
        return work(flags.work, flags.shape, flags.batch, flags.half)
    shapes, batches = [flags.shape] if flags.shape else SHAPES, [flags.batch] if flags.batch else BATCHES
    several = itertools.product(shapes, batches, (False, True))
    rows = [compare(*row, flags.rounds) for row in several]
    note = f"torch on {torch.get_num_threads()} threads. Medians of {flags.rounds} rounds."
    report("decode", "Greedy decoding", rows, note, flags.out)


if __name__ == "__main__":
    restart_with_large_pages()
    main()
