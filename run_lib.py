"""Reads a run's directory: its config, its tokenizer, its data, its model. It writes nothing."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import config_lib
from configs import default
from corpus.chat import chat_tokens
from corpus.dataset import Dataset, Wanted
from corpus.tokenizer import Tokenizer, is_called, tokenizer_from_dict
from input_pipeline import load_dataset
from runtime import devices
from runtime.checkpoints.manager import SESSION, Checkpoints, DamagedError, Placement
from runtime.errors import NoCheckpointError, UserError, one_line
from runtime.files import MetricsFile, data_folder, read_json, read_text
from runtime.trackers.wandb import ID_FILE as WANDB_ID_FILE
from runtime.workdir import CHECKPOINTS, UNSAVED
from training.health import first_not_finite
from training.micro_batch import largest_part
from training.optimizer import OptimizerConfig
from training.precision import Choice, best_here
from training.step import Step, TrainState, make_step
from transformer.config import CHOICES as MODEL_CHOICES
from transformer.config import TransformerConfig
from transformer.model import Params, Transformer, model_of, shapes_of
from transformer.sampling import Prompt
from transformer.sharding import DATA, FSDP
from transformer.xla import target

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.txt"
SINKS_FILE = "sinks.jsonl"
REPORT_FILE = "report.html"
CURVES_FILE = "loss.png"
GROWING_FILES = METRICS_FILE, SAMPLES_FILE, SINKS_FILE  # on resume they are cut back to their size at the checkpoint
FILES = *GROWING_FILES, CONFIG_FILE, TOKENIZER_FILE, REPORT_FILE, CURVES_FILE, WANDB_ID_FILE  # that a run writes

EXPORT_FORMAT = "transformer-jax 1"  # of a safetensors file with our names
IMPORTED_FROM = "imported_from"  # a key of a checkpoint's meta that holds only weights

_SAMPLE = re.compile(r"^--- step ([0-9]{1,18}) ---\n", re.MULTILINE)


@dataclasses.dataclass
class Run:
    """A trained model and how it got there."""

    model: Transformer
    tokenizer: Tokenizer
    history: list[dict[str, Any]]  # the rows of metrics.jsonl
    workdir: Path
    step: int  # real steps made
    val_loss: float | None  # of the last evaluation, nats per token
    best_val_loss: float | None  # the lowest; of the averaged weights, where the run keeps them
    best_step: int | None
    best_tokens: int = 0  # the best loss was computed on so many first tokens of the validation split; 0: all


def read_samples(workdir: Path) -> list[tuple[int, str]]:
    """The samples of a run as (step, text)."""
    path = workdir / SAMPLES_FILE
    if not path.exists():
        return []
    parts = _SAMPLE.split(read_text(path))[1:]
    return [(int(step), text.removesuffix("\n\n")) for step, text in zip(parts[::2], parts[1::2], strict=True)]


def read_metrics(workdir: Path, warn: Callable[[str], None]) -> list[dict[str, float | None]]:
    """The logged steps, each once and in order; values that are not numbers are None. `warn` is told of damaged rows.

    A row also has `training_seconds`: the time since the run began, without compilation. Raises UserError if the file
    cannot be read.
    """
    rows = {}
    for row in MetricsFile(workdir / METRICS_FILE).read(warn):
        row = {key: value if type(value) in (int, float) else None for key, value in row.items()}
        if None not in (row.get("step"), row.get("tokens"), row.get("elapsed_seconds")):
            row["training_seconds"] = row["elapsed_seconds"] - (row.get("compile_seconds") or 0)
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run. Raises UserError if it is missing or damaged."""
    return _checked(workdir, read_config_file(workdir)["config"])


