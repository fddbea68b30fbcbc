#!/usr/bin/env bash
# jax.experimental.serialize_executable writes a compiled program, to be loaded by a later process. On a CPU that holds
# only for a program that this process has compiled itself. One that JAX's persistent compilation cache has supplied is
# written without an error, in fewer bytes, and read again without an error; when it is called it raises
# NOT_FOUND: Function wrapped_reduce not found. The same lines of code therefore work in the first process and leave a
# useless file in the second. One would expect an error while it is written, or the same bytes as the first time.
# Called asynchronously, as in a training loop, the error appears only where the result is fetched.
# Seen on 2026-11-29, Python 3.11 on Linux x86_64: jax 0.10.2, jaxlib 0.10.2; jax 0.12.0.1 on Python 3.13 does the same.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python=${PYTHON:-python3.11}
"$python" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip --quiet --disable-pip-version-check install jax==0.10.2 jaxlib==0.10.2

cat >"$folder/program.py" <<'PYTHON'
import sys

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

x = jax.numpy.arange(8.0)
compiled = jax.jit(lambda x: jax.numpy.sin(x) + x.sum()).lower(x).compile()
direct = compiled(x).sum()
written = serialize(compiled)
try:
    loaded = float(deserialize_and_load(*written)(x).sum()) == float(direct)
except jax.errors.JaxRuntimeError as error:
    loaded = str(error).split(" (")[0]
print(len(written[0]), "bytes; equal when loaded:", loaded)
PYTHON

export JAX_PLATFORMS=cpu
mkdir "$folder/cache"
first=$("$folder/environment/bin/python" "$folder/program.py" "$folder/cache")
second=$("$folder/environment/bin/python" "$folder/program.py" "$folder/cache")
printf 'compiled here:      %s\nfrom the disk cache: %s\n' "$first" "$second"
[[ $first == *"True" && $second == *"NOT_FOUND: Function "*" not found" && ${first%% *} -gt ${second%% *} ]] ||
    { echo "this has changed"; exit 1; }
