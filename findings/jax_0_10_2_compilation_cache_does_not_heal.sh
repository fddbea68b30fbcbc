#!/usr/bin/env bash
# JAX's persistent compilation cache never replaces an entry. When the disk takes only a part of one (here a limit on the
# size of files stands in for a full disk), JAX warns and goes on, but the part stays under the entry's name. One would
# expect the next process, which cannot read it and compiles again, to write the new program over it. It does not: the
# writer returns when a file of that name exists, whatever is in it. So every later process warns, compiles and throws
# the result away, for ever, though there is room on the disk again. Removing the file by hand is the only cure.
# Seen on 2026-11-29, Python 3.11 on Linux x86_64: jax 0.10.2, jaxlib 0.10.2.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip --quiet --disable-pip-version-check install jax==0.10.2 jaxlib==0.10.2

cat >"$folder/program.py" <<'PROGRAM'
import sys, warnings
import jax

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(5))
print("; ".join(sorted({str(w.message).split(" for ")[0] for w in said})) or "no warning")
PROGRAM

export JAX_PLATFORMS=cpu
start() { "$folder/environment/bin/python" "$folder/program.py" "$folder/cache"; }
sizes() { (cd "$folder/cache" && stat --format=%s -- *-cache | sort -n | tail -n 1); }

mkdir "$folder/cache"
echo "while files may have 1 KiB: $(ulimit -f 1; start), the largest entry has $(sizes) bytes"
last=
for number in 1 2 3; do
    last=$(start)
    echo "start $number, without a limit: $last, the largest entry has $(sizes) bytes"
done
if [[ $last != *"Error reading persistent compilation cache entry"* || $(sizes) != 1024 ]]; then
    echo "this has changed: the damaged entry was replaced, or nobody is warned of it"
    exit 1
fi
