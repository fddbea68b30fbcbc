"""Preparing a hundred million bytes."""

import multiprocessing

import numpy as np
import pytest
from helpers import ROOT

from corpus.fetch import dataset_path
from corpus.files import Settings
from corpus.prepare import prepare
from corpus.shards import ShardedTokens, read_shard
from runtime.files import read_json
from runtime.screen.console import Console


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_enwik8_by_bytes(tmp_path, processes):
    path = dataset_path("enwik8", ROOT / "data")
    settings, out = Settings("byte", 0.05, 0.05, 30_000_000, "text"), tmp_path / "out"
    prepare(str(path), out, settings, tmp_path, processes, Console())
    index = read_json(out / "index.json")
    assert {name: part["tokens"] for name, part in index["splits"].items()} == {
        "train": 90_000_000,
        "val": 5_000_000,
        "test": 5_000_000,
    }
    shards = [read_shard(out / shard["file"]) for part in index["splits"].values() for shard in part["shards"]]
    assert len(shards) == 5 and ShardedTokens(shards, 256)[:].astype(np.uint8).tobytes() == path.read_bytes()
    assert not multiprocessing.active_children()
