"""Token shards on disk: the .bin files of llm.c and modded-nanogpt, and nanoGPT's and Megatron's, which have no header.

llm.c's format (dev/data/data_common.py): 256 little-endian int32, the first three magic, version and number of tokens,
then the tokens, uint16 (GPT-2's) or uint32 (Llama 3's), by FORMATS. nanoGPT's are the tokens alone, whose type shows in
their content. Megatron-LM's (megatron/core/datasets/indexed_dataset.py) too, and an .idx beside each says the type: the
magic, then version, type, numbers of sequences and of documents (uint64 but for the type, a byte), the sequences'
lengths (int32) and where they begin (int64, bytes).
"""

import functools
import hashlib
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from corpus.formats import require_plain
from runtime.errors import UserError, one_line
from runtime.files import open_regular

HEADER_BYTES = 1024
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: version, type
HEADERLESS = ("train.bin", "val.bin", "test.bin")  # what nanoGPT calls its files
INDEX_MAGIC, INDEX_HEADER = b"MMIDIDX\0\0", "<QBQQ"
INDEX_TYPES = {1: "u1", 2: "u1", 3: "<u2", 4: "<u4", 5: "<u8", 8: "<u2"}  # read as unsigned: no id is below 0
WIDER_FROM = 16  # tokens; with fewer, one cannot tell whether they take more bytes than their vocabulary needs

MAPPED_AT_ONCE = 64  # each map holds a file descriptor, and a process may have only some hundreds
SAMPLES, SAMPLE_TOKENS = 5, 2048  # of each shard, for `sample_hash`


@dataclass(frozen=True)
class Shard:
    """A file of tokens, its header checked: `offset` bytes, then `num_tokens` of type `dtype`."""

    path: Path
    num_tokens: int
    dtype: np.dtype
    offset: int
    modified: int  # time of the last change, in nanoseconds

    @property
    def num_bytes(self) -> int:
        """The size of the whole file."""
        return self.offset + self.num_tokens * self.dtype.itemsize


