#!/usr/bin/env bash
# Asked for a slice of four TPU v4 chips, the compiler without a TPU describes eight devices of 15.25 GiB. On a machine
# with such chips JAX shows four, each of both cores of a chip with all of its memory, so a program that fits there is
# refused here, and a mesh of four covers half of the slice. Only chip_config_name="megacore" describes what the machine
# shows: four devices of 30.75 GiB. A v5p, also of two cores, needs no such word. The memory that the compiler gives is
# nowhere in the description; it is told when a program needs more, and it is not the data sheet's: of 32 GiB of a v4 it
# is 30.75, of 16 of a v5e 15.75, of 95 of a v5p 95.74.
# Seen on 2026-11-30, Python 3.11 on Linux x86_64, without a TPU: jax 0.10.2, libtpu 0.0.42.1.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip --quiet --disable-pip-version-check install jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1

cat >"$folder/program.py" <<'PROGRAM'
import re
import jax, jax.numpy as jnp
from jax.experimental import topologies

for name, more in [
    ("v4:2x2x1", {}),
    ("v4:2x2x1", {"chip_config_name": "megacore"}),
    ("v5p:2x2x1", {}),
    ("v5e:2x2", {}),
]:
    devices = topologies.get_topology_desc(name, "tpu", **more).devices
    place = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((10**6, 128), jnp.float32, sharding=place)  # its product with itself takes 4 TB
    try:
        jax.jit(lambda x: x @ x.T).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        print(name, *more.values(), len(devices), "devices of", re.search(r"available HBM \(([\d.]+G)\)", str(error))[1])
PROGRAM

export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-1
seen=$("$folder/environment/bin/python" "$folder/program.py" 2>"$folder/log") || { tail -n 5 "$folder/log"; exit 1; }
echo "$seen"
expected="v4:2x2x1 8 devices of 15.25G
v4:2x2x1 megacore 4 devices of 30.75G
v5p:2x2x1 4 devices of 95.74G
v5e:2x2 4 devices of 15.75G"
if [[ $seen != "$expected" ]]; then
    echo "this has changed"
    exit 1
fi
