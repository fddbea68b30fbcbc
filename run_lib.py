"""What a run's directory holds, read back: its config, its tokenizer, its data, its model. Writes nothing."""

from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

import config_lib
from input_pipeline import Dataset, load_dataset
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError, one_line
from runtime.files import read_json
from transformer.model import Transformer, init_params, model_of
from transformer.tokenizer import Tokenizer, tokenizer_from_dict

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.txt"


def resolve_dtype(dtype: str) -> str:
    """ "auto" is bfloat16 where the hardware is made for it."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def data_dir_of(config: ConfigDict) -> Path:
    """`config.data_dir`, relative to the directory of the program."""
    return Path(__file__).parent / config.data_dir


def load_data(config: ConfigDict, say: Callable[[str], None], vocabulary: Tokenizer | None = None) -> Dataset:
    """The data set that a config names; `vocabulary` is the run's own tokenizer where there is one."""
    return load_dataset(
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


def load_model(workdir: Path, step: int | None = None) -> tuple[Transformer, Tokenizer, ConfigDict, int]:
    """A run's model at a checkpoint (the best one by default), on one device; takes no lock, writes nothing.

    Raises:
      UserError, NoCheckpointError: there is no such run or checkpoint.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such directory; train first, or name the directory of a run")
    config = config_lib.from_dict(read_json(workdir / CONFIG_FILE)["config"])
    tokenizer = load_tokenizer(workdir)
    model_config = config_lib.transformer_config(config, tokenizer.vocab_size, resolve_dtype(config.dtype))
    abstract = jax.eval_shape(lambda: init_params(model_config, jax.random.key(0)))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.best() if step is None else step
        params = checkpoints.restore_params(step, abstract, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return model_of(model_config, params), tokenizer, config, step
