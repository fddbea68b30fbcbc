"""What a config would take on devices that are not here: its programs are compiled for them, from shapes alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from ml_collections import ConfigDict

import config_lib
from commands.planning.compilers import facts_of
from commands.planning.traffic import Collective
from training.cost import flops_per_token, held_bytes
from training.evaluate import Evaluator
from training.step import Step, make_step
from transformer import sampling
from transformer.config import TransformerConfig
from transformer.sharding import DATA, FSDP, batch_sharded, is_data_parallel
from transformer.xla import aimed_at, target_of


@dataclass(frozen=True)
class Planned:
    """A training step for a mesh, compiled and not run. Sizes are bytes on each device."""

    mesh: Mesh
    config: ConfigDict
    model: TransformerConfig
    memory: dict[str, int]  # parameters and optimizer exact, the rest by `training.cost.held_bytes`
    state_arrays: int  # of the training state, all of which should be donated
    programs: dict[str, dict[str, Any]]  # what `facts_of` says of the step, and of the others if asked for

    @property
    def traffic(self) -> list[Collective]:
        """What a step sends."""
        return [Collective(**c | {"group": tuple(c["group"])}) for c in self.programs["step"].get("collectives", [])]

    @property
    def needed(self) -> int | None:
        """The most memory that a device needs, by the compiler."""
        sizes = {name: p.get("peak_bytes") or p.get("needed_bytes") for name, p in self.programs.items()}
        return max((size + self.beside(name) for name, size in sizes.items() if size), default=None)

    def beside(self, program: str) -> int:
        """What a run holds besides while this program runs: the optimizer's state, and for samples the parameters.

        The first device alone writes samples, with whole parameters: where they are split, its parts of them stay.
        """
        parts = 0 if is_data_parallel(self.mesh) else self.memory["parameters"]
        return {"step": 0, "evaluation": self.memory["optimizer"]}.get(program, self.memory["optimizer"] + parts)

    @property
    def refused(self) -> str:
        """Why the compiler refuses a program, in its words, or ""."""
        return next((p["refused"] for p in self.programs.values() if "refused" in p), "")

    @property
    def tokens(self) -> int:
        """Tokens of a real step."""
        return self.config.batch_size * self.config.context_len * self.config.accumulation_steps

    @property
    def flops(self) -> float:
        """FLOPs of the model in a real step, over all devices (PaLM's count, without what remat computes again)."""
        return flops_per_token(self.model) * self.tokens


def plan_step(config: ConfigDict, vocab_size: int, eot: int | None, mesh: Mesh, others: bool = False) -> Planned:
    """The config's step for a mesh; with `others` also what evaluates and what writes samples."""
    with aimed_at(target_of(mesh.devices.flat)):
        model, step, memory = _built(config, vocab_size, eot, mesh)
        shape = config.batch_size, config.context_len + 1
        batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharded(mesh))
        programs = {"step": facts_of(step.run.lower(step.state, batch), mesh.devices)}
        if others and "refused" not in programs["step"]:
            evaluation = Evaluator(model, mesh, config.batch_size).lowered(step.state.params)
            first = mesh.devices.ravel()[:1]
            programs["evaluation"] = facts_of(evaluation, mesh.devices)
            for name, program in sampling.lowered(model, step.state.params, SingleDeviceSharding(first[0])).items():
                programs[name] = facts_of(program, first)
        return Planned(mesh, config, model, memory, len(jax.tree.leaves(step.state)), programs)


def rule_bytes(config: ConfigDict, vocab_size: int, eot: int | None, mesh: Mesh) -> int:
    """What a device needs by `training.cost.held_bytes`; nothing is compiled."""
    return sum(_built(config, vocab_size, eot, mesh)[2].values())


def _built(
    config: ConfigDict, vocab_size: int, eot: int | None, mesh: Mesh
) -> tuple[TransformerConfig, Step, dict[str, int]]:
    model = config_lib.model_config_of(config, vocab_size, eot)
    settings, spikes = config_lib.optimizer_config(config), (config.spike_sigmas, config.skip_spikes)
    step = make_step(settings, model, config.max_steps or 1000, jax.random.key(config.seed), mesh, *spikes)
    return model, step, held_bytes(settings, model, config.batch_size, step.state, mesh)


def smaller(config: ConfigDict, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Changes that lower the memory and not what is computed, each with those before it; the cheapest first."""
    changes: dict[str, Any] = {}
    if not 0 < config.loss_chunk <= 2048:
        yield (changes := changes | {"loss_chunk": 2048})
    if config.remat == "none":
        yield (changes := changes | {"remat": "dots"})
    rows, rounds, parts = config.batch_size, config.accumulation_steps, mesh.shape[DATA] * mesh.shape[FSDP]
    for i in range(64):
        if i == 2 and config.remat != "block":
            yield (changes := changes | {"remat": "block"})
        if i == 3 and mesh.size > 1 and is_data_parallel(mesh):
            yield (changes := changes | {"mesh": f"fsdp={mesh.size}"})
        if rows % (2 * parts) == 0:
            rows, rounds = rows // 2, 2 * rounds
            yield (changes := changes | {"batch_size": rows, "accumulation_steps": rounds})
