#!/usr/bin/env bash
# JAX refuses to divide or multiply a float32 array by a Python integer of 2^31 or more. A Python number beside an array
# is weak: it takes the array's type, and float32 holds 2^31 exactly, so one would expect x / 2**31 to be what NumPy and
# `x / float(2**31)` give. But both operands become arguments of a compiled function first, where a Python integer is an
# int32 and does not fit: OverflowError. It meets who divides a sum by a count of elements: a mean over the parameters of
# a model of two billion works, of three billion no longer, although nothing of that size is computed here.
# `array.size` is such an integer.
# Seen on 2026-11-30, Python 3.11 on Linux x86_64: jax 0.10.2, jaxlib 0.10.2.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip --quiet --disable-pip-version-check install jax==0.10.2 jaxlib==0.10.2

cat >"$folder/program.py" <<'PROGRAM'
import jax, jax.numpy as jnp, numpy as np

x = np.float32([3.0])
ways = {
    "NumPy, x / 2**31": lambda: x / 2**31,
    "JAX, x / (2**31 - 1)": lambda: jnp.asarray(x) / (2**31 - 1),
    "JAX, x / float(2**31)": lambda: jnp.asarray(x) / float(2**31),
    "JAX, x / 2**31": lambda: jnp.asarray(x) / 2**31,
    "JAX, x * 2**31": lambda: jnp.asarray(x) * 2**31,
    "JAX, a shape alone, its entries / its size": lambda: jax.eval_shape(
        lambda w: w / w.size, jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    ),
}
for name, way in ways.items():
    try:
        print(f"{name}: {way().dtype}")
    except OverflowError:
        print(f"{name}: OverflowError")
PROGRAM

seen=$(JAX_PLATFORMS=cpu "$folder/environment/bin/python" "$folder/program.py")
echo "$seen"
expected="NumPy, x / 2**31: float32
JAX, x / (2**31 - 1): float32
JAX, x / float(2**31): float32
JAX, x / 2**31: OverflowError
JAX, x * 2**31: OverflowError
JAX, a shape alone, its entries / its size: OverflowError"
if [[ $seen != "$expected" ]]; then
    echo "this has changed"
    exit 1
fi
