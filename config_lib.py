"""Read, check and compare configs. After `check` nothing changes a config. Dataclasses say what their fields may be."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import default
from corpus.dataset import ORDERS, UNKNOWN_CHARACTERS
from runtime.errors import UserError, one_line
from runtime.screen.text import nearest
from runtime.trackers import TRACKERS
from runtime.workdir import WEIGHTS
from training import optimizer as optimizer_lib
from training.optimizer import OptimizerConfig
from transformer.config import CHOICES as MODEL_CHOICES
from transformer.config import REMOVED as MODEL_REMOVED
from transformer.config import Execution, TransformerConfig
from transformer.forms import sink_name
from transformer.kernels.choose import obstacle
from transformer.ranges import BelowOne, Count, CountOrNone, NotNegative, Range, require
from transformer.sharding import DATA, FSDP, make_mesh, mesh_sizes, parse_mesh
from transformer.xla import target

CHOICES = {
    **{name: values for name, values in MODEL_CHOICES.items() if name != "dtype"},
    **optimizer_lib.CHOICES,
    "dtype": ("auto", *MODEL_CHOICES["dtype"]),
    "order": ORDERS,
    "warning_signal": ("save", "stop"),
    "unknown_characters": UNKNOWN_CHARACTERS,
    "init_weights": WEIGHTS,
}

# Allowed numbers for the keys that belong neither to the model nor to the optimizer.
RANGES = {
    **dict.fromkeys(["train_shards", "batch_size", "steps_per_dispatch", "max_bad_steps", "peer_seconds"], Count),
    **dict.fromkeys(["eval_every", "log_every", "save_every", "keep"], Count),
    **dict.fromkeys(["epochs", "max_steps", "seed", "eval_tokens", "sample_every", "sample_tokens"], CountOrNone),
    **{"max_flops": NotNegative, "max_seconds": NotNegative},
    **{"watchdog_seconds": CountOrNone, "temperature": NotNegative, "spike_sigmas": NotNegative},
    **{"test_fraction": BelowOne, "val_fraction": Annotated[float, Range("above 0 and below 1", lambda x: 0 < x < 1)]},
}

# The model's settings that say how it is run, and those that say its shape, except what follows from the text.
EXECUTION_KEYS = {field.name for field in dataclasses.fields(Execution)}
SHAPE_KEYS = {field.name for field in dataclasses.fields(TransformerConfig)} - EXECUTION_KEYS
SHAPE_KEYS -= {"vocab_size", "document_start", "answer_start", "answer_end"}

# Keys that may change when a run goes on: how long it runs, how it is watched and saved, and where its text is (which
# has to have the same hash). A change of any other key would make it another run.
FREE_ON_RESUME = {
    *("epochs", "max_steps", "max_flops", "cpu_devices", "max_bad_steps", "eval_every", "eval_tokens", "run"),
    *("log_every", "sample_every", "sample_prompt", "sample_tokens", "temperature", "print_per_layer_params"),
    *("save_every", "warning_signal", "keep", "dataset", "data_dir", "init_from", "init_weights", "mesh", "report"),
    *("trackers", "wandb_enabled", "text_column", "skip_bad_rows", "steps_per_dispatch"),
    *("watchdog_seconds", "peer_seconds", *(EXECUTION_KEYS - {"dtype"})),
    *("spike_sigmas", "skip_spikes"),  # to get a run over a spike
}

REMOVED = [*optimizer_lib.REMOVED, *MODEL_REMOVED]

# Keys that may change with --rebatch: how the remaining sequences are divided into steps.
REBATCH = {"batch_size", "accumulation_steps"}


# --- Checking -----------------------------------------------------------------------------------------------------


def type_name(kind: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return names.get(kind, "two numbers, as 0.9,0.95")


def check(config: ConfigDict) -> None:
    """Raises UserError, `config.<key>: <what is wrong>; <what to do>`, if a key is missing or its value not allowed."""
    known = default.get_config()
    for key in config:
        if key not in known:
            raise UserError(f"config.{key}: unknown key{nearest(key, list(known))}")
    for key, value in known.items():
        if key not in config:
            raise UserError(f"config.{key}: missing; start from configs.default.get_config()")
        given = _named(key, config[key])
        right = isinstance(given, type(value)) and isinstance(given, bool) == isinstance(value, bool)
        if not right and not (isinstance(value, float) and type(given) is int):
            raise UserError(f"config.{key}: expected {type_name(type(value))}, got {given!r}")
    with _of_the_config():
        require(config, RANGES)
    for key, choices in CHOICES.items():
        if (given := _named(key, config[key])) not in choices:
            near = nearest(given, choices) or f"; use one of {', '.join(choices)}"
            raise UserError(f"config.{key}: unknown value {given!r}{near}")
    with _of_the_config():
        transformer_config(config, vocab_size=2, dtype="float32")
        optimizer_config(config)
        parse_mesh(config.mesh)
    _check_together(config)


@contextlib.contextmanager
def _of_the_config() -> Iterator[None]:
    """Turns a ValueError of the layers below, `<key>: ...`, into a UserError about the config."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"config.{error}") from error


