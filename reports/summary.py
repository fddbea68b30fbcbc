"""The summary of a run before it starts and after it ends, as lines and as tables."""

import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import config_lib
from corpus.dataset import SPLITS, Dataset
from runtime.screen.text import Table, duration, human
from training.cost import held_bytes, parameter_counts
from training.optimizer import groups_of
from training.step import Step
from transformer.config import TransformerConfig
from transformer.model import Params
from transformer.sharding import is_data_parallel, undivided

Facts = dict[str, dict[str, str]]  # by group and name

# A line's name -> the facts that it shows, with a colon between them.
_LINES = {
    **{"run": ["run"], "device": ["devices"], "mesh": ["mesh"], "parameters": ["parameters"]},
    **{"data": ["text", "split"], "shards": ["shards"], "optimizer": ["parts"], "batch": ["batch"]},
    **{"memory": ["memory"], "steps": ["steps"], "first loss": ["first loss"]},
}
_LINES_ALONE = {"mesh", "first loss"}  # no panel shows them


def facts(
    workdir: Path,
    config: ConfigDict,
    model_config: TransformerConfig,
    data: Dataset,
    step: Step,
    mesh: Mesh,
    steps: int,
    why: str,
) -> Facts:
    """The facts to show before a run starts; `lines` and `panels` are two forms of them. `why` says it of the dtype."""
    model, device, vocab_size = model_config, jax.devices()[0], model_config.vocab_size
    fewer = f", {model.num_kv_heads} of keys and values" if model.num_kv_heads != model.num_heads else ""
    mlp, sinks = f"MLP {model.mlp_dim} {model.mlp}", "with sinks" if model.has_sinks else "without sinks"
    tokens = config.batch_size * config.context_len * config.accumulation_steps
    members = Counter(step.labels.values())
    groups = groups_of(step.labels)
    parts = [f"{group.title} for {members[label]} {group.members}" for label, group in reversed(groups.items())]
    parts += [f"the weights averaged by {config.ema_decay:g}"] if config.ema_decay else []
    rates = [f"{group.title} {config[group.rate]:g}" for group in groups.values()]
    several = f", {config.accumulation_steps} a step" if config.accumulation_steps > 1 else ""
    batch = f"{config.batch_size} sequences of {config.context_len} tokens{several}"
    memory = held_bytes(config_lib.optimizer_config(config), model, config.batch_size, step.state, mesh)
    large = {part: size for part, size in memory.items() if size >= 5e5 or part == "parameters"}
    by_use = ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in large.items())
    return {
        "Model": {
            "parameters": parameters(model),
            "layers": f"{model.num_blocks} of width {model.embedding_dim}, {mlp}, {model.norm}",
            "attention": f"{model.num_heads} heads of {model.head_dim}{fewer}, {model.position} positions, {sinks}",
        },
        "Data": {
            "text": f"{config.dataset}, {data.tokenizer.name} ({vocab_size:,} tokens)",
            **({"shards": _shards(data)} if data.train.files else {}),
            "split": f"{data.train.num_tokens:,} to train on, {data.val.num_tokens:,} to validate",
            "steps": f"{steps:,} of {tokens:,} tokens, {steps * tokens / data.train.num_tokens:.2f} epochs",
            "first loss": f"ln {vocab_size} = {math.log(vocab_size):.3f} expected",
        },
        "Optimizer": {"parts": ", ".join(parts), "rates": ", ".join([*rates, config.schedule]), "batch": batch},
        "Devices": {
            "devices": f"{mesh.size} x {device.device_kind} ({device.platform}), {model.dtype}{why and f' ({why})'}",
            **({} if is_data_parallel(mesh) else {"mesh": _mesh(model, step.state.params, mesh)}),
            "memory": f"about {sum(memory.values()) / 1e6:,.0f} MB a device ({by_use})",
            "run": str(workdir),
        },
    }


def parameters(model_config: TransformerConfig) -> str:
    """How many a model has, in all and by part."""
    counts = parameter_counts(model_config)
    by_part = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    return f"{sum(counts.values()):,} ({by_part})"


def _shards(data: Dataset) -> str:
    """The files of each split."""

    def told(files: Sequence[str]) -> str:
        several = f" to {files[-1]} ({len(files):,} files)" if len(files) > 1 else ""
        return files[0] + several if files else "at their end"

    return ", ".join(f"{word} {told(split.files)}" for name, word in SPLITS.items() if (split := getattr(data, name)))


def _mesh(model: TransformerConfig, params: Params, mesh: Mesh) -> str:
    """The sizes of a mesh, and the axes that it cannot split."""
    sizes = {"tokens": model.context_len, "query_heads": model.num_heads, "key_heads": model.num_kv_heads}
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    whole = ", ".join(undivided(params, sizes, mesh))
    return axes + (f"; not divided, so whole on each device: {whole}" if whole else "")


def lines(groups: Facts) -> list[tuple[str, str]]:
    """The facts as (name, text) of lines, for an output that is no terminal."""
    by_name = {name: value for group in groups.values() for name, value in group.items()}
    return [(line, ": ".join(by_name[name] for name in names)) for line, names in _LINES.items() if names[0] in by_name]


def panels(groups: Facts) -> list[Table]:
    """The facts as tables, one for each group, for a terminal."""
    rows = lambda group: [[name, value] for name, value in group.items() if name not in _LINES_ALONE]
    return [Table(title, ["", ""], rows(group), left=2) for title, group in groups.items()]


def going_on(rates: Callable[[int], Callable[[int], Any]], step: int, before: int, total: int) -> str:
    """How the learning rates change in a run after `step` steps when its length changes from `before` to `total`.

    `rates` gives the `schedule_shape` of a run of so many steps.
    """
    last, now, end = float(rates(before)(step - 1)), float(rates(total)(step)), float(rates(total)(total - 1))
    return (
        f"going on to step {total} instead of {before}: the learning rates, {last:.3g} of their peak in the last step, "
        f"are {now:.3g} in the next and {end:.3g} at the end"
    )


def closing(run: Any, seconds: float) -> tuple[Table, str]:
    """The results of a run (`run_lib.Run`), and the command that samples from it; `seconds` of all its sessions."""
    here = Path.cwd()
    shown = run.workdir.relative_to(here) if run.workdir.is_relative_to(here) else run.workdir
    loss_at = lambda step, loss: f"{step:,}" + (f", validation loss {loss:.4f}" if loss is not None else "")
    rows = [["last step", loss_at(run.step, run.val_loss)]]
    if run.best_step is not None:
        over = f" over {run.best_tokens:,} tokens" if run.best_tokens else ""
        over += " with averaged weights" if run.history and "ema_val_loss" in run.history[-1] else ""
        rows.insert(0, ["best step", loss_at(run.best_step, run.best_val_loss) + over])
    tokens = f" for {human(run.history[-1]['tokens'])} tokens" if run.history else ""
    rows += [["time", duration(seconds) + tokens], ["files", str(shown)]]
    return Table("Done", ["", ""], rows, left=2), f"python main.py sample --workdir={shlex.quote(str(shown))}"
