"""What devices and their links can do: from data sheets, or measured on the machine this runs on."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from training.cost import peak_flops


@dataclass(frozen=True)
class Hardware:
    """One device and what links it to others; bytes and seconds."""

    name: str
    flops: float  # a second, dense, of the arithmetic's dtype; float32 products are taken to run at half of it
    memory: float  # bytes
    memory_speed: float  # bytes a second
    link: float  # bytes a second that a device sends while it receives as many, within a node
    node: int  # devices that are linked so
    network: float  # the same between nodes, for each device; 0: there is no other node
    efficiency: float  # share of `flops` that a step on one device reaches
    latency: float  # seconds a collective takes for each doubling of the devices, however little it moves
    measured: bool = False  # here; otherwise `efficiency` and `latency` are assumed and the rest is a data sheet's


def _nvidia(name: str, memory: float, memory_speed: float, link: float, network: float) -> Hardware:
    """A node of eight on NVLink, with a network card for each; `flops` from the table that MFU is taken from.

    Efficiency: 0.4 is what llm.c reports for GPT-2 124M on one GPU (MFU); large models reach more.
    """
    flops = peak_flops(name)
    assert flops is not None
    return Hardware(name, flops, memory, memory_speed, link, 8, network, efficiency=0.4, latency=5e-6)


# NVIDIA's data sheets of each GPU (memory, its bandwidth, NVLink: half of the two-way figure) and of its DGX (network:
# eight ports of 200 Gb/s in a DGX A100, of 400 Gb/s in a DGX H100, H200 and B200).
TABLE = {
    hardware.name: hardware
    for hardware in (
        _nvidia("A100", 80e9, 2.04e12, 300e9, 25e9),
        _nvidia("H100", 80e9, 3.35e12, 450e9, 50e9),
        _nvidia("H200", 141e9, 4.8e12, 450e9, 50e9),
        _nvidia("B200", 180e9, 8.0e12, 900e9, 50e9),
    )
}
SUMS = 16  # timed together, of a size that takes no time to move
ATTAINED = 0.8  # of a link's speed on the data sheet, by large collectives (assumed)


def measure_here(mesh: Mesh, tokens: int, width: int, hidden: int, state_bytes: int) -> Hardware:
    """This machine's row: on all devices at once float32 products [tokens, width] x [width, hidden], a copy, a sum.

    Args:
      state_bytes: of the array that each device adds up with the others.
    """
    n = mesh.size
    split, axes = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), mesh.axis_names
    make = lambda *shape: jax.device_put(jnp.full((n, *shape), 1e-3, jnp.float32), split)
    x, w, flat = make(tokens, width), make(width, hidden), make(max(state_bytes // 4, 1024))

    def everywhere(function: Callable) -> Callable:
        specs = PartitionSpec(axes)
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))

    product = everywhere(lambda pair: pair[0] @ pair[1] @ pair[1].mT)
    products_s = _seconds(lambda: product((x, w)))
    copy, reduce = everywhere(lambda a: a + 1), everywhere(lambda a: jax.lax.psum(a, axes))
    copy_s = _seconds(lambda: copy(flat))
    reduce_s = _seconds(lambda: reduce(flat))
    once, often = (everywhere(lambda a, times=times: _sums(a, axes, times)) for times in (1, 1 + SUMS))
    small = flat[:, :1024]
    small_s = max(_seconds(lambda: often(small)) - _seconds(lambda: once(small)), 0.0) / SUMS  # without the dispatch
    moved = 2 * (n - 1) / n * flat.nbytes / n
    doublings = max((n - 1).bit_length(), 1)
    return Hardware(
        name="this machine",
        flops=4 * tokens * width * hidden / products_s,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / n,
        memory_speed=2 * flat.nbytes / n / copy_s,
        link=moved / reduce_s / ATTAINED if n > 1 else float("inf"),
        node=n,
        network=0.0,
        efficiency=1.0,
        latency=small_s / doublings if n > 1 else 0.0,
        measured=True,
    )


def _sums(x: jax.Array, axes: tuple[str, ...], times: int) -> jax.Array:
    """So many sums over the devices, each waiting for the one before."""
    for _ in range(times):
        x = jax.lax.psum(x, axes) / 2
    return x


def _seconds(call: Callable[[], object], rounds: int = 9) -> float:
    """Median time of a call, after two that are not counted."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
