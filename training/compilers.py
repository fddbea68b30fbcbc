"""Compilers for devices that are not here, named as "v5e:4x4" or "H100:8", and what they say of a program."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import inspect
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from runtime import devices as runtime_devices
from runtime.devices import lacks_memory, simulate_cpu_devices, sizes_in, start_jax
from runtime.errors import Interrupted, StorageError, UserError, one_line
from runtime.files import read_object, user_cache, write_json
from training import traffic

# GiB that a compiler gives programs on a device, as it says when it refuses one: on a chip, of a tpu7x half of one.
TPUS = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
GPUS = {
    # Compute capability, multiprocessors, shared memory of one (KiB), L2 (MiB), memory (bytes), its bandwidth (byte/s),
    # clock (GHz), float32 units of a multiprocessor, name. From NVIDIA's data sheets and architecture papers.
    "A100": (8, 0, 108, 164, 40, 80e9, 2.039e12, 1.41, 64, "NVIDIA A100-SXM4-80GB"),
    "H100": (9, 0, 132, 228, 50, 80e9, 3.35e12, 1.98, 128, "NVIDIA H100 80GB HBM3"),
    "H200": (9, 0, 132, 228, 50, 141e9, 4.8e12, 1.98, 128, "NVIDIA H200"),
}
_NAME = re.compile(r"(\w+):([1-9]\d{0,3}(?:x[1-9]\d{0,3}){0,2})(?:\*([1-9]\d{0,2}))?")
_QUIET = {  # the compilers' remarks that there is no such device here, and waiting for one
    **{"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"},
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # of the host, whatever is compiled for
    **{"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"},
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
# Calls of kernels: a Pallas kernel of a TPU is named by the instruction, one of cuDNN by what is called.
_KERNEL = re.compile(r'%([\w\-]+?)(?:\.[\d.]+)?(?:\.clone)? = .*custom_call_target="(tpu_custom_call|__cudnn\$\w+)"')


def devices_of(text: str) -> tuple[list[jax.Device], float]:
    """The devices of "v5e:4x4" (a TPU's slice), "v5e:4x4*2" (two), "H100:8" or "cpu:8", and each one's memory in bytes.

    Of a GPU it is what the data sheet says, of a TPU what its compiler gives to a program, infinite for a CPU.

    It has to be called before JAX starts. Raises UserError for an unknown text, or if the compiler is not installed.
    """
    named = _NAME.fullmatch(text)
    kind, shape, slices = named.groups() if named else ("", "", None)
    sizes = [int(size) for size in shape.split("x") if size]
    if kind not in (*TPUS, *GPUS, "cpu") or (kind not in TPUS and (slices or len(sizes) > 1)):
        tpus, gpus = (", ".join(table) for table in (TPUS, GPUS))
        what = f"a TPU slice ({tpus}) as v5e:4x4, two as v5e:4x4*2, GPUs ({gpus}) as H100:8, or cpu:8"
        raise UserError(f"--compile_for: {text!r} names no devices; give {what}")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    simulate_cpu_devices(sizes[0] if kind == "cpu" else 0)
    if kind == "cpu":
        return start_jax(), math.inf
    options: dict[str, Any] = {}
    if kind in TPUS:
        libraries, memory, file = ["libtpu"], int(TPUS[kind] * 2**30), "requirements-tpu-compiler.txt"
        options["topology_name"] = f"{kind}:{shape}"
        if math.prod(sizes) <= 4:  # all on one host
            options["chips_per_host_bounds"] = [*sizes, 1][:3]
        if slices:
            options["num_slices"] = int(slices)
        if kind == "v4":
            options["chip_config_name"] = "megacore"  # a chip is one device
    else:
        libraries, memory = ["jax_cuda13_plugin", "jax_cuda12_plugin"], GPUS[kind][5]
        file = "requirements-gpu-compiler.txt"
        options |= {"topology": f"1x{sizes[0]}x1", "target_config": _target_config(kind)}
    if not any(map(importlib.util.find_spec, libraries)):
        raise UserError(f"--compile_for={text}: its compiler is not installed; pip install -r {file}")
    try:
        topology = topologies.get_topology_desc(platform="tpu" if kind in TPUS else "cuda", **options)
    except Exception as error:  # whatever the library raises
        raise UserError(f"--compile_for={text}: {one_line(error, 200)}") from error
    return list(topology.devices), memory


def _target_config(kind: str) -> str:
    """What XLA reads of a GPU, as the text of its GpuTargetConfigProto."""
    major, minor, cores, shared, cache, memory, bandwidth, clock, lanes, name = GPUS[kind]
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return (
        "gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 "
        f"shared_memory_per_block: {48 * 2**10} shared_memory_per_core: {shared * 2**10} "
        f"shared_memory_per_block_optin: {(shared - 1) * 2**10} registers_per_core_limit: {2**16} "
        f"registers_per_block_limit: {2**16} core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock} "
        f"block_dim_limit_x: {2**31 - 1} block_dim_limit_y: {2**16 - 1} block_dim_limit_z: {2**16 - 1} "
        "thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 "
        f"memory_bandwidth: {int(bandwidth)} l2_cache_size: {cache * 2**20} device_memory_size: {int(memory)} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }} "
        'dnn_version: "9.10.0" driver_version: "13.0.0" runtime_version: "12.8.0" '
        f'compile_time_toolkit_version: "12.8.0" device_vendor: "NVIDIA Corporation" name: "{name}" }} '
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"'
    )


def facts_of(traced: Any, devices: np.ndarray) -> dict[str, Any]:
    """What the compiler says of a traced program, for JSON; sizes are bytes on each device.

    Raises UserError with its own words if it cannot compile it for another reason than the devices' memory.

    refused: its own words if there is not enough memory; then only needed and available bytes are known, if it says so.
    kept: whether these are its answers of an earlier time, to the same question by the same versions of the libraries
    and of what reads the answers. They are beside the compiled programs, because JAX cannot read back a program whose
    devices are not here.
    """
    with _in_its_words(devices):
        lowered = traced.lower()
    places = [(getattr(d, "slice_index", 0), getattr(d, "coords", None)) for d in devices.flat]
    settings = sorted(item for item in os.environ.items() if item[0].startswith(("JAX", "LIBTPU", "TPU", "XLA")))
    settings += [("processor", runtime_devices.processor())] if devices.flat[0].platform == "cpu" else []
    readers = [inspect.getsource(module) for module in (sys.modules[__name__], traffic, runtime_devices)]
    asked = [_versions(), devices.flat[0].device_kind, places, settings, readers, lowered.as_text()]
    name = f"{hashlib.sha256(repr(asked).encode()).hexdigest()}.json"
    folder, path = jax.config.jax_compilation_cache_dir, Path(os.devnull) / name  # which cannot be made
    with contextlib.suppress(UserError):
        path = Path(user_cache() if not folder or "://" in folder else folder) / "planned" / name
    with contextlib.suppress(OSError, ValueError):
        return read_object(path) | {"kept": True}
    facts = _compiled(lowered, devices)
    with contextlib.suppress(OSError, StorageError):  # else it is compiled again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, facts)
    return facts | {"kept": False}


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@contextlib.contextmanager
def _in_its_words(devices: np.ndarray) -> Iterator[None]:
    """Turns what rules of lowering and a compiler raise into a UserError, except for too little memory."""
    try:
        yield
    except Exception as error:  # each library has its own
        if isinstance(error, Interrupted) or lacks_memory(error):
            raise
        kind, words = devices.flat[0].device_kind, one_line(error, 300)
        raise UserError(
            f"{kind}: its compiler fails: {words}; try another attention_kernel, dtype or mesh, or version of it"
        ) from error


def _compiled(lowered: Any, devices: np.ndarray) -> dict[str, Any]:
    start = time.monotonic()
    try:
        with _in_its_words(devices):
            program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, available = [*sizes_in(str(error)), None, None][:2]
        return {
            "refused": one_line(error, 300),
            "needed_bytes": needed,
            "available_bytes": available,
            "compile_seconds": time.monotonic() - start,
        }
    seconds, held, text = time.monotonic() - start, program.memory_analysis(), program.as_text()
    sizes = {name: getattr(held, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
    cost = program.cost_analysis() or {}
    peak = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]  # of what a CPU's compiler tells
    if devices.flat[0].platform != "cpu":
        peak = held.peak_memory_in_bytes
    kernels = Counter(name if called == "tpu_custom_call" else called for name, called in _KERNEL.findall(text))
    return {
        "peak_bytes": peak,
        **{f"{name}_bytes": size for name, size in sizes.items()},
        "flops": (cost[0] if isinstance(cost, list) else cost).get("flops"),
        "cycles": traffic.cycles(text),
        "compile_seconds": seconds,
        "kernels": kernels,
        "donated": len(re.findall(r"\b(?:may|must)-alias\b", text.partition("\n")[0])),
        "collectives": [dataclasses.asdict(c) for c in traffic.collectives(text, devices.size)],
    }
