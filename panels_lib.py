"""What a run looks like on a terminal before it starts and after it ends, as tables."""

import shlex
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from runtime.text import Table, duration, human
from transformer.model import TransformerConfig


def opening(header: dict[str, str], config: ConfigDict, model: TransformerConfig) -> list[Table]:
    """Model, data, optimizer, devices; `header` is `run_lib.header`'s."""
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
        "Data": [["text", data], ["split", split], ["steps", header["steps"]]],
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
