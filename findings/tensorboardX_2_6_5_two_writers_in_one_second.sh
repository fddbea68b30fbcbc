#!/usr/bin/env bash
# tensorboardX 2.6.5: a folder of TensorBoard's may hold many event files, and each SummaryWriter makes its own, so one
# would expect a second writer in the same folder to add to what the first has written, as PyTorch's does, whose files'
# names hold the process and a counter. tensorboardX's hold only the second of the clock and the host, and the file is
# opened to be written from its beginning. So a writer that is made within the same second as another, by a job that is
# restarted, a sweep that shares a folder, or one writer for training and one for validation, empties the other's file: a
# closed one has lost all its scalars, of two open ones TensorBoard reads as far as the first piece. No word of it is said.
# Seen on 2026-11-29, Python 3.11 on Linux x86_64: tensorboardX 2.6.5, protobuf 7.35.1, numpy 2.4.6. Output:
#   both within one second: 1 file, scalars {'second': 1}
#   a second between them: 2 files, scalars {'first': 5, 'second': 1}
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/environment"
packages=(tensorboardX==2.6.5 protobuf==7.35.1 numpy==2.4.6)
"$folder/environment/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" 2>/dev/null

"$folder/environment/bin/python" - "$folder" <<'PYTHON'
import struct
import sys
import time
from collections import Counter
from pathlib import Path

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event


def write(place: Path, tag: str, count: int) -> None:
    with SummaryWriter(str(place)) as writer:
        for step in range(count):
            writer.add_scalar(tag, 0.5 * step, step)


def read(path: Path) -> list[str]:
    """The tag of each scalar: a record is its length, a checksum, an Event, a checksum."""
    data, tags = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        tags += [value.tag for value in Event.FromString(data[12 : 12 + length]).summary.value]
        data = data[16 + length :]
    return tags


def both(place: Path, seconds: float) -> tuple[int, dict[str, int]]:
    """Five scalars by one writer and one by another so much later: how many files, and how many of each they hold."""
    time.sleep(1 - time.time() % 1)  # to the beginning of a second
    write(place, "first", 5)
    time.sleep(seconds)
    write(place, "second", 1)
    files = list(place.iterdir())
    return len(files), dict(sorted(Counter(tag for path in files for tag in read(path)).items()))


seen = [both(Path(sys.argv[1]) / f"{seconds}", seconds) for seconds in (0, 1)]
for when, (files, scalars) in zip(("both within one second", "a second between them"), seen, strict=True):
    print(f"{when}: {files} file{'s' * (files > 1)}, scalars {scalars}")
if seen != [(1, {"second": 1}), (2, {"first": 5, "second": 1})]:
    sys.exit("this has changed")
PYTHON
