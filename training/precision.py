"""Which arithmetic `dtype="auto"` stands for: what the devices run best."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from runtime import devices
from runtime.multihost import from_all
from transformer.half import half_dot_general
from transformer.xla import dot_general, jit_for, target

UNITS = ("amx_bf16", "avx512_bf16")  # of a processor, as Linux names them: they multiply bfloat16
# With products 1.7 times as fast, on a Zen 5, steps take 0.73 to 0.95 of their time at 4 x 128, two thirds at 6 x 384
# (benchmarks/NOTES.md). A smaller gain could be lost to the casts.
ENOUGH = 1.4  # times as fast must its products be
ROWS, NARROW, WIDE = 512, 256, 1024  # of what is measured: the product of an MLP in a small model
ROUNDS = 40  # 0.15 s; of 7, some were slow together at the start of a process, and the choice was then wrong


class Choice(NamedTuple):
    """An arithmetic, and in a few words why it was chosen; "" where the config names it."""

    dtype: str
    why: str = ""


@cache
def best_here(platform: str) -> Choice:
    """bfloat16 on a GPU or TPU; on a CPU, of its products alone, where that is faster.

    All processes of a run call this; they take what process 0 measured.
    """
    if platform != "cpu":
        return Choice("bfloat16", "auto")
    has_unit = any(f" {unit} " in f" {devices.processor()} " for unit in UNITS)
    gain = devices.remembered("half_product_gain", half_precision_gain) if has_unit else 0.0
    if not (gain := float(from_all(np.asarray(gain))[0])):
        return Choice("float32", "auto: no bfloat16 unit")
    dtype = "bfloat16_matmul" if gain >= ENOUGH else "float32"
    return Choice(dtype, f"auto: bfloat16 products run {gain:.1f} x as fast")


def half_precision_gain() -> float:
    """How many times as fast as in float32 a product with its two gradients is with operands in bfloat16."""
    sizes = (ROWS, NARROW), (NARROW, WIDE), (ROWS, WIDE)
    arrays = [jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32) for size in sizes]
    programs = [jit_for(target(), _with_gradients(product)) for product in (dot_general, half_dot_general)]
    seconds: list[list[float]] = [[], []]
    for turn in range(1 + ROUNDS):
        for program, times in zip(programs, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            if turn:  # the first compiles
                times.append(time.perf_counter() - begin)
    single, half = map(min, seconds)  # what else runs on the machine only adds
    return single / half


def _with_gradients(product: Callable) -> Callable:
    def run(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(lambda x, w: product(x, w, (((1,), (0,)), ((), ()))), x, w)
        return y, pull(dy)

    return run
