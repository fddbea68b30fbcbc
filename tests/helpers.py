"""What the tests of whole runs share: a small text, a small config, and runs that are cut short on purpose.

python tests/helpers.py SIGNAL MICRO_STEP ARGUMENT ...

runs `main.py ARGUMENT ...` and sends the process SIGNAL before it makes MICRO_STEP, so that a cut falls where a test
wants it however fast the machine is.
"""

import atexit
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

import config_lib
import input_pipeline
import main
import run_lib
import train_lib
from configs import default
from corpus.dataset import Dataset, Wanted
from corpus.load_documents import load_dataset
from runtime.checkpoints.manager import Checkpoints
from runtime.errors import Interrupted, UserError
from training.optimizer import labels_of, make_optimizer
from training.step import init_state
from transformer.model import init_params

ROOT = Path(__file__).parent.parent

SCRATCH = Path(os.environ.get("TESTS_SCRATCH") or tempfile.mkdtemp(prefix="tests-"))
if "TESTS_SCRATCH" not in os.environ:  # the processes that tests start share the text
    atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
    os.environ["TESTS_SCRATCH"] = str(SCRATCH)

TINY = {
    "num_blocks": 1,
    "num_heads": 2,
    "embedding_dim": 32,
    "mlp_dim": 48,
    "context_len": 16,
    "batch_size": 4,
    "val_fraction": 0.5,
    "epochs": 0,
    "max_steps": 30,
    "lr": 0.01,
    "newton_schulz_steps": 1,  # each more takes a second to compile
    "save_every": 5,
    "eval_every": 7,
    "log_every": 1,
    "sample_every": 12,
    "sample_tokens": 20,
    "cpu_devices": "1",
    "dtype": "float32",
    "report": False,
}


def make_text(num_sentences: int = 700, seed: int = 0) -> str:
    """Sentences without sense, always the same for a seed; about 30 characters each."""
    rng = random.Random(seed)
    who, does, what = ["A heron", "The miller", "My aunt"], ["finds", "paints", "forgets"], ["a lamp", "two eels", "it"]
    sentence = lambda: f"{rng.choice(who)} {rng.choice(does)} {rng.choice(what)} at {rng.randrange(24)}.\n"
    return "".join(sentence() for _ in range(num_sentences))


def data_of(dataset: Any, tokenizer: str, **settings: Any) -> Dataset:
    """A data set by `load_dataset`, which says nothing."""
    return load_dataset(Wanted(str(dataset), tokenizer, **{"say": lambda line: None, **settings}))


def tiny_config(**changes: Any) -> ConfigDict:
    """A model that trains in a second."""
    text = SCRATCH / "text.txt"
    if not text.exists():
        text.write_text(make_text(), encoding="utf-8")
    config = default.get_config()
    config.update({**TINY, "dataset": str(text), "data_dir": str(SCRATCH / "data"), **changes})
    return config


@cache
def finished_run() -> run_lib.Run:
    """An uninterrupted run of `tiny_config()`, made once. Nobody changes its directory."""
    return train_lib.train(tiny_config(), SCRATCH / "finished")


def arguments(config: ConfigDict, workdir: Path) -> list[str]:
    """The `train` command line that says the same as `config`."""
    base = default.get_config()
    changed = [f"--config.{key}={value}" for key, value in config.items() if value != base[key]]
    return [f"--config={ROOT / 'configs' / 'default.py'}", f"--workdir={workdir}", *changed]


def run_main(
    *argv: str, cut: tuple[signal.Signals, int] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`main.py` in a process of its own; with `cut`, a signal hits it before that micro-step."""
    script = [str(ROOT / "main.py")] if cut is None else [__file__, cut[0].name, str(cut[1])]
    command = [sys.executable, *script, *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def run_patched(patch: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`main.py` in a process of its own, with the product changed by the code `patch` beforehand."""
    command = [sys.executable, "-c", f"{patch}\nimport sys, main\nsys.exit(main.main(sys.argv[1:]))", *argv]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def signal_before(signum: signal.Signals, micro_step: int) -> Any:
    """A stand-in for `input_pipeline.prefetch` under which a signal comes before the dispatch of `micro_step`."""

    def prefetch(make: Any, spans: Any) -> Iterator[Any]:
        for span, batch in input_pipeline.prefetch(make, spans):
            if micro_step in span:
                signal.raise_signal(signum) if signum != signal.SIGKILL else os.kill(os.getpid(), signum)
            yield span, batch

    return prefetch


def train_until(micro_step: int, config: ConfigDict, workdir: Path) -> None:
    """A run that SIGTERM stops before the dispatch of that micro-step: it saves there."""
    stopped = mock.patch.object(train_lib, "prefetch", signal_before(signal.SIGTERM, micro_step))
    with stopped, pytest.raises(Interrupted):
        train_lib.train(config, workdir)


def assert_one_line(stderr: str, *words: str) -> None:
    assert stderr.count("\n") == 1 and stderr.startswith("error: "), stderr
    for word in words:
        assert word in stderr


def refusal(call: Callable, *args: Any, **settings: Any) -> str:
    """The message of the UserError that the call raises: one line, which says what is wrong and what to do."""
    with pytest.raises(UserError) as caught:
        call(*args, **settings)
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    return message


def assert_possible_or_refused(key: str, value: Any) -> None:
    """The default config with that value, set past ml_collections' own type check, as a config file can."""
    usual = default.get_config()
    config = usual.copy_and_resolve_references()
    with config.ignore_type():
        config[key] = value
    try:
        config_lib.check(config)
    except UserError as error:
        # Two keys can be impossible together, and then the message may name the other one.
        assert re.match(r"config\.\w+: [^\n]+$", str(error)) and key in str(error)
    else:
        old_name = key == "attention_sink" and isinstance(value, bool)
        assert type(config[key]) is type(usual[key]) or old_name


def rows(workdir: Path) -> list[dict[str, Any]]:
    """What the run logged."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> list[tuple[int, float, float | None]]:
    """Step, loss and validation loss of each logged step."""
    return [(row["step"], row["loss"], row.get("val_loss")) for row in rows(workdir)]


def saved_state(workdir: Path, config: ConfigDict, vocab_size: int, micro_step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by path: parameters, optimizer, counters."""
    model_config = config_lib.transformer_config(config, vocab_size, "float32")
    params = jax.eval_shape(partial(init_params, model_config), jax.random.key(0))
    settings = config_lib.optimizer_config(config)
    optimizer = make_optimizer(settings, params, config.max_steps)
    init = partial(init_state, model_config, optimizer, labels_of(params, settings))
    abstract = jax.eval_shape(init, jax.random.key(0))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        place = SingleDeviceSharding(jax.devices()[0])
        state = checkpoints.restore(micro_step, abstract.params, abstract[1:], place)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


def assert_same_state(workdir: Path, reference: run_lib.Run, config: ConfigDict, micro_step: int) -> None:
    """That checkpoint holds the bits of the reference's."""
    vocab_size = reference.tokenizer.vocab_size
    assert_same_bits(*(saved_state(path, config, vocab_size, micro_step) for path in (workdir, reference.workdir)))


if __name__ == "__main__":
    train_lib.prefetch = signal_before(signal.Signals[sys.argv[1]], int(sys.argv[2]))
    sys.exit(main.main(sys.argv[3:]))
