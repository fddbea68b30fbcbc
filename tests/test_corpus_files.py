"""Where a corpus is cut no token changes, and a large one comes out as it went in."""

import multiprocessing

import numpy as np
import pytest
import regex
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import pattern, run, whole

from corpus import files as corpus_files
from corpus.dataset import Wanted
from corpus.fetch import dataset_path

FRAGMENTS = [*"aZ \n.!/'7ёд中。\u3000\xa0é_", "  ", "\r\n", "\n\n", "!\n", "\n/", "'s", "x y"]


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
@given(text=st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=30).map("".join))
@settings(max_examples=300)
def test_a_cut_leaves_every_piece_of_the_patterns_alone(name, text):
    data, find = text.encode(), regex.compile(pattern(name)).findall
    for found in corpus_files._CUT.finditer(data):
        left, right = data[: found.start()].decode(), data[found.start() :].decode()
        assert find(left) + find(right) == find(text)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_enwik8_by_bytes(tmp_path, processes):
    path = dataset_path("enwik8", ROOT / "data")
    chosen = Wanted("", "byte", data_dir=tmp_path, val_fraction=0.05, test_fraction=0.05, shard_tokens=30_000_000)
    index = run(path, tmp_path / "out", chosen, processes)
    assert {name: part["tokens"] for name, part in index["splits"].items()} == {
        "train": 90_000_000,
        "val": 5_000_000,
        "test": 5_000_000,
    }
    tokens, _ = whole(tmp_path / "out", "byte")
    order = [part for name in ("train", "val", "test") for part in index["splits"][name]["shards"]]
    assert len(order) == 5 and tokens.astype(np.uint8).tobytes() == path.read_bytes()
    assert not multiprocessing.active_children()
