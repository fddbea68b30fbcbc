#!/usr/bin/env bash
# flax 0.12.8 declares "jax>=0.10.0", so pip installs it beside jax 0.11.2 without a word, and `pip check` finds nothing
# wrong; but `from flax import nnx` then raises AttributeError, since jax.experimental.hijax.HiPrimitive is gone from
# jax 0.11. One would expect either an upper bound in its requirements or a module that imports. flax 0.12.12 does import.
# Who upgrades jax alone meets this, and the message names neither version.
# Seen on 2026-11-29, Python 3.13 on Linux x86_64: jax 0.11.2, jaxlib 0.11.2, flax 0.12.8 and 0.12.12.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python=${PYTHON:-python3.13} # jax 0.11 needs 3.12 or newer
"$python" -m venv "$folder/environment"
pip=("$folder/environment/bin/python" -m pip --quiet --disable-pip-version-check)

try() { # flax's version -> what importing nnx prints last
    "${pip[@]}" install jax==0.11.2 jaxlib==0.11.2 "flax==$1" 2>/dev/null
    "${pip[@]}" check >/dev/null || { echo "pip check finds something wrong"; return; }
    "$folder/environment/bin/python" -c 'from flax import nnx; print("imports")' 2>&1 | tail -n 1 || true
}

older=$(try 0.12.8)
newer=$(try 0.12.12)
printf 'flax 0.12.8:  %s\nflax 0.12.12: %s\n' "$older" "$newer"
[[ $older == *"AttributeError"*"HiPrimitive"* && $newer == imports ]] || { echo "this has changed"; exit 1; }
