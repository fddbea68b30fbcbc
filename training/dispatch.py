"""One dispatch to the devices: a micro-step, or several in a loop on the device.

A small model on a GPU would otherwise wait for the host, which starts each step. A dispatch ends at each step after
which something is due, so a run does the same whatever the number of steps in a dispatch.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from runtime.errors import UserError
from runtime.programs import Kept
from training.step import Step, TrainState
from transformer.xla import jit_for, target_of

MOST = 64  # micro-steps in a dispatch at most: a signal has to wait for those that have started


def spans(
    start: int, end: int, most: int, accumulation: int, every: Sequence[int], ends: Sequence[int] = ()
) -> Iterator[range]:
    """The micro-steps from `start` to before `end`, divided into dispatches of at most `most`.

    A dispatch ends after each of the periods `every` (0: never) and before each of the steps `ends`, in real steps.
    """
    periods = [accumulation * period for period in every if period]
    fixed = {end, *(accumulation * step for step in ends)}
    first = start
    for last in range(start + 1, end + 1):
        if last - first == most or last in fixed or any(last % period == 0 for period in periods):
            yield range(first, last)
            first = last


def longest(start: int, end: int, most: int, accumulation: int, every: Sequence[int]) -> int:
    """The most micro-steps that one of `spans` can have: the devices need room for so many batches.

    `most` of 1 stays 1, for a step without a loop; a loop has room for 2 at least.
    """
    if most == 1:
        return 1
    return max(2, min([most, MOST, end - start, *(accumulation * period for period in every if period)]))


def kept(mesh: Mesh, *made_of: Any) -> dict[str, Kept]:
    """The programs of a step on this mesh, each read from now on if it has been kept.

    made_of: what the step and the shape of its batches depend on besides devices and source.
    """
    return {name: Kept(f"{name} {mesh.shape_tuple} {made_of}", mesh.devices.flat) for name in ("init", "run")}


def check(kept: Mapping[str, Kept]) -> None:
    """Raises UserError if a program that was kept is not what it would be now; then none of them is kept any more."""
    if not all([program.is_current() for program in kept.values()]):
        raise UserError(
            "compiled programs: those that were kept are not what the source gives now, for a reason that no file or "
            "setting tells; they are removed, and nothing of this session was saved: start it again"
        )


def ready(step: Step, several: bool, kept: Mapping[str, Kept]) -> tuple[Callable, Callable]:
    """A step's `init`, and its `run`, with `several` in a loop, throttled; not traced if their programs were `kept`."""
    run = several_steps(step.run, step.state) if several else step.run
    run = kept["run"].of(run, (step.state, step.state.metrics))
    return kept["init"].of(step.init, step.state), throttled(run, most=2 if several else 4)


def several_steps(
    train_step: Callable, state: TrainState
) -> Callable[[TrainState, tuple], tuple[TrainState, dict[str, jax.Array]]]:
    """`make_train_step`'s function in a loop: (state, (batches [S, B, T + 1], count)) -> (state, last metrics).

    It uses the first `count` batches. That number is not compiled into the program, so the bits of a state do not
    depend on how its steps were divided into dispatches. The state is donated and keeps the shardings of `state`.
    """
    one_step = train_step.__wrapped__

    def steps(state: TrainState, batch: tuple[jax.Array, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        batches_SBT1, count = batch
        state = jax.lax.fori_loop(0, count, lambda i, state: one_step(state, batches_SBT1[i])[0], state)
        return state, state.metrics

    places = jax.tree.map(lambda x: x.sharding, state)  # else XLA chooses those of the result, and compiles twice
    target = target_of(places.micro_step.device_set)
    return jit_for(target, steps, donate_argnums=0, out_shardings=(places, places.metrics))


def throttled(step: Callable, most: int = 4) -> Callable:
    """`step`, (state, batch) -> (state, metrics), which waits while the devices are `most` dispatches behind.

    That keeps the devices busy, and a signal waits for no more than these. On a CPU with 33 programs in flight, XLA's
    devices would wait for each other, and XLA would abort the process.
    """
    under_way: deque[Any] = deque()

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        if len(under_way) == most:
            jax.block_until_ready(under_way.popleft())
        state, step_metrics = step(state, batch)
        under_way.append(step_metrics)
        return state, step_metrics

    return run
