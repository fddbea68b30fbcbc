"""What a run measures besides its loss: time, memory, utilisation of the hardware, and the file that keeps it all."""

import contextlib
import json
import math
import platform
import re
import resource
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from runtime.files import append_text

PEAK_FLOPS = {
    # Dense bfloat16 floating-point operations a second of one JAX device, by a word or words of its `device_kind`;
    # float16 where the hardware has no bfloat16. Vendors' data sheets, halved where those count 2:4 sparsity.
    "B300": 2.25e15,
    "GB300": 2.5e15,
    "B200": 2.25e15,
    "GB200": 2.5e15,
    "H200": 989e12,
    "H200 NVL": 836e12,
    "GH200": 989e12,
    "H100": 989e12,  # SXM; its device kind reads "NVIDIA H100 80GB HBM3"
    "H100 PCIe": 756e12,
    "H100 NVL": 836e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "T4": 65e12,  # float16
    "V100": 125e12,  # float16
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    # A TPU v2, v3 or 7x chip is two JAX devices, the others are one.
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153e12,
}

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a JAX device by its kind; None for a CPU, a slice of a GPU, or a kind that is not in the table."""

    def named(key: str) -> bool:  # as whole words: an "RTX A1000" is no A100, an L40 no L4
        return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", device_kind) is not None

    if named("MIG"):
        return None
    key = max(filter(named, PEAK_FLOPS), key=len, default=None)
    return None if key is None else PEAK_FLOPS[key]


def mfu(flops_per_token: float, tokens_per_second: float, num_devices: int, device_kind: str) -> float | None:
    """Model FLOPs utilisation: the share, 0 to 1, of the devices' peak that the model's own arithmetic uses.

    As in PaLM (Chowdhery et al., 2022, appendix B): recomputed activations do not count. None where the peak is
    unknown.

    Args:
        flops_per_token: floating-point operations of one forward and backward pass, for one token.
        tokens_per_second: over all devices.
        num_devices: devices in use.
        device_kind: `jax.Device.device_kind`.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_token * tokens_per_second / (num_devices * peak)


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int | None) -> float | None:
    """A loss in nats per token as bits per byte of text, which compares across tokenizers.

    Args:
        loss: mean nats per token.
        num_tokens: tokens of the text.
        num_bytes: UTF-8 bytes of the same text; None, and so is the result, where they are not known.
    """
    return None if num_bytes is None else loss / math.log(2) * num_tokens / num_bytes


def peak_memory_bytes(device: jax.Device) -> int:
    """The most memory used so far: on the device where it keeps count, else by this process (resident size)."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def environment() -> dict[str, Any]:
    """What a result depends on besides its config: versions, devices, the source's git commit, the command line.

    No environment variable is in it: those may hold secrets.
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


def _git_commit() -> str | None:
    """The commit of the tree that this file lies in, with `-dirty` when it was changed; None outside of git."""
    describe = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).parent
        done = subprocess.run(describe, cwd=here, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()
    return None


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each handed to the operating system at once.

    Numbers that are not finite are written as null, for JSON has none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row.

        Raises:
            StorageError: the disk did not take it.
        """
        append_text(self.path, json.dumps(_plain(row), allow_nan=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All rows, except a line that a crash cut short; none when there is no file."""
        rows = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    rows.append(json.loads(line))
        return rows


def _plain(value: Any) -> Any:
    """`value` in JSON's terms: NumPy's and JAX's scalars as Python's, and what is not finite as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
