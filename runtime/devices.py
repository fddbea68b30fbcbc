"""Devices: how many the CPU shows, memory limits, and what else a result depends on."""

import contextlib
import math
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from runtime.errors import StorageError, UserError, one_line
from runtime.files import INSTALLED, PROGRAM, read_object, write_json
from runtime.processes import num_processes

_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"  # for a device's matrix products: each core is a device
MEASURED = "measured.json"  # in the folder of compiled programs: what was measured of this processor


def physical_cores() -> int:
    """Cores that this process may use; two hardware threads of one core count as one."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else cpu)
    return len(cores)


def set_up_cpu_devices(cpu_devices: str, batch_size: int, warn: Callable[[str], None]) -> None:
    """Let JAX show `cpu_devices` CPU devices ("auto": the largest number of cores that divides `batch_size`).

    XLA runs a batched matrix product on one core; with one device for each core, each core gets its share of the batch.
    It has to be called before JAX's backend is first used. A user's own setting, in XLA_FLAGS or JAX_NUM_CPU_DEVICES,
    takes precedence. GPUs and TPUs are not affected.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in flags:
        return
    if cpu_devices == "auto":  # each of several processes has its share of the batch
        count = max(n for n in range(1, physical_cores() + 1) if n == 1 or batch_size % (n * num_processes()) == 0)
    else:
        count = int(cpu_devices)
    if not _show_cpu_devices(count):
        if jax.default_backend() == "cpu" and jax.device_count() != count:
            warn(f"JAX is already running with {jax.device_count()} CPU device(s), not {count}; using what is there")
    elif count > 1 and _ONE_THREAD not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_ONE_THREAD}".strip()


def simulate_cpu_devices(count: int) -> None:
    """Let JAX show `count` CPU devices and no others, 0 for whatever number: to compile, not to run.

    Raises UserError if JAX is already running with other devices.
    """
    if _show_cpu_devices(count or 1):
        jax.config.update("jax_platforms", "cpu")
    if count and (jax.default_backend() != "cpu" or jax.device_count() != count):
        raise UserError(
            f"--devices: JAX is already running with {jax.device_count()}, not {count}; start a new process"
        )


def _show_cpu_devices(count: int) -> bool:
    """Lets JAX show so many CPU devices; False if it is running already, with others."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return False
    return True


@cache
def processor() -> str:
    """Its name and what it can, as Linux tells; "" elsewhere."""
    with contextlib.suppress(OSError):
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        return "; ".join(re.findall(r"^(?:model name|flags|Features)\s*: (.*)", told, re.MULTILINE))
    return ""


def remembered(name: str, measure: Callable[[], float]) -> float:
    """What `measure` once gave on this processor, with this jax and so many devices: kept beside compiled programs.

    Where that folder or the file is of no use, it measures again.
    """
    path = Path(jax.config.jax_compilation_cache_dir or os.devnull) / MEASURED
    key = f"{name}, {processor()}; jax {jax.__version__}, {jax.device_count()} devices"
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = read_object(path)
    if type(value := known.get(key)) is not float or not 0 < value < math.inf:
        known[key] = value = measure()
        with contextlib.suppress(OSError, StorageError):
            write_json(path, known)
    return value


def start_jax() -> list[jax.Device]:
    """Starts JAX and returns its devices.

    Raises UserError if the platform in JAX_PLATFORMS is not there, if JAX_ENABLE_X64 is set, or if the devices are
    those of several processes that have not joined.
    """
    if jax.config.jax_enable_x64:
        raise UserError("JAX_ENABLE_X64: steps and checkpoints are made of 32-bit numbers; unset it")
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that at least one of several platforms starts
        asked, problem = os.environ.get("JAX_PLATFORMS", ""), str(error) and f"{one_line(error)}; "
        raise UserError(
            f"JAX_PLATFORMS={asked}: not here; {problem}unset it to take what is there, or set cpu"
        ) from error
    if (count := jax.process_count()) != num_processes():  # as on one host of a TPU pod
        raise UserError(
            f"--coordinator: these are the devices of {count} processes, and {num_processes()} joined; run `train` on "
            "every host, and other commands with JAX_PLATFORMS=cpu or on a machine of its own"
        )
    return found


def require_memory(model: int, batch: int) -> None:
    """Raises UserError for what cannot fit, before work begins that would take minutes or bring the machine down.

    Both are bytes that each device needs at least, for weights and optimizer, and for its part of a micro-batch.
    """
    there, of_device = _own_memory(), 1
    if not there:  # CPU devices share the machine's memory
        there, of_device = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), jax.local_device_count()
    for key, need, advice in (
        ("embedding_dim", model, "make the model narrower (embedding_dim, mlp_dim, head_dim) or lower num_blocks"),
        ("batch_size", batch, "lower it, and raise config.accumulation_steps instead"),
    ):
        if (need := of_device * need) > there:
            raise UserError(
                f"config.{key}: needs {need / 2**30:,.1f} GiB or more, {there / 2**30:,.1f} GiB are there; {advice}"
            )


def _own_memory() -> int | None:
    """Bytes that a device lets this process have; None for a CPU, whose devices share the machine's."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


