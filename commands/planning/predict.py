"""What a config would take on devices that are not here: its step compiled for simulated ones, from shapes alone."""

import math
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import config_lib
from commands.planning.hardware import ATTAINED, Hardware
from commands.planning.traffic import Collective, collectives
from training.cost import flops_per_token, held_bytes
from training.dispatch import held_back
from training.muon import GRAM_STEPS
from training.optimizer import OptimizerConfig
from training.step import Step, make_step
from transformer.config import TransformerConfig
from transformer.sharding import batch_sharded


@dataclass(frozen=True)
class Planned:
    """A training step for a mesh, compiled and not run. Sizes are bytes on each device."""

    mesh: Mesh
    config: ConfigDict
    model: TransformerConfig
    memory: dict[str, int]  # parameters and optimizer exact, the rest by `training.cost.held_bytes`
    compiled_bytes: int  # arguments and temporary arrays, as the compiler of the simulated devices has them
    traffic: list[Collective]
    muon_flops: float  # of the device that has most to do
    program: Any
    init: Any  # () -> the state before the first step

    @property
    def tokens(self) -> int:
        """A real step."""
        return self.config.batch_size * self.config.context_len * self.config.accumulation_steps

    @property
    def flops(self) -> float:
        """Of the model, a real step, over all devices (PaLM's count: nothing that is computed again)."""
        return flops_per_token(self.model) * self.tokens


def plan_step(config: ConfigDict, vocab_size: int, eot: int | None, mesh: Mesh) -> Planned:
    """The config's step for a mesh; the dtype is the config's own, "auto" being that of the device here."""
    key, model = jax.random.key(config.seed), config_lib.model_config_of(config, vocab_size, eot)
    settings, spikes = config_lib.optimizer_config(config), (config.spike_sigmas, config.skip_spikes)
    step = make_step(settings, model, config.max_steps or 1000, key, mesh, *spikes)
    batch = jax.ShapeDtypeStruct((config.batch_size, config.context_len + 1), jnp.int32, sharding=batch_sharded(mesh))
    program = step.run.lower(step.state, batch).compile()
    held = program.memory_analysis()
    return Planned(
        mesh=mesh,
        config=config,
        model=model,
        memory=held_bytes(config, model, step.state, mesh),
        compiled_bytes=held.argument_size_in_bytes + held.temp_size_in_bytes,
        traffic=collectives(program.as_text(), mesh.size),
        muon_flops=_muon_flops(step, settings, mesh.size),
        program=program,
        init=partial(step.init, key),
    )


def _muon_flops(step: Step, settings: OptimizerConfig, devices: int) -> float:
    """Newton-Schulz as `muon.orthogonalize` does it, matrices alike shared out over the devices."""
    params = [p for name, p in step.state.params.items() if step.labels[name] == "muon"]
    alike = Counter((p.shape, p.sharding.spec) for p in params)  # as `muon.scale_by_muon` stacks them
    steps, total = settings.newton_schulz_steps, 0.0
    for (shape, _), count in alike.items():
        m, n = sorted(shape)
        starts = math.ceil(steps / GRAM_STEPS)
        square, wide = steps * 6 * m**3, starts * 4 * m * m * n + steps * 8 * m**3
        total += math.ceil(count / devices) * (square if m == n else wide)
    return total


@dataclass(frozen=True)
class Forecast:
    """Seconds of a real step by part, for some hardware."""

    model: float  # the model's arithmetic
    optimizer: float  # Muon's products, and the state read and written
    traffic: float  # collectives one after another

    @property
    def hidden(self) -> float:
        """A step if all traffic went on beside the arithmetic."""
        return max(self.model + self.optimizer, self.traffic)

    @property
    def exposed(self) -> float:
        """A step if none did."""
        return self.model + self.optimizer + self.traffic


def forecast(planned: Planned, hardware: Hardware) -> Forecast:
    """The step's time on this hardware.

    Collectives run in every micro-step as often as the program has them. Those within a node go over its links; of
    those across nodes each node's devices share their network cards, but for exchanges, which each sends over its own.

    Raises:
      ValueError: `mesh: <why>` when the hardware has no network for so many devices.
    """
    n, k = planned.mesh.size, planned.config.accumulation_steps
    if n > hardware.node and not hardware.network:
        raise ValueError(f"mesh: {hardware.name} has {hardware.node} devices, not {n}")
    again = {"none": 1.0, "dots": 1.0, "block": 4 / 3}[planned.config.remat]
    speed = hardware.flops * hardware.efficiency
    state = planned.memory["parameters"] + planned.memory["optimizer"] + planned.memory["gradients"]
    float32 = 1 if hardware.measured else 2
    return Forecast(
        model=again * planned.flops / n / speed,
        optimizer=float32 * planned.muon_flops / speed + 2 * state / hardware.memory_speed,
        traffic=k * sum(_seconds(c, hardware) for c in planned.traffic),
    )


def _seconds(collective: Collective, hardware: Hardware) -> float:
    nodes = Counter(device // hardware.node for device in collective.group)
    speed = hardware.link
    if len(nodes) > 1:
        together = 1 if collective.op in ("all-to-all", "collective-permute") else min(nodes.values())
        speed = min(speed, together * hardware.network)
    doublings = max((len(collective.group) - 1).bit_length(), 1)
    return collective.count * hardware.latency * doublings + collective.sent / (speed * ATTAINED)


# --- Against a run ------------------------------------------------------------------------------------------------


def run_steps(planned: Planned, steps: int) -> tuple[float, int | None]:
    """The step run on the devices here: median seconds of a real step, and bytes by which the process grew (Linux)."""
    before = _resident("VmRSS")
    with_reset = before is not None and _reset_peak()
    state = planned.init()
    shape = planned.config.batch_size, planned.config.context_len + 1
    tokens = np.random.default_rng(0).integers(0, planned.model.vocab_size, shape, np.int32)
    batch = jax.device_put(tokens, batch_sharded(planned.mesh))
    step, times = held_back(planned.program), []
    for _ in range(steps + 2):
        start = time.perf_counter()
        for _ in range(planned.config.accumulation_steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    peak = _resident("VmHWM") if with_reset else None
    return statistics.median(times[2:]), None if peak is None or before is None else peak - before


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
