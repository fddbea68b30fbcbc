"""What must be settled before JAX wakes up: how many devices the CPU shows, and where compiled programs are kept."""

import ctypes
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax

from runtime.errors import UserError, one_line


def physical_cores() -> int:
    """Cores this process may use, two hardware threads of one core counted once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else cpu)
    return len(cores)


# A step's temporary arrays are one block. glibc gives one that is larger than this back to the system after each step,
# and it comes anew as pages to be zeroed. (In arenas of threads nothing larger can stay: hence the single arena.)
LARGEST_KEPT = 64 * 2**20
FLOATS_AN_ACTIVATION = 28  # that a training step holds for each entry of the residual stream in each layer, measured


def keep_freed_memory() -> None:
    """Make glibc keep what is freed, in one arena that has no limit; other C libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        for option, value in ((-8, 1), (-4, 0), (-1, -1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(option, value)


def set_up_cpu_devices(
    cpu_devices: str, batch_size: int, warn: Callable[[str], None], activations_a_sequence: int = 0
) -> None:
    """Make `cpu_devices` of the cores devices of their own ("auto": the most that divide `batch_size`).

    XLA runs a batched matrix product on one core; with a device a core, each core has its share of the batch. To have
    an effect this comes before JAX's backend is first used. A user's own XLA_FLAGS about it are left as they are, and
    GPUs and TPUs do not care.

    Args:
      activations_a_sequence: context length x width x blocks of a model that will be trained here. If that is large
        and one device trains it, freed memory is kept (14 % off a step). Not with several devices: in one arena their
        blocks tear each other, which took three times the memory.
    """
    from jax._src import xla_bridge  # the one way to ask without waking the backend; jax.extend has none

    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags:
        return
    if cpu_devices == "auto":
        count = max(n for n in range(1, physical_cores() + 1) if batch_size % n == 0)
    else:
        count = int(cpu_devices)
    if xla_bridge.backends_are_initialized():
        if jax.default_backend() == "cpu" and jax.device_count() != count:
            warn(f"JAX is already running with {jax.device_count()} CPU device(s), not {count}; using what is there")
        return
    large = 4 * FLOATS_AN_ACTIVATION * activations_a_sequence * batch_size > LARGEST_KEPT
    if large and count == 1 and not (find_spec("jax_plugins") or find_spec("libtpu")):  # none but the CPU
        keep_freed_memory()
    one_thread_each = " --xla_cpu_multi_thread_eigen=false" if count > 1 else ""
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}{one_thread_each}".strip()


def set_up_compile_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that the next start does not compile again.

    JAX_COMPILATION_CACHE_DIR, where it is set, decides instead.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "transformer-jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def wake_up() -> list[jax.Device]:
    """The devices.

    Raises:
      UserError: the platform that JAX_PLATFORMS asks for is not there.
    """
    try:
        return jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"JAX_PLATFORMS={asked}: {one_line(error)}; unset it to take what is there") from error