_CGROUP = "/sys/fs/cgroup/memory"


def memory_available() -> int:
    """Bytes that each device here can take: its own, or of a CPU its share of what is free in the machine and cgroup.

    A machine is taken to run one process of this kind. Raises UserError if the devices do not tell and are no CPUs.
    """
    if there := _own_memory():
        return there
    if jax.default_backend() != "cpu":
        raise UserError("config.micro_batch: this device does not tell its memory; name a number instead of auto")
    told = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        most, used = (int(Path(f"{_CGROUP}.{name}").read_text()) for name in ("max", "current"))
        told.append(most - used)
        read = re.findall(r"^inactive_file (\d+)", Path(f"{_CGROUP}.stat").read_text(), re.MULTILINE)
        told[-1] += sum(map(int, read))  # files that were read give way
    with contextlib.suppress(OSError):
        told += [1024 * int(kib) for kib in re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())]
    return min(told) // jax.local_device_count()


_SIZE = re.compile(r"(\d[\d.,]*) ?(?:([KMGT])(?:i?B)?|bytes)\b")  # "35.16GiB", and "20.89G" as TPUs' compiler says


def sizes_in(message: str) -> list[int]:
    """The sizes of memory that a message names, in bytes."""
    found = ((number.rstrip(".,").replace(",", ""), unit) for number, unit in _SIZE.findall(message))
    return [int(float(number) * 2 ** (10 * " KMGT".index(unit or " "))) for number, unit in found]


_OF_A_CORE = re.compile(r"memory space (?!hbm)\w+")  # a kernel's tile is too large for it: no smaller batch helps


def lacks_memory(error: Exception) -> bool:
    """Whether a device, by its own words or its compiler's, has too little memory."""
    text = str(error)
    return isinstance(error, MemoryError) or ("RESOURCE_EXHAUSTED" in text and not _OF_A_CORE.search(text))


@contextlib.contextmanager
def memory_limit(key: str, advice: str, rescue: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turns running out of memory into a UserError about `key`, after `rescue` has saved what can be saved."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not lacks_memory(error):
            raise
        size = _SIZE.search(str(error))
        asked = f" (asked for {size[0]})" if size else ""
        rescue()
        raise UserError(f"{key}: out of memory{asked}; {advice}") from error


# --- What a result depends on -------------------------------------------------------------------------------------

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def peak_memory_bytes(device: jax.Device) -> int:
    """The most memory used so far: on the device if it keeps count, else by this process (resident size)."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def environment() -> dict[str, Any]:
    """What a result depends on besides its config: versions, devices, the source's git commit, the command line.

    Environment variables are left out, because they may hold secrets.
    """
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "git_commit": _git_commit(),
        "command": shlex.join(sys.argv),
    }


_ARITHMETIC_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_ARITHMETIC_SETTINGS = (
    *("jax_default_prng_impl", "jax_threefry_partitionable", "jax_random_seed_offset"),
    "jax_default_matmul_precision",
)
_NO_ARITHMETIC = re.compile(r"--xla_(dump|hlo_profile|force_host_platform|cpu_multi_thread_eigen|gpu_cuda_data_dir)")


def arithmetic() -> dict[str, Any]:
    """What the bits of a result depend on besides the program and its inputs, for JSON (docs/exactness.md).

    XLA_FLAGS is included except for flags that are known to change no number.
    """
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not _NO_ARITHMETIC.match(flag)]
    return {
        **{name: metadata.version(name) for name in _ARITHMETIC_PACKAGES},
        "device": jax.devices()[0].device_kind,
        **{name: getattr(jax.config, name, None) for name in _ARITHMETIC_SETTINGS},
        "XLA_FLAGS": " ".join(sorted(dict.fromkeys(flags))),
        "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", ""),
    }


def _git_commit() -> str | None:
    """The commit of the clone that holds this file, with `-dirty` if it was changed; None if there is no clone."""
    if INSTALLED:  # a repository around an installed copy is another project's
        return None
    describe = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(describe, cwd=PROGRAM, stderr=subprocess.DEVNULL, text=True, timeout=5).strip()
    return None