def header(num_tokens: int, dtype: np.dtype) -> bytes:
    """The header of a shard with tokens of type uint16 or uint32."""
    magic, version = next((m, v) for m, (v, kind) in FORMATS.items() if kind == dtype)
    words = np.zeros(HEADER_BYTES // 4, "<i4")
    words[:3] = magic, version, num_tokens
    return words.tobytes()


def is_shard(path: Path) -> bool:
    """Whether the file begins as a shard does, or has an index beside it; false if it cannot be read."""
    return int.from_bytes(_beginning(path, 4), "little") in FORMATS or _has_index(path)


def _beginning(path: Path, size: int) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(size)
    except OSError:
        return b""


def _has_index(path: Path) -> bool:
    return _beginning(path.with_suffix(".idx"), len(INDEX_MAGIC)) == INDEX_MAGIC


def read_shard(path: Path, vocab_size: int = 2**16) -> Shard:
    """The shard in a file, as its header or the index beside it says; else `_by_content` guesses its type of tokens.

    Raises UserError if the file cannot be read, is no shard, is not as long as it should be, or holds no token.
    """
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno())
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    size, modified = found.st_size, found.st_mtime_ns
    magic, version, count = np.frombuffer(head.ljust(HEADER_BYTES, b"\0"), "<i4")[:3].tolist()
    if magic in FORMATS:
        expected, dtype = FORMATS[magic]
        if version != expected:
            raise UserError(f"{path}: has version {version} under magic {magic}, expected {expected}; write it again")
        shard = Shard(path, count, dtype, HEADER_BYTES, modified)
    elif _has_index(path):
        shard = Shard(path, *_by_index(path.with_suffix(".idx")), 0, modified)
    elif path.name in HEADERLESS:
        require_plain(path, head)
        if size % 2:
            raise UserError(f"{path}: {size:,} bytes, an odd number, where each token has two or more; copy it again")
        dtype = _by_content(path, size, vocab_size)
        shard = Shard(path, size // dtype.itemsize, dtype, 0, modified)
    else:
        problem = f"begins with {magic}, not a shard's magic ({' or '.join(map(str, FORMATS))})"
        only = f"only {', '.join(HEADERLESS)} may have no header"
        raise UserError(f"{path}: {problem}, and {only}; leave it out, or make shards with `main.py prepare`")
    if size != (promised := shard.num_bytes):
        what = "it is cut short" if size < promised else "it does not end there"
        need = f"{shard.num_tokens:,} tokens need {promised:,}"
        raise UserError(f"{path}: has {size:,} bytes where {need}; {what}: copy it again")
    if shard.num_tokens < 1:
        raise UserError(f"{path}: holds no tokens; leave it out")
    return shard


def _by_index(path: Path) -> tuple[int, np.dtype]:
    """The number of tokens, and their type, by an index: the file ends where the last sequence ends."""
    start = len(INDEX_MAGIC) + struct.calcsize(INDEX_HEADER)
    try:
        version, code, sequences, _ = struct.unpack(INDEX_HEADER, _beginning(path, start)[len(INDEX_MAGIC) :])
        if version != 1 or code not in INDEX_TYPES:
            raise ValueError(f"version {version}, type {code}")
        last = lambda kind, offset: int(np.fromfile(path, kind, 1, offset=offset)[0]) if sequences else 0
        length = last("<i4", start + 4 * (sequences - 1))
        begins = last("<i8", start + 4 * sequences + 8 * (sequences - 1))
    except (OSError, ValueError, IndexError, OverflowError, struct.error) as error:
        raise UserError(f"{path}: is no index that can be read ({one_line(error)}); copy it again") from error
    dtype = np.dtype(INDEX_TYPES[code])
    return begins // dtype.itemsize + length, dtype


def _by_content(path: Path, size: int, vocab_size: int) -> np.dtype:
    """A guess at the type of tokens without a header: the widest for which all sampled ids lie in the vocabulary.

    A narrower type would fit as well: ids of four bytes, read as two, are twice as many, and every second one is 0.
    Raises UserError if they are no ids, or are of fewer bytes than the vocabulary needs.
    """
    need = 2 if vocab_size <= 2**16 else 4
    for dtype in map(np.dtype, ("<u8", "<u4", "<u2")):
        if dtype.itemsize < need or size % dtype.itemsize:
            continue
        if not size:
            return dtype
        tokens = np.memmap(path, dtype, "r")
        seen = np.concatenate([tokens[start : start + SAMPLE_TOKENS] for start in _sample_starts(len(tokens))])
        many = len(tokens) >= WIDER_FROM
        if dtype.itemsize == 2:
            fits = seen[:SAMPLE_TOKENS:2].any() == seen[1:SAMPLE_TOKENS:2].any() or not many
        else:
            fits = seen.max() < vocab_size and (dtype.itemsize == need or (seen.any() and many))
        if fits:
            return dtype
    problem = f"its numbers are no token ids of two, four or eight bytes for a vocabulary of {vocab_size:,}"
    raise UserError(f"{path}: {problem}; set config.tokenizer to the one that made it, or write them as uint{8 * need}")


def _sample_starts(num_tokens: int) -> list[int]:
    """Where `SAMPLES` blocks of SAMPLE_TOKENS tokens begin, the first and last of them at the ends."""
    last = max(0, num_tokens - SAMPLE_TOKENS)
    return [last * i // (SAMPLES - 1) for i in range(SAMPLES)]


class ShardedTokens:
    """The tokens of shards of one type end to end, or from `start` to `stop` of these, as one array [num_tokens].

    It is there to slice: a file is mapped when a slice needs it, and every id in a slice has been checked. `scattered`
    slices will lie anywhere, so the system should not read ahead: a cold one of 4 KB takes 0.06 instead of 3.5 ms
    (measured on ext4).
    """

    def __init__(
        self, shards: Sequence[Shard], vocab_size: int, start: int = 0, stop: int | None = None, scattered: bool = False
    ):
        self._shards, self._vocab_size, self._first = tuple(shards), vocab_size, start
        self._starts = list(accumulate((shard.num_tokens for shard in shards), initial=0))
        self._size = (self._starts[-1] if stop is None else stop) - start
        self._map = functools.lru_cache(MAPPED_AT_ONCE)(functools.partial(_map, scattered=scattered))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice) -> np.ndarray:
        """Tokens `start:stop`. Raises UserError if one of them is not in the vocabulary, or if its file has changed."""
        start, stop, _ = where.indices(self._size)
        start, stop = start + self._first, stop + self._first
        parts = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            shard, begin = self._shards[number], self._starts[number]
            end = min(stop, begin + shard.num_tokens)
            mapped, tokens = self._map(shard)
            if mapped.size() < shard.num_bytes:  # the kernel ends a process that reads where the file was cut off
                raise _changed(shard)
            part = tokens[start - begin : end - begin]
            if part.max() >= self._vocab_size:
                at = int(np.flatnonzero(part >= self._vocab_size)[0])
                what = f"token {start - begin + at:,} is {part[at]}, outside the vocabulary of {self._vocab_size:,}"
                raise UserError(f"{shard.path}: {what}; set config.tokenizer to the one that made it, or copy it again")
            parts.append(part)
            start, number = end, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.uint16)


def _map(shard: Shard, scattered: bool) -> tuple[mmap.mmap, np.ndarray]:
    try:
        found = os.stat(shard.path)
        if (found.st_size, found.st_mtime_ns) != (shard.num_bytes, shard.modified):
            raise _changed(shard)
        tokens = np.memmap(shard.path, shard.dtype, "r", shard.offset, (shard.num_tokens,))
    except (OSError, ValueError) as error:
        raise UserError(f"{shard.path}: cannot be mapped ({one_line(error)}); was it changed or moved?") from error
    if scattered:
        tokens._mmap.madvise(mmap.MADV_RANDOM)
    return tokens._mmap, np.asarray(tokens)  # drops the memmap class, whose slices cost several times as much


def _changed(shard: Shard) -> UserError:
    return UserError(f"{shard.path}: was changed while this run read it; put the old one back, or begin with --fresh")


def sample_hash(shards: Sequence[Shard], vocab_size: int) -> str:
    """sha256 over each shard's type, length and five blocks of 4 or 8 KiB, the first and last of them at its ends.

    It depends on no path or time. A change between the blocks is not noticed, as reading all would take minutes. Raises
    UserError if a token in them is not in the vocabulary.
    """
    digest, tokens, begin = hashlib.sha256(), ShardedTokens(shards, vocab_size, scattered=True), 0
    for shard in shards:
        digest.update(f"{shard.dtype.str} {shard.num_tokens}\n".encode())
        for start in _sample_starts(shard.num_tokens):
            digest.update(tokens[begin + start : begin + min(start + SAMPLE_TOKENS, shard.num_tokens)].tobytes())
        begin += shard.num_tokens
    return digest.hexdigest()
