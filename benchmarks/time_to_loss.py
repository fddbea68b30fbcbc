"""From the shell prompt to a validation loss, or the best loss in a given time.

    python -m benchmarks.time_to_loss                                     # to 1.8857, cold and warm, three seeds
    python -m benchmarks.time_to_loss --config=configs/shakespeare.py --target=1.57 --seconds=142

Each run is the whole process `python main.py --config=...`, timed from outside, results on the disk. Its loss is exact:
the whole validation split. Cold is with an empty compile cache, warm with what one run before left. The text must be
there already; packages are installed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run(config: str, seed: int, cache: Path, overrides: list[str]) -> dict[str, Any]:
    """One run of main.py: its seconds, those until its first step had been made, and its last row of metrics."""
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(scratch) / "run"
        command = [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", f"--config.seed={seed}"]
        command += overrides
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        start = time.time()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        first = None
        while process.poll() is None:
            if first is None and (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").stat().st_size:
                first = (workdir / "metrics.jsonl").stat().st_mtime - start
            time.sleep(0.02)
        seconds = time.time() - start
        if process.returncode:
            raise SystemExit(f"main.py ended with status {process.returncode}")
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        return {"seconds": seconds, "first_row": first, **last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/shakespeare_fast.py")
    parser.add_argument("--target", type=float, default=1.8857, help="validation loss in nats per token")
    parser.add_argument("--seconds", type=float, default=0, help="the time that a run may take; 0: any")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags, overrides = parser.parse_known_args()

    from benchmarks.harness import report

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cache_is in ("cold", "warm"):
            for seed in flags.seeds:
                cache = Path(folder) / (f"cold{seed}" if cache_is == "cold" else f"cold{flags.seeds[0]}")
                result = run(flags.config, seed, cache, ["--config.data_dir=" + str(ROOT / "data"), *overrides])
                reached = result["val_loss"] <= flags.target and result["seconds"] <= (flags.seconds or float("inf"))
                rows.append(
                    {
                        "compile cache": cache_is,
                        "seed": seed,
                        "steps": result["step"],
                        "val_loss": f"{result['val_loss']:.4f}",
                        "seconds, whole process": result["seconds"],
                        "to the first logged step": result["first_row"],
                        "reached": "yes" if reached else "no",
                    }
                )
                print(rows[-1], file=sys.stderr)
    medians = {
        kind: statistics.median(row["seconds, whole process"] for row in rows if row["compile cache"] == kind)
        for kind in ("cold", "warm")
    }
    limit = f" within {flags.seconds:.0f} s" if flags.seconds else ""
    note = f"Medians: cold {medians['cold']:.1f} s, warm {medians['warm']:.1f} s. {' '.join(overrides)}"
    name = f"time_to_loss_{Path(flags.config).stem}"
    report(name, f"{flags.config} to a validation loss of {flags.target}{limit}", rows, note.strip())


if __name__ == "__main__":
    main()
