"""The training step that a config describes, for who trains it, plans it or times it."""

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

import config_lib
from transformer import optimizer as optimizer_lib
from transformer.cost import memory_bytes
from transformer.model import TransformerConfig, init_params
from transformer.sharding import DATA, FSDP, SEQUENCE, TENSOR, shardings_of
from transformer.step import TrainState, init_state, make_train_step


class Step(NamedTuple):
    """A step and what it is made of."""

    state: TrainState  # before the first step: shapes, dtypes and shardings of its arrays
    labels: dict[str, str]  # parameter -> the optimizer that trains it
    init: Callable[[jax.Array], TrainState]  # key -> the state before the first step, each part born where it belongs
    run: Callable  # as `transformer.step.make_train_step` gives it


def make_step(config: ConfigDict, model_config: TransformerConfig, total: int, key: jax.Array, mesh: Mesh) -> Step:
    """The step of a run of `total` real steps; `key` is dropout's."""
    shapes = jax.eval_shape(partial(init_params, model_config), key)
    settings, labels = config_lib.optimizer_config(config), optimizer_lib.labels_of(shapes, config.use_muon)
    optimizer = optimizer_lib.make_optimizer(settings, shapes, total, mesh)
    schedule = optimizer_lib.schedule_shape(settings, total)
    run = make_train_step(
        *(model_config, optimizer, schedule, labels, config.accumulation_steps, key, mesh),
        spike_sigmas=config.spike_sigmas,
        skip_spikes=config.skip_spikes,
    )
    init = partial(init_state, model_config, optimizer, labels)
    born = jax.jit(init, out_shardings=shardings_of(jax.eval_shape(init, key), mesh))
    return Step(jax.eval_shape(born, key), labels, born, run)


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


def held_bytes(config: ConfigDict, model_config: TransformerConfig, state: TrainState, mesh: Mesh) -> dict[str, int]:
    """What a step holds on each device, by part: parameters and optimizer exact, the rest by `cost.memory_bytes`.

    gathered: weights that are used whole and kept in parts (fsdp), those of two blocks at a time.
    """
    rows, sequence, tensor = mesh.shape[DATA] * mesh.shape[FSDP], mesh.shape[SEQUENCE], mesh.shape[TENSOR]
    settings = config.use_muon, config.accumulation_steps, mesh.size, tensor
    by_rule, parameters = memory_bytes(model_config, config.batch_size // rows, *settings), _bytes_of(state.params)
    result = {
        "parameters": parameters,
        "optimizer": _bytes_of(state.opt_state),
        "gradients": by_rule["gradients"] * parameters // by_rule["parameters"],
        "activations": by_rule["activations"] // sequence,
        "logits": by_rule["logits"] // (sequence * (1 if model_config.vocab_size % tensor else tensor)),
    }
    if mesh.shape[FSDP] > 1:
        size = jnp.dtype(model_config.dtype).itemsize
        whole = {name: p.size * size // tensor for name, p in state.params.items()}
        blocks = sum(n for name, n in whole.items() if name.startswith("blocks."))
        result["gathered"] = sum(whole.values()) - blocks + 2 * blocks // model_config.num_blocks
    return result


def _bytes_of(tree: Any) -> int:
    """On each device."""
    shards = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * size for shape, size in shards)