def _check_together(config: ConfigDict) -> None:
    """Raises UserError for texts with a format of their own, and for values that are not allowed together."""
    if config.cpu_devices != "auto" and not (config.cpu_devices.isdecimal() and int(config.cpu_devices) >= 1):
        raise UserError(f"config.cpu_devices: must be auto or a whole number from 1, got {config.cpu_devices!r}")
    if config.micro_batch and config.accumulation_steps != 1:
        raise UserError("config.accumulation_steps: follows from batch_size and micro_batch; leave one of them out")
    size = config.micro_batch if config.micro_batch not in ("", "auto") else "1"
    if not (size.isdecimal() and int(size) >= 1 and config.batch_size % int(size) == 0):
        raise UserError(
            f"config.micro_batch: must be auto or a whole number that divides batch_size {config.batch_size}, got "
            f"{size!r}"
        )
    if config.cpu_devices != "auto" and not config.mesh and int(config.cpu_devices) > config.batch_size:
        raise UserError(
            f"config.cpu_devices: {config.cpu_devices} devices cannot share batch_size {config.batch_size}; use fewer"
        )
    for name in trackers_of(config):
        if name not in TRACKERS:
            near = nearest(name, list(TRACKERS)) or f"; use some of {', '.join(TRACKERS)}"
            raise UserError(f"config.trackers: unknown tracker {name!r}{near}")
    if config.val_fraction + config.test_fraction >= 1:
        raise UserError("config.val_fraction: with test_fraction it leaves no text to train on; their sum must be < 1")
    if not any(config[key] for key in ("epochs", "max_steps", "max_flops", "max_seconds")):
        raise UserError("config.max_steps: the run would never end; set max_steps or epochs")
    if config.chat and not config.mask_documents:
        raise UserError("config.chat: a row holds several conversations, which only mask_documents keeps apart; set it")
    if not config.sample_prompt:
        raise UserError("config.sample_prompt: must not be empty; a newline is a good start")
    if Path(config.run).name != config.run or config.run in (".", ".."):
        raise UserError(
            f"config.run: must be a plain name without slashes, got {config.run!r}; use --workdir for a path"
        )


def mesh_of(config: ConfigDict, devices: Sequence[jax.Device]) -> Mesh:
    """The config's mesh of these devices. Raises UserError if it does not fit them, or their TPU slices."""
    with _of_the_config():
        return make_mesh(config.mesh, devices=devices)


def check_devices(config: ConfigDict, num_devices: int) -> None:
    """Raises UserError if the mesh does not fit the devices or the batch, or if they lack the attention kernel."""
    with _of_the_config():
        sizes = mesh_sizes(config.mesh, num_devices)
    parts = sizes[DATA] * sizes[FSDP]
    if config.batch_size % parts:
        below = config.batch_size // parts * parts
        near = f"{below} or {below + parts}" if below else f"{parts}"
        raise UserError(f"config.batch_size: {config.batch_size} is not divisible by {parts} devices; use {near}")
    model = transformer_config(config, 2, "bfloat16" if config.dtype == "auto" else config.dtype)  # as on a GPU
    shape = model.context_len, model.num_heads, model.num_kv_heads, model.head_dim
    if problem := obstacle(model.attention_kernel, *shape, model.operand_dtype, config.mask_documents):
        raise UserError(f"config.attention_kernel: {problem}")


# --- From a config to the dataclasses of the layers below ---------------------------------------------------------


def transformer_config(config: ConfigDict, vocab_size: int, dtype: str, **tokens: int) -> TransformerConfig:
    """The model's shape. `dtype` is the resolved one, never "auto"; `tokens` are ids with a meaning, by field."""
    settings = {name: config[name] for name in SHAPE_KEYS | EXECUTION_KEYS} | {"dtype": dtype}
    return TransformerConfig(vocab_size=vocab_size, **tokens, **settings)


def model_config_of(
    config: ConfigDict, vocab_size: int, eot: int | None = None, auto: str = "", answer: tuple[int, int] | None = None
) -> TransformerConfig:
    """The model's shape, and how it is run. Raises UserError if documents are to be masked and there is no `eot`.

    `eot` is the tokenizer's end-of-text token, `answer` those with which the assistant's turns begin and end. `auto` is
    what dtype="auto" means, of a run `run_lib.dtype_of`; "" is float32 on a CPU, otherwise bfloat16.
    """
    start = eot if config.mask_documents else -1
    if start is None:
        raise UserError(
            f"config.mask_documents: tokenizer {config.tokenizer} has no end-of-text token between documents; "
            "set it to False, or take one that has, such as gpt2"
        )
    auto = auto or ("float32" if target().platform == "cpu" else "bfloat16")
    tokens = {"document_start": start}
    if config.chat and answer:
        tokens |= {"answer_start": answer[0], "answer_end": answer[1]}
    return transformer_config(config, vocab_size, auto if config.dtype == "auto" else config.dtype, **tokens)


