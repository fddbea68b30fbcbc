"""Training on meshes of eight simulated devices, for a process of its own: python tests/mesh_runs.py DIRECTORY

leaves what it found in DIRECTORY/found.json; what the trainer prints goes to standard output.
"""

import hashlib
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from helpers import tiny_config, train_until
from jax.sharding import PartitionSpec
from xla_flags import SOONER

import config_lib
import train_lib
from runtime.checkpoints.manager import Checkpoints
from training.cost import held_bytes
from training.ema import average_of
from training.muon import share_out
from training.optimizer import OptimizerConfig, make_optimizer
from training.step import make_step
from training.traffic import axes_of_group, collectives
from transformer.sharding import batch_sharded, make_mesh, parse_mesh, shardings_of, undivided

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false {SOONER}"

# All sizes differ, and all but the vocabulary of 65 can be split in eight; the key heads are fewer.
MODEL = {
    "num_blocks": 2,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 6,
    "embedding_dim": 40,
    "mlp_dim": 72,
    "context_len": 16,
    "batch_size": 24,
    "max_steps": 20,
    "tie_embeddings": False,
    "qk_norm": "scaled",
    "lr": 0.01,
    "muon_lr": 0.02,
    "dtype": "float32",
}
VOCABULARY = 65
MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "tensor=8", "data=2,sequence=2,tensor=2"]
MORE = {  # what else a step can be asked for, all at once
    "accumulation_steps": 2,
    "ema_decay": 0.6,
    "batch_size": 12,
    "max_steps": 6,
    "dropout": 0.1,
    "scan_blocks": True,
    "remat": "block",
    "loss_chunk": 24,
    "tie_embeddings": True,
    "position": "learned",
    "mlp": "swiglu",
    "norm": "layernorm",
    "mask_documents": True,
    "sliding_window": 7,
    "attention_sink": "key",
    "attention_gate": "head",
    "exclusive_attention": True,
    "num_blocks": 4,
    "residual_scalars": True,
}


class Trained:
    """A config's step on a mesh of the first devices, and what came of it."""

    def __init__(self, mesh: str, **changes: Any):
        config = tiny_config(**{**MODEL, **changes}, mesh=mesh)
        self.config, sizes = config, parse_mesh(mesh).values()
        self.mesh = make_mesh(mesh, devices=jax.devices()[: math.prod(sizes)])
        self.model = config_lib.model_config_of(config, VOCABULARY, eot=3)
        self.settings, spikes = config_lib.optimizer_config(config), (config.spike_sigmas, config.skip_spikes)
        self.step = make_step(self.settings, self.model, config.max_steps, jax.random.key(5), self.mesh, *spikes)
        self.state = self.step.init(jax.random.key(3))
        self.born = bits_of(self.state)
        self.program = self.step.run.lower(self.state, self.batch(0)).compile()

    def batch(self, i: int) -> jax.Array:
        shape = self.config.batch_size, self.config.context_len + 1
        text = np.random.default_rng(i).integers(0, 9, shape, np.int32)
        text[::5, -3:] = -1  # no targets
        return jax.device_put(text, batch_sharded(self.mesh))

    def run(self) -> list[float]:
        losses = []
        for i in range(self.config.max_steps * self.config.accumulation_steps):
            self.state, metrics = self.program(self.state, self.batch(i))
            losses.append(float(metrics["loss"]))
        return losses

    def found(self) -> dict[str, Any]:
        held, params = self.program.memory_analysis(), self.step.state.params
        sizes = {"tokens": self.model.context_len, "query_heads": self.model.num_heads}
        return {
            "losses": self.run(),
            "born": self.born,
            "shards": {name: p.sharding.shard_shape(p.shape) for name, p in params.items()},
            "moved": [
                name
                for now in filter(None, (self.state.params, average_of(self.state.opt_state)))
                for name, p in params.items()
                if p.sharding != now[name].sharding
            ],
            "traffic": [
                (c.op, axes_of_group(c.group, dict(self.mesh.shape)), c.count, c.sent)
                for c in collectives(self.program.as_text(), self.mesh.size)
            ],
            "whole": undivided(params, sizes | {"key_heads": self.model.num_kv_heads}, self.mesh),
            "held": held_bytes(self.settings, self.model, self.config.batch_size, self.step.state, self.mesh),
            "compiled": held.argument_size_in_bytes + held.temp_size_in_bytes,
        }


