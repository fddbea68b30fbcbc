"""Where a corpus is cut no token changes, and a large one comes out as it went in."""

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import pattern

from corpus import files as corpus_files

FRAGMENTS = [*"aZ \n.!/'7ёд中。\u3000\xa0é_", "  ", "\r\n", "\n\n", "!\n", "\n/", "'s", "x y"]


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
@given(text=st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=30).map("".join))
@settings(max_examples=300)
def test_a_cut_leaves_every_piece_of_the_patterns_alone(name, text):
    data, find = text.encode(), regex.compile(pattern(name)).findall
    for found in corpus_files._CUT.finditer(data):
        left, right = data[: found.start()].decode(), data[found.start() :].decode()
        assert find(left) + find(right) == find(text)