def in_parts(config: ConfigDict, size: int | None = None) -> ConfigDict:
    """The config whose batch_size and accumulation_steps say what its `micro_batch` does; `size` is what auto found.

    Unchanged where `micro_batch` says nothing, or is auto and nothing was found yet.
    """
    if not (size := size or (int(config.micro_batch) if config.micro_batch.isdecimal() else None)):
        return config
    divided = config.copy_and_resolve_references()
    divided.update(batch_size=size, accumulation_steps=config.batch_size // size, micro_batch="")
    return divided


def trackers_of(config: ConfigDict) -> list[str]:
    """The trackers that a config switches on, each once; `wandb_enabled` is what runs had before there were others."""
    names = ["wandb"] * config.wandb_enabled + [name.strip() for name in config.trackers.split(",") if name.strip()]
    return list(dict.fromkeys(names))


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    return OptimizerConfig(**{field.name: config[field.name] for field in dataclasses.fields(OptimizerConfig)})


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values."""
    return {key: list(value) if isinstance(value, tuple) else _named(key, value) for key, value in config.items()}


def _named(key: str, value: Any) -> Any:
    """A value by its present name."""
    return sink_name(value) if key == "attention_sink" else value


def without_removed(values: dict[str, Any]) -> dict[str, Any]:
    """A saved config without the keys of earlier builds that did nothing at the value that they have."""
    return {key: value for key, value in values.items() if (key, value) not in REMOVED}


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """The config that `to_dict` wrote; keys that it lacks take their defaults. Raises UserError as `check` does."""
    config = default.get_config()
    for key, value in without_removed(values).items():
        if key in dict(REMOVED):
            raise UserError(f"config.{key}: {value!r} was taken out of the program; take the build that wrote the run")
        if key not in config:
            raise UserError(f"config.{key}: unknown key in the run's config.json")
        try:
            config[key] = tuple(value) if isinstance(value, list) else _named(key, value)
        except TypeError as error:
            raise UserError(f"config.{key}: {one_line(error)}") from error
    check(config)
    return config


def check_resume(old: ConfigDict, new: ConfigDict, workdir: Path, rebatch: bool = False) -> None:
    """Raises UserError if a run made with `old` may not go on with `new`; with `rebatch` keys of REBATCH may differ."""
    for key in sorted(set(new) - FREE_ON_RESUME - (REBATCH if rebatch else set())):
        if _named(key, old[key]) != _named(key, new[key]):
            raise UserError(
                f"config.{key}: the run in {workdir} has {old[key]!r}, this config {new[key]!r}; use "
                f"{'--rebatch to go on with that, ' if key in REBATCH else ''}another --workdir, --fresh (moves the "
                f"old run aside), or --config.init_from={workdir} in another --workdir"
            )
    if old.init_from and new.init_from and Path(old.init_from).exists():  # where it is gone, it may have been moved
        same = Path(old.init_from).resolve() == Path(new.init_from).resolve()
        if not same or old.init_weights != new.init_weights:
            key = "init_weights" if same else "init_from"
            raise UserError(
                f"config.{key}: the run in {workdir} began with {old[key]!r}, this config has {new[key]!r}; put "
                "that back, or leave init_from out, or use another --workdir, or --fresh (moves the old run aside)"
            )
    if new.schedule not in ("cosine", "linear"):
        return
    if differs := [key for key in ("max_steps", "epochs", "max_flops") if old[key] != new[key]]:
        raise UserError(
            f"config.{differs[0]}: schedule {new.schedule!r} was laid out for {old[differs[0]]}, so it cannot "
            f"become {new[differs[0]]} now; a constant one could, or start a new run with "
            f"--config.init_from={workdir}"
        )
    sequences = lambda config: config.batch_size * config.accumulation_steps
    if (new.epochs or new.max_flops) and sequences(old) != sequences(new):
        raise UserError(
            f"config.batch_size: schedule {new.schedule!r} was laid out in steps of {sequences(old)} sequences, "
            f"which would become {sequences(new)}; keep batch_size * accumulation_steps, or start a new run with "
            f"--config.init_from={workdir}"
        )


# --- The documentation of each key: its section and its comment, read from configs/default.py ---------------------


class KeyDoc(NamedTuple):
    """One key as configs/default.py has it."""

    section: str
    key: str
    default: Any
    comment: str


@cache
def key_docs() -> dict[str, KeyDoc]:
    """Every key's documentation, in the order of configs/default.py. A comment may go on in the lines below its key."""
    defaults = default.get_config()
    found: dict[str, KeyDoc] = {}
    section = key = ""
    for line in Path(default.__file__).read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r" +# --- (.+?) -+", line):
            section = heading[1]
        elif assigned := re.fullmatch(r" +config\.(\w+) = .+?  # (.+)", line):
            key, text = assigned.groups()
            found[key] = KeyDoc(section, key, defaults[key], text)
        elif more := re.fullmatch(r" +# (.+)", line):
            found[key] = found[key]._replace(comment=f"{found[key].comment}; {more[1]}")
    return found


def written(value: Any) -> str:
    """A value as one writes it after `--config.KEY=`; text is quoted if it would not be visible as it is."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    if isinstance(value, str) and (not value or not value.isprintable() or value != value.strip()):
        return repr(value)
    return str(value)
