#!/usr/bin/env bash
# ml_collections 1.1.0: `ConfigDict(config)`, `copy.copy(config)` and `new.update(config)` give a config of its own: a key
# that is set in the copy is not set in the original, as the documentation says ("the same behavior as Python dict").
# One would expect that of all keys. It is so for each that was given a value, and for none that was given a placeholder
# or a reference: setting `copy.steps = 100` sets the original's, and that of every other such copy, at the same time,
# though nothing reads one key from another. So of three jobs made of one base config, each with its own number of steps,
# all have the last one's, and which keys behave so cannot be seen from how they are read. `copy.deepcopy` keeps the
# configs apart.
# Seen on 2026-11-29, Python 3.11 on Linux x86_64: ml_collections 1.1.0, absl-py 2.4.0, PyYAML 6.0.3. Output:
#   ConfigDict(base): width [1, 2, 3] in the copies, 10 in the base; steps [300, 300, 300] in the copies, 300 in the base
#   copy.copy(base): the same
#   update(base): the same
#   copy.deepcopy(base): width [1, 2, 3] in the copies, 10 in the base; steps [100, 200, 300] in the copies, None in the base
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/environment"
packages=(ml_collections==1.1.0 absl-py==2.4.0 PyYAML==6.0.3)
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" 2>/dev/null

"$folder/environment/bin/python" - <<'PYTHON'
import copy
import sys

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def updated(base: ConfigDict) -> ConfigDict:
    new = ConfigDict()
    new.update(base)
    return new


def three(copied) -> dict[str, tuple[list[int], int | None]]:
    """Three copies of one config, each changed in its turn: what they and the base have in the end."""
    base = ConfigDict({"width": 10, "steps": placeholder(int)})
    copies = []
    for number in (1, 2, 3):
        one = copied(base)
        one.width, one.steps = number, 100 * number
        copies.append(one)
    return {key: ([one[key] for one in copies], base[key]) for key in ("width", "steps")}


ways = {
    "ConfigDict(base)": ConfigDict,
    "copy.copy(base)": copy.copy,
    "update(base)": updated,
    "copy.deepcopy(base)": copy.deepcopy,
}
seen = {name: three(copied) for name, copied in ways.items()}
for name, found in seen.items():
    told = [f"{key} {copies} in the copies, {base} in the base" for key, (copies, base) in found.items()]
    print(f"{name}: {'; '.join(told)}")
apart = {"width": ([1, 2, 3], 10), "steps": ([100, 200, 300], None)}
through = apart | {"steps": ([300, 300, 300], 300)}
if seen != dict.fromkeys(ways, through) | {"copy.deepcopy(base)": apart}:
    sys.exit("this has changed")
PYTHON
