#!/usr/bin/env bash
# pyarrow 26.0.1 stores the schema of a table in the Parquet file that it writes, and reads columns back with the types
# they had: large_string comes back as large_string, and a dictionary keeps the type of its indices (int8) and whether it
# is ordered. But the type of a dictionary's values is not kept: dictionary<values=large_string> comes back as
# dictionary<values=string>, and dictionary<values=int64> as plain int64, although the stored schema names both.
# One would expect the same types, or that none of a dictionary's are kept. Who concatenates such a file's table with the
# one that was written gets ArrowInvalid, and who asks a column's type before reading text misses some.
# Seen on 2026-11-29, Python 3.11 on Linux x86_64: pyarrow 26.0.1.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip --quiet --disable-pip-version-check install pyarrow==26.0.1
"$folder/environment/bin/python" - "$folder/table.parquet" <<'PROGRAM'
import base64
import sys

import pyarrow as pa
import pyarrow.parquet as pq

path = sys.argv[1]
texts = pa.array(["heron", "eel", "heron"])
narrow = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int8()), pa.array(["heron", "eel"]), ordered=True)
columns = {
    "large_string": texts.cast(pa.large_string()),
    "dictionary of int8 indices, ordered": narrow,
    "dictionary of large_string": texts.cast(pa.large_string()).dictionary_encode(),
    "dictionary of int64": pa.array([7, 9, 7], pa.int64()).dictionary_encode(),
}
table = pa.table(columns)
pq.write_table(table, path)
stored = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(pq.read_metadata(path).metadata[b"ARROW:schema"])))
back = pq.read_table(path).schema
same = [written.type == read.type for written, read in zip(table.schema, back, strict=True)]
for written, read in zip(table.schema, back, strict=True):
    print(f"{written.name}: wrote {written.type}, read {read.type}")
print("the schema stored in the file is the one written:", stored.remove_metadata() == table.schema)
if same != [True, True, False, False] or stored.remove_metadata() != table.schema:
    sys.exit("this has changed")
PROGRAM
