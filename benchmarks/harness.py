"""What every benchmark shares: the trainer's step, the machine described, timing in turns, tables with their JSON."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import config_lib
import run_lib
from runtime import devices, programs
from runtime.devices import environment
from runtime.malloc import SETTING
from training.dispatch import throttled
from transformer.sharding import batch_sharded, make_mesh
from transformer.xla import random_key

ENVIRONMENT = dict(os.environ)  # the user's, before this process has set up devices of its own
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "torch", "transformers")


def machine() -> dict[str, Any]:
    """What the figures hold for: processor, devices, versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "versions": versions,
        "setting": f"{SETTING}={os.environ.get(SETTING, '')}",  # whether memory comes in large pages, for all compared
        "commit": environment()["git_commit"],
        "load": os.getloadavg()[0],  # of the last minute: others' work shows here
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def wake_devices(config: ConfigDict) -> None:
    """The devices and the compile cache, as the trainer sets them up for this config."""
    devices.set_up_cpu_devices(config.cpu_devices, config.batch_size, partial(print, file=sys.stderr))
    programs.set_up_compile_cache(print)
    devices.start_jax()


def flags_of(
    parser: argparse.ArgumentParser, config: ConfigDict, argv: Sequence[str] | None, rounds: int
) -> tuple[argparse.Namespace, ConfigDict]:
    """The flags, those that all benchmarks have among them, and `config` as --config.KEY=VALUE changes it.

    `flags.changes` holds the changed keys.

    Raises:
      SystemExit: an unknown flag or key, or a value of another type.
    """
    parser.add_argument("--rounds", type=int, default=rounds, help="of the things compared, which take turns")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    flags, rest = parser.parse_known_args(argv)
    flags.changes = {}
    for word in rest:
        name, _, text = word.partition("=")
        key = name.removeprefix("--config.")
        if key == name or key not in config:
            parser.error(f"{word}: unknown; any key of the config can be changed with --config.KEY=VALUE")
        try:
            flags.changes[key] = _parse(text, config[key])
        except ValueError:
            parser.error(f"{word}: expected {type(config[key]).__name__}")
    return flags, override(config, flags.changes)


def _parse(text: str, default: Any) -> Any:
    """The value that a flag gives, of the default's type; a tuple as 0.9,0.95.

    Raises:
      ValueError: it is of another type.
    """
    if isinstance(default, str):
        return text
    if isinstance(default, tuple):
        return tuple(map(float, text.strip("()[]").split(",")))
    value = json.loads(text.lower())
    value = float(value) if isinstance(default, float) and type(value) is int else value
    if type(value) is not type(default):
        raise ValueError(text)
    return value


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with some keys changed."""
    changed = config.copy_and_resolve_references()
    changed.update(changes)
    return changed


def about(config: ConfigDict) -> str:
    """A model and its batch in a table's cell."""
    return f"{config.num_blocks} x {config.embedding_dim}, context {config.context_len}, batch {config.batch_size}"


class TrainerStep:
    """The trainer's step for a config, with its state and devices, without the files and the console around it."""

    def __init__(self, config: ConfigDict, vocab_size: int) -> None:
        self.mesh, key = make_mesh(config.mesh, devices=jax.devices()), random_key(config.seed)
        self.config, self.model_config = config, config_lib.model_config_of(config, vocab_size)
        settings = config_lib.optimizer_config(config)
        step = run_lib.step_to_compile(config, settings, self.model_config, self.mesh, key)
        self._init = partial(step.init, key)
        self.reset()
        self.train_step, self._run = step.run, throttled(step.run)

    def reset(self) -> None:
        """Back to the state before the first step."""
        self.state = self._init()

    def memory(self, batch_BT1: jax.Array) -> int:
        """Bytes that the compiled step holds on each device: arguments and temporary arrays (results replace both)."""
        held = self.train_step.lower(self.state, batch_BT1).compile().memory_analysis()
        return held.argument_size_in_bytes + held.temp_size_in_bytes

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.config.batch_size * self.config.context_len

    def place(self, batch_BT1: np.ndarray) -> jax.Array:
        return jax.device_put(batch_BT1, batch_sharded(self.mesh))

    def random_batch(self) -> jax.Array:
        """A batch [B, T + 1] on the devices."""
        shape = self.config.batch_size, self.config.context_len + 1
        return self.place(np.random.default_rng(0).integers(0, self.model_config.vocab_size, shape, np.int32))

    def __call__(self, batch_BT1: jax.Array) -> dict[str, jax.Array]:
        """One step; waited for as little as the trainer does. Gives the metrics."""
        self.state, metrics = self._run(self.state, batch_BT1)
        return metrics

    def several(self, batches: Iterable[jax.Array]) -> None:
        """A step on each batch, waited for at the end alone, as the trainer does between two rows of its log."""
        for batch_BT1 in batches:
            metrics = self(batch_BT1)
        jax.block_until_ready(metrics)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each call in each round; a call waits for its own result. They take turns: a drift meets all alike."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


