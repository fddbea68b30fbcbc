"""Tokens a second: `main.py prepare`, and tiktoken's own batch call on as many threads, on the same text in turns.

    python -m benchmarks.prepare FILE                # of plain text, as data/.cache/enwik8; gpt2's tokens

Here the whole process counts, from the shell prompt to the shards on the disk; there nothing but the call, which gets
the text in memory, in pieces of a mebibyte.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiktoken

from benchmarks.harness import RESULTS, ROOT, report, spread
from corpus.fetch import tiktoken_cache
from corpus.load_shards import INDEX_FILE

PIECE = 2**20  # characters


def here(path: Path, tokenizer: str, threads: int) -> tuple[float, int]:
    """Seconds of `main.py prepare`, and the tokens that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "shards"
        command = [sys.executable, "main.py", "prepare", f"--dataset={path}", f"--tokenizer={tokenizer}"]
        start = time.perf_counter()
        subprocess.run(
            [*command, f"--threads={threads}", f"--out={out}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - start
        splits = json.loads((out / INDEX_FILE).read_text())["splits"]
        return seconds, sum(split["tokens"] for split in splits.values())


def theirs(pieces: list[str], encoding: tiktoken.Encoding, threads: int) -> tuple[float, int]:
    """The same of tiktoken's call."""
    start = time.perf_counter()
    tokens = encoding.encode_ordinary_batch(pieces, num_threads=threads)
    return time.perf_counter() - start, sum(map(len, tokens))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", default="gpt2", help="an encoding of tiktoken")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    path, text = flags.file.resolve(), flags.file.read_text(encoding="utf-8")
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    os.environ["TIKTOKEN_CACHE_DIR"] = str(tiktoken_cache(flags.tokenizer, ROOT / "data"))
    encoding = tiktoken.get_encoding(flags.tokenizer)
    rates: dict[str, list[float]] = {"main.py prepare": [], "encode_ordinary_batch": []}
    for _ in range(flags.rounds):
        for side, (seconds, tokens) in zip(
            rates,
            (here(path, flags.tokenizer, flags.threads), theirs(pieces, encoding, flags.threads)),
            strict=True,
        ):
            rates[side].append(tokens / seconds)
    ratios = spread([ours / other for ours, other in zip(*rates.values(), strict=True)])
    rows = [
        {"side": side, "tokens/s": found["median"], "quartiles": f"{found['low']:,.0f} - {found['high']:,.0f}"}
        for side, found in ((side, spread(values)) for side, values in rates.items())
    ]
    rows[0]["times as fast"], rows[1]["times as fast"] = ratios["median"], ""
    title = f"Tokens of {path.name}, {path.stat().st_size:,} bytes, {flags.tokenizer}, {flags.threads} threads"
    report("prepare", title, rows, f"Medians of {flags.rounds} rounds, the ratio's of those within a round.", flags.out)


if __name__ == "__main__":
    main()
