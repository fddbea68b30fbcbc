"""What several test files share."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import engines
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from xla_flags import SOONER

from runtime import devices
from serving.engine import Engine
from transformer.config import TransformerConfig
from transformer.model import Params, Transformer, init_params, model_of

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Programs are compiled in half the time, here and in the processes that tests start; they run a little longer.
os.environ.setdefault("XLA_FLAGS", SOONER)

if (
    "TESTS_CACHE" not in os.environ
):  # one cache of compiled programs for pytest's workers and the processes of the tests
    os.environ["TESTS_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tests-compiled-")
    atexit.register(shutil.rmtree, os.environ["TESTS_CACHE"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["TESTS_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# How long an example takes, to make or to run, is up to the machine and what else it does.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def no_bfloat16_unit() -> Iterator[None]:
    """Tests compare bits and measure nothing: in this process dtype="auto" is float32, whatever the processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "processor", lambda: "")
        yield


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Params]:
    """(config, seed) -> parameters that are nowhere zero or equal, so that a part left out or mixed up shows.

    Drawn with numpy: compiling the real initialiser takes seconds.
    """

    def make(config: TransformerConfig, seed: int = 0) -> Params:
        rng = np.random.default_rng(seed)
        params = {}
        for name, leaf in jax.eval_shape(partial(init_params, config), jax.random.key(0)).items():
            noise = rng.normal(size=leaf.shape)
            if name.endswith("scale"):
                value = 1 + 0.1 * noise
            elif name.endswith("kernel"):
                value = noise / np.sqrt(leaf.shape[0])
            elif name.endswith("bias"):
                value = 0.1 * noise  # larger ones would drown what depends on the input
            else:
                value = noise
            params[name] = jax.numpy.asarray(value, leaf.dtype)
        return params

    return make


@pytest.fixture(scope="module")
def model(random_params: Callable[..., Params]) -> Transformer:
    """The small model of the tests of `serving`."""
    return model_of(engines.CONFIG, random_params(engines.CONFIG))


@pytest.fixture(scope="module")
def engine(model: Transformer) -> Iterator[Engine]:
    """Its decode loop, which runs."""
    with engines.small_engine(model) as engine:
        yield engine
