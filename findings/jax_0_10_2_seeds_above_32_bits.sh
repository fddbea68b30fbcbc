#!/usr/bin/env bash
# jax.random.key takes seeds of up to 63 bits and uses 32 of them, without a word: seeds that are 2^32 apart give one key,
# and -1, 2^32 - 1 and 2^63 - 1 are the same seed. One would expect what JAX does with such an integer everywhere else,
# an OverflowError: fold_in, a jitted function's argument and jnp.asarray raise one for the very number that key takes,
# and so does key from 2^63 on. The Threefry key has room for 64 bits; its upper half stays 0. It meets who makes seeds by
# hashing, or adds a run's number shifted by 32 bits, and then compares "different" runs. With jax_enable_x64 all differ.
# Seen on 2026-11-30, Python 3.11 on Linux x86_64: jax 0.10.2, jaxlib 0.10.2.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip --quiet --disable-pip-version-check install jax==0.10.2 jaxlib==0.10.2

cat >"$folder/program.py" <<'PROGRAM'
import jax, jax.numpy as jnp, numpy as np

ways = {
    "key(7)": lambda: jax.random.key(7),
    "key(2**32 + 7)": lambda: jax.random.key(2**32 + 7),
    "key(np.int64(2**40 + 7))": lambda: jax.random.key(np.int64(2**40 + 7)),
    "key(-1)": lambda: jax.random.key(-1),
    "key(2**63 - 1)": lambda: jax.random.key(2**63 - 1),
    "key(2**63)": lambda: jax.random.key(2**63),
    "jit(key)(2**32 + 7)": lambda: jax.jit(jax.random.key)(2**32 + 7),
    "fold_in(key(7), 2**32 + 7)": lambda: jax.random.fold_in(jax.random.key(7), 2**32 + 7),
    "asarray(2**32 + 7)": lambda: jnp.asarray(2**32 + 7),
}
for name, way in ways.items():
    try:
        print(f"{name}: {jax.random.key_data(way()).tolist()}")
    except OverflowError:
        print(f"{name}: OverflowError")
with jax.enable_x64(True):
    print(f"with x64, key(2**32 + 7): {jax.random.key_data(jax.random.key(2**32 + 7)).tolist()}")
PROGRAM

seen=$(JAX_PLATFORMS=cpu "$folder/environment/bin/python" "$folder/program.py")
echo "$seen"
expected="key(7): [0, 7]
key(2**32 + 7): [0, 7]
key(np.int64(2**40 + 7)): [0, 7]
key(-1): [0, 4294967295]
key(2**63 - 1): [0, 4294967295]
key(2**63): OverflowError
jit(key)(2**32 + 7): OverflowError
fold_in(key(7), 2**32 + 7): OverflowError
asarray(2**32 + 7): OverflowError
with x64, key(2**32 + 7): [1, 7]"
if [[ $seen != "$expected" ]]; then
    echo "this has changed"
    exit 1
fi
