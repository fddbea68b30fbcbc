"""How many sequences the devices take at once, where the config leaves that to them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from runtime.devices import lacks_memory
from runtime.errors import UserError
from runtime.multihost import from_all
from training.cost import held_bytes
from training.optimizer import OptimizerConfig
from training.step import Step
from transformer.config import TransformerConfig
from transformer.sharding import DATA, FSDP, batch_sharded

FILLED = 0.9  # share of a device's memory that a step may take: allocators leave gaps
MOST_OVER = 1.3  # the rule says at most so many times what a compiled step takes (`held_bytes`)


def traced(step: Step, batch_size: int, context_len: int, mesh: Mesh) -> Any:
    """The step's program for a micro-batch of `batch_size` sequences, to be compiled."""
    batch = jax.ShapeDtypeStruct((batch_size, context_len + 1), jnp.int32, sharding=batch_sharded(mesh))
    return step.run.trace(step.state, batch)


def compiled(step: Step, batch_size: int, context_len: int, mesh: Mesh) -> Any:
    """The same, compiled and not run."""
    return traced(step, batch_size, context_len, mesh).lower().compile()


def program_bytes(program: Any) -> int | None:
    """The program's arguments and temporary arrays on each device; None where the compiler does not tell."""
    held = program.memory_analysis()
    return held and held.argument_size_in_bytes + held.temp_size_in_bytes


def largest_part(
    settings: OptimizerConfig,
    model_config: TransformerConfig,
    batch_size: int,
    build: Callable[[OptimizerConfig], Step],
    mesh: Mesh,
    memory: float,
    compiles: bool = True,
) -> int:
    """The most sequences of a micro-batch, over all devices, with which a step fits; all processes say the same.

    It divides `batch_size`. What a step takes the compiled program says, or the rule of `held_bytes`. Raises UserError
    if not even the smallest part fits.

    Args:
      batch_size: sequences of a real step.
      build: makes the step from settings with another accumulation.
      memory: bytes of a device.
      compiles: False: by the rule alone.
    """
    memory, parts = from_all(np.array(float(memory))).min(), mesh.shape[DATA] * mesh.shape[FSDP]

    def need(size: int) -> float:
        divided = replace(settings, accumulation_steps=batch_size // size)
        step = build(divided)
        rule = sum(held_bytes(divided, model_config, size, step.state, mesh).values())
        if not compiles or rule > MOST_OVER * memory:
            return rule
        try:
            return program_bytes(compiled(step, size, model_config.context_len, mesh)) or rule
        except jax.errors.JaxRuntimeError as error:  # a TPU's compiler refuses what does not fit
            if not lacks_memory(error):
                raise
            return max(rule, memory)

    for size in range(batch_size, 0, -parts):
        if batch_size % size == 0:
            needed = from_all(np.array(float(need(size)))).max()  # compilers may differ by a little
            if needed <= FILLED * memory:
                return size
    raise UserError(
        f"config.micro_batch: {parts} sequences at once need {needed / 2**30:,.1f} GiB on each device, of "
        f"{memory / 2**30:,.1f}; lower context_len, make the model smaller, or set remat=block"
    )
