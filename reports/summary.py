"""What a person is told of a run before it starts and after it ends, as lines and as tables."""

import math
import shlex
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from corpus.dataset import SPLITS, Dataset
from runtime.screen.text import Table, duration, human
from training.cost import held_bytes, parameter_counts
from training.step import Step
from transformer.config import TransformerConfig
from transformer.model import Params
from transformer.sharding import held_whole, is_data_parallel


def header(
    workdir: Path,
    config: ConfigDict,
    model_config: TransformerConfig,
    data: Dataset,
    step: Step,
    mesh: Mesh,
    steps: int,
) -> list[tuple[str, str]]:
    """What a person wants to know before a run starts, as names and values."""
    device, vocab_size = jax.devices()[0], model_config.vocab_size
    counts = parameter_counts(model_config)
    by_part = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    memory = held_bytes(config, model_config, step.state, mesh)
    muon = sum(label == "muon" for label in step.labels.values())
    tokens = config.batch_size * config.context_len * config.accumulation_steps
    epochs = steps * tokens / data.train.num_tokens
    return [
        ("run", str(workdir)),
        ("device", f"{mesh.size} x {device.device_kind} ({device.platform}), {model_config.dtype}"),
        *([] if is_data_parallel(mesh) else [("mesh", _mesh(model_config, step.state.params, mesh))]),
        ("parameters", f"{sum(counts.values()):,} ({by_part})"),
        (
            "data",
            f"{config.dataset}, {data.tokenizer.name} ({vocab_size:,} tokens): "
            f"{data.train.num_tokens:,} to train on, {data.val.num_tokens:,} to validate",
        ),
        *([("shards", _shards(data))] if data.train.files else []),
        ("optimizer", f"Muon for {muon} matrices, AdamW for {len(step.labels) - muon} other arrays"),
        (
            "memory",
            f"about {sum(memory.values()) / 1e6:,.0f} MB a device "
            f"({', '.join(f'{part} {size / 1e6:,.0f}' for part, size in memory.items())})",
        ),
        ("steps", f"{steps:,} of {tokens:,} tokens, {epochs:.2f} epochs"),
        ("first loss", f"ln {vocab_size} = {math.log(vocab_size):.3f} expected"),
    ]


def _shards(data: Dataset) -> str:
    """Which files each split is made of."""
    told = []
    for name, word in SPLITS.items():
        if split := getattr(data, name):
            files = split.files
            several = f" to {files[-1]} ({len(files):,} files)" if len(files) > 1 else ""
            told.append(f"{word} {files[0] + several if files else 'at their end'}")
    return ", ".join(told)


def _mesh(model_config: TransformerConfig, params: Params, mesh: Mesh) -> str:
    """The sizes of a mesh, and what it would split and cannot."""
    c = model_config
    sizes = {"tokens": c.context_len, "query_heads": c.num_heads, "key_heads": c.num_kv_heads}
    whole = held_whole(params, sizes, mesh)
    return ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) + (
        f"; not divided, so whole on each device: {', '.join(whole)}" if whole else ""
    )


def opening(header: dict[str, str], config: ConfigDict, model: TransformerConfig) -> list[Table]:
    """Model, data, optimizer, devices; `header` is `header`'s, as a dictionary."""
    data, _, split = header["data"].rpartition(": ")
    heads = f"{model.num_heads} heads of {model.head_dim}"
    if model.num_kv_heads != model.num_heads:
        heads += f", {model.num_kv_heads} of keys and values"
    rates = f"AdamW {config.lr:g}" + (f", Muon {config.muon_lr:g}" if config.use_muon else "")
    batch = f"{config.batch_size} sequences of {config.context_len} tokens"
    if config.accumulation_steps > 1:
        batch += f", {config.accumulation_steps} a step"
    layers = f"{model.num_blocks} of width {model.embedding_dim}, MLP {model.mlp_dim} {model.mlp}, {model.norm}"
    sinks = "with sinks" if model.attention_sink else "without sinks"
    groups = {
        "Model": [
            ["parameters", header["parameters"]],
            ["layers", layers],
            ["attention", f"{heads}, {model.position} positions, {sinks}"],
        ],
        "Data": [
            ["text", data],
            *([["shards", header["shards"]]] if "shards" in header else []),
            ["split", split],
            ["steps", header["steps"]],
        ],
        "Optimizer": [
            ["parts", header["optimizer"]],
            ["rates", f"{rates}, {config.schedule}"],
            ["batch", batch],
        ],
        "Devices": [["devices", header["device"]], ["memory", header["memory"]], ["run", header["run"]]],
    }
    return [Table(title, ["", ""], rows, left=2) for title, rows in groups.items()]


def closing(run: Any, seconds: float) -> tuple[Table, str]:
    """How a run ended, and the command that samples from it.

    Args:
      run: the trainer's `Run`.
      seconds: that all its sessions took.
    """
    here = Path.cwd()
    shown = run.workdir.relative_to(here) if run.workdir.is_relative_to(here) else run.workdir
    loss_at = lambda step, loss: f"{step:,}" + (f", validation loss {loss:.4f}" if loss is not None else "")
    rows = [["last step", loss_at(run.step, run.val_loss)]]
    if run.best_step is not None:
        rows.insert(0, ["best step", loss_at(run.best_step, run.best_val_loss)])
    tokens = f" for {human(run.history[-1]['tokens'])} tokens" if run.history else ""
    rows += [["time", duration(seconds) + tokens], ["files", str(shown)]]
    return Table("Done", ["", ""], rows, left=2), f"python main.py sample --workdir={shlex.quote(str(shown))}"