class Worker:
    """One side of a comparison in a process of its own, as its users run it; it sleeps while others are measured.

    Attributes:
      ready: the line with which it says that it is ready; empty when it did not start.
    """

    ready = ""

    def __init__(self, *command: str, root: Path = ROOT) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._command = " ".join(command)
        self._process = subprocess.Popen([sys.executable, "-m", *command], cwd=root, env=ENVIRONMENT, **pipes)

    def hear(self) -> str:
        """The next line that it says; empty when it ended."""
        return self._process.stdout.readline().strip()

    def ask(self, question: object) -> str:
        """Its answer, a line too.

        Raises:
          SystemExit: it ended, or never was ready.
        """
        with contextlib.suppress(BrokenPipeError):
            print(question, file=self._process.stdin, flush=True)
        if line := self.hear():
            return line
        raise SystemExit(f"python -m {self._command} ended; what it said of that stands above")

    def end(self) -> None:
        """Close its input, on which it ends."""
        self._process.communicate()


@contextlib.contextmanager
def workers(
    commands: Mapping[str, Sequence[str]], roots: Mapping[str, Path] | None = None
) -> Iterator[dict[str, Worker]]:
    """A `Worker` for each side's command, which all end with the block; `roots` are those of other builds' sides."""
    made: dict[str, Worker] = {}
    try:
        for side, command in commands.items():  # one after the other: compiling takes all cores
            made[side] = Worker(*command, root=(roots or {}).get(side, ROOT))
            made[side].ready = made[side].hear()
        yield made
    finally:
        for worker in made.values():
            worker.end()


@contextlib.contextmanager
def build_of(revision: str) -> Iterator[Path]:
    """The source as it stood at a revision, for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        place, git = f"{folder}/build", partial(subprocess.run, cwd=ROOT, check=True)
        git(["git", "worktree", "add", "--quiet", "--detach", place, revision])
        try:
            yield Path(place)
        finally:
            git(["git", "worktree", "remove", "--force", place])


def answer(ready: object, reply: Callable[[str], object]) -> None:
    """What the process of a `Worker` does when it is ready: `reply` to each line, until there are no more."""
    print(ready, flush=True)
    for line in sys.stdin:
        print(reply(line.strip()), flush=True)


def seconds_of_one(call: Callable[[int], Any], block: float, least: int = 1) -> float:
    """Seconds that one takes, from a `call(n)` that does n of them, where n fills about `block` seconds.

    One before, which is not counted, wakes threads, brings memory back and shows how long one takes.
    """

    def one_of(count: int) -> float:
        start = time.perf_counter()
        call(count)
        return (time.perf_counter() - start) / count

    return one_of(max(least, round(block / one_of(1))))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the quartiles around it."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "low": low, "high": high, "count": len(values)}


_square = jax.jit(lambda x: x @ x)


def matrix_rate(size: int = 1024, dtype: str = "float32", rounds: int = 15) -> float:
    """FLOP/s of a `size`³ product on all devices: what the machine gives a program that does nothing else."""
    x = jnp.ones((jax.device_count(), size, size), dtype) * 1e-3
    x = jax.device_put(x, jax.sharding.NamedSharding(jax.make_mesh((jax.device_count(),), ("x",)), jax.P("x")))
    product = {"product": lambda: _square(x).block_until_ready()}
    return 2 * size**3 * jax.device_count() / statistics.median(interleaved(product, rounds, warmup=2)["product"])


def report(name: str, title: str, rows: Sequence[Mapping[str, Any]], note: str = "", out: Path = RESULTS) -> None:
    """Print the rows as a Markdown table, and keep them with the machine's description in `out`/<name>.json."""
    result = {"title": title, "machine": machine(), "rows": list(rows), "note": note}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print("\n" + markdown(result))


def markdown(result: Mapping[str, Any]) -> str:
    """A result as a heading, the machine and a table; `result` is what `report` keeps."""
    machine, rows = result["machine"], result["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    details = "; ".join(filter(None, (versions, machine.get("setting"), machine["time"][:10])))
    lines = [
        f"**{result['title']}**",
        f"{machine['processor']}, {machine['cores']} cores, {machine['device']}; {details}.",
        "\n".join(
            "| " + " | ".join(cells) + " |" for cells in (list(rows[0]), ["---"] * len(rows[0]), *map(_cells, rows))
        ),
        result["note"],
    ]
    return "\n\n".join(filter(None, lines))


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [_cell(value) for value in row.values()]


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