def bits_of(tree: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()


def elsewhere(saved: Trained, directory: Path) -> dict[str, bool]:
    """Whether a state saved on one mesh comes back to the bit on others, split as it is there."""
    same = {}
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, saved.state.params, saved.state[1:], {}, None)
    for text in ("fsdp=8", "data=1"):
        mesh = make_mesh(text, devices=jax.devices()[: math.prod(parse_mesh(text).values())])
        place = partial(shardings_of, mesh=mesh)
        with Checkpoints(directory, read_only=True) as checkpoints:
            restored = checkpoints.restore(1, saved.step.state.params, saved.step.state[1:], place)
        placed = jax.tree.leaves(jax.tree.map(lambda x, to: x.sharding == to, restored, place(restored)))
        same[text] = all(placed) and bits_of(restored) == bits_of((saved.state.params, saved.state[1:]))
    return same


def shared_out() -> dict[str, Any]:
    """What each device gets to do of 5 and 9 matrices that are split, or not, and whether all is done."""
    mesh, rng, found = make_mesh("data=2,fsdp=2,tensor=2", devices=jax.devices()), np.random.default_rng(0), {}
    stacks = [rng.integers(0, 9, shape).astype(np.float32) for shape in ((5, 6, 4), (9, 2, 8))]
    for spec in (PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", None), PartitionSpec(None, None)):
        done: list[tuple[int, ...]] = []
        work = lambda x_XMN, done=done: done.append(x_XMN.shape) or x_XMN.sum(axis=(1, 2), keepdims=True) - x_XMN
        results = jax.jit(lambda stacks, spec=spec, work=work: share_out(work, stacks, [spec] * 2, mesh))(stacks)
        right = [np.array_equal(y, x.sum(axis=(1, 2), keepdims=True) - x) for x, y in zip(stacks, results, strict=True)]
        found[str(tuple(spec))] = {"shapes": done, "right": all(right)}
    return found


def optimizers() -> dict[str, Any]:
    """Thirteen updates by each optimizer of the hidden matrices with a form of its own, on a mesh and on one device."""
    sizes = {"attention.query": (40, 48), "attention.out": (48, 40), "mlp.up": (40, 72)}
    shapes = {f"blocks.0.{name}.kernel": shape for name, shape in sizes.items()}
    noise = lambda seed, shape: np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)
    draw = lambda seed: {name: noise(seed, shape) for name, shape in shapes.items()}
    found: dict[str, Any] = {}
    for hidden in ("muon", "normuon"):
        settings, ends, held = OptimizerConfig(hidden_optimizer=hidden, weight_decay=0.1), [], []
        for text in ("data=1", "data=2,fsdp=2,tensor=2"):
            mesh = make_mesh(text, devices=jax.devices()[: math.prod(parse_mesh(text).values())])
            optimizer = make_optimizer(settings, draw(0), 13, mesh)

            def update(state, grads, step, optimizer=optimizer):
                extra = {"tokens": 1.0, "real_step": step, "apply": True}
                updates, opt_state = optimizer.update(grads, state[1], state[0], **extra)
                return optax.apply_updates(state[0], updates), opt_state

            first = draw(0), optimizer.init(draw(0))
            place = shardings_of(first, mesh)
            jitted = jax.jit(update, out_shardings=place)
            state = jax.device_put(first, place)
            for step in range(13):
                state = jitted(state, jax.device_put(draw(step + 1), place[0]), step)
            ends.append(jax.device_get(state[0]))
            held.append(sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state[1])))
        apart = max(float(np.abs(ends[0][name] - ends[1][name]).max()) for name in shapes)
        found[hidden] = {"apart": apart, "held": held[1] / held[0]}
    return found


def cut_and_resumed(directory: Path) -> None:
    """The trainer, stopped on one mesh and going on with another; several steps a dispatch on the first."""
    config = tiny_config(mesh="fsdp=2,tensor=4", steps_per_dispatch=3)
    train_until(9, config, directory)
    config.update({"mesh": "data=2,sequence=4", "steps_per_dispatch": 1})
    train_lib.train(config, directory)


def main(directory: Path) -> None:
    found = {mesh: Trained(mesh).found() for mesh in ["data=1", *MESHES]}
    more = {mesh: Trained(mesh, **MORE) for mesh in ("data=2", "fsdp=2,sequence=2,tensor=2")}
    found |= {f"more: {mesh}": trained.found() for mesh, trained in more.items()}
    found["restored"] = elsewhere(more["fsdp=2,sequence=2,tensor=2"], directory)
    found["shared out"] = shared_out()
    found["optimizers"] = optimizers()
    cut_and_resumed(directory / "run")
    (directory / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
