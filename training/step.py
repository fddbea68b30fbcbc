"""One training step: the state, the gradients over all devices, the gate for bad numbers, the update.

Shapes: B sequences in a micro-batch, T context length; a batch is [B, T + 1], inputs and targets are slices of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from training.health import Health, fresh_health, see_gradients, see_loss
from training.loss import batch_loss
from training.optimizer import OptimizerConfig, Schedule, grad_norm_of, labels_of, make_optimizer, schedule_shape
from transformer.config import TransformerConfig
from transformer.model import Params, init_params, shapes_of
from transformer.sharding import DATA, ROWS, is_data_parallel, is_part, on_rows, rows_specs, shardings_of, sum_over
from transformer.xla import jit_for, materialize, target_of, traced_for


class TrainState(NamedTuple):
    """All that training changes. Everything else is a function of the config and of `micro_step`."""

    params: Params
    opt_state: Any
    micro_step: jax.Array  # micro-batches seen
    window_loss: jax.Array  # summed over the micro-batches of the current real step
    window_tokens: jax.Array  # targets in these micro-batches
    health: Health
    metrics: dict[str, jax.Array]  # of the last real step


def init_state(model_config: TransformerConfig, optimizer: Any, labels: dict[str, str], key: jax.Array) -> TrainState:
    """The state before the first step; inside `jit` each array is made on the devices that hold it."""
    params = init_params(model_config, key)
    opt_state, health, number, count = optimizer.init(params), fresh_health(), jnp.zeros(()), jnp.zeros((), jnp.int32)
    inputs = (params, params, opt_state, health, number, number, count, count > 0, count > 0)
    shapes = jax.eval_shape(partial(_metrics, labels), *inputs)
    metrics = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes)
    return TrainState(params, opt_state, count, number, count, health, metrics)


def _metrics(
    labels: dict[str, str],
    params: Params,
    updates: Params,
    opt_state: Any,
    health: Health,
    mean_loss: jax.Array,
    lr_factor: jax.Array,
    bad_steps: jax.Array,
    counts: jax.Array,
    apply: jax.Array,
) -> dict[str, jax.Array]:
    """The metrics of a real step. This is the one place that names them; a checkpoint holds them by these names.

    bad_steps: in a row, before this one. counts: whether any token had a finite loss and gradient. apply: whether the
    step changes the parameters.
    """
    return {
        "loss": jnp.where(counts, mean_loss, jnp.nan),
        "grad_norm": jnp.where(apply, grad_norm_of(opt_state), jnp.nan),
        "lr_factor": lr_factor,
        "bad_steps": jnp.where(counts, 0, bad_steps + 1),  # in a row
        "bad_batches": health.bad_batches,
        "bad_leaf": health.bad_leaf,
        "loss_spikes": health.loss_spikes,
        **_rms("param", params, labels),
        **_rms("update", updates, labels),
    }


def make_loss_and_grads(model_config: TransformerConfig, mesh: Mesh) -> Callable:
    """(params, batch, key) -> summed loss, number of targets, summed gradients, over the whole batch.

    Each of several devices works on its rows. If all hold all parameters, one flat all-reduce sums the gradients: one
    for each parameter would take longer to start than to run on small models.
    """

    def on_one_device(params, batch_BT1, key):
        loss = partial(batch_loss, model_config, batch_BT1=batch_BT1, key=key if model_config.dropout else None)
        (total, tokens), grads = jax.value_and_grad(lambda p: loss(params=p), has_aux=True)(params)
        return total, tokens, grads

    def on_each_device(params, batch_BT1, key):
        total, tokens, grads = on_one_device(params, batch_BT1, jax.random.fold_in(key, jax.lax.axis_index(ROWS)))
        if not is_data_parallel(mesh):
            width = model_config.embedding_dim  # gradients of split parameters are already summed over fsdp
            sums = {n: sum_over((DATA,) if is_part(n, g, width) else ROWS, g, mesh) for n, g in grads.items()}
            return *sum_over(ROWS, (total, tokens), mesh), sums
        flat, unravel = ravel_pytree((total, tokens.astype(jnp.float32), grads))  # float32 counts up to 2^24 exactly
        total, tokens, grads = unravel(jax.lax.psum(flat, DATA))
        return total, tokens.astype(jnp.int32), grads

    if mesh.size == 1:
        return on_one_device

    def on_all(params, batch_BT1, key):
        whole, rows, parts = PartitionSpec(), PartitionSpec(ROWS), rows_specs(params, mesh)
        on_mesh = on_rows(on_each_device, mesh, (parts, rows, whole), (whole, whole, parts))
        return on_mesh(params, batch_BT1, key)

    return on_all


def make_eval_step(model_config: TransformerConfig, mesh: Mesh) -> Callable[[Params, jax.Array], tuple]:
    """(params, batch) -> summed loss and number of targets, one entry for each device with rows of its own.

    The host sums these: evaluation steps do not depend on each other, and collectives of several programs in flight on
    CPUs can wait for each other for ever.
    """

    def on_each_device(params, batch_BT1):
        return jax.tree.map(lambda x: x[None], batch_loss(model_config, params, batch_BT1, None))

    def eval_step(params, batch_BT1):
        rows = PartitionSpec(ROWS)
        return on_rows(on_each_device, mesh, (rows_specs(params, mesh), rows), rows)(params, batch_BT1)

    return jax.jit(traced_for(target_of(mesh.devices.flat), eval_step))


def make_train_step(
    model_config: TransformerConfig,
    optimizer: Any,
    schedule: Schedule,
    labels: dict[str, str],
    accumulation: int,
    key: jax.Array,
    mesh: Mesh,
    spike_sigmas: float = 0.0,
    skip_spikes: bool = False,
) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """One micro-batch: (state, batch [B, T + 1]) -> (state, metrics of the last real step). The state is donated.

    A micro-batch whose loss or gradient is not finite counts as one without tokens: its gradient is zeroed. A real step
    without tokens changes neither parameters nor optimizer; nor does one with a loss spike under `skip_spikes`.
    """
    loss_and_grads = make_loss_and_grads(model_config, mesh)
    words = jax.device_get(jax.random.key_data(key))  # tracing would fetch them from a GPU, which the trainer forbids

    def train_step(state: TrainState, batch_BT1: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        params, key = state.params, jax.random.wrap_key_data(words)
        loss, tokens, grads = loss_and_grads(params, batch_BT1, jax.random.fold_in(key, state.micro_step))
        good, seen = see_gradients(state.health, loss, grads)
        good = materialize(good)  # otherwise a CPU program would repeat the whole test for each gradient
        grads = jax.tree.map(lambda g: jnp.where(good, g, 0.0), grads)
        window_loss = state.window_loss + jnp.where(good, loss, 0.0)
        window_tokens = state.window_tokens + jnp.where(good, tokens, 0)

        real_step = state.micro_step // accumulation
        last = (state.micro_step + 1) % accumulation == 0
        counts = last & (window_tokens > 0)
        mean_loss = window_loss / jnp.maximum(window_tokens, 1)
        spike, seen = see_loss(seen, mean_loss, counts, spike_sigmas)
        apply = counts & ~spike if skip_spikes else counts
        extra = {"apply": apply, "tokens": jnp.maximum(window_tokens, 1).astype(jnp.float32), "real_step": real_step}
        updates, opt_state = optimizer.update(grads, state.opt_state, params, **extra)
        new_params = jax.tree.map(jnp.add, params, updates)

        lr_factor, bad_steps = jnp.asarray(schedule(real_step), jnp.float32), state.metrics["bad_steps"]
        numbers = mean_loss, lr_factor, bad_steps, counts, apply
        of_this_step = _metrics(labels, new_params, updates, opt_state, seen, *numbers)
        step_metrics = jax.tree.map(lambda new, old: jnp.where(last, new, old), of_this_step, state.metrics)
        state = TrainState(
            params=new_params,
            opt_state=opt_state,
            micro_step=state.micro_step + 1,
            window_loss=jnp.where(last, 0.0, window_loss),
            window_tokens=jnp.where(last, 0, window_tokens),
            health=seen,
            metrics=step_metrics,
        )
        if not is_data_parallel(mesh):
            state = jax.lax.with_sharding_constraint(state, shardings_of(state, mesh))
        return state, step_metrics

    return jit_for(target_of(mesh.devices.flat), train_step, donate_argnums=0)


def _rms(what: str, tree: Params, labels: dict[str, str]) -> dict[str, jax.Array]:
    """Root mean square of the entries, by optimizer group. Their number is a float: an int has to be below 2^31."""
    result = {}
    for group in sorted(set(labels.values())):
        leaves = [leaf for name, leaf in tree.items() if labels[name] == group]
        total = sum(jnp.tensordot(leaf, leaf, leaf.ndim) for leaf in leaves)  # vdot would gather a split array
        result[f"{what}_rms_{group}"] = jnp.sqrt(total / float(sum(leaf.size for leaf in leaves)))
    return result


# --- The step of a run --------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A step, and what belongs to it."""

    state: TrainState  # before the first step: shapes, dtypes and shardings of its arrays
    labels: dict[str, str]  # parameter -> the optimizer that trains it
    init: Callable[[jax.Array], TrainState]  # key -> the state before the first step, sharded
    run: Callable  # what `make_train_step` returns


def make_step(
    settings: OptimizerConfig,
    model_config: TransformerConfig,
    total: int,
    key: jax.Array,
    mesh: Mesh,
    spike_sigmas: float = 0.0,
    skip_spikes: bool = False,
    first_total: int | None = None,
) -> Step:
    """The step of a run of `total` real steps; `key` is for dropout, `first_total` for the warm-up."""
    shapes = shapes_of(model_config)
    labels = labels_of(shapes, settings)
    optimizer = make_optimizer(settings, shapes, total, mesh, first_total)
    schedule = schedule_shape(settings, total, first_total)
    spikes = spike_sigmas, skip_spikes
    run = make_train_step(model_config, optimizer, schedule, labels, settings.accumulation_steps, key, mesh, *spikes)
    init = partial(init_state, model_config, optimizer, labels)
    places = shardings_of(state := jax.eval_shape(init, key), mesh)
    state = jax.tree.map(lambda shape, place: shape.update(sharding=place), state, places)
    return Step(state, labels, jax.jit(init, out_shardings=places), run)
