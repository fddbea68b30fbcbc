"""Preparing a hundred million bytes."""

import multiprocessing

import numpy as np
import pytest
from helpers import ROOT

from corpus.dataset import Wanted
from corpus.load_text import find_files
from corpus.prepare import prepare
from corpus.shards import ShardedTokens, read_shard
from runtime.files import read_json
from runtime.screen.console import Console


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_enwik8_by_bytes(tmp_path, threads):
    [path] = find_files("enwik8", ROOT / "data", print)
    fractions, out = {"val_fraction": 0.05, "test_fraction": 0.05}, tmp_path / "out"
    wanted = Wanted(str(path), "byte", data_dir=tmp_path, **fractions, shard_tokens=30_000_000)
    prepare(wanted, out, threads, Console())
    index = read_json(out / "index.json")
    assert {name: part["tokens"] for name, part in index["splits"].items()} == {
        "train": 90_000_000,
        "val": 5_000_000,
        "test": 5_000_000,
    }
    shards = [read_shard(out / shard["file"]) for part in index["splits"].values() for shard in part["shards"]]
    assert len(shards) == 5 and ShardedTokens(shards, 256)[:].astype(np.uint8).tobytes() == path.read_bytes()
    assert not multiprocessing.active_children()
