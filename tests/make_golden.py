"""Write tests/data/golden_run.zip: a checkpoint of today's format, and the losses of the steps that follow it.

    PYTHONPATH=. python tests/make_golden.py

Only to be run when the format changes on purpose: the test that reads it stands for the runs that users have.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

from helpers import ROOT, make_text, rows, tiny_config

import train_lib

CHANGES = {"num_blocks": 1, "num_heads": 1, "embedding_dim": 8, "mlp_dim": 12, "context_len": 8, "keep": 1}
CHANGES |= {"newton_schulz_steps": 5}
CHANGES |= {"dataset": "text.txt", "eval_every": 1000, "save_every": 4, "sample_every": 0}
STEP, MORE = 4, 6


def write() -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "golden"
        place.mkdir()
        os.chdir(place)  # where the text lies: a run's data set is known by its name
        (place / CHANGES["dataset"]).write_text(make_text(), encoding="utf-8")
        train_lib.train(tiny_config(max_steps=STEP, **CHANGES), place / "run")
        shutil.copytree(place / "run", Path(scratch) / "on")
        train_lib.train(tiny_config(max_steps=STEP + MORE, **CHANGES), Path(scratch) / "on")
        for name in ("loss.png", ".lock"):
            (place / "run" / name).unlink(missing_ok=True)
        losses = {row["step"]: row["loss"] for row in rows(Path(scratch) / "on") if row["step"] > STEP}
        expected = {"config": {**CHANGES, "max_steps": STEP + MORE}, "step": STEP, "losses": losses}
        (place / "expected.json").write_text(json.dumps(expected, indent=1))
        target = ROOT / "tests" / "data" / "golden_run"
        target.parent.mkdir(exist_ok=True)
        return Path(shutil.make_archive(str(target), "zip", place))


if __name__ == "__main__":
    path = write()
    print(f"{path}: {path.stat().st_size:,} bytes")
