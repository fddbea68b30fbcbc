"""What goes to the devices in one dispatch: a micro-step, or several in a loop on the device.

Small models on a GPU wait for the host otherwise, which starts each step anew. A dispatch ends wherever something is
due, so that a run does the same at the same steps however many go at once.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from training.step import TrainState
from transformer.xla import jit_for, target_of

MOST = 64  # micro-steps in a dispatch, whatever is asked for: a signal waits for those that are under way


def spans(
    start: int, end: int, most: int, accumulation: int, every: Sequence[int], ends: Sequence[int] = ()
) -> Iterator[range]:
    """The micro-steps from `start` to before `end`, those of one dispatch at a time.

    Args:
      most: micro-steps in a dispatch.
      accumulation: micro-steps in a real step.
      every: after so many real steps each something is due, which ends a dispatch; 0: never.
      ends: further real steps before which a dispatch ends.
    """
    periods = [accumulation * period for period in every if period]
    fixed = {end, *(accumulation * step for step in ends)}
    first = start
    for last in range(start + 1, end + 1):
        if last - first == most or last in fixed or any(last % period == 0 for period in periods):
            yield range(first, last)
            first = last


def longest(start: int, end: int, most: int, accumulation: int, every: Sequence[int]) -> int:
    """The micro-steps that the longest of `spans` can have: so much room is made on the devices for batches."""
    return min([most, MOST, max(1, end - start), *(accumulation * period for period in every if period)])


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
    target = target_of(places.micro_step.device_set)
    return jit_for(target, steps, donate_argnums=0, out_shardings=shardings)


def held_back(step: Callable, most: int = 4) -> Callable:
    """`step`, a function of a state and a batch that gives both a state and metrics, held back.

    It waits while the devices are `most` dispatches behind, which keeps them busy, and a signal waits for no more than
    these. On a CPU, once 33 programs are under way, XLA's devices wait for each other and the process is aborted.
    """
    under_way: deque[Any] = deque()

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        if len(under_way) == most:
            jax.block_until_ready(under_way.popleft())
        state, step_metrics = step(state, batch)
        under_way.append(step_metrics)
        return state, step_metrics

    return run
