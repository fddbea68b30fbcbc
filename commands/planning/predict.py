"""What a config would take on devices that are not here: its step is compiled for simulated ones, from shapes alone."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import config_lib
from commands.planning.traffic import Collective, collectives
from training.cost import flops_per_token, held_bytes
from training.micro_batch import compiled, program_bytes
from training.step import make_step
from transformer.config import TransformerConfig


@dataclass(frozen=True)
class Planned:
    """A training step for a mesh, compiled and not run. Sizes are bytes on each device."""

    mesh: Mesh
    config: ConfigDict
    model: TransformerConfig
    memory: dict[str, int]  # parameters and optimizer exact, the rest by `training.cost.held_bytes`
    compiled_bytes: int  # arguments and temporary arrays, as the compiler for the simulated devices reports them
    traffic: list[Collective]

    @property
    def tokens(self) -> int:
        """Tokens of a real step."""
        return self.config.batch_size * self.config.context_len * self.config.accumulation_steps

    @property
    def flops(self) -> float:
        """FLOPs of the model in a real step, over all devices (PaLM's count, without what remat computes again)."""
        return flops_per_token(self.model) * self.tokens


def plan_step(config: ConfigDict, vocab_size: int, eot: int | None, mesh: Mesh, memory: float = math.inf) -> Planned:
    """The config's step for a mesh of devices of `memory` bytes; the dtype is the config's own, which names one."""
    key, model = jax.random.key(config.seed), config_lib.model_config_of(config, vocab_size, eot)
    if config.micro_batch:
        config = config_lib.in_largest_parts(config, model, mesh, key, memory, compiles=False)
    settings, spikes = config_lib.optimizer_config(config), (config.spike_sigmas, config.skip_spikes)
    step = make_step(settings, model, config.max_steps or 1000, key, mesh, *spikes)
    program = compiled(step, config.batch_size, config.context_len, mesh)
    return Planned(
        mesh=mesh,
        config=config,
        model=model,
        memory=held_bytes(settings, model, config.batch_size, step.state, mesh),
        compiled_bytes=program_bytes(program) or 0,
        traffic=collectives(program.as_text(), mesh.size),
    )
