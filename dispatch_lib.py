"""What goes to the devices in one dispatch: a micro-step, or several in a loop on the device.

Small models on a GPU wait for the host otherwise, which starts each step anew. A dispatch ends wherever something is
due, so that a run does the same at the same steps however many go at once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from input_pipeline import Batches
from runtime.agreement import put
from runtime.processes import num_processes
from transformer.dense import compiler_options
from transformer.sharding import batch_sharded, replicated
from transformer.step import TrainState


def spans(config: ConfigDict, start: int, end: int, ends: Sequence[int] = ()) -> Iterator[range]:
    """The micro-steps from `start` to before `end`, those of one dispatch at a time.

    At most `steps_per_dispatch`, up to the next real step after which a key named *_every asks for something.

    Args:
      ends: further real steps before which a dispatch ends.
    """
    k, most = config.accumulation_steps, config.steps_per_dispatch
    periods = [k * config[key] for key in config if key.endswith("_every") and config[key]]
    fixed = {end, *(k * step for step in ends)}
    first = start
    for last in range(start + 1, end + 1):
        if last - first == most or last in fixed or any(last % period == 0 for period in periods):
            yield range(first, last)
            first = last


def place(batches: Batches, mesh: Mesh, most: int, span: range) -> Any:
    """The batches of a dispatch on the devices, as the step for `most` micro-steps takes them.

    For one: [B, T + 1]. For several: [most, B, T + 1], of which the first are those of `span`, and how many those are.
    """
    if num_processes() > 1:
        return _place_own_rows(batches, mesh, most, span)
    if most == 1:
        return jax.device_put(batches(span.start), batch_sharded(mesh))
    own = [batches(step) for step in span]
    stack_SBT1 = np.stack(own + own[-1:] * (most - len(own)))
    places = NamedSharding(mesh, PartitionSpec(None, *batch_sharded(mesh).spec)), replicated(mesh)
    return jax.device_put((stack_SBT1, np.int32(len(own))), places)


def _place_own_rows(batches: Batches, mesh: Mesh, most: int, span: range) -> Any:
    """The same in one of several processes: it reads the rows that its own devices take."""
    B, T1 = batches.batch_size, batches.context_len + 1

    def rows(step: int, index: tuple[slice, slice]) -> np.ndarray:
        return batches.rows(step, *index[0].indices(B)[:2])[:, index[1]]

    def rows_of_all(index: tuple[slice, slice, slice]) -> np.ndarray:
        own = [rows(step, index[1:]) for step in span]
        return np.stack(own + own[-1:] * (most - len(own)))

    place = batch_sharded(mesh)
    if most == 1:
        return jax.make_array_from_callback((B, T1), place, lambda index: rows(span.start, index))
    stack = NamedSharding(mesh, PartitionSpec(None, *place.spec))
    stack_SBT1 = jax.make_array_from_callback((most, B, T1), stack, rows_of_all)
    return stack_SBT1, put(np.asarray(len(span), np.int32), replicated(mesh))


def several_steps(
    train_step: Callable, state: TrainState
) -> Callable[[TrainState, tuple], tuple[TrainState, dict[str, jax.Array]]]:
    """`make_train_step`'s function in a loop: (state, (batches [S, B, T + 1], count)) -> (state, last metrics).

    The first `count` batches are taken. That number is no part of the program: so a state does not depend on how its
    steps were divided into dispatches, to the bit. The state is donated; its arrays stay where those of `state` are.
    """
    one_step = train_step.__wrapped__

    def steps(state: TrainState, batch: tuple[jax.Array, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        batches_SBT1, count = batch
        state = jax.lax.fori_loop(0, count, lambda i, state: one_step(state, batches_SBT1[i])[0], state)
        return state, state.metrics

    places = jax.tree.map(lambda x: x.sharding, state)  # of a loop's result XLA would choose them, and compile twice
    shardings = places, places.metrics
    return jax.jit(steps, donate_argnums=0, out_shardings=shardings, compiler_options=compiler_options())
