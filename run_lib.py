"""What a run's directory holds, read back: its config, its tokenizer, its data, its model. Writes nothing."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import config_lib
from corpus.load import holds_shards, load_shards
from input_pipeline import Dataset, load_dataset
from runtime.checkpoint import Checkpoints
from runtime.errors import NoCheckpointError, UserError, one_line
from runtime.files import read_json
from transformer.cost import memory_bytes, parameter_counts
from transformer.health import first_not_finite
from transformer.model import Params, Transformer, TransformerConfig, init_params, model_of
from transformer.tokenizer import Tokenizer, tokenizer_from_dict

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.txt"

EXPORT_FORMAT = "transformer-jax 1"  # of a safetensors file with our names
IMPORTED_FROM = "imported_from"  # marks a checkpoint that holds weights alone


def resolve_dtype(dtype: str) -> str:
    """ "auto" is bfloat16 where the hardware is made for it."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def model_config_of(config: ConfigDict, vocab_size: int) -> TransformerConfig:
    """The model's shape, with the dtype that fits the device."""
    return config_lib.transformer_config(config, vocab_size, resolve_dtype(config.dtype))


def read_config(workdir: Path) -> ConfigDict:
    """The config that trained the run.

    Raises:
      UserError: it is missing or damaged.
    """
    saved = read_json(workdir / CONFIG_FILE)
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise UserError(f"{workdir / CONFIG_FILE}: holds no config; is {workdir} a run's directory?")
    return config_lib.from_dict(saved["config"])


def data_dir_of(config: ConfigDict) -> Path:
    """`config.data_dir`, relative to the directory of the program."""
    return Path(__file__).parent / config.data_dir


def load_data(config: ConfigDict, say: Callable[[str], None], vocabulary: Tokenizer | None = None) -> Dataset:
    """The data set that a config names; `vocabulary` is the run's own tokenizer where there is one.

    Raises:
      UserError: the text cannot be used, or the config wants another tokenizer than the run has.
    """
    if vocabulary and vocabulary.name != config.tokenizer:
        raise UserError(
            f"config.tokenizer: the weights were trained with {vocabulary.name!r}, this config has "
            f"{config.tokenizer!r}; a model cannot change its tokenizer"
        )
    load = load_shards if holds_shards(config.dataset, config.tokenizer) else load_dataset
    return load(
        config.dataset,
        config.tokenizer,
        data_dir=data_dir_of(config),
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        context_len=config.context_len,
        say=say,
        vocabulary=vocabulary,
    )


def load_tokenizer(workdir: Path) -> Tokenizer:
    """The tokenizer that lies in a run's directory.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        return tokenizer_from_dict(read_json(workdir / TOKENIZER_FILE))
    except ValueError as error:
        raise UserError(f"{workdir / TOKENIZER_FILE}: {one_line(error)}; take it from a copy of the run") from error


def load_weights(workdir: Path, model_config: TransformerConfig, sharding: jax.sharding.Sharding) -> Params:
    """The weights of a run's best checkpoint, for a model of the same shape.

    Raises:
      UserError, NoCheckpointError: there is no such run, or its model has another shape.
    """
    source = model_config_of(read_config(workdir), load_tokenizer(workdir).vocab_size)
    want, have = (jax.eval_shape(lambda c=c: init_params(c, jax.random.key(0))) for c in (model_config, source))
    if want != have:
        names = [field.name for field in dataclasses.fields(source)]
        name = next(n for n in names if getattr(source, n) != getattr(model_config, n))
        raise UserError(
            f"config.{name}: {workdir} has {getattr(source, name)!r}, this config {getattr(model_config, name)!r}; "
            "init_from needs a model of the same shape"
        )
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore_params(checkpoints.best(), want, sharding)


def meta_to_resume(
    checkpoints: Checkpoints, config: ConfigDict, workdir: Path
) -> tuple[int | None, dict[str, Any] | None]:
    """The newest checkpoint's step and what it says of itself; nothing where there is none.

    Raises:
      UserError: this config cannot go on from it.
      NoCheckpointError: it cannot be read.
    """
    latest = checkpoints.latest()
    if latest is None:
        return None, None
    meta = checkpoints.meta(latest)
    if IMPORTED_FROM in meta:
        raise UserError(
            f"workdir {workdir}: holds imported weights and no optimizer's state; train from them in another --workdir "
            f"with --config=configs/finetune.py:{workdir}"
        )
    config_lib.check_resume(config_lib.from_dict(meta["config"]), config, workdir)
    return latest, meta


def load_model(workdir: Path, step: int | None = None) -> tuple[Transformer, Tokenizer, ConfigDict, int]:
    """A run's model at a checkpoint (the best one by default), on one device; takes no lock, writes nothing.

    Raises:
      UserError, NoCheckpointError: there is no such run or checkpoint.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such directory; train first, or name the directory of a run")
    config, tokenizer = read_config(workdir), load_tokenizer(workdir)
    model_config = model_config_of(config, tokenizer.vocab_size)
    model_config = dataclasses.replace(model_config, attention_kernel="auto")  # its own may need another device
    abstract = jax.eval_shape(lambda: init_params(model_config, jax.random.key(0)))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.best() if step is None else step
        params = checkpoints.restore_params(step, abstract, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    check_finite(params, workdir)
    return model_of(model_config, params), tokenizer, config, step


def check_finite(params: Params, workdir: Path) -> None:
    """Whether the weights of a run are numbers: nothing can be learned or written from others.

    Raises:
      NoCheckpointError: one is not.
    """
    if name := first_not_finite(params):
        raise NoCheckpointError(f"{workdir}: the checkpoint's {name} is not finite; move it aside, and run again")


def header(
    workdir: Path,
    config: ConfigDict,
    model_config: TransformerConfig,
    data: Dataset,
    labels: dict[str, str],
    steps: int,
) -> list[tuple[str, str]]:
    """What a person wants to know before a run starts, as names and values; `labels` say who is trained by what."""
    device, vocab_size = jax.devices()[0], model_config.vocab_size
    counts = parameter_counts(model_config)
    by_part = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    rows, num_devices = config.batch_size // jax.device_count(), jax.device_count()
    memory = memory_bytes(model_config, rows, config.use_muon, config.accumulation_steps, num_devices)
    muon = sum(label == "muon" for label in labels.values())
    tokens = config.batch_size * config.context_len * config.accumulation_steps
    epochs = steps * tokens / data.train.num_tokens
    return [
        ("run", str(workdir)),
        ("device", f"{jax.device_count()} x {device.device_kind} ({device.platform}), {model_config.dtype}"),
        ("parameters", f"{sum(counts.values()):,} ({by_part})"),
        (
            "data",
            f"{config.dataset}, {data.tokenizer.name} ({vocab_size:,} tokens): "
            f"{data.train.num_tokens:,} to train on, {data.val.num_tokens:,} to validate",
        ),
        ("optimizer", f"Muon for {muon} matrices, AdamW for {len(labels) - muon} other arrays"),
        (
            "memory",
            f"about {sum(memory.values()) / 1e6:,.0f} MB a device "
            f"({', '.join(f'{part} {size / 1e6:,.0f}' for part, size in memory.items())})",
        ),
        ("steps", f"{steps:,} of {tokens:,} tokens, {epochs:.2f} epochs"),
        ("first loss", f"ln {vocab_size} = {math.log(vocab_size):.3f} expected"),
    ]