def known_settings(workdir: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Every key of a saved config in JSON's types, checked (UserError); keys that are unknown here stay as they are."""
    known = default.get_config()
    saved = config_lib.without_removed(saved)
    checked = _checked(workdir, {key: value for key, value in saved.items() if key in known})
    return saved | config_lib.to_dict(checked)


def _checked(workdir: Path, saved: dict[str, Any]) -> ConfigDict:
    try:
        return config_lib.from_dict(saved)
    except UserError as error:
        raise UserError(f"{workdir / CONFIG_FILE}: {error}") from error


def read_config_file(workdir: Path) -> dict[str, Any]:
    """`config.json`: the config as JSON values under "config", and the environment. UserError if missing or damaged."""
    saved = read_json(workdir / CONFIG_FILE)
    if not isinstance(saved.get("config"), dict):
        raise UserError(f"{workdir / CONFIG_FILE}: holds no config; is {workdir} a run's directory?")
    return saved


def load_data(
    config: ConfigDict, say: Callable[[str], None], vocabulary: Tokenizer | None = None, whole: bool = False
) -> Dataset:
    """The data set that a config names; `vocabulary` is the run's own tokenizer if there is one.

    With `whole`, each split is the whole data set. Raises UserError if the text cannot be used, or if the config names
    another tokenizer than the run's.
    """
    if vocabulary and not is_called(vocabulary, config.tokenizer):
        raise UserError(
            f"config.tokenizer: the weights were trained with {vocabulary.name!r}, this config has "
            f"{config.tokenizer!r}; a model cannot change its tokenizer"
        )
    own = {"data_dir": data_folder(config.data_dir), "whole": whole, "vocabulary": vocabulary, "say": say}
    return load_dataset(Wanted.of(config, **own))


def require_same_text(sha256: str | None, data: Dataset, or_else: str) -> None:
    """Raises UserError, which ends in `or_else`, unless the text has the run's hash; imported weights have None."""
    if sha256 not in (None, data.sha256):
        raise UserError(
            f"config.dataset: the text has changed since this run began (sha256 {sha256[:12]}… then, "
            f"{data.sha256[:12]}… now); put the old text back, or {or_else}"
        )


def require_documents(config: ConfigDict, data: Dataset, warn: Callable[[str], None] | None) -> None:
    """Raises UserError if documents are to be masked and the training text has no end-of-text token.

    If a resumed run gives `warn`, it gets the line instead.
    """
    if not config.mask_documents or data.train.holds(data.tokenizer.eot):
        return
    problem = (
        f"config.mask_documents: {config.dataset} has no end-of-text token to train on, so nothing is masked; set it "
        "to False, or name a directory of the files, or make shards of them with `main.py prepare`; both put one "
        "before each"
    )
    if warn is None:
        raise UserError(problem)
    warn(problem)


def load_tokenizer(workdir: Path) -> Tokenizer:
    """The tokenizer in a run's directory. Raises UserError if it is missing or damaged."""
    try:
        return tokenizer_from_dict(read_json(workdir / TOKENIZER_FILE))
    except ValueError as error:
        raise UserError(f"{workdir / TOKENIZER_FILE}: {one_line(error)}; take it from a copy of the run") from error


def model_config_for(config: ConfigDict, tokenizer: Tokenizer, auto: str = "") -> TransformerConfig:
    """`config_lib.model_config_of` with what it needs of the tokenizer."""
    return config_lib.model_config_of(config, tokenizer.vocab_size, tokenizer.eot, auto, tokenizer.answer)


def prompt_of(config: ConfigDict, tokenizer: Tokenizer, text: str) -> Prompt:
    """What generation goes on from: the text itself, or in a run on conversations what a user says with it."""
    return chat_tokens(tokenizer, [{"role": "user", "content": text.rstrip("\n")}]) if config.chat else text


def identity(config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    """What every checkpoint says about its run."""
    return {"config": config_lib.to_dict(config), "tokenizer": tokenizer.fingerprint}


def micro_step_of(meta: dict[str, Any]) -> int:
    """The micro-steps of a checkpoint, in micro-batches of its own config.

    It differs from the checkpoint's number in a run whose batches were changed. Older builds stored only the number.
    """
    return meta.get("micro_step", meta["step"])


def real_step_of(meta: dict[str, Any]) -> int:
    """The optimizer steps of a checkpoint, by its own accumulation."""
    return micro_step_of(meta) // meta["config"].get("accumulation_steps", 1)


_ODD_META = "this program did not write it so; put a copy of the run back, or start again from step 0 with --fresh"


def config_of(meta: dict[str, Any], workdir: Path) -> ConfigDict:
    """The config with which a checkpoint was made. Raises NoCheckpointError if it has none, or a wrong one."""
    try:
        return config_lib.from_dict(meta["config"])
    except (KeyError, AttributeError, UserError) as error:
        raise NoCheckpointError(f"{workdir}: a checkpoint's config: {one_line(error)}; {_ODD_META}") from error


def dtype_of(config: ConfigDict, meta: dict[str, Any] | None) -> Choice:
    """The arithmetic of a run: its config's, where that is "auto" the one that it began with, else the best one here.

    Older builds, which kept no dtype in a checkpoint's `meta`, took float32 on a CPU. Raises NoCheckpointError if it
    names none that there is.
    """
    if config.dtype != "auto":
        return Choice(config.dtype)
    platform = target().platform
    if meta is None or IMPORTED_FROM in meta:
        return best_here(platform)
    kept = meta.get("arithmetic", {}).get("dtype", "float32" if platform == "cpu" else "bfloat16")
    if kept not in MODEL_CHOICES["dtype"]:
        raise NoCheckpointError(f"a checkpoint's dtype: {kept!r}; {_ODD_META}")
    return Choice(kept, "auto: as the run began")


def batch_to_share(config: ConfigDict, workdir: Path) -> int:
    """The sequences that CPU devices share: of a run of micro_batch="auto" that has begun, its micro-batch."""
    if config.micro_batch != "auto" or not (workdir / CONFIG_FILE).exists():
        return config.batch_size
    return math.gcd(config.batch_size, known_settings(workdir, read_config_file(workdir)["config"])["batch_size"])


def step_to_compile(
    config: ConfigDict, settings: OptimizerConfig, model: TransformerConfig, mesh: Mesh, key: jax.Array
) -> Step:
    """A step of the config with `settings`, for which no data set has to say how many steps there are."""
    return make_step(settings, model, config.max_steps or 1000, key, mesh, config.spike_sigmas, config.skip_spikes)


def in_largest_parts(
    config: ConfigDict, model: TransformerConfig, mesh: Mesh, key: jax.Array, memory: float | None = None
) -> ConfigDict:
    """The config in the largest micro-batches that fit the devices, or by the rule alone others of `memory` bytes."""
    build = lambda settings: step_to_compile(config, settings, model, mesh, key)
    settings, there = config_lib.optimizer_config(config), memory or devices.memory_available()
    found = largest_part(settings, model, config.batch_size, build, mesh, there, memory is None)
    return config_lib.in_parts(config, found)


def in_parts_as_began(config: ConfigDict, meta: dict[str, Any], workdir: Path) -> ConfigDict:
    """A config of micro_batch="auto" with a checkpoint's micro-batches, or parts of them if they divide no batch_size.

    Raises UserError if there are now more devices than these can be divided among.
    """
    if config.micro_batch and IMPORTED_FROM not in meta:
        config = config_lib.in_parts(config, math.gcd(config.batch_size, config_of(meta, workdir).batch_size))
        config_lib.check_devices(config, len(devices.start_jax()))
    return config


def require_same_model(workdir: Path, config: ConfigDict, tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    """Raises UserError if config.json or tokenizer.json no longer fits the checkpoint; shapes alone do not show it."""
    saved = config_of(meta, workdir)
    for name in sorted(config_lib.SHAPE_KEYS):
        if saved[name] != config[name]:
            raise UserError(
                f"{workdir / CONFIG_FILE}: {name} is {config[name]!r}, and the checkpoint was made with "
                f"{saved[name]!r}; put that back"
            )
    if meta.get("tokenizer") != tokenizer.fingerprint:
        raise UserError(
            f"{workdir / TOKENIZER_FILE}: is not the one that the checkpoint was made with; take it from a copy of the "
            "run"
        )


def load_weights(
    workdir: Path,
    place: Placement,
    warn: Callable[[str], None],
    weights: str,
    step: int | None = None,
    wanted: TransformerConfig | None = None,
) -> tuple[Params, TransformerConfig, Tokenizer, ConfigDict, dict[str, Any]]:
    """A run's weights, laid out as `place` says, and what they belong to: shape, tokenizer, config, checkpoint's meta.

    Which weights, and what is raised, `load_model` says; UserError too if the shape is not that of `wanted`.
    """
    config, tokenizer = read_config(workdir), load_tokenizer(workdir)
    model_config = model_config_for(config, tokenizer)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        with contextlib.suppress(NoCheckpointError):  # damaged, or just deleted: that is reported later
            arrays = checkpoints.meta(checkpoints.best() if step is None else step)["arrays"]["params"]
            if config.num_blocks > len(arrays):  # of a damaged file perhaps millions, whose shapes would take for ever
                raise UserError(
                    f"{workdir / CONFIG_FILE}: num_blocks is {config.num_blocks}, and the checkpoint has "
                    f"{len(arrays)} arrays; put the number back with which it was made"
                )
        shapes = shapes_of(model_config)
        if wanted and shapes_of(wanted) != shapes:
            names = [f.name for f in dataclasses.fields(wanted) if f.name not in config_lib.EXECUTION_KEYS]
            name = next(n for n in names if getattr(model_config, n) != getattr(wanted, n))
            raise UserError(
                f"config.{name}: {workdir} has {getattr(model_config, name)!r}, this config {getattr(wanted, name)!r}; "
                "init_from needs a model of the same shape"
            )
        if step is None:
            _, params, meta = checkpoints.restore_best_params(shapes, place, warn, weights)
        else:
            try:
                params, meta = checkpoints.restore_params(step, shapes, place, weights), checkpoints.meta(step)
            except DamagedError as error:
                raise NoCheckpointError(
                    f"{checkpoints.directory}/{step}: damaged: {error}; leave --step out to take the best sound one"
                ) from error
        require_same_model(workdir, config, tokenizer, meta)
    return params, model_config, tokenizer, config, meta


def load_model(
    workdir: Path, step: int | None = None, warn: Callable[[str], None] = lambda text: None, weights: str = "auto"
) -> tuple[Transformer, Tokenizer, ConfigDict, dict[str, Any]]:
    """A run's model on one device, its tokenizer, its config, and its checkpoint's meta; takes no lock.

    The checkpoint is number `step`, or the best sound one; `weights` is one of WEIGHTS. Raises UserError or
    NoCheckpointError if there is no such run or checkpoint, or if the one asked for is damaged.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such directory; train first, or name the directory of a run")
    place = jax.sharding.SingleDeviceSharding(devices.start_jax()[0])
    params, model_config, tokenizer, config, meta = load_weights(workdir, place, warn, weights, step)
    check_finite(params, workdir)
    how = {"dtype": dtype_of(config, meta).dtype, "attention_kernel": "auto"}  # its own may need another device
    return model_of(dataclasses.replace(model_config, **how), params), tokenizer, config, meta


def check_finite(params: Params, workdir: Path) -> None:
    """Raises NoCheckpointError if a weight is NaN or infinite."""
    if name := first_not_finite(params):
        raise NoCheckpointError(f"{workdir}: the checkpoint's {name} is not finite; move it aside, and run again")


# --- Going on ---------------------------------------------------------------------------------------------------------


def require_no_others_files(workdir: Path) -> None:
    """Raises UserError if a run would overwrite another program's files, such as those of an exported model.

    A run that has begun has a checkpoint, or the mark that there is none yet, or has logged steps.
    """
    names = [path.name for path in (workdir / CHECKPOINTS).glob("*")]
    if any(name == UNSAVED or name[0].isdecimal() for name in names) or MetricsFile(workdir / METRICS_FILE).read():
        return
    if taken := next((name for name in FILES if (workdir / name).exists()), None):
        raise UserError(
            f"workdir {workdir}: holds {taken} and no checkpoint, so it is no run that could go on; use another "
            "--workdir, or --fresh, which moves aside what is there"
        )


def require_nothing_lost(metrics: MetricsFile, checkpoints: Checkpoints) -> None:
    """Begins a run. Raises NoCheckpointError if steps are logged whose checkpoints are gone (an unmounted disk?)."""
    if (rows := metrics.read()) and not checkpoints.never_saved():
        raise NoCheckpointError(
            f"{checkpoints.directory}: {rows[-1].get('step')} steps are logged and no checkpoint is there; bring the "
            "directory back (is its disk mounted?), or start again from step 0 with --fresh, which moves the rest aside"
        )
    checkpoints.begin()


@dataclasses.dataclass(frozen=True)
class Resumed:
    """The point from which a run goes on: its state, and its checkpoint's meta."""

    step: Step
    state: TrainState
    micro_step: int  # in micro-batches of the new config
    ahead: int  # the checkpoint's number minus micro_step; not 0 if the batches were changed: numbers always grow
    meta: dict[str, Any]


def arithmetic_of(model_config: TransformerConfig, mesh: Mesh) -> dict[str, Any]:
    """What the bits of a run depend on besides its config and data; each checkpoint stores it.

    `dtype` is the resolved one. Dropout depends on the devices, because each part of the batch has its own random keys.
    """
    parts = mesh.shape[DATA] * mesh.shape[FSDP]
    dropped = f"by {parts} of {mesh.size} devices" if mesh.size > 1 else "by one device"
    own = {"dtype": model_config.dtype, **({"dropout": dropped} if model_config.dropout else {})}
    return devices.arithmetic() | own


def other_arithmetic(meta: dict[str, Any], now: dict[str, Any]) -> str:
    """How `now` differs from a checkpoint's arithmetic: "jax 0.10.2, now 0.12.0; ..."; "" if not, or not stored."""
    before = meta.get("arithmetic", {})
    changed = [name for name, value in now.items() if before.get(name, value) != value]
    said = lambda value: "unset" if value in (None, "") else value
    return "; ".join(f"{name} {said(before[name])}, now {said(now[name])}" for name in changed)


def require_same_run(meta: dict[str, Any], config: ConfigDict, workdir: Path, rebatch: bool) -> None:
    """Raises UserError, which says why, if a config cannot go on from a checkpoint."""
    if IMPORTED_FROM in meta:
        raise UserError(
            f"workdir {workdir}: holds imported weights and no optimizer's state; train from them in another --workdir "
            f"with --config=configs/finetune.py:{workdir}"
        )
    old = config_of(meta, workdir)
    k = old.accumulation_steps
    config_lib.check_resume(old, config, workdir, rebatch)
    if k != config.accumulation_steps and (under_way := micro_step_of(meta) % k):
        raise UserError(
            f"config.accumulation_steps: the run in {workdir} stopped after {under_way} of the {k} micro-batches of a "
            f"step; finish that first, with accumulation_steps={k} and max_steps={real_step_of(meta) + 1}"
        )


def regroup(state: TrainState, old: int, new: int) -> TrainState:
    """Converts the state of a run, between two real steps, from accumulation over `old` micro-batches to `new`.

    With more than one, optax's MultiSteps wraps the inner optimizer's state. The number of real steps stays the same.
    """
    opt_state = state.opt_state if old == 1 else state.opt_state.inner_opt_state
    if new > 1:
        opt_state = optax.MultiSteps(optax.identity(), new).init(state.params)._replace(inner_opt_state=opt_state)
    return state._replace(opt_state=opt_state, micro_step=state.micro_step // old * new)


def resume(
    checkpoints: Checkpoints,
    build: Callable[[int, dict[str, Any]], Step],
    allow: Callable[[int], None],
    config: ConfigDict,
    workdir: Path,
    data: Dataset,
    sharding: Callable[[Any], Any],
    warn: Callable[[str], None],
) -> Resumed | None:
    """The newest sound checkpoint, converted for `config`; None if there is none. Damaged ones are set aside.

    `build` makes the step from the number of micro-batches of `config` done so far, and from a checkpoint's meta.
    `allow` raises if `config` cannot go on (`require_same_run`). Raises UserError if this config, text or tokenizer
    cannot, NoCheckpointError if all are damaged.
    """
    new = config.accumulation_steps
    made: dict[int, tuple[Step, int, int]] = {}  # by checkpoint: the step, micro-steps so far, its own accumulation

    def state_of(step: int, meta: dict[str, Any]) -> tuple[Params, Any]:
        allow(step)
        if missing := [key for key in SESSION if key not in meta]:
            raise NoCheckpointError(f"{workdir}: a checkpoint says no {missing[0]}; {_ODD_META}")
        require_same_text(meta["data_sha256"], data, "use another --workdir or --fresh")
        require_same_model(workdir, config, data.tokenizer, meta)
        old = config_of(meta, workdir).accumulation_steps
        micro_step = micro_step_of(meta) if old == new else real_step_of(meta) * new
        made[step] = build(micro_step, meta), micro_step, old
        state = made[step][0].state
        abstract = state if old == new else jax.eval_shape(partial(regroup, old=new, new=old), state)
        return abstract.params, abstract[1:]

    if (found := checkpoints.restore_newest(state_of, sharding, warn)) is None:
        return None
    number, meta, params, rest = found
    state, (step, micro_step, old) = TrainState(params, *rest), made[number]
    if old != new:
        convert = partial(regroup, old=old, new=new)
        state = jax.jit(convert, out_shardings=sharding(jax.eval_shape(convert, state)))(state)
    return Resumed(step, state, micro_step, max(checkpoints.steps()) - micro_step, meta)
