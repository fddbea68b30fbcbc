#!/usr/bin/env bash
# The compiled program of several TPU slices has no collective between them. A sum over all devices of two slices of four
# is an all-reduce of eight in what JAX lowers, and one would look for it, as on GPUs and within a slice, in the compiled
# text: an all-reduce among eight. There is none. The compiler sums within each slice by a reduce-scatter, gives the parts
# to the hosts by `send` and `recv`, which name the exchange only in attributes of the slices' runtime, and gathers them
# within the slice again. A tool that adds up the bytes of a program's collectives finds nothing on the slow network
# between slices, the very traffic for whose sake one counts.
# Seen on 2026-11-30, Python 3.11 on Linux x86_64, without a TPU: jax 0.10.2, libtpu 0.0.42.1.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip --quiet --disable-pip-version-check install jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1

cat >"$folder/program.py" <<'PROGRAM'
import re
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

slices = topologies.get_topology_desc("v5e:2x2", "tpu", num_slices=2, chips_per_host_bounds=[2, 2, 1])
devices = sorted(slices.devices, key=lambda device: (device.slice_index, device.id))
mesh = Mesh(np.array(devices), "data")
x = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=NamedSharding(mesh, P("data")))
lowered = jax.jit(lambda x: x.T @ x, out_shardings=NamedSharding(mesh, P())).lower(x)
text = lowered.compile().as_text()
found = set()
for line in text.splitlines():
    if op := re.search(r" (all-reduce|reduce-scatter|all-gather|send|recv)\(", line):
        groups = re.search(r"replica_groups=\{(\{[\d,]+\})", line)
        kind = re.search(r'megascale_transfer_type="(\w+)"', line)
        found.add(f"{op[1]}: {'among ' + str(groups[1].count(',') + 1) if groups else kind and kind[1]}")
print(len(devices), "devices")
print("\n".join(sorted(found)))
PROGRAM

export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-1
seen=$("$folder/environment/bin/python" "$folder/program.py" 2>"$folder/log") || { tail -n 5 "$folder/log"; exit 1; }
echo "$seen"
if grep -q "among 8" <<<"$seen" || ! grep -q "send: ALL_REDUCE" <<<"$seen"; then
    echo "this has changed: the exchange between slices is a collective of the program"
    exit 1
fi
