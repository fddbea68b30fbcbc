"""The training step that a config describes, for who trains it, plans it or times it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import config_lib
from transformer import optimizer as optimizer_lib
from transformer.model import Params, TransformerConfig, init_params
from transformer.step import TrainState, init_state, make_train_step


class Step(NamedTuple):
    """A step and what it is made of."""

    shapes: Params  # of the parameters
    labels: dict[str, str]  # parameter -> the optimizer that trains it
    init: Callable[[jax.Array], TrainState]  # key -> the state before the first step; to be called inside `jit`
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
    return Step(shapes, labels, partial(init_state, model_config, optimizer, labels), run)
